//! What one leader hands to the next: the membership without its clock.
//!
//! A coordinator that takes over goes on exactly where the one before stopped:
//! same node ids, same placements, same epochs. Every node is given a whole
//! lease to find it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::failing::BackOff;
use super::moving::{LoadingStep, Moving};
use super::planning::placed;
use super::{Duty, MAX_EPOCH, MAX_NODES, Membership, Node, Phase, Placed, Published, Report, Role};
use crate::placement::{NodeId, NodeSlots, Placement};

/// A membership at rest. What changes with every heartbeat (how busy a node is,
/// its words) is not in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    model_digest: String,
    nodes: Vec<SavedNode>,
    last_id: NodeId,
    active: Option<SavedPlacement>,
    next: Option<SavedPlacement>,
    active_since: u64,
    newest_epoch: u64,
    served: bool,
    /// What has been active before, and is still in use.
    #[serde(default)]
    retired: Vec<SavedPlacement>,
    #[serde(default)]
    oldest_epoch: u64,
    #[serde(default)]
    withdrawn: Option<u64>,
    /// Incarnations.
    #[serde(default)]
    drained: Vec<u64>,
    /// Number of the last migration.
    #[serde(default)]
    migrations: u64,
    #[serde(default)]
    migration: Option<SavedMigration>,
    /// Names of nodes that have failed as destinations, and how often.
    #[serde(default)]
    backed_off: Vec<(String, u32)>,
}

/// The migration under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedMigration {
    cause: String,
    drains: Option<NodeId>,
    target: Vec<(NodeId, Vec<Run>)>,
    copies_done: u32,
    copies: u32,
    /// The epoch that is being loaded, and its copies.
    step: Option<(u64, u32)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    #[serde(default)]
    process: String,
    #[serde(default)]
    failure_domain: String,
    #[serde(default)]
    duty: Duty,
    #[serde(default)]
    speed: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPlacement {
    epoch: u64,
    loaded_as: u64,
    #[serde(default)]
    was_active: bool,
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
            retired: self.retired.iter().map(saved_table).collect(),
            oldest_epoch: self.oldest_epoch,
            withdrawn: self.withdrawn,
            drained: self.drained.iter().copied().collect(),
            migrations: self.status.migration,
            migration: self.saved_migration(),
            backed_off: (self.backed_off.iter())
                .map(|(name, entry)| (name.clone(), entry.failures))
                .collect(),
        }
    }

    fn saved_migration(&self) -> Option<SavedMigration> {
        let moving = self.moving.as_ref()?;
        let target = moving.target.iter();
        Some(SavedMigration {
            cause: self.status.cause.clone(),
            drains: moving.drains,
            target: target.map(|n| (n.node, runs(&n.slots))).collect(),
            copies_done: self.status.copies_done,
            copies: self.status.copies,
            step: moving.step.as_ref().map(|step| (step.epoch, step.copies)),
        })
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
        let nodes: BTreeMap<NodeId, Node> = (from.nodes.iter())
            .map(|node| (node.id, node.restore(now)))
            .collect();
        let active = restored(from.active.as_ref(), true, &nodes)?;
        let next = restored(from.next.as_ref(), false, &nodes)?;
        let retired = (from.retired.iter())
            .map(SavedPlacement::table)
            .collect::<Result<Vec<Placement>, SnapshotError>>()?;
        self.nodes = nodes;
        self.last_id = self.last_id.max(from.last_id);
        self.active = active;
        self.next = next;
        self.active_since = from.active_since;
        self.served = from.served;
        self.remembered = VecDeque::from_iter(from.nodes.iter().map(|node| node.incarnation));
        let used = [&self.active, &self.next].into_iter().flatten();
        let used = used.filter(|p| p.active || p.was_active);
        self.last_active = (used.map(|p| p.placement.epoch()))
            .chain(retired.iter().map(Placement::epoch))
            .fold(from.oldest_epoch, u64::max);
        self.retired = retired;
        self.oldest_epoch = from.oldest_epoch;
        self.withdrawn = from.withdrawn;
        self.drained = from.drained.iter().copied().collect();
        self.clock = now;
        self.resume_back_offs(from);
        self.resume_migration(now, from);
        self.shortfall = None;
        // What was about to be done is thought over anew; it may be nothing.
        self.plan_at = Some(now + self.settings.settle);
        Ok(())
    }

    /// Nodes that have failed are left alone for their whole time once more.
    fn resume_back_offs(&mut self, from: &Snapshot) {
        let entries = from.backed_off.iter().take(MAX_NODES);
        self.backed_off = entries
            .map(|(name, failures)| (name.clone(), BackOff::again(*failures, self.clock)))
            .collect();
        self.retry_at = self.next_retry(self.clock);
    }

    /// A step that is being loaded gets its whole time once more.
    fn resume_migration(&mut self, now: Duration, from: &Snapshot) {
        let saved = from.migration.as_ref();
        let next = self.next.as_ref().map(|next| next.placement.epoch());
        self.moving = saved.map(|saved| Moving {
            target: (saved.target.iter())
                .map(|(node, runs)| NodeSlots {
                    node: *node,
                    slots: slots_of(runs),
                })
                .collect(),
            drains: saved.drains,
            step: (saved.step)
                .filter(|(epoch, _)| next == Some(*epoch))
                .map(|(epoch, copies)| LoadingStep {
                    epoch,
                    copies,
                    deadline: now.saturating_add(self.settings.copy_deadline),
                }),
        });
        let status = &mut self.status;
        status.migration = from.migrations;
        status.phase = match &self.moving {
            None => Phase::Idle,
            Some(moving) if moving.step.is_some() => Phase::Copying,
            Some(_) => Phase::Draining,
        };
        if let Some(saved) = saved {
            let bytes = |copies: u32| u64::from(copies).saturating_mul(self.settings.slot_bytes);
            status.epoch = next.unwrap_or(self.last_active);
            status.cause.clone_from(&saved.cause);
            (status.copies_done, status.copies) = (saved.copies_done, saved.copies);
            (status.bytes_done, status.bytes) = (bytes(saved.copies_done), bytes(saved.copies));
        }
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
        process: node.process.clone(),
        failure_domain: node.failure_domain.clone(),
        duty: node.duty,
        speed: node.speed,
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
            process: self.process.clone(),
            failure_domain: self.failure_domain.clone(),
            duty: self.duty,
            tokens_per_second: 0.0,
            speed: self.speed,
            capacity_bytes: self.capacity_bytes,
            incarnation: self.incarnation,
            resident: self.resident,
            last_seen: now,
            gone_at: None,
        }
    }
}

fn saved_placement(published: &Published) -> SavedPlacement {
    let homes = published.placement.nodes().iter().zip(&published.nodes);
    SavedPlacement {
        epoch: published.placement.epoch(),
        loaded_as: published.loaded_as,
        was_active: published.was_active,
        homes: homes
            .map(|(slots, node)| {
                let runs = runs(&slots.slots);
                (slots.node, node.name.clone(), node.address.clone(), runs)
            })
            .collect(),
    }
}

/// A placement that nobody is told of any more.
fn saved_table(placement: &Placement) -> SavedPlacement {
    let homes = placement.nodes().iter();
    SavedPlacement {
        epoch: placement.epoch(),
        loaded_as: placement.epoch(),
        was_active: true,
        homes: homes
            .map(|slots| {
                let runs = runs(&slots.slots);
                (slots.node, String::new(), String::new(), runs)
            })
            .collect(),
    }
}

impl SavedPlacement {
    fn table(&self) -> Result<Placement, SnapshotError> {
        let slots = |(node, .., runs): &SavedHome| NodeSlots {
            node: *node,
            slots: slots_of(runs),
        };
        Placement::new(self.epoch, self.homes.iter().map(slots).collect())
            .map_err(|error| SnapshotError::Broken(error.to_string()))
    }
}

fn restored(
    saved: Option<&SavedPlacement>,
    active: bool,
    nodes: &BTreeMap<NodeId, Node>,
) -> Result<Option<Published>, SnapshotError> {
    let Some(saved) = saved else {
        return Ok(None);
    };
    let node = |(id, name, address, _): &SavedHome| Placed {
        name: name.clone(),
        address: address.clone(),
        ..nodes.get(id).map(placed).unwrap_or_default()
    };
    Ok(Some(Published {
        placement: saved.table()?,
        active,
        loaded_as: saved.loaded_as,
        was_active: saved.was_active,
        nodes: saved.homes.iter().map(node).collect(),
    }))
}

fn slots_of(runs: &[Run]) -> Vec<(u32, u32)> {
    runs.iter()
        .flat_map(|(layer, experts)| experts.iter().map(|&expert| (*layer, expert)))
        .collect()
}

fn runs(slots: &[(u32, u32)]) -> Vec<Run> {
    slots
        .chunk_by(|a, b| a.0 == b.0)
        .map(|run| (run[0].0, run.iter().map(|slot| slot.1).collect()))
        .collect()
}
