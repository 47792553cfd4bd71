//! From the membership and the load to a target that can be migrated to.
#![allow(clippy::unwrap_used)]

mod members;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use guild_scheduler::load::{Shot, Synthetic};
use guild_scheduler::membership::{
    Measured, Membership, MigrateError, Phase, Registration, Report, Role, Settings,
};
use guild_scheduler::placement::{NodeId, NodeSlots, Placement};
use guild_scheduler::planner::PlanError;
use guild_scheduler::rebalance::{Mode, Policy, Proposal, ProposeError, propose};
use members::{DIGEST, ready, registration};
use proptest::prelude::*;

const LAYERS: [u32; 2] = [3, 4];
const EXPERTS: u32 = 16;

/// An expert node: bytes for this many slots (0: any), its speed, what fails
/// with it.
#[derive(Clone, Copy, Debug, Default)]
struct Spec {
    slots: u64,
    speed: f64,
    domain: &'static str,
}

struct Cluster {
    m: Membership,
    now: Duration,
}

impl Cluster {
    /// A serving cluster; node ids count from 1.
    fn serving(replicas: u32, redundant_experts: u32, nodes: &[Spec]) -> Cluster {
        let settings = Settings {
            model_digest: DIGEST.into(),
            layers: LAYERS.to_vec(),
            experts: EXPERTS,
            slot_bytes: 10,
            lease: Duration::from_secs(1000),
            settle: Duration::from_secs(1),
            min_expert_nodes: 1,
            replicas,
            redundant_experts,
            copy_deadline: Duration::from_secs(10),
        };
        let mut c = Cluster {
            m: Membership::new(settings, Duration::ZERO),
            now: Duration::ZERO,
        };
        for spec in nodes {
            c.join(*spec);
        }
        c.now += Duration::from_secs(1);
        c.m.tick(c.now);
        c.settle();
        c.m.mark_served();
        c
    }

    fn join(&mut self, spec: Spec) -> NodeId {
        let turn = self.m.nodes().count() as u64 + 1;
        let new = Registration {
            capacity_bytes: spec.slots * 10,
            failure_domain: spec.domain.into(),
            ..registration(Role::Expert, &format!("expert-{turn:02}"), turn)
        };
        let id = self.m.register(self.now, new).unwrap();
        self.speed(id, spec.speed);
        id
    }

    fn speed(&mut self, id: NodeId, rows_per_second: f64) {
        let report = Report {
            epoch: self.m.published().map_or(0, |p| p.placement.epoch()),
            ready: true,
            measured: Measured {
                rows_per_second,
                ..Measured::default()
            },
            ..Report::default()
        };
        self.m
            .heartbeat(self.now, id, u64::from(id), report)
            .unwrap();
    }

    /// Everything is loaded until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..1000 {
            let ids: Vec<NodeId> = self.m.nodes().map(|node| node.id).collect();
            for id in ids {
                self.speed(id, 0.0);
            }
            if self.m.next().is_none() && self.m.migration().phase == Phase::Idle {
                assert!(self.m.active().is_some());
                return;
            }
        }
        panic!("{:?}", self.m.migration());
    }

    fn active(&self) -> &Placement {
        &self.m.active().unwrap().placement
    }

    fn propose(&self, shots: &[Shot], policy: &Policy) -> Proposal {
        let shots: Vec<&Shot> = shots.iter().collect();
        propose(&self.m, &shots, policy).unwrap()
    }

    /// Proposes and goes there; what was proposed.
    fn rebalance(&mut self, shots: &[Shot], policy: &Policy) -> Proposal {
        let proposal = self.propose(shots, policy);
        self.m
            .migrate(self.now, proposal.target.clone(), "balance")
            .unwrap();
        self.settle();
        assert_eq!(self.m.migration().completed, self.m.migration().migration);
        proposal
    }

    fn held(&self, id: NodeId) -> usize {
        held(self.active().nodes(), id)
    }
}

fn held(nodes: &[NodeSlots], id: NodeId) -> usize {
    let mut nodes = nodes.iter().filter(|node| node.node == id);
    nodes.next().map_or(0, |node| node.slots.len())
}

/// A load by Zipf's law.
fn skewed(seed: u64, zipf: f64) -> Vec<Shot> {
    let trace = Synthetic {
        seed,
        layers: LAYERS.len() as u32,
        experts: EXPERTS,
        shots: 8,
        rows: 1 << 16,
        zipf,
        drift: 0.01,
        jump: 0.0,
    };
    trace.trace().unwrap().shots
}

fn even() -> Vec<Shot> {
    vec![Shot {
        rows: vec![vec![100; EXPERTS as usize]; LAYERS.len()],
    }]
}

fn copies(active: &[NodeSlots], target: &[NodeSlots]) -> usize {
    let has = |id: NodeId, slot: &(u32, u32)| {
        let mut nodes = active.iter();
        nodes.any(|node| node.node == id && node.slots.contains(slot))
    };
    let new = |node: &NodeSlots| {
        node.slots
            .iter()
            .filter(|slot| !has(node.node, slot))
            .count()
    };
    target.iter().map(new).sum()
}

#[test]
fn a_skewed_load_is_evened_out_and_then_nothing_more_moves() {
    let mut c = Cluster::serving(1, 4, &[Spec::default(); 4]);
    let (shots, policy) = (skewed(1, 0.8), Policy::default());
    let before = c.active().nodes().to_vec();
    let proposal = c.propose(&shots, &policy);
    assert!(proposal.after < proposal.before - 0.05, "{proposal:?}");
    assert!(proposal.after < 1.1, "{proposal:?}");
    assert_eq!(
        proposal.bytes,
        10 * copies(&before, &proposal.target) as u64
    );
    assert!(
        proposal
            .moves
            .iter()
            .any(|m| m.contains("to expert-0") && m.contains("falls by"))
    );
    assert_eq!(proposal, c.propose(&shots, &policy), "the same again");
    c.rebalance(&shots, &policy);
    for _ in 0..6 {
        let again = c.propose(&shots, &policy);
        if again.moves.is_empty() {
            assert_eq!(
                c.m.migrate(c.now, again.target, "balance"),
                Err(MigrateError::Nothing)
            );
            return;
        }
        assert!(again.after < again.before);
        c.rebalance(&shots, &policy);
    }
    panic!("it moves for ever");
}

#[test]
fn the_budget_limits_the_bytes() {
    let c = Cluster::serving(1, 4, &[Spec::default(); 4]);
    let policy = Policy {
        budget_bytes: 35,
        ..Policy::default()
    };
    let proposal = c.propose(&skewed(1, 0.8), &policy);
    assert!((10..=30).contains(&proposal.bytes), "{proposal:?}");
}

#[test]
fn a_node_that_joins_a_serving_cluster_comes_into_use() {
    let mut c = Cluster::serving(1, 0, &[Spec::default(); 3]);
    let shots = even();
    let id = c.join(Spec::default());
    c.now += Duration::from_secs(5);
    c.m.tick(c.now);
    assert_eq!(c.held(id), 0, "nothing live moves by itself");
    let proposal = c.rebalance(&shots, &Policy::default());
    assert!(proposal.after < proposal.before - 0.2, "{proposal:?}");
    assert_eq!(c.held(id), 8);
}

#[test]
fn a_fast_node_carries_more_and_noise_moves_nothing() {
    let spec = |speed| Spec {
        speed,
        ..Spec::default()
    };
    let mut c = Cluster::serving(1, 0, &[spec(1000.0), spec(1000.0), spec(3000.0)]);
    let (shots, policy) = (even(), Policy::default());
    while !c.propose(&shots, &policy).moves.is_empty() {
        c.rebalance(&shots, &policy);
    }
    let (slow, fast) = (c.held(1).max(c.held(2)), c.held(3));
    assert!(fast as f64 > 2.0 * slow as f64, "{slow} {fast}");
    for noise in [0.9, 1.1, 0.95, 1.05] {
        for (id, speed) in [
            (1, 1000.0 * noise),
            (2, 1000.0 / noise),
            (3, 3000.0 * noise),
        ] {
            c.speed(id, speed);
        }
        assert_eq!(c.propose(&shots, &policy).moves, Vec::<String>::new());
    }
    // A node that has not been measured makes all count alike.
    c.join(Spec::default());
    let proposal = c.propose(&shots, &policy);
    assert!(held(&proposal.target, 3) < fast);
}

#[test]
fn a_node_that_turns_out_faster_is_given_more_and_then_all_is_quiet() {
    let spec = |speed| Spec {
        speed,
        ..Spec::default()
    };
    let mut c = Cluster::serving(1, 0, &[spec(1000.0), spec(1000.0), spec(300.0)]);
    let (shots, policy) = (even(), Policy::default());
    let settle = |c: &mut Cluster| {
        let plans = (0..10).take_while(|_| {
            let moves = !c.propose(&shots, &policy).moves.is_empty();
            if moves {
                c.rebalance(&shots, &policy);
            }
            moves
        });
        plans.count()
    };
    settle(&mut c);
    let busy = c.held(3);
    // Measured again, with the processor to itself.
    c.speed(3, 1000.0);
    let plans = settle(&mut c);
    assert!((1..=3).contains(&plans), "{plans}");
    let held = [1, 2, 3].map(|id| c.held(id));
    assert!(
        held[2] > busy && held.iter().all(|&n| (8..=12).contains(&n)),
        "{busy} {held:?}"
    );
    for noise in [0.9, 1.1, 1.0] {
        c.speed(3, 1000.0 * noise);
        assert_eq!(settle(&mut c), 0);
    }
}

#[test]
fn drained_nodes_lose_all_and_nodes_that_have_failed_get_nothing() {
    let mut c = Cluster::serving(1, 8, &[Spec::default(); 4]);
    let shots = skewed(2, 1.0);
    c.m.drain_node(c.now, "expert-01", false).unwrap();
    c.m.abandon(c.now, "stopped by hand");
    let proposal = c.propose(&shots, &Policy::default());
    assert_eq!(held(&proposal.target, 1), 0);
    assert!(
        Placement::new(1, proposal.target)
            .unwrap()
            .covers(&LAYERS, EXPERTS)
    );
    c.m.drain_node(c.now, "expert-01", true).unwrap();

    let to_two = c.propose(&shots, &Policy::default()).target;
    let target = vec![NodeSlots {
        node: 2,
        slots: LAYERS
            .iter()
            .flat_map(|&l| (0..EXPERTS).map(move |e| (l, e)))
            .collect(),
    }];
    c.m.migrate(c.now, target, "test").unwrap();
    let epoch = c.m.next().unwrap().placement.epoch();
    let report = Report {
        failed: Some((epoch, "disk".into())),
        ..ready(c.m.active_epoch().unwrap())
    };
    c.m.heartbeat(c.now, 2, 2, report).unwrap();
    assert!(c.m.next().is_none());
    let active = c.active().nodes().to_vec();
    let new = |target: &[NodeSlots]| {
        let of_two = target
            .iter()
            .filter(|node| node.node == 2)
            .cloned()
            .collect::<Vec<_>>();
        copies(&active, &of_two)
    };
    let proposal = c.propose(&shots, &Policy::default());
    assert!(!proposal.moves.is_empty());
    assert_eq!(new(&proposal.target), 0);
    assert!(new(&to_two) > 0, "it would be a destination");
}

#[test]
fn copies_go_to_another_failure_domain() {
    let spec = |domain| Spec {
        domain,
        ..Spec::default()
    };
    let mut c = Cluster::serving(2, 0, &[spec("a"), spec("a"), spec("b"), spec("b")]);
    let domain = |id: NodeId| u8::from(id > 2);
    let together = |c: &Cluster| {
        let all = LAYERS
            .iter()
            .flat_map(|&l| (0..EXPERTS).map(move |e| (l, e)));
        let of_one = |&(layer, expert): &(u32, u32)| {
            let homes = c.active().resolve(layer, expert).iter();
            let domains: BTreeSet<u8> = homes.map(|home| domain(home.0)).collect();
            domains.len() < 2
        };
        all.filter(of_one).count()
    };
    for _ in 0..8 {
        if c.propose(&even(), &Policy::default()).moves.is_empty() {
            break;
        }
        c.rebalance(&even(), &Policy::default());
    }
    assert_eq!(together(&c), 0);
    assert_eq!(c.m.redundancy(), (2, 2));
}

#[test]
fn eplb_is_made_anew_and_keeps_what_is_asked_for() {
    let mut c = Cluster::serving(1, 8, &[Spec::default(); 4]);
    let shots = skewed(3, 1.0);
    let policy = |mode| Policy {
        mode,
        ..Policy::default()
    };
    let (guild, eplb) = (
        c.propose(&shots, &policy(Mode::Guild)),
        c.propose(&shots, &policy(Mode::Eplb)),
    );
    assert!(eplb.after < eplb.before);
    assert!(guild.bytes < eplb.bytes, "{} {}", guild.bytes, eplb.bytes);
    c.rebalance(&shots, &policy(Mode::Eplb));
    assert!(c.active().covers(&LAYERS, EXPERTS));
    assert!(c.active().homes() <= 2 * (EXPERTS as usize + 8));

    let mut c = Cluster::serving(2, 4, &[Spec::default(); 4]);
    c.rebalance(&shots, &policy(Mode::Eplb));
    assert_eq!(c.m.redundancy(), (2, 2));
}

#[test]
fn without_a_placement_or_with_a_foreign_load_there_is_no_proposal() {
    let c = Cluster::serving(1, 0, &[Spec::default(); 2]);
    let foreign = Shot {
        rows: vec![vec![1; 3]],
    };
    let error = propose(&c.m, &[&foreign], &Policy::default()).unwrap_err();
    assert!(matches!(error, ProposeError::Plan(_)), "{error}");
    let fresh = Membership::new(c.m.settings().clone(), Duration::ZERO);
    assert_eq!(
        propose(&fresh, &[], &Policy::default()),
        Err(ProposeError::NotActive)
    );
    let none = Settings {
        layers: Vec::new(),
        experts: 0,
        ..c.m.settings().clone()
    };
    let mut none = Membership::new(none, Duration::ZERO);
    none.tick(Duration::from_secs(1));
    assert_eq!(
        propose(&none, &[], &Policy::default()),
        Err(ProposeError::NoExperts)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn every_proposal_can_be_gone_to_and_keeps_its_promises(
        replicas in 1u32..3, redundant in 0u32..6, eplb in any::<bool>(),
        specs in prop::collection::vec((0u64..20, 0u32..3, 0usize..3), 2..6),
        joins in 0usize..2, drains in any::<bool>(), seed in 0u64..100, zipf in 0.0f64..1.2,
    ) {
        let spec = |&(spare, speed, domain): &(u64, u32, usize)| Spec {
            // Room for the node's part of all homes, and a slot beside.
            slots: match spare {
                0..5 => 0,
                spare => (2 * u64::from(EXPERTS * replicas)).div_ceil(specs.len() as u64) + 2 + spare,
            },
            speed: f64::from(speed) * 700.0,
            domain: ["", "rack-1", "rack-2"][domain],
        };
        let specs: Vec<Spec> = specs.iter().map(spec).collect();
        let mut c = Cluster::serving(replicas, redundant, &specs);
        for spec in specs.iter().take(joins) {
            c.join(*spec);
        }
        let drained = drains && c.m.drain_node(c.now, "expert-02", false).is_ok();
        c.m.abandon(c.now, "stopped by hand");
        let policy = Policy {
            mode: if eplb { Mode::Eplb } else { Mode::Guild },
            budget_bytes: 200,
            ..Policy::default()
        };
        let shots = skewed(seed, zipf);
        let seen: Vec<&Shot> = shots.iter().collect();
        let proposal = match propose(&c.m, &seen, &policy) {
            // With a slot free on each, the others are too small.
            Err(ProposeError::Plan(PlanError::NoRoom { .. })) if drained => return Ok(()),
            proposal => proposal.unwrap(),
        };
        let before: BTreeMap<NodeId, usize> =
            c.active().nodes().iter().map(|node| (node.node, node.slots.len())).collect();
        let usable = specs.len() + joins - usize::from(drained);
        let target = Placement::new(1, proposal.target.clone()).unwrap();
        let (_, had) = c.m.redundancy();
        let least = if drained { 1 } else { had.min(replicas) };
        prop_assert!(target.redundancy(&LAYERS, EXPERTS) >= least.min(usable as u32));
        for node in &proposal.target {
            let capacity = c.m.capacity_slots(c.m.node(node.node).unwrap());
            let had = before.get(&node.node).copied().unwrap_or(0);
            // One slot stays free, but where none is.
            prop_assert!(node.slots.len() as u64 <= capacity.saturating_sub(1).max(had as u64));
            prop_assert!(!drained || node.node != 2 || proposal.moves.is_empty());
        }
        prop_assert_eq!(proposal.moves.is_empty(), c.m.clone().migrate(c.now, proposal.target.clone(), "x") == Err(MigrateError::Nothing));
        if !proposal.moves.is_empty() {
            c.m.migrate(c.now, proposal.target.clone(), "balance").unwrap();
            c.settle();
            prop_assert_eq!(c.m.migration().completed, 1);
            if !eplb {
                let moved = proposal.bytes;
                let restored = if drained { u64::MAX } else { 200 };
                prop_assert!(moved <= restored, "{} bytes", moved);
            }
        }
    }
}
