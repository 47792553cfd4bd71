//! Absorbed latent attention of one query row and a few of its heads over the paged cache.
//!
//! Secret: tiles. A score is a 16-lane dot product times the scale; the softmax runs over all visible keys; an output
//! element is an FMA chain from +0.0 over positions in ascending order. Tiles only park those chains, so neither page
//! edges nor the heads computed together show in the bits.

use super::{Lanes, Op, load_part, rows, store_part};
use crate::generic::LANES;

/// Keys handled together: their cached rows stay in L2 while every head passes over them.
const KEYS: usize = 64;

/// The cached rows of one sequence in one layer.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub(crate) cache: &'a [f32],
    pub(crate) pages: &'a [u32],
    pub(crate) page_tokens: usize,
    pub(crate) page_stride: usize,
    pub(crate) offset: usize,
    pub(crate) width: usize,
}

impl<'a> Keys<'a> {
    /// The cached rows of positions `from..from + n`, `n <= KEYS`.
    #[inline(always)]
    fn rows(&self, from: usize, n: usize) -> [&'a [f32]; KEYS] {
        let mut rows: [&[f32]; KEYS] = [&[]; KEYS];
        for (i, row) in rows[..n].iter_mut().enumerate() {
            let t = from + i;
            let start = self.pages[t / self.page_tokens] as usize * self.page_stride
                + self.offset
                + t % self.page_tokens * self.width;
            *row = &self.cache[start..start + self.width];
        }
        rows
    }
}

/// Heads `0..heads` of one query row.
pub(crate) struct Attend<'a> {
    /// `[heads, value_width]`
    pub(crate) out: &'a mut [f32],
    /// `[heads, width]`
    pub(crate) q: &'a [f32],
    pub(crate) heads: usize,
    pub(crate) value_width: usize,
    pub(crate) visible: usize,
    pub(crate) scale: f32,
    pub(crate) keys: Keys<'a>,
    /// At least `[heads, visible]`.
    pub(crate) scores: &'a mut [f32],
}

impl Op for Attend<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(mut self) {
        let (heads, visible) = (self.heads, self.visible);
        assert!(
            self.q.len() >= heads * self.keys.width && self.out.len() >= heads * self.value_width
        );
        assert!(self.scores.len() >= heads * visible && self.value_width <= self.keys.width);
        // SAFETY: the instruction set is the caller's promise; the shapes were checked.
        unsafe {
            for from in (0..visible).step_by(KEYS) {
                let n = KEYS.min(visible - from);
                let keys = self.keys.rows(from, n);
                if V::REGISTERS >= 32 {
                    self.score_block::<V, 4, 4>(&keys[..n], from);
                } else {
                    self.score_block::<V, 2, 2>(&keys[..n], from);
                }
            }
            for h in 0..heads {
                rows::softmax::<V>(&mut self.scores[h * visible..][..visible]);
            }
            self.out[..heads * self.value_width].fill(0.0);
            for from in (0..visible).step_by(KEYS) {
                let n = KEYS.min(visible - from);
                let keys = self.keys.rows(from, n);
                if V::REGISTERS >= 32 {
                    self.value_block::<V, 4, 4>(&keys[..n], from);
                } else {
                    self.value_block::<V, 2, 2>(&keys[..n], from);
                }
            }
        }
    }
}

impl Attend<'_> {
    #[inline(always)]
    unsafe fn score_block<V: Lanes, const R: usize, const C: usize>(
        &mut self,
        keys: &[&[f32]],
        from: usize,
    ) {
        let mut t = 0;
        // SAFETY: tiles stay inside `keys` and `heads`.
        unsafe {
            while t + R <= keys.len() {
                let mut h = 0;
                while h + C <= self.heads {
                    self.score_tile::<V, R, C>(keys, t, from, h);
                    h += C;
                }
                while h < self.heads {
                    self.score_tile::<V, R, 1>(keys, t, from, h);
                    h += 1;
                }
                t += R;
            }
            while t < keys.len() {
                let mut h = 0;
                while h + C <= self.heads {
                    self.score_tile::<V, 1, C>(keys, t, from, h);
                    h += C;
                }
                while h < self.heads {
                    self.score_tile::<V, 1, 1>(keys, t, from, h);
                    h += 1;
                }
                t += 1;
            }
        }
    }

    /// # Safety
    /// `t + R <= keys.len()`, `h + C <= heads`, and the shapes were checked.
    #[inline(always)]
    unsafe fn score_tile<V: Lanes, const R: usize, const C: usize>(
        &mut self,
        keys: &[&[f32]],
        t: usize,
        from: usize,
        h: usize,
    ) {
        let width = self.keys.width;
        let whole = width / LANES * LANES;
        // SAFETY: every cached row is a slice of `width`, the queries of `h..h + C` lie in `q` as checked in `run`, and
        // loads end at `width`.
        unsafe {
            let mut k = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                k[r] = keys[t + r].as_ptr();
            }
            let q = self.q[h * width..(h + C) * width].as_ptr();
            let mut acc = [[V::splat(0.0); C]; R];
            for at in (0..whole).step_by(LANES) {
                let mut ks = [V::splat(0.0); R];
                for r in 0..R {
                    ks[r] = V::load(k[r].add(at));
                }
                for c in 0..C {
                    let q = V::load(q.add(c * width + at));
                    for r in 0..R {
                        acc[r][c] = q.fma(ks[r], acc[r][c]);
                    }
                }
            }
            if whole < width {
                for c in 0..C {
                    let q = load_part::<V>(q.add(c * width + whole), width - whole);
                    for r in 0..R {
                        acc[r][c] = q.fma(load_part(k[r].add(whole), width - whole), acc[r][c]);
                    }
                }
            }
            for c in 0..C {
                let scores = &mut self.scores[(h + c) * self.visible + from + t..][..R];
                for r in 0..R {
                    scores[r] = acc[r][c].sum() * self.scale;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn value_block<V: Lanes, const H: usize, const D: usize>(
        &mut self,
        keys: &[&[f32]],
        from: usize,
    ) {
        let mut h = 0;
        // SAFETY: tiles stay inside `heads`.
        unsafe {
            while h + H <= self.heads {
                self.value_heads::<V, H, D>(keys, from, h);
                h += H;
            }
            while h < self.heads {
                self.value_heads::<V, 1, D>(keys, from, h);
                h += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn value_heads<V: Lanes, const H: usize, const D: usize>(
        &mut self,
        keys: &[&[f32]],
        from: usize,
        h: usize,
    ) {
        let mut d = 0;
        // SAFETY: tiles end at `value_width`; the last is cut there.
        unsafe {
            while d + D * LANES <= self.value_width {
                self.value_tile::<V, H, D>(keys, from, h, d);
                d += D * LANES;
            }
            while d + LANES <= self.value_width {
                self.value_tile::<V, H, 1>(keys, from, h, d);
                d += LANES;
            }
            if d < self.value_width {
                self.value_rest::<V, H>(keys, from, h, d);
            }
        }
    }

    /// # Safety
    /// `h + H <= heads`, `d + 16 D <= value_width`, and the shapes were checked.
    #[inline(always)]
    unsafe fn value_tile<V: Lanes, const H: usize, const D: usize>(
        &mut self,
        keys: &[&[f32]],
        from: usize,
        h: usize,
        d: usize,
    ) {
        // SAFETY: `value_width <= width`, the length of every cached row; weights and outputs of `h..h + H` lie in
        // their slices as checked in `run`.
        unsafe {
            let mut weights = [std::ptr::null::<f32>(); H];
            let mut out = [std::ptr::null_mut::<f32>(); H];
            let mut acc = [[V::splat(0.0); D]; H];
            for i in 0..H {
                weights[i] = self.scores[(h + i) * self.visible + from..][..keys.len()].as_ptr();
                out[i] = self.out[(h + i) * self.value_width + d..][..D * LANES].as_mut_ptr();
                for j in 0..D {
                    acc[i][j] = V::load(out[i].add(j * LANES));
                }
            }
            for (t, key) in keys.iter().enumerate() {
                let mut values = [V::splat(0.0); D];
                for j in 0..D {
                    values[j] = V::load(key.as_ptr().add(d + j * LANES));
                }
                for i in 0..H {
                    let weight = V::splat(*weights[i].add(t));
                    for j in 0..D {
                        acc[i][j] = weight.fma(values[j], acc[i][j]);
                    }
                }
            }
            for i in 0..H {
                for j in 0..D {
                    acc[i][j].store(out[i].add(j * LANES));
                }
            }
        }
    }

    /// The last, ragged columns: `d..value_width`, fewer than 16.
    ///
    /// # Safety
    /// `h + H <= heads`, and the shapes were checked.
    #[inline(always)]
    unsafe fn value_rest<V: Lanes, const H: usize>(
        &mut self,
        keys: &[&[f32]],
        from: usize,
        h: usize,
        d: usize,
    ) {
        let n = self.value_width - d;
        for i in h..h + H {
            let weights = &self.scores[i * self.visible + from..][..keys.len()];
            let out = &mut self.out[i * self.value_width + d..][..n];
            // SAFETY: `n < 16` elements are valid in `out` and, `value_width <= width`, in every cached row.
            unsafe {
                let mut acc = load_part::<V>(out.as_ptr(), n);
                for (key, weight) in keys.iter().zip(weights) {
                    acc = V::splat(*weight).fma(load_part(key.as_ptr().add(d), n), acc);
                }
                store_part(acc, out.as_mut_ptr(), n);
            }
        }
    }
}
