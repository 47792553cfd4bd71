//! Products of pairs of bf16, where the arithmetic asks for them.
//!
//! Secret: which rule's product runs on which rows.

use std::cell::Cell;

use super::operand::Rows;
use crate::{
    MatrixRef, WeightsRef,
    arithmetic::Pairs,
    generic::{
        matmul::{Input, Line, Output},
        pairs::{Form, PairRows, PairWeights, Round, Rule, lanes, tiles},
        weights::{Bf16, Fp8},
    },
    isa::Choice,
};

thread_local! {
    /// Widened weights and parked sums of a task.
    static PANEL: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// The form of rows for `w`, if its products are those of pairs.
pub(crate) fn form(isa: Choice, w: &MatrixRef<'_>) -> Option<Form> {
    let pairs = isa.pairs()?;
    let fits = matches!(w.data, WeightsRef::Bf16(_) | WeightsRef::Fp8 { .. });
    fits.then(|| Form {
        rule: pairs.rule(),
        cols: w.cols,
    })
}

/// Brings one tile of `x` into the form.
pub(crate) fn round(isa: Choice, x: Input<'_>, form: Form, tile: usize, lines: &mut [Line]) {
    // SAFETY: asks for nothing besides the instruction set.
    unsafe {
        isa.run(Round {
            x,
            tile,
            form,
            lines,
        })
    }
}

/// Columns `from..to` of `out = x wᵀ`, where `x` has the form for it; says whether it has.
///
/// # Safety
/// As for [`super::operand::product`].
pub(crate) unsafe fn product(
    isa: Choice,
    out: Output,
    x: Rows<'_>,
    w: MatrixRef<'_>,
    from: usize,
    to: usize,
) -> bool {
    let (Rows::Pairs(x), Some(pairs)) = (x, isa.pairs()) else {
        return false;
    };
    let cols = w.cols;
    // SAFETY: the caller's promise.
    unsafe {
        match w.data {
            WeightsRef::Bf16(data) => multiply(pairs, out, x, Bf16 { data, cols }, from, to),
            WeightsRef::Fp8 { data, scales } => {
                multiply(pairs, out, x, Fp8 { data, scales, cols }, from, to)
            }
            _ => return false,
        }
    }
    true
}

/// # Safety
/// As for [`product`].
unsafe fn multiply<W: PairWeights>(
    pairs: Pairs,
    out: Output,
    x: PairRows<'_>,
    w: W,
    from: usize,
    to: usize,
) {
    let mut memory = PANEL.take();
    let scratch = &mut memory;
    // SAFETY: the caller's promise; the lines come from `Round`.
    unsafe {
        match pairs.rule() {
            Rule::Lanes => pairs.run_lanes(lanes::Product {
                out,
                x,
                w,
                from,
                to,
                scratch,
            }),
            Rule::Tiles => pairs.run_tiles(tiles::Product {
                out,
                x,
                w,
                from,
                to,
                scratch,
            }),
        }
    }
    PANEL.set(memory);
}
