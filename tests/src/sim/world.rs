//! The world: processes, the network between them, virtual time. Secret: how a message gets
//! from one process to another, or does not.

use std::collections::{BTreeMap, BTreeSet};

use super::arithmetic::Model;
use super::attention::Attention;
use super::coordinator::Coordinator;
use super::event::{Agenda, MS, SEC, Time, Who};
use super::expert::Expert;
use super::message::{Answer, Call, Event, Message, Open, Push, Timer};
use super::relay::Client;
use super::report::Report;
use super::rng::Rng;
use super::store::Store;
use super::truth::Truth;
use super::{Defect, Options};

/// Shortest and longest way of a message on a good day.
const DELAY: (Time, Time) = (100, 3 * MS);
/// Of a thousand messages so many take long.
const LATE_PER_MILLE: u64 = 10;
/// How long, at most.
const LATE: Time = 400 * MS;
/// Of a thousand calls so many come twice.
const TWICE_PER_MILLE: u64 = 5;
/// What a silent connection is given before it is closed: between these.
const KEEPALIVE: (Time, Time) = (3 * SEC, 5 * SEC);

/// Whether a process runs.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) up: bool,
    /// Grows with every start: what was meant for an earlier life is lost.
    pub(super) life: u64,
    pub(super) frozen: bool,
    /// Its machine is gone, too: nobody refuses connections to it.
    pub(super) silent: bool,
    /// Happens when it thaws.
    held: Vec<Event>,
}

/// A stream from a server to its client.
#[derive(Debug)]
struct Conn {
    client: Who,
    server: Who,
    lives: (u64, u64),
    /// When its last message arrives: it keeps their order.
    last: Time,
    /// A message is stuck on a dead line, and all behind it.
    stuck: bool,
}

/// Everything there is.
pub(super) struct World {
    pub(super) now: Time,
    pub(super) rng: Rng,
    pub(super) model: Model,
    pub(super) agenda: Agenda<Event>,
    pub(super) defect: Option<Defect>,
    pub(super) report: Report,
    pub(super) truth: Truth,
    pub(super) processes: BTreeMap<Who, Process>,
    pub(super) store: Store,
    pub(super) coordinators: Vec<Coordinator>,
    pub(super) experts: Vec<Expert>,
    pub(super) attentions: Vec<Attention>,
    pub(super) clients: Vec<Client>,
    /// Lines on which nothing gets through, by direction.
    pub(super) cuts: BTreeSet<(Who, Who)>,
    /// Calls lost, of a thousand.
    pub(super) loss: u64,
    /// The faults are over.
    pub(super) healed: bool,
    pub(super) set: super::setup::Set,
    conns: BTreeMap<u64, Conn>,
    last_id: u64,
    loud: bool,
}

/// Writes a line of the event log, when somebody reads it.
macro_rules! note {
    ($world:expr, $($what:tt)*) => {
        if $world.is_loud() { $world.write(format!($($what)*)); }
    };
}
pub(super) use note;

impl World {
    pub(super) fn new(rng: Rng, set: super::setup::Set, options: &Options) -> World {
        World {
            now: 0,
            rng,
            model: set.model,
            agenda: Agenda::default(),
            defect: options.defect,
            report: Report::default(),
            truth: Truth::default(),
            processes: BTreeMap::new(),
            store: Store::default(),
            coordinators: Vec::new(),
            experts: Vec::new(),
            attentions: Vec::new(),
            clients: Vec::new(),
            cuts: BTreeSet::new(),
            loss: 2,
            healed: false,
            set,
            conns: BTreeMap::new(),
            last_id: 0,
            loud: options.loud,
        }
    }

    pub(super) fn is_loud(&self) -> bool {
        self.loud
    }

    pub(super) fn write(&mut self, line: String) {
        let at = self.now as f64 / SEC as f64;
        self.report.log.push(format!("{at:10.6} {line}"));
    }

    pub(super) fn has(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    pub(super) fn id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn process(&self, who: Who) -> &Process {
        &self.processes[&who]
    }

    /// Runs and is not frozen.
    pub(super) fn is_well(&self, who: Who) -> bool {
        self.processes.get(&who).is_some_and(|p| p.up && !p.frozen)
    }

    fn life(&self, who: Who) -> u64 {
        self.processes.get(&who).map_or(0, |p| p.life)
    }

    pub(super) fn timer(&mut self, of: Who, after: Time, timer: Timer) {
        let life = self.life(of);
        self.agenda
            .add(self.now + after, Event::Timer { of, life, timer });
    }

    fn delay(&mut self) -> Time {
        let (least, most) = DELAY;
        let late = match self.rng.chance(LATE_PER_MILLE) {
            true => self.rng.below(LATE),
            false => 0,
        };
        self.rng.between(least, most) + late
    }

    fn is_cut(&self, from: Who, to: Who) -> bool {
        self.cuts.contains(&(from, to))
    }

    fn loses(&mut self, from: Who, to: Who) -> bool {
        self.is_cut(from, to) || self.rng.chance(self.loss)
    }

    /// One message outside of any stream; none is in the order of another.
    fn send(&mut self, from: Who, to: Who, message: Message) {
        if self.loses(from, to) {
            self.report.count("message lost");
            return;
        }
        let life = self.life(to);
        let slow = match from == Who::Store || to == Who::Store {
            true => self.store.slow,
            false => 0,
        };
        let at = self.now + self.delay() + slow;
        let twice = matches!(message, Message::Call { .. }) && self.rng.chance(TWICE_PER_MILLE);
        if twice {
            self.report.count("call duplicated");
            let at = self.now + self.delay();
            self.arrive(at, to, life, message.clone());
        }
        self.arrive(at, to, life, message);
    }

    /// Calls `to`; the answer, or that there is none within `limit`, comes to `from`.
    pub(super) fn call(&mut self, from: Who, to: Who, limit: Time, body: Call) -> u64 {
        let rpc = self.id();
        self.timer(from, limit, Timer::Timeout { rpc });
        let there = self.process(to);
        if !there.up {
            if !there.silent && !self.is_cut(from, to) && !self.is_cut(to, from) {
                self.answer(to, from, rpc, Answer::Unreachable);
            }
            return rpc;
        }
        self.send(from, to, Message::Call { rpc, from, body });
        rpc
    }

    pub(super) fn answer(&mut self, from: Who, to: Who, rpc: u64, body: Answer) {
        self.send(from, to, Message::Answer { rpc, body });
    }

    /// The store tells coordinators that something has changed; a hint may be lost.
    pub(super) fn hint(&mut self, to: Who) {
        self.send(Who::Store, to, Message::Hint);
    }

    /// Opens a stream from `server` to `client`.
    pub(super) fn open(&mut self, client: Who, server: Who, body: Open) -> u64 {
        let conn = self.id();
        let lives = (self.life(client), self.life(server));
        let last = self.now;
        self.conns.insert(
            conn,
            Conn {
                client,
                server,
                lives,
                last,
                stuck: false,
            },
        );
        let there = self.process(server);
        let (up, silent) = (there.up, there.silent);
        if !up || self.loses(client, server) {
            if silent || self.is_cut(client, server) {
                self.jam(conn);
            } else {
                self.sever(conn);
            }
            return conn;
        }
        let at = self.now + self.delay();
        let message = Message::Open { conn, body };
        self.arrive(at, server, self.life(server), message);
        conn
    }

    /// The next message of a stream. Nothing happens when it is closed.
    pub(super) fn push(&mut self, conn: u64, body: Push) {
        let Some(open) = self.conns.get_mut(&conn).filter(|conn| !conn.stuck) else {
            return;
        };
        let (client, server, last) = (open.client, open.server, open.last);
        if self.is_cut(server, client) {
            return self.jam(conn);
        }
        if self.rng.chance(self.loss) {
            // What is lost is sent again until the connection breaks.
            return self.sever(conn);
        }
        let at = (self.now + self.delay()).max(last + 1);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.last = at;
        }
        let message = Message::Push { conn, body };
        self.arrive(at, client, self.life(client), message);
    }

    /// Nothing more goes over this stream, and both ends notice after a moment.
    pub(super) fn sever(&mut self, conn: u64) {
        let Some(open) = self.conns.remove(&conn) else {
            return;
        };
        self.report.count("stream broken");
        let ends = [
            (open.client, open.lives.0, open.last),
            (open.server, open.lives.1, 0),
        ];
        for (to, life, least) in ends {
            let at = (self.now + self.delay()).max(least + 1);
            self.arrive(at, to, life, Message::Broken { conn });
        }
    }

    /// One end closes a stream: only the other one is told.
    pub(super) fn close(&mut self, conn: u64, by: Who) {
        let Some(open) = self.conns.remove(&conn) else {
            return;
        };
        let (to, life) = match by == open.client {
            true => (open.server, open.lives.1),
            false => (open.client, open.lives.0),
        };
        let at = match self.loses(by, to) {
            // The other end finds out by itself.
            true => self.now + KEEPALIVE.1,
            false => (self.now + self.delay()).max(open.last + 1),
        };
        self.arrive(at, to, life, Message::Broken { conn });
    }

    fn arrive(&mut self, at: Time, to: Who, life: u64, message: Message) {
        self.agenda.add(at, Event::Message { to, life, message });
    }

    /// Nothing gets through until the connection breaks.
    fn jam(&mut self, conn: u64) {
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.stuck = true;
        }
        self.watch_silence(conn);
    }

    fn watch_silence(&mut self, conn: u64) {
        let at = self.now + self.rng.between(KEEPALIVE.0, KEEPALIVE.1);
        self.agenda.add(at, Event::Silence { conn });
    }

    /// A line has gone dead, or a process: streams over it are closed when they have been
    /// silent for long enough.
    pub(super) fn look_at_streams(&mut self) {
        let dead: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| self.is_dead(c))
            .map(|(&id, _)| id)
            .collect();
        for conn in dead {
            self.watch_silence(conn);
        }
    }

    fn is_dead(&self, conn: &Conn) -> bool {
        let (client, server) = (conn.client, conn.server);
        let gone = |who, life| !self.is_well(who) || self.life(who) != life;
        self.is_cut(client, server)
            || self.is_cut(server, client)
            || gone(client, conn.lives.0)
            || gone(server, conn.lives.1)
    }

    /// The process ends. Its peers see refused connections, or, when its machine is gone with
    /// it, nothing at all.
    pub(super) fn kill(&mut self, who: Who, silent: bool) {
        let Some(process) = self.processes.get_mut(&who).filter(|p| p.up) else {
            return;
        };
        (process.up, process.frozen, process.silent) = (false, false, silent);
        process.life += 1;
        process.held.clear();
        note!(
            self,
            "{who:?} dies{}",
            if silent { " silently" } else { "" }
        );
        if silent {
            self.look_at_streams();
            return;
        }
        let lost = |conn: &Conn| conn.client == who || conn.server == who;
        let lost: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| lost(c))
            .map(|(&id, _)| id)
            .collect();
        for conn in lost {
            self.sever(conn);
        }
    }

    /// A new life begins.
    pub(super) fn begin(&mut self, who: Who) {
        let process = self.processes.entry(who).or_default();
        process.life += 1;
        (process.up, process.frozen, process.silent) = (true, false, false);
        process.held.clear();
        note!(self, "{who:?} starts");
    }

    pub(super) fn freeze(&mut self, who: Who) {
        if let Some(process) = self.processes.get_mut(&who).filter(|p| p.up) {
            process.frozen = true;
            note!(self, "{who:?} freezes");
            self.look_at_streams();
        }
    }

    /// Everything that was meant for it meanwhile happens now.
    pub(super) fn thaw(&mut self, who: Who) {
        let Some(process) = self.processes.get_mut(&who).filter(|p| p.frozen) else {
            return;
        };
        process.frozen = false;
        let held = std::mem::take(&mut process.held);
        note!(self, "{who:?} thaws");
        for event in held {
            self.agenda.add(self.now, event);
        }
    }

    /// Runs until the end, or until something is wrong.
    pub(super) fn run(&mut self) {
        while self.report.violation.is_none() {
            let Some((at, event)) = self.agenda.next() else {
                break;
            };
            self.now = at;
            self.report.happened(at);
            match event {
                Event::Message { to, life, message } => {
                    if self.awake(to, life, || Event::Message {
                        to,
                        life,
                        message: message.clone(),
                    }) {
                        self.deliver(to, message);
                    }
                }
                Event::Timer { of, life, timer } => {
                    if self.awake(of, life, || Event::Timer {
                        of,
                        life,
                        timer: timer.clone(),
                    }) {
                        self.ring(of, timer);
                    }
                }
                Event::Silence { conn } => {
                    if self
                        .conns
                        .get(&conn)
                        .is_some_and(|c| c.stuck || self.is_dead(c))
                    {
                        self.sever(conn);
                    }
                }
                Event::Fault(fault) => self.strike(fault),
                Event::Client(at) => self.ask(at),
                Event::Heal => self.heal(),
                Event::End => {
                    self.check_liveness();
                    break;
                }
            }
            self.check_always();
        }
        self.report.virtual_time = self.now;
    }

    /// Whether the process hears of an event now.
    fn awake(&mut self, who: Who, life: u64, event: impl FnOnce() -> Event) -> bool {
        let Some(process) = self
            .processes
            .get_mut(&who)
            .filter(|p| p.up && p.life == life)
        else {
            return false;
        };
        if process.frozen {
            process.held.push(event());
        }
        !process.frozen
    }

    fn deliver(&mut self, to: Who, message: Message) {
        match (to, message) {
            (Who::Store, Message::Call { rpc, from, body }) => self.store_call(rpc, from, body),
            (Who::Coordinator(at), message) => self.coordinator_message(at, message),
            (Who::Expert(at), message) => self.expert_message(at, message),
            (Who::Attention(at), message) => self.attention_message(at, message),
            (Who::Store, _) => {}
        }
    }

    fn ring(&mut self, of: Who, timer: Timer) {
        if let Timer::Timeout { rpc } = timer {
            self.deliver(
                of,
                Message::Answer {
                    rpc,
                    body: Answer::TimedOut,
                },
            );
            return;
        }
        match of {
            Who::Coordinator(at) => self.coordinator_timer(at, timer),
            Who::Expert(at) => self.expert_timer(at, timer),
            Who::Attention(at) => self.attention_timer(at, timer),
            Who::Store => {}
        }
    }
}
