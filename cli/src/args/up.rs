//! The flags of `guild up`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Balance, Common, Compute, DoorArgs, Doors, Engine, Exposure, Named, Redundancy};
use crate::failure::EXIT_CODES;

/// How rows travel between the nodes of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum FabricKind {
    /// Handed over in memory
    #[default]
    Local,
    /// Over loopback gRPC, as between machines
    Grpc,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild up --model models/demo
  guild up --model models/demo --attention-nodes 2 --expert-nodes 3 --fabric grpc
  guild up --model models/demo --http 127.0.0.1:0 --grpc 127.0.0.1:0    # free ports, printed

When the cluster serves, one line on stdout says where:
  guild: serving http=127.0.0.1:8000 grpc=127.0.0.1:8001

{EXIT_CODES}"))]
pub(crate) struct Up {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) named: Named,
    /// Attention nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), value_name = "N")]
    pub(crate) attention_nodes: u16,
    /// Expert nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64), value_name = "N")]
    pub(crate) expert_nodes: u16,
    /// How rows travel between them
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "local|grpc",
        hide_possible_values = true
    )]
    pub(crate) fabric: FabricKind,
    #[command(flatten)]
    pub(crate) doors: Doors,
    #[command(flatten)]
    pub(crate) redundancy: Redundancy,
    #[command(flatten)]
    pub(crate) balance: Balance,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) door: DoorArgs,
    #[command(flatten)]
    pub(crate) engine: Engine,
    #[command(flatten)]
    pub(crate) common: Common,
}
