//! Absorbed latent attention of a few query rows of one sequence over the paged cache.
//!
//! Secret: tiles. Positions are cut in spans of [`SPAN`], spans in blocks of [`KEYS`], both at fixed places. Within a span
//! the state of a query (greatest score M, sum L, values O) starts at (-inf, 0, 0) and takes up block after block:
//! `M' = max(M, scores)`, `a = exp(M - M')`, `e_t = exp(s_t - M')`, `L' = fma(L, a, sum of e)` with the sum by the 16-lane
//! rule, `O' = O a`, then an FMA chain of `e_t v_t` in ascending position. States of spans are merged in ascending order:
//! `M = max(M1, M2)`, `a = exp(M1 - M)`, `b = exp(M2 - M)`, `L = fma(L2, b, L1 a)`, `O = fma(O2, b, O1 a)`. The output is
//! `O (1 / L)`. A score is a 16-lane dot product times the scale. All of it is per query, so neither pages, threads nor the
//! queries computed together show in the bits; tiles only park chains.

use std::ops::Range;

use super::{LANES, Lanes, Op, rows, store_part};
use crate::latent::{LatentFormat, SCALED};

/// Positions that are scored together: their rows, widened once, stay in L2 while every query passes over them, for
/// scores and for values.
pub(crate) const KEYS: usize = 64;
/// Positions whose state is made from nothing: what threads may do apart from each other.
pub(crate) const SPAN: usize = 512;
/// Keys that stay in L1 while queries are scored with them.
const NEAR: usize = 8;
/// Lines of the values of all keys of a block that stay in L1 while queries pass over them.
const COLUMN: usize = 4;
/// Bytes that memory brings at once.
const CACHE_LINE: usize = 64;

/// 16 lanes of scratch, one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; LANES]);

pub(crate) const EMPTY: Line = Line([0.0; LANES]);

pub(crate) fn floats(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a line is 16 f32 without padding, and the borrow goes on.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}

/// The cached rows of one sequence in one layer.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    pub(crate) cache: &'a [u8],
    pub(crate) format: LatentFormat,
    pub(crate) pages: &'a [u32],
    pub(crate) page_tokens: usize,
    /// Bytes from one page to the next.
    pub(crate) page_stride: usize,
    /// Bytes from the start of a page to the first row.
    pub(crate) offset: usize,
    pub(crate) width: usize,
    pub(crate) value_width: usize,
}

impl<'a> Keys<'a> {
    /// Lines of a widened row.
    pub(crate) fn lines(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Lines of a query's values.
    pub(crate) fn value_lines(&self) -> usize {
        self.value_width.div_ceil(LANES)
    }

    fn row(&self, position: usize) -> &'a [u8] {
        let bytes = self.format.row_bytes(self.width, self.value_width);
        let start = self.pages[position / self.page_tokens] as usize * self.page_stride
            + self.offset
            + position % self.page_tokens * bytes;
        &self.cache[start..start + bytes]
    }

    /// Whether rows can be widened line by line: all their parts are whole lines.
    fn in_lines(&self) -> bool {
        self.width.is_multiple_of(LANES) && self.value_width.is_multiple_of(LANES)
    }

    /// Widens a cached row.
    ///
    /// # Safety
    /// The machine has the instruction set of `V`, `row` is a cached row of whole lines, and `out` holds as many.
    #[inline(always)]
    unsafe fn widen<V: Lanes>(&self, row: *const u8, out: *mut f32) {
        // SAFETY: all of it lies in the row, and pointers need no alignment.
        unsafe {
            match self.format {
                LatentFormat::F32 => {
                    for at in (0..self.width).step_by(LANES) {
                        V::load(row.add(4 * at).cast()).store(out.add(at));
                    }
                }
                LatentFormat::Bf16 => {
                    for at in (0..self.width).step_by(LANES) {
                        V::load_bf16(row.add(2 * at).cast()).store(out.add(at));
                    }
                }
                LatentFormat::Fp8 => {
                    let scales = row.add(self.value_width);
                    let k_pe = scales.add(4 * self.value_width.div_ceil(SCALED));
                    for from in (0..self.value_width).step_by(SCALED) {
                        let scale = scales.add(4 * (from / SCALED)).cast::<f32>();
                        let scale = V::splat(scale.read_unaligned());
                        for at in (from..self.value_width.min(from + SCALED)).step_by(LANES) {
                            V::load_e4m3(row.add(at)).mul(scale).store(out.add(at));
                        }
                    }
                    for at in (self.value_width..self.width).step_by(LANES) {
                        let bits = k_pe.add(2 * (at - self.value_width));
                        V::load_bf16(bits.cast()).store(out.add(at));
                    }
                }
            }
        }
    }

    /// Asks for the cached row of a position.
    ///
    /// # Safety
    /// The machine has the instruction set of `V`.
    #[inline(always)]
    unsafe fn ask<V: Lanes>(&self, position: usize) {
        for line in self.row(position).chunks(CACHE_LINE) {
            // SAFETY: a prefetch faults on no address.
            unsafe { V::prefetch(line.as_ptr()) }
        }
    }
}

/// The state of queries over one span, or over several that were merged: for each query its values, then one line of
/// (M, L).
pub(crate) struct States<'a> {
    /// `[queries, value_lines + 1]`
    pub(crate) lines: &'a mut [Line],
    pub(crate) value_lines: usize,
}

impl States<'_> {
    #[inline(always)]
    fn of(&mut self, query: usize) -> (&mut [Line], &mut Line) {
        let each = self.value_lines + 1;
        let (last, values) = self.lines[query * each..][..each]
            .split_last_mut()
            .unwrap_or_else(|| unreachable!("a state has at least the line of M and L"));
        (values, last)
    }
}

/// Query rows of one sequence over one span of its positions.
pub(crate) struct Span<'a> {
    pub(crate) keys: Keys<'a>,
    /// `[rows, heads, lines]`, padded with zeros.
    pub(crate) queries: &'a [Line],
    pub(crate) heads: usize,
    /// Positions that each row sees, counted from the start of the sequence.
    pub(crate) visible: &'a [usize],
    pub(crate) scale: f32,
    /// First position of the span.
    pub(crate) from: usize,
    /// Of `[rows, heads]` queries; whatever was there is gone.
    pub(crate) states: States<'a>,
    pub(crate) scratch: &'a mut Vec<Line>,
}

impl Op for Span<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(mut self) {
        let queries = self.visible.len() * self.heads;
        let lines = self.keys.lines();
        assert!(self.queries.len() >= queries * lines);
        assert!(self.states.lines.len() >= queries * (self.states.value_lines + 1));
        assert!(
            self.states.value_lines == self.keys.value_lines() && self.keys.value_lines() <= lines
        );
        self.states.lines.fill(EMPTY);
        for query in 0..queries {
            self.states.of(query).1.0[0] = f32::NEG_INFINITY;
        }
        let wide = KEYS * lines;
        let needed = wide + queries * (KEYS / LANES);
        if self.scratch.len() < needed {
            self.scratch.resize(needed, EMPTY);
        }
        let mut scratch = std::mem::take(self.scratch);
        let (wide, scores) = scratch[..needed].split_at_mut(wide);
        let scores = floats(scores);
        let last = self.visible.iter().copied().max().unwrap_or(0);
        let end = last.min(self.from + SPAN);
        for from in (self.from..end).step_by(KEYS) {
            let mut block = Block {
                from,
                last,
                rows: [&[]; KEYS],
                wide: floats(wide),
                scores,
            };
            let n = KEYS.min(end - from);
            for t in 0..KEYS {
                // What follows the last repeats the first: tiles are whole.
                block.rows[t] = if t < n {
                    self.keys.row(from + t)
                } else {
                    block.rows[0]
                };
            }
            // SAFETY: the instruction set is the caller's promise; the shapes were checked.
            unsafe {
                if V::REGISTERS >= 32 {
                    self.block::<V, 4>(&mut block);
                } else {
                    self.block::<V, 2>(&mut block);
                }
            }
        }
        *self.scratch = scratch;
    }
}

/// Keys that are scored together.
struct Block<'a> {
    from: usize,
    /// Positions of the sequence: what follows the block is asked for while it is scored.
    last: usize,
    /// As cached.
    rows: [&'a [u8]; KEYS],
    /// Keys in f32, where they do not lie so.
    wide: &'a mut [f32],
    /// `[queries, KEYS]`
    scores: &'a mut [f32],
}

impl Span<'_> {
    /// How many keys of the block at `from` a row sees.
    #[inline(always)]
    fn seen(&self, row: usize, from: usize) -> usize {
        self.visible[row].saturating_sub(from).min(KEYS)
    }

    /// # Safety
    /// The shapes were checked in `run`, and the machine has the instruction set of `V`.
    #[inline(always)]
    unsafe fn block<V: Lanes, const T: usize>(&mut self, block: &mut Block<'_>) {
        let (lines, value_lines) = (self.keys.lines(), self.states.value_lines);
        let in_lines = self.keys.in_lines();
        // SAFETY: `wide` holds what is widened; the rest is handed through.
        unsafe {
            let mut keys = [std::ptr::null::<f32>(); KEYS];
            if !in_lines {
                for t in 0..KEYS {
                    let wide = &mut block.wide[t * lines * LANES..][..lines * LANES];
                    let (row, padding) = wide.split_at_mut(self.keys.width);
                    self.keys
                        .format
                        .read(block.rows[t], self.keys.value_width, row);
                    padding.fill(0.0);
                    keys[t] = wide.as_ptr();
                }
            } else if self.keys.format == LatentFormat::F32 {
                for t in 0..KEYS {
                    keys[t] = block.rows[t].as_ptr().cast();
                }
            }
            let as_they_lie = !keys[0].is_null();
            let most = (0..self.visible.len())
                .map(|row| self.seen(row, block.from))
                .max();
            let most = most.unwrap_or(0);
            for near in (0..most).step_by(NEAR) {
                if !as_they_lie {
                    for i in 0..NEAR {
                        let wide = &mut block.wide[(near + i) * lines * LANES..][..lines * LANES];
                        let wide = wide.as_mut_ptr();
                        self.keys.widen::<V>(block.rows[near + i].as_ptr(), wide);
                        keys[near + i] = wide;
                    }
                }
                for row in 0..self.visible.len() {
                    let n = self.seen(row, block.from);
                    if near < n {
                        let near = near..n.min(near + NEAR);
                        // With the first row come the keys of the next block.
                        let next = if row == 0 { block.last } else { 0 };
                        let next = block.from + KEYS + near.start..next;
                        self.score_row::<V, T>(&keys, row, near, next, block.scores);
                    }
                }
            }
            for row in 0..self.visible.len() {
                let n = self.seen(row, block.from);
                if n > 0 {
                    for head in 0..self.heads {
                        let query = row * self.heads + head;
                        let scores = &mut block.scores[query * KEYS..][..KEYS];
                        self.weigh::<V>(query, scores, n);
                    }
                }
            }
            for column in (0..value_lines).step_by(COLUMN) {
                let width = COLUMN.min(value_lines - column);
                let mut values = [std::ptr::null::<f32>(); KEYS];
                for t in 0..most {
                    values[t] = keys[t].add(column * LANES);
                }
                let mut line = 0;
                while line + T <= width {
                    self.value_column::<V, T, T>(&values, column, line, block);
                    line += T;
                }
                while line < width {
                    self.value_column::<V, T, 1>(&values, column, line, block);
                    line += 1;
                }
            }
        }
    }

    /// Scores of all heads of a row with the keys `near`, while the first [`NEAR`] positions of `next` are asked for; up to
    /// `T - 1` scores past the last are written and meaningless.
    ///
    /// # Safety
    /// `keys` of `near`, and of those that fill their tile, are rows of whole lines; and as for [`Span::block`].
    #[inline(always)]
    unsafe fn score_row<V: Lanes, const T: usize>(
        &self,
        keys: &[*const f32; KEYS],
        row: usize,
        near: Range<usize>,
        mut next: Range<usize>,
        scores: &mut [f32],
    ) {
        let each = NEAR.div_ceil(self.heads.div_ceil(T).max(1));
        next.end = next.end.min(next.start + NEAR);
        let mut head = 0;
        while head < self.heads {
            for position in next.by_ref().take(each) {
                // SAFETY: the instruction set is the caller's promise.
                unsafe { self.keys.ask::<V>(position) };
            }
            let query = row * self.heads + head;
            let full = head + T <= self.heads;
            for t in near.clone().step_by(T) {
                // SAFETY: `t + T <= KEYS`, since `T` divides it, and the queries lie in this row.
                unsafe {
                    if full {
                        self.score_tile::<V, T, T>(keys, t, query, scores);
                    } else {
                        self.score_tile::<V, T, 1>(keys, t, query, scores);
                    }
                }
            }
            head += if full { T } else { 1 };
        }
    }

    /// # Safety
    /// `t + R <= KEYS`, `query + C <= rows * heads`, and as for [`Span::score_row`].
    #[inline(always)]
    unsafe fn score_tile<V: Lanes, const R: usize, const C: usize>(
        &self,
        keys: &[*const f32; KEYS],
        t: usize,
        query: usize,
        scores: &mut [f32],
    ) {
        let lines = self.keys.lines();
        // SAFETY: a key's row and a query are `lines` whole lines each.
        unsafe {
            let q = self.queries[query * lines..(query + C) * lines]
                .as_ptr()
                .cast::<f32>();
            let mut k = [std::ptr::null::<f32>(); R];
            k.copy_from_slice(&keys[t..t + R]);
            let mut acc = [[V::splat(0.0); R]; C];
            for line in 0..lines {
                let mut ks = [V::splat(0.0); R];
                for r in 0..R {
                    ks[r] = V::load(k[r].add(line * LANES));
                }
                for c in 0..C {
                    let q = V::load(q.add((c * lines + line) * LANES));
                    for r in 0..R {
                        acc[c][r] = q.fma(ks[r], acc[c][r]);
                    }
                }
            }
            if R * C == LANES {
                let mut all = [V::splat(0.0); LANES];
                for c in 0..C {
                    for r in 0..R {
                        all[c * R + r] = acc[c][r];
                    }
                }
                let mut sums = [0.0f32; LANES];
                let scale = V::splat(self.scale);
                V::sums(all).mul(scale).store(sums.as_mut_ptr());
                for c in 0..C {
                    let to = &mut scores[(query + c) * KEYS + t..][..R];
                    to.copy_from_slice(&sums[c * R..(c + 1) * R]);
                }
            } else {
                for c in 0..C {
                    for r in 0..R {
                        scores[(query + c) * KEYS + t + r] = acc[c][r].sum() * self.scale;
                    }
                }
            }
        }
    }

    /// Makes the scores of the block weights `e^(s - M')`, and takes M and L of the state on; the values of the state are
    /// scaled when they are added to. The factor for that, `a`, stands behind them in the state.
    ///
    /// # Safety
    /// The machine has the instruction set of `V`.
    #[inline(always)]
    unsafe fn weigh<V: Lanes>(&mut self, query: usize, scores: &mut [f32], n: usize) {
        scores[n..].fill(f32::NEG_INFINITY);
        let state = self.states.of(query).1;
        // SAFETY: `scores` is whole lines.
        unsafe {
            let before = state.0[0];
            let now = rows::max::<V>(scores);
            let max = if now > before { now } else { before };
            let shift = V::splat(max);
            let mut sum = V::splat(0.0);
            for at in (0..KEYS).step_by(LANES) {
                let e = rows::exp(V::load(scores.as_ptr().add(at)).sub(shift));
                e.store(scores.as_mut_ptr().add(at));
                sum = sum.add(e);
            }
            let mut a = [0.0f32; LANES];
            rows::exp(V::splat(before - max)).store(a.as_mut_ptr());
            state.0[0] = max;
            state.0[1] = state.0[1].mul_add(a[0], sum.sum());
            state.0[2] = a[0];
        }
    }

    /// Adds `D` lines of the values, from `line` of the column at `column` on, to the states of all queries.
    ///
    /// # Safety
    /// `column + line + D <= value_lines`, `values` of every key that is seen hold these lines of the column; and as for
    /// [`Span::block`].
    #[inline(always)]
    unsafe fn value_column<V: Lanes, const H: usize, const D: usize>(
        &mut self,
        values: &[*const f32; KEYS],
        column: usize,
        line: usize,
        block: &Block<'_>,
    ) {
        for row in 0..self.visible.len() {
            let n = self.seen(row, block.from);
            let mut head = 0;
            while head < self.heads && n > 0 {
                let query = row * self.heads + head;
                // SAFETY: the queries lie in this row; the rest is handed through.
                unsafe {
                    if head + H <= self.heads {
                        self.value_tile::<V, H, D>(&values[..n], column, line, query, block);
                        head += H;
                    } else {
                        self.value_tile::<V, 1, D>(&values[..n], column, line, query, block);
                        head += 1;
                    }
                }
            }
        }
    }

    /// # Safety
    /// `query + H <= rows * heads`, and as for [`Span::value_column`].
    #[inline(always)]
    unsafe fn value_tile<V: Lanes, const H: usize, const D: usize>(
        &mut self,
        values: &[*const f32],
        column: usize,
        line: usize,
        query: usize,
        block: &Block<'_>,
    ) {
        // SAFETY: weights and states of the queries lie in their slices, values where the caller says.
        unsafe {
            let mut weights = [std::ptr::null::<f32>(); H];
            let mut out = [std::ptr::null_mut::<f32>(); H];
            let mut acc = [[V::splat(0.0); D]; H];
            for i in 0..H {
                weights[i] = block.scores[(query + i) * KEYS..][..values.len()].as_ptr();
                let (lines, state) = self.states.of(query + i);
                let a = V::splat(state.0[2]);
                out[i] = lines[column + line..][..D].as_mut_ptr().cast();
                for j in 0..D {
                    acc[i][j] = V::load(out[i].add(j * LANES)).mul(a);
                }
            }
            for (t, key) in values.iter().enumerate() {
                let mut value = [V::splat(0.0); D];
                for j in 0..D {
                    value[j] = V::load(key.add((line + j) * LANES));
                }
                for i in 0..H {
                    let weight = V::splat(*weights[i].add(t));
                    for j in 0..D {
                        acc[i][j] = weight.fma(value[j], acc[i][j]);
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
}

/// Takes the state of a later span into that of all before it.
pub(crate) struct Merge<'a> {
    pub(crate) into: &'a mut [Line],
    pub(crate) later: &'a [Line],
}

impl Op for Merge<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let (Some((state, into)), Some((other, later))) =
            (self.into.split_last_mut(), self.later.split_last())
        else {
            return;
        };
        let (m1, m2) = (state.0[0], other.0[0]);
        let max = if m2 > m1 { m2 } else { m1 };
        let mut factors = [0.0f32; LANES];
        factors[0] = m1 - max;
        factors[1] = m2 - max;
        // SAFETY: a line is 16 elements.
        unsafe {
            rows::exp(V::load(factors.as_ptr())).store(factors.as_mut_ptr());
            let (a, b) = (V::splat(factors[0]), V::splat(factors[1]));
            for (to, from) in into.iter_mut().zip(later) {
                let scaled = V::load(to.0.as_ptr()).mul(a);
                V::load(from.0.as_ptr())
                    .fma(b, scaled)
                    .store(to.0.as_mut_ptr());
            }
        }
        state.0[0] = max;
        state.0[1] = other.0[1].mul_add(factors[1], state.0[1] * factors[0]);
    }
}

/// The output of a state: its values divided by its sum.
pub(crate) struct Finish<'a> {
    pub(crate) state: &'a [Line],
    /// `[value_width]`
    pub(crate) out: &'a mut [f32],
}

impl Op for Finish<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Some((last, values)) = self.state.split_last() else {
            return;
        };
        let times = 1.0 / last.0[1];
        for (out, line) in self.out.chunks_mut(LANES).zip(values) {
            // SAFETY: a line is 16 elements, `out` as many as it says.
            unsafe {
                let y = V::load(line.0.as_ptr()).mul(V::splat(times));
                if out.len() == LANES {
                    y.store(out.as_mut_ptr());
                } else {
                    store_part(y, out.as_mut_ptr(), out.len());
                }
            }
        }
    }
}
