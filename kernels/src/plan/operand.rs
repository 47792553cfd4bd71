//! The two sides of a product: rows in the form that the weights ask for, and a range of weight rows over them.
//!
//! Secret: which form of rows suits which weights. Forms do not show in the results.

use std::cell::Cell;

use half::bf16;

use super::{PACK_FROM, pairs};
use crate::{
    MatrixRef, WeightsRef,
    generic::{
        LANES,
        int::{self, Groups, Leaf, Product, QuantRows, Quantise},
        matmul::{
            self, Direct, EMPTY, Input, Line, Output, Packed, TASK_ROWS, TileRows, pack_tile,
        },
        pairs::{Form as PairForm, PairRows},
        weights::{Bf16, F32, Fp8, Weights},
    },
    isa::Choice,
    pack::Int,
};

/// Elements that one task quantises: some microseconds.
const PIECE: usize = 16 << 10;

thread_local! {
    /// Weight panel and parked accumulators of a task.
    static PANEL: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// How rows must lie for a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As they are.
    Plain,
    /// Tiles from [`pack_tile`].
    Lines { tile_rows: usize, tile_lines: usize },
    /// Tiles from [`Quantise`].
    Words {
        most: usize,
        groups: Groups,
        offset: i32,
    },
    /// Tiles of bf16.
    Pairs(PairForm),
}

impl Form {
    /// What suits `m` rows and these weights.
    pub(crate) fn of(isa: Choice, w: &MatrixRef<'_>, m: usize) -> Form {
        if let Some(form) = pairs::form(isa, w) {
            return Form::Pairs(form);
        }
        let words = |int, group| {
            // SAFETY: asks for nothing.
            let (most, offset) = unsafe { isa.run_dot(Leaf(int)) };
            Form::Words {
                most: int::tile_of(m, most),
                groups: Groups::new(w.cols, group),
                offset,
            }
        };
        match w.data {
            WeightsRef::Int8 { group, .. } => words(Int::Int8, group),
            WeightsRef::Int4 { group, .. } => words(Int::Int4, group),
            _ => {
                // SAFETY: asks for nothing.
                let tile_rows = unsafe { isa.run(TileRows) };
                let large = usize::from(tile_rows == matmul::tile_rows(usize::MAX));
                if m < PACK_FROM[large] {
                    return Form::Plain;
                }
                Form::Lines {
                    tile_rows,
                    tile_lines: w.cols.div_ceil(LANES) * tile_rows,
                }
            }
        }
    }

    /// Rows of a tile, the last perhaps excepted.
    pub(crate) fn tile_rows(self) -> usize {
        match self {
            Form::Plain => usize::MAX,
            Form::Lines { tile_rows, .. } => tile_rows,
            Form::Words { most, .. } => most,
            Form::Pairs(form) => form.most(),
        }
    }

    /// Lines of memory for one tile.
    pub(crate) fn tile_lines(self) -> usize {
        match self {
            Form::Plain => 0,
            Form::Lines { tile_lines, .. } => tile_lines,
            Form::Words { most, groups, .. } => groups.tile_lines(most),
            Form::Pairs(form) => form.tile_lines(),
        }
    }

    /// Tiles to be prepared.
    pub(crate) fn tiles(self, m: usize) -> usize {
        match self {
            Form::Plain => 0,
            _ => m.div_ceil(self.tile_rows()),
        }
    }

    /// Pieces that `m` rows may be prepared in, each by itself.
    pub(crate) fn pieces(self, m: usize) -> usize {
        self.tiles(m) * self.pieces_of_tile()
    }

    fn pieces_of_tile(self) -> usize {
        match self {
            Form::Words { groups, .. } => groups.count.div_ceil(self.groups_of_piece()),
            _ => 1,
        }
    }

    fn groups_of_piece(self) -> usize {
        match self {
            Form::Words { most, groups, .. } => (PIECE / (most * groups.group)).max(1),
            _ => 1,
        }
    }

    /// Brings a piece of `x` into this form; `to` is where the tiles are.
    ///
    /// # Safety
    /// `to` is valid for all tiles, and nobody else has this piece of them.
    pub(crate) unsafe fn prepare(self, isa: Choice, x: Input<'_>, piece: usize, to: Tiles) {
        let pieces = self.pieces_of_tile();
        let (tile, piece) = (piece / pieces, piece % pieces);
        let lines = to.0.wrapping_add(tile * self.tile_lines());
        match self {
            Form::Plain => {}
            // SAFETY: the tile is all there, and one piece: exclusively ours.
            Form::Lines { tile_rows, .. } => unsafe {
                let lines = std::slice::from_raw_parts_mut(lines, self.tile_lines());
                pack_tile(lines, x, tile, tile_rows);
            },
            // SAFETY: as above.
            Form::Pairs(form) => unsafe {
                let lines = std::slice::from_raw_parts_mut(lines, self.tile_lines());
                pairs::round(isa, x, form, tile, lines);
            },
            Form::Words { groups, .. } => {
                let from = piece * self.groups_of_piece();
                let first = from * groups.group;
                let end = x.cols.min(first + self.groups_of_piece() * groups.group);
                let columns = Input {
                    data: &x.data[first..],
                    cols: end - first,
                    ..x
                };
                // SAFETY: the tile is all there, and these groups of it are ours.
                unsafe { self.quantise(isa, columns, tile, from, Tiles(lines)) }
            }
        }
    }

    /// Quantises columns of the rows of one tile, which begin group `from`.
    ///
    /// # Safety
    /// `to` is valid for the tile, and nobody else has these groups of it. The form has words.
    pub(crate) unsafe fn quantise(
        self,
        isa: Choice,
        x: Input<'_>,
        tile: usize,
        from: usize,
        to: Tiles,
    ) {
        let Form::Words {
            most,
            groups,
            offset,
        } = self
        else {
            unreachable!("only words are quantised");
        };
        let first = tile * most;
        // SAFETY: the caller's promise.
        unsafe {
            isa.run(Quantise {
                x,
                first,
                rows: int::tile_rows(x.m - first, most),
                groups,
                offset,
                from,
                tile: to.0,
            })
        }
    }

    /// `m` prepared rows. With nothing to prepare, `plain` are they.
    pub(crate) fn rows<'a>(self, plain: Input<'a>, lines: &'a [Line]) -> Rows<'a> {
        match self {
            Form::Plain => Rows::Plain(plain),
            Form::Lines { .. } => Rows::Lines {
                lines,
                m: plain.m,
                cols: plain.cols,
            },
            Form::Words { most, groups, .. } => Rows::Words(QuantRows {
                lines,
                m: plain.m,
                most,
                groups,
            }),
            Form::Pairs(form) => Rows::Pairs(PairRows {
                lines,
                m: plain.m,
                form,
            }),
        }
    }
}

/// Memory of prepared rows, which tasks fill piece by piece.
#[derive(Clone, Copy)]
pub(crate) struct Tiles(pub(crate) *mut Line);

// SAFETY: tasks write disjoint pieces, and read what others wrote after these have said that they are done.
unsafe impl Send for Tiles {}
// SAFETY: as above.
unsafe impl Sync for Tiles {}

/// Rows in one of the forms.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    Plain(Input<'a>),
    Lines {
        lines: &'a [Line],
        m: usize,
        cols: usize,
    },
    Words(QuantRows<'a>),
    Pairs(PairRows<'a>),
}

/// Columns `from..to` of `out = x wᵀ`. The two are multiples of 16, or the end.
///
/// # Safety
/// `out` is valid for these columns of the rows of `x`, which are written by nobody else meanwhile; `w.data` holds what
/// its shape says, and `x` has the form that [`Form::of`] names for it.
pub(crate) unsafe fn product(
    isa: Choice,
    out: Output,
    x: Rows<'_>,
    w: MatrixRef<'_>,
    from: usize,
    to: usize,
) {
    let (rows, cols) = (w.rows, w.cols);
    let packed = |int, data, scales: &_, group| {
        // SAFETY: the caller's promise.
        unsafe { bytes(isa, out, x, (int, data, scales, group), w, from, to) }
    };
    assert!(to <= rows);
    // SAFETY: the caller's promise.
    unsafe {
        if pairs::product(isa, out, x, w, from, to) {
            return;
        }
        match w.data {
            WeightsRef::F32(data) => floats(isa, out, x, F32 { data, cols }, from, to),
            WeightsRef::Bf16(data) => floats(isa, out, x, Bf16 { data, cols }, from, to),
            WeightsRef::Fp8 { data, scales } => {
                floats(isa, out, x, Fp8 { data, scales, cols }, from, to)
            }
            WeightsRef::Int8 {
                data,
                scales,
                group,
            } => packed(Int::Int8, data, scales, group),
            WeightsRef::Int4 {
                data,
                scales,
                group,
            } => packed(Int::Int4, data, scales, group),
        }
    }
}

/// # Safety
/// As for [`product`].
unsafe fn floats<W: Weights>(isa: Choice, out: Output, x: Rows<'_>, w: W, from: usize, to: usize) {
    let mut scratch = PANEL.take();
    match x {
        // SAFETY: the caller's promise.
        Rows::Plain(x) => unsafe {
            isa.run(Direct {
                out,
                x,
                w,
                from,
                to,
                scratch: &mut scratch,
            })
        },
        Rows::Lines { lines, m, cols } => {
            for from in (from..to).step_by(TASK_ROWS) {
                // SAFETY: the caller's promise; the lines come from `pack_tile`.
                unsafe {
                    isa.run(Packed {
                        out,
                        x: lines,
                        m,
                        cols,
                        w,
                        from,
                        to: to.min(from + TASK_ROWS),
                        scratch: &mut scratch,
                    })
                };
            }
        }
        Rows::Words(_) | Rows::Pairs(_) => unreachable!("`Form::of` gives floats none of these"),
    }
    PANEL.set(scratch);
}

/// # Safety
/// As for [`product`].
unsafe fn bytes(
    isa: Choice,
    out: Output,
    x: Rows<'_>,
    (int, data, scales, group): (Int, &[u8], &[bf16], usize),
    w: MatrixRef<'_>,
    from: usize,
    to: usize,
) {
    let Rows::Words(x) = x else {
        unreachable!("`Form::of` gives integers words");
    };
    assert_eq!(x.groups, Groups::new(w.cols, group));
    let w = int::Packed {
        int,
        data,
        scales,
        rows: w.rows,
    };
    // SAFETY: the caller's promise; the rows come from `Quantise`.
    unsafe {
        isa.run_dot(Product {
            out,
            x,
            w,
            from: from / LANES,
            to: to.div_ceil(LANES),
        })
    };
}

/// Memory of prepared rows, at least `lines` long.
pub(crate) fn grown(memory: &mut Vec<Line>, lines: usize) -> &mut [Line] {
    if memory.len() < lines {
        memory.resize(lines, EMPTY);
    }
    &mut memory[..lines]
}
