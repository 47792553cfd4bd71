//! Migrations as transactions of the membership: every way in, every way back.
#![allow(clippy::unwrap_used)]

mod members;

use std::time::Duration;

use guild_scheduler::membership::{
    Action, BACK_OFF, DrainError, Measured, Membership, MigrateError, Outcome, Phase, Registration,
    Report, Role, Settings, Snapshot,
};
use guild_scheduler::placement::{NodeId, NodeSlots, Placement};
use members::{DIGEST, ready, registration};

const LEASE: Duration = Duration::from_secs(300);
const SETTLE: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(10);
const EXPERTS: u32 = 6;

fn settings(replicas: u32) -> Settings {
    Settings {
        model_digest: DIGEST.into(),
        layers: vec![1, 2],
        experts: EXPERTS,
        slot_bytes: 100,
        lease: LEASE,
        settle: SETTLE,
        min_expert_nodes: 1,
        replicas,
        redundant_experts: 0,
        copy_deadline: DEADLINE,
    }
}

/// A serving cluster: expert nodes x, y, z (ids 1 to 3) and attention node a (4).
struct Cluster {
    m: Membership,
    now: Duration,
}

impl Cluster {
    fn serving(replicas: u32, capacity_slots: u64) -> Cluster {
        let mut c = Cluster {
            m: Membership::new(settings(replicas), Duration::ZERO),
            now: Duration::ZERO,
        };
        for name in ["x", "y", "z"] {
            c.join(Role::Expert, name, capacity_slots);
        }
        c.join(Role::Attention, "a", 0);
        c.wait(SETTLE);
        let epoch = c.m.next().unwrap().placement.epoch();
        for id in [1, 2, 3, 4] {
            c.beat(id, epoch);
        }
        c.m.mark_served();
        c.m.take_actions();
        assert_eq!(c.m.waiting_for(), None);
        assert_eq!(c.m.oldest_epoch(), epoch);
        c
    }

    fn join(&mut self, role: Role, name: &str, capacity_slots: u64) -> NodeId {
        let new = Registration {
            capacity_bytes: capacity_slots * 100,
            ..registration(role, name, u64::from(name.as_bytes()[0]))
        };
        self.m.register(self.now, new).unwrap()
    }

    fn report(&mut self, id: NodeId, report: Report) {
        let incarnation = u64::from(self.m.node(id).unwrap().name.as_bytes()[0]);
        self.m.heartbeat(self.now, id, incarnation, report).unwrap();
    }

    fn beat(&mut self, id: NodeId, epoch: u64) {
        let report = ready(epoch);
        self.report(id, report);
    }

    fn fail(&mut self, id: NodeId, epoch: u64) {
        let report = Report {
            failed: Some((epoch, "digests differ".into())),
            ..ready(self.m.active_epoch().unwrap_or(0))
        };
        self.report(id, report);
    }

    fn leave(&mut self, id: NodeId) {
        let incarnation = u64::from(self.m.node(id).unwrap().name.as_bytes()[0]);
        self.m.leave(self.now, id, incarnation).unwrap();
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.m.tick(self.now);
    }

    fn active(&self) -> &Placement {
        &self.m.active().unwrap().placement
    }

    fn loading(&self) -> u64 {
        self.m.next().unwrap().placement.epoch()
    }

    /// The active placement with the first expert of node 1 on node 2 instead.
    fn elsewhere(&self) -> Vec<NodeSlots> {
        let mut target = self.active().nodes().to_vec();
        let from = target.iter().position(|n| n.node == 1).unwrap();
        let to = target.iter().position(|n| n.node == 2).unwrap();
        let moved = target[from].slots.iter();
        let moved = { moved }.position(|slot| !target[to].slots.contains(slot));
        let slot = target[from].slots.remove(moved.unwrap());
        target[to].slots.push(slot);
        target
    }

    /// All expert nodes have loaded what is LOADING.
    fn loaded(&mut self) -> u64 {
        let epoch = self.loading();
        let next = self.m.next().unwrap().placement.nodes().to_vec();
        for slots in next {
            self.beat(slots.node, epoch);
        }
        assert_eq!(self.m.active_epoch(), Some(epoch));
        epoch
    }

    fn ended(&mut self) -> Option<Outcome> {
        let actions = self.m.take_actions();
        actions.into_iter().find_map(|action| match action {
            Action::MigrationEnded { outcome, .. } => Some(outcome),
            _ => None,
        })
    }

    fn reason(&mut self) -> String {
        match self.ended() {
            Some(Outcome::RolledBack(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }
}

fn sorted(nodes: &[NodeSlots]) -> Vec<NodeSlots> {
    let mut nodes = nodes.to_vec();
    for node in &mut nodes {
        node.slots.sort_unstable();
    }
    nodes
}

#[test]
fn an_expert_moves_behind_the_active_placement_and_the_old_one_is_freed_last() {
    let mut c = Cluster::serving(1, 0);
    let (first, target) = (c.active().epoch(), c.elsewhere());
    let migration = c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let epoch = c.loading();
    assert!(epoch > first);
    assert_eq!(c.m.active_epoch(), Some(first), "serving goes on as it was");
    let status = c.m.migration().clone();
    assert_eq!(
        (status.migration, status.phase, status.epoch),
        (migration, Phase::Copying, epoch)
    );
    assert_eq!(
        (status.copies_done, status.copies, status.bytes),
        (0, 1, 100)
    );
    assert_eq!(status.cause, "balance");
    c.beat(2, epoch);
    assert_eq!(
        c.m.active_epoch(),
        Some(first),
        "not before every node has it"
    );
    c.loaded();
    assert_eq!(c.m.migration().phase, Phase::Draining);
    assert_eq!(
        c.m.oldest_epoch(),
        first,
        "an attention node still sends by the old one"
    );
    assert_eq!(c.m.waiting_for(), None);
    c.m.take_actions();
    c.beat(4, epoch);
    assert_eq!(c.m.oldest_epoch(), epoch);
    let actions = c.m.take_actions();
    assert!(actions.contains(&Action::Publish));
    assert!(actions.contains(&Action::MigrationEnded {
        migration,
        outcome: Outcome::Completed
    }));
    assert_eq!(sorted(c.active().nodes()), sorted(&target));
    let status = c.m.migration();
    assert_eq!(
        (status.phase, status.completed, status.copies_done),
        (Phase::Idle, 1, 1)
    );
    assert_eq!(
        c.m.migrate(c.now, target, "balance"),
        Err(MigrateError::Nothing)
    );
}

#[test]
fn full_nodes_exchange_experts_in_steps_and_each_waits_for_the_one_before_to_be_freed() {
    // 12 experts on 3 nodes with room for 5 each: one slot is spare.
    let mut c = Cluster::serving(1, 5);
    let mut target = c.active().nodes().to_vec();
    let slots: Vec<_> = target.iter().map(|node| node.slots.clone()).collect();
    for (at, node) in target.iter_mut().enumerate() {
        node.slots.clone_from(&slots[(at + 1) % 3]);
    }
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let mut steps = 0;
    while c.m.migration().phase != Phase::Idle {
        let epoch = c.loaded();
        c.beat(1, epoch);
        assert!(c.m.next().is_none(), "the old tables are in memory still");
        c.beat(4, epoch);
        steps += 1;
        assert!(steps < 100);
    }
    assert_eq!(steps, 4);
    assert_eq!(sorted(c.active().nodes()), sorted(&target));
    assert_eq!(c.m.migration().copies_done, 12);
}

#[test]
fn a_destination_that_cannot_load_costs_the_migration_and_nothing_else() {
    let mut c = Cluster::serving(1, 0);
    let (before, target) = (c.active().clone(), c.elsewhere());
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let epoch = c.loading();
    c.beat(1, epoch);
    c.fail(2, epoch);
    assert_eq!(
        c.reason(),
        format!("`y` cannot load epoch {epoch}: digests differ")
    );
    assert_eq!(
        (c.m.active().map(|p| &p.placement), c.m.next()),
        (Some(&before), None)
    );
    assert_eq!(c.m.withdrawn(), Some(epoch));
    assert_eq!(c.m.migration().rolled_back, 1);
    assert_eq!(c.m.waiting_for(), None);
    // A node that has loaded it after all does not make it active.
    for id in [1, 2, 3] {
        c.beat(id, epoch);
    }
    assert_eq!(c.m.active_epoch(), Some(before.epoch()));
    // The node is left alone for a while, longer each time; the epoch is not used again.
    let refused = c.m.migrate(c.now, target.clone(), "balance");
    assert!(
        matches!(refused, Err(MigrateError::Destination { node: 2, .. })),
        "{refused:?}"
    );
    c.wait(BACK_OFF);
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let again = c.loading();
    assert!(again > epoch);
    assert_eq!(c.m.withdrawn(), None, "a newer epoch says it, too");
    // What it says of the earlier epoch is no news.
    c.fail(2, epoch);
    assert_eq!(c.loading(), again);
    c.fail(2, again);
    c.wait(BACK_OFF);
    assert!(c.m.migrate(c.now, target.clone(), "balance").is_err());
    c.wait(BACK_OFF);
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let epoch = c.loaded();
    c.beat(4, epoch);
    assert_eq!(sorted(c.active().nodes()), sorted(&target));
    assert_eq!(
        (c.m.migration().completed, c.m.migration().rolled_back),
        (1, 2)
    );
}

#[test]
fn a_copy_that_takes_too_long_is_given_up() {
    let mut c = Cluster::serving(1, 0);
    let target = c.elsewhere();
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let epoch = c.loading();
    for id in [1, 3] {
        c.beat(id, epoch);
    }
    c.wait(DEADLINE - Duration::from_millis(1));
    assert_eq!(c.loading(), epoch);
    c.wait(Duration::from_millis(1));
    let reason = c.reason();
    assert!(reason.contains("not loaded within 10 s (y)"), "{reason}");
    assert!(c.m.next().is_none());
    assert!(
        c.m.migrate(c.now, target, "balance").is_err(),
        "y is left alone"
    );
}

#[test]
fn losing_a_node_of_the_migration_ends_it_and_lost_homes_come_first() {
    for gone in [1, 2, 3] {
        let mut c = Cluster::serving(2, 0);
        let target = c.elsewhere();
        c.m.migrate(c.now, target, "balance").unwrap();
        let epoch = c.loading();
        c.beat(3, epoch);
        c.leave(gone);
        assert!(c.reason().contains("was lost"));
        assert!(c.m.active().is_some(), "every expert has another home");
        let next = &c.m.next().unwrap().placement;
        assert!(next.epoch() > epoch, "a withdrawn epoch is not used again");
        assert_eq!(next.redundancy(&[1, 2], EXPERTS), 2);
        c.loaded();
        assert_eq!(c.m.migration().phase, Phase::Idle);
    }
    // An attention node is no part of it.
    let mut c = Cluster::serving(1, 0);
    let target = c.elsewhere();
    c.m.migrate(c.now, target, "balance").unwrap();
    let (first, epoch) = (c.active().epoch(), c.loaded());
    assert_eq!(c.m.oldest_epoch(), first);
    c.leave(4);
    assert_eq!(
        c.m.oldest_epoch(),
        epoch,
        "nobody is left who uses the old one"
    );
    assert_eq!(c.ended(), Some(Outcome::Completed));
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let mut c = Cluster::serving(1, 5);
    let good = c.elsewhere();
    let mut hole = good.clone();
    hole[0].slots.pop();
    let mut twice = good.clone();
    let slot = twice[0].slots[0];
    twice[0].slots.push(slot);
    let mut unknown = good.clone();
    unknown[0].slots.push((9, 0));
    let mut stranger = good.clone();
    stranger.push(NodeSlots {
        node: 4,
        slots: vec![(1, 0)],
    });
    let mut many = good.clone();
    many[0].slots.extend((0..EXPERTS).map(|e| (1, e)));
    many[0].slots.sort_unstable();
    many[0].slots.dedup();
    for (target, words) in [
        (hole, "an expert has no home"),
        (twice, "two homes"),
        (unknown, "no expert 0 in layer 9"),
        (stranger, "no expert node"),
        (many, "has room for 5"),
    ] {
        let error = c.m.migrate(c.now, target, "test").unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!((c.m.next(), c.m.migration().migration), (None, 0));
    }
    c.m.migrate(c.now, good.clone(), "balance").unwrap();
    let busy = c.m.migrate(c.now, good, "balance").unwrap_err();
    assert_eq!(
        busy,
        MigrateError::Busy {
            migration: 1,
            cause: "balance".into()
        }
    );
    c.m.abandon(c.now, "stopped by hand");
    assert_eq!(c.reason(), "stopped by hand");
    assert!(c.m.next().is_none() && c.m.withdrawn().is_some());
}

#[test]
fn a_drained_node_is_emptied_and_stays_empty_until_that_is_undone() {
    let mut c = Cluster::serving(1, 0);
    let drained = c.m.drain_node(c.now, "z", false).unwrap();
    assert_eq!((drained.slots, drained.migration), (4, 1));
    assert_eq!(c.m.migration().cause, "drain z");
    assert_eq!(
        c.m.drain_node(c.now, "z", false),
        Ok(drained),
        "asking twice is no harm"
    );
    let epoch = c.loaded();
    c.beat(4, epoch);
    assert_eq!(c.ended(), Some(Outcome::Completed));
    assert!(c.active().nodes().iter().all(|n| n.node != 3));
    assert_eq!(c.m.drain_node(c.now, "z", false).unwrap().slots, 0);
    let mut target = c.active().nodes().to_vec();
    target.push(NodeSlots {
        node: 3,
        slots: vec![(1, 0)],
    });
    assert!(matches!(
        c.m.migrate(c.now, target.clone(), "x"),
        Err(MigrateError::Destination { node: 3, .. })
    ));
    // A loss brings nothing to it either: what y held goes to x.
    c.leave(2);
    assert!(
        c.m.next()
            .unwrap()
            .placement
            .nodes()
            .iter()
            .all(|n| n.node == 1)
    );
    c.m.drain_node(c.now, "z", true).unwrap();
    assert_eq!(
        c.m.drain_node(c.now, "x", false).map(|d| d.migration),
        Ok(0),
        "later: something is being loaded"
    );
    assert_eq!(
        c.m.drain_node(c.now, "a", false),
        Err(DrainError::Unknown("a".into()))
    );
}

#[test]
fn a_drain_takes_over_from_balance_is_undone_and_begins_again_after_a_failure() {
    let mut c = Cluster::serving(1, 0);
    let target = c.elsewhere();
    c.m.migrate(c.now, target, "balance").unwrap();
    c.m.drain_node(c.now, "z", false).unwrap();
    assert_eq!(c.reason(), "draining `z` comes first");
    let epoch = c.loading();
    c.fail(1, epoch);
    assert!(c.reason().contains("`x` cannot load"));
    c.wait(BACK_OFF);
    assert_eq!(c.m.migration().cause, "drain z");
    assert!(c.loading() > epoch);
    c.m.drain_node(c.now, "z", true).unwrap();
    assert_eq!(c.reason(), "draining `z` was undone");
    c.wait(BACK_OFF * 4);
    assert!(c.m.next().is_none());
    assert_eq!(c.active().nodes().len(), 3);
}

#[test]
fn a_node_whose_experts_fit_nowhere_else_cannot_be_drained() {
    let mut c = Cluster::serving(1, 5);
    let error = c.m.drain_node(c.now, "z", false).unwrap_err();
    assert!(matches!(error, DrainError::NoRoom { .. }), "{error}");
    assert!(error.to_string().contains("`z`"));
    assert!(!c.m.is_drained(c.m.node(3).unwrap()), "it is as it was");
    assert_eq!(c.m.migration().migration, 0);
}

#[test]
fn lost_homes_that_a_node_cannot_load_are_given_to_another() {
    let mut c = Cluster::serving(1, 0);
    c.leave(3);
    assert!(c.m.active().is_none());
    let epoch = c.loading();
    let gained = |c: &Cluster, id| {
        let next = c.m.next().unwrap().placement.nodes();
        next.iter()
            .find(|n| n.node == id)
            .map_or(0, |n| n.slots.len())
    };
    assert!(gained(&c, 1) > 4 && gained(&c, 2) > 4);
    c.report(
        1,
        Report {
            failed: Some((epoch, "disk".into())),
            ..ready(1)
        },
    );
    assert!(c.loading() > epoch);
    assert_eq!((gained(&c, 1), gained(&c, 2)), (4, 8));
    c.loaded();

    // Where there is no other, it is tried again after a while.
    let mut c = Cluster::serving(1, 0);
    c.leave(3);
    c.leave(2);
    let epoch = c.loading();
    c.report(
        1,
        Report {
            failed: Some((epoch, "disk".into())),
            ..ready(1)
        },
    );
    let reason = c.m.waiting_for().unwrap();
    assert!(
        reason.contains("try again") && reason.contains("disk"),
        "{reason}"
    );
    c.wait(BACK_OFF);
    assert!(c.loading() > epoch);
    c.loaded();
}

#[test]
fn a_node_that_gets_nowhere_with_lost_homes_is_left_alone_and_one_that_goes_on_is_not() {
    let mut c = Cluster::serving(2, 0);
    c.leave(3);
    let (active, epoch) = (c.m.active_epoch().unwrap(), c.loading());
    assert!(epoch > active, "the copies that are lost are made up for");
    let holding = |c: &mut Cluster, id, epoch, resident_bytes| {
        let report = Report {
            epoch,
            ready: true,
            measured: Measured {
                resident_bytes,
                ..Measured::default()
            },
            ..Report::default()
        };
        c.report(id, report);
    };
    // Node 1 has loaded it; node 2 is slow, and then stands still.
    for bytes in 1..20 {
        c.now += DEADLINE / 2;
        for (id, at, bytes) in [(1, epoch, 0), (2, active, 1000 + bytes), (4, active, 0)] {
            holding(&mut c, id, at, bytes);
        }
        assert_eq!(c.loading(), epoch);
    }
    for _ in 0..2 {
        assert_eq!(c.loading(), epoch);
        c.now += DEADLINE / 2;
        for (id, at, bytes) in [(1, epoch, 0), (2, active, 1019), (4, active, 0)] {
            holding(&mut c, id, at, bytes);
        }
    }
    // It is given nothing more, and the other all it can hold.
    let slots = |c: &Cluster, id| {
        let mut nodes = c.m.next().unwrap().placement.nodes().iter();
        nodes.find(|n| n.node == id).map_or(0, |n| n.slots.len())
    };
    let next = c.loading();
    assert!(next > epoch && c.m.active_epoch() == Some(active));
    assert_eq!((slots(&c, 1), slots(&c, 2)), (12, 8));
    assert!(!c.m.is_open(c.m.node(2).unwrap()) && c.m.is_open(c.m.node(1).unwrap()));

    // The next leader leaves it alone, too.
    let carried = serde_json::to_vec(&c.m.snapshot()).unwrap();
    let snapshot: Snapshot = serde_json::from_slice(&carried).unwrap();
    let mut m = Membership::new(settings(2), Duration::ZERO);
    m.resume(Duration::ZERO, &snapshot).unwrap();
    assert_eq!(m.snapshot(), snapshot);
    assert!(!m.is_open(m.node(2).unwrap()));
    m.tick(BACK_OFF);
    assert!(m.is_open(m.node(2).unwrap()));

    // When its time is over it is tried again.
    c.now += Duration::from_millis(1);
    c.beat(1, next);
    c.beat(2, next);
    assert_eq!((c.m.next(), c.m.active_epoch()), (None, Some(next)));
    c.wait(BACK_OFF);
    assert_eq!((slots(&c, 1), slots(&c, 2)), (12, 12));
}

#[test]
fn a_new_leader_goes_on_with_a_migration_where_it_stands() {
    let carried = |m: &Membership| -> Snapshot {
        serde_json::from_slice(&serde_json::to_vec(&m.snapshot()).unwrap()).unwrap()
    };
    let mut c = Cluster::serving(1, 0);
    let target = c.elsewhere();
    c.m.drain_node(c.now, "z", false).unwrap();
    c.m.drain_node(c.now, "z", true).unwrap();
    c.m.migrate(c.now, target.clone(), "balance").unwrap();
    let (epoch, withdrawn) = (c.loading(), c.loading() - 1);
    let resumed = |snapshot: &Snapshot| {
        let mut m = Membership::new(settings(1), Duration::ZERO);
        m.resume(Duration::ZERO, snapshot).unwrap();
        assert_eq!(&m.snapshot(), snapshot);
        Cluster {
            m,
            now: Duration::ZERO,
        }
    };
    let mut new = resumed(&carried(&c.m));
    assert_eq!(
        (new.loading(), new.m.migration().phase),
        (epoch, Phase::Copying)
    );
    assert_eq!(
        (
            new.m.migration().migration,
            new.m.migration().cause.as_str()
        ),
        (2, "balance")
    );
    new.wait(SETTLE);
    assert_eq!(new.loading(), epoch, "nothing is planned anew");
    new.loaded();
    // The next one takes over while the old epoch is still in use.
    let mut new = resumed(&carried(&new.m));
    assert_eq!(new.m.migration().phase, Phase::Draining);
    new.beat(4, epoch);
    assert_eq!(new.ended(), Some(Outcome::Completed));
    assert_eq!(sorted(new.active().nodes()), sorted(&target));
    assert!(new.m.oldest_epoch() == epoch && withdrawn < epoch);

    // Or withdraws it, with a deadline of its own.
    let mut new = resumed(&carried(&c.m));
    new.wait(DEADLINE);
    assert!(new.reason().contains("not loaded within"));
    assert_eq!(new.m.withdrawn(), Some(epoch));
    let new = resumed(&carried(&new.m));
    assert_eq!(new.m.withdrawn(), Some(epoch));
    assert!(new.m.next().is_none());
}

#[test]
fn a_snapshot_from_before_there_were_migrations_is_gone_on_from() {
    let c = Cluster::serving(1, 0);
    let mut old = serde_json::to_value(c.m.snapshot()).unwrap();
    let all = old.as_object_mut().unwrap();
    for field in [
        "retired",
        "oldest_epoch",
        "withdrawn",
        "drained",
        "migrations",
        "migration",
        "backed_off",
    ] {
        assert!(all.remove(field).is_some(), "{field}");
    }
    for node in all["nodes"].as_array_mut().unwrap() {
        for field in ["process", "failure_domain", "speed"] {
            assert!(node.as_object_mut().unwrap().remove(field).is_some());
        }
    }
    all["active"].as_object_mut().unwrap().remove("was_active");
    let old: Snapshot = serde_json::from_value(old).unwrap();
    let mut m = Membership::new(settings(1), Duration::ZERO);
    m.resume(Duration::ZERO, &old).unwrap();
    m.tick(SETTLE);
    assert_eq!(m.active(), c.m.active());
    assert_eq!(m.oldest_epoch(), c.m.oldest_epoch());
    assert_eq!(m.waiting_for(), None);
}
