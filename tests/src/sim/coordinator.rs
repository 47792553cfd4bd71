//! A coordinator's shell around the real [`Membership`]: leads or follows by the store, writes
//! before it tells, serves watches. A model of `coordinator::state` and its `leading`, rule by
//! rule; every decision about placements is the scheduler's own code.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use guild_scheduler::membership::{Action, Membership, Published, Settings, Snapshot};
use guild_scheduler::placement::{NodeId, Placement};

use super::Defect;
use super::event::{MS, SEC, Time, Who};
use super::message::{Answer, Call, Message, Open, Push, State, Stored, Timer, Wire};
use super::relay::Relay;
use super::world::{World, note};

/// As in `coordinator::state`.
const TICK: Time = 100 * MS;
const FROZEN_TICKS: Time = 4;
const RELIST: Time = 2 * SEC;
const RETRY: Time = 200 * MS;
/// What a call to the store may take.
const STORE_TIMEOUT: Time = 2 * SEC;
/// Between two looks at whether something is worth moving.
pub(super) const PLAN: Time = 1700 * MS;
/// Looks at an older revision that are not believed, as in `node::store::follow`.
const REWINDS_BELIEVED: u32 = 3;

/// What nodes are told of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Placements {
    pub(super) active: Option<Arc<Wire>>,
    pub(super) next: Option<Arc<Wire>>,
    pub(super) withdrawn: Option<Arc<Wire>>,
}

/// What is to be written, and told afterwards.
#[derive(Clone, Debug)]
struct Proposal {
    placements: Placements,
    snapshot: Snapshot,
}

/// A term of leadership.
#[derive(Debug)]
struct Term {
    lease: u64,
    valid_until: Time,
    /// Of the state in the store, as far as is known here.
    revision: u64,
    keeping: Option<(u64, Time)>,
}

/// Time in which the process runs: while it is frozen it hears nobody, so nobody's silence counts.
struct Clock {
    at: Time,
    time: Time,
}

/// A coordinator process.
pub(super) struct Coordinator {
    pub(super) m: Membership,
    clock: Clock,
    settings: Settings,
    /// What the store holds of it, as far as is known.
    written: Option<Snapshot>,
    term: Option<Term>,
    leader: Option<usize>,
    proposal: Option<Proposal>,
    /// The proposal has changed since it was last sent.
    fresh: bool,
    writing: Option<(u64, Proposal, Stored)>,
    told: Placements,
    watchers: BTreeMap<u64, (NodeId, Placements)>,
    campaign: Option<(u64, Time)>,
    observing: Option<u64>,
    seen: (u64, u32),
    pub(super) relays: BTreeMap<u64, Relay>,
    pub(super) suspects: BTreeMap<NodeId, Time>,
    /// The active placement after the last event, while it leads.
    pub(super) was_active: Option<Placement>,
}

impl Coordinator {
    pub(super) fn new(settings: Settings, now: Time) -> Coordinator {
        Coordinator {
            m: Membership::new(settings.clone(), Duration::ZERO),
            clock: Clock { at: now, time: 0 },
            settings,
            written: None,
            term: None,
            leader: None,
            proposal: None,
            fresh: false,
            writing: None,
            told: Placements::default(),
            watchers: BTreeMap::new(),
            campaign: None,
            observing: None,
            seen: (0, 0),
            relays: BTreeMap::new(),
            suspects: BTreeMap::new(),
            was_active: None,
        }
    }

    pub(super) fn leads(&self) -> bool {
        self.term.is_some()
    }

    /// Whether it knows what the store holds.
    pub(super) fn knows(&self, stored: &Stored) -> bool {
        let written = self.written.as_ref().map(serde_json::to_vec);
        written.is_some_and(|bytes| bytes.is_ok_and(|bytes| bytes == *stored.bytes))
    }

    /// Whether nobody else can lead now.
    fn leads_at(&self, now: Time) -> bool {
        self.term
            .as_ref()
            .is_some_and(|term| now < term.valid_until)
    }
}

impl Clock {
    fn now(&mut self, now: Time) -> Duration {
        self.time += (now - self.at).min(TICK * FROZEN_TICKS);
        self.at = now;
        Duration::from_micros(self.time)
    }
}

/// A published placement as it goes over the wire.
fn wire(published: &Published, oldest: u64) -> Arc<Wire> {
    Arc::new(Wire {
        state: match published.active {
            true => State::Active,
            false => State::Loading,
        },
        oldest: if published.active { oldest } else { 0 },
        placement: published.placement.clone(),
        nodes: (published.nodes.iter())
            .map(|node| (node.name.clone(), node.address.clone()))
            .collect(),
    })
}

fn placements(m: &Membership) -> Placements {
    let withdrawn = |epoch| {
        let placement = Placement::new(epoch, Vec::new()).unwrap_or_default();
        Arc::new(Wire {
            state: State::Withdrawn,
            oldest: 0,
            placement,
            nodes: Vec::new(),
        })
    };
    Placements {
        active: m.active().map(|active| wire(active, m.oldest_epoch())),
        next: m.next().map(|next| wire(next, 0)),
        withdrawn: m.withdrawn().map(withdrawn),
    }
}

impl World {
    /// A coordinator process begins.
    pub(super) fn start_coordinator(&mut self, at: usize) {
        let who = Who::Coordinator(at);
        self.begin(who);
        self.coordinators[at] = Coordinator::new(self.set.settings(), self.now);
        self.run_campaign(at);
        self.look_at_store(at);
        self.timer(who, TICK, Timer::Tick);
        self.timer(who, PLAN, Timer::Plan);
    }

    /// Runs `event` on the membership and carries out what follows.
    pub(super) fn with<R>(
        &mut self,
        at: usize,
        event: impl FnOnce(&mut Membership, Duration) -> R,
    ) -> R {
        let c = &mut self.coordinators[at];
        let clock = c.clock.now(self.now);
        let result = event(&mut c.m, clock);
        if c.leads() {
            self.check_active(at);
        }
        for action in self.coordinators[at].m.take_actions() {
            self.carry_out(at, action);
        }
        result
    }

    fn carry_out(&mut self, at: usize, action: Action) {
        note!(self, "Coordinator({at}) {action:?}");
        let cause = &self.coordinators[at].m.migration().cause;
        self.report.acted(&action, cause, self.healed);
        match action {
            Action::Publish => self.propose(at),
            Action::Lost { node, .. } => self.node_lost(at, node),
            _ => {}
        }
    }

    /// Whether it leads and its lease holds, as far as it knows.
    fn may_lead(&self, at: usize) -> bool {
        let c = &self.coordinators[at];
        c.leads_at(self.now) || c.leads() && self.has(Defect::UnfencedLeader)
    }

    fn propose(&mut self, at: usize) {
        if !self.may_lead(at) {
            return;
        }
        let c = &mut self.coordinators[at];
        let snapshot = c.m.snapshot();
        if c.proposal
            .as_ref()
            .is_none_or(|known| known.snapshot != snapshot)
        {
            c.proposal = Some(Proposal {
                placements: placements(&c.m),
                snapshot,
            });
            c.fresh = true;
            self.write_next(at);
        }
    }

    /// Sends the newest proposal to the store, unless one is on its way.
    fn write_next(&mut self, at: usize) {
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

    fn send_write(
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

    /// Lets nodes know.
    fn publish(&mut self, at: usize, placements: Placements) {
        self.coordinators[at].told = placements;
        let watchers: Vec<u64> = self.coordinators[at].watchers.keys().copied().collect();
        for conn in watchers {
            self.tell(at, conn);
        }
    }

    fn tell(&mut self, at: usize, conn: u64) {
        let c = &mut self.coordinators[at];
        let Some((_, told)) = c.watchers.get_mut(&conn) else {
            return;
        };
        let now = c.told.clone();
        let before = std::mem::replace(told, now.clone());
        let news = [
            (now.active, before.active),
            (now.withdrawn, before.withdrawn),
            (now.next, before.next),
        ];
        for (now, before) in news {
            if let Some(placement) = now.filter(|now| Some(now) != before.as_ref()) {
                self.push(conn, Push::Placement(placement));
            }
        }
    }

    fn run_campaign(&mut self, at: usize) {
        let rpc = self.call(
            Who::Coordinator(at),
            Who::Store,
            STORE_TIMEOUT,
            Call::Campaign,
        );
        self.coordinators[at].campaign = Some((rpc, self.now));
    }

    fn look_at_store(&mut self, at: usize) {
        let rpc = self.call(
            Who::Coordinator(at),
            Who::Store,
            STORE_TIMEOUT,
            Call::Observe,
        );
        self.coordinators[at].observing = Some(rpc);
    }

    fn keep_alive(&mut self, at: usize) {
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

    fn take_over(&mut self, at: usize, term: Term, state: Option<Stored>) {
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

    fn step_down(&mut self, at: usize) {
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
    fn resume(&mut self, at: usize, state: &Stored, takes_over: bool) {
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

    pub(super) fn coordinator_message(&mut self, at: usize, message: Message) {
        let who = Who::Coordinator(at);
        match message {
            Message::Call { rpc, from, body } => {
                let answer = self.coordinator_call(at, body);
                self.answer(who, from, rpc, answer);
            }
            Message::Answer { rpc, body } => self.store_answer(at, rpc, body),
            Message::Open {
                conn,
                body: Open::Watch { node },
            } => {
                let c = &mut self.coordinators[at];
                let refusal = match c.leads_at(self.now) {
                    false => Some(Answer::NotLeader { leader: c.leader }),
                    true if c.m.node(node).is_none() => Some(Answer::UnknownNode),
                    true => None,
                };
                if let Some(refusal) = refusal {
                    self.push(conn, Push::WatchEnds(refusal));
                    self.close(conn, who);
                    return;
                }
                c.watchers.insert(conn, (node, Placements::default()));
                self.tell(at, conn);
            }
            Message::Push { conn, body } => self.relay_push(at, conn, body),
            Message::Broken { conn } => {
                self.coordinators[at].watchers.remove(&conn);
                self.relay_broken(at, conn);
            }
            Message::Hint if self.coordinators[at].observing.is_none() => self.look_at_store(at),
            _ => {}
        }
    }

    fn coordinator_call(&mut self, at: usize, body: Call) -> Answer {
        if !self.may_lead(at) {
            return Answer::NotLeader {
                leader: self.coordinators[at].leader,
            };
        }
        match body {
            Call::Register(new) => match self.with(at, |m, now| m.register(now, *new)) {
                Ok(node) => Answer::Joined { node },
                Err(_) => Answer::Refused,
            },
            Call::Heartbeat {
                node,
                incarnation,
                report,
            } => {
                let beaten = self.with(at, |m, now| {
                    if report.running > 0 {
                        m.mark_served();
                    }
                    m.heartbeat(now, node, incarnation, report)
                });
                beaten.map_or(Answer::UnknownNode, |()| Answer::Beaten)
            }
            Call::Leave { node, incarnation } => {
                let left = self.with(at, |m, now| m.leave(now, node, incarnation));
                left.map_or(Answer::UnknownNode, |()| Answer::Beaten)
            }
            _ => Answer::Refused,
        }
    }

    /// What the store says to a candidate, a leader, a follower.
    fn store_answer(&mut self, at: usize, rpc: u64, body: Answer) {
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

    fn written_answer(&mut self, at: usize, body: Answer) {
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

    pub(super) fn coordinator_timer(&mut self, at: usize, timer: Timer) {
        let who = Who::Coordinator(at);
        match timer {
            Timer::Tick => {
                self.timer(who, TICK, Timer::Tick);
                if self.may_lead(at) {
                    self.with(at, |m, now| m.tick(now));
                    self.propose(at);
                } else if self.coordinators[at].leads() {
                    self.step_down(at);
                }
            }
            Timer::Relist if self.coordinators[at].observing.is_none() => self.look_at_store(at),
            Timer::Campaign => {
                let c = &self.coordinators[at];
                if !c.leads() && c.campaign.is_none() {
                    self.run_campaign(at);
                }
            }
            Timer::KeepAlive => self.keep_alive(at),
            Timer::WriteAgain => self.write_next(at),
            Timer::Relay { stream, stamp } => self.relay_timer(at, stream, stamp),
            Timer::Plan => self.plan(at),
            _ => {}
        }
    }
}
