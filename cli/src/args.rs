//! The command line. Names and flags are a contract with users and scripts.
//!
//! Here: the commands, and the flags that most of them have. Each command's own flags stand in the
//! file named like it; groups of flags that several commands share stand in files of their own.

use std::path::PathBuf;
use std::str::FromStr as _;

use clap::{Args, Parser, Subcommand};
use guild_model::Cpu;
use guild_model::checkpoint::Dtype;
use guild_node::telemetry::LogFormat;

use crate::failure::{EXIT_CODES, Failure};

mod arithmetic;
mod attention;
mod balance;
mod bench;
mod certs;
mod client;
mod colocated;
mod coordinator;
mod engine;
mod expert;
mod experts;
mod host;
mod inspect;
mod joining;
mod manifest;
mod named;
mod quantize;
mod random;
mod security;
mod up;

pub(crate) use arithmetic::{Instructions, Kernels};
pub(crate) use attention::AttentionNode;
pub(crate) use balance::{Balance, PlannerArg};
pub(crate) use bench::{
    Api, Bench, BenchCommand, BenchCompare, BenchKernels, BenchModel, BenchServe, Dataset,
    Objective,
};
pub(crate) use certs::{Certs, Keys, KeysCommand};
pub(crate) use client::{Chat, Generate};
pub(crate) use colocated::Colocated;
pub(crate) use coordinator::{Coordinator, Doors, Redundancy};
pub(crate) use engine::{Engine, Latents};
pub(crate) use expert::ExpertNode;
pub(crate) use experts::{
    Experts, ExpertsCommand, ExpertsDrain, ExpertsEplb, ExpertsLoad, ExpertsLs, ExpertsPlan,
    ExpertsRebalance, ExpertsRecord, ExpertsWatch, Leader, SplitArg,
};
pub(crate) use host::Host;
pub(crate) use inspect::Inspect;
pub(crate) use joining::Joining;
pub(crate) use manifest::Manifest;
pub(crate) use named::Named;
pub(crate) use quantize::{Quantize, Target};
pub(crate) use random::RandomModel;
pub(crate) use security::{Access, DoorArgs, Exposure, NodeTls};
pub(crate) use up::{FabricKind, Up};

/// Serves the DeepSeek-V3 family with its experts spread over ordinary machines.
#[derive(Clone, Debug, Parser)]
#[command(name = "guild", version, propagate_version = true, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole cluster in one process
    Up(Up),
    /// Front door, membership and placement
    Coordinator(Coordinator),
    /// Attention, KV cache and everything but the routed experts
    AttentionNode(AttentionNode),
    /// Routed experts
    ExpertNode(ExpertNode),
    /// One completion, from a server or from a checkpoint
    Generate(Generate),
    /// A conversation with a server
    Chat(Chat),
    /// Load on a server, and what its clients see
    Bench(Bench),
    /// What a checkpoint is and what a cluster for it needs
    Inspect(Inspect),
    /// Digests of a checkpoint: writes them, or holds its files against them
    Manifest(Manifest),
    /// Writes a checkpoint in another format: int4, int8, fp8 or bf16
    Quantize(Quantize),
    /// Writes a checkpoint of any shape with random weights
    RandomModel(RandomModel),
    /// Certificates for the nodes of a cluster, with a CA of their own
    Certs(Certs),
    /// API keys for the front door
    Keys(Keys),
    /// Experts: who holds them, how they are loaded, how they move, and planners on a recorded load
    Experts(Experts),
}

/// Flags of every command.
#[derive(Clone, Debug, Args)]
pub(crate) struct Common {
    /// TOML file with flags by name, at the top or in a table named like the command
    #[arg(long, value_name = "FILE", help_heading = "Common")]
    pub(crate) config: Option<PathBuf>,
    /// Form of the log on stderr
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "text|json",
        hide_possible_values = true,
        help_heading = "Common"
    )]
    pub(crate) log_format: LogFormat,
    /// error, warn, info, debug, trace, or directives such as `info,guild_node=debug`
    #[arg(
        long,
        default_value = "info",
        value_name = "LEVEL",
        help_heading = "Common"
    )]
    pub(crate) log_level: String,
}

/// How weights are kept.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Weights {
    /// Weights in memory: as stored, widened to f32, rounded to bf16, or quantised as `guild quantize` does; int8 and
    /// int4 may name a group, as in int4-g32
    #[arg(long, default_value_t, value_parser = Dtype::from_str, value_name = "auto|f32|bf16|fp8|int8|int4")]
    pub(crate) dtype: Dtype,
}

/// How weights are kept and computed with.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Compute {
    #[command(flatten)]
    pub(crate) weights: Weights,
    /// Use the experts of an int4 or int8 checkpoint where they lie in the file instead of copying them into memory:
    /// serves at once, and their bytes are held against the manifest while they serve. The files must not be written
    /// to meanwhile: one that is cut short ends the process
    #[arg(long)]
    pub(crate) mmap: bool,
    /// Threads for the arithmetic; 0: one per physical core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024), value_name = "N")]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) kernels: Kernels,
    #[command(flatten)]
    pub(crate) host: Host,
}

impl Compute {
    /// The arithmetic that was asked for.
    pub(crate) fn cpu(&self) -> Result<Cpu, Failure> {
        let cpu = self.kernels.cpu(self.threads)?;
        self.host.arrange(&cpu);
        Ok(cpu)
    }
}
