//! Flags of `guild bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Access, Common, Compute, Host, Instructions, Latents};
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

/// What is measured.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Load on an OpenAI-compatible server, Guild's or another, and what its clients see
    Serve(Box<BenchServe>),
    /// Two results side by side; fails when the second is worse
    Compare(BenchCompare),
    /// Kernels of this machine beside what it allows: products, experts, attention
    Kernels(BenchKernels),
    /// A whole model in this process, without servers, beside what the machine allows
    Model(BenchModel),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild bench serve --num-prompts 64 --max-concurrency 16 --input-len 128 --output-len 64
  guild bench serve --request-rate 4 --goodput ttft:500,tpot:100 --out a.json --html a.html
  guild bench serve --dataset shared-prefix --prefix-len 256 --num-prefixes 4
  guild bench serve --dataset trace --dataset-path trace.jsonl

TTFT is the time to the first token, TPOT the time of every further one, ITL the gap between
two chunks of a stream, E2EL the time of the whole answer. Names and definitions in the result
are those of `vllm bench serve`.

{EXIT_CODES}"))]
pub(crate) struct BenchServe {
    /// The server's HTTP address
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    pub(crate) endpoint: String,
    /// Model to ask for; by default the first that the server lists
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// /v1/completions or /v1/chat/completions
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "completions|chat",
        hide_possible_values = true
    )]
    pub(crate) api: Api,
    /// A checkpoint's folder whose tokenizer makes prompts of text; without it prompts are token ids
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Token ids of prompts are below this where there is no --tokenizer
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(64..), value_name = "N")]
    pub(crate) vocab_size: u32,
    /// Where prompts come from
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "random|shared-prefix|sharegpt|trace",
        hide_possible_values = true,
        help_heading = "Prompts"
    )]
    pub(crate) dataset: Dataset,
    /// ShareGPT JSON, or a trace: JSON lines of timestamp (ms), input_length, output_length, hash_ids
    #[arg(long, value_name = "FILE", help_heading = "Prompts")]
    pub(crate) dataset_path: Option<PathBuf>,
    /// Requests that are measured
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", help_heading = "Prompts")]
    pub(crate) num_prompts: u32,
    /// Tokens of a prompt, without what is shared
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=10_000_000), value_name = "N", help_heading = "Prompts")]
    pub(crate) input_len: u32,
    /// Tokens of an answer; by default 128, of sharegpt and trace what the file says
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000), value_name = "N", help_heading = "Prompts")]
    pub(crate) output_len: Option<u32>,
    /// Lengths vary evenly by this share up and down
    #[arg(long, default_value_t = 0.0, value_parser = share, value_name = "SHARE", help_heading = "Prompts")]
    pub(crate) range_ratio: f64,
    /// Tokens that prompts of one prefix have in common
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=10_000_000), value_name = "N", help_heading = "Prompts")]
    pub(crate) prefix_len: u32,
    /// Different prefixes
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000_000), value_name = "N", help_heading = "Prompts")]
    pub(crate) num_prefixes: u32,
    /// Same seed, same prompts and same times of arrival
    #[arg(long, default_value_t = 0, value_name = "S", help_heading = "Prompts")]
    pub(crate) seed: u64,
    /// Requests that arrive in a second, or `inf`, the default: all at once; a trace has times of its own
    #[arg(long, value_parser = rate, value_name = "RATE", help_heading = "Load")]
    pub(crate) request_rate: Option<f64>,
    /// 1: Poisson arrivals; less: in bursts; more: evenly (gamma distributed gaps)
    #[arg(long, default_value_t = 1.0, value_parser = positive, value_name = "SHAPE", help_heading = "Load")]
    pub(crate) burstiness: f64,
    /// Requests at a time; further ones wait here; by default any number
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536), value_name = "N", help_heading = "Load")]
    pub(crate) max_concurrency: Option<u32>,
    /// Requests before the measured ones
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Load")]
    pub(crate) num_warmups: u32,
    /// Let answers end by themselves; by default every answer has its full length
    #[arg(long, help_heading = "Load")]
    pub(crate) stop_at_eos: bool,
    /// 0: always the most probable token
    #[arg(long, default_value_t = 0.0, value_parser = at_least_zero, value_name = "T", help_heading = "Load")]
    pub(crate) temperature: f64,
    /// JSON object whose fields are added to every request
    #[arg(long, value_name = "JSON", help_heading = "Load")]
    pub(crate) extra_body: Option<String>,
    /// Milliseconds that a good request keeps to: ttft:500,tpot:100,e2el:10000
    #[arg(long, value_delimiter = ',', value_parser = objective, value_name = "NAME:MS", help_heading = "Result")]
    pub(crate) goodput: Vec<(Objective, f64)>,
    /// Percentiles in the result
    #[arg(long, value_delimiter = ',', default_value = "50,90,99", value_parser = percentile, value_name = "P", help_heading = "Result")]
    pub(crate) metric_percentiles: Vec<f64>,
    /// JSON file for the result
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    pub(crate) out: Option<PathBuf>,
    /// Every request's numbers and text in it as well
    #[arg(long, help_heading = "Result")]
    pub(crate) save_detailed: bool,
    /// HTML page with plots, in one file
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    pub(crate) html: Option<PathBuf>,
    /// Name of this run in the result
    #[arg(long, value_name = "TEXT", help_heading = "Result")]
    pub(crate) label: Option<String>,
    /// Print the result as one JSON object instead of a table
    #[arg(long, help_heading = "Result")]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild bench compare before.json after.json --tolerance 5

A metric is worse when it lies on its bad side by more than --tolerance percent: less
throughput, more time.

{EXIT_CODES}"))]
pub(crate) struct BenchCompare {
    /// What is compared with
    #[arg(value_name = "BASE")]
    pub(crate) base: PathBuf,
    /// What is judged
    #[arg(value_name = "NEW")]
    pub(crate) new: PathBuf,
    /// Percent by which a metric may be worse
    #[arg(long, default_value_t = 5.0, value_parser = at_least_zero, value_name = "PERCENT")]
    pub(crate) tolerance: f64,
    /// Metrics that decide; by default throughputs and the medians and p99 of TTFT, TPOT and E2EL
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub(crate) metrics: Vec<String>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild bench kernels
  guild bench kernels --only mla --rounds 3
  guild bench kernels --json | jq 'select(.ratio < 0.5)'

Every case is measured in turns with the machine itself, and medians are given. The floor is the
rate at which the case's bytes are read, or its operations done, if nothing else took time:
whichever takes longer. A run takes some minutes, and 6 GB.

{EXIT_CODES}"))]
pub(crate) struct BenchKernels {
    /// Threads; 0: one per physical core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024), value_name = "N")]
    pub(crate) threads: u16,
    #[command(flatten)]
    pub(crate) instructions: Instructions,
    #[command(flatten)]
    pub(crate) host: Host,
    /// Rounds that the medians are taken of
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub(crate) rounds: u32,
    /// Only cases whose name has this in it, or whose format it is
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,
    /// Tiny shapes and one round, to try the command out
    #[arg(long)]
    pub(crate) quick: bool,
    /// One JSON object a line: name, format, m, value, unit, floor, ratio, threads, bound
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild bench model --model models/demo --prefill 256,480
  guild bench model --model M --prefill 512,2048 --decode 64 --batch 1,16
  guild bench model --model M --prefill 8192 --decode 64 --batch 1 --context 8192 --kv-dtype bf16

Prompts are of random tokens, other ones for each request. The floor is the time that reading the
weights and latents of a step takes, or its arithmetic: whichever is more.

{EXIT_CODES}"))]
pub(crate) struct BenchModel {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Lengths of prompts that are run alone
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u32).range(1..=10_000_000), value_name = "N,N")]
    pub(crate) prefill: Vec<u32>,
    /// Tokens that each request of a batch decodes; 0: none
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) decode: u32,
    /// Requests that decode at the same time
    #[arg(long, value_delimiter = ',', default_value = "1,16", value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N,N")]
    pub(crate) batch: Vec<u32>,
    /// Tokens before those that are decoded
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(crate) context: u32,
    #[command(flatten)]
    pub(crate) latents: Latents,
    /// Rounds that the medians are taken of
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
    pub(crate) rounds: u32,
    /// Same seed, same prompts
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub(crate) seed: u64,
    /// One JSON object a line: name, format, m, value, unit, floor, ratio, threads, bound
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Which endpoint is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Api {
    #[default]
    Completions,
    Chat,
}

/// Where prompts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dataset {
    #[default]
    Random,
    SharedPrefix,
    #[value(name = "sharegpt")]
    ShareGpt,
    Trace,
}

/// What a good request keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Objective {
    Ttft,
    Tpot,
    E2el,
}

fn number(text: &str, what: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|&value| fits(value));
    value.ok_or_else(|| format!("{text:?} is not {what}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |v| v.is_finite() && v > 0.0)
}

fn at_least_zero(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 on", |v| v.is_finite() && v >= 0.0)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "a share from 0 to below 1", |v| {
        (0.0..1.0).contains(&v)
    })
}

fn percentile(text: &str) -> Result<f64, String> {
    number(text, "a percentile from 0 to 100", |v| {
        (0.0..=100.0).contains(&v)
    })
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, "a rate such as 4, 0.5 or inf", |v| v > 0.0)
}

fn objective(text: &str) -> Result<(Objective, f64), String> {
    let wrong = || format!("{text:?} is not ttft:MS, tpot:MS or e2el:MS");
    let (name, limit) = text.split_once(':').ok_or_else(wrong)?;
    let objective = match name {
        "ttft" => Objective::Ttft,
        "tpot" => Objective::Tpot,
        "e2el" => Objective::E2el,
        _ => return Err(wrong()),
    };
    Ok((objective, positive(limit)?))
}
