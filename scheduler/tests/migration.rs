//! The way from one placement to another: held against a naive account of what
//! is in every node's memory.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use guild_scheduler::migration::{MAX_COPIES_PER_STEP, Step, Unreachable, next_step, steps};
use guild_scheduler::placement::{NodeId, NodeSlots, Placement};
use proptest::prelude::*;

type Held = BTreeMap<NodeId, BTreeSet<(u32, u32)>>;

fn node(node: NodeId, experts: &[u32]) -> NodeSlots {
    NodeSlots {
        node,
        slots: experts.iter().map(|&expert| (0, expert)).collect(),
    }
}

fn held(nodes: &[NodeSlots]) -> Held {
    let full = nodes.iter().filter(|node| !node.slots.is_empty());
    full.map(|node| (node.node, node.slots.iter().copied().collect()))
        .collect()
}

fn homes(held: &Held, slot: (u32, u32)) -> usize {
    held.values().filter(|slots| slots.contains(&slot)).count()
}

/// Walks `way` from `active` and panics at the first broken promise.
fn walk(
    active: &[NodeSlots],
    target: &[NodeSlots],
    capacity: &BTreeMap<NodeId, u64>,
    way: &[Step],
) {
    let (start, end) = (held(active), held(target));
    let experts: BTreeSet<(u32, u32)> = start.values().flatten().copied().collect();
    let mut now = start.clone();
    let mut made = 0;
    for step in way {
        assert!(Placement::new(1, step.nodes.clone()).is_ok());
        assert!(step.copies.len() <= MAX_COPIES_PER_STEP);
        assert!(!step.copies.is_empty() || !step.drops.is_empty());
        let after = held(&step.nodes);
        // What is said to be copied and dropped is what changes.
        let mut by_moves = now.clone();
        for &(node, layer, expert) in &step.copies {
            assert!(by_moves.entry(node).or_default().insert((layer, expert)));
        }
        // Both tables are in memory until the older one is freed.
        for (node, slots) in &by_moves {
            assert!(
                slots.len() as u64 <= capacity[node],
                "node {node} overshoots"
            );
        }
        for &(node, layer, expert) in &step.drops {
            assert!(by_moves.get_mut(&node).unwrap().remove(&(layer, expert)));
        }
        by_moves.retain(|_, slots| !slots.is_empty());
        assert_eq!(by_moves, after);
        for &slot in &experts {
            let (had, has) = (homes(&now, slot), homes(&after, slot));
            assert!(has > 0, "{slot:?} has no home");
            // Homes are given up before others are there only to make room.
            let least = homes(&start, slot).min(homes(&end, slot));
            assert!(has >= had.min(least) || step.copies.is_empty());
            // A last home that is active stays, or another is made in this step.
            let stays = now.iter().any(|(node, slots)| {
                slots.contains(&slot) && after.get(node).is_some_and(|s| s.contains(&slot))
            });
            let comes = step.copies.iter().any(|c| (c.1, c.2) == slot);
            assert!(stays || comes);
        }
        made += step.copies.len();
        now = after;
    }
    assert_eq!(now, end);
    // Nothing is copied that is there, and nothing twice.
    let new: usize = (end.iter())
        .map(|(node, slots)| {
            slots
                .difference(start.get(node).unwrap_or(&BTreeSet::new()))
                .count()
        })
        .sum();
    assert_eq!(made, new);
}

#[test]
fn a_move_is_one_copy_and_one_drop_in_one_step() {
    let (active, target) = (
        [node(1, &[0, 1]), node(2, &[2])],
        [node(1, &[0]), node(2, &[2, 1])],
    );
    let way = steps(&active, &target, |_| u64::MAX).unwrap();
    assert_eq!(
        way,
        [Step {
            nodes: target.to_vec(),
            copies: vec![(2, 0, 1)],
            drops: vec![(1, 0, 1)],
        }]
    );
    assert_eq!(steps(&target, &target, |_| 2), Ok(Vec::new()));
}

#[test]
fn full_nodes_that_exchange_experts_have_no_way_and_it_is_said_where() {
    let (active, target) = (
        [node(1, &[0]), node(2, &[1])],
        [node(1, &[1]), node(2, &[0])],
    );
    let error = next_step(&active, &target, |_| 1).unwrap_err();
    assert_eq!(
        error,
        Unreachable::Full {
            node: 2,
            layer: 0,
            expert: 0
        }
    );
    assert!(error.to_string().contains("leave a slot free"), "{error}");
    // One slot beside is enough.
    let way = steps(&active, &target, |_| 2).unwrap();
    walk(&active, &target, &BTreeMap::from([(1, 2), (2, 2)]), &way);
    let error = next_step(&active, &[node(1, &[0])], |_| 9).unwrap_err();
    assert_eq!(
        error,
        Unreachable::NoHome {
            layer: 0,
            expert: 1
        }
    );
    let error = next_step(&active, &[node(1, &[0, 1])], |_| 1).unwrap_err();
    assert!(matches!(
        error,
        Unreachable::TooMany {
            node: 1,
            slots: 2,
            capacity: 1
        }
    ));
}

#[test]
fn a_full_node_gives_a_spare_copy_up_first() {
    let active = [node(1, &[0, 1]), node(2, &[1, 2]), node(3, &[0])];
    let target = [node(1, &[0, 2]), node(2, &[1, 2]), node(3, &[0, 1])];
    let capacity = BTreeMap::from([(1, 2), (2, 2), (3, 1 + 1)]);
    let way = steps(&active, &target, |n| capacity[&n]).unwrap();
    walk(&active, &target, &capacity, &way);
    // Only where nothing can be copied before.
    let target = [node(1, &[0, 2]), node(2, &[1, 2]), node(3, &[0])];
    let way = steps(&active, &target, |n| capacity[&n]).unwrap();
    assert!(way[0].copies.is_empty());
    walk(&active, &target, &capacity, &way);
}

#[test]
fn much_is_moved_in_many_steps_so_that_a_failure_loses_little() {
    let all: Vec<u32> = (0..200).collect();
    let (active, target) = ([node(1, &all)], [node(2, &all)]);
    let way = steps(&active, &target, |_| u64::MAX).unwrap();
    assert_eq!(way.len(), 200usize.div_ceil(MAX_COPIES_PER_STEP));
    walk(
        &active,
        &target,
        &BTreeMap::from([(1, 200), (2, 200)]),
        &way,
    );
}

/// Experts (of two layers) to nodes: for each, a non-empty set of nodes as bits.
fn layout(nodes: u32, homes: &[u8]) -> Vec<NodeSlots> {
    let mut layout: Vec<NodeSlots> = (1..=nodes).map(|n| node(n, &[])).collect();
    for (slot, &bits) in (0u32..).zip(homes) {
        for (at, node) in layout.iter_mut().enumerate() {
            let first = u32::from(bits) % nodes == at as u32;
            if first || bits >> at & 1 == 1 && bits > 128 {
                node.slots.push((slot % 2, slot / 2));
            }
        }
    }
    layout
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn with_a_slot_beside_every_target_is_reached_and_memory_never_overshoots(
        nodes in 1u32..6,
        pairs in prop::collection::vec((any::<u8>(), any::<u8>()), 1..24),
        slack in 0u64..2,
    ) {
        let (from, to): (Vec<u8>, Vec<u8>) = pairs.into_iter().unzip();
        let (active, target) = (layout(nodes, &from), layout(nodes, &to));
        let capacity: BTreeMap<NodeId, u64> = (active.iter().zip(&target))
            .map(|(a, t)| (a.node, slack + a.slots.len().max(t.slots.len() + 1) as u64))
            .collect();
        let way = steps(&active, &target, |n| capacity[&n]);
        prop_assert!(way.is_ok(), "{:?}", way);
        walk(&active, &target, &capacity, &way.unwrap());
    }

    #[test]
    fn with_full_nodes_the_target_is_reached_or_it_is_said_why(
        nodes in 1u32..6,
        pairs in prop::collection::vec((any::<u8>(), any::<u8>()), 1..24),
    ) {
        let (from, to): (Vec<u8>, Vec<u8>) = pairs.into_iter().unzip();
        let (active, target) = (layout(nodes, &from), layout(nodes, &to));
        let capacity: BTreeMap<NodeId, u64> = (active.iter().zip(&target))
            .map(|(a, t)| (a.node, a.slots.len().max(t.slots.len()) as u64))
            .collect();
        match steps(&active, &target, |n| capacity[&n]) {
            Ok(way) => walk(&active, &target, &capacity, &way),
            Err(Unreachable::Full { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
