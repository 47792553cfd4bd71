//! Flags of `guild experts`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Common, NodeTls};
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
    /// Who holds which experts
    Ls(ExpertsLs),
    /// What has been routed to which expert of late: a heat map
    Load(ExpertsLoad),
    /// Writes the load as a trace for `guild experts plan`
    Record(ExpertsRecord),
    /// Lays experts out by EPLB as published
    Eplb(ExpertsEplb),
    /// Plays a recorded load against the planner, EPLB and no planner: a dry run
    Plan(ExpertsPlan),
    /// Plans by the present load, now, and moves what is worth moving
    Rebalance(ExpertsRebalance),
    /// Moves all experts off a node
    Drain(ExpertsDrain),
    /// Follows the moves of experts
    Watch(ExpertsWatch),
}

/// The coordinator that is asked.
#[derive(Clone, Debug, Args)]
pub(crate) struct Leader {
    /// The cluster address of a coordinator, or several; `guild up` prints its own. Where nodes
    /// have certificates, `guild certs` makes one for operators, too
    #[arg(long, default_value = "127.0.0.1:7000", value_name = "URL[,URL...]")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: NodeTls,
    /// Ask other machines without a certificate, where a cluster runs with --insecure
    #[arg(long, help_heading = "TLS")]
    pub(crate) insecure: bool,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct ExpertsLs {
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild experts load --tls-dir certs --watch

A row is a layer, a column an expert, or the hottest of several where there are many.
Shades compare with the mean of the layer.

{EXIT_CODES}"))]
pub(crate) struct ExpertsLoad {
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// Again every second, until interrupted
    #[arg(long)]
    pub(crate) watch: bool,
    /// One JSON object a look instead of a map
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild experts record --seconds 60 --out load.jsonl
  guild experts plan --trace load.jsonl --nodes 4

A line is a shot: a second in which something was routed.

{EXIT_CODES}"))]
pub(crate) struct ExpertsRecord {
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// File to write; what is there is replaced
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// How long to record
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..), value_name = "N")]
    pub(crate) seconds: u32,
    #[command(flatten)]
    pub(crate) common: Common,
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
    /// How rows are shared out among copies where the planner balances them: by load, evenly, or both
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "both|filled|even",
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

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild experts rebalance --dry-run
  guild experts rebalance --budget 256MiB --wait

{EXIT_CODES}"))]
pub(crate) struct ExpertsRebalance {
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// Only say what would be moved, and what it would gain
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Bytes that may move; default: what the coordinator was started with
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    pub(crate) budget: Option<u64>,
    /// Return when it has been moved, or has been rolled back
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild experts drain expert-3 --wait     # then it can be stopped: nothing is lost with it
  guild experts drain expert-3 --undo

{EXIT_CODES}"))]
pub(crate) struct ExpertsDrain {
    /// Name of an expert node, see `guild experts ls`
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// Lets experts come to it again
    #[arg(long)]
    pub(crate) undo: bool,
    /// Return when it holds no expert any more, or a move has been rolled back
    #[arg(long, conflicts_with = "undo")]
    pub(crate) wait: bool,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("A line for each change, until interrupted.

{EXIT_CODES}"))]
pub(crate) struct ExpertsWatch {
    #[command(flatten)]
    pub(crate) leader: Leader,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// How rows are shared out among the copies of an expert.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum SplitArg {
    #[default]
    Both,
    Filled,
    Even,
}
