//! What one leader hands to the next: the membership without its clock.
//!
//! A coordinator that takes over goes on exactly where the one before stopped:
//! same node ids, same placements, same epochs. Every node is given a whole
//! lease to find it.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{MAX_EPOCH, MAX_NODES, Membership, Node, Published, Report, Role};
use crate::placement::{NodeId, NodeSlots, Placement};

/// A membership at rest. What changes with every heartbeat (how busy a node is,
/// its words) is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    model_digest: String,
    nodes: Vec<SavedNode>,
    last_id: NodeId,
    active: Option<SavedPlacement>,
    next: Option<SavedPlacement>,
    active_since: u64,
    newest_epoch: u64,
    served: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNode {
    id: NodeId,
    expert: bool,
    name: String,
    address: String,
    numerics_class: String,
    incarnation: u64,
    capacity_bytes: u64,
    resident: u64,
    epoch: u64,
    ready: bool,
    draining: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPlacement {
    epoch: u64,
    loaded_as: u64,
    homes: Vec<SavedHome>,
}

/// A node of a placement: (id, name, address, slots). Slots come as runs of one
/// layer, which makes them half as long in text.
type SavedHome = (NodeId, String, String, Vec<Run>);
/// A layer and the experts of it in the next slots.
type Run = (u32, Vec<u32>);

/// Why a snapshot cannot be gone on from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// It is of another model.
    #[error("it is of the model with digest {theirs}, this coordinator serves {ours}")]
    Model {
        /// Of the snapshot.
        theirs: String,
        /// Of this membership.
        ours: String,
    },
    /// It contradicts itself.
    #[error("{0}")]
    Broken(String),
}

impl Snapshot {
    /// The highest epoch that was in use.
    pub fn newest_epoch(&self) -> u64 {
        self.newest_epoch
    }

    /// Whether a request had been served.
    pub fn served(&self) -> bool {
        self.served
    }

    /// Ids of the nodes in it.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.iter().map(|node| node.id)
    }
}

impl Membership {
    /// All that the next leader has to know.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            model_digest: self.settings.model_digest.clone(),
            nodes: self.nodes.values().map(saved).collect(),
            last_id: self.last_id,
            active: self.active.as_ref().map(saved_placement),
            next: self.next.as_ref().map(saved_placement),
            active_since: self.active_since,
            newest_epoch: self.newest_epoch,
            served: self.served,
        }
    }

    /// Goes on from a snapshot, in place of all that was known here: its nodes
    /// are taken for alive as of `now`. Epochs seen here are not forgotten.
    ///
    /// # Errors
    /// It is of another model or broken. Nothing but the newest epoch is taken
    /// from it then.
    pub fn resume(&mut self, now: Duration, from: &Snapshot) -> Result<(), SnapshotError> {
        self.newest_epoch = self.newest_epoch.max(from.newest_epoch.min(MAX_EPOCH));
        if from.model_digest != self.settings.model_digest {
            return Err(SnapshotError::Model {
                theirs: from.model_digest.clone(),
                ours: self.settings.model_digest.clone(),
            });
        }
        let most = from.nodes.iter().map(|node| node.id).max().unwrap_or(0);
        if from.nodes.len() > MAX_NODES || most > from.last_id {
            return Err(SnapshotError::Broken("its nodes are not in order".into()));
        }
        let active = restored(from.active.as_ref(), true)?;
        let next = restored(from.next.as_ref(), false)?;
        self.nodes = from
            .nodes
            .iter()
            .map(|node| (node.id, node.restore(now)))
            .collect();
        self.last_id = self.last_id.max(from.last_id);
        self.active = active;
        self.next = next;
        self.active_since = from.active_since;
        self.served = from.served;
        self.remembered = VecDeque::from_iter(from.nodes.iter().map(|node| node.incarnation));
        self.shortfall = None;
        // What was about to be done is thought over anew; it may be nothing.
        self.plan_at = Some(now + self.settings.settle);
        Ok(())
    }
}

fn saved(node: &Node) -> SavedNode {
    SavedNode {
        id: node.id,
        expert: node.role == Role::Expert,
        name: node.name.clone(),
        address: node.address.clone(),
        numerics_class: node.numerics_class.clone(),
        incarnation: node.incarnation,
        capacity_bytes: node.capacity_bytes,
        resident: node.resident,
        epoch: node.report.epoch,
        ready: node.report.ready,
        draining: node.report.draining,
    }
}

impl SavedNode {
    fn restore(&self, now: Duration) -> Node {
        Node {
            id: self.id,
            role: match self.expert {
                true => Role::Expert,
                false => Role::Attention,
            },
            name: self.name.clone(),
            address: self.address.clone(),
            numerics_class: self.numerics_class.clone(),
            report: Report {
                epoch: self.epoch,
                ready: self.ready,
                draining: self.draining,
                ..Report::default()
            },
            incarnation: self.incarnation,
            capacity_bytes: self.capacity_bytes,
            resident: self.resident,
            last_seen: now,
        }
    }
}

fn saved_placement(published: &Published) -> SavedPlacement {
    let homes = published.placement.nodes().iter().zip(&published.nodes);
    SavedPlacement {
        epoch: published.placement.epoch(),
        loaded_as: published.loaded_as,
        homes: homes
            .map(|(slots, (name, address))| {
                (
                    slots.node,
                    name.clone(),
                    address.clone(),
                    runs(&slots.slots),
                )
            })
            .collect(),
    }
}

fn restored(
    saved: Option<&SavedPlacement>,
    active: bool,
) -> Result<Option<Published>, SnapshotError> {
    let Some(saved) = saved else {
        return Ok(None);
    };
    let slots = |(node, .., runs): &SavedHome| NodeSlots {
        node: *node,
        slots: runs
            .iter()
            .flat_map(|(layer, experts)| experts.iter().map(|&expert| (*layer, expert)))
            .collect(),
    };
    let placement = Placement::new(saved.epoch, saved.homes.iter().map(slots).collect())
        .map_err(|error| SnapshotError::Broken(error.to_string()))?;
    let names = saved.homes.iter();
    Ok(Some(Published {
        placement,
        active,
        loaded_as: saved.loaded_as,
        nodes: names
            .map(|(_, name, address, _)| (name.clone(), address.clone()))
            .collect(),
    }))
}

fn runs(slots: &[(u32, u32)]) -> Vec<Run> {
    slots
        .chunk_by(|a, b| a.0 == b.0)
        .map(|run| (run[0].0, run.iter().map(|slot| slot.1).collect()))
        .collect()
}
