//! Election, and what a leader inherits, writes and forgets: `coordinator::state::leading`.

use std::sync::Arc;

use guild_scheduler::membership::{Membership, Snapshot};
use guild_scheduler::placement::NodeId;

use super::{Proposal, RELIST, RETRY, REWINDS_BELIEVED, STORE_TIMEOUT, Term};
use crate::sim::Defect;
use crate::sim::event::{SEC, Who};
use crate::sim::message::{Answer, Call, Push, Stored, Timer};
use crate::sim::world::{World, note};

impl World {
    /// Sends the newest proposal to the store, unless one is on its way.
    pub(super) fn write_next(&mut self, at: usize) {
        let c = &mut self.coordinators[at];
        let (Some(term), Some(proposal)) = (&c.term, &c.proposal) else {
            return;
        };
        if c.writing.is_some() || !c.fresh {
            return;
        }
        c.fresh = false;
        let proposal = proposal.clone();
        let bytes = serde_json::to_vec(&proposal.snapshot).unwrap_or_default();
        let state = Stored {
            epoch: proposal.snapshot.newest_epoch(),
            bytes: Arc::new(bytes),
            placements: Arc::new(proposal.placements.clone()),
        };
        let (lease, expected) = (term.lease, term.revision);
        self.send_write(at, lease, expected, proposal, state);
    }

    pub(super) fn send_write(
        &mut self,
        at: usize,
        lease: u64,
        expected: u64,
        proposal: Proposal,
        state: Stored,
    ) {
        if self.has(Defect::TellsBeforeItWrites) {
            self.publish(at, proposal.placements.clone());
        }
        let body = Call::Write {
            lease,
            expected,
            state: state.clone(),
        };
        let rpc = self.call(Who::Coordinator(at), Who::Store, STORE_TIMEOUT, body);
        self.coordinators[at].writing = Some((rpc, proposal, state));
    }

    pub(super) fn run_campaign(&mut self, at: usize) {
        let rpc = self.call(
            Who::Coordinator(at),
            Who::Store,
            STORE_TIMEOUT,
            Call::Campaign,
        );
        self.coordinators[at].campaign = Some((rpc, self.now));
    }

    pub(super) fn look_at_store(&mut self, at: usize) {
        let rpc = self.call(
            Who::Coordinator(at),
            Who::Store,
            STORE_TIMEOUT,
            Call::Observe,
        );
        self.coordinators[at].observing = Some(rpc);
    }

    pub(super) fn keep_alive(&mut self, at: usize) {
        let Some(lease) = self.coordinators[at].term.as_ref().map(|t| t.lease) else {
            return;
        };
        let rpc = self.call(
            Who::Coordinator(at),
            Who::Store,
            STORE_TIMEOUT,
            Call::KeepAlive { lease },
        );
        let now = self.now;
        if let Some(term) = &mut self.coordinators[at].term {
            term.keeping = Some((rpc, now));
        }
        let pause = self.set.ttl / 3;
        self.timer(Who::Coordinator(at), pause, Timer::KeepAlive);
    }

    pub(super) fn take_over(&mut self, at: usize, term: Term, state: Option<Stored>) {
        self.report.count("leader elected");
        let lease = term.lease;
        if let Some(state) = state {
            self.resume(at, &state, true);
        }
        let c = &mut self.coordinators[at];
        let known = c.m.snapshot();
        let clock = c.clock.now(self.now);
        if known.nodes().next().is_some() && c.m.resume(clock, &known).is_err() {
            self.report
                .wrong("a coordinator cannot go on from what it knows".to_owned());
        }
        let c = &mut self.coordinators[at];
        c.m.take_actions();
        c.term = Some(term);
        let inherits = c.m.next().is_some();
        note!(self, "Coordinator({at}) leads by lease {lease}");
        if inherits {
            self.report.count("leader inherits an epoch being loaded");
        }
        self.propose(at);
        self.keep_alive(at);
    }

    pub(super) fn step_down(&mut self, at: usize) {
        note!(self, "Coordinator({at}) leads no more");
        self.report.count("leader deposed");
        let c = &mut self.coordinators[at];
        (c.term, c.leader, c.proposal, c.writing, c.fresh) = (None, None, None, None, false);
        c.was_active = None;
        // What was decided and not written has never been.
        let clock = c.clock.now(self.now);
        if let Some(written) = c.written.as_ref().filter(|w| **w != c.m.snapshot()) {
            let mut m = Membership::new(c.settings.clone(), clock);
            if m.resume(clock, written).is_ok() {
                c.m = m;
                self.report
                    .count("deposed leader forgets what it never wrote");
            }
            let c = &mut self.coordinators[at];
            c.m.take_actions();
        }
        let c = &mut self.coordinators[at];
        let watchers: Vec<u64> = std::mem::take(&mut c.watchers).into_keys().collect();
        for conn in watchers {
            self.push(conn, Push::WatchEnds(Answer::NotLeader { leader: None }));
            self.close(conn, Who::Coordinator(at));
        }
        self.run_campaign(at);
    }

    /// Makes what the store holds the membership that is known here.
    pub(super) fn resume(&mut self, at: usize, state: &Stored, takes_over: bool) {
        let Ok(snapshot) = serde_json::from_slice::<Snapshot>(&state.bytes) else {
            self.report
                .wrong("what the store holds cannot be read".to_owned());
            return;
        };
        let c = &mut self.coordinators[at];
        let ours = c.m.snapshot();
        if ours == snapshot {
            c.written = Some(snapshot);
            return;
        }
        if ours.newest_epoch() > snapshot.newest_epoch() {
            self.report
                .count("store holds an older epoch than is known here");
            note!(
                self,
                "Coordinator({at}) ignores the store (takes over: {takes_over})"
            );
            return;
        }
        let clock = c.clock.now(self.now);
        if let Err(error) = c.m.resume(clock, &snapshot) {
            self.report
                .wrong(format!("what the store holds is of no use: {error}"));
            return;
        }
        let gone: Vec<NodeId> = ours
            .nodes()
            .filter(|id| !snapshot.nodes().any(|n| n == *id))
            .collect();
        c.written = Some(snapshot);
        for node in gone {
            self.node_lost(at, node);
        }
    }

    /// What the store says to a candidate, a leader, a follower.
    pub(super) fn store_answer(&mut self, at: usize, rpc: u64, body: Answer) {
        let who = Who::Coordinator(at);
        let c = &mut self.coordinators[at];
        if let Some((out, asked)) = c.campaign.filter(|(out, _)| *out == rpc) {
            c.campaign = None;
            debug_assert_eq!(out, rpc);
            match body {
                Answer::Won {
                    lease,
                    revision,
                    state,
                } => {
                    let valid_until = asked + self.set.ttl;
                    let term = Term {
                        lease,
                        valid_until,
                        revision,
                        keeping: None,
                    };
                    self.take_over(at, term, state);
                }
                Answer::Occupied => self.timer(who, SEC, Timer::Campaign),
                _ => self.timer(who, RETRY, Timer::Campaign),
            }
        } else if c.observing == Some(rpc) {
            c.observing = None;
            if let Answer::Seen {
                revision,
                leader,
                state,
            } = body
            {
                let (known, rewinds) = c.seen;
                c.seen = match revision < known {
                    true if rewinds + 1 < REWINDS_BELIEVED => (known, rewinds + 1),
                    _ => (revision, 0),
                };
                if c.seen.1 == 0 {
                    c.leader = leader;
                    if let Some(state) = state.filter(|_| !c.leads()) {
                        self.resume(at, &state, false);
                        self.coordinators[at].m.take_actions();
                    }
                }
            }
            self.timer(who, RELIST, Timer::Relist);
        } else if c.writing.as_ref().is_some_and(|(out, ..)| *out == rpc) {
            self.written_answer(at, body);
        } else if let Some(term) = &mut c.term
            && let Some((_, asked)) = term.keeping.filter(|(out, _)| *out == rpc)
        {
            match body {
                Answer::Kept => term.valid_until = asked + self.set.ttl,
                Answer::Fenced => self.step_down(at),
                _ => {}
            }
        }
    }

    pub(super) fn written_answer(&mut self, at: usize, body: Answer) {
        let c = &mut self.coordinators[at];
        let Some((_, proposal, state)) = c.writing.take() else {
            return;
        };
        let Some(term) = &mut c.term else { return };
        let lease = term.lease;
        match body {
            Answer::Written { revision } => {
                term.revision = revision;
                c.written = Some(proposal.snapshot);
                self.publish(at, proposal.placements);
                self.write_next(at);
            }
            Answer::Overtaken {
                revision,
                state: stored,
            } => {
                term.revision = revision;
                if stored.as_ref() == Some(&state) {
                    // An earlier attempt whose answer was lost.
                    c.written = Some(proposal.snapshot);
                    self.publish(at, proposal.placements);
                    self.write_next(at);
                } else {
                    self.send_write(at, lease, revision, proposal, state);
                }
            }
            Answer::Fenced => self.step_down(at),
            _ => {
                self.report.count("write not answered");
                c.fresh = true;
                self.timer(Who::Coordinator(at), RETRY, Timer::WriteAgain);
            }
        }
    }
}
