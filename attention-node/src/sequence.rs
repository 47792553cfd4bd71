//! One request inside the engine: its tokens, what it asked for, and what a row of logits makes
//! of it. Secret: when a request ends and what its reader is told, in which order.

use std::sync::Arc;
use std::time::Duration;

use guild_model::Cpu;
use guild_model::sampler::{self, Sampled, Sampling, Seen, Shaping};
use guild_scheduler::batch::Outcome;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};

use crate::exchange::ExchangeFailure;
use crate::keys::Chain;

/// Alternatives beside a token's own log-probability that one request may ask for.
pub const MAX_TOP_LOGPROBS: usize = 128;

/// A request, checked already: the engine trusts it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids below the vocabulary's size, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; 0 only runs the prompt.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What is done to logits before that.
    pub shaping: Shaping,
    /// So many of the prompt's last tokens are output already, of a stream begun elsewhere.
    pub output_before: usize,
    /// Tokens that end the output: EOS unless ignored, and the request's own.
    pub stop_tokens: Vec<u32>,
    /// Stop tokens are impossible before this many tokens are out.
    pub min_tokens: usize,
    /// Log-probabilities beside each output token, with so many alternatives.
    pub logprobs: Option<usize>,
    /// The same beside each prompt token from the second on.
    pub prompt_logprobs: Option<usize>,
    /// Lower is served first.
    pub priority: i32,
    /// Who asks: tenants share fairly, and nothing of their prompts with each other.
    pub tenant: u64,
    /// After this its result is worth nothing; None: always worth something.
    pub timeout: Option<Duration>,
    /// How long it may wait to be admitted; None: however long.
    pub max_queue: Option<Duration>,
}

/// What a grammar or a schema lets a request say next. It is asked in the order of the output:
/// one [`Constraint::mask`] and one [`Constraint::accept`] for each token, whatever was drafted.
/// It runs inside the step loop, so whatever takes long (compiling) is done before.
pub trait Constraint: Send + std::fmt::Debug {
    /// Makes impossible tokens so: sets their logits of `[vocab]` to -inf. Bias and penalties are
    /// in them already; log-probabilities that are reported are not touched by it.
    ///
    /// # Errors
    /// What is wrong, for the client: the request fails with it.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes note of the token that was chosen.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn accept(&mut self, token: u32) -> Result<(), String>;
}

/// Why the output ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A stop token was chosen; it is the last token of the output.
    Stop(u32),
    /// `max_tokens` are out.
    Length,
}

/// Why a request ended without a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The experts of a step could not be reached in time.
    #[error("expert rows did not come back: {0}")]
    Exchange(#[from] ExchangeFailure),
    /// The node goes down and its drain limit has passed.
    #[error("the attention node is shutting down")]
    ShuttingDown,
    /// It was not admitted within the time that it gave.
    #[error("the request has waited for its first row for as long as it allowed")]
    Queue,
    /// It gave its place in the queue to another tenant's request.
    #[error("the queue is full, and others who ask have fewer places in it")]
    Displaced,
    /// Its time is over.
    #[error("the request has taken longer than its timeout")]
    Deadline,
    /// What constrains the output cannot go on.
    #[error("the output cannot be constrained any further: {0}")]
    Constraint(String),
}

/// What a request took beside its tokens; it depends on what else happened here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spent {
    /// Of the prompt's tokens those that the prefix cache had.
    pub cached: usize,
    /// Drafts that were tried, by their place.
    pub drafted: Vec<u32>,
    /// Drafts that held, by their place.
    pub held: Vec<u32>,
}

impl Spent {
    /// The same with one draft more, of `tried` tokens of which `held` did.
    fn and(mut self, tried: usize, held: usize) -> Spent {
        for (count, n) in [(&mut self.drafted, tried), (&mut self.held, held)] {
            count.resize(count.len().max(n), 0);
            count.iter_mut().take(n).for_each(|place| *place += 1);
        }
        self
    }
}

/// What the reader of a request is told, in this order: one `Prompt`, a `Token` for each
/// token, one `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt has run, as far as the reader cares.
    Prompt {
        /// One for each prompt token from the second on when asked for, else empty.
        logprobs: Vec<Sampled>,
    },
    /// One more token of the output.
    Token {
        /// The token.
        token: u32,
        /// Its log-probability and the alternatives, when asked for.
        logprobs: Option<Sampled>,
        /// What it took up to here.
        spent: Spent,
    },
    /// The output is complete.
    Finished {
        /// Why.
        reason: Finish,
        /// Tokens of the output.
        generated: usize,
        /// What it took.
        spent: Spent,
    },
    /// There will be no more.
    Failed(Failure),
}

/// The reader's end of a request. Dropping it cancels the request within a step.
#[derive(Debug)]
pub struct Events {
    reader: mpsc::Receiver<Event>,
    /// Who is to hear that the reader has gone.
    left: Arc<Notify>,
    /// Given back when the reader is done, not when the request is: what nobody reads is
    /// memory too.
    _place: OwnedSemaphorePermit,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.reader.close();
        self.left.notify_one();
    }
}

impl Events {
    /// The next event; None when there will be no more.
    pub async fn recv(&mut self) -> Option<Event> {
        self.reader.recv().await
    }

    /// The next event if it is there already.
    pub(crate) fn try_recv(&mut self) -> Option<Event> {
        self.reader.try_recv().ok()
    }

    /// Events that are there and not read yet.
    pub fn unread(&self) -> usize {
        self.reader.len()
    }

    /// Whether no event will be added to the unread ones.
    pub fn is_complete(&self) -> bool {
        self.reader.is_closed()
    }
}

/// A request that waits or runs.
#[derive(Debug)]
pub(crate) struct Sequence {
    request: Request,
    constraint: Option<Box<dyn Constraint>>,
    /// Prompt and output.
    tokens: Vec<u32>,
    /// What penalties count; nothing where there are none.
    seen: Seen,
    prompt_logprobs: Vec<Sampled>,
    prompt_told: bool,
    /// Tokens there were when the step that is out began.
    base: usize,
    /// Guesses at the tokens that come next.
    drafted: Vec<u32>,
    /// Whether the draft module's latents are in its pages.
    drafts: bool,
    keys: Chain,
    spent: Spent,
    events: mpsc::Sender<Event>,
    finished: bool,
    /// Why it has finished, until its reader is told.
    reason: Option<Finish>,
}

impl Sequence {
    /// The events of a request are bounded by `max_tokens`, so its channel has room for all of
    /// them: a slow reader holds up nothing but its own memory.
    pub(crate) fn new(
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
        keys: Chain,
        drafts: bool,
        place: OwnedSemaphorePermit,
        left: Arc<Notify>,
    ) -> (Sequence, Events) {
        let (events, reader) = mpsc::channel(request.max_tokens + 2);
        let seen = match request.shaping.counts() {
            true => Seen::new(
                &request.prompt,
                request.prompt.len().saturating_sub(request.output_before),
            ),
            false => Seen::default(),
        };
        let mut sequence = Sequence {
            tokens: request.prompt.clone(),
            seen,
            prompt_logprobs: Vec::new(),
            prompt_told: false,
            base: request.prompt.len(),
            drafted: Vec::new(),
            drafts,
            keys,
            spent: Spent::default(),
            request,
            constraint,
            events,
            finished: false,
            reason: None,
        };
        if sequence.request.prompt_logprobs.is_none() {
            sequence.tell_prompt();
        }
        let events = Events {
            reader,
            left,
            _place: place,
        };
        (sequence, events)
    }

    /// Whether its reader has gone.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    /// Tokens at positions `start..start + len`.
    pub(crate) fn tokens(&self, start: usize, len: usize) -> &[u32] {
        &self.tokens[start..start + len]
    }

    /// Tokens so far.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The first `n` drafted tokens.
    pub(crate) fn drafted(&self, n: usize) -> &[u32] {
        &self.drafted[..n]
    }

    /// Whether the draft module's latents are to be kept for it.
    pub(crate) fn drafts(&self) -> bool {
        self.drafts
    }

    /// There is a gap in them now: no more drafts, and nobody else may have its pages. Those that are
    /// made already stay to be tried: the scheduler may have been told of them.
    pub(crate) fn stop_drafting(&mut self) {
        self.drafts = false;
    }

    /// Whether a draft could be tried in the next step.
    pub(crate) fn may_draft(&self) -> bool {
        self.wants_drafts(1)
    }

    /// Whether there are less than `most` drafts, and than there are tokens to come after the next.
    pub(crate) fn wants_drafts(&self, most: usize) -> bool {
        let to_come = self.request.max_tokens.saturating_sub(self.generated() + 1);
        self.drafts && !self.finished && self.drafted.len() < most.min(to_come)
    }

    /// Guesses one more token, from the draft module's logits `[vocab]`, by the number that its own draw
    /// will be by.
    pub(crate) fn draft(&mut self, cpu: &Cpu, logits: &[f32]) -> u32 {
        let position = (self.tokens.len() + self.drafted.len()) as u64;
        let Request {
            sampling, shaping, ..
        } = &self.request;
        let token = match shaping.is_neutral() {
            true => sampler::choose(cpu, logits, sampling, position),
            false => {
                let mut shaped = logits.to_vec();
                shaping.apply(&mut shaped, &self.seen);
                sampler::choose(cpu, &shaped, sampling, position)
            }
        };
        self.drafted.push(token);
        token
    }

    /// A step begins to be read out that has tried so many drafts; `cached` tokens of the prompt were known before it
    /// came.
    pub(crate) fn begin(&mut self, cached: usize, tried: usize) {
        self.base = self.tokens.len();
        self.drafted.truncate(tried);
        self.spent.cached = cached.min(self.request.prompt.len());
    }

    /// All logits of a step have been observed: counts which drafts held. Returns how many.
    pub(crate) fn check_drafts(&mut self) -> usize {
        let tried = self.drafted.len();
        let held = self.gained().saturating_sub(1).min(tried);
        self.spent = std::mem::take(&mut self.spent).and(tried, held);
        self.drafted.clear();
        held
    }

    fn gained(&self) -> usize {
        self.tokens.len() - self.base
    }

    /// Whether the logits of the row at `position` say something about the prompt that is not known:
    /// a request that was preempted runs rows again.
    pub(crate) fn scores_prompt(&self, position: usize) -> bool {
        let scored = self.prompt_logprobs.len();
        let wanted = self.request.prompt_logprobs.is_some() && !self.prompt_told;
        wanted && position >= scored && position + 1 < self.request.prompt.len()
    }

    /// Takes the logits `[vocab]` of the row at `position`: of a prompt row for which
    /// [`Sequence::scores_prompt`] holds, or of the last row there is, then of drafts behind it in their
    /// order. Those behind a draft that did not hold say nothing.
    pub(crate) fn observe(&mut self, cpu: &Cpu, position: usize, logits: &[f32]) {
        if position + 1 < self.request.prompt.len() {
            let top = self.request.prompt_logprobs.unwrap_or(0);
            let scored = sampler::logprobs_of(cpu, logits, self.tokens[position + 1], top);
            self.prompt_logprobs.push(scored);
        } else if self.is_next(position) {
            self.extend(cpu, logits);
        }
    }

    /// Whether the row at `position` yields the next token: the last one known, or a draft that held.
    fn is_next(&self, position: usize) -> bool {
        let held = match (position + 1).checked_sub(self.base + 1) {
            None => true,
            Some(place) => self.drafted.get(place) == self.tokens.get(position),
        };
        !self.finished && position + 1 == self.tokens.len() && held
    }

    /// Called when the step that computed positions up to `end` is through: what it came to.
    pub(crate) fn settle(&mut self, id: u64, end: usize) -> Outcome {
        if self.request.max_tokens == 0 && end >= self.request.prompt.len() {
            self.tell_prompt();
            self.finish(Finish::Length);
        }
        if let Some(reason) = self.reason.take() {
            self.tell(Event::Finished {
                reason,
                generated: self.generated(),
                spent: self.spent.clone(),
            });
        }
        Outcome {
            id,
            tokens: self.gained(),
            drafts: self.drafted.len(),
            finished: self.finished,
            keys: self.keys.extend(&self.tokens),
            private: self.keys.is_drafting() && !self.drafts,
        }
    }

    fn extend(&mut self, cpu: &Cpu, logits: &[f32]) {
        if self.generated() == 0 {
            self.tell_prompt();
        }
        let token = match self.choose(cpu, logits) {
            Ok(token) => token,
            Err(reason) => {
                self.finished = true;
                return self.tell(Event::Failed(Failure::Constraint(reason)));
            }
        };
        let top = self.request.logprobs;
        let logprobs = top.map(|top| sampler::logprobs_of(cpu, logits, token, top));
        self.tokens.push(token);
        if self.request.shaping.counts() {
            self.seen.push(token);
        }
        let spent = self
            .spent
            .clone()
            .and(self.drafted.len(), self.gained() - 1);
        self.tell(Event::Token {
            token,
            logprobs,
            spent,
        });
        if self.request.stop_tokens.contains(&token) {
            self.finish(Finish::Stop(token));
        } else if self.generated() >= self.request.max_tokens {
            self.finish(Finish::Length);
        }
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// The prompt's event is held back until its log-probabilities are there.
    fn tell_prompt(&mut self) {
        if !self.prompt_told {
            self.prompt_told = true;
            let logprobs = std::mem::take(&mut self.prompt_logprobs);
            self.tell(Event::Prompt { logprobs });
        }
    }

    fn finish(&mut self, reason: Finish) {
        self.finished = true;
        self.reason = Some(reason);
    }

    /// Ends it without a result.
    pub(crate) fn fail(self, failure: Failure) {
        self.tell(Event::Failed(failure));
    }

    /// The draw is keyed by the token's position in the whole sequence. Logits are shaped, and
    /// before `min_tokens` stop tokens masked, for the draw alone: log-probabilities are of the raw
    /// logits always.
    fn choose(&mut self, cpu: &Cpu, logits: &[f32]) -> Result<u32, String> {
        let position = self.tokens.len() as u64;
        let Request {
            sampling,
            shaping,
            stop_tokens,
            min_tokens,
            ..
        } = &self.request;
        let masks = self.generated() < *min_tokens && !stop_tokens.is_empty();
        if !masks && shaping.is_neutral() && self.constraint.is_none() {
            return Ok(sampler::choose(cpu, logits, sampling, position));
        }
        let mut shaped = logits.to_vec();
        shaping.apply(&mut shaped, &self.seen);
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(&mut shaped)?;
        }
        // A constrained output that is complete ends, however short it is.
        let may_go_on = |(token, &logit): (usize, &f32)| {
            logit > f32::NEG_INFINITY && !stop_tokens.contains(&(token as u32))
        };
        if masks && (self.constraint.is_none() || (0..).zip(&shaped).any(may_go_on)) {
            for &token in stop_tokens {
                shaped[token as usize] = f32::NEG_INFINITY;
            }
        }
        let token = sampler::choose(cpu, &shaped, sampling, position);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        Ok(token)
    }

    fn tell(&self, event: Event) {
        // Fails only when the reader has gone, which `is_abandoned` sees before the next step.
        let _ = self.events.try_send(event);
    }
}
