//! Leading and following: of several coordinators one decides, and what it
//! decides is in the store before any node hears of it.
//!
//! The leader writes a snapshot of the membership under its term of leadership;
//! a leader that has been deposed without noticing cannot, and so no node ever
//! sees an epoch of two makers. The others read it and serve the front door by
//! it. Whoever leads next goes on from it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use guild_node::store::{
    Candidate, ClusterStore, Leader, Leadership, Observation, State, StoreError, follow,
};
use guild_node::{Shutdown, failpoint};
use guild_scheduler::membership::{Membership, Snapshot};
use guild_scheduler::placement::NodeId;
use tokio::sync::watch;

use super::{ClusterState, Inner, Placements};

/// How often a follower looks at the store even without a hint.
const RELIST: Duration = Duration::from_secs(2);
/// Pause before a write that the store could not take is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// What the leader wants to be known, and has not been written yet.
#[derive(Clone, Debug)]
pub(super) struct Proposal {
    placements: Placements,
    snapshot: Arc<Snapshot>,
}

/// This coordinator does not lead.
#[derive(Clone, Debug)]
pub(crate) struct NotLeading {
    /// Who does, as far as is known.
    pub(crate) leader: Option<Leader>,
    /// How this coordinator was deposed, if it was and nobody is known to lead since.
    pub(crate) deposed: Option<String>,
}

impl ClusterState {
    /// Like [`with`](ClusterState::with), for what only the leader may do. The lease is looked at
    /// before and after: the answer of one that was frozen in between is nobody's.
    pub(crate) fn lead<R>(
        &self,
        event: impl FnOnce(&mut Membership, Duration) -> R,
    ) -> Result<R, NotLeading> {
        self.with_inner(|inner, now| {
            if inner.leads() {
                let answer = event(&mut inner.membership, now);
                if inner.leads() {
                    return Ok(answer);
                }
            }
            Err(NotLeading {
                leader: inner.leader.clone(),
                deposed: inner.deposed.clone(),
            })
        })
    }

    /// Completes when this coordinator leads.
    pub(crate) async fn leads(&self) {
        let mut leads = self.leads.subscribe();
        // The sender lives as long as this state.
        let _ = leads.wait_for(|leads| *leads).await;
    }

    /// Completes when this coordinator does not lead.
    pub(crate) async fn follows(&self) {
        let mut leads = self.leads.subscribe();
        // The sender lives as long as this state.
        let _ = leads.wait_for(|leads| !leads).await;
    }

    /// Takes part in the election until `end`: follows whoever leads, leads when
    /// elected, follows again when deposed; resigns at the end. `first` is a
    /// leadership already won.
    ///
    /// # Errors
    /// The store is damaged.
    pub(crate) async fn take_part(
        &self,
        store: Arc<dyn ClusterStore>,
        candidate: Candidate,
        ttl: Duration,
        mut first: Option<Leadership>,
        end: Shutdown,
    ) -> Result<(), StoreError> {
        let mut seen = follow(Arc::clone(&store), RELIST);
        loop {
            let leadership = match first.take() {
                Some(leadership) => leadership,
                None => tokio::select! {
                    won = store.campaign(&candidate, ttl) => won?,
                    () = self.mirror_all(&mut seen) => continue,
                    () = end.requested() => return Ok(()),
                },
            };
            let term = leadership.term();
            tracing::info!(term, "this coordinator leads");
            self.take_over(&leadership);
            let why = tokio::select! {
                why = self.publish(&leadership) => why,
                why = leadership.lost() => why,
                () = end.requested() => {
                    leadership.resign().await;
                    return Ok(());
                }
            };
            tracing::warn!(term, "this coordinator no longer leads: {why}");
            self.step_down(why);
        }
    }

    async fn mirror_all(&self, seen: &mut watch::Receiver<Option<Observation>>) {
        seen.mark_changed();
        while seen.changed().await.is_ok() {
            let now = seen.borrow_and_update().clone();
            if let Some(now) = now {
                self.mirror(&now);
            }
        }
    }

    /// Makes what the leader has written the membership that is seen here.
    fn mirror(&self, seen: &Observation) {
        self.with_inner(|inner, now| {
            inner.leader.clone_from(&seen.leader);
            if inner.leading.is_some() {
                return;
            }
            if seen.leader.is_some() {
                inner.deposed = None;
            }
            if let Some(state) = &seen.state {
                self.resume(inner, now, state);
            }
            // What follows from it is the leader's business.
            inner.membership.take_actions();
        });
    }

    fn resume(&self, inner: &mut Inner, now: Duration, state: &State) {
        let snapshot: Snapshot = match serde_json::from_slice(&state.placement) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                tracing::error!("what the store holds of the cluster cannot be read: {error}");
                return;
            }
        };
        let ours = inner.membership.snapshot();
        if ours == snapshot {
            inner.written = Some(Arc::new(snapshot));
            return;
        }
        if ours.newest_epoch() > snapshot.newest_epoch() {
            tracing::warn!(
                ours = ours.newest_epoch(),
                store = snapshot.newest_epoch(),
                "the store holds an older epoch than is known here: it is ignored"
            );
            return;
        }
        if let Err(error) = inner.membership.resume(now, &snapshot) {
            tracing::error!("what the store holds of the cluster is of no use: {error}");
            return;
        }
        let stay: BTreeSet<_> = snapshot.nodes().collect();
        for gone in ours.nodes().filter(|id| !stay.contains(id)) {
            // Nobody listening is fine: nothing is running there then.
            let _ = self.lost.send(gone);
        }
        inner.written = Some(Arc::new(snapshot));
    }

    /// Goes on from what the leader before has left, or from what is known here
    /// if that is newer. Every node gets a whole lease to find the new leader.
    fn take_over(&self, leadership: &Leadership) {
        self.with_inner(|inner, now| {
            match leadership.inherited() {
                Some(state) => self.resume(inner, now, state),
                None => inner.membership.number_above(any_id()),
            }
            let known = inner.membership.snapshot();
            if known.nodes().next().is_some()
                && let Err(error) = inner.membership.resume(now, &known)
            {
                tracing::error!("cannot go on from what is known here: {error}");
            }
            inner.membership.take_actions();
            inner.leading = Some(leadership.validity());
            inner.deposed = None;
            self.propose(inner);
        });
        self.leads.send_replace(true);
    }

    /// What was decided and not written has never been: nobody was told of it, and its epochs are
    /// the next leader's to use.
    fn step_down(&self, why: String) {
        self.with_inner(|inner, now| {
            inner.leading = None;
            inner.leader = None;
            inner.deposed = Some(why);
            let Some(written) = &inner.written else {
                return;
            };
            if **written == inner.membership.snapshot() {
                return;
            }
            let mut membership = Membership::new(self.settings.clone(), now);
            match membership.resume(now, written) {
                Ok(()) => inner.membership = membership,
                Err(error) => tracing::error!("cannot go back to what is written: {error}"),
            }
            inner.membership.take_actions();
        });
        self.proposal.send_replace(None);
        self.leads.send_replace(false);
    }

    /// Notes what is to be written now. Told under the lock, so that the last is
    /// the newest.
    pub(super) fn propose(&self, inner: &Inner) {
        if !inner.leads() {
            return;
        }
        let snapshot = inner.membership.snapshot();
        self.proposal.send_if_modified(|known| {
            let news = known
                .as_ref()
                .is_none_or(|known| *known.snapshot != snapshot);
            if news {
                *known = Some(Proposal {
                    placements: Placements::of(&inner.membership),
                    snapshot: Arc::new(snapshot),
                });
            }
            news
        });
    }

    /// Writes each proposal, and only then lets nodes know. Ends when this
    /// leader may not write any more.
    async fn publish(&self, leadership: &Leadership) -> String {
        let mut proposals = self.proposal.subscribe();
        proposals.mark_changed();
        let mut complained = false;
        let mut told = Placements::default();
        while proposals.changed().await.is_ok() {
            let Some(proposal) = proposals.borrow_and_update().clone() else {
                continue;
            };
            let state = State {
                epoch: proposal.snapshot.newest_epoch(),
                served: proposal.snapshot.served(),
                placement: match serde_json::to_vec(&*proposal.snapshot) {
                    Ok(bytes) => bytes,
                    Err(error) => return format!("the membership cannot be written: {error}"),
                },
            };
            let saved = match pass(proposal.placements.fail_points(&told)).await {
                Ok(()) => leadership.save(&state).await,
                Err(fired) => Err(fired),
            };
            match saved {
                Ok(_) => {
                    complained = false;
                    told.clone_from(&proposal.placements);
                    self.with_inner(|inner, _| inner.written = Some(proposal.snapshot));
                    self.placements.send_replace(proposal.placements);
                }
                Err(StoreError::Fenced { reason, .. }) => return reason,
                Err(error) => {
                    if !complained {
                        tracing::error!("nodes are not told of changes: {error}");
                    }
                    complained = true;
                    tokio::time::sleep(RETRY).await;
                    // The newest of them, which may still be this one.
                    proposals.mark_changed();
                }
            }
        }
        "the coordinator ends".to_owned()
    }
}

/// Where ids begin when no store knows which were given before: anywhere in the lower half of what
/// there are, so that neither a repetition nor the end of the numbers is to be feared.
fn any_id() -> NodeId {
    // The low half of a version 4 UUID is random but for its two highest bits.
    (uuid::Uuid::new_v4().as_u64_pair().1 as NodeId) >> 1
}

/// Passes fail points on a thread that may block. One that fires is as if the
/// store could not be written.
async fn pass(points: Vec<&'static str>) -> Result<(), StoreError> {
    if points.is_empty() {
        return Ok(());
    }
    let passed =
        tokio::task::spawn_blocking(move || points.into_iter().try_for_each(failpoint::at));
    let reason = match passed.await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(fired)) => fired.to_string(),
        Err(panic) => panic.to_string(),
    };
    Err(StoreError::Unavailable {
        store: "of this test".to_owned(),
        reason,
    })
}
