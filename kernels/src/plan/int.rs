//! How a product of packed integers is cut into tasks.
//!
//! Secret: passes, task sizes and scratch. No cut shows in the results.

use std::cell::Cell;

use half::bf16;

use super::{TASKS_PER_THREAD, for_each};
use crate::{
    MatrixRef,
    generic::{
        LANES,
        int::{DotRows, Groups, Packed, Product, QuantRows, Quantise, tile_rows},
        matmul::{Input, Output},
    },
    isa::Choice,
    pack::Int,
    pool::Pool,
};

/// Most bytes of quantised rows held at once; more rows take another pass over the weights.
const PASS_BYTES: usize = 16 << 20;

thread_local! {
    /// Quantised rows of the calling thread's product.
    static ROWS: Cell<Rows> = const { Cell::new(Rows::new()) };
}

/// Memory of quantised rows, reused between calls.
#[derive(Default)]
struct Rows {
    words: Vec<u32>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl Rows {
    const fn new() -> Rows {
        Rows {
            words: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
        }
    }
}

pub(crate) fn packed<'a>(
    int: Int,
    data: &'a [u8],
    scales: &'a [bf16],
    group: usize,
    w: MatrixRef<'_>,
) -> Packed<'a> {
    Packed {
        int,
        data,
        scales,
        groups: Groups::new(w.cols, group),
        rows: w.rows,
    }
}

/// `out = x wᵀ`; the caller has checked the shapes.
///
/// # Safety
/// `out` is valid for `[x.m, w.rows]` and written by nobody else meanwhile.
pub(crate) unsafe fn matmul(
    isa: Choice,
    pool: Option<&Pool>,
    out: Output,
    x: Input<'_>,
    w: Packed<'_>,
) {
    // SAFETY: asks for nothing.
    let most = unsafe { isa.run_dot(DotRows) };
    let groups = w.groups;
    let pass = (PASS_BYTES / (groups.words() * 4).max(1) / most).max(1) * most;
    let mut memory = ROWS.take();
    for first in (0..x.m).step_by(pass) {
        let m = pass.min(x.m - first);
        let part = Input {
            data: &x.data[first * x.stride..],
            m,
            ..x
        };
        // SAFETY: row `first` lies in the output, whose rows are `stride` apart; the rest is the caller's promise.
        unsafe {
            let rows = quantise(isa, pool, &mut memory, part, groups, most);
            products(isa, pool, out.at(first * out.stride), rows, w);
        }
    }
    ROWS.set(memory);
}

fn quantise<'a>(
    isa: Choice,
    pool: Option<&Pool>,
    memory: &'a mut Rows,
    x: Input<'_>,
    groups: Groups,
    most: usize,
) -> QuantRows<'a> {
    let tiles = x.m.div_ceil(most);
    let rows = tiles * most;
    let Rows {
        words,
        scales,
        sums,
    } = memory;
    grow(words, rows * groups.words());
    grow(scales, rows * groups.count);
    grow(sums, rows * groups.count);
    let mut pieces: Vec<_> = words
        .chunks_mut((groups.words() * most).max(1))
        .zip(scales.chunks_mut((groups.count * most).max(1)))
        .zip(sums.chunks_mut((groups.count * most).max(1)))
        .take(tiles)
        .collect();
    super::for_each_chunk(pool, &mut pieces, 1, |tile, piece| {
        for ((words, scales), sums) in piece {
            // SAFETY: asks for nothing besides the instruction set: it checks its shapes.
            unsafe {
                isa.run(Quantise {
                    x,
                    first: tile * most,
                    rows: tile_rows(x.m - tile * most, most),
                    groups,
                    words,
                    scales,
                    sums,
                })
            };
        }
    });
    QuantRows {
        words,
        scales,
        sums,
        m: x.m,
        most,
        groups,
    }
}

fn grow<T: Default + Clone>(memory: &mut Vec<T>, len: usize) {
    if memory.len() < len {
        memory.resize(len, T::default());
    }
}

/// # Safety
/// `out` is valid for `[x.m, w.rows]` and written by nobody else meanwhile.
unsafe fn products(isa: Choice, pool: Option<&Pool>, out: Output, x: QuantRows<'_>, w: Packed<'_>) {
    let panels = w.rows.div_ceil(LANES);
    let tasks = pool.map_or(1, |pool| pool.threads() * TASKS_PER_THREAD);
    let step = panels.div_ceil(tasks).next_multiple_of(2);
    for_each(pool, panels.div_ceil(step.max(1)), |i| {
        // SAFETY: the ranges are disjoint panels; the rest is the caller's promise.
        unsafe {
            isa.run_dot(Product {
                out,
                x,
                w,
                from: i * step,
                to: panels.min((i + 1) * step),
            })
        };
    });
}
