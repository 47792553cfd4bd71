//! Products of pairs of bf16: the second arithmetic for weights that are bf16 or become it exactly.
//!
//! Secret: the order of operations. A row of x is rounded to bf16 once, to the nearest, halves to even. A product is what
//! an instruction for pairs defines, and there are two such definitions, each a [`Rule`] and a module of its own:
//! `lanes` and `tiles`. Both multiply and add as [`fma_flushed`] does. FP8 weights count as bf16 without their scale; what
//! each 128 columns give, from +0.0 on, goes into the output's chain by `fma(part, scale, acc)`, an ordinary one. Columns
//! past the end count as zeros, up to a multiple of 32 (bf16) or 128 (FP8). It must not know which leaf it runs on.

pub(crate) mod lanes;
pub(crate) mod tiles;

use super::{
    Lanes, Op,
    int::tile_rows,
    matmul::{Input, Line},
    weights::{BLOCK, Bf16, Fp8, Weights, e4m3_to_f32},
};

/// Columns of one step: a line of bf16.
pub(crate) const STEP: usize = 32;
/// Steps of one scale block.
pub(crate) const STEPS: usize = BLOCK / STEP;

/// Which instruction defines the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// `vdpbf16ps`: see [`lanes`].
    Lanes,
    /// `tdpbf16ps`: see [`tiles`].
    Tiles,
}

/// How rows of `cols` columns lie, rounded to bf16.
///
/// Rows come in tiles, [`Form::tile_lines`] apart. For [`Rule::Lanes`] a tile is `[step][rows][32]`, for [`Rule::Tiles`]
/// `[step][pair][rows][2]`; what has no row or column is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) rule: Rule,
    pub(crate) cols: usize,
}

impl Form {
    /// Rows of a tile, the last perhaps excepted.
    pub(crate) fn most(self) -> usize {
        match self.rule {
            Rule::Lanes => lanes::ROWS,
            Rule::Tiles => tiles::ROWS,
        }
    }

    /// Rows of a tile that has `n` of them left.
    fn rows(self, n: usize) -> usize {
        match self.rule {
            Rule::Lanes => tile_rows(n, lanes::ROWS),
            Rule::Tiles => tiles::ROWS,
        }
    }

    /// Steps of a row, whole scale blocks.
    fn steps(self) -> usize {
        self.cols.div_ceil(BLOCK) * STEPS
    }

    /// Lines of memory for a tile.
    pub(crate) fn tile_lines(self) -> usize {
        self.most() * self.steps()
    }
}

/// Rows in such a form, from [`Round`].
#[derive(Clone, Copy)]
pub(crate) struct PairRows<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) m: usize,
    pub(crate) form: Form,
}

/// Rounds the rows of one tile.
pub(crate) struct Round<'a> {
    pub(crate) x: Input<'a>,
    pub(crate) tile: usize,
    pub(crate) form: Form,
    /// [`Form::tile_lines`] of them.
    pub(crate) lines: &'a mut [Line],
}

impl Op for Round<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let first = self.tile * self.form.most();
        let (rows, steps) = (self.form.rows(self.x.m - first), self.form.steps());
        assert!(self.lines.len() >= rows * steps);
        let lines = self.lines.as_mut_ptr();
        for r in 0..rows {
            let row = if first + r < self.x.m {
                self.x.row(first + r)
            } else {
                &[]
            };
            for step in 0..steps {
                let from = (step * STEP).min(row.len());
                let bits = rounded(&row[from..row.len().min(from + STEP)]);
                // SAFETY: line `step * rows + r` exists, checked above; in the order of tiles the words of a step are its
                // `rows` lines.
                unsafe {
                    match self.form.rule {
                        Rule::Lanes => *lines.add(step * rows + r).cast::<[u16; STEP]>() = bits,
                        Rule::Tiles => {
                            let words = lines.add(step * rows).cast::<[u16; 2]>();
                            for pair in 0..STEP / 2 {
                                *words.add(pair * rows + r) = [bits[2 * pair], bits[2 * pair + 1]];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// At most 32 numbers as bf16 bits, and zeros.
#[inline(always)]
fn rounded(x: &[f32]) -> [u16; STEP] {
    let (mut all, mut bits) = ([0.0f32; STEP], [0; STEP]);
    all[..x.len()].copy_from_slice(x);
    for i in 0..STEP {
        let of = all[i].to_bits();
        let near = of.wrapping_add(0x7fff + (of >> 16 & 1)) >> 16;
        let nan = of >> 16 | 0x40;
        bits[i] = if of << 1 > 0xff00_0000 { nan } else { near } as u16;
    }
    bits
}

/// One instruction set's `vdpbf16ps`, or its like.
///
/// # Safety
/// Of every method: the machine has the instruction set of the leaf, and pointers are valid for the 64 bytes, or `n`
/// elements, that are read (no alignment needed).
pub(crate) trait PairDot: Copy {
    /// The lanes of floats beside it.
    type Float: Lanes;
    /// 32 bf16.
    type Pairs: Copy;

    unsafe fn load(p: *const u16) -> Self::Pairs;
    /// `n <= 32` of them, then zeros.
    unsafe fn load_some(p: *const u16, n: usize) -> Self::Pairs;
    /// To 64 writable bytes.
    unsafe fn store(pairs: Self::Pairs, p: *mut u16);
    /// 64 e4m3 bytes, widened exactly; 0x7f and 0xff give NaN.
    unsafe fn widen(p: *const u8) -> [Self::Pairs; 2];
    /// `n <= 64` of them, then zeros.
    unsafe fn widen_some(p: *const u8, n: usize) -> [Self::Pairs; 2];
    /// Adds to lane `i` by [`fma_flushed`] first the product of the elements `2 i + 1`, then that of the elements `2 i`.
    unsafe fn dot(acc: Self::Float, a: Self::Pairs, b: Self::Pairs) -> Self::Float;
}

/// An operation on a leaf's pairs.
pub(crate) trait PairOp {
    type Out;

    /// # Safety
    /// The machine has the instruction set of `P`.
    unsafe fn run<P: PairDot>(self) -> Self::Out;
}

/// Weights as bf16.
///
/// # Safety
/// Of `two` and `some`: the columns named exist, and the machine has the instruction set of `P`; of `prefetch`: that of `V`.
pub(crate) trait PairWeights: Copy + Sync {
    /// Whether each block of 128 columns has a scale.
    const SCALED: bool;

    /// Columns of a row.
    fn cols(self) -> usize;
    /// Steps of a row, whole blocks of them where blocks have scales.
    #[inline(always)]
    fn steps(self) -> usize {
        match Self::SCALED {
            true => self.cols().div_ceil(BLOCK) * STEPS,
            false => self.cols().div_ceil(STEP),
        }
    }
    /// Of block `block` of `row`; 1 without scales.
    fn factor(self, row: usize, block: usize) -> f32;
    /// Columns `col .. col + 64` of `row`.
    unsafe fn two<P: PairDot>(self, row: usize, col: usize) -> [P::Pairs; 2];
    /// Columns `col .. col + n` of `row`, at most 64, then zeros.
    unsafe fn some<P: PairDot>(self, row: usize, col: usize, n: usize) -> [P::Pairs; 2];
    /// Where columns `col ..` of `row` lie as bf16, if they do.
    fn place(self, row: usize, col: usize) -> Option<*const u16>;
    /// Asks for the cache lines of the column block that begins at `col`; they need not exist.
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize);
}

impl PairWeights for Bf16<'_> {
    const SCALED: bool = false;

    #[inline(always)]
    fn cols(self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn factor(self, _: usize, _: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    unsafe fn two<P: PairDot>(self, row: usize, col: usize) -> [P::Pairs; 2] {
        // SAFETY: the columns exist: the caller's promise; `bf16` is a transparent u16.
        unsafe {
            let at = self.data.as_ptr().add(row * self.cols + col).cast::<u16>();
            [P::load(at), P::load(at.add(STEP))]
        }
    }

    #[inline(always)]
    unsafe fn some<P: PairDot>(self, row: usize, col: usize, n: usize) -> [P::Pairs; 2] {
        let at = self.data.as_ptr().cast::<u16>();
        let at = at.wrapping_add(row * self.cols + col);
        // SAFETY: the columns exist: the caller's promise.
        unsafe {
            [
                P::load_some(at, n.min(STEP)),
                P::load_some(at.wrapping_add(STEP), n.saturating_sub(STEP)),
            ]
        }
    }

    #[inline(always)]
    fn place(self, row: usize, col: usize) -> Option<*const u16> {
        let at = self.data.as_ptr().cast::<u16>();
        Some(at.wrapping_add(row * self.cols + col))
    }

    #[inline(always)]
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize) {
        // SAFETY: handed through.
        unsafe { Weights::prefetch::<V>(self, row, col) }
    }
}

impl PairWeights for Fp8<'_> {
    const SCALED: bool = true;

    #[inline(always)]
    fn cols(self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn factor(self, row: usize, block: usize) -> f32 {
        self.scales[row / BLOCK * self.cols.div_ceil(BLOCK) + block]
    }

    #[inline(always)]
    unsafe fn two<P: PairDot>(self, row: usize, col: usize) -> [P::Pairs; 2] {
        // SAFETY: the columns exist: the caller's promise.
        unsafe { P::widen(self.data.as_ptr().add(row * self.cols + col)) }
    }

    #[inline(always)]
    unsafe fn some<P: PairDot>(self, row: usize, col: usize, n: usize) -> [P::Pairs; 2] {
        let at = self.data.as_ptr().wrapping_add(row * self.cols + col);
        // SAFETY: the columns exist: the caller's promise.
        unsafe { P::widen_some(at, n) }
    }

    #[inline(always)]
    fn place(self, _: usize, _: usize) -> Option<*const u16> {
        None
    }

    #[inline(always)]
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize) {
        // SAFETY: handed through.
        unsafe { Weights::prefetch::<V>(self, row, col) }
    }
}

/// Columns `col .. col + 64` of `row`, those past the end zero.
///
/// # Safety
/// The machine has the instruction set of `P`, and the row exists.
#[inline(always)]
unsafe fn pairs<P: PairDot, W: PairWeights>(w: W, row: usize, col: usize) -> [P::Pairs; 2] {
    // SAFETY: what is read exists.
    unsafe {
        if col + 2 * STEP <= w.cols() {
            w.two::<P>(row, col)
        } else {
            w.some::<P>(row, col, w.cols().saturating_sub(col))
        }
    }
}

/// The bf16 bits of an e4m3 byte: bf16 has every value.
#[inline(always)]
pub(crate) const fn e4m3_bits(byte: u8) -> u16 {
    (e4m3_to_f32(byte).to_bits() >> 16) as u16
}

/// `a * b + c` as instructions for pairs compute it: rounded once, to the nearest, halves to even; numbers too small for a
/// normal f32 count as zeros, and a result that is one after rounding becomes a zero of its sign.
#[inline(always)]
pub(crate) fn fma_flushed(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flushed(a), flushed(b), flushed(c));
    let result = a.mul_add(b, c);
    // Rounding among subnormals may have reached the least normal number where 24 bits of precision would not have: half
    // a step below it is where they begin to. In this range the sum is exact in f64, or far from that border.
    const BORDER: f64 = f32::MIN_POSITIVE as f64 * (1.0 - 1.0 / (1u32 << 25) as f64);
    let least = result.abs() == f32::MIN_POSITIVE;
    if least && (f64::from(a) * f64::from(b) + f64::from(c)).abs() < BORDER {
        return 0.0f32.copysign(result);
    }
    flushed(result)
}

/// Zero of the same sign, if it is too small for a normal number.
#[inline(always)]
pub(crate) fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}
