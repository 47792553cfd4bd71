//! What goes into the membership and what comes out of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::placement::{NodeId, Placement};

use super::status::Outcome;

/// Nodes a cluster has at most.
pub const MAX_NODES: usize = 4096;
/// Bytes of a node's name, its address and of one reason.
pub const MAX_TEXT: usize = 256;
/// What does not change while a coordinator runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Digest of the configuration and weights that this cluster serves.
    pub model_digest: String,
    /// Layers with routed experts, each with `experts` of them.
    pub layers: Vec<u32>,
    /// Routed experts of a layer.
    pub experts: u32,
    /// Resident bytes of the largest expert, to turn capacities into slots.
    pub slot_bytes: u64,
    /// Silence after which a node is taken for dead.
    pub lease: Duration,
    /// How long to wait for further expert nodes after one has joined.
    pub settle: Duration,
    /// Expert nodes that must be there before the first placement.
    pub min_expert_nodes: usize,
    /// Homes of every expert, each on another node, as far as nodes and their
    /// memory allow.
    pub replicas: u32,
    /// Further homes that a layer may have in all, for balance: those of the
    /// first placement leave them out.
    pub redundant_experts: u32,
    /// Time that one step of a migration has to be copied in.
    pub copy_deadline: Duration,
}

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs the step loop and owns KV memory.
    Attention,
    /// Holds experts.
    Expert,
}

impl Role {
    fn in_words(self) -> &'static str {
        match self {
            Role::Attention => "attention node",
            Role::Expert => "expert node",
        }
    }
}

/// What of a request an attention node does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Duty {
    /// Prompts and outputs.
    #[default]
    Both,
    /// Prompts, for nodes that decode: no stream while one of these is there.
    Prefill,
    /// Outputs; a prompt only as far as no other node has run it.
    Decode,
}

impl Duty {
    /// Whether streams are meant to come to it.
    pub fn decodes(self) -> bool {
        self != Duty::Prefill
    }
}

/// A node's request to join.
#[derive(Clone, Debug)]
pub struct Registration {
    /// What it does.
    pub role: Role,
    /// Unique and stable.
    pub name: String,
    /// Where others reach it.
    pub address: String,
    /// Digest of its configuration and weights.
    pub model_digest: String,
    /// Which bits it computes.
    pub numerics_class: String,
    /// Bytes for experts; 0 is unlimited.
    pub capacity_bytes: u64,
    /// Newest epoch it has seen.
    pub newest_epoch: u64,
    /// Drawn at process start.
    pub incarnation: u64,
    /// Nodes of one value run in one process; empty: alone.
    pub process: String,
    /// What fails together with it; empty: nothing else.
    pub failure_domain: String,
    /// What of a request it does (attention nodes).
    pub duty: Duty,
}

/// What an expert node has measured of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Rows it executes in a second; 0: not known.
    pub rows_per_second: f64,
    /// Bytes of all experts in memory, those of every epoch.
    pub resident_bytes: u64,
    /// Bytes that further experts may take; None: not known.
    pub free_bytes: Option<u64>,
}

/// What an attention node has before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// Requests running.
    pub running: u32,
    /// Requests waiting.
    pub waiting: u32,
    /// Tokens that may still have to be run for all of them.
    pub outstanding_tokens: u64,
    /// Pages of its cache that no request holds.
    pub free_pages: u32,
    /// Those of them whose contents are known.
    pub cached_pages: u32,
    /// Tokens run since its process started.
    pub tokens_run: u64,
}

/// What a node says about itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Newest epoch it has loaded or serves by.
    pub epoch: u64,
    /// Whether it can work at that epoch.
    pub ready: bool,
    /// Why not.
    pub reason: String,
    /// What it has before it (attention nodes).
    pub serving: Serving,
    /// It is about to leave: nothing new goes there.
    pub draining: bool,
    /// What it has measured (expert nodes).
    pub measured: Measured,
    /// The newest epoch that it was given and cannot load, and why.
    pub failed: Option<(u64, String)>,
}

/// Why a node may not join.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It has another model.
    #[error(
        "`{name}` has the model with digest {theirs}, this cluster serves {ours}; give every node the same --model"
    )]
    Digest {
        /// Its name.
        name: String,
        /// Its digest.
        theirs: String,
        /// The digest of the cluster.
        ours: String,
    },
    /// It would compute other bits than the nodes that are here.
    #[error(
        "`{name}` computes in numerics class `{theirs}`, the cluster (`{member}`) in `{ours}`; nodes of one cluster must agree"
    )]
    Numerics {
        /// Its name.
        name: String,
        /// Its class.
        theirs: String,
        /// A node that is here.
        member: String,
        /// The class of that node.
        ours: String,
    },
    /// Its name is in use by a node of another role.
    #[error("the name `{name}` belongs to an {}; names are unique in a cluster", role.in_words())]
    NameTaken {
        /// The name.
        name: String,
        /// What the node of that name does.
        role: Role,
    },
    /// A field is empty, too long or absurd.
    #[error("{field}: {problem}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The limit on nodes is reached.
    #[error("the cluster has {MAX_NODES} nodes, which is its limit")]
    Full,
}

/// The node is not, or no longer, a member: it has to register again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {0} is not a member (its lease may have run out): register again")]
pub struct UnknownNode(pub NodeId);

/// How a node was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It said goodbye.
    Left,
    /// Its lease ran out.
    Silent,
    /// Its connection broke, and it did not come back.
    Gone,
    /// A new process has taken its name.
    Replaced,
}

/// What follows from an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell everybody about [`Membership::active`](super::Membership::active),
    /// [`Membership::next`](super::Membership::next),
    /// [`Membership::withdrawn`](super::Membership::withdrawn) and
    /// [`Membership::oldest_epoch`](super::Membership::oldest_epoch).
    Publish,
    /// A step of a migration is LOADING.
    StepBegun {
        /// Number of the migration.
        migration: u64,
        /// The epoch.
        epoch: u64,
        /// Experts to be copied.
        copies: usize,
    },
    /// A step of a migration is ACTIVE.
    StepPublished {
        /// Number of the migration.
        migration: u64,
        /// The epoch.
        epoch: u64,
    },
    /// A LOADING epoch will never be active.
    Withdrawn {
        /// The epoch.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// Nobody uses an epoch before this one any more: its experts can go.
    Freed {
        /// The oldest epoch that is still in use.
        oldest_epoch: u64,
    },
    /// A migration is over.
    MigrationEnded {
        /// Its number.
        migration: u64,
        /// How it ended.
        outcome: Outcome,
    },
    /// A node is a member now.
    Joined {
        /// Its id.
        node: NodeId,
        /// Its name.
        name: String,
    },
    /// A node is no longer a member.
    Lost {
        /// Its id.
        node: NodeId,
        /// Its name.
        name: String,
        /// How.
        how: Loss,
    },
}

/// A placement as the nodes are told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// The homes, and the epoch.
    pub placement: Placement,
    /// Whether every expert has a live and loaded home. False: LOADING.
    pub active: bool,
    /// The epoch as which its homes were loaded: an earlier one when it is what
    /// has been left of that.
    pub(super) loaded_as: u64,
    /// It has been active and has lost an expert's last home since.
    pub(super) was_active: bool,
    /// Every node in the placement, in its order.
    pub nodes: Vec<Placed>,
}

/// A node of a placement, as others have to know it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placed {
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// As in [`Registration::process`].
    pub process: String,
    /// Its speed when the epoch was made, as [`Node::speed`].
    pub rows_per_second: f64,
}

/// A member as others see it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its id, never used twice.
    pub id: NodeId,
    /// What it does.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// Which bits it computes.
    pub numerics_class: String,
    /// Its last word.
    pub report: Report,
    /// As in [`Registration::process`].
    pub process: String,
    /// As in [`Registration::failure_domain`].
    pub failure_domain: String,
    /// As in [`Registration::duty`].
    pub duty: Duty,
    /// Measured rows a second in coarse steps, so that noise changes nothing;
    /// 0: not known.
    pub speed: f64,
    /// Bytes for experts; 0 is unlimited.
    pub capacity_bytes: u64,
    /// Tokens an attention node has run in a second between its last two reports.
    pub tokens_per_second: f64,
    pub(super) incarnation: u64,
    /// Newest epoch whose experts it has.
    pub(super) resident: u64,
    /// When it was last heard of.
    pub last_seen: Duration,
    /// When it is taken for dead unless it is heard of before, since it hung up.
    pub(super) gone_at: Option<Duration>,
}
