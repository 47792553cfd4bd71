//! The plan as the caller gets it: what moves where, why, and what it brings.

use std::collections::BTreeSet;
use std::fmt;

use super::board::Board;
use super::{Cluster, Layer, Node};

/// Why an expert comes to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has no live home: outside the budget.
    Lost,
    /// It has fewer homes than it is to have (outside the budget), or all of them
    /// in one failure domain.
    Replica,
    /// It is hot and has no second home in another failure domain.
    Hot,
    /// Its layer has a cold start or is laid out afresh.
    Fresh,
    /// It relieves the worst nodes.
    Balance,
}

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MoveKind {
    /// The expert is copied into the slot.
    Copy {
        /// A live node to copy from, by its number; None: only the checkpoint has it.
        source: Option<u32>,
        /// The expert that leaves the slot for it.
        replaces: Option<u32>,
        /// Why.
        reason: Reason,
        /// By how much the step it is part of lowers its layer's objective.
        gain: f64,
    },
    /// The expert leaves the slot, which is free then.
    Drop,
}

/// One change of a slot. All of a plan's moves become valid with one epoch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    /// Layer index of the model.
    pub layer: u32,
    /// The expert that comes or goes.
    pub expert: u32,
    /// The node's number.
    pub node: u32,
    /// The slot, among the node's slots of the layer.
    pub slot: u32,
    /// Bytes that this moves.
    pub bytes: u64,
    /// What happens.
    pub kind: MoveKind,
}

/// What a plan does to one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerReport {
    /// Layer index of the model.
    pub layer: u32,
    /// The objective now: worst node's load over capacity, 1 is perfect balance.
    /// Experts without a home are left out.
    pub before: f64,
    /// The objective after the plan, on the same shots.
    pub after: f64,
    /// Experts copied.
    pub copies: u32,
}

/// A placement, how to get there, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The next placement; an expert that stays on a node stays in its slot.
    pub layers: Vec<Layer>,
    /// From the present placement to the next, in the order of layers, nodes, slots.
    pub moves: Vec<Move>,
    /// One report a layer.
    pub reports: Vec<LayerReport>,
    /// Bytes moved within the budget.
    pub bytes: u64,
    /// Bytes moved for homes that were lost, outside the budget.
    pub lost_bytes: u64,
    /// Hot experts, (layer, expert), for which there was no room or no budget
    /// for a second home in another failure domain.
    pub unprotected: Vec<(u32, u32)>,
}

impl Plan {
    /// Whether everything stays as it is.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }
}

impl Move {
    /// The move with the nodes as the caller calls them.
    pub fn in_words(&self, name: &dyn Fn(u32) -> String) -> String {
        let Move {
            layer,
            expert,
            slot,
            bytes,
            kind,
            ..
        } = self;
        let node = name(self.node);
        let MoveKind::Copy {
            source,
            replaces,
            reason,
            gain,
        } = kind
        else {
            return format!("layer {layer}: expert {expert} leaves {node} slot {slot}");
        };
        let source = source.map_or_else(|| "the checkpoint".to_owned(), name);
        let place = replaces.map_or_else(String::new, |e| format!(" in place of expert {e}"));
        let why = match reason {
            Reason::Lost => "it has no live home".to_owned(),
            Reason::Replica => "it is to have more homes, or homes further apart".to_owned(),
            Reason::Hot => "it is hot and has no home in another failure domain".to_owned(),
            Reason::Fresh => "its layer is laid out afresh".to_owned(),
            Reason::Balance => format!("the worst node's load falls by {:.1} %", gain * 100.0),
        };
        format!(
            "layer {layer}: expert {expert} to {node} slot {slot} from {source}{place}: {why} ({bytes} bytes)"
        )
    }
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.in_words(&|node| format!("node {node}")))
    }
}

impl fmt::Display for LayerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LayerReport {
            layer,
            before,
            after,
            copies,
        } = self;
        write!(
            f,
            "layer {layer}: worst node {before:.3} -> {after:.3} of the mean, {copies} copies"
        )
    }
}

pub(super) fn explain(
    cluster: &Cluster,
    views: &[Vec<Node>],
    boards: &[Board],
    before: &[f64],
    unprotected: Vec<(usize, u32)>,
) -> Plan {
    let mut plan = Plan {
        layers: Vec::with_capacity(boards.len()),
        moves: Vec::new(),
        reports: Vec::with_capacity(boards.len()),
        bytes: 0,
        lost_bytes: 0,
        unprotected: (unprotected.into_iter())
            .map(|(row, expert)| (cluster.layers[row].layer, expert))
            .collect(),
    };
    let rows = boards.iter().zip(&cluster.layers).zip(views).zip(before);
    for (((board, layer), view), &before) in rows {
        let first = plan.moves.len();
        let mut lost = lost(cluster, layer);
        let slots = (0..cluster.nodes.len())
            .map(|n| node(cluster, board, layer, (n, &view[n]), &mut lost, &mut plan))
            .collect();
        let copies = plan.moves[first..]
            .iter()
            .filter(|m| m.kind != MoveKind::Drop)
            .count();
        plan.layers.push(Layer {
            layer: layer.layer,
            slots,
        });
        plan.reports.push(LayerReport {
            layer: layer.layer,
            before,
            after: board.objective(),
            copies: copies as u32,
        });
    }
    plan
}

/// The experts of a layer that no live node holds.
fn lost(cluster: &Cluster, layer: &Layer) -> BTreeSet<u32> {
    let live = cluster
        .nodes
        .iter()
        .zip(&layer.slots)
        .filter(|(n, _)| n.live);
    let held: BTreeSet<u32> = live
        .flat_map(|(_, held)| held.iter().flatten().copied())
        .collect();
    (0..cluster.experts).filter(|e| !held.contains(e)).collect()
}

/// The slots of a node after the plan; what stays, stays in its slot.
fn node(
    cluster: &Cluster,
    board: &Board,
    layer: &Layer,
    (n, node): (usize, &Node),
    lost: &mut BTreeSet<u32>,
    plan: &mut Plan,
) -> Vec<Option<u32>> {
    let present = &layer.slots[n];
    if !node.live {
        return Vec::new();
    }
    let mut slots: Vec<Option<u32>> = vec![None; node.slots as usize];
    let mut come = board.held[n].clone();
    come.sort_unstable();
    for (slot, held) in slots.iter_mut().zip(present) {
        if let Some(at) = held.and_then(|e| come.binary_search(&e).ok()) {
            *slot = Some(come.remove(at));
        }
    }
    let mut come = come.into_iter();
    for (slot, now) in slots.iter_mut().enumerate() {
        let was = present.get(slot).copied().flatten();
        if now.is_some() {
            continue;
        }
        *now = come.next();
        let at = |expert, bytes, kind| Move {
            layer: layer.layer,
            expert,
            node: node.id,
            slot: slot as u32,
            bytes,
            kind,
        };
        let Some(expert) = *now else {
            plan.moves
                .extend(was.map(|expert| at(expert, 0, MoveKind::Drop)));
            continue;
        };
        let holders = (cluster.nodes.iter().zip(&layer.slots))
            .filter(|(other, held)| other.live && held.contains(&Some(expert)));
        let source = holders.map(|(other, _)| other.id).next();
        // The search may have taken what was lost on to another node, or copied it
        // and dropped the first copy: one copy is outside the budget, whichever.
        let why = board.why.get(&(n as u32, expert)).copied();
        let (reason, gain) = match why {
            _ if lost.remove(&expert) => (Reason::Lost, 0.0),
            Some((Reason::Lost, _)) | None => (Reason::Balance, 0.0),
            Some(why) => why,
        };
        let bytes = cluster.expert_bytes;
        let sum = if matches!(reason, Reason::Lost | Reason::Replica) {
            &mut plan.lost_bytes
        } else {
            &mut plan.bytes
        };
        *sum = sum.saturating_add(bytes);
        plan.moves.push(at(
            expert,
            bytes,
            MoveKind::Copy {
                source,
                replaces: was,
                reason,
                gain,
            },
        ));
    }
    slots
}
