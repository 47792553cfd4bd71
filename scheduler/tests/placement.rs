//! Properties of the static placement.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use guild_scheduler::placement::{
    Candidate, NodeSlots, Placement, PlacementError, Shortfall, assign,
};
use proptest::prelude::*;

const UNLIMITED: u64 = u64::MAX;

fn equal(nodes: u32, capacity_slots: u64) -> Vec<Candidate> {
    (1..=nodes)
        .map(|node| Candidate {
            node,
            capacity_slots,
            domain: node,
        })
        .collect()
}

fn per_layer(nodes: &[NodeSlots], layer: u32) -> Vec<usize> {
    nodes
        .iter()
        .map(|n| n.slots.iter().filter(|(l, _)| *l == layer).count())
        .collect()
}

/// Everything that must hold of an assignment, however it came about.
fn check(
    layers: &[u32],
    experts: u32,
    candidates: &[Candidate],
    nodes: Vec<NodeSlots>,
) -> Placement {
    let capacity: BTreeMap<u32, u64> = candidates
        .iter()
        .map(|c| (c.node, c.capacity_slots))
        .collect();
    for node in &nodes {
        assert!(
            node.slots.len() as u64 <= capacity[&node.node],
            "over capacity"
        );
    }
    let slots: Vec<NodeSlots> = nodes.clone();
    // `new` refuses an expert with two homes on one node.
    let placement = Placement::new(7, nodes).unwrap();
    assert!(placement.covers(layers, experts), "an expert has no home");
    let slots_in_all: usize = slots.iter().map(|n| n.slots.len()).sum();
    assert_eq!(placement.homes(), slots_in_all);
    for node in &slots {
        for (slot, &(layer, expert)) in (0u32..).zip(&node.slots) {
            assert!(
                placement
                    .resolve(layer, expert)
                    .contains(&(node.node, slot))
            );
        }
    }
    placement
}

#[test]
fn copies_go_to_another_failure_domain_where_there_is_room() {
    let layers = [1, 2];
    let rack = |node, domain, capacity_slots| Candidate {
        node,
        capacity_slots,
        domain,
    };
    let two = |slots| {
        [
            rack(1, 7, slots),
            rack(2, 7, slots),
            rack(3, 8, slots),
            rack(4, 8, slots),
        ]
    };
    for slots in [UNLIMITED, 10] {
        let assigned = assign(&layers, 10, &two(slots), 2, None).unwrap();
        let placement = Placement::new(1, assigned).unwrap();
        for (layer, expert) in layers.iter().flat_map(|&l| (0..10).map(move |e| (l, e))) {
            let homes = placement.resolve(layer, expert);
            assert_eq!(homes.len(), 2);
            assert_ne!(homes[0].0 > 2, homes[1].0 > 2, "{homes:?}");
        }
    }
    // No room there: a copy in the same domain is better than none.
    let small = [rack(1, 7, 20), rack(2, 7, 20), rack(3, 8, 4)];
    let assigned = assign(&layers, 10, &small, 2, None).unwrap();
    assert_eq!(
        Placement::new(1, assigned).unwrap().redundancy(&layers, 10),
        2
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn equal_nodes_differ_by_at_most_one_expert_per_layer_and_in_all(
        first in 0u32..4, count in 1u32..12, experts in 1u32..70, nodes in 1u32..12,
    ) {
        let layers: Vec<u32> = (first..first + count).collect();
        let candidates = equal(nodes, UNLIMITED);
        let assigned = assign(&layers, experts, &candidates, 1, None).unwrap();
        check(&layers, experts, &candidates, assigned.clone());
        for &layer in &layers {
            let counts = per_layer(&assigned, layer);
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
        }
        let totals: Vec<usize> = assigned.iter().map(|n| n.slots.len()).collect();
        prop_assert!(totals.iter().max().unwrap() - totals.iter().min().unwrap() <= 1, "{totals:?}");
    }

    #[test]
    fn any_capacities_that_suffice_in_sum_suffice(
        count in 1u32..8, experts in 1u32..40, shares in prop::collection::vec(0u64..200, 1..9), spare in 0u64..5,
    ) {
        let layers: Vec<u32> = (1..=count).collect();
        let total = u64::from(count * experts);
        let sum: u64 = shares.iter().sum();
        let mut candidates: Vec<Candidate> = (1u32..)
            .zip(&shares)
            .map(|(node, &capacity_slots)| Candidate { node, capacity_slots, domain: node })
            .collect();
        // The last one gets exactly what is missing, and a little.
        if sum < total {
            candidates.push(Candidate { node: 100, capacity_slots: total - sum + spare, domain: 100 });
        }
        let assigned = assign(&layers, experts, &candidates, 1, None).unwrap();
        for node in &assigned {
            for &layer in &layers {
                let held: Vec<u32> = node.slots.iter().filter(|s| s.0 == layer).map(|s| s.1).collect();
                prop_assert!(held.windows(2).all(|w| w[1] == w[0] + 1), "a range is contiguous");
            }
        }
        check(&layers, experts, &candidates, assigned);
    }

    #[test]
    fn the_order_of_the_arguments_does_not_matter(
        mut capacities in prop::collection::vec(20u64..60, 2..6), rotate in 0usize..6,
    ) {
        capacities.push(200);
        let candidates: Vec<Candidate> = (1u32..)
            .zip(&capacities)
            .map(|(node, &capacity_slots)| Candidate { node, capacity_slots, domain: node })
            .collect();
        let mut turned = candidates.clone();
        turned.rotate_left(rotate % candidates.len());
        let a = assign(&[3, 1, 2], 33, &candidates, 1, None).unwrap();
        let b = assign(&[1, 2, 3], 33, &turned, 1, None).unwrap();
        prop_assert_eq!(a, b);
    }

    #[test]
    fn keeping_never_moves_a_live_expert_and_fills_every_hole(
        nodes in 2u32..8, experts in 1u32..40, count in 1u32..6,
        dead in prop::collection::btree_set(1u32..8, 0..6), joined in 0u32..3, room in 0u64..400,
    ) {
        let layers: Vec<u32> = (1..=count).collect();
        let before = equal(nodes, UNLIMITED);
        let old = Placement::new(4, assign(&layers, experts, &before, 1, None).unwrap()).unwrap();
        let mut after: Vec<Candidate> = before
            .iter()
            .filter(|c| !dead.contains(&c.node))
            .map(|c| Candidate { capacity_slots: 200, ..*c })
            .collect();
        after.extend((0..joined).map(|i| Candidate { node: 50 + i, capacity_slots: room, domain: 50 + i }));
        let total = u64::from(count * experts);
        match assign(&layers, experts, &after, 1, Some(&old)) {
            Ok(assigned) => {
                let new = check(&layers, experts, &after, assigned);
                for &layer in &layers {
                    for expert in 0..experts {
                        let home = old.resolve(layer, expert)[0];
                        if after.iter().any(|c| c.node == home.0) {
                            prop_assert_eq!(new.resolve(layer, expert), &[home]);
                        }
                    }
                }
            }
            Err(short) => {
                let space: u64 = after.iter().map(|c| c.capacity_slots).sum();
                prop_assert!(space < total);
                prop_assert_eq!(short.missing(), total - space);
            }
        }
    }

    #[test]
    fn copies_are_on_distinct_nodes_balanced_and_a_loss_is_shared_by_all(
        count in 1u32..7, experts in 1u32..40, nodes in 1u32..10, replicas in 1u32..4,
    ) {
        let layers: Vec<u32> = (1..=count).collect();
        let candidates = equal(nodes, UNLIMITED);
        let assigned = assign(&layers, experts, &candidates, replicas, None).unwrap();
        let placement = check(&layers, experts, &candidates, assigned.clone());
        let copies = replicas.min(nodes);
        prop_assert_eq!(placement.redundancy(&layers, experts), copies);
        prop_assert_eq!(placement.homes() as u32, copies * count * experts);
        for &layer in &layers {
            let counts = per_layer(&assigned, layer);
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 2, "{counts:?}");
        }
        let totals: Vec<usize> = assigned.iter().map(|n| n.slots.len()).collect();
        let (most, least) = (*totals.iter().max().unwrap(), *totals.iter().min().unwrap());
        // Each round of copies may add one.
        prop_assert!(most - least <= copies as usize + most / 20, "{totals:?}");
        // Whose copies a lost node's experts have: nobody far more than an even part.
        if copies == 2 {
            for lost in &assigned {
                let mut takers = BTreeMap::new();
                for &(layer, expert) in &lost.slots {
                    for home in placement.resolve(layer, expert) {
                        *takers.entry(home.0).or_insert(0usize) += usize::from(home.0 != lost.node);
                    }
                }
                let even = lost.slots.len().div_ceil(nodes as usize - 1);
                let most = takers.values().max().copied().unwrap_or(0);
                prop_assert!(most <= 2 * even + 2, "{takers:?} of {}", lost.slots.len());
            }
        }
    }

    #[test]
    fn copies_fill_the_room_there_is_and_first_homes_come_first(
        count in 1u32..5, experts in 1u32..20, replicas in 1u32..4,
        capacities in prop::collection::vec(0u64..120, 1..7),
    ) {
        let layers: Vec<u32> = (1..=count).collect();
        let total = u64::from(count * experts);
        let candidates: Vec<Candidate> = (1u32..)
            .zip(&capacities)
            .map(|(node, &capacity_slots)| Candidate { node, capacity_slots, domain: node })
            .collect();
        match assign(&layers, experts, &candidates, replicas, None) {
            Ok(assigned) => {
                let placement = check(&layers, experts, &candidates, assigned);
                prop_assert!(placement.redundancy(&layers, experts) >= 1);
                prop_assert!(placement.homes() as u64 <= total * u64::from(replicas));
            }
            Err(_) => prop_assert!(capacities.iter().sum::<u64>() < total),
        }
    }

    #[test]
    fn lost_copies_come_back_and_nothing_live_moves(
        nodes in 2u32..8, experts in 1u32..30, count in 1u32..5, dead in 1u32..8, replicas in 1u32..4,
    ) {
        let layers: Vec<u32> = (1..=count).collect();
        let before = equal(nodes, UNLIMITED);
        let old = Placement::new(4, assign(&layers, experts, &before, replicas, None).unwrap()).unwrap();
        let after: Vec<Candidate> = before.into_iter().filter(|c| c.node != dead).collect();
        let assigned = assign(&layers, experts, &after, replicas, Some(&old)).unwrap();
        let new = check(&layers, experts, &after, assigned);
        prop_assert_eq!(new.redundancy(&layers, experts), replicas.min(after.len() as u32));
        for node in old.nodes().iter().filter(|node| node.node != dead) {
            let now = new.nodes().iter().find(|n| n.node == node.node).unwrap();
            prop_assert!(now.slots.starts_with(&node.slots));
        }
        let left = old.reduced(5, |node| node != dead);
        prop_assert_eq!(left.epoch(), 5);
        prop_assert!(left.nodes().iter().all(|node| old.nodes().contains(node)));
        if replicas > 1 {
            prop_assert!(left.covers(&layers, experts));
        }
    }

    #[test]
    fn a_list_of_homes_from_outside_never_panics(
        nodes in prop::collection::vec(
            (any::<u32>(), prop::collection::vec((0u32..70_000, 0u32..70_000), 0..20)), 0..6),
    ) {
        let nodes = nodes.into_iter().map(|(node, slots)| NodeSlots { node, slots }).collect();
        if let Ok(placement) = Placement::new(1, nodes) {
            let _ = placement.resolve(u32::MAX, u32::MAX);
        }
    }
}

#[test]
fn extras_rotate_over_the_nodes() {
    // 3 nodes, 4 experts: one node has two of a layer, another one each time.
    let assigned = assign(&[1, 2, 3], 4, &equal(3, UNLIMITED), 1, None).unwrap();
    let doubles: Vec<usize> = (1..=3)
        .map(|layer| {
            per_layer(&assigned, layer)
                .iter()
                .position(|&n| n == 2)
                .unwrap()
        })
        .collect();
    let mut sorted = doubles.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [0, 1, 2], "{doubles:?}");
}

#[test]
fn twice_the_capacity_gets_twice_the_experts() {
    let candidates = [
        Candidate {
            node: 1,
            capacity_slots: 80,
            domain: 1,
        },
        Candidate {
            node: 2,
            capacity_slots: 160,
            domain: 2,
        },
    ];
    let assigned = assign(&[3, 4], 96, &candidates, 1, None).unwrap();
    assert_eq!(per_layer(&assigned, 3), [32, 64]);
    assert_eq!(per_layer(&assigned, 4), [32, 64]);
}

#[test]
fn a_shortfall_says_how_much_is_missing() {
    let short = assign(&[1, 2], 64, &equal(2, 50), 1, None).unwrap_err();
    assert_eq!(
        short,
        Shortfall {
            needed: 128,
            available: 100
        }
    );
    assert_eq!(short.missing(), 28);
    assert_eq!(short.missing_bytes(1000), 28_000);
    assert_eq!(assign(&[1], 8, &[], 1, None).unwrap_err().missing(), 8);
    assert!(short.to_string().contains("28 too few"), "{short}");
}

#[test]
fn a_model_without_experts_needs_no_node() {
    assert_eq!(assign(&[], 64, &[], 1, None).unwrap(), []);
    let placement = Placement::new(1, Vec::new()).unwrap();
    assert!(placement.covers(&[], 64));
    assert_eq!(placement.resolve(0, 0), []);
}

#[test]
fn more_nodes_than_experts_leaves_some_empty() {
    let candidates = equal(5, UNLIMITED);
    let assigned = assign(&[1], 3, &candidates, 1, None).unwrap();
    check(&[1], 3, &candidates, assigned.clone());
    assert_eq!(assigned.iter().filter(|n| n.slots.is_empty()).count(), 2);
}

#[test]
fn what_is_not_a_placement_is_refused() {
    let node = |node, slots: &[(u32, u32)]| NodeSlots {
        node,
        slots: slots.to_vec(),
    };
    assert_eq!(
        Placement::new(
            1,
            vec![node(2, &[(0, 1)]), node(1, &[(0, 1), (0, 0), (0, 1)])]
        )
        .unwrap_err(),
        PlacementError::TwoHomes {
            layer: 0,
            expert: 1,
            node: 1
        }
    );
    assert_eq!(
        Placement::new(1, vec![node(1, &[]), node(1, &[])]).unwrap_err(),
        PlacementError::TwiceListed(1)
    );
    assert!(Placement::new(1, vec![node(1, &[(u32::MAX, 0)])]).is_err());
    assert!(Placement::new(1, vec![node(1, &[(0, u32::MAX)])]).is_err());
}
