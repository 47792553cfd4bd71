//! Continuous batching: who gets rows of the next step, and which KV pages.
//!
//! Secret: the policy. Every decoding request gets its row in every step; what the drafts and the
//! time that a step may take leave of it goes to prompts, cut into chunks. Requests are admitted by
//! priority, fairly among tenants and then in order of arrival, when there are pages for their prompt
//! and some to spare; when pages run out the last one in the order is preempted: it gives its pages
//! back, keeps its tokens and is computed anew, first of those that wait. Full pages are known by the
//! key of their contents and shared with whoever begins the same way.
//!
//! The engine turns the wheel: [`Scheduler::next`] says what to run, the engine runs it, and
//! [`Scheduler::commit`] says what came of it, or [`Scheduler::fail`] that nothing did. Between the two
//! any number of [`Scheduler::submit`] and [`Scheduler::cancel`] may happen. This module must not know
//! what a token, a layer or a client is: it counts.

mod arriving;
mod limits;
mod pace;
mod pages;
mod payoff;
mod queue;
mod request;

use std::collections::HashMap;
use std::time::Duration;

pub use arriving::Arrival;
pub use limits::{Invalid, InvalidLimits, Limits, Refusal};
pub use pace::{PREFILL_FIRST, PREFILL_FLOOR, RETRY_FIRST, RETRY_MAX, RETRY_MIN};
pub use payoff::{Decoded, PLAIN_EVERY, Payoff, REST_FIRST, REST_MAX, SAMPLES};
pub use queue::MAX_IDLE_TENANTS;
pub use request::{Chunk, Counts, Expiry, NewRequest, Outcome, Step};

use pace::{Admissions, StepCost};
use pages::Pages;
use queue::{Shares, Turn};
use request::Live;

/// Of all pages one in so many is the most that is kept for requests that decode when another is
/// admitted.
const RESERVE_SHARE: usize = 8;

/// Queue, running set and pages of one engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: Vec<Live>,
    /// Gave way to others in the queue, and have not been told.
    displaced: Vec<u64>,
    /// By priority, then by arrival: the last one is the first to be preempted.
    running: Vec<Live>,
    pages: Pages,
    shares: Shares,
    admissions: Admissions,
    cost: StepCost,
    arrivals: u64,
    preemptions: u64,
    /// Positions run since the start.
    run: u64,
}

impl Scheduler {
    /// An empty scheduler with all pages free.
    ///
    /// # Errors
    /// [`InvalidLimits`] when the limits contradict themselves.
    pub fn new(limits: Limits) -> Result<Self, InvalidLimits> {
        limits.validate()?;
        Ok(Self {
            pages: Pages::new(limits.pages),
            limits,
            waiting: Vec::new(),
            displaced: Vec::new(),
            running: Vec::new(),
            shares: Shares::default(),
            admissions: Admissions::default(),
            cost: StepCost::default(),
            arrivals: 0,
            preemptions: 0,
            run: 0,
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
    /// is full of requests of tenants that have no more of it than this one's,
    /// [`Refusal::TooLate`] when it would wait for too long. A refused request leaves no trace.
    pub fn submit(&mut self, now: Duration, mut request: NewRequest) -> Result<(), Refusal> {
        let checked = self.limits.check(request.prompt, request.max_tokens);
        checked.map_err(Refusal::Invalid)?;
        if self.contains(request.id) {
            return Err(Refusal::Invalid(Invalid::Duplicate { id: request.id }));
        }
        let displaced = self.check_room(now, &request)?;
        for id in displaced {
            self.cancel(id);
            self.displaced.push(id);
        }
        if !self.limits.prefix_cache {
            request.keys.clear();
        }
        self.shares.enter(request.tenant);
        self.waiting.push(Live::new(request, self.arrivals));
        self.arrivals += 1;
        Ok(())
    }

    /// Forgets a request, wherever it is; its pages are given back at once, or at the commit
    /// of the step that is out when it takes part in that. False when it is not here.
    pub fn cancel(&mut self, id: u64) -> bool {
        if let Some(at) = self.displaced.iter().position(|&gone| gone == id) {
            self.displaced.remove(at);
            return true;
        }
        if let Some(at) = self.waiting.iter().position(|live| live.request.id == id) {
            let gone = self.waiting.remove(at);
            self.shares.leave(gone.request.tenant);
            return true;
        }
        let Some(at) = self.running.iter().position(|r| r.request.id == id) else {
            return false;
        };
        if self.running[at].pending.is_some() {
            self.running[at].leaves = true;
        } else {
            self.release(at);
        }
        true
    }

    /// The next step: one row for every decoding request, with the drafts that there is room for,
    /// then as much prefill as tokens and time allow, admitting from the queue while rows and pages
    /// last. Whoever is next in the queue is never overtaken. Called again without a commit, the step
    /// that was out counts as never run.
    pub fn next(&mut self, now: Duration) -> Step {
        for live in &mut self.running {
            live.pending = None;
        }
        self.release_leaving();
        let expired = self.expire(now);
        let preempted = self.make_room();

        let mut left = self.limits.max_step_tokens;
        let mut chunks = Vec::new();
        let decoding = self
            .running
            .iter()
            .filter(|live| live.is_decoding())
            .count();
        // The others need a row each for the prompts to go on at all.
        let others = self.running.len() - decoding + usize::from(!self.waiting.is_empty());
        let mut spare = (left - decoding).saturating_sub(others);
        for live in self.running.iter_mut().filter(|live| live.is_decoding()) {
            let drafts = live.draft_room(&self.limits, &mut self.pages, spare);
            spare -= drafts;
            left -= 1 + drafts;
            chunks.push(live.chunk(1, drafts));
        }
        if let Some(target) = self.limits.itl_target.filter(|_| decoding > 0) {
            left = left.min(self.cost.prefill_rows(target));
        }
        let computes = |live: &&mut Live| !live.is_decoding() && !live.expects;
        for live in self.running.iter_mut().filter(computes) {
            let len = left.min(live.unknown());
            if len == 0 {
                break;
            }
            left -= len;
            chunks.push(live.chunk(len, 0));
        }
        // Whoever was preempted in this very step would take its pages back.
        while left > 0 && !preempted {
            let Some(at) = self.admit(now) else { break };
            let live = &mut self.running[at];
            if live.expects {
                continue;
            }
            let len = left.min(live.unknown());
            left -= len;
            chunks.push(live.chunk(len, 0));
        }
        Step { chunks, expired }
    }

    /// Ends the step that is out, which took so long. `outcomes` are those of its requests; one that is
    /// not named has sampled one token if it could. A request that has generated `max_tokens`
    /// finishes by itself, one that was cancelled meanwhile leaves now. What was computed is known
    /// to others from now on.
    pub fn commit(&mut self, took: Duration, outcomes: &[Outcome]) {
        let by_id: HashMap<u64, &Outcome> = outcomes.iter().map(|o| (o.id, o)).collect();
        let (mut decode, mut prefill) = (0, 0);
        for live in &mut self.running {
            let Some(pending) = live.pending.take() else {
                continue;
            };
            match live.is_decoding() {
                true => decode += pending.len + pending.drafts,
                false => prefill += pending.len,
            }
            let before = live.generated;
            live.settle(pending, by_id.get(&live.request.id).copied());
            self.shares
                .serve(live.request.tenant, live.generated - before);
            if self.limits.prefix_cache {
                live.publish(&self.limits, &mut self.pages);
            }
        }
        self.run += (decode + prefill) as u64;
        self.cost.observe(took, decode, prefill);
        self.release_leaving();
    }

    /// The step that is out did not go through: its requests leave, and nobody hears of what they
    /// wrote in it.
    pub fn fail(&mut self) {
        for live in &mut self.running {
            live.leaves |= live.pending.take().is_some();
        }
        self.release_leaving();
    }

    /// Whether nobody runs and nobody waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Whether the request waits or runs.
    pub fn contains(&self, id: u64) -> bool {
        let mut all = self.running.iter().chain(&self.waiting);
        all.any(|live| live.request.id == id)
    }

    /// How full it is.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            free_pages: self.pages.available(),
            cached_pages: self.pages.cached(),
            preemptions: self.preemptions,
            outstanding: { self.running.iter().chain(&self.waiting) }
                .map(Live::outstanding)
                .sum(),
            run: self.run,
        }
    }

    /// Seconds that a row of prefill adds to a step here, as far as steps have told.
    pub fn row_cost(&self) -> Option<f64> {
        self.cost.row()
    }

    /// Tokens that a tenant was served, by which the queue is ordered.
    pub fn served(&self, tenant: u64) -> u64 {
        self.shares.served(tenant)
    }

    /// Forgets the contents of all pages that no request holds.
    pub fn forget(&mut self) {
        self.pages.forget();
    }

    /// Checks the books: every page has as many holders as tables that name it, is held, free or
    /// cached, and nobody shares a page that is still written.
    ///
    /// # Errors
    /// What is wrong first: a defect of this module.
    pub fn audit(&self) -> Result<(), String> {
        let tables = self.running.iter().map(|live| &live.pages[..]);
        self.pages.audit(tables)?;
        for live in &self.running {
            let id = live.request.id;
            let written = live.computed / self.limits.page_tokens;
            let shared = live.pages.iter().skip(written);
            if let Some(page) = shared.copied().find(|&page| !self.pages.is_private(page)) {
                return Err(format!(
                    "request {id} writes to page {page}, which is shared"
                ));
            }
            let reaches = live.pages.len() * self.limits.page_tokens;
            if reaches < live.computed {
                return Err(format!("request {id} has computed more than {reaches}"));
            }
        }
        let waiting = self.waiting.iter();
        match waiting.map(|live| live.pages.len()).find(|&held| held > 0) {
            Some(held) => Err(format!("a request that waits holds {held} pages")),
            None => Ok(()),
        }
    }

    /// Whether the queue takes one more, and soon enough; who has to leave it for that.
    fn check_room(&self, now: Duration, request: &NewRequest) -> Result<Vec<u64>, Refusal> {
        let retry_after = self.admissions.hint();
        let room = queue::give_way(&self.waiting, &self.limits, request);
        let displaced = room.ok_or(Refusal::Overloaded {
            waiting: self.waiting.len(),
            retry_after,
        })?;
        let ahead = queue::ahead(&self.waiting, request);
        let Some(expected) = self.admissions.wait(ahead).filter(|_| ahead > 0) else {
            return Ok(displaced);
        };
        let until = [request.start_by, request.deadline].into_iter().flatten();
        let own = until.map(|until| until.saturating_sub(now)).min();
        let allowed = [own, self.limits.max_wait].into_iter().flatten().min();
        match allowed.filter(|&allowed| expected > allowed) {
            Some(allowed) => Err(Refusal::TooLate {
                expected,
                retry_after: retry_after.max((expected - allowed).min(RETRY_MAX)),
            }),
            None => Ok(displaced),
        }
    }

    /// Lets go of those whose time is over; names those that gave way, too.
    fn expire(&mut self, now: Duration) -> Vec<(u64, Expiry)> {
        let displaced = self.displaced.drain(..);
        let mut expired: Vec<_> = displaced.map(|id| (id, Expiry::Displaced)).collect();
        for live in &mut self.running {
            if let Some(expiry) = live.expiry(now) {
                live.leaves = true;
                expired.push((live.request.id, expiry));
            }
        }
        self.release_leaving();
        let shares = &mut self.shares;
        self.waiting.retain(|live| {
            let expiry = live.expiry(now);
            if let Some(expiry) = expiry {
                expired.push((live.request.id, expiry));
                shares.leave(live.request.tenant);
            }
            expiry.is_none()
        });
        expired
    }

    /// Sees to it that every decoding request has a page for its next row; preempts the last in the
    /// order where there are none. True when somebody was. The first in the order always goes on: what
    /// fits the node alone was checked when it came.
    fn make_room(&mut self) -> bool {
        let before = self.preemptions;
        let mut at = 0;
        while at < self.running.len() {
            let live = &mut self.running[at];
            if !live.is_decoding() || live.grow(&self.limits, &mut self.pages, live.known()) {
                at += 1;
                continue;
            }
            // Itself perhaps: then there is nobody left to look at.
            if let Some(mut last) = self.running.pop() {
                self.pages.release(&last.pages);
                last.rewind();
                self.waiting.push(last);
                self.preemptions += 1;
            }
        }
        self.preemptions > before
    }

    /// Moves whoever is next into the running set if there are pages for all its tokens, and says
    /// where it stands there.
    fn admit(&mut self, now: Duration) -> Option<usize> {
        if self.running.len() >= self.limits.max_running {
            return None;
        }
        let turn = |live: &Live| Turn {
            priority: live.request.priority,
            fresh: live.cached.is_none(),
            served: match live.cached {
                None => self.shares.served(live.request.tenant),
                Some(_) => 0,
            },
            arrival: live.arrival,
        };
        let next = (0..self.waiting.len()).min_by_key(|&at| turn(&self.waiting[at]))?;
        let reserve = match self.running.len() {
            0 => 0,
            running => (running + 1).min(self.limits.pages / RESERVE_SHARE),
        };
        let live = &mut self.waiting[next];
        let fresh = live.cached.is_none();
        if !live.take_pages(&self.limits, &mut self.pages, reserve) {
            return None;
        }
        let live = self.waiting.remove(next);
        // Being computed twice is nothing that a tenant was served.
        let served = if fresh { live.unknown() } else { 0 };
        self.shares.serve(live.request.tenant, served);
        self.admissions.admitted(now, !self.waiting.is_empty());
        let order = |live: &Live| (live.request.priority, live.arrival);
        let at = self.running.partition_point(|r| order(r) < order(&live));
        self.running.insert(at, live);
        Some(at)
    }

    fn release(&mut self, at: usize) {
        let gone = self.running.remove(at);
        self.pages.release(&gone.pages);
        self.shares.leave(gone.request.tenant);
    }

    fn release_leaving(&mut self) {
        while let Some(at) = self.running.iter().position(|live| live.leaves) {
            self.release(at);
        }
    }
}
