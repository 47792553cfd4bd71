//! A node's membership: join, beat, follow the placement, and over again. A model of
//! `node::member`, rule by rule: one call of a kind at a time, the next coordinator after a
//! failure, nothing taken from a stream while the own lease has run out.

use std::sync::Arc;

use guild_scheduler::membership::{Measured, Registration, Report, Role};
use guild_scheduler::placement::NodeId;

use super::event::{MS, SEC, Time, Who};
use super::message::{Answer, Call, Open, Push, State, Timer, Wire};
use super::world::{World, note};

/// As in `node::member::session`.
const BACKOFF: (Time, Time) = (100 * MS, 2 * SEC);
const CALL_TIMEOUT: Time = 3 * SEC;
const BEATS_PER_LEASE: Time = 3;

/// One node's side of its membership.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) name: String,
    role: Role,
    incarnation: u64,
    capacity: u64,
    domain: String,
    /// The coordinator in use.
    at: usize,
    pub(super) id: Option<NodeId>,
    /// Every id this process has had.
    pub(super) ids: Vec<NodeId>,
    lease_until: Time,
    backoff: Time,
    joining: Option<u64>,
    beating: Option<(u64, Time)>,
    /// Something new was said while a heartbeat was out.
    news: bool,
    watch: Option<u64>,
    watch_backoff: Time,
    watch_stamp: u64,
    stamp: u64,
    /// Newest placement that is not withdrawn, and newest that is active.
    pub(super) placement: Option<Arc<Wire>>,
    pub(super) active: Option<Arc<Wire>>,
    withdrawn: u64,
    newest: u64,
    /// What it says of itself.
    pub(super) said: Report,
    /// It has said goodbye.
    pub(super) leaving: bool,
}

impl Session {
    pub(super) fn new(
        role: Role,
        name: String,
        domain: String,
        capacity: u64,
        incarnation: u64,
    ) -> Session {
        Session {
            name,
            role,
            incarnation,
            capacity,
            domain,
            at: 0,
            id: None,
            ids: Vec::new(),
            lease_until: 0,
            backoff: 0,
            joining: None,
            beating: None,
            news: false,
            watch: None,
            watch_backoff: 0,
            watch_stamp: 0,
            stamp: 0,
            placement: None,
            active: None,
            withdrawn: 0,
            newest: 0,
            said: Report::default(),
            leaving: false,
        }
    }

    /// Until when the coordinator counts on this node.
    pub(super) fn lease_until(&self) -> Time {
        self.lease_until
    }

    fn registration(&self) -> Registration {
        Registration {
            role: self.role,
            name: self.name.clone(),
            address: format!("{}:1", self.name),
            model_digest: "digest".to_owned(),
            numerics_class: "class".to_owned(),
            capacity_bytes: self.capacity,
            newest_epoch: self.newest,
            incarnation: self.incarnation,
            process: format!("{}-{}", self.name, self.incarnation),
            failure_domain: self.domain.clone(),
            duty: Default::default(),
        }
    }

    fn next_backoff(&mut self) -> Time {
        self.backoff = (self.backoff * 2).clamp(BACKOFF.0, BACKOFF.1);
        self.backoff
    }

    fn epoch_of(placement: &Option<Arc<Wire>>) -> u64 {
        placement.as_ref().map_or(0, |p| p.epoch())
    }

    /// Takes what the coordinator has told. True: something is new.
    fn take(&mut self, told: Arc<Wire>) -> bool {
        let epoch = told.epoch();
        self.newest = self.newest.max(epoch);
        match told.state {
            State::Withdrawn => {
                self.withdrawn = self.withdrawn.max(epoch);
                let gone = |p: &Arc<Wire>| p.state == State::Loading && p.epoch() <= epoch;
                let was_loading = self.placement.as_ref().is_some_and(gone);
                if was_loading {
                    self.placement = self.active.clone();
                }
                was_loading
            }
            State::Active => {
                let known = Session::epoch_of(&self.active);
                let older = self.active.as_ref().is_some_and(|known| {
                    epoch < known.epoch() || (epoch == known.epoch() && told.oldest <= known.oldest)
                });
                if !older {
                    self.active = Some(Arc::clone(&told));
                }
                let newest = Session::epoch_of(&self.placement);
                if epoch >= newest || newest == known {
                    self.placement = Some(told);
                }
                !older
            }
            State::Loading
                if epoch <= self.withdrawn || epoch < Session::epoch_of(&self.placement) =>
            {
                false
            }
            State::Loading => {
                self.placement = Some(told);
                true
            }
        }
    }
}

impl World {
    pub(super) fn session(&mut self, node: Who) -> Option<&mut Session> {
        match node {
            Who::Expert(at) => Some(&mut self.experts[at].session),
            Who::Attention(at) => Some(&mut self.attentions[at].session),
            _ => None,
        }
    }

    /// The node begins to join.
    pub(super) fn join(&mut self, node: Who) {
        let limit = CALL_TIMEOUT;
        let Some(session) = self.session(node) else {
            return;
        };
        (session.id, session.beating, session.watch) = (None, None, None);
        session.lease_until = 0;
        let (at, registration) = (session.at, session.registration());
        let rpc = self.call(
            node,
            Who::Coordinator(at),
            limit,
            Call::Register(Box::new(registration)),
        );
        if let Some(session) = self.session(node) {
            session.joining = Some(rpc);
        }
    }

    /// Says something new as soon as possible.
    pub(super) fn say(&mut self, node: Who, change: impl FnOnce(&mut Report)) {
        let Some(session) = self.session(node) else {
            return;
        };
        let before = session.said.clone();
        change(&mut session.said);
        if session.said == before || session.id.is_none() {
            return;
        }
        match session.beating {
            Some(_) => session.news = true,
            None => self.beat(node),
        }
    }

    fn beat(&mut self, node: Who) {
        let now = self.now;
        let Some(session) = self.session(node) else {
            return;
        };
        let Some(id) = session.id else { return };
        session.news = false;
        let body = Call::Heartbeat {
            node: id,
            incarnation: session.incarnation,
            report: session.said.clone(),
        };
        let at = session.at;
        let rpc = self.call(node, Who::Coordinator(at), CALL_TIMEOUT, body);
        if let Some(session) = self.session(node) {
            session.beating = Some((rpc, now));
        }
    }

    fn follow(&mut self, node: Who) {
        let Some(session) = self.session(node) else {
            return;
        };
        let Some(id) = session.id else { return };
        let at = session.at;
        session.watch_stamp += 1;
        if let Some(old) = session.watch.take() {
            self.close(old, node);
        }
        let conn = self.open(node, Who::Coordinator(at), Open::Watch { node: id });
        if let Some(session) = self.session(node) {
            session.watch = Some(conn);
        }
    }

    /// The coordinator in use has failed or names another one.
    fn turn_from(&mut self, node: Who, at: usize, named: Option<usize>) {
        let all = self.coordinators.len();
        let Some(session) = self.session(node) else {
            return;
        };
        let next = named.filter(|&named| named != at).unwrap_or((at + 1) % all);
        if session.at != at || next == at {
            return;
        }
        session.at = next;
        // The watch turns with the heartbeats.
        if session.watch.is_some() {
            self.follow(node);
        }
    }

    fn rejoin(&mut self, node: Who) {
        note!(self, "{node:?} is unknown: joins again");
        self.report
            .count("node joins again after its lease ran out");
        if let Some(conn) = self.session(node).and_then(|s| s.watch.take()) {
            self.close(conn, node);
        }
        self.join(node);
    }

    /// An answer that may be for the session. False: it is not.
    pub(super) fn session_answer(&mut self, node: Who, rpc: u64, answer: &Answer) -> bool {
        let (now, lease) = (self.now, self.set.lease);
        let Some(session) = self.session(node) else {
            return false;
        };
        let at = session.at;
        if session.joining == Some(rpc) {
            session.joining = None;
            if let Answer::Joined { node: id } = *answer {
                (session.id, session.backoff) = (Some(id), 0);
                session.ids.push(id);
                session.lease_until = now + lease;
                self.beat(node);
                self.follow(node);
                return true;
            }
            let pause = session.next_backoff();
            session.stamp += 1;
            let stamp = session.stamp;
            self.turn_from(node, at, leader_of(answer));
            self.timer(node, pause, Timer::Join { stamp });
            return true;
        }
        let Some((_, sent)) = session.beating.filter(|(out, _)| *out == rpc) else {
            return false;
        };
        session.beating = None;
        let interval = lease / BEATS_PER_LEASE;
        let mut pause = interval;
        match answer {
            Answer::Beaten => {
                session.lease_until = sent + lease;
                session.backoff = 0;
            }
            Answer::UnknownNode => {
                self.rejoin(node);
                return true;
            }
            other => {
                pause = interval.min(session.next_backoff());
                self.turn_from(node, at, leader_of(other));
            }
        }
        let Some(session) = self.session(node) else {
            return true;
        };
        if session.news {
            self.beat(node);
            return true;
        }
        session.stamp += 1;
        let stamp = session.stamp;
        self.timer(node, pause, Timer::Beat { stamp });
        true
    }

    /// A timer that may be the session's. False: it is not.
    pub(super) fn session_timer(&mut self, node: Who, timer: &Timer) -> bool {
        let Some(session) = self.session(node) else {
            return false;
        };
        match *timer {
            Timer::Join { stamp } if stamp == session.stamp => self.join(node),
            Timer::Beat { stamp } if stamp == session.stamp && session.beating.is_none() => {
                self.beat(node)
            }
            Timer::Watch { stamp } if stamp == session.watch_stamp => self.follow(node),
            Timer::Join { .. } | Timer::Beat { .. } | Timer::Watch { .. } => {}
            _ => return false,
        }
        true
    }

    /// A message of the watch. True: the node knows something new.
    pub(super) fn session_push(&mut self, node: Who, conn: u64, push: &Push) -> bool {
        let now = self.now;
        let Some(session) = self.session(node) else {
            return false;
        };
        if session.watch != Some(conn) {
            return false;
        }
        match push {
            Push::Placement(_) if now >= session.lease_until => {
                // Fenced: what was on its way meanwhile is not for this node any more.
                self.report.count("placement refused without a lease");
                self.close(conn, node);
                self.watch_ended(node, None);
                false
            }
            Push::Placement(told) => {
                let told = Arc::clone(told);
                session.watch_backoff = 0;
                let news = session.take(Arc::clone(&told));
                self.told(node, &told);
                news
            }
            Push::WatchEnds(Answer::UnknownNode) => {
                self.rejoin(node);
                false
            }
            Push::WatchEnds(why) => {
                let named = leader_of(why);
                self.watch_ended(node, named);
                false
            }
            _ => false,
        }
    }

    /// The watch has broken.
    pub(super) fn session_broken(&mut self, node: Who, conn: u64) {
        if self.session(node).is_some_and(|s| s.watch == Some(conn)) {
            self.watch_ended(node, None);
        }
    }

    fn watch_ended(&mut self, node: Who, named: Option<usize>) {
        let Some(session) = self.session(node) else {
            return;
        };
        session.watch = None;
        session.watch_backoff = (session.watch_backoff * 2).clamp(BACKOFF.0, BACKOFF.1);
        session.watch_stamp += 1;
        let (at, pause, stamp) = (session.at, session.watch_backoff, session.watch_stamp);
        self.turn_from(node, at, named);
        self.timer(node, pause, Timer::Watch { stamp });
    }

    /// Says goodbye; the process ends soon after.
    pub(super) fn leave(&mut self, node: Who) {
        let Some(session) = self.session(node) else {
            return;
        };
        session.leaving = true;
        if let Some(id) = session.id.take() {
            let body = Call::Leave {
                node: id,
                incarnation: session.incarnation,
            };
            let at = session.at;
            self.call(node, Who::Coordinator(at), SEC, body);
        }
    }

    /// What the node has measured: at once when experts have come or gone, with
    /// the next heartbeat otherwise.
    pub(super) fn measured(&mut self, node: Who, measured: Measured) {
        let Some(session) = self.session(node) else {
            return;
        };
        if session.said.measured.resident_bytes == measured.resident_bytes {
            session.said.measured = measured;
        } else {
            self.say(node, |said| said.measured = measured);
        }
    }
}

fn leader_of(answer: &Answer) -> Option<usize> {
    match answer {
        Answer::NotLeader { leader } => *leader,
        _ => None,
    }
}
