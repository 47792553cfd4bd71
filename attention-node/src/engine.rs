//! The engine: the step loop, and the latent KV cache it owns.
//!
//! Secret: the order of things in a step. Decisions are the scheduler's, arithmetic is the
//! model's, rows travel by the fabric; this file only calls them, in the order of a token's
//! path. It must not know the network, the wire or a tokenizer.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use guild_model::Cpu;
use guild_model::cache::{Format, LatentCache, SeqRows};
use guild_model::trunk::{Ffn, Trunk};
use guild_scheduler::batch::{Chunk, InvalidLimits, Limits, Step};
use guild_transport::Fabric;
use tokio::sync::oneshot;

use crate::desk::{Desk, EngineHandle, Turn};
use crate::exchange::{Exchange, ExchangeCounters, ExchangeFailure, Patience, Views};
use crate::routed::RoutedRows;
use crate::sequence::{Failure, Sequence};

/// Rows whose logits `[rows, vocab]` are held at the same time.
const HEAD_ROWS: usize = 32;

/// Runs requests to their end, a step at a time.
pub struct Engine<F> {
    trunk: Arc<Trunk>,
    cpu: Cpu,
    exchange: Exchange<F>,
    cache: LatentCache,
    desk: Arc<Desk>,
    sequences: HashMap<u64, Sequence>,
    routed: Arc<RoutedRows>,
}

impl<F: Fabric + 'static> Engine<F> {
    /// An engine with an empty cache of `limits.pages` pages, and the handle that feeds it.
    /// `patience` is for expert nodes that do not answer.
    ///
    /// # Errors
    /// [`InvalidLimits`] when the limits contradict themselves.
    pub fn new(
        trunk: Arc<Trunk>,
        cpu: Cpu,
        fabric: Arc<F>,
        views: Views,
        limits: Limits,
        patience: Patience,
    ) -> Result<(Engine<F>, EngineHandle), InvalidLimits> {
        let (pages, page_tokens) = (limits.pages, limits.page_tokens);
        let desk = Arc::new(Desk::new(limits)?);
        let layers = trunk.layers().len();
        let engine = Engine {
            cache: LatentCache::new(trunk.config(), layers, pages, page_tokens, Format::F32),
            exchange: Exchange::new(fabric, views, patience),
            routed: Arc::new(RoutedRows::new(trunk.config())),
            trunk,
            cpu,
            desk: Arc::clone(&desk),
            sequences: HashMap::new(),
        };
        Ok((engine, EngineHandle::new(desk)))
    }

    /// The same engine with its cache in `format` instead of f32.
    pub fn caching(mut self, format: Format) -> Engine<F> {
        let (layers, pages) = (self.cache.layers(), self.cache.pages());
        let page_tokens = self.cache.page_tokens();
        self.cache = LatentCache::new(self.trunk.config(), layers, pages, page_tokens, format);
        self
    }

    /// What the exchange with expert nodes has come to so far.
    pub fn exchange_counters(&self) -> Arc<ExchangeCounters> {
        Arc::clone(self.exchange.counters())
    }

    /// What the gates have chosen.
    pub fn routed_rows(&self) -> Arc<RoutedRows> {
        Arc::clone(&self.routed)
    }

    /// The step loop. Returns when the handle has closed and nobody is left.
    pub async fn run(mut self) {
        loop {
            match self.desk.turn(&mut self.sequences) {
                Turn::Step(step) => {
                    let outcomes = match self.step(&step).await {
                        Ok(outcomes) => outcomes,
                        Err(failure) => self.fail(&step, failure),
                    };
                    self.desk.commit(&outcomes);
                }
                Turn::Idle => self.desk.news().await,
                Turn::Closed => return,
                Turn::Halted => return self.fail_all(),
            }
        }
    }

    /// One step: every row of every chunk through every layer. Nothing of a request changes
    /// before all layers are through, so a step that fails leaves no half token.
    async fn step(&mut self, step: &Step) -> Result<Vec<(u64, bool)>, ExchangeFailure> {
        let (tokens, seqs) = gather(step, &self.sequences);
        let mut hidden = self.trunk.embed(&tokens);
        let mut moe_layers = 0;
        for layer in self.trunk.layers() {
            layer.attend(&mut hidden, &seqs, &mut self.cache);
            match layer.ffn() {
                Ffn::Dense(ffn) => ffn.forward(&mut hidden),
                Ffn::Moe(moe) => {
                    let x = moe.norm(&hidden);
                    let routes = moe.route(&x);
                    self.routed.count(moe_layers, &routes);
                    moe_layers += 1;
                    let away = self.exchange.dispatch(layer.index(), &x, &routes);
                    let shared = moe.shared(&x);
                    let rows = away.combine().await?;
                    moe.combine(&mut hidden, &routes, &rows, shared.as_deref());
                }
            }
        }
        self.read_out(step, &seqs, &hidden);
        Ok(self.settle(step))
    }

    /// Head and sampling, for the rows whose logits somebody wants.
    fn read_out(&mut self, step: &Step, seqs: &[SeqRows<'_>], hidden: &[f32]) {
        let config = self.trunk.config();
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        // (request, position, row in the batch), in the order of the batch.
        let mut wanted = Vec::new();
        for (chunk, seq) in step.chunks.iter().zip(seqs) {
            let Some(sequence) = self.sequences.get(&chunk.id) else {
                continue;
            };
            for (at, row) in seq.rows.clone().enumerate() {
                let position = chunk.start + at;
                let last = at + 1 == chunk.len;
                if sequence.scores_prompt(position) || (last && chunk.sample) {
                    wanted.push((chunk.id, position, row));
                }
            }
        }
        for block in wanted.chunks(HEAD_ROWS) {
            let rows = block
                .iter()
                .map(|&(_, _, row)| &hidden[row * width..][..width]);
            let normed = self.trunk.final_norm(&rows.collect::<Vec<_>>().concat());
            let logits = self.trunk.logits(&normed);
            for ((id, position, _), logits) in block.iter().zip(logits.chunks_exact(vocab)) {
                if let Some(sequence) = self.sequences.get_mut(id) {
                    sequence.observe(&self.cpu, *position, logits);
                }
            }
        }
    }

    /// What came of each request of a step that went through; those that ended leave.
    fn settle(&mut self, step: &Step) -> Vec<(u64, bool)> {
        let settle = |chunk: &Chunk| {
            let sequence = self.sequences.get_mut(&chunk.id);
            let finished = sequence.is_none_or(|s| s.settle(chunk.start + chunk.len));
            if finished {
                self.sequences.remove(&chunk.id);
            }
            (chunk.id, finished)
        };
        step.chunks.iter().map(settle).collect()
    }

    /// Fails every request of a step that did not go through.
    fn fail(&mut self, step: &Step, failure: ExchangeFailure) -> Vec<(u64, bool)> {
        tracing::error!(requests = step.chunks.len(), "step failed: {failure}");
        let failure = Failure::Exchange(failure);
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.remove(&chunk.id) {
                sequence.fail(failure.clone());
            }
        }
        step.chunks.iter().map(|chunk| (chunk.id, true)).collect()
    }

    fn fail_all(&mut self) {
        self.desk.abandon(self.sequences.keys().copied());
        for (_, sequence) in self.sequences.drain() {
            sequence.fail(Failure::ShuttingDown);
        }
    }
}

impl<F: Fabric + 'static> Engine<F> {
    /// Runs the loop on a thread of its own. The receiver hears how it ended: `Ok` after a
    /// close, `Err` with the message of a panic. A panic ends every request without a result.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn spawn(self, name: &str) -> std::io::Result<oneshot::Receiver<Result<(), String>>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        let (ended, hears) = oneshot::channel();
        std::thread::Builder::new()
            .name(format!("engine-{name}"))
            .spawn(move || {
                let run = AssertUnwindSafe(|| runtime.block_on(self.run()));
                let end = catch_unwind(run).map_err(|panic| {
                    let text = panic.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
                    text.unwrap_or_else(|| "panic without a message".to_owned())
                });
                // Nobody listens any more when the node has given up waiting.
                let _ = ended.send(end);
            })?;
        Ok(hears)
    }
}

impl<F> Drop for Engine<F> {
    /// However it ends, nobody may be left waiting for it.
    fn drop(&mut self) {
        self.desk.abandon(self.sequences.keys().copied());
    }
}

/// The rows of a step: their tokens, and which of them belong to which pages.
fn gather<'a>(step: &'a Step, sequences: &HashMap<u64, Sequence>) -> (Vec<u32>, Vec<SeqRows<'a>>) {
    let mut tokens = Vec::with_capacity(step.rows());
    let mut seqs = Vec::with_capacity(step.chunks.len());
    for chunk in &step.chunks {
        let first = tokens.len();
        if let Some(sequence) = sequences.get(&chunk.id) {
            tokens.extend_from_slice(sequence.tokens(chunk.start, chunk.len));
        }
        seqs.push(SeqRows {
            rows: first..tokens.len(),
            start: chunk.start,
            pages: &chunk.pages,
        });
    }
    (tokens, seqs)
}
