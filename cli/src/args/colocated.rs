//! Flags by which one process is an attention node and an expert node.

use std::path::PathBuf;
use std::str::FromStr as _;

use clap::Args;
use guild_expert_node::CopyFrom;

/// An expert node beside the attention node.
#[derive(Clone, Debug, Args)]
pub(crate) struct Colocated {
    /// Run an expert node in this process as well: rows for its experts take no wire. It has a
    /// port and a name of its own
    #[arg(long, help_heading = "Experts in this process")]
    pub(crate) experts: bool,
    /// Where the expert node serves; default: a free port of the host in --listen
    #[arg(
        long,
        value_name = "HOST:PORT",
        help_heading = "Experts in this process"
    )]
    pub(crate) expert_listen: Option<String>,
    /// Where others reach it; default: its port at the host in --advertise, or where it listens
    #[arg(
        long,
        value_name = "HOST:PORT",
        help_heading = "Experts in this process"
    )]
    pub(crate) expert_advertise: Option<String>,
    /// Its name; default: --name with `-experts` behind, or role and address
    #[arg(long, value_name = "NAME", help_heading = "Experts in this process")]
    pub(crate) expert_name: Option<String>,
    /// Where its `/metrics` and `/health` are answered; default: nowhere
    #[arg(
        long,
        value_name = "HOST:PORT",
        help_heading = "Experts in this process"
    )]
    pub(crate) expert_metrics_listen: Option<String>,

    /// Memory for its resident experts, such as 32GiB; 0: as much as is placed here
    #[arg(long, default_value = "0", value_parser = crate::units::parse_bytes, value_name = "SIZE", help_heading = "Experts in this process")]
    pub(crate) capacity: u64,
    /// Where its experts come from first that other nodes have
    #[arg(long, default_value_t, value_parser = CopyFrom::from_str, value_name = "peer|checkpoint", help_heading = "Experts in this process")]
    pub(crate) copy_from: CopyFrom,
    /// Its certificate, PEM: one of the role `expert`. Needed with --tls-cert;
    /// --tls-dir has it
    #[arg(long, value_name = "FILE", help_heading = "Experts in this process")]
    pub(crate) expert_tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", help_heading = "Experts in this process")]
    pub(crate) expert_tls_key: Option<PathBuf>,
}
