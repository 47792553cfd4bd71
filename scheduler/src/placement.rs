//! Placement: which nodes hold which expert, and in which slot.
//!
//! Secret of this module: how experts and their copies are shared out. A
//! logical expert is a pair (layer, expert); a home of it is a pair (node,
//! slot), and it may have several, never two on one node. One placement is
//! valid for one epoch and never changes; what replaces it has a higher epoch.
//! The layers come in as a list, so that a multi-token-prediction layer is one
//! more MoE layer and nothing else.

mod assign;

use std::collections::BTreeSet;

pub use assign::{Candidate, Shortfall, assign};

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
    /// One node has the same expert in two slots.
    #[error("expert {expert} of layer {layer} has two homes on node {node}")]
    TwoHomes {
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
        /// The node.
        node: NodeId,
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

/// Where an expert lives: a node, and the slot there.
pub type Home = (NodeId, u32);

/// All homes of one epoch, with a table that finds those of an expert in constant time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    epoch: u64,
    nodes: Vec<NodeSlots>,
    /// Row of the table for each layer index; `NO_ROW` where the layer has no experts.
    rows: Vec<u32>,
    /// [rows * experts + 1]: where in `homes` those of an expert begin; they end
    /// where those of the next begin.
    starts: Vec<u32>,
    /// Of one expert after the other, each in the order of `nodes`.
    homes: Vec<Home>,
    experts: usize,
}

const NO_ROW: u32 = u32::MAX;

impl Placement {
    /// Builds the table of an epoch.
    ///
    /// # Errors
    /// An expert twice on one node, a node listed twice, or an absurd index.
    pub fn new(epoch: u64, nodes: Vec<NodeSlots>) -> Result<Placement, PlacementError> {
        let mut listed = BTreeSet::new();
        let mut layers = BTreeSet::new();
        let (mut experts, mut count) = (0u32, 0usize);
        for node in &nodes {
            if !listed.insert(node.node) {
                return Err(PlacementError::TwiceListed(node.node));
            }
            for &(layer, expert) in &node.slots {
                count += 1;
                if layer >= MAX_INDEX || expert >= MAX_INDEX || count > MAX_HOMES {
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
        let cell =
            |(layer, expert): (u32, u32)| rows[layer as usize] as usize * experts + expert as usize;
        let mut starts = vec![0u32; layers.len() * experts + 1];
        for &key in nodes.iter().flat_map(|node| &node.slots) {
            starts[cell(key) + 1] += 1;
        }
        for at in 1..starts.len() {
            starts[at] += starts[at - 1];
        }
        let mut next = starts.clone();
        let mut homes: Vec<Home> = vec![(0, 0); count];
        for node in &nodes {
            for (slot, &(layer, expert)) in (0u32..).zip(&node.slots) {
                let cell = cell((layer, expert));
                let at = next[cell] as usize;
                // Homes come node by node: one of the same node would be the last.
                if at > starts[cell] as usize && homes[at - 1].0 == node.node {
                    return Err(PlacementError::TwoHomes {
                        layer,
                        expert,
                        node: node.node,
                    });
                }
                homes[at] = (node.node, slot);
                next[cell] += 1;
            }
        }
        Ok(Placement {
            epoch,
            nodes,
            rows,
            starts,
            homes,
            experts,
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

    /// Number of homes, copies included.
    pub fn homes(&self) -> usize {
        self.homes.len()
    }

    /// The homes of an expert, each on another node, in the order of the nodes.
    /// Empty: it has none.
    #[inline]
    pub fn resolve(&self, layer: u32, expert: u32) -> &[Home] {
        match self.rows.get(layer as usize) {
            Some(&row) if row != NO_ROW && (expert as usize) < self.experts => {
                let cell = row as usize * self.experts + expert as usize;
                &self.homes[self.starts[cell] as usize..self.starts[cell + 1] as usize]
            }
            _ => &[],
        }
    }

    /// Homes that every expert `0..experts` of every one of `layers` has at
    /// least; `u32::MAX` where there are no experts.
    pub fn redundancy(&self, layers: &[u32], experts: u32) -> u32 {
        layers
            .iter()
            .flat_map(|&layer| (0..experts).map(move |expert| (layer, expert)))
            .map(|(layer, expert)| self.resolve(layer, expert).len() as u32)
            .min()
            .unwrap_or(u32::MAX)
    }

    /// Whether every expert `0..experts` of every one of `layers` has a home.
    pub fn covers(&self, layers: &[u32], experts: u32) -> bool {
        self.redundancy(layers, experts) > 0
    }

    /// The same placement under a new epoch with only those nodes that `stays`
    /// holds for. They keep their slots.
    pub fn reduced(&self, epoch: u64, stays: impl Fn(NodeId) -> bool) -> Placement {
        let nodes = self.nodes.iter().filter(|node| stays(node.node)).cloned();
        // A part of what has been checked is well formed.
        Placement::new(epoch, nodes.collect()).unwrap_or_else(|_| Placement {
            epoch,
            ..Placement::default()
        })
    }
}
