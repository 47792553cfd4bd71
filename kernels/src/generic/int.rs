//! Products of quantised rows and packed integer weights.
//!
//! Secret: the order of operations, and tiles. A row of x is quantised per group of columns: `s = max |x| / 127`, each
//! element to the nearest integer of `x / s`, halves to even. A group's dot product is an exact integer; an output is a
//! chain over the groups in ascending order from +0.0: `acc = fma(dot, weight scale * s, acc)`. The integers being exact,
//! neither tile nor leaf shows. A group that holds a number that is not finite has `s = NaN`, one too small for a normal
//! `s` counts as zeros.

use half::bf16;

use super::{
    LANES, Lanes, Op, load_part,
    matmul::{Input, Line, Output},
    store_part,
};
use crate::pack::{Int, LINE};

/// Columns of a word: what one multiplication of bytes takes of a row of x.
const QUAD: usize = 4;

/// How far ahead of the multiplication weights are asked for, in bytes. Half as far lost a seventh of the speed of cold
/// weights, twice as far gained nothing.
const AHEAD: usize = 4096;

/// Rows of x in a tile of a leaf that has tiles, and words of a row that lie side by side in one.
pub(crate) const FULL: usize = 16;

/// Sums of 16 rows of x times 16 rows of weights.
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[i32; LANES]; FULL]);

/// Multiplication of bytes on one instruction set.
///
/// # Safety
/// Of every method: the machine has the instruction set of the leaf, and pointers are valid for what is read: 64 bytes
/// of weights, one word of x (no alignment needed).
pub(crate) trait Dot: Copy {
    /// The lanes of floats beside it.
    type Float: Lanes;
    /// 16 sums of 32 bits.
    type Sum: Copy;
    /// 16 rows of four weights, ready to be multiplied.
    type Weights: Copy;
    /// Four elements of x for every row of weights.
    type Word: Copy;

    /// Most rows of x in a tile: 1, 2, 4, 8 or 12, or [`FULL`] on a leaf with tiles.
    const ROWS: usize;
    /// Whether [`Dot::tile`] is there.
    const TILES: bool = false;
    /// Most panels in a tile: 1 or 2.
    const PANELS: usize;
    /// What `load8` leaves added to each weight.
    const OFFSET8: i32;
    /// What `load4` leaves added to each weight.
    const OFFSET4: i32;

    unsafe fn sum(x: i32) -> Self::Sum;
    /// One line of bytes stored 128 above their value.
    unsafe fn load8(p: *const u8) -> Self::Weights;
    /// Two lines in the low and the high nibbles, stored 8 above their value.
    unsafe fn load4(p: *const u8) -> [Self::Weights; 2];
    unsafe fn word(p: *const u32) -> Self::Word;
    /// Adds, row by row, the four products of bytes; x is signed and not -128.
    unsafe fn dot(acc: Self::Sum, w: Self::Weights, x: Self::Word) -> Self::Sum;
    unsafe fn float(sum: Self::Sum) -> Self::Float;

    /// Adds the products of one group of `quads` words: `x` as a full tile has them, `w` the lines of the group.
    #[inline(always)]
    unsafe fn tile<const BITS: usize>(
        _sums: &mut Tile,
        _x: *const u32,
        _w: *const u8,
        _quads: usize,
    ) {
        unreachable!("a leaf without tiles")
    }
}

/// An operation on a leaf's multiplication of bytes.
pub(crate) trait DotOp {
    type Out;

    /// # Safety
    /// The machine has the instruction set of `D`.
    unsafe fn run<D: Dot>(self) -> Self::Out;
}

/// Rows of x in a tile that has `n` of them left.
pub(crate) fn tile_rows(n: usize, most: usize) -> usize {
    [1, 2, 4, 8]
        .into_iter()
        .find(|&rows| rows >= n)
        .map_or(most, |rows| rows.min(most))
}

/// Tells how the leaf that runs it takes products: [`Dot::ROWS`], and what its loads leave added to weights of this kind.
pub(crate) struct Leaf(pub(crate) Int);

impl DotOp for Leaf {
    type Out = (usize, i32);

    #[inline(always)]
    unsafe fn run<D: Dot>(self) -> (usize, i32) {
        let offset = match self.0 {
            Int::Int8 => D::OFFSET8,
            Int::Int4 => D::OFFSET4,
        };
        (D::ROWS, offset)
    }
}

/// Rows of the tiles of `m` rows on a leaf that takes up to `most`: 8 leave registers for what comes between, 12 spare
/// another pass over the weights where they are all.
pub(crate) fn tile_of(m: usize, most: usize) -> usize {
    match (most, m) {
        (12, 9..=12) => 12,
        (12, _) => 8,
        _ => most,
    }
}

/// How columns of a quantised matrix fall into groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    /// Columns of one group.
    pub(crate) group: usize,
    /// Groups of a row, the last filled up with zeros.
    pub(crate) count: usize,
}

impl Groups {
    pub(crate) fn new(cols: usize, group: usize) -> Groups {
        Groups {
            group,
            count: cols.div_ceil(group),
        }
    }

    /// Words of a row.
    fn words(self) -> usize {
        self.count * self.group / QUAD
    }

    /// Lines of memory for a tile of at most `most` rows.
    pub(crate) fn tile_lines(self, most: usize) -> usize {
        (most * (self.words() + 2 * self.count)).div_ceil(LANES)
    }
}

/// Quantised rows in tiles of `most` rows, the last as [`tile_rows`] says, [`Groups::tile_lines`] apart. A tile of `n`
/// rows has words of 32 bits: `[words][n]` of x, `[count][n]` scales, `[count][n]` of what makes up for a leaf's offset: its
/// negative times the sum of the integers of a group. A tile of [`FULL`] rows has x as [`run`] says instead:
/// `[words / run][n][run]`.
#[derive(Clone, Copy)]
pub(crate) struct QuantRows<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) m: usize,
    pub(crate) most: usize,
    pub(crate) groups: Groups,
}

/// Words of a row that lie side by side in a tile of `rows`.
fn run(rows: usize, group: usize) -> usize {
    if rows == FULL {
        FULL.min(group / QUAD)
    } else {
        1
    }
}

/// Quantises whole groups of the rows of one tile.
///
/// # Safety
/// Of [`Op::run`], besides the instruction set: `tile` is valid for [`Groups::tile_lines`], and the groups that the
/// columns of `x` fill, from `from` on, exist and are written by this task alone.
pub(crate) struct Quantise<'a> {
    pub(crate) x: Input<'a>,
    /// First row, and rows of the tile; those past the end of `x` become zeros.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) groups: Groups,
    /// What the leaf leaves added to the weights.
    pub(crate) offset: i32,
    /// The group that the first column of `x` begins.
    pub(crate) from: usize,
    pub(crate) tile: *mut Line,
}

/// Adding it rounds an f32 below 2²² to an integer, which then sits in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// Chunks of the longest group.
const CHUNKS: usize = 128 / LANES;

impl Op for Quantise<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let (rows, groups) = (self.rows, self.groups);
        let count = self.x.cols.div_ceil(groups.group);
        assert!(groups.group <= CHUNKS * LANES && self.from + count <= groups.count);
        let tile = self.tile.cast::<u32>();
        for r in 0..rows {
            let x = if self.first + r < self.x.m {
                self.x.row(self.first + r)
            } else {
                &[]
            };
            for g in 0..count {
                let from = (g * groups.group).min(x.len());
                let x = &x[from..(from + groups.group).min(x.len())];
                let g = self.from + g;
                // SAFETY: the instruction set and the tile are the caller's promise; group `g` and row `r` lie in it.
                unsafe {
                    let run = run(rows, groups.group);
                    let words = tile.add(g * groups.group / QUAD * rows + r * run);
                    let (scale, sum) = quantise::<V>(x, groups.group / LANES, words, rows, run);
                    let scales = tile.add(groups.words() * rows);
                    *scales.add(g * rows + r) = scale.to_bits();
                    *scales.add((groups.count + g) * rows + r) = (-self.offset * sum) as u32;
                }
            }
        }
    }
}

/// Quantises one group, `x` and zeros up to `chunks` times 16 elements, into words of a tile of `rows`: runs of
/// `run` words, `rows` runs apart. Gives the scale and the sum of the integers.
///
/// # Safety
/// The machine has the instruction set of `V`, `x.len() <= 16 * chunks <= 128`, and `words` is valid for all of them.
#[inline(always)]
unsafe fn quantise<V: Lanes>(
    x: &[f32],
    chunks: usize,
    words: *mut u32,
    rows: usize,
    run: usize,
) -> (f32, i32) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut values = [V::splat(0.0); CHUNKS];
        let (mut odd, mut most) = (V::splat(0.0), V::splat(0.0));
        for (value, x) in values.iter_mut().zip(x.chunks(LANES)) {
            *value = if x.len() == LANES {
                V::load(x.as_ptr())
            } else {
                load_part(x.as_ptr(), x.len())
            };
            odd = value.fma(V::splat(0.0), odd);
            most = value.max(V::splat(0.0).sub(*value)).max(most);
        }
        let odd = odd.sum().is_nan();
        let mut lanes = [0u32; LANES];
        most.store(lanes.as_mut_ptr().cast());
        // The greatest of numbers without sign has the greatest bits.
        let mut greatest = 0;
        for lane in lanes {
            greatest = greatest.max(lane);
        }
        let scale = f32::from_bits(greatest) / 127.0;
        let counts = scale >= f32::MIN_POSITIVE && !odd;
        let divisor = V::splat(if counts { scale } else { f32::INFINITY });
        // Lanes, then bytes, then words: simple loops, of which compilers make vectors.
        let mut moved = [MAGIC.to_bits(); CHUNKS * LANES];
        for chunk in 0..chunks {
            let value = if counts { values[chunk] } else { V::splat(0.0) };
            let to = moved.as_mut_ptr().add(chunk * LANES).cast();
            value.div(divisor).add(V::splat(MAGIC)).store(to);
        }
        let mut total = 0;
        let mut bytes = [0u8; CHUNKS * LANES];
        for (byte, moved) in bytes.iter_mut().zip(moved) {
            *byte = moved as u8;
            total += moved.wrapping_sub(MAGIC.to_bits()) as i32;
        }
        for (at, word) in bytes
            .chunks_exact(QUAD)
            .enumerate()
            .take(chunks * LANES / QUAD)
        {
            // A run is a power of two.
            let (before, inside) = (at & !(run - 1), at & (run - 1));
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            *words.add(before * rows + inside) = word;
        }
        let scale = match (odd, counts) {
            (true, _) => f32::NAN,
            (_, true) => scale,
            _ => 0.0,
        };
        (scale, total)
    }
}

/// A packed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) int: Int,
    pub(crate) data: &'a [u8],
    /// `[panel][count][16]`
    pub(crate) scales: &'a [bf16],
    pub(crate) rows: usize,
}

impl Packed<'_> {
    fn panel_bytes(&self) -> usize {
        self.data.len() / self.rows.div_ceil(LANES).max(1)
    }
}

/// `out = x wᵀ` for the panels `from..to`.
///
/// # Safety
/// Of [`DotOp::run`], besides the instruction set: `out` is valid for `[x.m, w.rows]`, and the columns of these panels
/// are written by this task alone. `x.groups` are those of `w`, and `x` comes from [`Quantise`].
pub(crate) struct Product<'a> {
    pub(crate) out: Output,
    pub(crate) x: QuantRows<'a>,
    pub(crate) w: Packed<'a>,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

impl DotOp for Product<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        assert!(self.to <= self.w.rows.div_ceil(LANES) && self.x.most <= D::ROWS);
        assert!(!D::TILES || self.x.most == FULL);
        let mut panel = self.from;
        // SAFETY: handed through; the panels visited lie in `from..to`.
        unsafe {
            while D::PANELS >= 2 && panel + 2 <= self.to {
                self.panels::<D, 2>(panel);
                panel += 2;
            }
            while panel < self.to {
                self.panels::<D, 1>(panel);
                panel += 1;
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn panels<D: Dot, const P: usize>(&self, panel: usize) {
        for at in (0..self.x.m).step_by(self.x.most) {
            // SAFETY: handed through; the tile begins at a multiple of `most` and has the rows that `Quantise` gave it.
            unsafe {
                match tile_rows(self.x.m - at, self.x.most) {
                    1 => self.tile::<D, P, 1>(panel, at),
                    2 => self.tile::<D, P, 2>(panel, at),
                    4 => self.tile::<D, P, 4>(panel, at),
                    8 => self.tile::<D, P, 8>(panel, at),
                    _ if D::TILES => self.full::<D, P>(panel, at),
                    _ => self.tile::<D, P, 12>(panel, at),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<D: Dot, const P: usize, const C: usize>(&self, panel: usize, at: usize) {
        if C > D::ROWS {
            return;
        }
        // SAFETY: handed through.
        let acc = unsafe {
            match self.w.int {
                Int::Int8 => self.dots::<D, P, C, 8>(panel, at),
                Int::Int4 => self.dots::<D, P, C, 4>(panel, at),
            }
        };
        for p in 0..P {
            for c in 0..C.min(self.x.m - at) {
                // SAFETY: row `at + c < m` is there, and the panel is this task's.
                unsafe { self.store(acc[p][c], at + c, panel + p) }
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; the row and the panel exist.
    #[inline(always)]
    unsafe fn store<V: Lanes>(&self, x: V, row: usize, panel: usize) {
        let col = panel * LANES;
        let width = LANES.min(self.w.rows - col);
        let to = self.out.place(row, col);
        // SAFETY: `width` columns from `col` on lie in the output.
        unsafe {
            if width == LANES {
                x.store(to);
            } else {
                store_part(x, to, width);
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; panels `panel..panel + P` and the full tile at `at` exist.
    #[inline(always)]
    unsafe fn full<D: Dot, const P: usize>(&self, panel: usize, at: usize) {
        for p in panel..panel + P {
            // SAFETY: handed through.
            unsafe {
                match self.w.int {
                    Int::Int8 => self.tiles::<D, 8>(p, at),
                    Int::Int4 => self.tiles::<D, 4>(p, at),
                }
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; the panel and the full tile at `at` exist.
    #[inline(always)]
    unsafe fn tiles<D: Dot, const BITS: usize>(&self, panel: usize, at: usize) {
        let Groups { group, count } = self.x.groups;
        let quads = group / QUAD;
        let tile_lines = self.x.groups.tile_lines(FULL);
        let tile = &self.x.lines[at / FULL * tile_lines..][..tile_lines];
        let bytes = self.w.panel_bytes();
        let weights = &self.w.data[panel * bytes..][..bytes];
        let weight_scales = &self.w.scales[panel * count * LANES..][..count * LANES];
        let group_bytes = quads * BITS / 8 * LINE;
        assert!(bytes >= count * group_bytes);
        // SAFETY: a panel is `count` groups of lines, checked above, and its scales are as many sixteens; the words of the
        // tile are 16 for each quad, its scales and sums 16 for each group.
        unsafe {
            let words = tile.as_ptr().cast::<u32>();
            let scales = words.add(FULL * count * quads).cast::<f32>();
            let offsets = scales.add(FULL * count).cast::<i32>();
            let mut acc = [D::Float::splat(0.0); FULL];
            let mut dots = Tile([[0; LANES]; FULL]);
            for g in 0..count {
                for r in 0..FULL {
                    dots.0[r] = [*offsets.add(g * FULL + r); LANES];
                }
                let x = words.add(g * quads * FULL);
                D::tile::<BITS>(&mut dots, x, weights.as_ptr().add(g * group_bytes), quads);
                let scale = D::Float::load_bf16(weight_scales.as_ptr().add(g * LANES).cast());
                for r in 0..FULL {
                    let dot = dots.0[r].map(|dot| dot as f32);
                    let s = D::Float::splat(*scales.add(g * FULL + r));
                    acc[r] = D::Float::load(dot.as_ptr()).fma(scale.mul(s), acc[r]);
                }
            }
            for r in 0..FULL.min(self.x.m - at) {
                self.store(acc[r], at + r, panel);
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; panels `panel..panel + P` and the tile of `C` rows at `at` exist.
    #[inline(always)]
    unsafe fn dots<D: Dot, const P: usize, const C: usize, const BITS: usize>(
        &self,
        panel: usize,
        at: usize,
    ) -> [[D::Float; C]; P] {
        let Groups { group, count } = self.x.groups;
        let quads = group / QUAD;
        let tile_lines = self.x.groups.tile_lines(self.x.most);
        let tile = &self.x.lines[at / self.x.most * tile_lines..][..tile_lines];
        let bytes = self.w.panel_bytes();
        let weights = &self.w.data[panel * bytes..][..P * bytes];
        let weight_scales = &self.w.scales[panel * count * LANES..][..P * count * LANES];
        let lines = quads * BITS / 8;
        assert!(bytes >= count * lines * LINE);
        // What is AHEAD of a panel's end lies in the panel that comes after these.
        let turn = bytes.saturating_sub(AHEAD);
        let groups_ahead = AHEAD / (lines * LINE);
        // SAFETY: a panel is `count` groups of `lines` lines, checked above, and its scales are as many sixteens; the
        // words of the tile are `C` for each quad, its scales and sums `C` for each group.
        unsafe {
            let words = tile.as_ptr().cast::<u32>();
            let scales = words.add(C * count * quads).cast::<f32>();
            let offsets = scales.add(C * count).cast::<i32>();
            let mut acc = [[D::Float::splat(0.0); C]; P];
            for g in 0..count {
                let mut dots = [[D::sum(0); C]; P];
                for c in 0..C {
                    let offset = D::sum(*offsets.add(g * C + c));
                    for p in 0..P {
                        dots[p][c] = offset;
                    }
                }
                if at == 0 {
                    // Scales are too few for the processor to see that they are read in order.
                    let next = g + groups_ahead;
                    let skip = if next < count { 0 } else { (P - 1) * count };
                    for p in 0..P {
                        let ahead = (p * count + next + skip) * LANES;
                        let scale = weight_scales.as_ptr().wrapping_add(ahead);
                        D::Float::prefetch(scale.cast());
                    }
                }
                let x = words.add(g * quads * C);
                for line in 0..lines {
                    if at == 0 {
                        let place = (g * lines + line) * LINE;
                        let skip = if place < turn { 0 } else { (P - 1) * bytes };
                        for p in 0..P {
                            let ahead = p * bytes + place + AHEAD + skip;
                            D::Float::prefetch(weights.as_ptr().wrapping_add(ahead));
                        }
                    }
                    if BITS == 8 {
                        let mut w = [D::load8(weights.as_ptr()); P];
                        for p in 0..P {
                            let at = p * bytes + (g * lines + line) * LINE;
                            w[p] = D::load8(weights.as_ptr().add(at));
                        }
                        for c in 0..C {
                            let x = D::word(x.add(line * C + c));
                            for p in 0..P {
                                dots[p][c] = D::dot(dots[p][c], w[p], x);
                            }
                        }
                    } else {
                        let mut w = [D::load4(weights.as_ptr()); P];
                        for p in 0..P {
                            let at = p * bytes + (g * lines + line) * LINE;
                            w[p] = D::load4(weights.as_ptr().add(at));
                        }
                        for half in 0..2 {
                            for c in 0..C {
                                let x = D::word(x.add((line * 2 + half) * C + c));
                                for p in 0..P {
                                    dots[p][c] = D::dot(dots[p][c], w[p][half], x);
                                }
                            }
                        }
                    }
                }
                for p in 0..P {
                    let scale = weight_scales.as_ptr().add((p * count + g) * LANES);
                    let scale = D::Float::load_bf16(scale.cast());
                    for c in 0..C {
                        let s = D::Float::splat(*scales.add(g * C + c));
                        acc[p][c] = D::float(dots[p][c]).fma(scale.mul(s), acc[p][c]);
                    }
                }
            }
            acc
        }
    }
}
