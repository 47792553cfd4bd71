//! The planner: improves the present placement under a budget of bytes.
//!
//! Secret of this module: what is worth moving. It looks at a window of shots,
//! not at their mean alone, starts from what is there, and changes a layer only
//! when the gain is worth the bytes. It decides; who copies, in which order and
//! with what checks is not its business. Nodes and layers are plain data with
//! the caller's own numbers.
//!
//! For every layer it descends from the present placement over {swap, retarget
//! a replica, move, add, drop}. The objective is the load of the worst node over
//! its capacity, relative to perfect balance, mean and 90th percentile over the
//! shots, in the mean of two ways to spread the rows of an expert over its
//! replicas: by water-filling, as the attention nodes do per batch, and evenly,
//! as EPLB reckons. Water-filling can do with fewer bytes than an even split, but
//! what is balanced under that as well has slack when the load changes, and is
//! good for attention nodes that do not know of each other's rows. A gain counts
//! as far as the shots agree about it: requests come and go, and what they leave in
//! a window of shots is not worth a byte. Best steps per
//! byte go first, over all layers, until the budget is spent; what is not done
//! yet is worth as much at the next interval. Homes that died come before
//! everything and are outside the budget.
//!
//! A copy that replaces another expert needs one spare slot on its node while it
//! is made: the moves of a plan become valid together, with one epoch.

use crate::load::Shot;

mod board;
mod explain;
mod fresh;
mod score;
mod search;
mod secure;
mod window;

pub use explain::{LayerReport, Move, MoveKind, Plan, Reason};
pub use fresh::{fresh, relabel};

use board::Board;

/// Nodes of a cluster, at most.
pub const MAX_NODES: usize = 1 << 12;
/// Slots of all nodes in all layers, at most.
pub const MAX_SLOTS: usize = 1 << 20;
/// Shots the search looks at; a longer window is folded, neighbours summed.
pub const MAX_SHOTS: usize = 4;

/// A node as the planner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The caller's number for it.
    pub id: u32,
    /// Measured speed, rows in a unit of time; only ratios matter.
    pub capacity: f64,
    /// Experts of each layer it has room for.
    pub slots: u32,
    /// What fails together with it: a host, a rack, a power feed.
    pub domain: u32,
    /// Whether it serves. What a dead node holds is lost.
    pub live: bool,
}

/// What the nodes hold of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// Layer index of the model.
    pub layer: u32,
    /// For every node, in the order of [`Cluster::nodes`], the expert in each of
    /// its slots; what is not listed is free.
    pub slots: Vec<Vec<Option<u32>>>,
}

/// The present placement. A layer whose slots are all free has a cold start.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The layers, in the order of the rows of a shot.
    pub layers: Vec<Layer>,
    /// Logical experts of a layer.
    pub experts: u32,
    /// Bytes that move with one expert.
    pub expert_bytes: u64,
}

/// How the rows of an expert are shared out among its replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Split {
    /// By water-filling on the load of the nodes: what [`crate::spread`] does.
    #[default]
    Filled,
    /// In proportion to capacity whatever the load: evenly over like nodes.
    Even,
}

/// Under which ways to share rows out a placement is to be balanced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aim {
    /// Water-filling alone: the fewest bytes.
    Filled,
    /// An even split alone.
    Even,
    /// Both alike.
    #[default]
    Both,
}

impl Aim {
    fn splits(self) -> &'static [Split] {
        match self {
            Aim::Filled => &[Split::Filled],
            Aim::Even => &[Split::Even],
            Aim::Both => &[Split::Even, Split::Filled],
        }
    }
}

/// What the planner may do.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Bytes it may move now; lost homes are restored beyond it.
    pub budget_bytes: u64,
    /// How rows are taken to be shared out among replicas.
    pub aim: Aim,
    /// A layer is left alone unless its objective (1 is perfect) falls by this.
    pub min_gain: f64,
    /// What copied experts must gain in their layer's objective, for as many of
    /// them as the layer has homes: lambda.
    pub min_gain_per_layout: f64,
    /// An expert is hot, and gets a second home in another failure domain, when
    /// its load is this many times the mean of its layer.
    pub hot: f64,
    /// Copies the search may try in one layer.
    pub max_copies_per_layer: usize,
    /// A layer is planned afresh if that beats the search by this much.
    pub fresh_gain: f64,
    /// Homes that every expert keeps once it has them, and is given beyond the
    /// budget when it has not, as far as there are nodes; in two failure domains
    /// where there are two.
    pub min_homes: usize,
    /// Homes of a layer in all, beyond which balance adds none.
    pub max_homes: usize,
    /// Experts of each layer that each node has room for, [layers, nodes], where
    /// it is less than the node's slots. Empty: it is the slots everywhere.
    pub room: Vec<Vec<u32>>,
    /// Nodes, by their numbers, that keep what they hold and are given nothing.
    pub closed: Vec<u32>,
    /// Nodes, by their numbers, that rows reach without a wire: of places that are
    /// as good for balance, such a one is taken.
    pub wireless: Vec<u32>,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            budget_bytes: u64::MAX,
            aim: Aim::Both,
            min_gain: 0.007_5,
            min_gain_per_layout: 0.12,
            hot: 4.0,
            max_copies_per_layer: 64,
            fresh_gain: 0.25,
            min_homes: 1,
            max_homes: usize::MAX,
            room: Vec::new(),
            closed: Vec::new(),
            wireless: Vec::new(),
        }
    }
}

/// A cluster or a load for which there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// Sizes are zero or beyond the limits.
    #[error("{field}: {value} is out of range (1 to {limit})")]
    Range {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The limit.
        limit: usize,
    },
    /// A capacity is not a positive number.
    #[error("nodes: node {node} has capacity {capacity}; capacities are positive numbers")]
    Capacity {
        /// The node's number.
        node: u32,
        /// Its capacity.
        capacity: f64,
    },
    /// Two nodes have one number, or two layers one index.
    #[error("{field}: {value} is listed twice")]
    Twice {
        /// The field's name.
        field: &'static str,
        /// The number.
        value: u32,
    },
    /// A layer lists slots that its nodes do not have.
    #[error("layers: layer {layer} does not fit the nodes' slots or the {experts} experts")]
    Slots {
        /// The layer's index.
        layer: u32,
        /// Experts of a layer.
        experts: u32,
    },
    /// The policy's room is not that of these layers and nodes, or a node holds
    /// more than it has room for.
    #[error("room: layer {layer} has no room for each of the {nodes} nodes and all they hold")]
    Room {
        /// The layer's index.
        layer: u32,
        /// Number of nodes.
        nodes: usize,
    },
    /// A shot has another shape than the cluster.
    #[error("shots[{shot}]: not {layers} layers of {experts} experts")]
    Shot {
        /// Index of the shot.
        shot: usize,
        /// Layers of the cluster.
        layers: usize,
        /// Experts of a layer.
        experts: u32,
    },
    /// The live nodes cannot hold every expert once.
    #[error(
        "nodes: live nodes have room for {room} experts of a layer, the model has {experts}; add nodes"
    )]
    NoRoom {
        /// Slots of a layer on live nodes.
        room: usize,
        /// Experts of a layer.
        experts: u32,
    },
}

/// Plans the next placement from the present one and a window of shots, oldest
/// first. Without shots every expert counts alike. The same inputs give the
/// same plan.
///
/// # Errors
/// A cluster that makes no sense, or live nodes without room for every expert.
pub fn plan(cluster: &Cluster, shots: &[&Shot], policy: &Policy) -> Result<Plan, PlanError> {
    check(cluster, shots)?;
    let views = views(cluster, policy)?;
    let nodes: Vec<board::Nodes> = (views.iter())
        .map(|view| board::Nodes::new(view, policy))
        .collect();
    let mut boards = boards(cluster, shots, policy, &nodes);
    let before: Vec<f64> = boards.iter().map(|b| b.objective()).collect();
    let copies = policy.budget_bytes / cluster.expert_bytes.max(1);
    let mut budget = usize::try_from(copies).unwrap_or(usize::MAX);

    for (board, view) in boards.iter_mut().zip(&views) {
        budget = secure::rehome(board, view, budget);
        secure::replicate(board);
    }
    for board in &mut boards {
        secure::part(board, &mut budget);
    }
    let unprotected = secure::protect(&mut boards, policy, &mut budget);
    search::improve(&mut boards, cluster, &views, policy, &mut budget);
    Ok(explain::explain(
        cluster,
        &views,
        &boards,
        &before,
        unprotected,
    ))
}

/// Lays every layer out anew by the sum of the shots as EPLB does, whatever it
/// moves, with the rows of the layout given to the nodes that hold most of them.
/// Of the policy only homes and room count.
///
/// # Errors
/// As [`plan`].
pub fn afresh(cluster: &Cluster, shots: &[&Shot], policy: &Policy) -> Result<Plan, PlanError> {
    check(cluster, shots)?;
    let views = views(cluster, policy)?;
    let nodes: Vec<board::Nodes> = (views.iter())
        .map(|view| board::Nodes::new(view, policy))
        .collect();
    let mut boards = boards(cluster, shots, policy, &nodes);
    let before: Vec<f64> = boards.iter().map(|b| b.objective()).collect();
    for (row, (board, view)) in boards.iter_mut().zip(&views).enumerate() {
        let sum = |e: usize| shots.iter().map(|s| s.rows[row][e] as f64).sum();
        let rows: Vec<f64> = (0..cluster.experts as usize).map(sum).collect();
        search::relay_evenly(board, &cluster.layers[row], view, policy, &rows);
        secure::rehome(board, view, usize::MAX);
        secure::replicate(board);
    }
    let unprotected = Vec::new();
    Ok(explain::explain(
        cluster,
        &views,
        &boards,
        &before,
        unprotected,
    ))
}

fn boards<'a>(
    cluster: &Cluster,
    shots: &[&Shot],
    policy: &Policy,
    nodes: &'a [board::Nodes],
) -> Vec<Board<'a>> {
    (cluster.layers.iter().zip(nodes).enumerate())
        .map(|(row, (layer, nodes))| {
            let seen: Vec<&[u64]> = shots.iter().map(|s| s.rows[row].as_slice()).collect();
            Board::new(nodes, layer, cluster.experts as usize, &seen, policy.aim)
        })
        .collect()
}

/// The nodes as each layer sees them: with its own room.
fn views(cluster: &Cluster, policy: &Policy) -> Result<Vec<Vec<Node>>, PlanError> {
    let (layers, nodes) = (&cluster.layers, &cluster.nodes);
    if policy.room.is_empty() {
        return Ok(vec![nodes.clone(); layers.len()]);
    }
    let view = |(row, layer): (usize, &Layer)| {
        let room = policy
            .room
            .get(row)
            .filter(|room| room.len() == nodes.len());
        let view: Vec<Node> = (nodes.iter().zip(room.into_iter().flatten()))
            .map(|(node, &room)| Node {
                slots: node.slots.min(room),
                ..node.clone()
            })
            .collect();
        let holds = |(node, held): (&Node, &Vec<Option<u32>>)| held.len() <= node.slots as usize;
        let live = view.iter().filter(|node| node.live);
        let room: usize = live.map(|n| n.slots.min(cluster.experts) as usize).sum();
        if view.len() != nodes.len() || !view.iter().zip(&layer.slots).all(holds) {
            Err(PlanError::Room {
                layer: layer.layer,
                nodes: nodes.len(),
            })
        } else if room < cluster.experts as usize {
            Err(PlanError::NoRoom {
                room,
                experts: cluster.experts,
            })
        } else {
            Ok(view)
        }
    };
    layers.iter().enumerate().map(view).collect()
}

/// Load over capacity of every node, [layers, nodes], when one shot meets a
/// placement; dead nodes and lost experts count nothing. Two copies of an
/// expert on one node count twice in an even split.
///
/// # Errors
/// A cluster or a shot that makes no sense.
pub fn node_loads(
    cluster: &Cluster,
    shot: &Shot,
    split: Split,
) -> Result<Vec<Vec<f64>>, PlanError> {
    check(cluster, &[shot])?;
    let nodes = board::Nodes::new(&cluster.nodes, &Policy::default());
    let loads = (cluster.layers.iter().zip(&shot.rows))
        .map(|(layer, rows)| score::loads(&nodes, layer, rows, split))
        .collect();
    Ok(loads)
}

fn check(cluster: &Cluster, shots: &[&Shot]) -> Result<(), PlanError> {
    let within = |field, value: usize, limit: usize| {
        if (1..=limit).contains(&value) {
            Ok(())
        } else {
            Err(PlanError::Range {
                field,
                value,
                limit,
            })
        }
    };
    let (nodes, layers) = (&cluster.nodes, &cluster.layers);
    within("nodes", nodes.len(), MAX_NODES)?;
    within("experts", cluster.experts as usize, MAX_SLOTS)?;
    let slots: u64 = nodes.iter().map(|n| u64::from(n.slots)).sum();
    let cells = slots
        .max(u64::from(cluster.experts))
        .saturating_mul(layers.len() as u64);
    within("layers", layers.len(), MAX_SLOTS)?;
    within(
        "slots",
        usize::try_from(cells).unwrap_or(usize::MAX),
        MAX_SLOTS,
    )?;
    twice("nodes", nodes.iter().map(|n| n.id))?;
    twice("layers", layers.iter().map(|l| l.layer))?;
    if let Some(n) = nodes
        .iter()
        .find(|n| !n.capacity.is_normal() || n.capacity < 0.0)
    {
        return Err(PlanError::Capacity {
            node: n.id,
            capacity: n.capacity,
        });
    }
    let live = nodes.iter().filter(|n| n.live);
    let room: usize = live.map(|n| n.slots.min(cluster.experts) as usize).sum();
    if room < cluster.experts as usize {
        return Err(PlanError::NoRoom {
            room,
            experts: cluster.experts,
        });
    }
    for layer in layers {
        let fits = layer.slots.len() == nodes.len()
            && (layer.slots.iter().zip(nodes)).all(|(held, node)| {
                held.len() <= node.slots as usize
                    && held.iter().flatten().all(|&e| e < cluster.experts)
            });
        if !fits {
            return Err(PlanError::Slots {
                layer: layer.layer,
                experts: cluster.experts,
            });
        }
    }
    for (shot, s) in shots.iter().enumerate() {
        let fits = s.rows.len() == layers.len()
            && s.rows.iter().all(|r| r.len() == cluster.experts as usize);
        if !fits {
            return Err(PlanError::Shot {
                shot,
                layers: layers.len(),
                experts: cluster.experts,
            });
        }
    }
    Ok(())
}

fn twice(field: &'static str, numbers: impl Iterator<Item = u32>) -> Result<(), PlanError> {
    let mut sorted: Vec<u32> = numbers.collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|w| w[0] == w[1]) {
        Some(w) => Err(PlanError::Twice { field, value: w[0] }),
        None => Ok(()),
    }
}
