//! An expert node: slot tables by epoch, copies that are fetched, checked and tried, memory that
//! is counted. A model of `expert-node`: it loads one epoch after the other, keeps the tables that
//! somebody may still route by, and reports what it cannot load.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use guild_scheduler::membership::{Measured, Role};

use super::Defect;
use super::arithmetic::{Key, expert, weight};
use super::event::{MS, SEC, Time, Who};
use super::message::{Answer, Call, Message, State, Timer, Wire};
use super::relay::index_of;
use super::session::Session;
use super::world::{World, note};

/// Bytes of one expert.
pub(super) const SLOT_BYTES: u64 = 1 << 20;
/// What an expert takes from disk and over the wire: between these.
const READ: (Time, Time) = (5 * MS, 120 * MS);
/// What rows take.
const EXECUTE: (Time, Time) = (300, 3 * MS);
const FETCH_TIMEOUT: Time = 2 * SEC;
/// A peer that has failed so often for one expert is left for the disk.
const FETCH_ATTEMPTS: u32 = 2;
/// How long a process that ended by itself is away.
const RESTART: (Time, Time) = (SEC, 3 * SEC);

/// What goes wrong at a node for a while.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trouble {
    /// The disk cannot be read.
    pub(super) disk: bool,
    /// Of a thousand copies so many arrive changed, or fail in the canary.
    pub(super) copies: u64,
    /// Rows take so many times as long.
    pub(super) slow: u64,
}

/// One expert node process.
#[derive(Debug)]
pub(super) struct Expert {
    pub(super) session: Session,
    /// Slots there is room for; 0: any number.
    pub(super) capacity: u64,
    /// What is in memory: the weights that are really there.
    pub(super) memory: BTreeMap<Key, u64>,
    /// Slot tables by epoch.
    pub(super) tables: BTreeMap<u64, Vec<Key>>,
    /// Epochs whose tables it has had.
    had: BTreeSet<u64>,
    load: Option<Load>,
    tried: u64,
    epoch: u64,
    stamp: u64,
    pub(super) trouble: Trouble,
}

/// An epoch being loaded.
#[derive(Debug)]
struct Load {
    epoch: u64,
    slots: Vec<Key>,
    step: CopyStep,
    key: Key,
    failures: u32,
    rpc: Option<u64>,
    source: Option<(usize, u64, u32)>,
    weight: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum CopyStep {
    Fetch,
    Disk,
    Canary,
}

impl Expert {
    pub(super) fn new(at: usize, capacity: u64, domain: String, incarnation: u64) -> Expert {
        let bytes = capacity * SLOT_BYTES;
        Expert {
            session: Session::new(
                Role::Expert,
                format!("expert-{at}"),
                domain,
                bytes,
                incarnation,
            ),
            capacity,
            memory: BTreeMap::new(),
            tables: BTreeMap::new(),
            had: BTreeSet::new(),
            load: None,
            tried: 0,
            epoch: 0,
            stamp: 0,
            trouble: Trouble::default(),
        }
    }

    pub(super) fn is_loading(&self) -> bool {
        self.load.is_some()
    }

    fn is_full(&self) -> bool {
        self.capacity > 0 && self.memory.len() as u64 >= self.capacity
    }

    /// The active placement lists it by its present id.
    fn is_active_member(&self) -> bool {
        let active = self.session.active.as_ref();
        let mut nodes = active.iter().flat_map(|active| active.placement.nodes());
        nodes.any(|slots| Some(slots.node) == self.session.id)
    }

    /// Lets go of experts that no table and no load needs.
    fn sweep(&mut self) {
        let mut used: BTreeSet<Key> = self.tables.values().flatten().copied().collect();
        used.extend(self.load.iter().flat_map(|load| load.slots.iter().copied()));
        self.memory.retain(|key, _| used.contains(key));
    }
}

impl World {
    pub(super) fn start_expert(&mut self, at: usize) {
        self.begin(Who::Expert(at));
        let (capacity, domain) = self.set.experts[at].clone();
        let (incarnation, trouble) = (self.id(), self.experts[at].trouble);
        self.experts[at] = Expert {
            trouble,
            ..Expert::new(at, capacity, domain, incarnation)
        };
        self.join(Who::Expert(at));
    }

    pub(super) fn expert_message(&mut self, at: usize, message: Message) {
        let who = Who::Expert(at);
        match message {
            Message::Answer { rpc, body } if !self.session_answer(who, rpc, &body) => {
                self.copy_answer(at, rpc, body);
            }
            Message::Push { conn, body } if self.session_push(who, conn, &body) => {
                self.adopt(at);
            }
            Message::Broken { conn } => self.session_broken(who, conn),
            Message::Call { rpc, from, body } => {
                let answer = match body {
                    Call::Frame { epoch, rows } => self.execute(at, epoch, &rows),
                    Call::Fetch { epoch, slot } => self.blob(at, epoch, slot),
                    _ => Answer::Refused,
                };
                let slow = self.experts[at].trouble.slow.max(1);
                let after = self.rng.between(EXECUTE.0, EXECUTE.1) * slow;
                self.timer(
                    who,
                    after,
                    Timer::Executed {
                        rpc,
                        to: from,
                        answer,
                    },
                );
            }
            _ => {}
        }
    }

    fn slot(&self, at: usize, epoch: u64, slot: u32) -> Result<Key, Answer> {
        let node = &self.experts[at];
        let table = node.tables.get(&epoch);
        let answers_anything = self.has(Defect::AnswersAnUnknownEpoch);
        let table = table.or_else(|| node.tables.values().last().filter(|_| answers_anything));
        let table = table.ok_or(Answer::UnknownEpoch)?;
        table.get(slot as usize).copied().ok_or(Answer::UnknownSlot)
    }

    /// Runs rows, all or none.
    fn execute(&mut self, at: usize, epoch: u64, rows: &[(u32, u64)]) -> Answer {
        if self.now >= self.experts[at].session.lease_until() {
            self.report.count("rows answered without a lease");
        }
        let mut out = Vec::with_capacity(rows.len());
        for &(slot, row) in rows {
            let key = match self.slot(at, epoch, slot) {
                Ok(key) => key,
                Err(refused) => {
                    if self.experts[at].had.contains(&epoch) {
                        self.check_freed(at, epoch);
                    }
                    return refused;
                }
            };
            let Some(&weight) = self.experts[at].memory.get(&key) else {
                self.report.wrong(format!(
                    "Expert({at}) has a table of epoch {epoch} without {key:?} in memory"
                ));
                return Answer::Refused;
            };
            out.push(expert(weight, row));
        }
        Answer::Rows(out)
    }

    fn blob(&mut self, at: usize, epoch: u64, slot: u32) -> Answer {
        match self.slot(at, epoch, slot) {
            Ok(key) => {
                let digest = self.experts[at].memory.get(&key).copied().unwrap_or(0);
                let spoilt = self.rng.chance(self.experts[at].trouble.copies);
                Answer::Blob {
                    weight: digest ^ u64::from(spoilt),
                    digest,
                }
            }
            Err(refused) => refused,
        }
    }

    pub(super) fn expert_timer(&mut self, at: usize, timer: Timer) {
        let who = Who::Expert(at);
        if self.session_timer(who, &timer) {
            return;
        }
        match timer {
            Timer::Copied { stamp } if stamp == self.experts[at].stamp => self.disk_read(at),
            Timer::Executed { rpc, to, answer } => self.answer(who, to, rpc, answer),
            Timer::Goodbye { away } => self.goodbye(who, away),
            _ => {}
        }
    }

    /// Follows what the coordinator has told: drops what was withdrawn or is no longer used,
    /// loads what is new.
    fn adopt(&mut self, at: usize) {
        let node = &mut self.experts[at];
        let (active, newest) = (node.session.active.clone(), node.session.placement.clone());
        let epoch = newest.as_ref().map_or(0, |p| p.epoch());
        if let Some(load) = node.load.take_if(|load| load.epoch != epoch) {
            note!(self, "Expert({at}) loads epoch {} no longer", load.epoch);
            self.report.count("load given up");
            let node = &mut self.experts[at];
            // Wanted again, it is tried again; withdrawn, it never is.
            node.tried = node.tried.min(load.epoch.saturating_sub(1)).max(node.epoch);
            node.stamp += 1;
        }
        // First what is active: its experts are here, and what is dropped after that is not of it.
        for placement in [active, newest].into_iter().flatten() {
            let node = &self.experts[at];
            if placement.epoch() > node.tried && node.load.is_none() {
                self.load(at, &placement, placement.epoch() == epoch);
            }
        }
        self.forget(at);
        self.measure(at);
    }

    /// Drops tables that nobody routes by, and those of withdrawn epochs.
    fn forget(&mut self, at: usize) {
        let early = self.has(Defect::FreesBeforeTheDrain);
        let node = &mut self.experts[at];
        let Some(active) = node.session.active.clone() else {
            return;
        };
        if !node.tables.contains_key(&active.epoch()) {
            return;
        }
        let oldest = if early { active.epoch() } else { active.oldest };
        let newest = node.session.placement.as_ref().map_or(0, |p| p.epoch());
        let had = node.tables.len();
        node.tables
            .retain(|&epoch, _| epoch >= oldest && (epoch <= active.epoch() || epoch == newest));
        let freed = had - node.tables.len();
        node.sweep();
        if freed > 0 {
            self.report.count("old table freed");
        }
    }

    fn load(&mut self, at: usize, placement: &Arc<Wire>, newest: bool) {
        let node = &mut self.experts[at];
        let slots = placement
            .slots_of(&node.session.name)
            .unwrap_or_default()
            .to_vec();
        let epoch = placement.epoch();
        let missing = slots
            .iter()
            .copied()
            .find(|key| !node.memory.contains_key(key));
        match missing {
            None => self.resident(at, epoch, slots),
            // Something newer is wanted instead.
            Some(_) if !newest => {}
            Some(key) => {
                note!(self, "Expert({at}) loads epoch {epoch}");
                if self.has(Defect::ReportsBeforeItHasLoaded) {
                    self.say(Who::Expert(at), |said| {
                        (said.epoch, said.ready) = (epoch, true);
                    });
                }
                let node = &mut self.experts[at];
                let (step, source) = (CopyStep::Disk, None);
                node.load = Some(Load {
                    epoch,
                    slots,
                    step,
                    key,
                    failures: 0,
                    rpc: None,
                    source,
                    weight: 0,
                });
                self.copy_next(at);
            }
        }
    }

    /// The next expert of the load: from a peer that has it in the active placement, else from disk.
    fn copy_next(&mut self, at: usize) {
        let who = Who::Expert(at);
        let node = &mut self.experts[at];
        let Some(load) = &mut node.load else { return };
        let missing = load
            .slots
            .iter()
            .copied()
            .find(|key| !node.memory.contains_key(key));
        let Some(key) = missing else {
            let Some(load) = node.load.take() else { return };
            return self.resident(at, load.epoch, load.slots);
        };
        if load.key != key {
            (load.key, load.failures) = (key, 0);
        }
        let (epoch, tries) = (load.epoch, load.failures);
        if node.is_full() && !node.is_active_member() {
            // Whoever counts on this node now does not know of what it holds from before.
            let had = node.tables.len();
            node.tables.retain(|&table, _| table >= epoch);
            node.had.retain(|&table| table >= epoch);
            if node.tables.len() < had {
                self.report
                    .count("old tables make room after joining again");
            }
            node.sweep();
        }
        if node.is_full() {
            // Not a defect by itself: nodes die and come between a plan and its execution.
            self.report.count("no room for a copy");
            return self.load_failed(at, "no room", false);
        }
        let active = node
            .session
            .active
            .clone()
            .filter(|a| a.state == State::Active);
        let name = node.session.name.clone();
        let homes = active.iter().flat_map(|a| {
            a.placement
                .resolve(key.0, key.1)
                .iter()
                .map(|home| (a.clone(), *home))
        });
        let peers = homes.filter_map(|(active, (id, slot))| {
            let peer = active.name_of(id).filter(|peer| *peer != name)?;
            Some((index_of(peer)?, active.epoch(), slot))
        });
        let peers: Vec<_> = peers.collect();
        if tries < FETCH_ATTEMPTS && !peers.is_empty() {
            let source = peers[tries as usize % peers.len()];
            let (peer, epoch, slot) = source;
            let rpc = self.call(
                who,
                Who::Expert(peer),
                FETCH_TIMEOUT,
                Call::Fetch { epoch, slot },
            );
            if let Some(load) = &mut self.experts[at].load {
                (load.step, load.rpc, load.source) = (CopyStep::Fetch, Some(rpc), Some(source));
            }
            return;
        }
        let pause = self.rng.between(READ.0, READ.1);
        let node = &mut self.experts[at];
        node.stamp += 1;
        let stamp = node.stamp;
        if let Some(load) = &mut node.load {
            (load.step, load.rpc) = (CopyStep::Disk, None);
        }
        self.timer(who, pause, Timer::Copied { stamp });
    }

    fn disk_read(&mut self, at: usize) {
        if self.experts[at].trouble.disk {
            self.report.count("disk read failed");
            return self.load_failed(at, "the disk cannot be read", true);
        }
        let Some(key) = self.experts[at].load.as_ref().map(|load| load.key) else {
            return;
        };
        self.report.count("expert read from disk");
        self.store_copy(at, key, weight(key));
    }

    fn store_copy(&mut self, at: usize, key: Key, weight: u64) {
        self.experts[at].memory.insert(key, weight);
        // Whoever waits for this load sees it go on.
        self.measure(at);
        self.copy_next(at);
    }

    fn copy_answer(&mut self, at: usize, rpc: u64, answer: Answer) {
        let who = Who::Expert(at);
        let Some(load) = self.experts[at]
            .load
            .as_mut()
            .filter(|load| load.rpc == Some(rpc))
        else {
            return;
        };
        load.rpc = None;
        let (key, step, source, copied) = (load.key, load.step, load.source, load.weight);
        let (canary, skips) = (u64::from(key.1) ^ 0xca9a, self.has(Defect::SkipsTheDigest));
        match (step, answer, source) {
            (CopyStep::Fetch, Answer::Blob { weight, digest }, Some((peer, epoch, slot))) => {
                if weight != digest && !skips {
                    self.report.count("copy with a wrong digest");
                    return self.copy_failed(at);
                }
                let rows = vec![(slot, canary)];
                let rpc = self.call(
                    who,
                    Who::Expert(peer),
                    FETCH_TIMEOUT,
                    Call::Frame { epoch, rows },
                );
                if let Some(load) = &mut self.experts[at].load {
                    (load.step, load.rpc, load.weight) = (CopyStep::Canary, Some(rpc), weight);
                }
            }
            (CopyStep::Canary, Answer::Rows(rows), _) => {
                if rows != [expert(copied, canary)] && !skips {
                    self.report.count("canary row differs");
                    return self.copy_failed(at);
                }
                self.report.count("expert copied from a peer");
                self.store_copy(at, key, copied);
            }
            _ => {
                self.report.count("copy source failed");
                self.copy_failed(at);
            }
        }
    }

    fn copy_failed(&mut self, at: usize) {
        if let Some(load) = &mut self.experts[at].load {
            load.failures += 1;
        }
        self.copy_next(at);
    }

    /// The epoch cannot be loaded. A node that has none and cannot read goes and comes again; others go on
    /// with what they have and say so.
    fn load_failed(&mut self, at: usize, why: &str, fatal: bool) {
        let node = &mut self.experts[at];
        let Some(load) = node.load.take() else { return };
        let (epoch, ends) = (load.epoch, fatal && node.epoch == 0);
        (node.tried, node.stamp) = (epoch, node.stamp + 1);
        node.sweep();
        note!(self, "Expert({at}) cannot load epoch {epoch}: {why}");
        let who = Who::Expert(at);
        if ends {
            self.leave(who);
            let away = self.rng.between(RESTART.0, RESTART.1);
            self.timer(who, 50 * MS, Timer::Goodbye { away });
            return;
        }
        self.report.count("epoch failed at a node");
        let failed = Some((epoch, why.to_owned()));
        self.say(who, |said| said.failed = failed);
        self.measure(at);
    }

    fn resident(&mut self, at: usize, epoch: u64, slots: Vec<Key>) {
        note!(self, "Expert({at}) has epoch {epoch} resident: {slots:?}");
        let node = &mut self.experts[at];
        node.tables.insert(epoch, slots);
        node.had.insert(epoch);
        (node.tried, node.epoch) = (epoch, epoch);
        node.sweep();
        self.forget(at);
        self.measure(at);
        self.say(Who::Expert(at), |said| {
            (said.epoch, said.ready) = (epoch, true)
        });
    }

    fn measure(&mut self, at: usize) {
        let node = &self.experts[at];
        let resident = node.memory.len() as u64 * SLOT_BYTES;
        let total = node.capacity * SLOT_BYTES;
        let measured = Measured {
            rows_per_second: 1000.0 / node.trouble.slow.max(1) as f64,
            resident_bytes: resident,
            free_bytes: (total > 0).then(|| total.saturating_sub(resident)),
        };
        self.measured(Who::Expert(at), measured);
    }
}
