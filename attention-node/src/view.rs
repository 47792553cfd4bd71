//! The placement an attention node routes by: logical experts to (node, slot), with the names
//! that go into messages. Secret: how a published placement is checked before it is believed.

use std::collections::BTreeMap;

use guild_proto::cluster::v1 as wire;
use guild_scheduler::placement::{Home, NodeSlots, Placement, PlacementError};
use guild_transport::NodeId;

/// One placement epoch as seen from here.
#[derive(Debug)]
pub struct View {
    placement: Placement,
    names: BTreeMap<NodeId, String>,
}

/// A node of a view, as the fabric needs it: id, name, `host:port`.
pub type Endpoint = (NodeId, String, String);

impl View {
    /// A view of a placement; `names` are the nodes' names for messages.
    pub fn new(placement: Placement, names: impl IntoIterator<Item = (NodeId, String)>) -> View {
        View {
            placement,
            names: names.into_iter().collect(),
        }
    }

    /// Reads a published placement, and the addresses of its nodes.
    ///
    /// # Errors
    /// It is no placement: an expert twice on one node, a node listed twice, an absurd index.
    pub fn from_wire(wire: &wire::Placement) -> Result<(View, Vec<Endpoint>), PlacementError> {
        let slots = |node: &wire::PlacementNode| {
            let pairs = node.slots.iter().map(|slot| (slot.layer, slot.expert));
            NodeSlots {
                node: node.node_id,
                slots: pairs.collect(),
            }
        };
        let placement = Placement::new(wire.epoch, wire.nodes.iter().map(slots).collect())?;
        let names = wire.nodes.iter().map(|n| (n.node_id, n.name.clone()));
        let endpoints = wire.nodes.iter();
        let endpoints = endpoints.map(|n| (n.node_id, n.name.clone(), n.address.clone()));
        Ok((View::new(placement, names), endpoints.collect()))
    }

    /// The epoch that every frame of this view carries.
    pub fn epoch(&self) -> u64 {
        self.placement.epoch()
    }

    /// Where a logical expert lives, each home on another node; empty when nowhere.
    pub fn resolve(&self, layer: u32, expert: u32) -> &[Home] {
        self.placement.resolve(layer, expert)
    }

    /// Whether the node is part of this placement.
    pub fn has_node(&self, node: NodeId) -> bool {
        self.names.contains_key(&node)
    }

    /// The nodes of this placement, ascending.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.names.keys().copied()
    }

    /// The node's name.
    pub fn name(&self, node: NodeId) -> Option<&str> {
        self.names.get(&node).map(String::as_str)
    }

    /// The first expert of `layer` in `0..experts` that has no home, if any.
    pub fn first_homeless(&self, layer: u32, experts: u32) -> Option<u32> {
        (0..experts).find(|&expert| self.resolve(layer, expert).is_empty())
    }
}
