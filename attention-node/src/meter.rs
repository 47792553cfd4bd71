//! What this node has done and is doing, as a page for Prometheus.
//!
//! Secret: the names of series. Counting is done by those who know, in atomics; times between tokens are taken where
//! events leave the node, so that the step loop does nothing for them. It must not know how a page is written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use guild_node::metrics::{Histogram, Page, ROWS, TokenTimes};

use crate::desk::EngineHandle;
use crate::engine::DraftCounters;
use crate::exchange::ExchangeCounters;
use crate::overlap::Overlap;
use crate::pages::Moved;
use crate::sequence::Spent;

/// What steps have come to.
#[derive(Debug)]
pub(crate) struct Steps {
    took: Histogram,
    rows: Histogram,
    failed: AtomicU64,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            took: Histogram::default(),
            rows: Histogram::new(ROWS),
            failed: AtomicU64::new(0),
        }
    }
}

impl Steps {
    /// A step of so many rows went through.
    pub(crate) fn went(&self, rows: usize, took: Duration) {
        self.rows.observe(rows);
        self.took.observe(took);
    }

    /// One has failed.
    pub(crate) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
}

/// What an engine counts.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) engine: EngineHandle,
    pub(crate) steps: Arc<Steps>,
    pub(crate) drafted: Arc<DraftCounters>,
    pub(crate) exchanged: Arc<ExchangeCounters>,
    pub(crate) overlap: Overlap,
}

/// All that is known of a node.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Once the engine runs.
    counted: OnceLock<Counted>,
    /// Epoch of the placement that is served by; 0: none yet.
    epoch: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated: AtomicU64,
    token_times: TokenTimes,
}

impl Meter {
    /// The engine runs and counts.
    pub(crate) fn counting(&self, counted: Counted) {
        // A node has one engine.
        let _ = self.counted.set(counted);
    }

    /// Rows go by the placement of this epoch.
    pub(crate) fn routes_by(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed);
    }

    /// What it says now, about the model that clients call so; `moved` is what others have run for this node.
    pub(crate) fn page(&self, model: &str, moved: Option<&Moved>) -> Page {
        let mut page = Page::of(model);
        page.gauge(
            "guild_placement_epoch",
            "Epoch of the placement that rows go by; 0: none yet.",
            &self.epoch,
        );
        page.counter(
            "guild_prompt_tokens_total",
            "Tokens of prompts of which the first token of output is out.",
            &self.prompt_tokens,
        );
        page.counter(
            "guild_generation_tokens_total",
            "Tokens of output.",
            &self.generated,
        );
        let load = |of: &AtomicU64| of.load(Ordering::Relaxed);
        page.prefix_cache(load(&self.prompt_tokens), load(&self.cached_tokens));
        page.token_times(&self.token_times);
        if let Some(moved) = moved {
            moved.write(&mut page);
        }
        if let Some(counted) = self.counted.get() {
            counted.write(&mut page);
        }
        page
    }
}

impl Counted {
    fn write(&self, page: &mut Page) {
        self.write_engine(page);
        page.drafts(&self.drafted.all());
        let so_far = self.overlap.so_far();
        page.counter(
            "guild_steps_in_two_total",
            "Steps that went through the layers in two micro-batches.",
            so_far.split,
        );
        page.counter(
            "guild_exchange_away_seconds_total",
            "Time that rows were with their experts.",
            so_far.away,
        );
        page.counter(
            "guild_exchange_hidden_seconds_total",
            "Of this time what the engine had other work for.",
            so_far.away.saturating_sub(so_far.exposed),
        );
        let exchanged = &self.exchanged;
        for (name, help, value) in [
            (
                "rows",
                "Rows sent to expert nodes, one for each expert.",
                &exchanged.rows,
            ),
            (
                "messages",
                "Messages to expert nodes, of all kinds.",
                &exchanged.dispatches,
            ),
            (
                "local_messages",
                "Those of them to nodes of this process.",
                &exchanged.local,
            ),
            (
                "retries",
                "Messages that replace one that failed.",
                &exchanged.retries,
            ),
            (
                "hedges",
                "Messages that repeat one whose answer is late, to other nodes.",
                &exchanged.hedges,
            ),
            (
                "suspicions",
                "Times that an expert node came under suspicion.",
                &exchanged.suspected,
            ),
            (
                "slow",
                "Times that an expert node was found to be slow.",
                &exchanged.slow,
            ),
        ] {
            page.counter(&format!("guild_exchange_{name}_total"), help, value);
        }
    }

    fn write_engine(&self, page: &mut Page) {
        let counts = self.engine.counts();
        let pages = self.engine.limits().pages;
        for (name, help, value) in [
            (
                "guild_num_requests_running",
                "Requests that have KV pages.",
                counts.running,
            ),
            (
                "guild_num_requests_waiting",
                "Requests that wait for them.",
                counts.waiting,
            ),
            (
                "guild_kv_cache_pages",
                "Pages of the latent KV cache.",
                pages,
            ),
            (
                "guild_prefix_cache_pages",
                "Pages kept for prompts that begin the same way, which nobody uses.",
                counts.cached_pages,
            ),
        ] {
            page.gauge(name, help, value);
        }
        let held = pages.saturating_sub(counts.free_pages);
        page.gauge(
            "guild_kv_cache_usage_perc",
            "Part of the latent KV cache that requests hold; 1 is all.",
            held as f64 / pages.max(1) as f64,
        );
        page.counter(
            "guild_num_preemptions_total",
            "Times that a request gave its pages to others.",
            counts.preemptions,
        );
        page.counter(
            "guild_rows_total",
            "Rows that went through the model.",
            counts.run,
        );
        page.counter(
            "guild_failed_steps_total",
            "Steps that failed with all their requests.",
            &self.steps.failed,
        );
        page.histogram(
            "guild_step_duration_seconds",
            "What a step took.",
            &self.steps.took,
        );
        page.histogram("guild_step_rows", "Rows of a step.", &self.steps.rows);
    }
}

/// Takes the times of one request's tokens.
#[derive(Debug)]
pub(crate) struct Timed {
    meter: Arc<Meter>,
    arrived: Instant,
    last: Option<Instant>,
}

impl Timed {
    /// A request has arrived.
    pub(crate) fn new(meter: Arc<Meter>) -> Timed {
        Timed {
            meter,
            arrived: Instant::now(),
            last: None,
        }
    }

    /// A token goes out, after a prompt of `prompt` tokens.
    pub(crate) fn token(&mut self, prompt: usize, spent: &Spent) {
        let (now, meter) = (Instant::now(), &self.meter);
        let last = self.last.replace(now);
        meter.token_times.token(self.arrived, last, now);
        if last.is_none() {
            let add = |to: &AtomicU64, n: usize| to.fetch_add(n as u64, Ordering::Relaxed);
            add(&meter.prompt_tokens, prompt);
            add(&meter.cached_tokens, spent.cached);
        }
        meter.generated.fetch_add(1, Ordering::Relaxed);
    }
}
