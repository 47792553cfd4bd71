//! Random histories of a cluster that migrates: nodes copy, fail, die, come and
//! go, leaders change. What must hold holds after every event, and once faults
//! stop everything comes to an end.
#![allow(clippy::unwrap_used)]

mod members;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use guild_scheduler::membership::{
    BACK_OFF, Membership, Phase, Registration, Report, Role, Settings,
};
use guild_scheduler::placement::{NodeId, NodeSlots};
use members::{DIGEST, ready, registration};
use proptest::prelude::*;

const LEASE: Duration = Duration::from_secs(3);
const SETTLE: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(10);
const LAYERS: [u32; 2] = [1, 2];
const EXPERTS: u32 = 5;

type Slots = BTreeSet<(u32, u32)>;

#[derive(Clone, Debug)]
enum Event {
    Join {
        name: u8,
        capacity: u64,
    },
    /// A node hears the news and does what they say.
    Hear {
        node: u8,
    },
    Attend {
        name: u8,
    },
    Fail {
        node: u8,
    },
    Die {
        node: u8,
    },
    Leave {
        node: u8,
    },
    Wait {
        ms: u64,
    },
    Move {
        seed: u64,
    },
    Drain {
        node: u8,
        undo: bool,
    },
    Serve,
    NewLeader,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0u8..5, 0u64..3).prop_map(|(name, room)| Event::Join { name, capacity: [0, 9, 14][room as usize] }),
        14 => (0u8..8).prop_map(|node| Event::Hear { node }),
        1 => (0u8..3).prop_map(|name| Event::Attend { name }),
        2 => (0u8..8).prop_map(|node| Event::Fail { node }),
        1 => (0u8..8).prop_map(|node| Event::Die { node }),
        1 => (0u8..8).prop_map(|node| Event::Leave { node }),
        4 => (0u64..1500).prop_map(|ms| Event::Wait { ms }),
        4 => any::<u64>().prop_map(|seed| Event::Move { seed }),
        1 => (0u8..8, any::<bool>()).prop_map(|(node, undo)| Event::Drain { node, undo }),
        1 => Just(Event::Serve),
        1 => Just(Event::NewLeader),
    ]
}

/// A process, as it would be: it knows what it has heard.
#[derive(Clone, Debug)]
struct Process {
    role: Role,
    incarnation: u64,
    capacity: u64,
    /// What is in memory, by epoch.
    tables: BTreeMap<u64, Slots>,
    been_active: BTreeSet<u64>,
    epoch: u64,
    alive: bool,
}

impl Process {
    fn memory(&self) -> usize {
        self.tables
            .values()
            .flatten()
            .collect::<BTreeSet<_>>()
            .len()
    }
}

struct World {
    m: Membership,
    settings: Settings,
    now: Duration,
    processes: BTreeMap<NodeId, Process>,
    incarnations: u64,
    /// Every epoch seen, and what it was.
    epochs: BTreeMap<u64, Vec<NodeSlots>>,
    withdrawn: BTreeSet<u64>,
    active: Option<(u64, Vec<NodeSlots>)>,
    oldest: u64,
}

impl World {
    fn new(replicas: u32) -> World {
        let settings = Settings {
            model_digest: DIGEST.into(),
            layers: LAYERS.to_vec(),
            experts: EXPERTS,
            slot_bytes: 10,
            lease: LEASE,
            settle: SETTLE,
            min_expert_nodes: 1,
            replicas,
            redundant_experts: 0,
            copy_deadline: DEADLINE,
        };
        World {
            m: Membership::new(settings.clone(), Duration::ZERO),
            settings,
            now: Duration::ZERO,
            processes: BTreeMap::new(),
            incarnations: 0,
            epochs: BTreeMap::new(),
            withdrawn: BTreeSet::new(),
            active: None,
            oldest: 0,
        }
    }

    fn pick(&self, index: u8) -> Option<NodeId> {
        let all: Vec<NodeId> = self.m.nodes().map(|node| node.id).collect();
        (!all.is_empty()).then(|| all[index as usize % all.len()])
    }

    fn join(&mut self, role: Role, name: String, capacity: u64) {
        if self.m.nodes().any(|node| node.name == name) {
            return;
        }
        self.incarnations += 1;
        let new = Registration {
            capacity_bytes: capacity * 10,
            ..registration(role, &name, self.incarnations)
        };
        let id = self.m.register(self.now, new).unwrap();
        self.processes.insert(
            id,
            Process {
                role,
                incarnation: self.incarnations,
                capacity,
                tables: BTreeMap::new(),
                been_active: BTreeSet::new(),
                epoch: 0,
                alive: true,
            },
        );
    }

    /// What a node does with what it is told, in this order: free, then copy.
    fn hear(&mut self, id: NodeId, fails: bool) {
        let Some(process) = self.processes.get_mut(&id).filter(|process| process.alive) else {
            return;
        };
        let (active, next) = (self.m.active(), self.m.next());
        let mut failed = None;
        match process.role {
            Role::Attention => {
                if let Some(active) = active {
                    process.epoch = active.placement.epoch();
                }
            }
            Role::Expert => {
                let newest = next.map_or(0, |next| next.placement.epoch());
                process
                    .been_active
                    .extend(active.map(|p| p.placement.epoch()));
                let been_active = process.been_active.clone();
                let oldest = self.m.oldest_epoch();
                process.tables.retain(|epoch, _| {
                    *epoch >= oldest && been_active.contains(epoch) || *epoch == newest
                });
                for told in [active, next].into_iter().flatten() {
                    let epoch = told.placement.epoch();
                    let mut nodes = told.placement.nodes().iter();
                    let mine = nodes.find(|slots| slots.node == id);
                    let slots: Slots = mine.into_iter().flat_map(|n| n.slots.clone()).collect();
                    if fails && next.is_some_and(|next| next.placement.epoch() == epoch) {
                        failed = Some((epoch, "disk".to_owned()));
                    } else {
                        process.epoch = process.epoch.max(epoch);
                    }
                    process.tables.insert(epoch, slots);
                }
                if process.capacity > 0 {
                    assert!(
                        process.memory() as u64 <= process.capacity,
                        "node {id} holds {:?}, room for {}; {:?}",
                        process.tables,
                        process.capacity,
                        self.m
                    );
                }
                if let Some((epoch, _)) = &failed {
                    process.tables.remove(epoch);
                }
            }
        }
        let report = Report {
            failed,
            ..ready(process.epoch)
        };
        let incarnation = process.incarnation;
        let _ = self.m.heartbeat(self.now, id, incarnation, report);
    }

    /// Everybody alive says that it is, and nothing new.
    fn wait(&mut self, time: Duration) {
        self.now += time;
        for (&id, process) in &self.processes {
            if process.alive {
                let report = Report {
                    epoch: process.epoch,
                    ready: process.epoch > 0,
                    ..Report::default()
                };
                let _ = self.m.heartbeat(self.now, id, process.incarnation, report);
            }
        }
        self.m.tick(self.now);
    }

    /// Moves some experts of the active placement about.
    fn target(&self, mut seed: u64) -> Option<Vec<NodeSlots>> {
        let mut target = self.m.active()?.placement.nodes().to_vec();
        let mut draw = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below.max(1)
        };
        for node in self.m.nodes().filter(|node| node.role == Role::Expert) {
            if !target.iter().any(|slots| slots.node == node.id) {
                target.push(NodeSlots {
                    node: node.id,
                    slots: Vec::new(),
                });
            }
        }
        for _ in 0..draw(8) + 1 {
            let (from, to) = (draw(target.len()), draw(target.len()));
            if target[from].slots.is_empty() {
                continue;
            }
            let slot = target[from].slots[draw(target[from].slots.len())];
            if !target[to].slots.contains(&slot) {
                if draw(4) > 0 {
                    target[from].slots.retain(|other| *other != slot);
                }
                target[to].slots.push(slot);
            }
        }
        target.retain(|node| !node.slots.is_empty());
        Some(target)
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Join { name, capacity } => self.join(Role::Expert, format!("x{name}"), capacity),
            Event::Attend { name } => self.join(Role::Attention, format!("a{name}"), 0),
            Event::Hear { node } => self
                .pick(node)
                .into_iter()
                .for_each(|id| self.hear(id, false)),
            Event::Fail { node } => self
                .pick(node)
                .into_iter()
                .for_each(|id| self.hear(id, true)),
            Event::Die { node } => {
                let id = self.pick(node);
                if let Some(process) = id.and_then(|id| self.processes.get_mut(&id)) {
                    process.alive = false;
                }
            }
            Event::Leave { node } => {
                if let Some(id) = self.pick(node) {
                    self.processes.get_mut(&id).unwrap().alive = false;
                    let incarnation = self.processes[&id].incarnation;
                    self.m.leave(self.now, id, incarnation).unwrap();
                }
            }
            Event::Wait { ms } => self.wait(Duration::from_millis(ms)),
            Event::Move { seed } => {
                if let Some(target) = self.target(seed) {
                    let _ = self.m.migrate(self.now, target, "balance");
                }
            }
            Event::Drain { node, undo } => {
                let name = self
                    .pick(node)
                    .map(|id| self.m.node(id).unwrap().name.clone());
                if let Some(name) = name {
                    let _ = self.m.drain_node(self.now, &name, undo);
                }
            }
            Event::Serve => self.m.mark_served(),
            Event::NewLeader => {
                let bytes = serde_json::to_vec(&self.m.snapshot()).unwrap();
                let mut new = Membership::new(self.settings.clone(), self.now);
                new.resume(self.now, &serde_json::from_slice(&bytes).unwrap())
                    .unwrap();
                self.m = new;
            }
        }
    }

    /// What must hold after every event.
    fn check(&mut self) {
        let m = &self.m;
        for published in [m.active(), m.next()].into_iter().flatten() {
            let epoch = published.placement.epoch();
            let newest = self.epochs.keys().last().copied().unwrap_or(0);
            let known = self.epochs.entry(epoch).or_insert_with(|| {
                assert!(epoch > newest, "epochs only grow");
                published.placement.nodes().to_vec()
            });
            assert_eq!(
                known,
                published.placement.nodes(),
                "an epoch is one placement"
            );
            assert!(
                !self.withdrawn.contains(&epoch),
                "a withdrawn epoch is back"
            );
            assert!(published.placement.covers(&LAYERS, EXPERTS));
        }
        let gone = m.withdrawn();
        assert!(gone.is_none() || m.next().map(|n| n.placement.epoch()) != gone);
        self.withdrawn.extend(gone);
        assert!(
            m.oldest_epoch() >= self.oldest,
            "the oldest epoch only grows"
        );
        self.oldest = m.oldest_epoch();
        // No attention node that takes part sends by an epoch that is gone, unless
        // it was so when it joined.
        let active = m
            .active()
            .map(|p| (p.placement.epoch(), p.placement.nodes().to_vec()));
        match (&self.active, &active) {
            (Some((_, was)), None) => {
                // Only losses take the last home of an expert away, and then
                // one whose homes were all on lost nodes.
                let dead = |id: &NodeId| m.node(*id).is_none();
                let lost = LAYERS.iter().any(|&layer| {
                    (0..EXPERTS).any(|expert| {
                        let homes = was.iter().filter(|n| n.slots.contains(&(layer, expert)));
                        { homes }.all(|n| dead(&n.node))
                    })
                });
                assert!(lost, "an expert has lost its last home, and no node did");
            }
            (_, Some((epoch, nodes))) => {
                assert!(m.oldest_epoch() <= *epoch);
                for node in nodes {
                    let process = &self.processes[&node.node];
                    let own: Slots = node.slots.iter().copied().collect();
                    let held = process.tables.values().any(|table| own.is_subset(table));
                    assert!(held, "node {} is active with what it has not", node.node);
                }
            }
            _ => {}
        }
        self.active = active;
        self.m.take_actions();
    }

    /// Faults stop, everybody hears everything: how it ends.
    fn calm(&mut self) {
        self.join(Role::Expert, "big".into(), 0);
        for _ in 0..400 {
            self.wait(SETTLE);
            let ids: Vec<NodeId> = self.m.nodes().map(|node| node.id).collect();
            for id in ids {
                self.hear(id, false);
                self.check();
            }
        }
        self.wait(BACK_OFF);
        let m = &self.m;
        assert!(m.active().is_some(), "{:?}", m.waiting_for());
        assert_eq!(m.migration().phase, Phase::Idle, "{:?}", m.migration());
        assert!(m.next().is_none(), "{m:?}");
        assert_eq!(Some(m.oldest_epoch()), m.active_epoch());
        for (id, process) in &self.processes {
            assert!(
                !process.alive
                    || process.role == Role::Attention
                    || process.tables.len() == 1
                    || m.node(*id).is_none()
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn whatever_happens_no_migration_breaks_a_promise_and_all_end(
        replicas in 1u32..3, events in prop::collection::vec(event(), 1..150),
    ) {
        let mut world = World::new(replicas);
        for name in 0..3 {
            world.join(Role::Expert, format!("x{name}"), 0);
        }
        world.join(Role::Attention, "a0".into(), 0);
        world.wait(SETTLE);
        for id in 1..=4 {
            world.hear(id, false);
        }
        for event in events {
            world.apply(event);
            world.check();
        }
        world.calm();
    }
}
