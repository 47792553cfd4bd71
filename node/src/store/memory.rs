//! The store of a single process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{
    Candidate, ClusterStore, Hold, Leader, Leadership, Observation, State, StoreError, Validity,
};

/// A store in memory. Clones share it.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Of the last leader, and how its term ends.
    last_term: u64,
    leader: Option<Reign>,
    state: Option<State>,
}

#[derive(Debug)]
struct Reign {
    leader: Leader,
    lost: watch::Sender<Option<String>>,
    ttl: Duration,
    /// Set once nobody renews it any more.
    ends: Option<Instant>,
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore {
            shared: Arc::new(Shared {
                inner: Mutex::default(),
                revision: watch::Sender::new(0),
            }),
        }
    }
}

impl MemoryStore {
    /// Takes the lease from whoever leads, as a store does with a leader that
    /// it has not heard of for too long.
    pub fn depose(&self) {
        let mut inner = self.shared.lock();
        if let Some(reign) = inner.leader.take() {
            reign
                .lost
                .send_replace(Some("the lease was taken away".to_owned()));
        }
        self.shared.bump(inner);
    }
}

impl Shared {
    /// The present contents; a lease that has run out is gone.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if inner
            .leader
            .as_ref()
            .is_some_and(|reign| reign.ends.is_some_and(|ends| now >= ends))
        {
            inner.leader = None;
            self.revision.send_modify(|revision| *revision += 1);
        }
        inner
    }

    /// Under the lock, so that a revision belongs to one content.
    fn bump(&self, guard: MutexGuard<'_, Inner>) -> u64 {
        self.revision.send_modify(|revision| *revision += 1);
        let revision = *self.revision.borrow();
        drop(guard);
        revision
    }

    fn try_lead(self: &Arc<Self>, candidate: &Candidate, ttl: Duration) -> Option<Leadership> {
        let mut inner = self.lock();
        if inner.leader.is_some() {
            return None;
        }
        inner.last_term += 1;
        let leader = Leader {
            candidate: candidate.clone(),
            term: inner.last_term,
        };
        let (lost, lost_rx) = watch::channel(None);
        inner.leader = Some(Reign {
            leader: leader.clone(),
            lost,
            ttl,
            ends: None,
        });
        let inherited = inner.state.clone();
        let hold = MemoryHold {
            shared: Arc::clone(self),
            term: leader.term,
        };
        self.bump(inner);
        let validity = Validity {
            lost: lost_rx,
            until: None,
        };
        Some(Leadership::new(leader, inherited, validity, Box::new(hold)))
    }
}

#[tonic::async_trait]
impl ClusterStore for MemoryStore {
    async fn campaign(
        &self,
        candidate: &Candidate,
        ttl: Duration,
    ) -> Result<Leadership, StoreError> {
        super::check(candidate)?;
        loop {
            let revision = *self.shared.revision.borrow();
            if let Some(leadership) = self.shared.try_lead(candidate, ttl) {
                return Ok(leadership);
            }
            let ends = self
                .shared
                .lock()
                .leader
                .as_ref()
                .and_then(|reign| reign.ends);
            tokio::select! {
                () = self.changed(revision) => {}
                () = tokio::time::sleep_until(ends.unwrap_or_else(Instant::now).into()), if ends.is_some() => {}
            }
        }
    }

    async fn observe(&self) -> Result<Observation, StoreError> {
        let inner = self.shared.lock();
        Ok(Observation {
            revision: *self.shared.revision.borrow(),
            leader: inner.leader.as_ref().map(|reign| reign.leader.clone()),
            state: inner.state.clone(),
        })
    }

    async fn changed(&self, revision: u64) {
        let mut now = self.shared.revision.subscribe();
        // The sender lives as long as `self`.
        let _ = now.wait_for(|now| *now > revision).await;
    }
}

#[derive(Debug)]
struct MemoryHold {
    shared: Arc<Shared>,
    term: u64,
}

#[tonic::async_trait]
impl Hold for MemoryHold {
    async fn write(&self, state: &State) -> Result<u64, StoreError> {
        let mut inner = self.shared.lock();
        if !inner.leads(self.term) {
            return Err(StoreError::Fenced {
                term: self.term,
                reason: "the lease is gone".to_owned(),
            });
        }
        inner.state = Some(state.clone());
        Ok(self.shared.bump(inner))
    }

    async fn release(self: Box<Self>) {
        let mut inner = self.shared.lock();
        if inner.leads(self.term) {
            inner.leader = None;
        }
        self.shared.bump(inner);
    }
}

impl Inner {
    fn leads(&self, term: u64) -> bool {
        self.leader
            .as_ref()
            .is_some_and(|reign| reign.leader.term == term)
    }
}

impl Drop for MemoryHold {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        if inner.leads(self.term)
            && let Some(reign) = &mut inner.leader
        {
            reign.ends = Some(Instant::now() + reign.ttl);
        }
        self.shared.bump(inner);
    }
}
