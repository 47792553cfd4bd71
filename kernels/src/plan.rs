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

use std::{
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering},
};

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
/// A thread claims this part of its share of what is left: large pieces first, which are read in long runs, small ones at
/// the end, so that threads end together.
const SHARES: usize = 3;
/// From this many elements of x on, threads bring them into their form together.
const PREPARED_TOGETHER: usize = 32 << 10;
/// Rows of two panels, which are multiplied together.
const PAIR: usize = 2 * LANES;

thread_local! {
    /// Packed rows of the calling thread's matrix product.
    static PACKED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

pub(crate) use attend::attend;
pub(crate) use ffn::ffn;
use operand::{Form, Tiles, grown, product};
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
        let tiles = Tiles(lines.as_mut_ptr());
        let many = pool.filter(|_| part.m * part.cols >= PREPARED_TOGETHER);
        for_each(many, form.pieces(part.m), |piece| {
            // SAFETY: the tiles are ours, and each piece is prepared once.
            unsafe { form.prepare(isa, part, piece, tiles) }
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

/// Cuts `0..rows` into ranges of whole pairs of panels, at most `most` rows each, and runs `f(from, to)` on each. Threads
/// claim ever shorter ones, so that they end together.
fn for_each_range(pool: Option<&Pool>, rows: usize, most: usize, f: impl Fn(usize, usize) + Sync) {
    let threads = pool.map_or(1, Pool::threads);
    let claimed = AtomicUsize::new(0);
    let length = |from: usize| share(rows - from, threads, PAIR).min(most);
    for_each(pool, threads, |_| {
        let more = |from| (from < rows).then(|| from + length(from));
        while let Ok(from) = claimed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            f(from, rows.min(from + length(from)));
        }
    });
}

/// How much of what is left a thread takes next, in whole units.
fn share(left: usize, threads: usize, unit: usize) -> usize {
    match threads {
        1 => left.next_multiple_of(unit),
        _ => (left / (threads * SHARES)).next_multiple_of(unit).max(unit),
    }
}

fn for_each(pool: Option<&Pool>, n: usize, f: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) => pool.for_each(n, f),
        None => (0..n).for_each(f),
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
