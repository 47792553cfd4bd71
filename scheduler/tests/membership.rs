//! The membership: single transitions, and what must hold after any of them.

#![allow(clippy::unwrap_used)]

mod members;

use std::time::Duration;

use guild_scheduler::membership::{
    Action, Loss, Membership, Phase, Refused, Registration, Report, Role, Settings,
};
use guild_scheduler::placement::{NodeId, Placement};
use members::{DIGEST, ready, registration};
use proptest::prelude::*;

const LEASE: Duration = Duration::from_millis(3000);
const SETTLE: Duration = Duration::from_millis(500);
const LAYERS: [u32; 3] = [1, 2, 3];
const EXPERTS: u32 = 8;
const SLOT_BYTES: u64 = 1 << 30;

fn settings(min_expert_nodes: usize) -> Settings {
    Settings {
        model_digest: DIGEST.into(),
        layers: LAYERS.to_vec(),
        experts: EXPERTS,
        slot_bytes: SLOT_BYTES,
        lease: LEASE,
        settle: SETTLE,
        min_expert_nodes,
        replicas: 1,
        redundant_experts: 0,
        copy_deadline: Duration::from_secs(10),
    }
}

/// A membership with a hand on its clock.
struct Cluster {
    m: Membership,
    now: Duration,
}

impl Cluster {
    fn new(min_expert_nodes: usize) -> Cluster {
        Cluster {
            m: Membership::new(settings(min_expert_nodes), Duration::ZERO),
            now: Duration::ZERO,
        }
    }

    fn join(&mut self, role: Role, name: &str) -> NodeId {
        let new = registration(role, name, name.bytes().map(u64::from).sum());
        self.m.register(self.now, new).unwrap()
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.m.tick(self.now);
    }

    fn beat(&mut self, id: NodeId, report: Report) {
        let incarnation = self.m.node(id).unwrap().name.bytes().map(u64::from).sum();
        self.m.heartbeat(self.now, id, incarnation, report).unwrap();
    }

    fn epoch(&self) -> u64 {
        self.m.published().unwrap().placement.epoch()
    }

    fn placement(&self) -> &Placement {
        &self.m.published().unwrap().placement
    }

    fn reason(&self) -> String {
        self.m.waiting_for().expect("not ready")
    }

    /// Two loaded expert nodes and one attention node.
    fn serving() -> (Cluster, [NodeId; 3]) {
        let mut c = Cluster::new(1);
        let ids = [
            c.join(Role::Expert, "expert-1"),
            c.join(Role::Expert, "expert-2"),
            c.join(Role::Attention, "attention-1"),
        ];
        c.wait(SETTLE);
        let epoch = c.epoch();
        for id in ids {
            c.beat(id, ready(epoch));
        }
        assert_eq!(c.m.waiting_for(), None);
        (c, ids)
    }
}

#[test]
fn a_cluster_comes_up_and_says_at_every_step_what_it_waits_for() {
    let mut c = Cluster::new(2);
    assert_eq!(c.reason(), "waiting for 2 expert nodes");
    let attention = c.join(Role::Attention, "attention-1");
    let one = c.join(Role::Expert, "expert-1");
    assert_eq!(c.reason(), "waiting for 1 more of 2 expert nodes");
    c.wait(SETTLE * 2);
    assert!(c.m.published().is_none());
    let two = c.join(Role::Expert, "expert-2");
    assert_eq!(
        c.reason(),
        "waiting a moment for further expert nodes to join"
    );
    c.wait(SETTLE);
    let epoch = c.epoch();
    assert!(c.placement().covers(&LAYERS, EXPERTS));
    assert_eq!(
        c.reason(),
        format!("waiting for 2 of 2 expert nodes to load epoch {epoch} (expert-1, expert-2)")
    );
    c.m.take_actions();
    c.beat(one, ready(epoch));
    assert_eq!(
        c.reason(),
        format!("waiting for 1 of 2 expert nodes to load epoch {epoch} (expert-2)")
    );
    assert_eq!(c.m.take_actions(), []);
    c.beat(two, ready(epoch));
    assert_eq!(c.m.take_actions(), [Action::Publish]);
    assert_eq!(c.m.active_epoch(), Some(epoch));
    assert_eq!(
        c.reason(),
        format!("no attention node is ready at epoch {epoch} (attention-1)")
    );
    c.beat(attention, ready(epoch));
    assert_eq!(c.m.waiting_for(), None);
    assert_eq!(c.m.serving().count(), 1);
}

#[test]
fn missing_memory_is_named_and_further_nodes_help() {
    let mut c = Cluster::new(1);
    let mut small = registration(Role::Expert, "expert-1", 1);
    small.capacity_bytes = 10 * SLOT_BYTES + 5;
    c.m.register(c.now, small).unwrap();
    c.wait(SETTLE);
    assert_eq!(
        c.reason(),
        "expert memory is short by 14.0 GiB (14 of 24 experts have no room): add expert nodes"
    );
    let two = c.join(Role::Expert, "expert-2");
    c.wait(SETTLE);
    assert!(c.placement().covers(&LAYERS, EXPERTS));
    let held = |id| {
        c.placement()
            .nodes()
            .iter()
            .find(|n| n.node == id)
            .unwrap()
            .slots
            .len()
    };
    assert!(held(two) >= 14);
}

#[test]
fn a_join_before_the_first_request_shares_out_anew_and_later_ones_move_nothing() {
    let (mut c, [one, ..]) = Cluster::serving();
    let first = c.epoch();
    c.join(Role::Expert, "expert-3");
    assert_eq!(
        c.m.waiting_for(),
        None,
        "the old placement serves until the new one is made"
    );
    c.wait(SETTLE);
    assert_eq!(c.epoch(), first + 1);
    assert_eq!(c.placement().nodes().len(), 3);
    assert_eq!(c.m.active_epoch(), Some(first), "and until it is loaded");
    assert_eq!(c.m.waiting_for(), None);

    let (mut c, ids) = Cluster::serving();
    c.m.mark_served();
    c.join(Role::Expert, "expert-3");
    for _ in 0..4 {
        c.wait(SETTLE);
        for id in ids {
            c.beat(id, ready(first));
        }
    }
    assert_eq!(c.epoch(), first);
    assert_eq!(c.m.waiting_for(), None);
    assert!(c.placement().nodes().iter().any(|n| n.node == one));
}

#[test]
fn a_silent_expert_node_takes_readiness_away_and_its_experts_get_a_new_home() {
    let (mut c, [one, two, attention]) = Cluster::serving();
    c.m.mark_served();
    let before = c.placement().clone();
    c.wait(LEASE / 2);
    c.beat(one, ready(before.epoch()));
    c.beat(attention, ready(before.epoch()));
    c.m.take_actions();
    c.wait(LEASE / 2 + Duration::from_millis(1));
    let lost = Action::Lost {
        node: two,
        name: "expert-2".into(),
        how: Loss::Silent,
    };
    assert_eq!(c.m.take_actions(), [lost, Action::Publish]);
    assert_eq!(c.epoch(), before.epoch() + 1);
    assert_eq!(c.m.active_epoch(), None);
    assert!(
        c.reason()
            .contains("waiting for 1 of 1 expert nodes to load epoch")
    );
    for layer in LAYERS {
        for expert in 0..EXPERTS {
            let home = before.resolve(layer, expert)[0];
            if home.0 == one {
                assert_eq!(c.placement().resolve(layer, expert), [home]);
            }
        }
    }
    let epoch = c.epoch();
    c.beat(one, ready(epoch));
    assert!(c.reason().contains("no attention node is ready at epoch"));
    c.beat(attention, ready(epoch));
    assert_eq!(c.m.waiting_for(), None);
}

#[test]
fn a_node_that_hangs_up_and_is_not_heard_of_again_is_lost_before_its_lease() {
    let (mut c, [one, two, attention]) = Cluster::serving();
    let grace = LEASE * 2 / 5;
    let most = grace - Duration::from_millis(1);
    // Heard of again in time: by a heartbeat, or because it asks again.
    c.m.hung_up(c.now, one);
    c.m.hung_up(c.now, two);
    c.wait(most);
    c.beat(one, ready(c.epoch()));
    c.beat(attention, ready(c.epoch()));
    c.m.watches(c.now, two).unwrap();
    c.wait(most);
    assert_eq!(c.m.nodes().count(), 3);
    c.m.take_actions();
    c.m.hung_up(c.now, two);
    c.wait(grace);
    let lost = Action::Lost {
        node: two,
        name: "expert-2".into(),
        how: Loss::Gone,
    };
    assert_eq!(c.m.take_actions()[0], lost);
    assert!(c.m.watches(c.now, two).is_err());
    assert!(c.m.node(one).is_some(), "its lease holds");
}

#[test]
fn holes_that_nobody_has_room_for_wait_for_the_next_node() {
    let mut c = Cluster::new(1);
    let mut ids = Vec::new();
    for name in ["expert-1", "expert-2"] {
        let mut new = registration(Role::Expert, name, name.bytes().map(u64::from).sum());
        new.capacity_bytes = 12 * SLOT_BYTES;
        ids.push(c.m.register(c.now, new).unwrap());
    }
    c.wait(SETTLE);
    let epoch = c.epoch();
    for &id in &ids {
        c.beat(id, ready(epoch));
    }
    c.m.mark_served();
    let incarnation = "expert-2".bytes().map(u64::from).sum();
    c.m.leave(c.now, ids[1], incarnation).unwrap();
    assert_eq!(c.m.active_epoch(), None, "ACTIVE is taken back at once");
    assert!(!c.m.published().unwrap().active);
    assert!(
        c.reason().starts_with("expert memory is short by 12.0 GiB"),
        "{}",
        c.reason()
    );
    assert_eq!(c.m.lost(), Some((epoch, c.reason())));
    let kept = c.placement().nodes()[0].clone();
    let three = c.join(Role::Expert, "expert-3");
    c.wait(SETTLE);
    assert_eq!(c.m.lost(), None, "there is room now");
    assert_eq!(c.epoch(), epoch + 1);
    assert_eq!(c.placement().nodes()[0], kept);
    assert_eq!(c.placement().nodes()[1].node, three);
}

#[test]
fn another_model_and_another_numerics_class_are_refused_with_both_values() {
    let (mut c, _) = Cluster::serving();
    let mut other = registration(Role::Expert, "expert-9", 9);
    other.model_digest = "digest-b".into();
    let text = c.m.register(c.now, other).unwrap_err().to_string();
    assert!(
        text.contains("digest-a") && text.contains("digest-b"),
        "{text}"
    );

    let mut other = registration(Role::Attention, "attention-9", 9);
    other.numerics_class = "class-b".into();
    let text = c.m.register(c.now, other).unwrap_err().to_string();
    assert!(
        text.contains("class-a") && text.contains("class-b"),
        "{text}"
    );

    // How rows are cached concerns attention nodes alone, and all of them.
    let mut cached = registration(Role::Attention, "attention-9", 9);
    cached.numerics_class = "class-a+kv-fp8".into();
    let text = c.m.register(c.now, cached.clone()).unwrap_err().to_string();
    assert!(text.contains("class-a+kv-fp8"), "{text}");
    let mut without = Cluster::new(1);
    without.join(Role::Expert, "expert-1");
    without.m.register(without.now, cached).unwrap();

    let taken =
        c.m.register(c.now, registration(Role::Expert, "attention-1", 9));
    assert!(matches!(taken, Err(Refused::NameTaken { .. })));

    for (field, new) in [
        (
            "name",
            Registration {
                name: String::new(),
                ..registration(Role::Expert, "x", 1)
            },
        ),
        (
            "name",
            Registration {
                name: "a\nb".into(),
                ..registration(Role::Expert, "x", 1)
            },
        ),
        (
            "address",
            Registration {
                address: "x".repeat(1000),
                ..registration(Role::Expert, "x", 1)
            },
        ),
        (
            "newest_epoch",
            Registration {
                newest_epoch: u64::MAX,
                ..registration(Role::Expert, "x", 1)
            },
        ),
    ] {
        match c.m.register(c.now, new) {
            Err(Refused::Field { field: named, .. }) => assert_eq!(named, field),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(c.m.waiting_for(), None, "a refusal changes nothing");
}

#[test]
fn a_new_process_replaces_the_old_one_of_its_name() {
    let (mut c, [one, ..]) = Cluster::serving();
    c.m.mark_served();
    let old = "expert-1".bytes().map(u64::from).sum();
    let again =
        c.m.register(c.now, registration(Role::Expert, "expert-1", old))
            .unwrap();
    assert_eq!(again, one, "the same process asking twice keeps its place");
    assert_eq!(c.m.waiting_for(), None);

    let new =
        c.m.register(c.now, registration(Role::Expert, "expert-1", 77))
            .unwrap();
    assert_ne!(new, one);
    assert_eq!(c.m.active_epoch(), None);
    assert!(c.m.heartbeat(c.now, one, old, ready(1)).is_err());
    assert!(c.m.leave(c.now, one, old).is_err());
    assert!(
        c.m.heartbeat(c.now, new, old, ready(1)).is_err(),
        "not its incarnation"
    );
    c.wait(SETTLE);
    assert!(c.placement().covers(&LAYERS, EXPERTS));
}

#[test]
fn epochs_go_above_everything_any_node_has_seen() {
    let mut c = Cluster::new(1);
    let mut node = registration(Role::Expert, "expert-1", 1);
    node.newest_epoch = 41;
    let one = c.m.register(c.now, node).unwrap();
    c.wait(SETTLE);
    assert_eq!(c.epoch(), 42);
    c.m.heartbeat(c.now, one, 1, ready(42)).unwrap();
    c.m.mark_served();
    // Saw epoch 42 of an earlier coordinator, which meant something else.
    let mut late = registration(Role::Attention, "attention-1", 2);
    late.newest_epoch = 42;
    let held = c.placement().nodes().to_vec();
    c.m.register(c.now, late.clone()).unwrap();
    assert_eq!(c.epoch(), 43);
    assert_eq!(c.placement().nodes(), held);
    // The same process, back after its lease has run out, has it from here.
    late.newest_epoch = 43;
    c.wait(LEASE / 2);
    c.m.heartbeat(c.now, one, 1, ready(43)).unwrap();
    c.wait(LEASE / 2 + Duration::from_millis(1));
    assert!(c.m.nodes().all(|node| node.role == Role::Expert));
    c.m.register(c.now, late).unwrap();
    assert_eq!(c.epoch(), 43);
}

#[test]
fn late_words_of_a_node_take_nothing_back() {
    let (mut c, [one, two, _]) = Cluster::serving();
    let epoch = c.epoch();
    c.m.mark_served();
    // Before it had loaded anything, and while it was loading.
    c.beat(one, Report::default());
    c.beat(
        two,
        Report {
            reason: "loading".into(),
            ..ready(epoch - 1)
        },
    );
    assert_eq!(c.m.active_epoch(), Some(epoch));
    assert!(c.m.next().is_none());
}

#[test]
fn an_epoch_that_only_a_member_remembers_is_not_made_a_second_time() {
    let (mut c, [one, two, attention]) = Cluster::serving();
    c.m.mark_served();
    let (known, seen) = (c.epoch(), c.epoch() + 5);
    // Another leader made it, and what was written of it is lost.
    c.beat(one, ready(seen));
    c.wait(SETTLE);
    assert!(c.epoch() > seen, "{} is not above {seen}", c.epoch());
    assert_eq!(c.m.active_epoch(), Some(known), "nothing is lost meanwhile");
    let newest = c.epoch();
    for id in [one, two, attention] {
        c.beat(id, ready(newest));
    }
    assert_eq!(c.m.active_epoch(), Some(newest));
}

#[test]
fn every_node_that_is_left_alone_is_tried_again_when_its_own_time_is_over() {
    let (mut c, [one, two, three, attention]) = redundant();
    let alive = |c: &mut Cluster, ids: &[NodeId]| {
        let epoch = c.m.active_epoch().unwrap();
        for &id in ids {
            c.beat(id, ready(epoch));
        }
    };
    c.m.leave(
        c.now,
        three,
        c.m.node(three).unwrap().name.bytes().map(u64::from).sum(),
    )
    .unwrap();
    c.wait(Duration::ZERO);
    // Both fail, the second one twice and so for longer.
    for id in [two, one, two] {
        for _ in 0..40 {
            if c.m.next().is_some() {
                break;
            }
            c.wait(Duration::from_millis(500));
            alive(&mut c, &[one, two, attention]);
        }
        let epoch = c.m.next().expect("copies are wanted").placement.epoch();
        let active = c.m.active_epoch().unwrap();
        let failed = Report {
            failed: Some((epoch, "disk".into())),
            ..ready(active)
        };
        c.beat(id, failed);
    }
    for _ in 0..400 {
        if let Some(epoch) = c.m.next().map(|next| next.placement.epoch()) {
            for id in [one, two, attention] {
                c.beat(id, ready(epoch));
            }
        }
        if c.m.redundancy() == (2, 2) {
            return;
        }
        c.wait(Duration::from_millis(500));
        alive(&mut c, &[one, two, attention]);
    }
    panic!("{:?}", c.m.redundancy());
}

#[test]
fn nodes_that_come_back_in_another_order_are_given_what_they_held() {
    let held = |names: [&str; 3]| {
        let mut c = Cluster::new(3);
        for name in names {
            c.join(Role::Expert, name);
        }
        c.wait(SETTLE);
        let published = c.m.published().unwrap();
        let mut held: Vec<_> = published
            .nodes
            .iter()
            .zip(published.placement.nodes())
            .map(|(node, slots)| (node.name.clone(), slots.slots.clone()))
            .collect();
        held.sort();
        held
    };
    let before = held(["expert-1", "expert-2", "expert-3"]);
    assert_eq!(before.len(), 3);
    assert_eq!(before, held(["expert-3", "expert-1", "expert-2"]));
}

#[test]
fn draining_nodes_get_nothing_new() {
    let (mut c, [_, _, attention]) = Cluster::serving();
    let epoch = c.epoch();
    c.beat(
        attention,
        Report {
            draining: true,
            ..ready(epoch)
        },
    );
    assert_eq!(c.m.serving().count(), 0);
    assert!(c.reason().contains("no attention node is ready"));
}

#[test]
fn a_model_without_experts_serves_with_an_attention_node_alone() {
    let mut m = Membership::new(
        Settings {
            layers: Vec::new(),
            experts: 0,
            ..settings(1)
        },
        Duration::ZERO,
    );
    m.tick(SETTLE);
    let epoch = m.active_epoch().unwrap();
    let id = m
        .register(SETTLE, registration(Role::Attention, "a", 1))
        .unwrap();
    m.heartbeat(SETTLE, id, 1, ready(epoch)).unwrap();
    assert_eq!(m.waiting_for(), None);
}

/// Three loaded expert nodes with two homes for every expert, and an attention node.
fn redundant() -> (Cluster, [NodeId; 4]) {
    let with = Settings {
        replicas: 2,
        ..settings(3)
    };
    let mut c = Cluster {
        m: Membership::new(with, Duration::ZERO),
        now: Duration::ZERO,
    };
    let ids = [
        c.join(Role::Expert, "expert-1"),
        c.join(Role::Expert, "expert-2"),
        c.join(Role::Expert, "expert-3"),
        c.join(Role::Attention, "attention-1"),
    ];
    c.wait(SETTLE);
    let epoch = c.epoch();
    for id in ids {
        c.beat(id, ready(epoch));
    }
    assert_eq!(c.m.waiting_for(), None);
    assert_eq!(c.m.redundancy(), (2, 2));
    c.m.mark_served();
    c.m.take_actions();
    (c, ids)
}

#[test]
fn a_lost_node_whose_experts_live_elsewhere_costs_no_readiness() {
    let (mut c, [one, two, three, attention]) = redundant();
    let before = c.placement().clone();
    c.wait(LEASE / 2);
    for id in [one, two, attention] {
        c.beat(id, ready(before.epoch()));
    }
    c.wait(LEASE / 2 + Duration::from_millis(1));
    assert!(c.m.node(three).is_none());
    assert_eq!(
        c.m.waiting_for(),
        None,
        "the attention node need not have heard"
    );
    let active = c.m.active().unwrap().clone();
    assert_eq!(active.placement.epoch(), before.epoch() + 1);
    assert_eq!(active.nodes.len(), 2);
    for node in active.placement.nodes() {
        assert!(before.nodes().contains(node), "slots stay as they are");
    }
    // Behind it, the copies that are missing.
    let next = c.m.next().unwrap().placement.clone();
    assert_eq!(next.epoch(), before.epoch() + 2);
    assert_eq!(next.redundancy(&LAYERS, EXPERTS), 2);
    for (node, was) in next.nodes().iter().zip(active.placement.nodes()) {
        assert!(node.slots.starts_with(&was.slots));
    }
    c.beat(one, ready(next.epoch()));
    c.beat(attention, ready(active.placement.epoch()));
    assert_eq!(c.m.active_epoch(), Some(active.placement.epoch()));
    c.beat(two, ready(next.epoch()));
    assert_eq!(c.m.active_epoch(), Some(next.epoch()));
    assert_eq!(c.m.waiting_for(), None);
    assert_eq!(c.m.redundancy(), (2, 2));
}

#[test]
fn a_second_loss_while_copies_are_being_made_is_survived_or_named() {
    let (mut c, [one, two, three, attention]) = redundant();
    let sum = |name: &str| name.bytes().map(u64::from).sum::<u64>();
    c.m.leave(c.now, three, sum("expert-3")).unwrap();
    let reduced = c.m.active_epoch().unwrap();
    c.m.leave(c.now, two, sum("expert-2")).unwrap();
    // What node 2 and 3 shared is gone until node 1 has read it.
    assert_eq!(c.m.active_epoch(), None);
    assert!(
        c.reason()
            .contains("waiting for 1 of 1 expert nodes to load")
    );
    assert!(c.epoch() > reduced);
    let epoch = c.epoch();
    c.beat(one, ready(epoch));
    assert!(c.reason().contains("no attention node is ready"));
    c.beat(attention, ready(epoch));
    assert_eq!(c.m.waiting_for(), None);
    assert_eq!(
        c.m.redundancy(),
        (2, 1),
        "fewer homes than asked for are seen"
    );

    // Another node brings the second homes back.
    let four = c.join(Role::Expert, "expert-4");
    c.wait(SETTLE);
    assert_eq!(c.m.waiting_for(), None);
    let epoch = c.m.next().unwrap().placement.epoch();
    for id in [one, four] {
        c.beat(id, ready(epoch));
    }
    assert_eq!(c.m.redundancy(), (2, 2));
}

#[test]
fn what_was_being_loaded_at_a_loss_gets_a_newer_epoch_than_the_active_one() {
    let (mut c, [one, _, three, _]) = redundant();
    let four = c.join(Role::Expert, "expert-4");
    c.m.leave(c.now, three, "expert-3".bytes().map(u64::from).sum())
        .unwrap();
    let active = c.m.active_epoch().unwrap();
    assert!(c.m.next().unwrap().placement.epoch() > active);
    assert!(c.placement().nodes().iter().any(|node| node.node == four));
    c.m.leave(c.now, four, "expert-4".bytes().map(u64::from).sum())
        .unwrap();
    assert_eq!(c.m.active_epoch(), Some(active), "it held nothing yet");
    assert!(c.m.next().unwrap().placement.epoch() > active);
    assert!(c.m.node(one).is_some());
}

#[test]
fn a_node_that_cannot_load_the_next_epoch_serves_the_present_one() {
    let (mut c, [one, two, three, attention]) = redundant();
    let active = c.m.active_epoch();
    c.m.leave(c.now, three, "expert-3".bytes().map(u64::from).sum())
        .unwrap();
    let fails = Report {
        reason: "disk".into(),
        epoch: c.m.active_epoch().unwrap(),
        ..Report::default()
    };
    c.beat(one, fails);
    c.beat(two, ready(c.epoch()));
    assert!(c.m.active_epoch() > active);
    assert_eq!(c.m.waiting_for(), None);
    assert!(c.m.next().is_some());
    c.beat(attention, ready(c.m.active_epoch().unwrap()));
    assert_eq!(c.m.serving().count(), 1);
}

#[derive(Clone, Debug)]
enum Event {
    Register {
        role: bool,
        name: u8,
        incarnation: u64,
        capacity: u64,
        newest: u64,
    },
    Beat {
        id: NodeId,
        epoch_behind: u64,
        ready: bool,
        draining: bool,
    },
    Leave {
        id: NodeId,
    },
    Wait {
        ms: u64,
    },
    Serve,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (any::<bool>(), 0u8..6, 0u64..3, 0u64..40, 0u64..12).prop_map(
            |(role, name, incarnation, capacity, newest)| Event::Register {
                role, name, incarnation, capacity, newest
            }),
        8 => (1u32..14, 0u64..3, prop::bool::weighted(0.8), prop::bool::weighted(0.05)).prop_map(
            |(id, epoch_behind, ready, draining)| Event::Beat {
                id, epoch_behind: epoch_behind / 2, ready, draining
            }),
        1 => (1u32..14).prop_map(|id| Event::Leave { id }),
        3 => (0u64..1200).prop_map(|ms| Event::Wait { ms }),
        1 => Just(Event::Serve),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn whatever_happens_the_promises_hold(
        min in 1usize..3, replicas in 1u32..4, events in prop::collection::vec(event(), 1..120),
    ) {
        let with = Settings { replicas, ..settings(min) };
        let mut m = Membership::new(with, Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut incarnations = std::collections::HashMap::new();
        let mut reports = std::collections::HashMap::new();
        let mut last_epoch = 0;
        let mut told = (None, None);
        // Newest epoch that a node has said it holds.
        let mut resident: std::collections::HashMap<NodeId, u64> = Default::default();
        let (mut since, mut loaded_as, mut was_next) = (0, 0, None);
        let mut was_active: Option<Placement> = None;
        let mut served = false;
        let mut been_active = std::collections::HashSet::new();
        let mut before: Option<Placement> = None;
        for event in events {
            match event {
                Event::Register { role, name, incarnation, capacity, newest } => {
                    let role = if role { Role::Expert } else { Role::Attention };
                    let mut new = registration(role, &format!("node-{name}"), incarnation);
                    new.capacity_bytes = capacity * SLOT_BYTES;
                    new.newest_epoch = newest;
                    if let Ok(id) = m.register(now, new) {
                        incarnations.insert(id, incarnation);
                        reports.entry(id).or_insert_with(Report::default);
                    }
                }
                Event::Beat { id, epoch_behind, ready, draining } => {
                    let epoch = last_epoch.max(epoch_behind) - epoch_behind;
                    let report = Report { epoch, ready, draining, ..Report::default() };
                    let incarnation = incarnations.get(&id).copied().unwrap_or(0);
                    if m.heartbeat(now, id, incarnation, report.clone()).is_ok() {
                        let had = resident.get(&id).copied().unwrap_or(0);
                        resident.insert(id, if ready { had.max(epoch) } else { had });
                        reports.insert(id, report);
                    }
                }
                Event::Leave { id } => {
                    let _ = m.leave(now, id, incarnations.get(&id).copied().unwrap_or(0));
                }
                Event::Wait { ms } => {
                    now += Duration::from_millis(ms);
                    m.tick(now);
                }
                Event::Serve => {
                    served |= m.active_epoch().is_some();
                    m.mark_served();
                }
            }
            let published = m.published();
            let epoch_of = |p: Option<&guild_scheduler::membership::Published>| {
                p.map(|p| p.placement.epoch())
            };
            let publishes = (epoch_of(m.active()), epoch_of(m.next()));

            // Epochs only grow, and one epoch is one placement.
            if let Some(p) = published {
                let epoch = p.placement.epoch();
                // One that was being loaded may be withdrawn: the active one is left then.
                prop_assert!(epoch >= last_epoch || been_active.contains(&epoch));
                if let Some(old) = &before {
                    if old.epoch() == epoch {
                        prop_assert_eq!(old, &p.placement);
                    } else if served && was_next != Some(old.epoch()) && m.migration().phase == Phase::Idle {
                        // Once serving, what is live stays where it is, but for migrations.
                        // (One that was being loaded may be withdrawn.)
                        for node in old.nodes() {
                            let stays = m.node(node.node).is_some_and(|n| !n.report.draining);
                            if stays {
                                let now_holds = p.placement.nodes().iter().find(|n| n.node == node.node);
                                prop_assert!(now_holds.is_some_and(|n| n.slots.starts_with(&node.slots)));
                            }
                        }
                    }
                }
                last_epoch = last_epoch.max(epoch);
                prop_assert!(p.placement.covers(&LAYERS, EXPERTS));
                prop_assert_eq!(p.nodes.len(), p.placement.nodes().len());
                before = Some(p.placement.clone());
            }

            // ACTIVE means that every expert has a home, and every home is live and loaded.
            if let Some(active) = m.active() {
                prop_assert!(active.active && active.placement.covers(&LAYERS, EXPERTS));
                prop_assert_eq!(active.nodes.len(), active.placement.nodes().len());
                for node in active.placement.nodes() {
                    prop_assert!(m.node(node.node).is_some(), "a home is gone");
                    prop_assert!(resident[&node.node] > 0);
                }
                prop_assert!(m.next().is_none_or(|next| next.placement.epoch() > active.placement.epoch()));
            }

            // Active goes only when an expert has no home left that is live and loaded.
            let has = |id: &NodeId, epoch: u64| {
                m.node(*id).is_some() && resident.get(id).is_some_and(|&r| r >= epoch)
            };
            if let Some(was) = &was_active {
                let left = was.reduced(1, |id| has(&id, loaded_as));
                let whole = left.covers(&LAYERS, EXPERTS);
                prop_assert!(!whole || m.active().is_some(), "unready with every expert at home");
            }
            if m.active().is_none() || was_active.is_none() {
                since = m.active_epoch().unwrap_or(0);
            }
            // A placement was loaded under its own epoch, or is what is left of one that was.
            if let Some(active) = m.active().map(|p| &p.placement) {
                let rest = was_active.as_ref().is_some_and(|was| {
                    was_next != Some(active.epoch()) && active.nodes().iter().all(|n| was.nodes().contains(n))
                });
                loaded_as = if rest { loaded_as } else { active.epoch() };
            }
            was_active = m.active().map(|p| p.placement.clone());
            was_next = m.next().map(|p| p.placement.epoch());
            been_active.extend(m.active_epoch());
            if let Some(epoch) = m.next().map(|p| p.placement.epoch()) {
                // One that has lost a home has no newer one behind it, unless withdrawn.
                prop_assert!(epoch == last_epoch || been_active.contains(&epoch));
            }

            // Readiness tells the truth and says why not.
            let can_serve = m.active_epoch().is_some_and(|newest| {
                m.nodes().any(|node| {
                    let report = &reports[&node.id];
                    let known = (since..=newest).contains(&report.epoch);
                    node.role == Role::Attention && report.ready && !report.draining && known
                })
            });
            prop_assert_eq!(m.waiting_for().is_none(), can_serve);
            if let Some(reason) = m.waiting_for() {
                prop_assert!(!reason.is_empty() && !reason.contains("waiting for 0 of"), "{}", reason);
            }

            // Everybody is told of everything.
            if m.take_actions().contains(&Action::Publish) {
                told = publishes;
            }
            prop_assert_eq!(told, publishes);

            // Nobody is remembered beyond the lease, and names are unique.
            let mut names: Vec<&str> = m.nodes().map(|node| node.name.as_str()).collect();
            names.sort_unstable();
            let count = names.len();
            names.dedup();
            prop_assert_eq!(count, names.len());
        }
        prop_assert!(m.published().is_none() || last_epoch > 0);
    }
}
