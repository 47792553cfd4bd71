//! `out = x wᵀ` by `tdpbf16ps`, weights read where they lie: 16 rows of them are the left factor of a tile product.
//!
//! Secret: tiles and blocking. A step of 32 columns gives `even + odd`, where `even` is the chain over the columns of
//! even number in ascending order, from +0.0, and `odd` that over the others; the output's chain takes it by one more
//! addition, from +0.0 on, steps in ascending order. All of it is done as [`super::fma_flushed`] does. Neither tile nor
//! block touches that order: a block edge only parks sums in memory.

use std::ops::Range;

use super::{PairDot, PairRows, PairWeights, STEP, STEPS, pairs};
use crate::generic::{
    LANES, Lanes,
    matmul::{EMPTY, Line, Output, TASK_ROWS},
    weights::BLOCK,
};

/// Rows of x, and of weights, in a tile.
pub(crate) const ROWS: usize = 16;
/// Bytes of a tile's row.
pub(crate) const ROW_BYTES: usize = 64;
/// Steps of one block: so many of two panels of weights stay in L1.
const BLOCK_STEPS: usize = 16;
/// Tiles of x that one block of columns is run over before the next: they and their sums stay in L2.
const SLAB_TILES: usize = 16;
/// Panels, and tiles of x, that are multiplied with each other at once.
const SIDE: usize = 2;

/// Sums of 16 rows of weights times 16 rows of x.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [Line; ROWS]);

const NOTHING: Sums = Sums([EMPTY; ROWS]);

/// 16 rows of weights, step after step.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    /// The first row of the first step: 32 bf16.
    pub(crate) at: *const u8,
    /// Bytes to the next row.
    pub(crate) row: usize,
    /// Bytes to the next step.
    pub(crate) step: usize,
    /// Bytes to what will be wanted soon, or 0.
    pub(crate) ahead: usize,
}

/// One instruction set's `tdpbf16ps`, or its like.
///
/// # Safety
/// Of every method: the machine has the instruction set of the leaf.
pub(crate) trait PairTiles: Copy {
    /// What widens weights, and the lanes of floats.
    type Dot: PairDot;

    /// Adds to `sums[p][t]` the products of `steps` steps of panel `p` and tile `t` of x, each `[pair][16][2]` and 16
    /// lines from the next.
    ///
    /// # Safety
    /// Besides the instruction set: all of it is there, the sums exclusively ours; [`Panel::ahead`] may point anywhere.
    unsafe fn multiply<const P: usize, const T: usize>(
        sums: [[*mut Sums; T]; P],
        w: [Panel; P],
        x: [*const Line; T],
        steps: usize,
    );
}

/// An operation on a leaf's tiles.
pub(crate) trait TileOp {
    type Out;

    /// # Safety
    /// The machine has the instruction set of `T`.
    unsafe fn run<T: PairTiles>(self) -> Self::Out;
}

/// The weight rows `from..to`; `from` is a multiple of 16.
///
/// # Safety
/// Of [`TileOp::run`], besides the instruction set: `w` holds rows `from..to` of `x.form.cols` columns, `x` comes from
/// [`super::Round`], and `out` is valid for `[x.m, from..to]`, written by this task alone.
pub(crate) struct Product<'a, W> {
    pub(crate) out: Output,
    pub(crate) x: PairRows<'a>,
    pub(crate) w: W,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Reused between tasks.
    pub(crate) scratch: &'a mut Vec<Line>,
}

impl<W: PairWeights> TileOp for Product<'_, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<T: PairTiles>(self) {
        let cols = self.x.form.cols;
        assert!(self.w.cols() == cols && self.from.is_multiple_of(ROWS));
        let steps = self.w.steps();
        let tiles = self.x.m.div_ceil(ROWS);
        let copied = SIDE * BLOCK_STEPS * ROWS;
        let sums = TASK_ROWS / ROWS * SLAB_TILES * ROWS;
        let mut scratch = std::mem::take(self.scratch);
        if scratch.len() < copied + sums {
            scratch.resize(copied + sums, EMPTY);
        }
        let (copied, sums) = scratch.split_at_mut(copied);
        for top in (self.from..self.to).step_by(TASK_ROWS) {
            let bottom = self.to.min(top + TASK_ROWS);
            for slab in (0..tiles).step_by(SLAB_TILES) {
                let slab = slab..tiles.min(slab + SLAB_TILES);
                sums.fill(EMPTY);
                for begin in (0..steps).step_by(BLOCK_STEPS) {
                    let block = begin..steps.min(begin + BLOCK_STEPS);
                    for row in (top..bottom).step_by(SIDE * ROWS) {
                        let sums = sums[(row - top) * SLAB_TILES..].as_mut_ptr().cast::<Sums>();
                        // SAFETY: rows lie in `from..to`, tiles in `0..tiles`, steps in those of a row; the sums of two
                        // panels are there.
                        unsafe {
                            if row + ROWS < bottom {
                                self.panels::<T, 2>(row, slab.clone(), block.clone(), sums, copied);
                            } else {
                                self.panels::<T, 1>(row, slab.clone(), block.clone(), sums, copied);
                            }
                        }
                    }
                }
                // SAFETY: the rows and tiles exist.
                unsafe { self.store(top..bottom, slab, sums) };
            }
        }
        *self.scratch = scratch;
    }
}

impl<W: PairWeights> Product<'_, W> {
    /// # Safety
    /// As for [`Product`]; the rows from `row` on, tiles and steps exist, and `sums` are those of `P` panels, each of
    /// [`SLAB_TILES`].
    #[inline(always)]
    unsafe fn panels<T: PairTiles, const P: usize>(
        &self,
        row: usize,
        tiles: Range<usize>,
        steps: Range<usize>,
        sums: *mut Sums,
        copied: &mut [Line],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (copied, other) = copied.split_at_mut(BLOCK_STEPS * ROWS);
            let mut panels = [self.panel::<T::Dot>(row, steps.clone(), copied); P];
            if P == SIDE {
                panels[P - 1] = self.panel::<T::Dot>(row + ROWS, steps.clone(), other);
            }
            let mut tile = tiles.start;
            while tile < tiles.end {
                let sums = sums.add(tile - tiles.start);
                if tile + 1 < tiles.end {
                    self.block::<T, P, 2>(row, panels, tile, steps.clone(), sums);
                } else {
                    self.block::<T, P, 1>(row, panels, tile, steps.clone(), sums);
                }
                // Later tiles find the weights near.
                for panel in &mut panels {
                    panel.ahead = 0;
                }
                tile += SIDE;
            }
        }
    }

    /// The weights of the panel at `row`: where they lie, or, if they are not all there as bf16, copied.
    ///
    /// # Safety
    /// As for [`Product::panels`], and the machine has the instruction set of `D`.
    #[inline(always)]
    unsafe fn panel<D: PairDot>(
        &self,
        row: usize,
        steps: Range<usize>,
        copied: &mut [Line],
    ) -> Panel {
        let whole = row + ROWS <= self.to && steps.end * STEP <= self.w.cols();
        if let Some(at) = self.w.place(row, steps.start * STEP).filter(|_| whole) {
            let row = self.w.cols() * size_of::<u16>();
            return Panel {
                at: at.cast(),
                row,
                step: ROW_BYTES,
                ahead: SIDE * ROWS * row,
            };
        }
        assert!(copied.len() >= steps.len().next_multiple_of(2) * ROWS);
        for r in 0..ROWS {
            let line = copied[r..].as_mut_ptr();
            if row + r >= self.to {
                for i in 0..steps.len() {
                    // SAFETY: line `r` of each step is there.
                    unsafe { *line.add(i * ROWS) = EMPTY };
                }
                continue;
            }
            for i in (0..steps.len()).step_by(2) {
                let col = (steps.start + i) * STEP;
                // SAFETY: the row exists; line `r` of two steps is there.
                unsafe {
                    if col.is_multiple_of(BLOCK) {
                        self.w.prefetch::<D::Float>(row + r + SIDE * ROWS, col);
                    }
                    let two = pairs::<D, W>(self.w, row + r, col);
                    D::store(two[0], line.add(i * ROWS).cast());
                    D::store(two[1], line.add((i + 1) * ROWS).cast());
                }
            }
        }
        Panel {
            at: copied.as_ptr().cast(),
            row: ROW_BYTES,
            step: ROWS * ROW_BYTES,
            ahead: 0,
        }
    }

    /// # Safety
    /// As for [`Product::panels`].
    #[inline(always)]
    unsafe fn block<T: PairTiles, const P: usize, const N: usize>(
        &self,
        row: usize,
        panels: [Panel; P],
        tile: usize,
        steps: Range<usize>,
        sums: *mut Sums,
    ) {
        let mut x = [self.x.lines.as_ptr(); N];
        for t in 0..N {
            let lines = &self.x.lines[(tile + t) * self.x.form.tile_lines()..];
            x[t] = lines[steps.start * ROWS..steps.end * ROWS].as_ptr();
        }
        let mut to = [[sums; N]; P];
        for p in 0..P {
            for t in 0..N {
                to[p][t] = sums.wrapping_add(p * SLAB_TILES + t);
            }
        }
        // SAFETY: the caller's promise; what is read of `x` is there.
        unsafe {
            if !W::SCALED {
                return T::multiply(to, panels, x, steps.len());
            }
            for from in steps.clone().step_by(STEPS) {
                let mut parts = [[NOTHING; N]; P];
                let mut places = to;
                let mut w = panels;
                let mut x = x;
                for p in 0..P {
                    w[p].at = w[p].at.add((from - steps.start) * w[p].step);
                    for t in 0..N {
                        places[p][t] = &raw mut parts[p][t];
                    }
                }
                for t in 0..N {
                    x[t] = x[t].add((from - steps.start) * ROWS);
                }
                T::multiply(places, w, x, STEPS);
                for p in 0..P {
                    let scale = self.w.factor(row + p * ROWS, from / STEPS);
                    let scale = <T::Dot as PairDot>::Float::splat(scale);
                    for t in 0..N {
                        for r in 0..ROWS {
                            let lane = (*to[p][t]).0[r].0.as_mut_ptr();
                            let part = load::<T>(parts[p][t].0[r].0.as_ptr());
                            part.fma(scale, load::<T>(lane)).store(lane);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; the rows and tiles exist, and `sums` are theirs.
    #[inline(always)]
    unsafe fn store(&self, rows: Range<usize>, tiles: Range<usize>, sums: &[Line]) {
        for (i, row) in rows.clone().enumerate() {
            let panel = i / ROWS * SLAB_TILES;
            for tile in tiles.clone() {
                let line = &sums[(panel + tile - tiles.start) * ROWS + i % ROWS];
                for c in 0..LANES.min(self.x.m - tile * ROWS) {
                    // SAFETY: the place lies in the output: the caller's promise.
                    unsafe { *self.out.place(tile * ROWS + c, row) = line.0[c] };
                }
            }
        }
    }
}

/// # Safety
/// As for [`Lanes::load`].
#[inline(always)]
unsafe fn load<T: PairTiles>(p: *const f32) -> <T::Dot as PairDot>::Float {
    // SAFETY: handed through.
    unsafe { <T::Dot as PairDot>::Float::load(p) }
}
