//! Where requests are handed in: the scheduler's state and the sequences on their way to the
//! engine, under one short lock. Secret: how many threads meet here. Admission is decided at the
//! moment of asking, however long the step that is out may take.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_model::cache::LatentCache;
use guild_scheduler::batch::{
    Counts, Expiry, InvalidLimits, Limits, NewRequest, Outcome, Refusal, Scheduler, Step,
};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::keys::Chain;
use crate::moving::{Arriving, Leaving, Moves, PageForm};
use crate::sequence::{Constraint, Events, Failure, Request, Sequence};

/// Readers that may hold on to events for each request that may run or wait. A reader that does
/// not read keeps the events of its request in memory after the request has left the scheduler.
pub const READERS_PER_PLACE: usize = 2;

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The scheduler's reason.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Too many results are waiting to be read.
    #[error("{readers} streams are open and hold results that nobody reads")]
    TooManyReaders {
        /// Streams that are open.
        readers: usize,
    },
    /// The engine takes no more requests: it drains or has ended.
    #[error("the attention node is draining")]
    Draining,
}

/// Feeds an engine. Clones feed the same one.
#[derive(Clone, Debug)]
pub struct EngineHandle(Arc<Desk>);

impl EngineHandle {
    pub(crate) fn new(desk: Arc<Desk>) -> EngineHandle {
        EngineHandle(desk)
    }

    /// Hands a request in. Dropping the returned reader cancels it.
    ///
    /// # Errors
    /// [`SubmitError`]; a refused request leaves no trace.
    pub fn submit(&self, request: Request) -> Result<Events, SubmitError> {
        self.submit_constrained(request, None)
    }

    /// As [`EngineHandle::submit`], with what may be said next. The constraint has taken note of
    /// output that the prompt ends in already.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub fn submit_constrained(
        &self,
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Result<Events, SubmitError> {
        let drafts = self.0.drafting.load(Ordering::Relaxed);
        let (_, _, events) = self.hand_in(request, constraint, drafts, false)?;
        Ok(events)
    }

    /// As [`EngineHandle::submit_constrained`], for a prompt that somebody else runs: the request waits
    /// for the pages that it is brought.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub(crate) fn submit_arriving(
        &self,
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
    ) -> Result<(Events, Arriving), SubmitError> {
        let drafts = self.0.drafting.load(Ordering::Relaxed);
        let useful = (request.prompt.len() - 1) / self.0.page_tokens;
        let (id, mut keys, events) = self.hand_in(request, constraint, drafts, true)?;
        keys.truncate(useful);
        let mut state = self.0.lock();
        let State {
            scheduler,
            moves,
            form,
            ..
        } = &mut *state;
        let known = { keys.iter() }.take_while(|&&key| scheduler.page_of(key).is_some());
        let known = known.count();
        let arriving = moves.expect(id, *form, drafts, (keys, known), &self.0.wake);
        drop(state);
        self.0.wake.notify_one();
        Ok((events, arriving))
    }

    /// Hands in a prompt whose pages from `first` on somebody else wants, with the draft module's layer
    /// or without. Nothing of it is generated.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub(crate) fn submit_leaving(
        &self,
        request: Request,
        drafts: bool,
        first: usize,
    ) -> Result<(Events, Leaving), SubmitError> {
        let useful = (request.prompt.len() - 1) / self.0.page_tokens;
        let (id, mut keys, events) = self.hand_in(request, None, drafts, false)?;
        keys.truncate(useful);
        let mut state = self.0.lock();
        let form = state.form;
        let leaving = state
            .moves
            .give(id, form, drafts, (keys, first), &self.0.wake);
        drop(state);
        self.0.wake.notify_one();
        Ok((events, leaving))
    }

    /// Returns the request's id and the names of its full pages beside its events.
    fn hand_in(
        &self,
        request: Request,
        constraint: Option<Box<dyn Constraint>>,
        drafts: bool,
        arrives: bool,
    ) -> Result<(u64, Vec<u128>, Events), SubmitError> {
        let now = self.0.opened.elapsed();
        let mut chain = Chain::new(request.tenant, self.0.page_tokens, drafts);
        let keys = chain.extend(&request.prompt);
        let mut state = self.0.lock();
        if state.closed {
            return Err(SubmitError::Draining);
        }
        let place = Arc::clone(&self.0.readers).try_acquire_owned();
        let place = place.map_err(|_| SubmitError::TooManyReaders {
            readers: max_readers(state.scheduler.limits()),
        })?;
        let id = state.next_id;
        let asked = NewRequest {
            priority: request.priority,
            tenant: request.tenant,
            deadline: request.timeout.map(|timeout| now + timeout),
            start_by: request.max_queue.map(|longest| now + longest),
            // Cached rows have no logits any more.
            reuse: request.prompt_logprobs.is_none(),
            keys: keys.clone(),
            arrives,
            ..NewRequest::new(id, request.prompt.len(), request.max_tokens)
        };
        state.scheduler.submit(now, asked)?;
        state.next_id += 1;
        let left = Arc::clone(&self.0.wake);
        let (sequence, events) = Sequence::new(request, constraint, chain, drafts, place, left);
        state.arrivals.push((id, sequence));
        drop(state);
        self.0.wake.notify_one();
        Ok((id, keys, events))
    }

    /// How pages lie in the engine's cache.
    pub(crate) fn form(&self) -> PageForm {
        self.0.lock().form
    }

    /// Seconds that a row of a prompt takes here, as far as that is known.
    pub(crate) fn row_cost(&self) -> Option<f64> {
        self.0.lock().scheduler.row_cost()
    }

    /// How full the engine is.
    pub fn counts(&self) -> Counts {
        self.0.lock().scheduler.counts()
    }

    /// Checks the books of the KV pages.
    ///
    /// # Errors
    /// What is wrong: a defect.
    pub fn audit(&self) -> Result<(), String> {
        self.0.lock().scheduler.audit()
    }

    /// Forgets what the prefix cache has, but for what requests are using.
    pub fn forget_prefixes(&self) {
        self.0.lock().scheduler.forget();
    }

    /// The limits the engine was made with.
    pub fn limits(&self) -> Limits {
        self.0.lock().scheduler.limits().clone()
    }

    /// Takes no more requests; the engine ends when those it has are through.
    pub fn close(&self) {
        self.0.lock().closed = true;
        self.0.wake.notify_one();
    }

    /// Closes, and fails what is left at the next step's end.
    pub fn halt(&self) {
        let mut state = self.0.lock();
        (state.closed, state.halted) = (true, true);
        drop(state);
        self.0.wake.notify_one();
    }
}

/// What the engine does next.
pub(crate) enum Turn {
    Step(Step),
    /// Nobody is here: wait for news.
    Idle,
    /// Nobody is here and nobody will come.
    Closed,
    /// What is left is to be failed.
    Halted,
}

fn max_readers(limits: &Limits) -> usize {
    let places = limits.max_running.saturating_add(limits.max_waiting);
    places
        .saturating_mul(READERS_PER_PLACE)
        .min(Semaphore::MAX_PERMITS)
}

#[derive(Debug)]
pub(crate) struct Desk {
    state: Mutex<State>,
    wake: Arc<Notify>,
    /// Places for readers, open or not yet dropped.
    readers: Arc<Semaphore>,
    /// What the scheduler's time counts from.
    opened: Instant,
    page_tokens: usize,
    /// Whether new requests draft.
    drafting: AtomicBool,
}

#[derive(Debug)]
struct State {
    scheduler: Scheduler,
    /// Submitted since the engine last looked; bounded by the scheduler's queue.
    arrivals: Vec<(u64, Sequence)>,
    moves: Moves,
    /// Of the engine's cache.
    form: PageForm,
    next_id: u64,
    closed: bool,
    halted: bool,
}

impl Desk {
    pub(crate) fn new(limits: Limits, form: PageForm) -> Result<Desk, InvalidLimits> {
        let readers = Arc::new(Semaphore::new(max_readers(&limits)));
        let (page_tokens, drafting) = (limits.page_tokens, limits.drafts > 0);
        let state = State {
            scheduler: Scheduler::new(limits)?,
            arrivals: Vec::new(),
            moves: Moves::default(),
            form,
            next_id: 0,
            closed: false,
            halted: false,
        };
        Ok(Desk {
            state: Mutex::new(state),
            wake: Arc::default(),
            readers,
            opened: Instant::now(),
            page_tokens: page_tokens.max(1),
            drafting: AtomicBool::new(drafting),
        })
    }

    /// Takes in who has arrived, lets go of those whose reader has left, and says what is next.
    pub(crate) fn turn(&self, sequences: &mut HashMap<u64, Sequence>) -> Turn {
        let mut state = self.lock();
        sequences.extend(state.arrivals.drain(..));
        sequences.retain(|&id, sequence| {
            let stays = !sequence.is_abandoned();
            if !stays {
                state.scheduler.cancel(id);
            }
            stays
        });
        if state.halted {
            return Turn::Halted;
        }
        let step = state.scheduler.next(self.opened.elapsed());
        for (id, expiry) in &step.expired {
            if let Some(sequence) = sequences.remove(id) {
                sequence.fail(match expiry {
                    Expiry::Queue => Failure::Queue,
                    Expiry::Deadline => Failure::Deadline,
                    Expiry::Displaced => Failure::Displaced,
                });
            }
        }
        match step.chunks.is_empty() {
            false => Turn::Step(step),
            true if state.closed && state.scheduler.is_idle() => Turn::Closed,
            true => Turn::Idle,
        }
    }

    /// Moves pages into the cache and out of it, as far as there are any. For the engine alone,
    /// between two steps. False: there were none.
    pub(crate) fn move_pages(&self, cache: &mut LatentCache) -> bool {
        let due = {
            let mut state = self.lock();
            let State {
                scheduler,
                moves,
                form,
                ..
            } = &mut *state;
            moves.due(scheduler, form)
        };
        due.settle(cache)
    }

    pub(crate) fn commit(&self, took: Duration, outcomes: &[Outcome]) {
        self.lock().scheduler.commit(took, outcomes);
    }

    /// The step that is out has failed.
    pub(crate) fn fail(&self) {
        self.lock().scheduler.fail();
    }

    /// Whether new requests draft from now on; returns whether they did.
    pub(crate) fn set_drafting(&self, drafting: bool) -> bool {
        self.drafting.swap(drafting, Ordering::Relaxed)
    }

    /// Waits until somebody has submitted, closed or halted since the last turn.
    pub(crate) async fn news(&self) {
        self.wake.notified().await;
    }

    /// The engine has gone: nobody else may wait for it.
    pub(crate) fn abandon(&self, sequences: impl Iterator<Item = u64>) {
        let mut state = self.lock();
        (state.closed, state.halted) = (true, true);
        state.moves.end();
        let arrivals = std::mem::take(&mut state.arrivals);
        for id in sequences.chain(arrivals.iter().map(|&(id, _)| id)) {
            state.scheduler.cancel(id);
        }
        // Should a step have been out, it is over.
        state.scheduler.fail();
    }

    /// A panic under the lock ends the engine, and with it the node; until then the state is
    /// only counted.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
