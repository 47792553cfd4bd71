//! `out = x wᵀ`, in two forms that give the same bits: few rows read the weights straight from memory, many rows go
//! over packed blocks.
//!
//! Secret: tiles and blocking. An output is 16 lanes, lane `j` accumulating the columns `k ≡ j (mod 16)` in ascending
//! order by FMA from +0.0, columns past the end counting as `fma(0, 0, acc)`; then [`Lanes::sum`]. Neither tile nor
//! block touches that order: a block edge only parks the 16 lanes in memory.

use std::ops::Range;

use super::{
    LANES, Lanes, Op, load_part,
    weights::{BLOCK, Weights},
};

/// 16 f32 on a cache line of their own.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [f32; LANES]);

pub(crate) const EMPTY: Line = Line([0.0; LANES]);

/// Columns of one block of the packed form: a widened weight panel of it stays in L1.
pub(crate) const BLOCK_COLS: usize = 1024;
/// Rows of `x` that one block of columns is run over before the next: their parked accumulators stay near.
const SLAB_ROWS: usize = 60;
/// Up to so many rows of `x`, a block of columns of them stays in L2 beside one weight panel.
const FEW_ROWS: usize = 36;
/// Elements of x that stay in L1 beside weights.
const NEAR: usize = 8192;
/// Rows of weights in one task of the packed form, and whose accumulators the few-rows form parks.
pub(crate) const TASK_ROWS: usize = 96;

/// Where results go: `[m, stride]`, each task writing its own columns.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pub(crate) data: *mut f32,
    pub(crate) stride: usize,
}

// SAFETY: tasks write disjoint columns (see `Direct` and `Packed`), and nobody reads before all are done.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// The part that begins `elements` further on.
    pub(crate) fn at(self, elements: usize) -> Output {
        let data = self.data.wrapping_add(elements);
        Output { data, ..self }
    }

    /// What has column `col` where this one has its first.
    pub(crate) fn before(self, col: usize) -> Output {
        let data = self.data.wrapping_sub(col);
        Output { data, ..self }
    }

    /// Where `(row, col)` is.
    #[inline(always)]
    pub(crate) fn place(self, row: usize, col: usize) -> *mut f32 {
        self.data.wrapping_add(row * self.stride + col)
    }

    /// # Safety
    /// `(row, col)` lies inside the output, and no other thread writes it.
    #[inline(always)]
    unsafe fn set(self, row: usize, col: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.place(row, col) = value }
    }
}

/// Rows of the input: the first `cols` elements of those of `data` `[.., stride]` that `index` names, or of the first
/// `m`.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) index: Option<&'a [u32]>,
    pub(crate) stride: usize,
    pub(crate) m: usize,
    pub(crate) cols: usize,
}

impl Input<'_> {
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        let row = self.index.map_or(row, |index| index[row] as usize);
        &self.data[row * self.stride..][..self.cols]
    }
}

/// The few-rows form, for the weight rows `from..to`.
///
/// # Safety
/// Of [`Op::run`], besides the instruction set: `w` holds rows `from..to` of `x.cols` columns, and `out` is valid for
/// `[x.m, from..to]`, written by this task alone.
pub(crate) struct Direct<'a, W> {
    pub(crate) out: Output,
    pub(crate) x: Input<'a>,
    pub(crate) w: W,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Reused between tasks.
    pub(crate) scratch: &'a mut Vec<Line>,
}

impl<W: Weights> Op for Direct<'_, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(mut self) {
        let (m, rows) = (self.x.m, self.from..self.to);
        // SAFETY: handed through from this operation's own contract.
        unsafe {
            match m {
                0 => {}
                1 if V::REGISTERS >= 32 => self.panels::<V, 4, 1>(rows, 0),
                2 if V::REGISTERS >= 32 => self.panels::<V, 4, 2>(rows, 0),
                3..=4 if V::REGISTERS >= 32 => self.panels::<V, 4, 4>(rows, 0),
                // Widening needs registers too.
                5.. if V::REGISTERS >= 32 && W::WIDENS => {
                    for rows in near(rows) {
                        for at in (0..m).step_by(8) {
                            self.panels::<V, 2, 8>(rows.clone(), at);
                        }
                    }
                }
                5..=6 if V::REGISTERS >= 32 => self.panels::<V, 4, 6>(rows, 0),
                _ if V::REGISTERS >= 32 => {
                    for rows in near(rows) {
                        for at in (0..m).step_by(8) {
                            self.panels::<V, 3, 8>(rows.clone(), at);
                        }
                    }
                }
                _ => {
                    for row in rows.step_by(2) {
                        let panel = row..self.to.min(row + 2);
                        for at in (0..m / 2 * 2).step_by(2) {
                            self.panels::<V, 2, 2>(panel.clone(), at);
                        }
                        if m % 2 > 0 {
                            self.panels::<V, 2, 1>(panel, m - 1);
                        }
                    }
                }
            }
        }
    }
}

/// Ranges of weight rows that stay near while all of x is run over them.
fn near(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(TASK_ROWS)
        .map(move |row| row..end.min(row + TASK_ROWS))
}

impl<W: Weights> Direct<'_, W> {
    /// These weight rows over `C` rows of x from `at` on. What x has less is computed for nothing: it costs less than
    /// widening the weights again.
    #[inline(always)]
    unsafe fn panels<V: Lanes, const R: usize, const C: usize>(
        &mut self,
        rows: Range<usize>,
        at: usize,
    ) {
        let cols = self.x.cols;
        // So many columns of the rows of x stay in L1.
        let step = if C > 2 {
            NEAR / C / BLOCK * BLOCK
        } else {
            cols.max(1)
        };
        for from in rows.clone().step_by(TASK_ROWS) {
            let to = rows.end.min(from + TASK_ROWS);
            let parked = if step < cols { (to - from) * C } else { 0 };
            if self.scratch.len() < parked {
                self.scratch.resize(parked, EMPTY);
            }
            let mut begin = 0;
            loop {
                let columns = begin..cols.min(begin + step);
                let mut row = from;
                // SAFETY: all rows visited lie in `from..to`.
                unsafe {
                    while row + R <= to {
                        self.tile::<V, R, C>(row, at, columns.clone(), (row - from) * C);
                        row += R;
                    }
                    while row < to {
                        self.tile::<V, 1, C>(row, at, columns.clone(), (row - from) * C);
                        row += 1;
                    }
                }
                begin = columns.end;
                if begin >= cols {
                    break;
                }
            }
        }
    }

    /// # Safety
    /// Weight rows `row..row + R` exist, and `at < m`.
    #[inline(always)]
    unsafe fn tile<V: Lanes, const R: usize, const C: usize>(
        &mut self,
        row: usize,
        at: usize,
        columns: Range<usize>,
        park: usize,
    ) {
        let cols = self.x.cols;
        let whole = (cols / LANES * LANES).min(columns.end);
        let last = self.x.m - 1;
        // SAFETY: the weight rows exist by the caller's promise; chunks end at `whole <= cols`, and the slices of `x` are
        // checked when the pointers are taken.
        unsafe {
            let mut x = [std::ptr::null::<f32>(); C];
            for (c, x) in x.iter_mut().enumerate() {
                *x = self.x.row(last.min(at + c)).as_ptr();
            }
            let mut acc = if columns.start > 0 {
                unpark(&self.scratch[park..][..R * C])
            } else {
                [[V::splat(0.0); C]; R]
            };
            let mut col = columns.start;
            while col < whole {
                let end = (col + BLOCK).min(whole);
                let mut scale = [V::splat(0.0); R];
                for (r, scale) in scale.iter_mut().enumerate() {
                    *scale = self.w.scale::<V>(row + r, col / BLOCK);
                    // The same place of the next panel: a row often ends where the hardware prefetcher stops.
                    self.w.prefetch::<V>(row + R + r, col);
                }
                while col < end {
                    let mut ws = [V::splat(0.0); R];
                    for r in 0..R {
                        ws[r] = self.w.chunk::<V>(row + r, col, scale[r]);
                    }
                    for c in 0..C {
                        let x = V::load(x[c].add(col));
                        for r in 0..R {
                            acc[r][c] = x.fma(ws[r], acc[r][c]);
                        }
                    }
                    col += LANES;
                }
            }
            if columns.end < cols {
                store(acc, &mut self.scratch[park..][..R * C]);
                return;
            }
            if whole < cols {
                for r in 0..R {
                    let w = self.w.part::<V>(row + r, whole, cols - whole);
                    for c in 0..C {
                        acc[r][c] = load_part::<V>(x[c].add(whole), cols - whole).fma(w, acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C.min(self.x.m - at) {
                    self.out.set(at + c, row + r, acc[r][c].sum());
                }
            }
        }
    }
}

/// Rows of a packed tile of `x` for a register file of `registers`.
pub(crate) const fn tile_rows(registers: usize) -> usize {
    if registers >= 32 { 6 } else { 3 }
}

/// Tells how many rows of `x` a packed tile has on the leaf that runs it.
pub(crate) struct TileRows;

impl Op for TileRows {
    type Out = usize;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> usize {
        tile_rows(V::REGISTERS)
    }
}

/// Copies tile `tile` of `x` to `out`, as `[chunk][row of the tile][16]`, zero padded in both directions.
pub(crate) fn pack_tile(out: &mut [Line], x: Input<'_>, tile: usize, tile_rows: usize) {
    for r in 0..tile_rows {
        let at = tile * tile_rows + r;
        let row = if at < x.m { x.row(at) } else { &[] };
        let (chunks, rest) = row.as_chunks::<LANES>();
        let mut lines = out.iter_mut().skip(r).step_by(tile_rows);
        // In this order the end of the chunks takes no line.
        for (chunk, line) in chunks.iter().zip(lines.by_ref()) {
            line.0 = *chunk;
        }
        for line in lines {
            *line = EMPTY;
        }
        if !rest.is_empty() {
            out[chunks.len() * tile_rows + r].0[..rest.len()].copy_from_slice(rest);
        }
    }
}

/// The many-rows form, for the weight rows `from..to`.
///
/// # Safety
/// Of [`Op::run`], besides the instruction set: `w` holds rows `from..to` of `cols` columns, and `out` is valid for
/// `[m, from..to]`, written by this task alone.
pub(crate) struct Packed<'a, W> {
    pub(crate) out: Output,
    /// `ceil(m / tile_rows)` tiles from [`pack_tile`].
    pub(crate) x: &'a [Line],
    pub(crate) m: usize,
    pub(crate) cols: usize,
    pub(crate) w: W,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Reused between tasks.
    pub(crate) scratch: &'a mut Vec<Line>,
}

impl<W: Weights> Op for Packed<'_, W> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: handed through; the tile widths are those of `tile_rows`.
        unsafe {
            if V::REGISTERS >= 32 {
                self.blocks::<V, 4, 6>();
            } else {
                self.blocks::<V, 2, 3>();
            }
        }
    }
}

impl<W: Weights> Packed<'_, W> {
    #[inline(always)]
    unsafe fn blocks<V: Lanes, const R: usize, const C: usize>(self) {
        let Packed {
            x,
            m,
            cols,
            w,
            from,
            to,
            scratch,
            out,
        } = self;
        let chunks = cols.div_ceil(LANES);
        let tiles = m.div_ceil(C);
        let panels = (to - from).div_ceil(R);
        assert!(x.len() >= tiles * chunks * C, "packed rows are short");
        // Blocks of equal length, each a whole number of scale blocks.
        let blocks = cols.div_ceil(BLOCK_COLS).max(1);
        let step = cols.div_ceil(blocks).next_multiple_of(BLOCK) / LANES;
        // A tile of many rows of x is kept in L1 and meets all panels; few rows of x stay near anyway, and then widening
        // one panel at a time lets the next arrive meanwhile.
        let group = if m > FEW_ROWS { panels } else { 1 };
        let slab_tiles = if blocks > 1 { SLAB_ROWS / C } else { tiles };
        let widened = group * step * R;
        let parked = if blocks > 1 {
            panels * slab_tiles * R * C
        } else {
            0
        };
        if scratch.len() < widened + parked {
            scratch.resize(widened + parked, EMPTY);
        }
        let (widened, parked) = scratch.split_at_mut(widened);
        for slab in (0..tiles).step_by(slab_tiles) {
            let slab_end = (slab + slab_tiles).min(tiles);
            for begin in (0..chunks).step_by(step) {
                let end = (begin + step).min(chunks);
                for first in (0..panels).step_by(group) {
                    let group_end = (first + group).min(panels);
                    for p in first..group_end {
                        let panel = &mut widened[(p - first) * step * R..][..step * R];
                        let row = from + p * R;
                        // SAFETY: the rows lie in `from..to`; `panel` holds `step >= end - begin` chunks of `R`.
                        unsafe {
                            widen::<V, W, R>(panel, w, cols, row..(row + R).min(to), begin..end)
                        };
                    }
                    for tile in slab..slab_end {
                        let x = &x[(tile * chunks + begin) * C..(tile * chunks + end) * C];
                        for p in first..group_end {
                            let panel = &widened[(p - first) * step * R..][..(end - begin) * R];
                            let park = (p * slab_tiles + tile - slab) * R * C;
                            let row = from + p * R;
                            // SAFETY: registers, and memory reached through checked slices: `x` holds `end - begin`
                            // chunks of `C`, `panel` as many of `R`, and `park` one line per accumulator. Outputs are
                            // cut at `to` and `m`.
                            unsafe {
                                if tile == slab && group > 1 && end < chunks {
                                    prefetch::<V, W, R>(w, row, end..(end + step).min(chunks));
                                }
                                let acc = if begin > 0 {
                                    unpark(&parked[park..][..R * C])
                                } else {
                                    [[V::splat(0.0); C]; R]
                                };
                                let acc = accumulate::<V, R, C>(
                                    acc,
                                    panel.as_ptr(),
                                    x.as_ptr(),
                                    end - begin,
                                );
                                if end < chunks {
                                    store(acc, &mut parked[park..][..R * C]);
                                    continue;
                                }
                                for r in 0..R.min(to - row) {
                                    for c in 0..C.min(m - tile * C) {
                                        out.set(tile * C + c, row + r, acc[r][c].sum());
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Asks for a panel's weights of the next block while this one is multiplied.
///
/// # Safety
/// The machine has the instruction set of `V`.
#[inline(always)]
unsafe fn prefetch<V: Lanes, W: Weights, const R: usize>(w: W, row: usize, chunks: Range<usize>) {
    for r in 0..R {
        for chunk in chunks.clone().step_by(BLOCK / LANES) {
            // SAFETY: the caller's promise.
            unsafe { w.prefetch::<V>(row + r, chunk * LANES) };
        }
    }
}

/// # Safety
/// The machine has the instruction set of `V`.
#[inline(always)]
unsafe fn unpark<V: Lanes, const R: usize, const C: usize>(park: &[Line]) -> [[V; C]; R] {
    // SAFETY: a line is 16 elements.
    unsafe {
        let mut acc = [[V::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                acc[r][c] = V::load(park[r * C + c].0.as_ptr());
            }
        }
        acc
    }
}

/// # Safety
/// The machine has the instruction set of `V`.
#[inline(always)]
unsafe fn store<V: Lanes, const R: usize, const C: usize>(acc: [[V; C]; R], park: &mut [Line]) {
    for r in 0..R {
        for c in 0..C {
            // SAFETY: a line is 16 elements.
            unsafe { acc[r][c].store(park[r * C + c].0.as_mut_ptr()) };
        }
    }
}

/// # Safety
/// `w` and `x` are valid for `chunks` chunks of `R` and `C` lines.
#[inline(always)]
unsafe fn accumulate<V: Lanes, const R: usize, const C: usize>(
    mut acc: [[V; C]; R],
    w: *const Line,
    x: *const Line,
    chunks: usize,
) -> [[V; C]; R] {
    // SAFETY: the caller's promise; `Line` is 16 f32.
    unsafe {
        let (w, x) = (w.cast::<f32>(), x.cast::<f32>());
        for k in 0..chunks {
            let mut ws = [V::splat(0.0); R];
            for r in 0..R {
                ws[r] = V::load(w.add((k * R + r) * LANES));
            }
            for c in 0..C {
                let x = V::load(x.add((k * C + c) * LANES));
                for r in 0..R {
                    acc[r][c] = x.fma(ws[r], acc[r][c]);
                }
            }
        }
    }
    acc
}

/// Widens `chunks` of `rows` to `panel`, as `[chunk][R][16]`; rows missing to `R` are zero.
///
/// # Safety
/// The rows lie in `w`, and `panel` holds `R` lines for each chunk.
#[inline(always)]
unsafe fn widen<V: Lanes, W: Weights, const R: usize>(
    panel: &mut [Line],
    w: W,
    cols: usize,
    rows: Range<usize>,
    chunks: Range<usize>,
) {
    let whole = (cols / LANES).min(chunks.end);
    for r in 0..R {
        let row = rows.start + r;
        if row >= rows.end {
            panel
                .iter_mut()
                .skip(r)
                .step_by(R)
                .for_each(|line| *line = EMPTY);
            continue;
        }
        let mut chunk = chunks.start;
        // SAFETY: chunks below `whole` are whole chunks of an existing row; the one after is cut at `cols`. Lines are
        // taken from the slice by checked index.
        unsafe {
            while chunk < whole {
                let col = chunk * LANES;
                let scale = w.scale::<V>(row, col / BLOCK);
                // The next panel arrives while this one is worked on.
                w.prefetch::<V>(row + R, col);
                let stop = ((col / BLOCK + 1) * (BLOCK / LANES)).min(whole);
                while chunk < stop {
                    let line = &mut panel[(chunk - chunks.start) * R + r];
                    w.chunk::<V>(row, chunk * LANES, scale)
                        .store(line.0.as_mut_ptr());
                    chunk += 1;
                }
            }
            if chunk < chunks.end {
                let line = &mut panel[(chunk - chunks.start) * R + r];
                w.part::<V>(row, chunk * LANES, cols - chunk * LANES)
                    .store(line.0.as_mut_ptr());
            }
        }
    }
}
