//! One membership goes on where another has stopped.

#![allow(clippy::unwrap_used)]

mod members;

use std::time::Duration;

use guild_scheduler::membership::{Membership, Role, Settings, Snapshot, SnapshotError};
use members::{DIGEST, ready, registration};

const LEASE: Duration = Duration::from_secs(3);
const SETTLE: Duration = Duration::from_millis(500);

fn settings(digest: &str) -> Settings {
    Settings {
        model_digest: digest.into(),
        layers: vec![1, 2],
        experts: 8,
        slot_bytes: 1,
        lease: LEASE,
        settle: SETTLE,
        min_expert_nodes: 2,
        replicas: 1,
        redundant_experts: 0,
        copy_deadline: Duration::from_secs(10),
    }
}

/// A serving cluster: attention node 1, expert nodes 2 and 3 (whose names are
/// the other way round), at the given time.
fn serving() -> (Membership, Duration) {
    let mut m = Membership::new(settings(DIGEST), Duration::ZERO);
    let mut now = Duration::ZERO;
    for (role, name) in [
        (Role::Attention, "a"),
        (Role::Expert, "y"),
        (Role::Expert, "x"),
    ] {
        m.register(now, registration(role, name, name.len() as u64))
            .unwrap();
    }
    now += SETTLE;
    m.tick(now);
    let epoch = m.published().unwrap().placement.epoch();
    for id in 1..=3 {
        m.heartbeat(now, id, 1, ready(epoch)).unwrap();
    }
    m.mark_served();
    m.take_actions();
    assert_eq!(m.waiting_for(), None);
    (m, now)
}

fn carried(snapshot: &Snapshot) -> Snapshot {
    serde_json::from_slice(&serde_json::to_vec(snapshot).unwrap()).unwrap()
}

#[test]
fn the_next_leader_serves_at_once_by_the_same_placement_and_ids() {
    let (old, _) = serving();
    let snapshot = carried(&old.snapshot());
    // Clocks of two processes have nothing in common.
    let now = Duration::from_secs(1_000_000);
    let mut new = Membership::new(settings(DIGEST), now);
    new.resume(now, &snapshot).unwrap();
    assert_eq!(new.snapshot(), old.snapshot());
    assert_eq!(new.waiting_for(), None);
    assert_eq!(new.active(), old.active());
    new.tick(now + SETTLE);
    assert_eq!(new.active(), old.active(), "nothing is planned anew");
    // Nodes go on with the id they have, or register and get the same one.
    let now = now + LEASE;
    new.heartbeat(now, 2, 1, ready(1)).unwrap();
    assert_eq!(new.register(now, registration(Role::Expert, "x", 1)), Ok(3));
    assert_eq!(
        new.register(now, registration(Role::Attention, "b", 9)),
        Ok(4)
    );
}

#[test]
fn a_node_that_never_finds_the_new_leader_is_lost_after_a_lease() {
    let (old, _) = serving();
    let epoch = old.active_epoch().unwrap();
    let mut new = Membership::new(settings(DIGEST), Duration::ZERO);
    new.resume(Duration::ZERO, &old.snapshot()).unwrap();
    let mut now = Duration::ZERO;
    while now <= LEASE + SETTLE {
        for id in [1, 2] {
            new.heartbeat(now, id, 1, ready(epoch)).unwrap();
        }
        now += SETTLE;
    }
    assert!(new.node(3).is_none());
    let next = new.published().unwrap();
    assert!(next.placement.epoch() > epoch, "epochs only grow");
    assert_eq!(next.placement.nodes().len(), 1);
}

#[test]
fn of_another_model_only_the_epoch_counts() {
    let (old, _) = serving();
    let mut new = Membership::new(settings("other"), Duration::ZERO);
    let error = new.resume(Duration::ZERO, &old.snapshot()).unwrap_err();
    assert!(matches!(error, SnapshotError::Model { .. }), "{error}");
    assert!(new.published().is_none());
    assert_eq!(new.nodes().count(), 0);
    assert_eq!(new.snapshot().newest_epoch(), old.snapshot().newest_epoch());
}

#[test]
fn an_older_snapshot_takes_no_epoch_back() {
    let (older, _) = serving();
    let (mut newer, now) = serving();
    let before = older.snapshot();
    // A loss makes epochs grow.
    newer.leave(now, 3, 1).unwrap();
    newer.tick(now);
    let epoch = newer.published().unwrap().placement.epoch();
    newer.resume(now, &before).unwrap();
    assert!(newer.snapshot().newest_epoch() >= epoch);
}

#[test]
fn what_contradicts_itself_is_refused() {
    let (old, _) = serving();
    let good = serde_json::to_string(&old.snapshot()).unwrap();
    for (from, to) in [
        ("\"last_id\":3", "\"last_id\":1"),
        ("[1,[0,", "[1,[0,0,"),
        ("[1,[0,", "[4000000000,[0,"),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from} is in {good}");
        let bad: Snapshot = serde_json::from_str(&bad).unwrap();
        let mut new = Membership::new(settings(DIGEST), Duration::ZERO);
        let error = new.resume(Duration::ZERO, &bad).unwrap_err();
        assert!(matches!(error, SnapshotError::Broken(_)), "{error}");
        assert_eq!(new.nodes().count(), 0);
    }
}
