//! Rows through layers, in one piece or in two micro-batches.
//!
//! Secret: who computes while rows are away. A layer has two halves, up to where rows leave for their experts and from
//! where they are back. With two micro-batches the second one takes its first half while the rows of the first one are
//! away, and the first one goes on to the next layer while those of the second one are; the shared experts fill what
//! is left. Rows keep their order and each is computed alone, so how they are cut shows in no bit. A pass of which
//! any exchange fails has failed: the caller publishes nothing of it.

use std::future::poll_fn;
use std::ops::AddAssign;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::future::{FutureExt, LocalBoxFuture, MaybeDone, maybe_done};
use guild_model::Config;
use guild_model::cache::{LatentCache, SeqRows};
use guild_model::trunk::{Ffn, Layer, Moe};
use guild_model::workspace::Buffer;
use guild_scheduler::microbatch::{Ran, Run, cut};
use guild_transport::Fabric;
use tokio::time::Instant;

use super::Engine;
use crate::exchange::{Back, Exchange, ExchangeFailure};
use crate::overlap::MicroBatches;
use crate::routed::RoutedRows;

/// Rows that go through the layers together.
struct MicroBatch<'a> {
    /// `[n, hidden]`.
    hidden: &'a mut [f32],
    seqs: Vec<SeqRows<'a>>,
    /// Between the halves of a layer.
    away: Option<Away<'a>>,
}

/// What the second half of a layer needs.
struct Away<'a> {
    moe: &'a Moe,
    /// Of the shared experts, if there are any.
    shared: Option<Buffer>,
    rows: MaybeDone<LocalBoxFuture<'a, Result<Back, ExchangeFailure>>>,
}

/// How long rows were away, over all exchanges, and for how long of that nobody computed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waits {
    away: Duration,
    exposed: Duration,
}

impl AddAssign for Waits {
    fn add_assign(&mut self, more: Waits) {
        self.away += more.away;
        self.exposed += more.exposed;
    }
}

impl<F: Fabric + 'static> Engine<F> {
    /// All rows of a step, `hidden` `[n, hidden]`, through all layers, in place.
    pub(super) async fn through_layers(
        &mut self,
        hidden: &mut [f32],
        seqs: &[SeqRows<'_>],
    ) -> Result<(), ExchangeFailure> {
        let (trunk, wanted) = (Arc::clone(&self.trunk), self.overlap.wanted());
        let rows = seqs.last().map_or(0, |seq| seq.rows.end);
        let run = |seq: &SeqRows<'_>| Run {
            start: seq.start,
            rows: seq.rows.len(),
        };
        let at = match wanted {
            MicroBatches::Off => None,
            MicroBatches::Auto if !self.choice.splits(rows) => None,
            _ => cut(seqs.iter().map(run), look_back(trunk.config())),
        };
        let begun = Instant::now();
        let waits = self.pass(trunk.layers(), hidden, seqs, at).await?;
        let split = at.is_some();
        self.overlap.step(split);
        let ran = Ran {
            rows,
            split,
            took: begun.elapsed(),
            exposed: waits.exposed,
        };
        if wanted == MicroBatches::Auto
            && let Some(faster) = self.choice.observe(ran)
        {
            tracing::info!(rows, faster, "steps in two micro-batches");
        }
        Ok(())
    }

    /// Rows `hidden` `[n, hidden]` through `layers`, in place; those from row `cut` on are a micro-batch of their own.
    pub(super) async fn pass(
        &mut self,
        layers: &[Layer],
        hidden: &mut [f32],
        seqs: &[SeqRows<'_>],
        cut: Option<usize>,
    ) -> Result<Waits, ExchangeFailure> {
        let (exchange, routed, cache) = (&self.exchange, &self.routed, &mut self.cache);
        let mut parts = micro_batches(hidden, seqs, cut);
        let mut waits = Waits::default();
        for layer in layers {
            for at in 0..parts.len() {
                waits += back(&mut parts, at).await?;
                parts[at].leave(layer, cache, exchange, routed);
            }
        }
        for at in 0..parts.len() {
            waits += back(&mut parts, at).await?;
        }
        drop(parts);
        self.overlap.exchanged(waits.away, waits.exposed);
        Ok(waits)
    }
}

impl<'a> MicroBatch<'a> {
    /// The first half of a layer: until rows are away, if they leave at all.
    fn leave<F: Fabric + 'static>(
        &mut self,
        layer: &'a Layer,
        cache: &mut LatentCache,
        exchange: &'a Exchange<F>,
        routed: &RoutedRows,
    ) {
        layer.attend(self.hidden, &self.seqs, cache);
        match layer.ffn() {
            Ffn::Dense(ffn) => ffn.forward(self.hidden),
            Ffn::Moe(moe) => {
                let x = moe.norm(self.hidden);
                let routes = moe.route(&x);
                routed.count(layer.index(), &routes);
                let away = exchange.dispatch(layer.index(), x, routes);
                self.away = Some(Away {
                    moe,
                    shared: moe.shared(away.x()),
                    rows: maybe_done(away.combine().boxed_local()),
                });
            }
        }
    }
}

/// The second half of the layer that `parts[at]` is in. Exchanges of the others go on meanwhile: their retries wait
/// for nobody.
async fn back(parts: &mut [MicroBatch<'_>], at: usize) -> Result<Waits, ExchangeFailure> {
    if parts[at].away.is_none() {
        return Ok(Waits::default());
    }
    let begun = Instant::now();
    let came = poll_fn(|context| {
        for away in parts.iter_mut().filter_map(|part| part.away.as_mut()) {
            // Whether it is this one that is done is asked below.
            let _ = away.rows.poll_unpin(context);
        }
        let away = parts[at].away.as_mut();
        let came = away.and_then(|away| Pin::new(&mut away.rows).take_output());
        came.map_or(Poll::Pending, Poll::Ready)
    });
    let came = came.await?;
    let waited = begun.elapsed();
    let MicroBatch { hidden, away, .. } = &mut parts[at];
    if let Some(Away { moe, shared, .. }) = away.take() {
        moe.combine(hidden, &came.routes, &came.rows, shared.as_deref());
    }
    let is_exposed = came.last.is_some_and(|last| last > begun);
    Ok(Waits {
        away: came.away,
        exposed: if is_exposed { waited } else { Duration::ZERO },
    })
}

/// The rows in one piece, or those before and from row `cut` on.
fn micro_batches<'a>(
    hidden: &'a mut [f32],
    seqs: &[SeqRows<'a>],
    cut: Option<usize>,
) -> Vec<MicroBatch<'a>> {
    let rows = seqs.last().map_or(0, |seq| seq.rows.end);
    let width = hidden.len() / rows.max(1);
    let (before, after) = hidden.split_at_mut(cut.unwrap_or(rows) * width);
    let part = |hidden, from: usize, to: usize| MicroBatch {
        hidden,
        seqs: within(seqs, from, to),
        away: None,
    };
    match cut {
        None => vec![part(before, 0, rows)],
        Some(cut) => vec![part(before, 0, cut), part(after, cut, rows)],
    }
}

/// The sequences of rows `from..to`, as far as they are among them.
fn within<'a>(seqs: &[SeqRows<'a>], from: usize, to: usize) -> Vec<SeqRows<'a>> {
    let part = |seq: &SeqRows<'a>| {
        let (first, end) = (seq.rows.start.max(from), seq.rows.end.min(to));
        (first < end).then(|| SeqRows {
            rows: first - from..end - from,
            start: seq.start + first - seq.rows.start,
            pages: seq.pages,
        })
    };
    seqs.iter().filter_map(part).collect()
}

/// What a row costs in a layer for each position that it looks back on, in units of what it costs otherwise:
/// multiplications in the latent space against those of the projections and the shared experts.
fn look_back(config: &Config) -> f64 {
    let (hidden, heads, latent) = (
        config.hidden_size,
        config.num_attention_heads,
        config.kv_lora_rank,
    );
    let position = heads * (config.latent_width() + latent);
    let head = config.qk_head_dim();
    let query = match config.q_lora_rank {
        Some(rank) => rank * (hidden + heads * head),
        None => hidden * heads * head,
    };
    let value = heads * config.v_head_dim;
    let absorbed = latent * (heads * config.qk_nope_head_dim + value);
    let shared = 3 * hidden * config.shared_intermediate_size();
    let row = query + hidden * config.latent_width() + absorbed + hidden * value + shared;
    position as f64 / row.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_that_is_cut_goes_on_where_its_first_part_ends() {
        let pages = [7, 8];
        let seq = |rows, start| SeqRows {
            rows,
            start,
            pages: &pages,
        };
        let seqs = [seq(0..1, 40), seq(1..6, 10), seq(6..7, 3)];
        let shown = |seqs: Vec<SeqRows<'_>>| {
            let all = seqs.into_iter().map(|seq| (seq.rows, seq.start));
            all.collect::<Vec<_>>()
        };
        assert_eq!(shown(within(&seqs, 0, 3)), [(0..1, 40), (1..3, 10)]);
        assert_eq!(shown(within(&seqs, 3, 7)), [(0..3, 12), (3..4, 3)]);
        assert_eq!(shown(within(&seqs, 6, 7)), [(0..1, 3)]);
        let mut hidden: Vec<f32> = (0..14).map(|n| n as f32).collect();
        let parts = micro_batches(&mut hidden, &seqs, Some(3));
        assert_eq!((parts[0].hidden.len(), parts[1].hidden[0]), (6, 6.0));
        drop(parts);
        let whole = micro_batches(&mut hidden, &seqs, None);
        assert_eq!(shown(whole[0].seqs.clone()), shown(seqs.to_vec()));
    }
}
