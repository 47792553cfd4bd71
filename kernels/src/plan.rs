//! How one operation is cut into tasks for the threads.
//!
//! Secret: thresholds, task sizes, scratch. No cut shows in the results: every output element is computed by one task
//! from start to end.

mod attend;
mod ffn;
mod operand;
mod pairs;
#[cfg(target_arch = "x86_64")]
mod proof;

use std::cell::Cell;

use crate::{
    HeadLayout, MatrixRef, WeightsRef,
    generic::{
        LANES,
        matmul::{Input, Line, Output, TASK_ROWS},
    },
    isa::Choice,
    pool::Pool,
};

/// An operation estimated to take less than this runs on the caller's thread: waking another would cost as much.
const SERIAL_NS: usize = 30_000;
/// Weight bytes one thread streams in a nanosecond, for that estimate.
const BYTES_PER_NS: usize = 16;
/// Multiplications one thread does in a nanosecond, for that estimate.
const MACS_PER_NS: usize = 64;
/// From this many rows of x on, packing pays; with small tiles, and with those of a large register file.
const PACK_FROM: [usize; 2] = [9, 17];
/// Most bytes of packed rows held at once; more rows take another pass over the weights.
const PACK_BYTES: usize = 16 << 20;
/// Tasks per thread that let a slow thread be overtaken.
const TASKS_PER_THREAD: usize = 4;

thread_local! {
    /// Packed rows of the calling thread's matrix product.
    static PACKED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

pub(crate) use attend::attend;
pub(crate) use ffn::ffn;
use operand::{Form, grown, product};
#[cfg(target_arch = "x86_64")]
pub(crate) use proof::{is_right, multiplies};

pub(crate) fn is_small(bytes: usize, macs: usize) -> bool {
    bytes / BYTES_PER_NS + macs / MACS_PER_NS < SERIAL_NS
}

fn weight_bytes(w: &MatrixRef<'_>) -> usize {
    match w.data {
        WeightsRef::F32(data) => size_of_val(data),
        WeightsRef::Bf16(data) => size_of_val(data),
        WeightsRef::Fp8 { data, .. } => data.len(),
        WeightsRef::Int8 { data, scales, .. } | WeightsRef::Int4 { data, scales, .. } => {
            data.len() + size_of_val(scales)
        }
    }
}

/// `out = x wᵀ`; the caller has checked the shapes.
///
/// # Safety
/// `out` is valid for `[x.m, w.rows]` and written by nobody else meanwhile; `w.data` holds `[w.rows, w.cols]`, and
/// `x.cols == w.cols`.
pub(crate) unsafe fn matmul(
    isa: Choice,
    pool: Option<&Pool>,
    out: Output,
    x: Input<'_>,
    w: MatrixRef<'_>,
) {
    let pool = pool.filter(|_| !is_small(weight_bytes(&w), x.m * w.rows * w.cols));
    let form = Form::of(isa, &w, x.m);
    let tile_bytes = form.tile_lines() * size_of::<Line>();
    let pass = (PACK_BYTES / tile_bytes.max(1))
        .max(1)
        .saturating_mul(form.tile_rows());
    let mut memory = PACKED.take();
    for first in (0..x.m).step_by(pass) {
        let part = Input {
            data: &x.data[first * x.stride..],
            m: pass.min(x.m - first),
            ..x
        };
        let lines = grown(&mut memory, form.tiles(part.m) * form.tile_lines());
        for_each_chunk(pool, lines, form.tile_lines(), |tile, lines| {
            form.prepare(isa, part, tile, lines)
        });
        let rows = form.rows(part, lines);
        let out = out.at(first * out.stride);
        let most = if form == Form::Plain || part.m < PACK_FROM[0] {
            usize::MAX
        } else {
            TASK_ROWS
        };
        for_each_range(pool, w.rows, most, |from, to| {
            // SAFETY: the ranges are disjoint parts of `0..w.rows`; the rest is the caller's promise.
            unsafe { product(isa, out, rows, w, from, to) }
        });
    }
    PACKED.set(memory);
}

/// Cuts `0..rows` into ranges of whole panels, at most `most` rows each, and runs `f(from, to)` on each.
fn for_each_range(pool: Option<&Pool>, rows: usize, most: usize, f: impl Fn(usize, usize) + Sync) {
    let tasks = pool.map_or(1, |pool| pool.threads() * TASKS_PER_THREAD);
    let step = rows
        .div_ceil(tasks)
        .next_multiple_of(LANES)
        .min(most)
        .max(LANES);
    for_each(pool, rows.div_ceil(step), |i| {
        f(i * step, rows.min((i + 1) * step))
    });
}

fn for_each(pool: Option<&Pool>, n: usize, f: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) => pool.for_each(n, f),
        None => (0..n).for_each(f),
    }
}

fn for_each_chunk<T: Send>(
    pool: Option<&Pool>,
    data: &mut [T],
    chunk: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    match pool {
        Some(pool) => pool.for_each_chunk(data, chunk, f),
        None => data
            .chunks_mut(chunk.max(1))
            .enumerate()
            .for_each(|(i, piece)| f(i, piece)),
    }
}

/// One product per head, between rows that hold the heads apart.
pub(crate) struct Heads<'a> {
    pub(crate) out: Output,
    pub(crate) out_at: HeadLayout,
    pub(crate) x: &'a [f32],
    pub(crate) x_at: HeadLayout,
    pub(crate) m: usize,
    pub(crate) w: &'a [MatrixRef<'a>],
}

/// The caller has checked the shapes.
///
/// # Safety
/// Every head's part of every row lies in `out` and in `x`, and the parts of `out` are disjoint.
pub(crate) unsafe fn matmul_heads(isa: Choice, pool: &Pool, job: Heads<'_>) {
    let Heads {
        out,
        out_at,
        x,
        x_at,
        m,
        w,
    } = job;
    let bytes = w.iter().map(weight_bytes).sum();
    let macs = w.iter().map(|w| m * w.rows * w.cols).sum();
    let pool = (!is_small(bytes, macs)).then_some(pool);
    for_each(pool, w.len(), |head| {
        let x = Input {
            data: &x[x_at.offset + head * x_at.head..],
            index: None,
            stride: x_at.row,
            m,
            cols: w[head].cols,
        };
        // SAFETY: the head's part begins inside `out`, and parts are disjoint: the caller's promise.
        unsafe {
            matmul(
                isa,
                None,
                out.at(out_at.offset + head * out_at.head),
                x,
                w[head],
            )
        };
    });
}
