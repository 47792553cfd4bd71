//! Flags by which a node finds its cluster and is found there.

use std::path::PathBuf;

use clap::Args;

use super::{Named, NodeTls};
use crate::listen::EPHEMERAL;

/// How a node joins.
#[derive(Clone, Debug, Args)]
pub(crate) struct Joining {
    /// Folder of the checkpoint, the same one in the whole cluster
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) named: Named,
    /// Where the coordinator lets nodes join; a list where several run
    #[arg(long, value_name = "URL[,URL...]")]
    pub(crate) coordinator: String,
    /// Where this node serves; port 0: a free one
    #[arg(long, default_value = EPHEMERAL, value_name = "HOST:PORT")]
    pub(crate) listen: String,
    /// Where others reach it; default: where it listens. Port 0: the one it listens on
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// Unique in the cluster and kept over restarts; default: role and address
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Where health alone is answered without TLS, for probes that have no certificate; default: nowhere
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) health: Option<String>,
    /// Where `/metrics` (Prometheus) and `/health` are answered over plain HTTP, without keys or certificates; they say
    /// nothing of requests' content. Default: nowhere
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<String>,

    /// What fails together with this node, such as its host or rack: homes of an expert are kept
    /// apart as far as possible; default: its process
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "NAME"
    )]
    pub(crate) failure_domain: String,
    #[command(flatten)]
    pub(crate) tls: NodeTls,
}
