//! The expert node: resident routed experts, and the rows that are sent to them.
//!
//! Secret of this room: which experts are in memory, and when. [`residents`] keeps
//! account of them, `copy` brings those that a placement gives to this node, from
//! another node or from the checkpoint, [`host`] runs rows by the slot tables of the
//! newest placements, and [`run`] is the whole node: it joins the cluster, follows the
//! placement, reports truthfully and drains. It uses `model` for the experts,
//! `transport` for the rows, `node` for the host and `proto` for the placement. It must
//! not know attention, gates or weights of experts in a sum: rows come in and go out
//! unweighted.

mod capacity;
mod copy;
mod freeing;
pub mod host;
mod live;
pub mod merge;
mod pace;
mod quota;
pub mod residents;
mod scrub;
mod thread;

use std::time::Duration;

use guild_model::{Checkpoint, ModelError, checkpoint::Dtype};
use guild_node::{ExitKind, HasExitKind, member::MemberError, serve::ServeError, tls::Tls};

use crate::{merge::Merging, residents::LoadError};

pub use copy::CopyFrom;
pub use live::run;

/// What an expert node is told.
#[derive(Clone, Debug)]
pub struct ExpertNodeConfig {
    /// The open checkpoint; roles of one process share it, and with it the digest.
    pub model: Checkpoint,
    /// What clients call the model.
    pub model_name: String,
    /// How weights are kept.
    pub dtype: Dtype,
    /// Stable and unique in the cluster.
    pub name: String,
    /// `host:port` where others reach this node.
    pub address: String,
    /// `http://host:port` of the coordinator.
    pub coordinator: String,
    /// Certificates for the connections inside the cluster; None: they are not encrypted, and
    /// anybody is let in.
    pub tls: Option<Tls>,
    /// `host:port` where health alone is answered without TLS, for probes that have no
    /// certificate; None: nowhere.
    pub health: Option<String>,
    /// `host:port` where `/metrics` and `/health` are answered over plain HTTP; None: nowhere.
    pub metrics: Option<String>,
    /// Bytes for resident experts; 0 is unlimited.
    pub capacity_bytes: u64,
    /// Nodes with the same value are one process; empty: alone.
    pub process: String,
    /// What fails together with this node: a host, a rack; empty: nothing else.
    pub failure_domain: String,
    /// Where experts come from first that other nodes have already.
    pub copy_from: CopyFrom,
    /// How long a node that is asked to end goes on serving those that still
    /// send rows here.
    pub drain: Duration,
    /// Which experts are merged, and how many products that makes.
    pub merging: Merging,
}

impl ExpertNodeConfig {
    /// Drain limit, by default.
    pub const DRAIN: Duration = Duration::from_secs(30);

    /// Everything by default but what has none. The model is called as its directory is.
    pub fn new(
        model: Checkpoint,
        name: impl Into<String>,
        address: impl Into<String>,
        coordinator: impl Into<String>,
    ) -> Self {
        Self {
            model_name: model.name(),
            model,
            dtype: Dtype::Auto,
            name: name.into(),
            address: address.into(),
            coordinator: coordinator.into(),
            tls: None,
            health: None,
            metrics: None,
            capacity_bytes: 0,
            process: String::new(),
            failure_domain: String::new(),
            copy_from: CopyFrom::default(),
            drain: Self::DRAIN,
            merging: Merging::default(),
        }
    }
}

/// Why an expert node ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The experts given to this node cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The server could not be set up or has failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The node cannot be a member of the cluster.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// The memory that an expert is in does not keep what is in it.
    #[error(
        "layer {layer}, expert {expert}: its memory has changed, digest {was} before, {now} now; this node has left, have the machine's memory checked"
    )]
    Damaged {
        /// Layer of the expert.
        layer: u32,
        /// Its number in the layer.
        expert: u32,
        /// BLAKE3 of the expert when it came.
        was: String,
        /// What it is now.
        now: String,
    },
    /// A part of the node stopped without being asked to.
    #[error("expert node: {what} has failed: {reason}")]
    Task {
        /// Which part.
        what: &'static str,
        /// How it ended.
        reason: String,
    },
}

impl Error {
    fn task(what: &'static str, reason: &dyn std::fmt::Display) -> Error {
        Error::Task {
            what,
            reason: reason.to_string(),
        }
    }
}

impl HasExitKind for Error {
    fn exit_kind(&self) -> ExitKind {
        match self {
            Self::Model(_) | Self::Load(LoadError::Expert { .. }) => ExitKind::Model,
            Self::Load(LoadError::Capacity { .. }) => ExitKind::Resources,
            Self::Serve(error) => error.exit_kind(),
            Self::Member(error) => error.exit_kind(),
            Self::Damaged { .. } => ExitKind::Resources,
            Self::Load(LoadError::Copy { .. } | LoadError::Fired(_)) | Self::Task { .. } => {
                ExitKind::Internal
            }
        }
    }
}
