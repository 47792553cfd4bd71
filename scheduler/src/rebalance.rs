//! From what the leader knows to what is worth moving.
//!
//! Secret of this module: how a cluster looks to the planner: which nodes may be
//! given experts, how much room of each layer they have, how fast they are, what
//! fails together. It reads the membership and changes nothing; a proposal is
//! begun with [`Membership::migrate`].

use std::collections::{BTreeMap, BTreeSet};

use crate::load::Shot;
use crate::membership::{Membership, Node, Role, Settings};
use crate::placement::{NodeId, NodeSlots, Placement};
use crate::planner::{self, Aim, Cluster, Layer, Plan, PlanError, Split};

/// Measured speeds within this ratio may be those of like nodes.
const ALIKE: f64 = 1.25;

/// Who plans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The planner: improves what is there under the budget.
    #[default]
    Guild,
    /// EPLB as published, made anew for the whole window, whatever it moves: what
    /// the planner is compared with.
    Eplb,
}

/// What a proposal may do.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Who plans.
    pub mode: Mode,
    /// Bytes that may move for balance.
    pub budget_bytes: u64,
    /// How attention nodes are taken to share rows out among replicas.
    pub aim: Aim,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            mode: Mode::Guild,
            budget_bytes: u64::MAX,
            aim: Aim::Both,
        }
    }
}

/// What is worth moving.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    /// Where everything is to be; the active placement if nothing is worth it.
    pub target: Vec<NodeSlots>,
    /// What moves and why, in words.
    pub moves: Vec<String>,
    /// Bytes that move.
    pub bytes: u64,
    /// Load over capacity of the worst node relative to perfect balance (1),
    /// mean over the layers, as it is.
    pub before: f64,
    /// The same with the target.
    pub after: f64,
}

/// There is nothing to propose from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProposeError {
    /// No placement is active.
    #[error("no placement is active; experts are moved when the cluster is ready")]
    NotActive,
    /// The model has no routed experts.
    #[error("the model has no routed experts")]
    NoExperts,
    /// The planner cannot plan for this cluster.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Plans the next placement from the active one and a window of shots, oldest
/// first, whose rows are in the order of the settings' layers. The same inputs
/// give the same proposal.
///
/// # Errors
/// Nothing is active, or the planner refuses the cluster or a shot.
pub fn propose(
    membership: &Membership,
    shots: &[&Shot],
    policy: &Policy,
) -> Result<Proposal, ProposeError> {
    let active = membership.active().ok_or(ProposeError::NotActive)?;
    let settings = membership.settings();
    if settings.layers.is_empty() || settings.experts == 0 {
        return Err(ProposeError::NoExperts);
    }
    let view = View::new(membership, active.placement.nodes());
    let room = view.room(settings);
    let cluster = view.cluster(settings, &room);
    let with = view.policy(settings, policy, room);
    let plan = match policy.mode {
        Mode::Guild => planner::plan(&cluster, shots, &with)?,
        Mode::Eplb => planner::afresh(&cluster, shots, &with)?,
    };
    let mean = |of: fn(&planner::LayerReport) -> f64| {
        plan.reports.iter().map(of).sum::<f64>() / plan.reports.len() as f64
    };
    let (before, after) = (mean(|report| report.before), mean(|report| report.after));
    let target = view.target(&plan.layers);
    // Homes come before balance: what has no room elsewhere stays where it is.
    let least = |nodes: &[NodeSlots]| {
        let placement = Placement::new(0, nodes.to_vec()).unwrap_or_default();
        placement.redundancy(&settings.layers, settings.experts)
    };
    let had = least(active.placement.nodes());
    if least(&target) < had.min(settings.replicas.max(1)) {
        return Ok(Proposal {
            target: active.placement.nodes().to_vec(),
            moves: Vec::new(),
            bytes: 0,
            before,
            after: before,
        });
    }
    Ok(Proposal {
        target,
        moves: view.words(&plan),
        bytes: plan.bytes.saturating_add(plan.lost_bytes),
        before,
        after,
    })
}

/// The expert nodes as the planner is to see them.
struct View<'a> {
    nodes: Vec<Seen<'a>>,
    /// Expert nodes in the process of an attention node.
    wireless: Vec<NodeId>,
    domains: BTreeMap<NodeId, u32>,
    layers: &'a [u32],
}

/// One expert node.
struct Seen<'a> {
    node: &'a Node,
    /// It may keep what it holds: it is not to be emptied.
    stays: bool,
    /// Experts may come to it.
    open: bool,
    /// Slots in all; `u64::MAX`: any number.
    capacity: u64,
    /// [layers]: the experts of each that it holds.
    held: Vec<Vec<u32>>,
}

impl<'a> View<'a> {
    fn new(membership: &'a Membership, active: &[NodeSlots]) -> View<'a> {
        let layers = &membership.settings().layers;
        let rows: BTreeMap<u32, usize> = layers.iter().copied().zip(0..).collect();
        let held = |id: NodeId| {
            let mut held = vec![Vec::new(); layers.len()];
            let here = active.iter().filter(|slots| slots.node == id);
            for (layer, expert) in here.flat_map(|slots| &slots.slots) {
                if let Some(&row) = rows.get(layer) {
                    held[row].push(*expert);
                }
            }
            held
        };
        let attention: BTreeSet<&String> = (membership.nodes())
            .filter(|node| node.role == Role::Attention && !node.process.is_empty())
            .map(|node| &node.process)
            .collect();
        let experts = membership.nodes().filter(|node| node.role == Role::Expert);
        View {
            nodes: experts
                .map(|node| Seen {
                    node,
                    stays: !node.report.draining && !membership.is_drained(node),
                    open: membership.is_open(node),
                    capacity: membership.capacity_slots(node),
                    held: held(node.id),
                })
                .collect(),
            wireless: (membership.nodes())
                .filter(|node| node.role == Role::Expert && attention.contains(&node.process))
                .map(|node| node.id)
                .collect(),
            domains: membership.domains(),
            layers,
        }
    }

    /// Rows a second in ratios, when all are known.
    fn speeds(&self) -> Vec<f64> {
        let of = |seen: &Seen| match seen.stays {
            true => Some(seen.node.speed),
            false => None,
        };
        speeds(&self.nodes.iter().map(of).collect::<Vec<_>>())
    }

    /// Experts of each layer that each node may hold, [layers, nodes]. A node of
    /// finite memory keeps one slot free: a copy that replaces another expert is
    /// there beside it for a while.
    fn room(&self, settings: &Settings) -> Vec<Vec<u32>> {
        let experts = u64::from(settings.experts);
        let homes = homes(settings) as f64;
        let speeds = self.speeds();
        let all: f64 = { self.nodes.iter().zip(&speeds) }
            .filter(|(seen, _)| seen.stays)
            .map(|(_, speed)| speed)
            .sum();
        let mut room = vec![Vec::with_capacity(self.nodes.len()); self.layers.len()];
        for (seen, speed) in self.nodes.iter().zip(&speeds) {
            let held: Vec<u64> = seen.held.iter().map(|held| held.len() as u64).collect();
            let mine = match seen.capacity {
                u64::MAX => {
                    let share = (homes * speed / all).ceil() as u64 + 1;
                    held.iter()
                        .map(|&held| held.max(share.min(experts)))
                        .collect()
                }
                capacity => levelled(&held, capacity.saturating_sub(1), experts),
            };
            for (row, mine) in room.iter_mut().zip(mine) {
                row.push(mine as u32);
            }
        }
        room
    }

    fn cluster(&self, settings: &Settings, room: &[Vec<u32>]) -> Cluster {
        let speeds = self.speeds();
        let node = |(n, seen): (usize, &Seen)| planner::Node {
            id: seen.node.id,
            capacity: speeds[n],
            slots: room.iter().map(|row| row[n]).max().unwrap_or(0),
            domain: self.domains.get(&seen.node.id).copied().unwrap_or_default(),
            live: seen.stays,
        };
        let layer = |(row, &layer): (usize, &u32)| Layer {
            layer,
            slots: (self.nodes.iter())
                .map(|seen| seen.held[row].iter().copied().map(Some).collect())
                .collect(),
        };
        Cluster {
            nodes: self.nodes.iter().enumerate().map(node).collect(),
            layers: self.layers.iter().enumerate().map(layer).collect(),
            experts: settings.experts,
            expert_bytes: settings.slot_bytes,
        }
    }

    fn policy(&self, settings: &Settings, policy: &Policy, room: Vec<Vec<u32>>) -> planner::Policy {
        let closed = self.nodes.iter().filter(|seen| seen.stays && !seen.open);
        planner::Policy {
            budget_bytes: policy.budget_bytes,
            aim: policy.aim,
            min_homes: settings.replicas.max(1) as usize,
            max_homes: homes(settings) as usize,
            room,
            closed: closed.map(|seen| seen.node.id).collect(),
            wireless: self.wireless.clone(),
            ..planner::Policy::default()
        }
    }

    fn words(&self, plan: &Plan) -> Vec<String> {
        let names: BTreeMap<NodeId, &str> = { self.nodes.iter() }
            .map(|seen| (seen.node.id, seen.node.name.as_str()))
            .collect();
        let name = |id: u32| {
            names
                .get(&id)
                .map_or_else(String::new, |name| (*name).to_owned())
        };
        let moves = plan.moves.iter().map(|m| m.in_words(&name));
        let leave = self.nodes.iter().filter(|seen| !seen.stays);
        let leave = leave.filter_map(|seen| {
            let held: usize = seen.held.iter().map(Vec::len).sum();
            let name = &seen.node.name;
            (held > 0).then(|| format!("{held} experts leave {name}, which is being emptied"))
        });
        moves.chain(leave).collect()
    }

    /// What a plan has every node hold, by ascending node.
    fn target(&self, planned: &[Layer]) -> Vec<NodeSlots> {
        let node = |(n, seen): (usize, &Seen)| NodeSlots {
            node: seen.node.id,
            slots: (planned.iter())
                .flat_map(|layer| {
                    let held = layer.slots[n].iter().flatten();
                    held.map(|&expert| (layer.layer, expert))
                })
                .collect(),
        };
        let nodes = self.nodes.iter().enumerate().map(node);
        nodes.filter(|node| !node.slots.is_empty()).collect()
    }
}

/// Homes that a layer may have in all.
fn homes(settings: &Settings) -> u64 {
    let replicas = u64::from(settings.replicas.max(1));
    u64::from(settings.experts) * replicas + u64::from(settings.redundant_experts)
}

/// Shares `room` slots out over layers so that the least is highest; none gets
/// less than it holds, nor more than `most`.
fn levelled(held: &[u64], room: u64, most: u64) -> Vec<u64> {
    let at = |level: u64| held.iter().map(move |&held| held.max(level));
    let fits = |level: &u64| at(*level).sum::<u64>() <= room;
    let level = (1..=most).take_while(fits).last().unwrap_or(0);
    let mut rooms: Vec<u64> = at(level).collect();
    let mut left = room.saturating_sub(rooms.iter().sum());
    for mine in &mut rooms {
        if left > 0 && *mine == level && level < most {
            *mine += 1;
            left -= 1;
        }
    }
    rooms
}

/// Rows that each node of a placement gets of each layer when a shot meets it,
/// [layers, nodes]; what has no home is left out.
pub fn shares(
    nodes: &[NodeSlots],
    layers: &[u32],
    shot: &Shot,
    speeds: &[f64],
    split: Split,
) -> Vec<Vec<f64>> {
    let experts = shot.rows.first().map_or(0, Vec::len) as u32;
    let held = |layer: u32, node: &NodeSlots| -> Vec<Option<u32>> {
        let slots = node.slots.iter();
        let slots = slots.filter(|(of, expert)| *of == layer && *expert < experts);
        slots.map(|(_, expert)| Some(*expert)).collect()
    };
    let layers: Vec<Layer> = (layers.iter())
        .map(|&layer| Layer {
            layer,
            slots: nodes.iter().map(|node| held(layer, node)).collect(),
        })
        .collect();
    let node = |(n, (node, &capacity)): (usize, (&NodeSlots, &f64))| planner::Node {
        id: node.node,
        capacity,
        // Room for what has no home, so that it does not matter here.
        slots: { layers.iter().map(|layer| layer.slots[n].len()) }
            .max()
            .unwrap_or(0) as u32
            + if n == 0 { experts } else { 0 },
        domain: 0,
        live: true,
    };
    let none = vec![vec![0.0; nodes.len()]; layers.len()];
    let cluster = Cluster {
        nodes: nodes.iter().zip(speeds).enumerate().map(node).collect(),
        layers,
        experts,
        expert_bytes: 0,
    };
    let Ok(mut loads) = planner::node_loads(&cluster, shot, split) else {
        return none;
    };
    for (load, speed) in loads
        .iter_mut()
        .flat_map(|nodes| nodes.iter_mut().zip(speeds))
    {
        *load *= speed;
    }
    loads
}

/// What measured rows a second say of nodes, in ratios: nodes that differ by no
/// more than measurements do count as alike, and all do as long as one of them
/// (0) has not been measured. None: a node that does not matter.
pub fn speeds(measured: &[Option<f64>]) -> Vec<f64> {
    let mut speeds = vec![1.0; measured.len()];
    let mut known: Vec<(f64, usize)> = { measured.iter().zip(0..) }
        .filter_map(|(speed, n)| speed.map(|speed| (speed, n)))
        .collect();
    if known
        .iter()
        .any(|(speed, _)| !speed.is_normal() || *speed < 0.0)
    {
        return speeds;
    }
    known.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    while let Some(&(slowest, _)) = known.first() {
        let alike = known.partition_point(|(speed, _)| *speed <= slowest * ALIKE);
        let mean = known[..alike].iter().map(|(speed, _)| speed).sum::<f64>() / alike as f64;
        for (_, n) in known.drain(..alike) {
            speeds[n] = mean;
        }
    }
    speeds
}
