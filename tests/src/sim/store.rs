//! The cluster store as its clients see it: linearizable, with one leader by lease and one state
//! that only the present leader can write. As `node::store` does it with etcd: terms are leases,
//! and a write names the revision that it follows, so that one which arrives late does nothing.

use super::Defect;
use super::event::{Time, Who};
use super::message::{Answer, Call, Stored};
use super::world::{World, note};

/// What the store holds.
#[derive(Debug, Default)]
pub(super) struct Store {
    revision: u64,
    reign: Option<Reign>,
    state: Option<Stored>,
    state_revision: u64,
    last_lease: u64,
    /// Answers nobody.
    pub(super) away: bool,
    /// Takes so much longer.
    pub(super) slow: Time,
}

#[derive(Debug)]
struct Reign {
    lease: u64,
    leader: usize,
    ends: Time,
}

impl Store {
    /// Who leads, if the lease still runs.
    pub(super) fn leader(&self, now: Time) -> Option<usize> {
        self.reign
            .as_ref()
            .filter(|r| now < r.ends)
            .map(|r| r.leader)
    }

    pub(super) fn state(&self) -> Option<&Stored> {
        self.state.as_ref()
    }

    /// All is lost, the numbers of its terms and revisions as well.
    pub(super) fn wipe(&mut self) {
        *self = Store {
            last_lease: self.last_lease,
            away: self.away,
            slow: self.slow,
            ..Store::default()
        };
    }
}

impl World {
    /// Every call takes effect at one instant, here.
    pub(super) fn store_call(&mut self, rpc: u64, from: Who, body: Call) {
        if self.store.away {
            return;
        }
        let Who::Coordinator(candidate) = from else {
            return;
        };
        let (now, ttl) = (self.now, self.set.ttl);
        let leader = self.store.leader(now);
        if leader.is_none() && self.store.reign.take().is_some() {
            self.store.revision += 1;
            self.hint_all();
        }
        let store = &mut self.store;
        let holds = |store: &Store, lease| store.reign.as_ref().is_some_and(|r| r.lease == lease);
        let answer = match body {
            Call::Campaign if leader.is_none() => {
                store.last_lease += 1;
                store.revision += 1;
                let lease = store.last_lease;
                store.reign = Some(Reign {
                    lease,
                    leader: candidate,
                    ends: now + ttl,
                });
                let (revision, state) = (store.state_revision, store.state.clone());
                note!(
                    self,
                    "store: Coordinator({candidate}) is elected, lease {lease}"
                );
                self.hint_all();
                Answer::Won {
                    lease,
                    revision,
                    state,
                }
            }
            Call::Campaign => Answer::Occupied,
            Call::KeepAlive { lease } if holds(store, lease) => {
                if let Some(reign) = &mut store.reign {
                    reign.ends = now + ttl;
                }
                Answer::Kept
            }
            Call::Write {
                lease,
                expected,
                state,
            } => {
                let unfenced = self.defect == Some(Defect::UnfencedLeader);
                if !holds(store, lease) && !unfenced {
                    self.report.count("write fenced");
                    Answer::Fenced
                } else if expected != store.state_revision && !unfenced {
                    self.report.count("write overtaken");
                    Answer::Overtaken {
                        revision: store.state_revision,
                        state: store.state.clone(),
                    }
                } else {
                    store.revision += 1;
                    store.state_revision = store.revision;
                    let revision = store.revision;
                    let before = store.state.replace(state.clone());
                    self.written(candidate, before, &state);
                    self.hint_all();
                    Answer::Written { revision }
                }
            }
            Call::KeepAlive { .. } => Answer::Fenced,
            Call::Observe => Answer::Seen {
                revision: store.revision,
                leader,
                state: store.state.clone(),
            },
            _ => return,
        };
        self.answer(Who::Store, from, rpc, answer);
    }

    fn hint_all(&mut self) {
        for at in 0..self.coordinators.len() {
            self.hint(Who::Coordinator(at));
        }
    }
}
