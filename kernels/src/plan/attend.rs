//! How latent attention is cut into tasks.
//!
//! Secret: heads of a task and its scratch. No cut shows in the results.

use std::cell::Cell;

use super::{TASKS_PER_THREAD, for_each_chunk, is_small};
use crate::{
    LatentAttention,
    generic::attention::{Attend, Keys},
    isa::Choice,
    pool::Pool,
};

/// Heads that pass together over the cached rows in one attention task.
const HEADS: usize = 16;

thread_local! {
    /// Scores of an attention task.
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Absorbed latent attention; the caller has checked the shapes.
pub(crate) fn attend(isa: Choice, pool: &Pool, job: LatentAttention<'_>) {
    let LatentAttention {
        q,
        out,
        heads,
        width,
        value_width,
        scale,
        rows,
        cache,
        page_tokens,
        page_stride,
        offset,
    } = job;
    let keys: usize = rows.iter().map(|row| row.visible).sum();
    let pool = (!is_small(0, keys * heads * (width + value_width))).then_some(pool);
    // Few rows: as many tasks as threads, so that each passes over the cache once.
    let threads = pool.map_or(1, Pool::threads);
    let together = if rows.len() >= threads * TASKS_PER_THREAD {
        HEADS
    } else {
        (heads * rows.len())
            .div_ceil(threads)
            .next_multiple_of(4)
            .min(HEADS)
    };
    let together = together.clamp(1, heads.max(1));
    // Tasks of one row: the last may have fewer heads, so a task's outputs are `[row, from..to]`, not equal chunks.
    let mut pieces: Vec<(usize, usize, &mut [f32])> =
        Vec::with_capacity(rows.len() * heads.div_ceil(together));
    for (row, out) in out
        .chunks_exact_mut((heads * value_width).max(1))
        .enumerate()
    {
        for (i, out) in out.chunks_mut(together * value_width).enumerate() {
            pieces.push((row, i * together, out));
        }
    }
    for_each_chunk(pool, &mut pieces, 1, |_, piece| {
        for (row, head, out) in piece {
            let heads_here = out.len() / value_width;
            let visible = rows[*row].visible;
            let mut scores = SCORES.take();
            if scores.len() < heads_here * visible {
                scores.resize(heads_here * visible, 0.0);
            }
            let keys = Keys {
                cache,
                pages: rows[*row].pages,
                page_tokens,
                page_stride,
                offset,
                width,
            };
            let q = &q[(*row * heads + *head) * width..][..heads_here * width];
            // SAFETY: asks for nothing besides the instruction set: it checks its shapes.
            unsafe {
                isa.run(Attend {
                    out,
                    q,
                    heads: heads_here,
                    value_width,
                    visible,
                    scale,
                    keys,
                    scores: &mut scores,
                })
            };
            SCORES.set(scores);
        }
    });
}
