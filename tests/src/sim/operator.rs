//! Who moves experts about: the planner on a timer, and operators with ideas of their own.

use std::collections::BTreeMap;

use guild_scheduler::load::Shot;
use guild_scheduler::membership::Membership;
use guild_scheduler::placement::{NodeId, NodeSlots, Placement};
use guild_scheduler::rebalance::{Policy, ProposeError, propose};

use super::coordinator::PLAN;
use super::event::{SEC, Who};
use super::expert::SLOT_BYTES;
use super::message::Timer;
use super::rng::Rng;
use super::setup::HEAL;
use super::world::{World, note};

impl World {
    /// The leader looks whether something is to be moved.
    pub(super) fn plan(&mut self, at: usize) {
        self.timer(Who::Coordinator(at), PLAN, Timer::Plan);
        if !self.coordinators[at].leads() {
            return;
        }
        if self.now >= HEAL + 4 * SEC {
            return self.let_all_come_back(at);
        }
        match self.rng.below(4) {
            0 => {
                let target = self.some_target(at);
                match self.with(at, |m, now| m.migrate(now, target, "an idea")) {
                    Ok(_) => self.report.count("migration begun"),
                    Err(error) => note!(self, "no migration: {error}"),
                }
            }
            1 if !self.healed => {
                let node = self.rng.below(self.experts.len() as u64) as usize;
                let name = self.experts[node].session.name.clone();
                let undo = self.rng.chance(500);
                match self.with(at, |m, now| m.drain_node(now, &name, undo)) {
                    Ok(_) => self.report.count(if undo {
                        "drain undone"
                    } else {
                        "drain asked for"
                    }),
                    Err(error) => note!(self, "no drain: {error}"),
                }
            }
            _ => self.rebalance(at),
        }
    }

    /// The planner looks at a load, and what it finds worth moving is begun.
    fn rebalance(&mut self, at: usize) {
        let shots: Vec<Shot> = (0..2).map(|_| self.some_load()).collect();
        let shots: Vec<&Shot> = shots.iter().collect();
        let policy = Policy {
            budget_bytes: self.rng.between(1, 8) * SLOT_BYTES,
            ..Policy::default()
        };
        let m = &self.coordinators[at].m;
        let proposal = match propose(m, &shots, &policy) {
            Ok(proposal) => proposal,
            // Dead nodes have left too little room for a plan.
            Err(ProposeError::NotActive | ProposeError::Plan(_)) => return,
            Err(error) => return self.report.wrong(format!("the planner says {error}")),
        };
        if proposal.moves.is_empty() {
            return;
        }
        let redundancy = |nodes: &[NodeSlots]| {
            let placement = Placement::new(0, nodes.to_vec()).unwrap_or_default();
            placement.redundancy(&self.model.layers(), self.model.experts)
        };
        let (had, has) = (m.redundancy().1, redundancy(&proposal.target));
        if has < had.min(self.set.replicas) {
            let wrong = format!("the planner leaves {has} homes of {had}");
            return self.report.wrong(wrong);
        }
        match self.with(at, |m, now| m.migrate(now, proposal.target, "balance")) {
            Ok(_) => self.report.count("rebalance begun"),
            Err(error) => note!(self, "no rebalance: {error}"),
        }
    }

    /// A load in which some experts are hot.
    fn some_load(&mut self) -> Shot {
        let (layers, experts) = (self.model.layers, self.model.experts);
        let rows = |rng: &mut Rng| match rng.chance(200) {
            true => rng.between(500, 2000),
            false => rng.between(0, 100),
        };
        Shot {
            rows: (0..layers)
                .map(|_| (0..experts).map(|_| rows(&mut self.rng)).collect())
                .collect(),
        }
    }

    /// Nobody is to be empty in the end.
    fn let_all_come_back(&mut self, at: usize) {
        let m = &self.coordinators[at].m;
        let drained = m
            .nodes()
            .filter(|node| m.is_drained(node))
            .map(|node| node.name.clone());
        for name in drained.collect::<Vec<_>>() {
            let undone = self.with(at, |m, now| m.drain_node(now, &name, true));
            if undone.is_ok() {
                self.report.count("drain undone");
            }
        }
    }

    /// The active placement with some experts elsewhere, as capacity allows.
    fn some_target(&mut self, at: usize) -> Vec<NodeSlots> {
        let m = &self.coordinators[at].m;
        let Some(active) = m.active() else {
            return Vec::new();
        };
        let mut held: BTreeMap<NodeId, Vec<(u32, u32)>> = BTreeMap::new();
        let open: Vec<(NodeId, u64)> = open_nodes(m);
        if open.is_empty() {
            return Vec::new();
        }
        for node in active.placement.nodes() {
            held.insert(node.node, node.slots.clone());
        }
        for _ in 0..self.rng.between(1, 6) {
            let (to, room) = self.rng.pick(&open);
            let from: Vec<NodeId> = held
                .iter()
                .filter(|(id, s)| **id != to && !s.is_empty())
                .map(|(&id, _)| id)
                .collect();
            if from.is_empty() {
                break;
            }
            let from = self.rng.pick(&from);
            let slot = self.rng.below(held[&from].len() as u64) as usize;
            let key = held[&from][slot];
            let there = held.entry(to).or_default();
            if there.contains(&key) || there.len() as u64 + 1 >= room {
                continue;
            }
            there.push(key);
            // Otherwise it gets one more home.
            if self.rng.chance(800)
                && let Some(slots) = held.get_mut(&from)
            {
                slots.remove(slot);
            }
        }
        held.retain(|_, slots| !slots.is_empty());
        held.into_iter()
            .map(|(node, slots)| NodeSlots { node, slots })
            .collect()
    }
}

/// Expert nodes that can be given something, and the slots of each.
fn open_nodes(m: &Membership) -> Vec<(NodeId, u64)> {
    let open = m.nodes().filter(|node| m.is_open(node));
    open.map(|node| (node.id, m.capacity_slots(node))).collect()
}
