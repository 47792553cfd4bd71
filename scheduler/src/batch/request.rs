//! One request as the scheduler sees it: what is known of it, what is computed, which pages it has.
//!
//! Secret: how positions become pages. Of a request `known` positions have a token, `computed` of them
//! are in the cache; it decodes when all but the last one are. A page is written by one request only,
//! from `computed` on.

use std::sync::Arc;
use std::time::Duration;

use super::limits::Limits;
use super::pages::Pages;

/// A request as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRequest {
    /// Chosen by the caller, unique among the requests that are running or waiting.
    pub id: u64,
    /// Tokens of the prompt, at least 1.
    pub prompt: usize,
    /// The most tokens to generate. 0 runs the prompt only.
    pub max_tokens: usize,
    /// Lower is served first.
    pub priority: i32,
    /// Who asks: tenants of one priority share fairly.
    pub tenant: u64,
    /// When its answer is worth nothing any more.
    pub deadline: Option<Duration>,
    /// When it is refused if it has not been admitted.
    pub start_by: Option<Duration>,
    /// Whether pages that others have computed will do; without it every row of the prompt is run.
    pub reuse: bool,
    /// Keys of its first pages, in order: equal keys mean that all tokens up to the end of the page
    /// are the same, and what was computed from them. There may be fewer than pages.
    pub keys: Vec<u128>,
    /// Whether its pages come from elsewhere: it gets no rows before they have, see
    /// [`Scheduler::arrival`](super::Scheduler::arrival).
    pub arrives: bool,
}

impl NewRequest {
    /// A request of nobody in particular, that nothing is known to be shared of.
    pub fn new(id: u64, prompt: usize, max_tokens: usize) -> NewRequest {
        NewRequest {
            id,
            prompt,
            max_tokens,
            priority: 0,
            tenant: 0,
            deadline: None,
            start_by: None,
            reuse: true,
            keys: Vec::new(),
            arrives: false,
        }
    }
}

/// Rows of one request in a step: positions `start..start + len`, then drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The request.
    pub id: u64,
    /// Position of the first row.
    pub start: usize,
    /// Number of rows whose tokens are known, at least 1.
    pub len: usize,
    /// Rows of drafted tokens behind them.
    pub drafts: usize,
    /// Page table of the request: position `p` lives in `pages[p / page_tokens]`.
    pub pages: Arc<[u32]>,
    /// Whether the last known row, and with it the drafted ones, yields a token.
    pub sample: bool,
    /// Positions that others had computed when the request was first admitted.
    pub cached: usize,
}

/// Why a request was let go of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// It was not admitted in time.
    Queue,
    /// Its deadline has passed.
    Deadline,
    /// The queue was full, and its tenant had more of it than another one, whose request has its place now.
    Displaced,
}

/// The work of one step. Decode rows come first, then prefill chunks, each by priority and arrival,
/// but for those that were admitted just now: they come last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// At most one chunk a request. Empty when there is nothing to do.
    pub chunks: Vec<Chunk>,
    /// Requests that were let go of.
    pub expired: Vec<(u64, Expiry)>,
}

impl Step {
    /// Rows of all chunks together.
    pub fn rows(&self) -> usize {
        self.chunks.iter().map(|c| c.len + c.drafts).sum()
    }
}

/// What came of one request in a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The request.
    pub id: u64,
    /// Tokens that it has got: one where it sampled, and one more for each draft that held.
    pub tokens: usize,
    /// Drafted tokens that it has for the next step.
    pub drafts: usize,
    /// Whether it has ended (stopped or failed).
    pub finished: bool,
    /// Keys of further pages, behind those that are known of it already.
    pub keys: Vec<u128>,
    /// What it has written in this step and will write is not what its keys say: it is not shared.
    pub private: bool,
}

/// How full a scheduler is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that hold pages.
    pub running: usize,
    /// Requests that wait for admission.
    pub waiting: usize,
    /// Pages that no request holds, the cached ones among them.
    pub free_pages: usize,
    /// Pages that no request holds and whose contents are known.
    pub cached_pages: usize,
    /// Requests that had to give their pages back, since the start.
    pub preemptions: u64,
    /// Positions that may still have to be run for those that run or wait.
    pub outstanding: u64,
    /// Positions run since the start.
    pub run: u64,
}

/// What of a request is in the step that is out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    pub(super) len: usize,
    pub(super) drafts: usize,
    sample: bool,
}

/// A request that waits or runs.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) request: NewRequest,
    pub(super) arrival: u64,
    pub(super) pages: Arc<[u32]>,
    /// Positions in the cache.
    pub(super) computed: usize,
    pub(super) generated: usize,
    /// Drafted tokens that may be tried.
    drafts: usize,
    /// Pages that others know or have made, from the first one on.
    published: usize,
    private: bool,
    pub(super) pending: Option<Pending>,
    /// Positions that others had computed when it was first admitted; None: it has not been.
    pub(super) cached: Option<usize>,
    /// It is to give its pages back.
    pub(super) leaves: bool,
    /// It waits for pages, and gets no rows.
    pub(super) expects: bool,
}

impl Live {
    pub(super) fn new(request: NewRequest, arrival: u64) -> Live {
        Live {
            expects: request.arrives,
            request,
            arrival,
            pages: Arc::default(),
            computed: 0,
            generated: 0,
            drafts: 0,
            published: 0,
            private: false,
            pending: None,
            cached: None,
            leaves: false,
        }
    }

    /// Positions that have a token.
    pub(super) fn known(&self) -> usize {
        self.request.prompt + self.generated
    }

    /// Positions that are to be computed before the next token.
    pub(super) fn unknown(&self) -> usize {
        self.known() - self.computed
    }

    /// Positions that may still have to be run for it.
    pub(super) fn outstanding(&self) -> u64 {
        let to_come = self.request.max_tokens.saturating_sub(self.generated);
        (self.unknown() + to_come) as u64
    }

    /// Whether its next row yields its next token, the first one left aside.
    pub(super) fn is_decoding(&self) -> bool {
        self.generated > 0 && self.unknown() == 1
    }

    /// Gives up what was computed; its tokens stay.
    pub(super) fn rewind(&mut self) {
        self.pages = Arc::default();
        (self.computed, self.drafts, self.published) = (0, 0, 0);
        self.expects = false;
        // What had to be run for its own sake has been run.
        self.request.reuse |= self.generated > 0;
    }

    pub(super) fn expiry(&self, now: Duration) -> Option<Expiry> {
        let over = |at: Option<Duration>| at.is_some_and(|at| now >= at);
        if over(self.request.deadline) {
            return Some(Expiry::Deadline);
        }
        (self.cached.is_none() && over(self.request.start_by)).then_some(Expiry::Queue)
    }

    pub(super) fn chunk(&mut self, len: usize, drafts: usize) -> Chunk {
        let sample = len == self.unknown() && self.request.max_tokens > 0;
        self.pending = Some(Pending {
            len,
            drafts,
            sample,
        });
        Chunk {
            id: self.request.id,
            start: self.computed,
            len,
            drafts,
            pages: Arc::clone(&self.pages),
            sample,
            cached: self.cached.unwrap_or(0),
        }
    }

    /// Takes note of what came of a step.
    pub(super) fn settle(&mut self, pending: Pending, outcome: Option<&Outcome>) {
        let most = match pending.sample {
            true => (1 + pending.drafts).min(self.request.max_tokens - self.generated),
            false => 0,
        };
        let tokens = outcome.map_or(most.min(1), |outcome| outcome.tokens.min(most));
        self.computed += pending.len + tokens.saturating_sub(1);
        self.generated += tokens;
        self.drafts = outcome.map_or(0, |outcome| outcome.drafts);
        if let Some(outcome) = outcome {
            self.request.keys.extend_from_slice(&outcome.keys);
            self.leaves |= outcome.finished;
            self.private |= outcome.private;
        }
        self.leaves |=
            self.computed >= self.request.prompt && self.generated >= self.request.max_tokens;
    }

    /// Pages for so many positions, private from `computed` on. False, and no page more, when there
    /// are not enough.
    pub(super) fn grow(&mut self, limits: &Limits, pages: &mut Pages, positions: usize) -> bool {
        let more = limits.pages_for(positions).saturating_sub(self.pages.len());
        if more > pages.available() {
            return false;
        }
        if more > 0 {
            let new = (0..more).filter_map(|_| pages.take());
            self.pages = self.pages.iter().copied().chain(new).collect();
        }
        true
    }

    /// How many of its drafts may be tried with so many spare rows. Pages are taken for them, and for
    /// the drafts that are made behind them, as far as nobody has to give any back.
    pub(super) fn draft_room(&mut self, limits: &Limits, pages: &mut Pages, spare: usize) -> usize {
        if limits.drafts == 0 {
            return 0;
        }
        let to_come = self.request.max_tokens - self.generated;
        let longest = self.request.prompt + self.request.max_tokens;
        let wanted = self.drafts.min(spare).min(to_come.saturating_sub(1));
        let reach = (self.known() + wanted + limits.drafts - 1).min(longest);
        for positions in (self.known()..=reach).rev() {
            if self.grow(limits, pages, positions) {
                return wanted.min(positions - self.known());
            }
        }
        0
    }

    /// Takes the pages that it needs to be computed: the longest beginning that others have computed,
    /// at least one token left aside, and private ones for the rest. False, and no page, unless
    /// `reserve` pages are left then.
    pub(super) fn take_pages(
        &mut self,
        limits: &Limits,
        pages: &mut Pages,
        reserve: usize,
    ) -> bool {
        let useful = match self.request.reuse {
            true => (self.known() - 1) / limits.page_tokens,
            false => 0,
        };
        let keys = self.request.keys.iter().take(useful);
        let mut table: Vec<u32> = keys.map_while(|&key| pages.share(key)).collect();
        let shared = table.len();
        let more = limits.pages_for(self.known()) - shared;
        if more + reserve > pages.available() {
            pages.release(&table);
            return false;
        }
        table.extend((0..more).filter_map(|_| pages.take()));
        self.pages = table.into();
        self.computed = shared * limits.page_tokens;
        self.published = shared;
        self.expects &= shared < useful;
        self.cached.get_or_insert(self.computed);
        true
    }

    /// Lets others know the full pages that it has keys for.
    pub(super) fn publish(&mut self, limits: &Limits, pages: &mut Pages) {
        let full = (self.computed / limits.page_tokens).min(self.request.keys.len());
        if self.private {
            return;
        }
        for at in self.published..full {
            pages.publish(self.pages[at], self.request.keys[at]);
        }
        self.published = self.published.max(full);
    }
}
