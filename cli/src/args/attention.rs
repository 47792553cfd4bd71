//! The flags of `guild attention-node`.

use clap::{Args, ValueEnum};
use guild_proto::cluster::v1::Duty;

use super::{Colocated, Common, Compute, Engine, Exposure, Joining};
use crate::failure::EXIT_CODES;

/// What of a request an attention node does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum AttentionRole {
    #[default]
    Both,
    Prefill,
    Decode,
}

impl AttentionRole {
    pub(crate) fn duty(self) -> Duty {
        match self {
            AttentionRole::Both => Duty::Both,
            AttentionRole::Prefill => Duty::Prefill,
            AttentionRole::Decode => Duty::Decode,
        }
    }
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild attention-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs
  guild attention-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs --experts

With --experts SIGTERM first lets the requests of this node end and then takes its experts out of
the cluster; each may take as long as --drain says.

{EXIT_CODES}"))]
pub(crate) struct AttentionNode {
    #[command(flatten)]
    pub(crate) joining: Joining,
    /// Run long prompts for other nodes (prefill), have them run by such nodes and generate (decode), or do both;
    /// whatever is missing, the nodes that are there serve
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "both|prefill|decode",
        hide_possible_values = true
    )]
    pub(crate) role: AttentionRole,
    #[command(flatten)]
    pub(crate) colocated: Colocated,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) engine: Engine,
    #[command(flatten)]
    pub(crate) common: Common,
}
