//! Flags of `guild experts`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Common;
use crate::failure::EXIT_CODES;
use crate::units;

#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Experts {
    #[command(subcommand)]
    pub(crate) command: ExpertsCommand,
}

/// What to do about experts.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ExpertsCommand {
    /// Lays experts out by EPLB as published
    Eplb(ExpertsEplb),
    /// Plays a recorded load against the planner, EPLB and no planner: a dry run
    Plan(ExpertsPlan),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild experts eplb --input loads.json

loads.json: {{\"weight\": [[90, 132, 40, 61]], \"num_replicas\": 8, \"num_groups\": 2,
\"num_nodes\": 2, \"num_gpus\": 4}}; other fields are not looked at. Printed are phy2log
[layers][replicas], log2phy [layers][experts][copies] and logcnt [layers][experts].

{EXIT_CODES}"))]
pub(crate) struct ExpertsEplb {
    /// JSON with weight, num_replicas, num_groups, num_nodes, num_gpus; - is stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild experts plan --trace load.jsonl --nodes 32 --slots 9 --budget 2GiB

The trace is JSON lines: {{\"layers\": [3, 4], \"experts\": 256}}, then one line a shot,
{{\"rows\": [[..], [..]]}}, the rows routed to each expert of each layer.

{EXIT_CODES}"))]
pub(crate) struct ExpertsPlan {
    /// Recorded load, JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: PathBuf,
    /// Expert nodes, all alike
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N")]
    pub(crate) nodes: u32,
    /// Experts of each layer a node has room for; by default one more than it needs
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Failure domains that the nodes are shared out over; by default every node is its own
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub(crate) domains: Option<u32>,
    /// Shots between two plans
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) interval: u16,
    /// Bytes that may move at each plan; without it as many as are worth it
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    pub(crate) budget: Option<u64>,
    /// Bytes of one expert; 44,050,944 is one of DeepSeek-V3 in FP8
    #[arg(long, default_value = "44050944", value_parser = units::parse_bytes, value_name = "SIZE")]
    pub(crate) expert_bytes: u64,
    /// How rows are shared out among copies: by load, or evenly
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "filled|even",
        hide_possible_values = true
    )]
    pub(crate) split: SplitArg,
    /// Print every move and its reason
    #[arg(long)]
    pub(crate) explain: bool,
    /// One JSON object a plan, and one for all of them
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// How rows are shared out among the copies of an expert.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum SplitArg {
    #[default]
    Filled,
    Even,
}
