//! The way from one placement to another, in steps that nodes can take.
//!
//! Secret of this module: which copies and drops go together. Every step is a
//! whole placement; the tables of the one before it stay in memory until nobody
//! sends rows by them, so what a node drops makes room for the step after only.
//! It knows placements and room, neither nodes' states nor time.
//!
//! Copies are made where there is room, first those that let a full node drop
//! something. An expert leaves a node in the step in which it has as many other
//! homes as it is to keep; only where nothing else helps, a redundant home goes
//! before its replacement is there. Where every node's share of both placements
//! leaves one slot free, there is always a next step: were all nodes with a copy
//! to come full, each would have more to drop than to take, while every drop
//! that waits does so for one of these copies.

use std::collections::{BTreeMap, BTreeSet};

use crate::placement::{NodeId, NodeSlots};

/// Copies of one step, at most: what is made again when a step fails.
pub const MAX_COPIES_PER_STEP: usize = 64;

/// One slot of a node: (node, layer, expert).
pub type Copied = (NodeId, u32, u32);

/// A part of the way: what is active after it, and what it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The placement after it, by ascending node; none is without slots.
    pub nodes: Vec<NodeSlots>,
    /// What has to be copied to where.
    pub copies: Vec<Copied>,
    /// What nodes no longer hold after it.
    pub drops: Vec<Copied>,
}

/// There is no way to the target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// The target gives an expert no home.
    #[error("expert {expert} of layer {layer} would have no home")]
    NoHome {
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
    },
    /// The target gives a node more than it has room for.
    #[error("node {node} would hold {slots} experts and has room for {capacity}")]
    TooMany {
        /// The node.
        node: NodeId,
        /// Slots of the target.
        slots: u64,
        /// Slots there is room for.
        capacity: u64,
    },
    /// Every node that is to be given something is full, and nothing there can
    /// go before it has another home.
    #[error(
        "node {node} has no free slot for expert {expert} of layer {layer}, and nothing on it has another home; leave a slot free on every node"
    )]
    Full {
        /// A node that is full.
        node: NodeId,
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
    },
}

type Held = BTreeMap<NodeId, BTreeSet<(u32, u32)>>;

/// The whole way from `active` to `target`; empty when both are the same.
/// `capacity` gives the slots a node has in all (`u64::MAX`: any number).
///
/// # Errors
/// There is no way; the message says where it ends.
pub fn steps(
    active: &[NodeSlots],
    target: &[NodeSlots],
    capacity: impl Fn(NodeId) -> u64,
) -> Result<Vec<Step>, Unreachable> {
    let mut all: Vec<Step> = Vec::new();
    // Every step brings the two closer, so this ends.
    loop {
        let now = all.last().map_or(active, |step| &step.nodes);
        match next_step(now, target, &capacity)? {
            Some(step) => all.push(step),
            None => return Ok(all),
        }
    }
}

/// The next step of the way; None when `active` is the target.
///
/// # Errors
/// As [`steps`].
pub fn next_step(
    active: &[NodeSlots],
    target: &[NodeSlots],
    capacity: impl Fn(NodeId) -> u64,
) -> Result<Option<Step>, Unreachable> {
    let (held, wanted) = (sets(active), sets(target));
    let (have, want) = (count(&held), count(&wanted));
    if let Some(&(layer, expert)) = have.keys().find(|key| !want.contains_key(key)) {
        return Err(Unreachable::NoHome { layer, expert });
    }
    for (&node, slots) in &wanted {
        let (slots, capacity) = (slots.len() as u64, capacity(node));
        if slots > capacity {
            return Err(Unreachable::TooMany {
                node,
                slots,
                capacity,
            });
        }
    }
    let mut way = Way {
        copies: without(&wanted, &held),
        drops: without(&held, &wanted),
        room: wanted
            .keys()
            .map(|&node| {
                let held = held.get(&node).map_or(0, BTreeSet::len) as u64;
                (node, capacity(node).saturating_sub(held))
            })
            .collect(),
        homes: have.clone(),
    };
    let copies = way.copy();
    let least = |key: &(u32, u32)| match have.get(key) {
        Some(&have) => have.min(want.get(key).copied().unwrap_or(0)),
        None => 1,
    };
    let all = way.drops.clone();
    let mut drops = way.drop(&all, &least);
    if copies.is_empty() && drops.is_empty() {
        let Some(&(node, layer, expert)) = way.copies.first() else {
            return Ok(None);
        };
        let full: Vec<Copied> = all
            .into_iter()
            .filter(|drop| way.copies.iter().any(|copy| copy.0 == drop.0))
            .collect();
        drops = way.drop(&full, &|_| 1);
        if drops.is_empty() {
            return Err(Unreachable::Full {
                node,
                layer,
                expert,
            });
        }
    }
    Ok(Some(Step {
        nodes: after(active, &copies, &drops),
        copies,
        drops,
    }))
}

/// What is left of the way.
struct Way {
    copies: Vec<Copied>,
    drops: Vec<Copied>,
    room: BTreeMap<NodeId, u64>,
    /// Homes of each expert once this step is taken.
    homes: BTreeMap<(u32, u32), usize>,
}

impl Way {
    /// Chooses the copies of this step.
    fn copy(&mut self) -> Vec<Copied> {
        let mut coming: BTreeMap<NodeId, u64> = BTreeMap::new();
        for &(node, ..) in &self.copies {
            *coming.entry(node).or_default() += 1;
        }
        let tight = |node: &NodeId| {
            coming.get(node).copied().unwrap_or(0) > self.room.get(node).copied().unwrap_or(0)
        };
        let mut leaving: BTreeMap<(u32, u32), bool> = BTreeMap::new();
        for (node, layer, expert) in &self.drops {
            *leaving.entry((*layer, *expert)).or_default() |= tight(node);
        }
        let rank = |&(node, layer, expert): &Copied| {
            let rank = match leaving.get(&(layer, expert)) {
                Some(true) => 0,
                Some(false) => 1,
                None => 2,
            };
            (rank, layer, expert, node)
        };
        self.copies.sort_unstable_by_key(rank);
        let mut chosen = Vec::new();
        for &(node, layer, expert) in &self.copies {
            let Some(room) = self.room.get_mut(&node).filter(|room| **room > 0) else {
                continue;
            };
            if chosen.len() == MAX_COPIES_PER_STEP {
                break;
            }
            *room -= 1;
            *self.homes.entry((layer, expert)).or_default() += 1;
            chosen.push((node, layer, expert));
        }
        chosen
    }

    /// Of `these`, those that leave every expert its least number of homes.
    fn drop(&mut self, these: &[Copied], least: &dyn Fn(&(u32, u32)) -> usize) -> Vec<Copied> {
        let goes = |&&(_, layer, expert): &&Copied| {
            let key = (layer, expert);
            let homes = self.homes.entry(key).or_default();
            let goes = *homes > least(&key).max(1);
            *homes -= usize::from(goes);
            goes
        };
        these.iter().filter(goes).copied().collect()
    }
}

fn sets(nodes: &[NodeSlots]) -> Held {
    let mut held = Held::new();
    for node in nodes {
        held.entry(node.node).or_default().extend(&node.slots);
    }
    held
}

fn count(held: &Held) -> BTreeMap<(u32, u32), usize> {
    let mut count = BTreeMap::new();
    for &key in held.values().flatten() {
        *count.entry(key).or_default() += 1;
    }
    count
}

/// What `these` have and `others` have not.
fn without(these: &Held, others: &Held) -> Vec<Copied> {
    let mut left = Vec::new();
    for (&node, slots) in these {
        let other = others.get(&node);
        let new = slots
            .iter()
            .filter(|key| other.is_none_or(|o| !o.contains(key)));
        left.extend(new.map(|&(layer, expert)| (node, layer, expert)));
    }
    left
}

/// The placement after a step: what stays keeps its order, what comes is behind.
fn after(active: &[NodeSlots], copies: &[Copied], drops: &[Copied]) -> Vec<NodeSlots> {
    let gone: BTreeSet<&Copied> = drops.iter().collect();
    let mut nodes: BTreeMap<NodeId, Vec<(u32, u32)>> = BTreeMap::new();
    for node in active {
        let stay = node.slots.iter().copied();
        let stay = stay.filter(|&(layer, expert)| !gone.contains(&(node.node, layer, expert)));
        nodes.entry(node.node).or_default().extend(stay);
    }
    for &(node, layer, expert) in copies {
        nodes.entry(node).or_default().push((layer, expert));
    }
    nodes
        .into_iter()
        .filter(|(_, slots)| !slots.is_empty())
        .map(|(node, slots)| NodeSlots { node, slots })
        .collect()
}
