//! Placement: which node holds which expert, and in which slot.
//!
//! Secret of this module: how experts are shared out. A logical expert is a
//! pair (layer, expert); its home is a pair (node, slot). One placement is
//! valid for one epoch and never changes; what replaces it has a higher epoch.
//! The layers come in as a list, so that a multi-token-prediction layer is one
//! more MoE layer and nothing else.

use std::collections::{BTreeMap, BTreeSet};

/// A node of the cluster, as the coordinator numbers it.
pub type NodeId = u32;

/// Layers and experts have indices below this; it bounds the resolve table of
/// a placement that came over the wire.
pub const MAX_INDEX: u32 = 1 << 16;
/// Homes in one placement, at most (DeepSeek-V3 has 15,104 with its MTP layer).
pub const MAX_HOMES: usize = 1 << 20;
/// Entries of the resolve table, at most: layers by the largest expert index.
const MAX_TABLE: u64 = 1 << 24;

/// What one node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSlots {
    /// The node.
    pub node: NodeId,
    /// (layer, expert) of every slot; the index is the slot.
    pub slots: Vec<(u32, u32)>,
}

/// A list of homes that is not a placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// One expert has two homes.
    #[error(
        "expert {expert} of layer {layer} has a home on node {first} and another on node {second}"
    )]
    TwoHomes {
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
        /// The node that was named first.
        first: NodeId,
        /// The node that was named second.
        second: NodeId,
    },
    /// One node is listed twice.
    #[error("node {0} is listed twice")]
    TwiceListed(NodeId),
    /// An index or the number of homes is beyond what any model has.
    #[error("expert {expert} of layer {layer} is out of range, or there are too many homes")]
    OutOfRange {
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
    },
}

/// All homes of one epoch, with a table that finds one in constant time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    epoch: u64,
    nodes: Vec<NodeSlots>,
    /// Row of the table for each layer index; `NO_ROW` where the layer has no experts.
    rows: Vec<u32>,
    /// [rows, experts]
    table: Vec<Option<(NodeId, u32)>>,
    experts: usize,
    homes: usize,
}

const NO_ROW: u32 = u32::MAX;

impl Placement {
    /// Builds the table of an epoch.
    ///
    /// # Errors
    /// An expert with two homes, a node listed twice, or an absurd index.
    pub fn new(epoch: u64, nodes: Vec<NodeSlots>) -> Result<Placement, PlacementError> {
        let mut listed = BTreeSet::new();
        let mut layers = BTreeSet::new();
        let (mut experts, mut homes) = (0u32, 0usize);
        for node in &nodes {
            if !listed.insert(node.node) {
                return Err(PlacementError::TwiceListed(node.node));
            }
            for &(layer, expert) in &node.slots {
                homes += 1;
                if layer >= MAX_INDEX || expert >= MAX_INDEX || homes > MAX_HOMES {
                    return Err(PlacementError::OutOfRange { layer, expert });
                }
                experts = experts.max(expert + 1);
                layers.insert(layer);
            }
        }
        let last_layer = layers.last().copied();
        if layers.len() as u64 * u64::from(experts) > MAX_TABLE {
            return Err(PlacementError::OutOfRange {
                layer: last_layer.unwrap_or(0),
                expert: experts,
            });
        }
        let experts = experts as usize;
        let mut rows = vec![NO_ROW; last_layer.map_or(0, |layer| layer as usize + 1)];
        for (row, &layer) in (0u32..).zip(&layers) {
            rows[layer as usize] = row;
        }
        let mut table: Vec<Option<(NodeId, u32)>> = vec![None; layers.len() * experts];
        for node in &nodes {
            for (slot, &(layer, expert)) in (0u32..).zip(&node.slots) {
                let home = &mut table[rows[layer as usize] as usize * experts + expert as usize];
                if let Some((first, _)) = *home {
                    return Err(PlacementError::TwoHomes {
                        layer,
                        expert,
                        first,
                        second: node.node,
                    });
                }
                *home = Some((node.node, slot));
            }
        }
        Ok(Placement {
            epoch,
            nodes,
            rows,
            table,
            experts,
            homes,
        })
    }

    /// The epoch that every frame sent by this placement carries.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What each node holds.
    pub fn nodes(&self) -> &[NodeSlots] {
        &self.nodes
    }

    /// Number of experts that have a home.
    pub fn homes(&self) -> usize {
        self.homes
    }

    /// The home of an expert: its node and the slot there. None: it has none.
    #[inline]
    pub fn resolve(&self, layer: u32, expert: u32) -> Option<(NodeId, u32)> {
        let row = *self.rows.get(layer as usize)?;
        if row == NO_ROW || expert as usize >= self.experts {
            return None;
        }
        self.table[row as usize * self.experts + expert as usize]
    }

    /// Whether every expert `0..experts` of every one of `layers` has a home.
    pub fn covers(&self, layers: &[u32], experts: u32) -> bool {
        layers
            .iter()
            .all(|&layer| (0..experts).all(|expert| self.resolve(layer, expert).is_some()))
    }
}

/// A node that can be given experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The node.
    pub node: NodeId,
    /// Experts it has memory for; `u64::MAX` where it does not matter.
    pub capacity_slots: u64,
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

/// Gives every expert `0..experts` of every one of `layers` one home.
///
/// Without `keep`, each node gets one contiguous range of experts in every
/// layer, as long as its share of the capacity, so that the experts of one
/// routing group mostly stay together; where the shares are not whole, the
/// extra expert goes to other nodes in other layers. Nodes of equal capacity
/// differ by at most one expert in every layer and in all.
///
/// With `keep`, experts whose home is a candidate stay in that very slot, and
/// only the others are given to the nodes with most room.
///
/// Nodes are taken in ascending id and returned so, whatever the order given;
/// the result depends on nothing else. A node may end up with no slot.
///
/// # Errors
/// Capacity is short. Nothing is assigned then.
pub fn assign(
    layers: &[u32],
    experts: u32,
    candidates: &[Candidate],
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
    match keep {
        Some(placement) => fill_holes(&layers, experts, &capacities, placement),
        None => share_out(&layers, experts, &capacities),
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

fn fill_holes(
    layers: &[u32],
    experts: u32,
    capacities: &BTreeMap<NodeId, u64>,
    keep: &Placement,
) -> Result<Vec<NodeSlots>, Shortfall> {
    let total = layers.len() as u64 * u64::from(experts);
    let mut held: BTreeMap<NodeId, Vec<(u32, u32)>> =
        capacities.keys().map(|&node| (node, Vec::new())).collect();
    for node in keep.nodes() {
        if let Some(slots) = held.get_mut(&node.node) {
            slots.clone_from(&node.slots);
        }
    }
    let mut orphans = Vec::new();
    for &layer in layers {
        for expert in 0..experts {
            let live = keep
                .resolve(layer, expert)
                .is_some_and(|(node, _)| held.contains_key(&node));
            if !live {
                orphans.push((layer, expert));
            }
        }
    }
    let mut room: BTreeMap<NodeId, u64> = capacities
        .iter()
        .map(|(&node, &capacity)| {
            let used = held.get(&node).map_or(0, Vec::len) as u64;
            (node, capacity.min(total).saturating_sub(used))
        })
        .collect();
    let free = room.values().fold(0u64, |sum, &r| sum.saturating_add(r));
    if free < orphans.len() as u64 {
        return Err(Shortfall {
            needed: total,
            available: total - (orphans.len() as u64 - free),
        });
    }
    for orphan in orphans {
        // Ties go to the lowest id.
        let most = room
            .iter_mut()
            .max_by_key(|(node, room)| (**room, std::cmp::Reverse(**node)));
        if let Some((node, room)) = most {
            *room = room.saturating_sub(1);
            held.entry(*node).or_default().push(orphan);
        }
    }
    Ok(held
        .into_iter()
        .map(|(node, slots)| NodeSlots { node, slots })
        .collect())
}
