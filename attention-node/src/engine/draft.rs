//! Drafts: tokens guessed by the model's own multi-token-prediction module, to be checked by the next step.
//!
//! Secret: how a guess costs nobody anything but time. A step's rows whose next token is known by now go
//! through the module, which keeps its latents in the cache as one more layer; the last row of each
//! decoding sequence yields a draft, and chained on itself further ones. The next step runs the drafts as
//! ordinary rows behind the sure one, and the sampler draws at each position what it would have drawn
//! anyway: draws are keyed by (seed, position), so a draft holds exactly if it is the token that a step of
//! its own would have given. Output is therefore bit for bit what it is without drafts, greedy or not,
//! which is more than rejection sampling (Leviathan et al. 2023) promises, namely the same distribution.
//! Drafts are drawn with the same numbers from the module's distribution; two draws by one number agree
//! more often than two independent ones. Rows of drafts that did not hold are written over.
//!
//! A module whose experts do not answer costs its sequences their drafts and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use guild_model::cache::SeqRows;
use guild_model::mtp::Mtp;
use guild_model::workspace::Buffer;
use guild_scheduler::batch::Step;
use guild_transport::Fabric;

use super::{Engine, HEAD_ROWS};
use crate::exchange::ExchangeFailure;

/// Drafts of one sequence that are tried in one step at most.
pub const MAX_DRAFTS: usize = 8;

/// Drafts tried and drafts that held, by their place in a draft, since the start.
#[derive(Debug, Default)]
pub struct DraftCounters {
    tried: [AtomicU64; MAX_DRAFTS],
    held: [AtomicU64; MAX_DRAFTS],
}

impl DraftCounters {
    /// Tried and held at each place, as far as any were tried.
    pub fn all(&self) -> Vec<(u64, u64)> {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let both = self.tried.iter().zip(&self.held);
        both.map(|(tried, held)| (load(tried), load(held)))
            .take_while(|&(tried, _)| tried > 0)
            .collect()
    }

    pub(super) fn count(&self, tried: usize, held: usize) {
        for place in self.tried.iter().take(tried) {
            place.fetch_add(1, Ordering::Relaxed);
        }
        for place in self.held.iter().take(held) {
            place.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One line for the log, if there is anything to say.
    pub(crate) fn log(&self) {
        let all = self.all();
        if !all.is_empty() {
            let share = |(tried, held): &(u64, u64)| format!("{:.3}", *held as f64 / *tried as f64);
            let shares: Vec<String> = all.iter().map(share).collect();
            let tried = all[0].0;
            tracing::info!(tried, held = shares.join(" "), "drafts, by place");
        }
    }
}

/// The last row of a sequence that drafts.
struct Last {
    id: u64,
    /// Row among those that the module ran.
    row: usize,
    position: usize,
    pages: Arc<[u32]>,
}

impl<F: Fabric + 'static> Engine<F> {
    /// Takes the rows of a step that went through, whose last hidden states are `hidden` `[n, hidden]`,
    /// through the draft module, and lets decoding sequences draft if `propose`.
    pub(super) async fn draft(
        &mut self,
        step: &Step,
        seqs: &[SeqRows<'_>],
        hidden: &[f32],
        propose: bool,
    ) {
        let trunk = Arc::clone(&self.trunk);
        let Some(mtp) = trunk.mtp().filter(|_| self.drafts > 0) else {
            return;
        };
        let width = trunk.config().hidden_size;
        let (mut rows, mut next) = (Vec::new(), Vec::new());
        let (mut parts, mut lasts, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for (chunk, seq) in step.chunks.iter().zip(seqs) {
            let Some(sequence) = self.sequences.get(&chunk.id).filter(|s| s.drafts()) else {
                continue;
            };
            // Rows of drafts that did not hold have no next token.
            let sure = sequence.len().saturating_sub(chunk.start + 1);
            let n = (chunk.len + chunk.drafts).min(sure);
            if n == 0 {
                continue;
            }
            let first = rows.len() / width;
            rows.extend_from_slice(&hidden[seq.rows.start * width..][..n * width]);
            next.extend_from_slice(sequence.tokens(chunk.start + 1, n));
            parts.push(SeqRows {
                rows: first..first + n,
                start: chunk.start,
                pages: &chunk.pages,
            });
            ids.push(chunk.id);
            if chunk.sample && sequence.may_draft() {
                lasts.push(Last {
                    id: chunk.id,
                    row: first + n - 1,
                    position: chunk.start + n - 1,
                    pages: Arc::clone(&chunk.pages),
                });
            }
        }
        if parts.is_empty() {
            return;
        }
        let mut x = mtp.combine_input(&next, &trunk.final_norm(&rows));
        let mut ended = self.through(mtp, &mut x, &parts).await;
        if ended.is_ok() && propose {
            ended = self.propose(mtp, x, lasts).await;
        }
        if let Err(failure) = ended {
            tracing::warn!(sequences = ids.len(), "no more drafts for these: {failure}");
            for id in ids {
                if let Some(sequence) = self.sequences.get_mut(&id) {
                    sequence.stop_drafting();
                }
            }
        }
    }

    /// A draft for each of `lasts` from the module's output `x`, and chained ones behind it.
    async fn propose(
        &mut self,
        mtp: &Mtp,
        mut x: Buffer,
        mut lasts: Vec<Last>,
    ) -> Result<(), ExchangeFailure> {
        let width = self.trunk.config().hidden_size;
        for _ in 0..self.drafts {
            x = lasts
                .iter()
                .flat_map(|last| &x[last.row * width..][..width])
                .copied()
                .collect();
            let mut tokens = Vec::with_capacity(lasts.len());
            for (block, x) in lasts.chunks(HEAD_ROWS).zip(x.chunks(HEAD_ROWS * width)) {
                let logits = mtp.draft_logits(x);
                let vocab = logits.len() / block.len();
                for (last, logits) in block.iter().zip(logits.chunks_exact(vocab)) {
                    let sequence = self.sequences.get_mut(&last.id);
                    tokens.push(sequence.map(|s| s.draft(&self.cpu, logits)));
                }
            }
            // Whoever may draft further, and has a page for the row that does it.
            let mut going = Vec::new();
            let (mut hidden, mut next) = (Vec::new(), Vec::new());
            let carried = mtp.carry(&x);
            let page_tokens = self.cache.page_tokens();
            for (at, (mut last, token)) in lasts.into_iter().zip(tokens).enumerate() {
                last.position += 1;
                let sequence = self.sequences.get(&last.id);
                let goes_on = sequence.is_some_and(|s| s.wants_drafts(self.drafts));
                let (Some(token), true) = (token, goes_on) else {
                    continue;
                };
                if last.position < last.pages.len() * page_tokens {
                    hidden.extend_from_slice(&carried[at * width..][..width]);
                    next.push(token);
                    last.row = going.len();
                    going.push(last);
                }
            }
            lasts = going;
            if lasts.is_empty() {
                break;
            }
            x = mtp.combine_input(&next, &hidden);
            let parts: Vec<SeqRows<'_>> = lasts
                .iter()
                .map(|last| SeqRows {
                    rows: last.row..last.row + 1,
                    start: last.position,
                    pages: &last.pages,
                })
                .collect();
            self.through(mtp, &mut x, &parts).await?;
        }
        Ok(())
    }

    /// Rows `x` `[n, hidden]` through the module's layer, in place.
    async fn through(
        &mut self,
        mtp: &Mtp,
        x: &mut [f32],
        seqs: &[SeqRows<'_>],
    ) -> Result<(), ExchangeFailure> {
        let layers = std::slice::from_ref(mtp.layer());
        self.pass(layers, x, seqs, None).await.map(|_| ())
    }
}
