//! `out = x wᵀ` by `vdpbf16ps`, weights read where they lie.
//!
//! Secret: tiles and blocking. An output has 16 lanes. A step of 32 columns adds to lane `j`, from +0.0, first the product
//! of column `2 j + 1` of the step, then that of column `2 j`; steps follow in ascending order, and [`Lanes::sum`] ends.
//! Neither tile nor block touches that order: a block edge only parks the 16 lanes in memory.

use std::ops::Range;

use super::{PairDot, PairOp, PairRows, PairWeights, STEP, STEPS, pairs};
use crate::generic::{
    LANES, Lanes,
    int::tile_rows,
    matmul::{EMPTY, Line, Output, TASK_ROWS},
    weights::BLOCK,
};

/// Most rows of x in a tile.
pub(crate) const ROWS: usize = 8;
/// Most steps of one block: so many columns of a tile of x stay in L1 beside weights.
const BLOCK_STEPS: usize = 64;
/// Up to so many tiles of x, all of them are run over one panel of weights before the next, which arrives meanwhile.
const FEW_TILES: usize = 4;
/// Most lines of x of one block then: they stay in L1 beside two panels of weights.
const NEAR_LINES: usize = 256;
/// Bytes of weights that are asked for before their turn, in whole rows of a block, and the fewest such rows.
const AHEAD: usize = 8 << 10;
const AHEAD_ROWS: usize = 4;
/// Tiles that one block of columns is run over before the next: their parked lanes stay near.
const SLAB_TILES: usize = 8;

/// The weight rows `from..to`.
///
/// # Safety
/// Of [`PairOp::run`], besides the instruction set: `w` holds rows `from..to` of `x.form.cols` columns, `x` comes from
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

impl<W: PairWeights> PairOp for Product<'_, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<P: PairDot>(mut self) {
        assert!(self.w.cols() == self.x.form.cols);
        // As many rows of weights as leave registers for the sums and one step of each. Fewer streams come faster from
        // memory, which counts as long as x is one tile.
        // SAFETY: handed through.
        unsafe {
            match self.x.m {
                0 => {}
                // Sums of a scale block beside those of the row; weights are widened in registers.
                2..=4 if W::SCALED => self.rows::<P, 2>(),
                1..=ROWS if W::SCALED => self.rows::<P, 1>(),
                1..=4 => self.rows::<P, 4>(),
                5..=ROWS => self.rows::<P, 2>(),
                _ => self.rows::<P, 3>(),
            }
        }
    }
}

impl<W: PairWeights> Product<'_, W> {
    #[inline(always)]
    unsafe fn rows<P: PairDot, const R: usize>(&mut self) {
        let steps = self.w.steps();
        let tiles = self.x.m.div_ceil(ROWS);
        let few = tiles <= FEW_TILES;
        let rows = tile_rows(self.x.m, ROWS);
        let most = if few {
            NEAR_LINES / (tiles * rows)
        } else {
            BLOCK_STEPS
        };
        let blocks = match self.x.m {
            ..=2 => 1,
            _ => steps.div_ceil(most).max(1),
        };
        let block = steps.div_ceil(blocks).next_multiple_of(STEPS).max(STEPS);
        let row_bytes = block * STEP * if W::SCALED { 1 } else { size_of::<u16>() };
        let ahead = if tiles > 1 {
            R
        } else {
            AHEAD_ROWS.max(AHEAD / row_bytes)
        };
        let slab_tiles = SLAB_TILES.min(tiles);
        let group = if few { R } else { TASK_ROWS };
        // With several tiles weights are widened once for all.
        let widens = W::SCALED && tiles > 1;
        let widened = if widens { group * block } else { 0 };
        let parked = TASK_ROWS * slab_tiles * ROWS;
        let mut scratch = std::mem::take(self.scratch);
        if scratch.len() < widened + parked {
            scratch.resize(widened + parked, EMPTY);
        }
        let (widened, parked) = scratch.split_at_mut(widened);
        for top in (self.from..self.to).step_by(TASK_ROWS) {
            let bottom = self.to.min(top + TASK_ROWS);
            for slab in (0..tiles).step_by(slab_tiles) {
                let slab = slab..tiles.min(slab + slab_tiles);
                for begin in (0..steps).step_by(block) {
                    let part = Part {
                        steps: begin..steps.min(begin + block),
                        all: steps,
                        ahead,
                    };
                    for first in (top..bottom).step_by(group) {
                        let rows = first..bottom.min(first + group);
                        // SAFETY: rows lie in `from..to`, tiles in `0..tiles`, steps in those of a row.
                        unsafe {
                            if widens {
                                self.widen::<P>(widened, rows.clone(), &part);
                            }
                            for tile in slab.clone() {
                                let tiles = (tile - slab.start, slab_tiles);
                                let park = |row: usize| ((row - top) * tiles.1 + tiles.0) * ROWS;
                                let mut row = rows.start;
                                while row < rows.end {
                                    let near = (row - rows.start) * part.steps.len();
                                    let near = widened[near.min(widened.len())..].as_ptr().cast();
                                    let near = widens.then_some(near);
                                    let parked = &mut parked[park(row)..];
                                    let stride = slab_tiles * ROWS;
                                    if row + R <= rows.end {
                                        self.tile::<P, R>(row, tile, &part, near, parked, stride);
                                        row += R;
                                    } else {
                                        self.tile::<P, 1>(row, tile, &part, near, parked, stride);
                                        row += 1;
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        *self.scratch = scratch;
    }

    /// Widens steps of some rows: `[row][step][32]`.
    ///
    /// # Safety
    /// As for [`Product`]; the rows exist.
    #[inline(always)]
    unsafe fn widen<P: PairDot>(&self, widened: &mut [Line], rows: Range<usize>, part: &Part) {
        let steps = part.steps.clone();
        assert!(widened.len() >= rows.len() * steps.len() && steps.len().is_multiple_of(STEPS));
        let to = widened.as_mut_ptr().cast::<u16>();
        for row in rows.clone() {
            for step in steps.clone().step_by(2) {
                let at = (row - rows.start) * steps.len() + step - steps.start;
                // SAFETY: the row exists; two lines from `at` on are there.
                unsafe {
                    if step.is_multiple_of(STEPS) {
                        // The same place of the rows that come next.
                        self.w.prefetch::<P::Float>(row + rows.len(), step * STEP);
                    }
                    let two = pairs::<P, W>(self.w, row, step * STEP);
                    P::store(two[0], to.add(at * STEP));
                    P::store(two[1], to.add((at + 1) * STEP));
                }
            }
        }
    }

    /// # Safety
    /// As for [`Product`]; the rows and the tile exist. `near` is what [`Product::widen`] made of the rows, if it did.
    #[inline(always)]
    unsafe fn tile<P: PairDot, const R: usize>(
        &self,
        row: usize,
        tile: usize,
        part: &Part,
        near: Option<*const u16>,
        parked: &mut [Line],
        stride: usize,
    ) {
        // SAFETY: handed through.
        unsafe {
            match tile_rows(self.x.m - tile * ROWS, ROWS) {
                1 => self.sums::<P, R, 1>(row, tile, part, near, parked, stride),
                2 => self.sums::<P, R, 2>(row, tile, part, near, parked, stride),
                4 => self.sums::<P, R, 4>(row, tile, part, near, parked, stride),
                _ => self.sums::<P, R, 8>(row, tile, part, near, parked, stride),
            }
        }
    }

    /// # Safety
    /// As for [`Product::tile`]; the tile has `C` rows. Lanes are parked in the first `C` lines of every `stride`.
    #[inline(always)]
    unsafe fn sums<P: PairDot, const R: usize, const C: usize>(
        &self,
        row: usize,
        tile: usize,
        part: &Part,
        near: Option<*const u16>,
        parked: &mut [Line],
        stride: usize,
    ) {
        // No such tile is ever asked for: see `PairOp::run`.
        if R * C > 24 {
            return;
        }
        let Range { start, end } = part.steps;
        let lines = &self.x.lines[tile * self.x.form.tile_lines()..];
        let x = lines[start * C..end * C].as_ptr().cast::<u16>();
        assert!(parked.len() >= (R - 1) * stride + C);
        let parked = parked.as_mut_ptr();
        // SAFETY: the caller's promise; `x` has `C` lines for each step, and parked lines are there.
        unsafe {
            let mut acc = [[P::Float::splat(0.0); C]; R];
            if let Some(near) = near {
                self.widened::<P, R, C>(row, part, near, x, parked, stride);
                if end < part.all {
                    return;
                }
            }
            if near.is_some() || start > 0 {
                for r in 0..R {
                    for c in 0..C {
                        acc[r][c] = P::Float::load((*parked.add(r * stride + c)).0.as_ptr());
                    }
                }
            }
            if near.is_none() {
                acc = match W::SCALED {
                    true => self.scaled::<P, R, C>(acc, row, part, x),
                    false => self.plain::<P, R, C>(acc, row, tile, part, x),
                };
            }
            if end == part.all {
                return self.store(acc, row, tile * ROWS);
            }
            for r in 0..R {
                for c in 0..C {
                    acc[r][c].store((*parked.add(r * stride + c)).0.as_mut_ptr());
                }
            }
        }
    }

    /// Adds steps of weights with scales, which [`Product::widen`] has written to `near`.
    ///
    /// # Safety
    /// As for [`Product::sums`].
    #[inline(always)]
    unsafe fn widened<P: PairDot, const R: usize, const C: usize>(
        &self,
        row: usize,
        part: &Part,
        near: *const u16,
        x: *const u16,
        parked: *mut Line,
        stride: usize,
    ) {
        let Range { start, end } = part.steps;
        // SAFETY: the caller's promise.
        unsafe {
            for step in (start..end).step_by(STEPS) {
                let at = (step - start) * STEP;
                let mut from = [near; R];
                for r in 0..R {
                    from[r] = near.add(r * (end - start) * STEP + at);
                }
                let zero = [[P::Float::splat(0.0); C]; R];
                let parts = add::<P, R, C>(zero, from, x.add(at * C), STEPS, 0);
                for r in 0..R {
                    let scale = P::Float::splat(self.w.factor(row + r, step / STEPS));
                    for c in 0..C {
                        let lane = (*parked.add(r * stride + c)).0.as_mut_ptr();
                        let sum = if step > 0 {
                            P::Float::load(lane)
                        } else {
                            zero[r][c]
                        };
                        parts[r][c].fma(scale, sum).store(lane);
                    }
                }
            }
        }
    }

    /// Adds steps of weights with scales, widening them in registers.
    ///
    /// # Safety
    /// As for [`Product::sums`].
    #[inline(always)]
    unsafe fn scaled<P: PairDot, const R: usize, const C: usize>(
        &self,
        mut acc: [[P::Float; C]; R],
        row: usize,
        part: &Part,
        x: *const u16,
    ) -> [[P::Float; C]; R] {
        let Range { start, end } = part.steps;
        let whole = (self.w.cols() / BLOCK * STEPS).min(end);
        // SAFETY: the caller's promise; columns of whole blocks exist.
        unsafe {
            for step in (start..whole).step_by(STEPS) {
                let x = x.add((step - start) * STEP * C);
                acc = self.scaled_block::<P, R, C>(acc, row, step, part, x, true);
            }
            if whole < end {
                let x = x.add((whole - start) * STEP * C);
                acc = self.scaled_block::<P, R, C>(acc, row, whole, part, x, false);
            }
        }
        acc
    }

    /// # Safety
    /// As for [`Product::sums`]; all columns of the block exist where it is `whole`.
    #[inline(always)]
    unsafe fn scaled_block<P: PairDot, const R: usize, const C: usize>(
        &self,
        mut acc: [[P::Float; C]; R],
        row: usize,
        step: usize,
        part: &Part,
        x: *const u16,
        whole: bool,
    ) -> [[P::Float; C]; R] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut parts = [[P::Float::splat(0.0); C]; R];
            for r in 0..R {
                let ahead = row + part.ahead + r;
                self.w.prefetch::<P::Float>(ahead, step * STEP);
            }
            for half in 0..2 {
                let col = (step + 2 * half) * STEP;
                let mut two = [[P::load(x); 2]; R];
                for r in 0..R {
                    two[r] = if whole {
                        self.w.two::<P>(row + r, col)
                    } else {
                        pairs::<P, W>(self.w, row + r, col)
                    };
                }
                for i in 0..2 {
                    for c in 0..C {
                        let x = P::load(x.add(((2 * half + i) * C + c) * STEP));
                        for r in 0..R {
                            parts[r][c] = P::dot(parts[r][c], two[r][i], x);
                        }
                    }
                }
            }
            for r in 0..R {
                let scale = P::Float::splat(self.w.factor(row + r, step / STEPS));
                for c in 0..C {
                    acc[r][c] = parts[r][c].fma(scale, acc[r][c]);
                }
            }
        }
        acc
    }

    /// Adds steps of weights that lie as bf16.
    ///
    /// # Safety
    /// As for [`Product::sums`].
    #[inline(always)]
    unsafe fn plain<P: PairDot, const R: usize, const C: usize>(
        &self,
        mut acc: [[P::Float; C]; R],
        row: usize,
        tile: usize,
        part: &Part,
        x: *const u16,
    ) -> [[P::Float; C]; R] {
        let Range { start, end } = part.steps;
        let cols = self.w.cols();
        let whole = (cols / STEP).min(end);
        // The same place of the next panel: a row often ends where the hardware prefetcher stops. Later tiles find the
        // weights near.
        let ahead = if tile == 0 { part.ahead * cols } else { 0 };
        // SAFETY: the caller's promise; whole steps end inside the row, and so does what is read of the last.
        unsafe {
            let mut w = [x; R];
            for r in 0..R {
                w[r] = self.w.place(row + r, start * STEP).unwrap_or(x);
            }
            acc = add::<P, R, C>(acc, w, x, whole - start, ahead);
            if whole < end {
                let at = (whole - start) * STEP;
                for r in 0..R {
                    let w = P::load_some(w[r].add(at), cols - whole * STEP);
                    for c in 0..C {
                        acc[r][c] = P::dot(acc[r][c], w, P::load(x.add(at * C + c * STEP)));
                    }
                }
            }
        }
        acc
    }

    /// # Safety
    /// As for [`Product`]; the rows exist.
    #[inline(always)]
    unsafe fn store<V: Lanes, const R: usize, const C: usize>(
        &self,
        acc: [[V; C]; R],
        row: usize,
        at: usize,
    ) {
        // SAFETY: registers, memory of ours, and places in the output.
        unsafe {
            for from in (0..R * C).step_by(LANES) {
                let mut some = [V::splat(0.0); LANES];
                for i in 0..LANES.min(R * C - from) {
                    some[i] = acc[(from + i) / C][(from + i) % C];
                }
                let mut sums = [0.0f32; LANES];
                V::sums(some).store(sums.as_mut_ptr());
                for i in 0..LANES.min(R * C - from) {
                    let (r, c) = ((from + i) / C, (from + i) % C);
                    if at + c < self.x.m {
                        *self.out.place(at + c, row + r) = sums[i];
                    }
                }
            }
        }
    }
}

/// Steps of one block.
struct Part {
    steps: Range<usize>,
    /// Steps of a row.
    all: usize,
    /// To the rows that are asked for, from those in use.
    ahead: usize,
}

/// Adds `n` steps to `acc`, asking for what lies `ahead` elements further on where that is not 0.
///
/// # Safety
/// The machine has the instruction set of `P`; each of `w` is valid for `n` steps, and `x` for `C` lines of each.
#[inline(always)]
unsafe fn add<P: PairDot, const R: usize, const C: usize>(
    mut acc: [[P::Float; C]; R],
    w: [*const u16; R],
    x: *const u16,
    n: usize,
    ahead: usize,
) -> [[P::Float; C]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        for step in 0..n {
            let mut ws = [P::load(w[0].add(step * STEP)); R];
            for r in 0..R {
                let at = w[r].add(step * STEP);
                if ahead > 0 {
                    P::Float::prefetch(at.wrapping_add(ahead).cast());
                }
                ws[r] = P::load(at);
            }
            let x = x.add(step * C * STEP);
            for c in 0..C {
                let x = P::load(x.add(c * STEP));
                for r in 0..R {
                    acc[r][c] = P::dot(acc[r][c], ws[r], x);
                }
            }
        }
    }
    acc
}
