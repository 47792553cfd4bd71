//! The placement an attention node routes by: logical experts to (node, slot), with what is known
//! of the nodes. Secret: how a published placement is checked before it is believed.

use std::collections::BTreeMap;

use guild_proto::cluster::v1 as wire;
use guild_scheduler::placement::{Home, NodeSlots, Placement, PlacementError};
use guild_transport::NodeId;
use tokio::sync::watch;

/// One placement epoch as seen from here.
#[derive(Debug)]
pub struct View {
    placement: Placement,
    nodes: BTreeMap<NodeId, Node>,
    lost: Option<String>,
    in_use: watch::Sender<()>,
}

/// What a placement says of a node beside its slots.
#[derive(Clone, Debug, Default)]
struct Node {
    name: String,
    process: String,
    rows_per_second: Option<f64>,
}

/// A node of a view, as the fabric needs it: id, name, `host:port`.
pub type Endpoint = (NodeId, String, String);

impl View {
    /// A view of a placement; `names` are the nodes' names for messages.
    pub fn new(placement: Placement, names: impl IntoIterator<Item = (NodeId, String)>) -> View {
        let nodes = names.into_iter().map(|(node, name)| {
            let known = Node {
                name,
                ..Node::default()
            };
            (node, known)
        });
        View {
            placement,
            nodes: nodes.collect(),
            lost: None,
            in_use: watch::Sender::new(()),
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
        let nodes = wire.nodes.iter().map(|node| {
            let rows = node.rows_per_second;
            let known = Node {
                name: node.name.clone(),
                process: node.process.clone(),
                rows_per_second: (rows.is_normal() && rows > 0.0).then_some(rows),
            };
            (node.node_id, known)
        });
        let endpoints = wire.nodes.iter();
        let endpoints = endpoints.map(|n| (n.node_id, n.name.clone(), n.address.clone()));
        let view = View {
            nodes: nodes.collect(),
            ..View::new(placement, [])
        };
        Ok((view, endpoints.collect()))
    }

    /// The same when experts of it have no home any more and nobody has room for them, as `reason`
    /// says: what does not answer is not worth waiting for.
    pub fn without(&self, reason: &str) -> View {
        View {
            placement: self.placement.clone(),
            nodes: self.nodes.clone(),
            lost: Some(reason.to_owned()),
            in_use: watch::Sender::new(()),
        }
    }

    /// Why some experts will not answer, if that is known.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
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
        self.nodes.contains_key(&node)
    }

    /// The nodes of this placement, ascending.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.keys().copied()
    }

    /// The node's name.
    pub fn name(&self, node: NodeId) -> Option<&str> {
        self.nodes.get(&node).map(|node| node.name.as_str())
    }

    /// Whether the node runs in the process of this name; an empty one is nobody's.
    pub fn runs_in(&self, node: NodeId, process: &str) -> bool {
        let node = self.nodes.get(&node);
        !process.is_empty() && node.is_some_and(|node| node.process == process)
    }

    /// Rows that the node executes in a second, where that was measured.
    pub fn rows_per_second(&self, node: NodeId) -> Option<f64> {
        self.nodes.get(&node)?.rows_per_second
    }

    /// Completes when nobody uses this view any more.
    pub fn left(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut in_use = self.in_use.subscribe();
        // Nothing is ever sent: the end is an error.
        async move { while in_use.changed().await.is_ok() {} }
    }

    /// The first expert of `layer` in `0..experts` that has no home, if any.
    pub fn first_homeless(&self, layer: u32, experts: u32) -> Option<u32> {
        (0..experts).find(|&expert| self.resolve(layer, expert).is_empty())
    }
}
