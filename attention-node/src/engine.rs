//! The engine: the step loop, and the latent KV cache it owns.
//!
//! Secret: the order of things in a step. Decisions are the scheduler's, arithmetic is the
//! model's, rows travel by the fabric; this file only calls them, in the order of a token's
//! path. It must not know the network, the wire or a tokenizer.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use guild_model::Cpu;
use guild_model::cache::{Format, LatentCache, SeqRows};
use guild_model::trunk::Trunk;
use guild_scheduler::batch::{Chunk, Decoded, InvalidLimits, Limits, Outcome, Payoff, Step};
use guild_scheduler::microbatch::Choice;
use guild_transport::Fabric;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::desk::{Desk, EngineHandle, Turn};
use crate::exchange::{Exchange, ExchangeCounters, ExchangeFailure, Patience, Views};
use crate::meter::Steps;
use crate::moving::PageForm;
use crate::overlap::Overlap;
use crate::routed::RoutedRows;
use crate::sequence::{Failure, Sequence};

mod draft;
mod layers;

pub use draft::{DraftCounters, MAX_DRAFTS};

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
    /// Drafts of a sequence in a step at most.
    drafts: usize,
    drafted: Arc<DraftCounters>,
    steps: Arc<Steps>,
    /// None: drafts are always made.
    payoff: Option<Payoff>,
    /// What the making of drafts took in the step that is out.
    drafting: Duration,
    overlap: Overlap,
    /// Whether steps go in two micro-batches, where nobody has said.
    choice: Choice,
}

impl<F: Fabric + 'static> Engine<F> {
    /// An engine with an empty cache of `limits.pages` pages in `format`, and the handle that feeds it.
    /// `patience` is for expert nodes that do not answer. Of `limits.drafts` nothing comes where the
    /// model has no module that drafts.
    ///
    /// # Errors
    /// [`InvalidLimits`] when the limits contradict themselves.
    pub fn new(
        trunk: Arc<Trunk>,
        cpu: Cpu,
        fabric: Arc<F>,
        views: Views,
        limits: Limits,
        format: Format,
        patience: Patience,
    ) -> Result<(Engine<F>, EngineHandle), InvalidLimits> {
        let drafts = match trunk.mtp() {
            Some(_) => limits.drafts.min(MAX_DRAFTS),
            None => 0,
        };
        let limits = Limits { drafts, ..limits };
        let (pages, page_tokens) = (limits.pages, limits.page_tokens);
        let layers = trunk.layers().len() + usize::from(drafts > 0);
        limits.validate()?;
        let cache = LatentCache::new(trunk.config(), layers, pages, page_tokens, format);
        let desk = Arc::new(Desk::new(limits, PageForm::of(&cache, drafts > 0))?);
        let engine = Engine {
            cache,
            exchange: Exchange::new(fabric, views, patience),
            routed: Arc::new(RoutedRows::new(trunk.config(), drafts > 0)),
            trunk,
            cpu,
            desk: Arc::clone(&desk),
            sequences: HashMap::new(),
            drafts,
            drafted: Arc::default(),
            steps: Arc::default(),
            payoff: None,
            drafting: Duration::ZERO,
            overlap: Overlap::default(),
            choice: Choice::default(),
        };
        Ok((engine, EngineHandle::new(desk)))
    }

    /// The same engine, which drafts as long as that makes it faster.
    pub fn drafting_while_it_pays(mut self) -> Engine<F> {
        self.payoff = (self.drafts > 0).then(Payoff::new);
        self
    }

    /// The same engine, whose steps go in two micro-batches when `overlap` says so.
    pub fn overlapping(mut self, overlap: Overlap) -> Engine<F> {
        self.overlap = overlap;
        self
    }

    /// Which drafts have held.
    pub fn draft_counters(&self) -> Arc<DraftCounters> {
        Arc::clone(&self.drafted)
    }

    /// What steps have come to.
    pub(crate) fn steps(&self) -> Arc<Steps> {
        Arc::clone(&self.steps)
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
                    let began = Instant::now();
                    match self.step(&step).await {
                        Ok(outcomes) => self.end(&step, began.elapsed(), &outcomes),
                        Err(failure) => self.fail(&step, failure),
                    }
                    self.desk.move_pages(&mut self.cache);
                }
                Turn::Idle if self.desk.move_pages(&mut self.cache) => {}
                Turn::Idle => self.desk.news().await,
                Turn::Closed => return,
                Turn::Halted => return self.fail_all(),
            }
        }
    }

    /// One step: every row of every chunk through every layer. Nothing of a request changes
    /// before all layers are through, so a step that fails leaves no half token.
    async fn step(&mut self, step: &Step) -> Result<Vec<Outcome>, ExchangeFailure> {
        let (tokens, seqs) = gather(step, &self.sequences);
        let mut hidden = self.trunk.embed(&tokens);
        self.through_layers(&mut hidden, &seqs).await?;
        let propose = self.read_out(step, &seqs, &hidden);
        let read_out = Instant::now();
        self.draft(step, &seqs, &hidden, propose).await;
        self.drafting = read_out.elapsed();
        Ok(self.settle(step))
    }

    /// Head and sampling, for the rows whose logits somebody wants. True when drafts are to be made
    /// of what has come out.
    fn read_out(&mut self, step: &Step, seqs: &[SeqRows<'_>], hidden: &[f32]) -> bool {
        let config = self.trunk.config();
        let (width, vocab) = (config.hidden_size, config.vocab_size);
        // (request, position, row in the batch), in the order of the batch.
        let mut wanted = Vec::new();
        for (chunk, seq) in step.chunks.iter().zip(seqs) {
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else {
                continue;
            };
            sequence.begin(chunk.cached, chunk.drafts);
            for (at, row) in seq.rows.clone().enumerate() {
                let position = chunk.start + at;
                let samples = chunk.sample && at + 1 >= chunk.len;
                if sequence.scores_prompt(position) || samples {
                    wanted.push((chunk.id, position, row));
                }
            }
        }
        for block in wanted.chunks(HEAD_ROWS) {
            let mut rows = self.trunk.workspace().take::<f32>(block.len() * width);
            for (to, &(_, _, row)) in rows.chunks_exact_mut(width).zip(block) {
                to.copy_from_slice(&hidden[row * width..][..width]);
            }
            let normed = self.trunk.final_norm(&rows);
            let logits = self.trunk.logits(&normed);
            for ((id, position, _), logits) in block.iter().zip(logits.chunks_exact(vocab)) {
                if let Some(sequence) = self.sequences.get_mut(id) {
                    sequence.observe(&self.cpu, *position, logits);
                }
            }
        }
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.get_mut(&chunk.id) {
                let held = sequence.check_drafts();
                self.drafted.count(chunk.drafts, held);
            }
        }
        self.drafts > 0 && !self.payoff.as_ref().is_some_and(Payoff::measures_plain)
    }

    /// What came of each request of a step that went through; those that ended leave.
    fn settle(&mut self, step: &Step) -> Vec<Outcome> {
        let settle = |chunk: &Chunk| {
            let sequence = self.sequences.get_mut(&chunk.id)?;
            let outcome = sequence.settle(chunk.id, chunk.start + chunk.len);
            if outcome.finished {
                self.sequences.remove(&chunk.id);
            }
            Some(outcome)
        };
        step.chunks.iter().filter_map(settle).collect()
    }

    /// Tells the scheduler what came of a step, and learns whether drafts pay.
    fn end(&mut self, step: &Step, took: Duration, outcomes: &[Outcome]) {
        self.desk.commit(took, outcomes);
        self.steps.went(step.rows(), took);
        let Some(payoff) = &mut self.payoff else {
            return;
        };
        // A step that only decodes: what prompts cost says nothing about drafts.
        if step
            .chunks
            .iter()
            .all(|chunk| chunk.sample && chunk.len == 1)
        {
            payoff.observe(Decoded {
                requests: step.chunks.len(),
                tokens: outcomes.iter().map(|outcome| outcome.tokens).sum(),
                drafts: step.chunks.iter().map(|chunk| chunk.drafts).sum(),
                took,
                drafting: self.drafting,
            });
            let pays = payoff.pays();
            if self.desk.set_drafting(pays) != pays {
                tracing::info!(requests = step.chunks.len(), pays, "drafting");
            }
            if !pays {
                let sequences = self.sequences.values_mut();
                sequences.for_each(Sequence::stop_drafting);
            }
        }
    }

    /// Fails every request of a step that did not go through.
    fn fail(&mut self, step: &Step, failure: ExchangeFailure) {
        tracing::error!(requests = step.chunks.len(), "step failed: {failure}");
        let failure = Failure::Exchange(failure);
        for chunk in &step.chunks {
            if let Some(sequence) = self.sequences.remove(&chunk.id) {
                sequence.fail(failure.clone());
            }
        }
        self.desk.fail();
        self.steps.failed();
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
            tokens.extend_from_slice(sequence.drafted(chunk.drafts));
        }
        seqs.push(SeqRows {
            rows: first..tokens.len(),
            start: chunk.start,
            pages: &chunk.pages,
        });
    }
    (tokens, seqs)
}
