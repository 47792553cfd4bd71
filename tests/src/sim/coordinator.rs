//! A coordinator's shell around the real [`Membership`]: leads or follows by the store, writes
//! before it tells, serves watches. A model of `coordinator::state` and its `leading`, rule by
//! rule; every decision about placements is the scheduler's own code.

mod leading;

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
                let c = &self.coordinators[at];
                let refusal = match c.leads_at(self.now) {
                    false => Some(Answer::NotLeader { leader: c.leader }),
                    true => {
                        let watches = self.with(at, |m, now| m.watches(now, node));
                        watches.err().map(|_| Answer::UnknownNode)
                    }
                };
                if let Some(refusal) = refusal {
                    self.push(conn, Push::WatchEnds(refusal));
                    self.close(conn, who);
                    return;
                }
                let c = &mut self.coordinators[at];
                c.watchers.insert(conn, (node, Placements::default()));
                self.tell(at, conn);
            }
            Message::Push { conn, body } => self.relay_push(at, conn, body),
            Message::Broken { conn } => {
                let watched = self.coordinators[at].watchers.remove(&conn);
                if let Some((node, _)) = watched
                    && self.may_lead(at)
                {
                    self.with(at, |m, now| m.hung_up(now, node));
                }
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
                    if report.serving.running > 0 {
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
