//! The static assignment: experts and their copies to nodes, by counting alone.
//!
//! Secret: what balanced means here. First homes are contiguous ranges, as long
//! as the node's share; further homes go where least is held, spread so that the
//! loss of one node is shared by all others.

use std::collections::{BTreeMap, BTreeSet};

use super::{NodeId, NodeSlots, Placement};

/// A node that can be given experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub node: NodeId,
    /// Experts it has memory for; `u64::MAX` where it does not matter.
    pub capacity_slots: u64,
    /// Nodes with the same number fail together.
    pub domain: u32,
}

/// The candidates cannot hold all experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} experts need a home and there is room for {available}: {} too few", self.missing())]
pub struct Shortfall {
    /// Experts that need a home.
    pub needed: u64,
    /// Experts that there is room for.
    pub available: u64,
}

impl Shortfall {
    /// Slots that are missing.
    pub fn missing(&self) -> u64 {
        self.needed.saturating_sub(self.available)
    }

    /// Bytes that are missing when one expert takes `slot_bytes`.
    pub fn missing_bytes(&self, slot_bytes: u64) -> u64 {
        self.missing().saturating_mul(slot_bytes)
    }
}

/// Gives every expert `0..experts` of every one of `layers` one home, and as
/// many more as `replicas` asks for while nodes and room allow: each on another
/// node. First homes come before second ones everywhere.
///
/// Without `keep`, the first homes of each node are one contiguous range of
/// experts in every layer, as long as its share of the capacity, so that the
/// experts of one routing group mostly stay together; where the shares are not
/// whole, the extra expert goes to other nodes in other layers. Nodes of equal
/// capacity differ by at most one expert in every layer and in all.
///
/// With `keep`, experts whose home is a candidate stay in that very slot, and
/// only what is missing is given to the nodes that hold least.
///
/// Every home beyond the first goes to another failure domain where one has room,
/// there to the node that holds least of the layer,
/// then least in all, for its capacity; among equals to the one that shares
/// fewest experts with those that have it already. So a node's load passes to
/// several others when it is lost.
///
/// Nodes are taken in ascending id and returned so, whatever the order given;
/// the result depends on nothing else. A node may end up with no slot.
///
/// # Errors
/// Capacity is short of one home each. Nothing is assigned then.
pub fn assign(
    layers: &[u32],
    experts: u32,
    candidates: &[Candidate],
    replicas: u32,
    keep: Option<&Placement>,
) -> Result<Vec<NodeSlots>, Shortfall> {
    let layers: Vec<u32> = layers
        .iter()
        .copied()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let capacities: BTreeMap<NodeId, u64> = candidates
        .iter()
        .map(|candidate| (candidate.node, candidate.capacity_slots))
        .collect();
    let total = layers.len() as u64 * u64::from(experts);
    // A node has no use for more slots than there are experts.
    let most: Vec<u64> = capacities.values().map(|&c| c.min(total)).collect();
    let nodes = match keep {
        None => share_out(&layers, experts, &capacities)?,
        Some(placement) => {
            let held = capacities.keys().map(|&node| NodeSlots {
                node,
                slots: placement
                    .nodes()
                    .iter()
                    .find(|slots| slots.node == node)
                    .map_or_else(Vec::new, |slots| slots.slots.clone()),
            });
            held.collect()
        }
    };
    let domains: BTreeMap<NodeId, u32> = candidates.iter().map(|c| (c.node, c.domain)).collect();
    let domains = domains.into_values().collect();
    let mut filling = Filling::new(nodes, most, domains, &layers, experts);
    filling.every_expert_once(total)?;
    let was = (keep.is_none()).then(|| filling.slots_in_all());
    for copies in 2..=replicas.min(capacities.len() as u32) {
        filling.up_to(copies as usize);
    }
    let copied = was.is_some_and(|was| was < filling.slots_in_all());
    let mut nodes = filling.nodes;
    if copied {
        for node in &mut nodes {
            node.slots.sort_unstable();
        }
    }
    Ok(nodes)
}

/// Nodes that are being given homes.
struct Filling<'a> {
    layers: &'a [u32],
    experts: u32,
    nodes: Vec<NodeSlots>,
    /// Slots a node may have.
    most: Vec<u64>,
    /// What fails with a node.
    domains: Vec<u32>,
    /// [layers, nodes]
    in_layer: Vec<Vec<u64>>,
    /// [layers * experts]: indices of the nodes that have it.
    homes: Vec<Vec<usize>>,
    /// [nodes, nodes]: experts that two nodes share.
    shared: Vec<Vec<u32>>,
}

impl<'a> Filling<'a> {
    fn new(
        nodes: Vec<NodeSlots>,
        most: Vec<u64>,
        domains: Vec<u32>,
        layers: &'a [u32],
        experts: u32,
    ) -> Self {
        let count = nodes.len();
        let mut filling = Filling {
            layers,
            experts,
            most,
            domains,
            in_layer: vec![vec![0; count]; layers.len()],
            homes: vec![Vec::new(); layers.len() * experts as usize],
            shared: vec![vec![0; count]; count],
            nodes,
        };
        for at in 0..count {
            for slot in 0..filling.nodes[at].slots.len() {
                let (layer, expert) = filling.nodes[at].slots[slot];
                if let Ok(turn) = layers.binary_search(&layer)
                    && expert < experts
                {
                    filling.note(turn, expert, at);
                }
            }
        }
        filling
    }

    fn slots_in_all(&self) -> usize {
        self.nodes.iter().map(|node| node.slots.len()).sum()
    }

    fn cell(&self, turn: usize, expert: u32) -> usize {
        turn * self.experts as usize + expert as usize
    }

    fn note(&mut self, turn: usize, expert: u32, at: usize) {
        let cell = self.cell(turn, expert);
        for &other in &self.homes[cell] {
            self.shared[at][other] += 1;
            self.shared[other][at] += 1;
        }
        self.homes[cell].push(at);
        self.in_layer[turn][at] += 1;
    }

    /// A first home for those without.
    fn every_expert_once(&mut self, total: u64) -> Result<(), Shortfall> {
        let orphans = self.homes.iter().filter(|homes| homes.is_empty()).count() as u64;
        let room = |(node, &most): (&NodeSlots, &u64)| most.saturating_sub(node.slots.len() as u64);
        let free = self.nodes.iter().zip(&self.most).map(room);
        let free = free.fold(0u64, u64::saturating_add);
        if free < orphans {
            return Err(Shortfall {
                needed: total,
                available: total - (orphans - free),
            });
        }
        self.up_to(1);
        Ok(())
    }

    /// One more home for every expert that has fewer than `copies`, where there is room.
    fn up_to(&mut self, copies: usize) {
        for turn in 0..self.layers.len() {
            for expert in self.taking_turns(turn) {
                let cell = self.cell(turn, expert);
                while self.homes[cell].len() < copies {
                    let Some(at) = self.best(turn, cell) else {
                        break;
                    };
                    self.nodes[at].slots.push((self.layers[turn], expert));
                    self.note(turn, expert, at);
                }
            }
        }
    }

    /// The experts of a layer, one of each node after the other: with those of
    /// one node last, only the other nodes would be left to take their copies.
    fn taking_turns(&self, turn: usize) -> Vec<u32> {
        let mut seen = vec![0u32; self.nodes.len() + 1];
        let mut order: Vec<(u32, u32)> = (0..self.experts)
            .map(|expert| {
                let first = self.homes[self.cell(turn, expert)].first();
                let seen = &mut seen[first.map_or(self.nodes.len(), |&home| home)];
                *seen += 1;
                (*seen, expert)
            })
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(_, expert)| expert).collect()
    }

    /// Where the next home of an expert goes, if anywhere.
    fn best(&self, turn: usize, cell: usize) -> Option<usize> {
        let count = self.nodes.len();
        let homes = &self.homes[cell];
        let first = homes.first().map_or(0, |&home| home + 1);
        let domain = |at: usize| self.domains[at];
        let near = |at: usize| homes.iter().any(|&home| domain(home) == domain(at));
        let together = |at: usize| homes.iter().map(|&h| self.shared[at][h]).sum::<u32>();
        let part = |held: u64, other: usize| u128::from(held) * u128::from(self.most[other]);
        let held = |at: usize| self.nodes[at].slots.len() as u64;
        (0..count)
            // Beginning behind the first home: equals take turns.
            .map(|step| (first + step) % count)
            .filter(|&at| held(at) < self.most[at] && !homes.contains(&at))
            .min_by(|&a, &b| {
                let layer = &self.in_layer[turn];
                // a / capacity of a < b / capacity of b, without fractions.
                let of_layer = part(layer[a], b).cmp(&part(layer[b], a));
                let in_all = || part(held(a), b).cmp(&part(held(b), a));
                let loss = || together(a).cmp(&together(b));
                let apart = near(a).cmp(&near(b));
                { apart }.then(of_layer).then_with(in_all).then_with(loss)
            })
    }
}

fn share_out(
    layers: &[u32],
    experts: u32,
    capacities: &BTreeMap<NodeId, u64>,
) -> Result<Vec<NodeSlots>, Shortfall> {
    let total = layers.len() as u64 * u64::from(experts);
    // More room than there are experts is no reason for a larger share.
    let weights: Vec<u64> = capacities.values().map(|&c| c.min(total)).collect();
    let available = weights.iter().map(|&w| u128::from(w)).sum::<u128>();
    if available < u128::from(total) {
        return Err(Shortfall {
            needed: total,
            available: available as u64,
        });
    }
    let mut nodes: Vec<NodeSlots> = capacities
        .keys()
        .map(|&node| NodeSlots {
            node,
            slots: Vec::new(),
        })
        .collect();
    if total == 0 {
        return Ok(nodes);
    }

    // The whole part of a node's share is the same in every layer. What is left
    // of a layer is handed out one expert each; how many of these extras a node
    // gets over all layers is decided first, so that no capacity is overrun.
    let share = |weight: u64| u128::from(weight) * u128::from(experts);
    let base: Vec<u64> = weights
        .iter()
        .map(|&w| (share(w) / available) as u64)
        .collect();
    let left_of_layer = u64::from(experts) - base.iter().sum::<u64>();
    let layer_count = layers.len() as u64;
    let mut extras = share_extras(
        &weights,
        &base,
        share,
        available,
        layer_count,
        left_of_layer,
    );

    for (turn, &layer) in layers.iter().enumerate() {
        // Those with most extras still to come go first: then no node is left
        // with more of them than there are layers. Ties move on by one node a
        // layer.
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.rotate_left(turn % nodes.len());
        order.sort_by_key(|&i| std::cmp::Reverse(extras[i]));
        let mut count = base.clone();
        for &i in order.iter().take(left_of_layer as usize) {
            count[i] += 1;
            extras[i] = extras[i].saturating_sub(1);
        }
        let mut expert = 0;
        for (node, count) in nodes.iter_mut().zip(count) {
            let end = expert + count as u32;
            node.slots
                .extend((expert..end).map(|expert| (layer, expert)));
            expert = end;
        }
    }
    Ok(nodes)
}

/// How many extras each node gets over all layers: in proportion to the
/// fraction its share leaves, by largest remainder, at most one a layer and
/// never beyond its capacity.
fn share_extras(
    weights: &[u64],
    base: &[u64],
    share: impl Fn(u64) -> u128,
    available: u128,
    layers: u64,
    left_of_layer: u64,
) -> Vec<u64> {
    let mut remainders = Vec::with_capacity(weights.len());
    let mut extras = Vec::with_capacity(weights.len());
    for &weight in weights {
        let fraction = (share(weight) % available) * u128::from(layers);
        extras.push((fraction / available) as u64);
        remainders.push(fraction % available);
    }
    let mut left = layers * left_of_layer - extras.iter().sum::<u64>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(remainders[i]));
    // A second round is needed only when capacities kept the first from placing all.
    while left > 0 {
        let before = left;
        for &i in &order {
            let room = weights[i].saturating_sub(layers * base[i]).min(layers);
            if left > 0 && extras[i] < room {
                extras[i] += 1;
                left -= 1;
            }
        }
        if left == before {
            break;
        }
    }
    extras
}
