//! Continuous batching: who gets rows of the next step, and which KV pages.
//!
//! Secret: the policy. First come, first served; decode rows before prefill rows; prompts are
//! cut into chunks that fill what the decode rows left of the step's token budget; a request is
//! admitted only when pages for its whole life (prompt and output) are free, so nothing is ever
//! preempted. The page allocator lives in here, because admission is a decision about pages.
//!
//! The engine turns the wheel: [`Scheduler::next`] says what to run, the engine runs it, and
//! [`Scheduler::commit`] says what came of it. Between the two any number of
//! [`Scheduler::submit`] and [`Scheduler::cancel`] may happen. This module must not know what a
//! token, a layer or a client is: it counts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Retry hint before anything is known about the pace of admissions.
pub const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The shortest retry hint given to a refused client.
pub const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest retry hint given to a refused client.
pub const RETRY_MAX: Duration = Duration::from_secs(30);

/// What one scheduler may hand out. All counts, no bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests that hold pages at the same time.
    pub max_running: usize,
    /// Requests that wait for admission; one more is refused.
    pub max_waiting: usize,
    /// Rows of one step, prefill and decode together.
    pub max_step_tokens: usize,
    /// Positions of one KV page.
    pub page_tokens: usize,
    /// KV pages in all.
    pub pages: usize,
    /// Positions of one request, prompt and output together.
    pub max_context: usize,
}

impl Limits {
    /// Checks that the limits can serve anything at all.
    ///
    /// # Errors
    /// Names the limit that is zero, too large for a page number, or that would let a decode
    /// row wait behind others (`max_step_tokens` below `max_running`).
    pub fn validate(&self) -> Result<(), InvalidLimits> {
        let positive = [
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_step_tokens", self.max_step_tokens),
            ("page_tokens", self.page_tokens),
            ("pages", self.pages),
            ("max_context", self.max_context),
        ];
        for (limit, value) in positive {
            if value == 0 {
                return Err(InvalidLimits::Zero { limit });
            }
        }
        if u32::try_from(self.pages).is_err() {
            return Err(InvalidLimits::TooManyPages { pages: self.pages });
        }
        if self.max_step_tokens < self.max_running {
            return Err(InvalidLimits::StepTooSmall {
                max_step_tokens: self.max_step_tokens,
                max_running: self.max_running,
            });
        }
        Ok(())
    }

    /// The most positions (prompt and output) that one request can ever be given.
    pub fn longest_request(&self) -> usize {
        self.max_context
            .min(self.pages.saturating_mul(self.page_tokens))
    }

    fn pages_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.page_tokens)
    }
}

/// Limits that contradict themselves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLimits {
    /// A limit of zero serves nothing.
    #[error("{limit} is 0; it must be at least 1")]
    Zero {
        /// Name of the limit.
        limit: &'static str,
    },
    /// Page numbers are 32 bits wide.
    #[error(
        "pages is {pages}, more than a 32-bit page number can name; use larger pages or less KV memory"
    )]
    TooManyPages {
        /// The number asked for.
        pages: usize,
    },
    /// Decode rows would have to wait for each other.
    #[error(
        "max_step_tokens is {max_step_tokens}, less than max_running {max_running}: raise the first or lower the second"
    )]
    StepTooSmall {
        /// Rows of a step.
        max_step_tokens: usize,
        /// Requests that may each need a decode row in it.
        max_running: usize,
    },
}

/// A request as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewRequest {
    /// Chosen by the caller, unique among the requests that are running or waiting.
    pub id: u64,
    /// Tokens of the prompt, at least 1.
    pub prompt: usize,
    /// The most tokens to generate. 0 runs the prompt only.
    pub max_tokens: usize,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing is wrong with the request: try again later.
    #[error("the queue is full ({waiting} requests wait); retry in {retry_after:?}")]
    Overloaded {
        /// Requests waiting now.
        waiting: usize,
        /// When a place is likely to be free: the mean time between two admissions lately.
        retry_after: Duration,
    },
    /// The request can never run here.
    #[error("{0}")]
    Invalid(Invalid),
}

/// What makes a request impossible to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// There is no row to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Prompt and output do not fit the model's context.
    #[error(
        "{prompt} prompt tokens and {max_tokens} output tokens exceed the context of {max_context}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Output tokens asked for.
        max_tokens: usize,
        /// The limit.
        max_context: usize,
    },
    /// Prompt and output do not fit the KV memory of this node, even when it is empty.
    #[error(
        "{needed} KV pages are needed, this node has {pages} in all: shorten the request or give the node more KV memory"
    )]
    TooLarge {
        /// Pages for prompt and output.
        needed: usize,
        /// Pages of the node.
        pages: usize,
    },
    /// The identifier is in use.
    #[error("request {id} is already here")]
    Duplicate {
        /// The identifier.
        id: u64,
    },
}

/// Rows of one request in a step: positions `start..start + len`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The request.
    pub id: u64,
    /// Position of the first row.
    pub start: usize,
    /// Number of rows, at least 1.
    pub len: usize,
    /// Page table of the request: position `p` lives in `pages[p / page_tokens]`.
    pub pages: Arc<[u32]>,
    /// Whether the last row yields a token.
    pub sample: bool,
}

/// The work of one step. Decode rows come first, then prefill chunks, each in order of arrival.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// At most one chunk a request. Empty when there is nothing to do.
    pub chunks: Vec<Chunk>,
}

impl Step {
    /// Rows of all chunks together.
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }
}

/// How full a scheduler is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that hold pages.
    pub running: usize,
    /// Requests that wait for admission.
    pub waiting: usize,
    /// Pages that no request holds.
    pub free_pages: usize,
}

/// A running request. `computed` positions are in the cache, `pending` more are in the step
/// that is out; a request decodes when `computed >= prompt`.
#[derive(Debug)]
struct Running {
    request: NewRequest,
    pages: Arc<[u32]>,
    computed: usize,
    pending: usize,
    generated: usize,
    cancelled: bool,
}

impl Running {
    fn is_decoding(&self) -> bool {
        self.computed >= self.request.prompt
    }

    /// Whether `len` more rows end in one that yields a token.
    fn samples(&self, len: usize) -> bool {
        self.computed + len >= self.request.prompt && self.request.max_tokens > 0
    }

    fn chunk(&mut self, len: usize) -> Chunk {
        self.pending = len;
        Chunk {
            id: self.request.id,
            start: self.computed,
            len,
            pages: Arc::clone(&self.pages),
            sample: self.samples(len),
        }
    }
}

/// Queue, running set and page allocator of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<NewRequest>,
    /// In order of admission, which is the order of arrival.
    running: Vec<Running>,
    free: Vec<u32>,
    pace: Pace,
}

impl Scheduler {
    /// An empty scheduler with all pages free.
    ///
    /// # Errors
    /// [`InvalidLimits`] when the limits contradict themselves.
    pub fn new(limits: Limits) -> Result<Self, InvalidLimits> {
        limits.validate()?;
        // Popped from the end: low page numbers are handed out first.
        let free = (0..limits.pages as u32).rev().collect();
        Ok(Self {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free,
            pace: Pace::default(),
        })
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a request into the waiting queue.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] when it can never run here, [`Refusal::Overloaded`] when the queue
    /// is full. A refused request leaves no trace.
    pub fn submit(&mut self, request: NewRequest) -> Result<(), Refusal> {
        self.check(&request).map_err(Refusal::Invalid)?;
        if self.waiting.len() >= self.limits.max_waiting {
            return Err(Refusal::Overloaded {
                waiting: self.waiting.len(),
                retry_after: self.pace.hint(),
            });
        }
        self.waiting.push_back(request);
        Ok(())
    }

    /// Forgets a request, wherever it is; its pages are free again at once, or at the commit
    /// of the step that is out when it takes part in that. False when it is not here.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(at) = self.waiting.iter().position(|request| request.id == id) {
            self.waiting.remove(at);
            return true;
        }
        let Some(at) = self.running.iter().position(|r| r.request.id == id) else {
            return false;
        };
        if self.running[at].pending > 0 {
            self.running[at].cancelled = true;
        } else {
            let gone = self.running.remove(at);
            self.free.extend(gone.pages.iter().rev());
        }
        true
    }

    /// The next step: one row for every decoding request, then as much prefill as the token
    /// budget allows, in order of arrival, admitting from the queue's head while rows and pages
    /// last. The head is never overtaken. Called again without a commit, the step that was out
    /// counts as never run.
    pub fn next(&mut self, now: Duration) -> Step {
        for request in &mut self.running {
            request.pending = 0;
        }
        self.release(|request| request.cancelled);

        let mut chunks = Vec::new();
        for request in self.running.iter_mut().filter(|r| r.is_decoding()) {
            chunks.push(request.chunk(1));
        }
        // At least one row is left for every request that still prefills: there are at most
        // `max_running` requests and no fewer rows than that.
        let mut budget = self.limits.max_step_tokens - chunks.len();
        for request in self.running.iter_mut().filter(|r| !r.is_decoding()) {
            let len = budget.min(request.request.prompt - request.computed);
            if len == 0 {
                break;
            }
            budget -= len;
            chunks.push(request.chunk(len));
        }
        while budget > 0 && self.admit(now) {
            let Some(request) = self.running.last_mut() else {
                break;
            };
            let len = budget.min(request.request.prompt);
            budget -= len;
            chunks.push(request.chunk(len));
        }
        Step { chunks }
    }

    /// Ends the step that is out. `outcomes` names its requests; `finished` frees the request
    /// (stopped or failed). A request that has generated `max_tokens` finishes by itself, one
    /// that was cancelled meanwhile leaves now, one that is not named goes on.
    pub fn commit(&mut self, outcomes: &[(u64, bool)]) {
        for request in &mut self.running {
            if request.pending > 0 {
                let sampled = request.samples(request.pending);
                request.generated += usize::from(sampled);
                request.computed += request.pending;
                request.pending = 0;
            }
            let spent = request.is_decoding() && request.generated >= request.request.max_tokens;
            let stopped = outcomes
                .iter()
                .any(|&(id, finished)| finished && id == request.request.id);
            request.cancelled |= spent || stopped;
        }
        self.release(|request| request.cancelled);
    }

    /// Whether nobody runs and nobody waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Whether the request waits or runs.
    pub fn contains(&self, id: u64) -> bool {
        self.running.iter().any(|r| r.request.id == id) || self.waiting.iter().any(|r| r.id == id)
    }

    /// How full it is.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            free_pages: self.free.len(),
        }
    }

    fn check(&self, request: &NewRequest) -> Result<(), Invalid> {
        let &NewRequest {
            id,
            prompt,
            max_tokens,
        } = request;
        if prompt == 0 {
            return Err(Invalid::EmptyPrompt);
        }
        let positions = prompt.saturating_add(max_tokens);
        if positions > self.limits.max_context {
            return Err(Invalid::TooLong {
                prompt,
                max_tokens,
                max_context: self.limits.max_context,
            });
        }
        let needed = self.limits.pages_for(positions);
        if needed > self.limits.pages {
            return Err(Invalid::TooLarge {
                needed,
                pages: self.limits.pages,
            });
        }
        if self.contains(id) {
            return Err(Invalid::Duplicate { id });
        }
        Ok(())
    }

    /// Moves the queue's head into the running set if its pages are free.
    fn admit(&mut self, now: Duration) -> bool {
        let Some(&request) = self.waiting.front() else {
            return false;
        };
        let needed = self.limits.pages_for(request.prompt + request.max_tokens);
        if self.running.len() >= self.limits.max_running || needed > self.free.len() {
            return false;
        }
        self.waiting.pop_front();
        let pages = self.free.split_off(self.free.len() - needed);
        self.running.push(Running {
            request,
            pages: pages.into_iter().rev().collect(),
            computed: 0,
            pending: 0,
            generated: 0,
            cancelled: false,
        });
        self.pace.admitted(now, !self.waiting.is_empty());
        true
    }

    fn release(&mut self, leaves: impl Fn(&Running) -> bool) {
        let free = &mut self.free;
        self.running.retain(|request| {
            let stays = !leaves(request);
            if !stays {
                free.extend(request.pages.iter().rev());
            }
            stays
        });
    }
}

/// How fast places in the queue become free: a moving mean of the time between admissions,
/// over the stretches in which somebody waited.
#[derive(Debug, Default)]
struct Pace {
    /// The last admission, if it left somebody waiting.
    last: Option<Duration>,
    gap: Option<Duration>,
}

impl Pace {
    fn admitted(&mut self, now: Duration, still_waiting: bool) {
        if let Some(last) = self.last {
            let gap = now.saturating_sub(last);
            self.gap = Some(self.gap.map_or(gap, |mean| (mean * 7 + gap) / 8));
        }
        self.last = still_waiting.then_some(now);
    }

    fn hint(&self) -> Duration {
        self.gap.unwrap_or(RETRY_FIRST).clamp(RETRY_MIN, RETRY_MAX)
    }
}
