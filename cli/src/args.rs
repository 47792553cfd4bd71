//! The command line. Names and flags are a contract with users and scripts.

use std::path::PathBuf;
use std::str::FromStr as _;

use clap::{Args, Parser, Subcommand, ValueEnum};
use guild_attention_node::exchange::SUSPECT_AFTER;
use guild_attention_node::{AttentionNodeConfig as Defaults, KvMemory, Speculate};
use guild_coordinator::CoordinatorConfig as CoordinatorDefaults;
use guild_expert_node::CopyFrom;
use guild_model::cache::Format;
use guild_model::checkpoint::Dtype;
use guild_node::store::StoreUrl;
use guild_node::telemetry::LogFormat;
use guild_node::tls::Role;

use crate::failure::EXIT_CODES;
use crate::listen::EPHEMERAL;

mod balance;
mod bench;
mod colocated;
mod experts;
mod manifest;
mod quantize;
mod security;

pub(crate) use balance::{Balance, PlannerArg};
pub(crate) use bench::{
    Api, Bench, BenchCommand, BenchCompare, BenchKernels, BenchModel, BenchServe, Dataset,
    Objective,
};
pub(crate) use colocated::Colocated;
pub(crate) use experts::{
    Experts, ExpertsCommand, ExpertsDrain, ExpertsEplb, ExpertsLoad, ExpertsLs, ExpertsPlan,
    ExpertsRebalance, ExpertsRecord, ExpertsWatch, Leader, SplitArg,
};
pub(crate) use manifest::Manifest;
pub(crate) use quantize::{Quantize, Target};
pub(crate) use security::{Access, DoorArgs, Exposure, NodeTls};

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

/// How weights are kept and computed with.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Compute {
    /// Weights in memory: as stored, widened to f32, rounded to bf16, or quantised as `guild quantize` does; int8 and
    /// int4 may name a group, as in int4-g32
    #[arg(long, default_value_t, value_parser = Dtype::from_str, value_name = "auto|f32|bf16|fp8|int8|int4")]
    pub(crate) dtype: Dtype,
    /// Use the experts of an int4 or int8 checkpoint where they lie in the file instead of copying them into memory:
    /// serves at once, and their bytes are held against the manifest while they serve. The files must not be written
    /// to meanwhile: one that is cut short ends the process
    #[arg(long)]
    pub(crate) mmap: bool,
    /// Threads for the arithmetic; 0: one per physical core
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024), value_name = "N")]
    pub(crate) threads: u16,
}

/// Limits of an attention node.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Engine {
    /// Memory for the KV cache: `auto`, or a size such as 8GiB
    #[arg(
        long,
        default_value = "auto",
        value_name = "SIZE",
        help_heading = "Engine"
    )]
    pub(crate) kv_memory: KvMemory,
    /// How the latent KV cache stores rows; auto: f32
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "auto|f32|bf16|fp8",
        hide_possible_values = true,
        help_heading = "Engine"
    )]
    pub(crate) kv_dtype: KvDtype,
    /// Tokens of prompt and output together; 0: as many as the model was made for
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Engine")]
    pub(crate) max_context: u32,
    /// Requests in one batch
    #[arg(long, default_value_t = Defaults::MAX_RUNNING as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_running: u32,
    /// Requests that may wait for a place in the batch; further ones are refused
    #[arg(long, default_value_t = Defaults::MAX_WAITING as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_waiting: u32,
    /// Prompt tokens that may wait together; further requests are refused; 0: any number
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Engine")]
    pub(crate) max_waiting_tokens: u32,
    /// Requests that are expected to wait longer than these seconds are refused at once; 0: however long
    #[arg(long, default_value_t = Defaults::MAX_WAIT.as_secs() as u32, value_name = "SECONDS", help_heading = "Engine")]
    pub(crate) max_wait: u32,
    /// Milliseconds that a step should take at most while tokens are generated: prompts are cut into chunks that keep
    /// to it; 0: as long as --max-step-tokens rows take
    #[arg(long, default_value_t = Defaults::ITL_TARGET.as_millis() as u32, value_name = "MS", help_heading = "Engine")]
    pub(crate) itl_target: u32,
    /// Compute every prompt anew instead of keeping what prompts that begin alike have in common
    #[arg(long, help_heading = "Engine")]
    pub(crate) no_prefix_cache: bool,
    /// Draft tokens with the checkpoint's MTP module and check them in the next step; the output stays the same. auto:
    /// one draft, as long as that is faster
    #[arg(
        long,
        default_value_t,
        value_name = "off|auto|N",
        help_heading = "Engine"
    )]
    pub(crate) speculate: Speculate,
    /// Tokens of one step, prefill, decode and drafts together
    #[arg(long, default_value_t = Defaults::MAX_STEP_TOKENS as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_step_tokens: u32,
    /// Tokens of one page of the KV cache
    #[arg(long, default_value_t = Defaults::PAGE_TOKENS as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) page_tokens: u32,
    /// Milliseconds an expert node may owe an answer before it is suspected; more where its
    /// answers usually take long. Other homes of its experts are asked as soon as it is later
    /// than expert nodes usually are
    #[arg(long, default_value_t = SUSPECT_AFTER.as_millis() as u32, value_parser = clap::value_parser!(u32).range(1..), value_name = "MS", help_heading = "Engine")]
    pub(crate) suspect_after: u32,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            kv_memory: KvMemory::Auto,
            kv_dtype: KvDtype::Auto,
            max_context: 0,
            max_running: Defaults::MAX_RUNNING as u32,
            max_waiting: Defaults::MAX_WAITING as u32,
            max_waiting_tokens: 0,
            max_wait: Defaults::MAX_WAIT.as_secs() as u32,
            itl_target: Defaults::ITL_TARGET.as_millis() as u32,
            no_prefix_cache: false,
            speculate: Speculate::default(),
            max_step_tokens: Defaults::MAX_STEP_TOKENS as u32,
            page_tokens: Defaults::PAGE_TOKENS as u32,
            suspect_after: SUSPECT_AFTER.as_millis() as u32,
        }
    }
}

/// How the latent KV cache stores rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDtype {
    #[default]
    Auto,
    F32,
    Bf16,
    Fp8,
}

impl KvDtype {
    /// None: as the attention node chooses.
    pub(crate) fn format(self) -> Option<Format> {
        match self {
            KvDtype::Auto => None,
            KvDtype::F32 => Some(Format::F32),
            KvDtype::Bf16 => Some(Format::Bf16),
            KvDtype::Fp8 => Some(Format::Fp8),
        }
    }
}

/// What a coordinator does about nodes that are lost.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Redundancy {
    /// Homes of every expert, each on another node, as far as nodes and their memory allow
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), value_name = "N")]
    pub(crate) replicas: u16,
    /// Seconds of silence after which a node is taken for dead
    #[arg(
        long,
        default_value_t = CoordinatorDefaults::LEASE.as_secs_f64(),
        value_parser = crate::units::parse_seconds,
        value_name = "SECONDS"
    )]
    pub(crate) lease: f64,
}

impl Default for Redundancy {
    fn default() -> Self {
        Self {
            replicas: CoordinatorDefaults::REPLICAS as u16,
            lease: CoordinatorDefaults::LEASE.as_secs_f64(),
        }
    }
}

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
    /// Name that clients see; default: the name of the folder
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Option<String>,
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
    /// OpenAI-compatible front door
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    pub(crate) http: String,
    /// gRPC front door
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "HOST:PORT")]
    pub(crate) grpc: String,
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

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example, one role a terminal, in any order:
  guild certs --out certs && export GUILD_TLS_DIR=certs GUILD_MODEL=models/demo
  guild coordinator
  guild attention-node --coordinator 127.0.0.1:7000
  guild expert-node    --coordinator 127.0.0.1:7000
  guild expert-node    --coordinator 127.0.0.1:7000

{EXIT_CODES}"))]
pub(crate) struct Coordinator {
    /// Folder of the checkpoint; only its configuration, tokenizer and identity are read
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Name that clients see; default: the name of the folder
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Option<String>,
    /// Where nodes join
    #[arg(long, default_value = "127.0.0.1:7000", value_name = "HOST:PORT")]
    pub(crate) listen: String,
    /// OpenAI-compatible front door
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    pub(crate) http: String,
    /// gRPC front door
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "HOST:PORT")]
    pub(crate) grpc: String,
    /// Where nodes reach this coordinator, for other coordinators to name; default: --listen
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// What outlives this process and elects one leader of several coordinators: memory (nothing
    /// does), embedded:PATH (a file on this machine) or `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`
    #[arg(long, default_value = "memory", value_name = "STORE")]
    pub(crate) store: StoreUrl,
    /// Expert nodes to wait for before experts are placed
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) min_expert_nodes: u16,
    /// Tokens of prompt and output together; 0: as many as the model was made for
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) max_context: u32,
    #[command(flatten)]
    pub(crate) redundancy: Redundancy,
    #[command(flatten)]
    pub(crate) balance: Balance,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) tls: NodeTls,
    #[command(flatten)]
    pub(crate) door: DoorArgs,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// How a node joins.
#[derive(Clone, Debug, Args)]
pub(crate) struct Joining {
    /// Folder of the checkpoint, the same one in the whole cluster
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
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
    /// Where health alone is answered without TLS, for probes that have no certificate
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) health: Option<String>,
    /// What fails together with this node, such as its host or rack: homes of an expert are kept
    /// apart as far as possible
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

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild expert-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs

{EXIT_CODES}"))]
pub(crate) struct ExpertNode {
    #[command(flatten)]
    pub(crate) joining: Joining,
    /// Memory for resident experts, such as 32GiB; 0: as much as is placed here
    #[arg(long, default_value = "0", value_parser = crate::units::parse_bytes, value_name = "SIZE")]
    pub(crate) capacity: u64,
    /// Where experts come from first that other nodes have: from these, or from the checkpoint
    #[arg(long, default_value_t, value_parser = CopyFrom::from_str, value_name = "peer|checkpoint")]
    pub(crate) copy_from: CopyFrom,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild generate --prompt 'ROMEO:' --max-tokens 40
  guild generate --token-ids 0,839,30 --logprobs 3 --prompt-logprobs 3 --ignore-eos --json
  guild generate --model models/demo --prompt 'ROMEO:'       # no server needed

{EXIT_CODES}"))]
pub(crate) struct Generate {
    /// gRPC front door, or an attention node (token ids only)
    #[arg(long, default_value = "http://127.0.0.1:8001", value_name = "URL")]
    pub(crate) endpoint: String,
    /// Serve this checkpoint in this process instead of asking a server
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', num_args = 1)]
    pub(crate) token_ids: Vec<u32>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// 0: always the most probable token
    #[arg(
        long,
        default_value_t = 0.0,
        allow_negative_numbers = true,
        value_name = "T"
    )]
    pub(crate) temperature: f32,
    /// Same seed, same prompt, same tokens
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Sample from the most probable tokens that make up this share
    #[arg(
        long,
        default_value_t = 1.0,
        allow_negative_numbers = true,
        value_name = "P"
    )]
    pub(crate) top_p: f32,
    /// Sample from this many most probable tokens; 0: all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: u32,
    /// Text that ends the output; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Log-probability of every output token and of the K best at its place
    #[arg(long, value_name = "K")]
    pub(crate) logprobs: Option<u32>,
    /// The same for the prompt, from its second token on
    #[arg(long, value_name = "K")]
    pub(crate) prompt_logprobs: Option<u32>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object: token_ids, text, logprobs, prompt_logprobs, finish_reason, usage
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("In a conversation: /reset forgets what was said, /exit or Ctrl-D ends,
Ctrl-C stops a reply. Lines from a pipe are turns as well:
  echo 'What say you, my lord?' | guild chat

{EXIT_CODES}"))]
pub(crate) struct Chat {
    /// HTTP front door
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    pub(crate) endpoint: String,
    /// System message that every conversation begins with
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of one reply at most
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// 0: always the most probable token; default: the server's
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Sample from the most probable tokens that make up this share
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Same seed, same conversation, same replies
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild inspect --model models/demo --nodes 4
  guild inspect --model models/demo --reference --token-ids 0,839,30 --max-tokens 8 --json
  guild inspect --compare models/demo /tmp/demo-int4 --prompts models/demo/prompts.txt
  guild inspect --cpu

{EXIT_CODES}"))]
pub(crate) struct Inspect {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Expert nodes of the cluster to plan for
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) nodes: u16,
    /// Run the slow f32 reference on --token-ids and print what `generate --json` prints
    #[arg(long, requires = "token_ids")]
    pub(crate) reference: bool,
    /// Prompt of the reference
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', num_args = 1)]
    pub(crate) token_ids: Vec<u32>,
    /// Tokens that the reference continues greedily
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// Best alternatives at every place of the reference
    #[arg(long, default_value_t = 5, value_name = "K")]
    pub(crate) logprobs: u32,
    /// How far B is from A, two checkpoints of one model in different formats: error of every weight
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["model", "reference"])]
    pub(crate) compare: Vec<PathBuf>,
    /// Texts for --compare, one a line (a JSON string or list of token ids is taken as such): how far apart the
    /// distributions of the next token are, at every token
    #[arg(long, value_name = "FILE", requires = "compare")]
    pub(crate) prompts: Option<PathBuf>,
    /// Say which instruction set this machine's arithmetic uses, and why
    #[arg(long)]
    pub(crate) cpu: bool,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild random-model --shape tiny --out /tmp/tiny
  guild random-model --shape moonlight-4L --set num_hidden_layers=6 --out /tmp/moonlight

Every value is a function of seed, tensor name and index alone: the same command
writes the same bytes anywhere.

{EXIT_CODES}"))]
pub(crate) struct RandomModel {
    /// Shape to start from; an unknown one is answered with the list
    #[arg(long, value_name = "SHAPE")]
    pub(crate) shape: String,
    /// Change one key of its config.json; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Seed of the weights
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub(crate) seed: u64,
    /// Largest file, in GB
    #[arg(long, default_value_t = 4.0, value_name = "GB")]
    pub(crate) shard_gb: f64,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild certs --out certs --hosts localhost,127.0.0.1
  guild certs --out certs --role expert --name expert-3 --hosts '*.guild-expert.prod.svc'

The first makes a CA and a certificate for each role, good for any node of the role, and
one for operators, who look after the cluster with `guild experts`.
The second adds one, by the CA in --out, for one node alone.

{EXIT_CODES}"))]
pub(crate) struct Certs {
    /// Folder to write; what is there is not overwritten
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Cluster that the certificates are for; they mean nothing in another
    #[arg(long, default_value = "guild", value_name = "NAME")]
    pub(crate) cluster: String,
    /// Names and addresses under which the nodes are dialled
    #[arg(
        long,
        default_value = "localhost,127.0.0.1,::1",
        value_name = "HOST,HOST",
        value_delimiter = ',',
        num_args = 1
    )]
    pub(crate) hosts: Vec<String>,
    /// Also good wherever else a node of the role is found: for pods, whose addresses change
    #[arg(long)]
    pub(crate) anywhere: bool,
    /// Only for this role
    #[arg(long, value_parser = Role::from_str, value_name = "coordinator|attention|expert|operator")]
    pub(crate) role: Option<Role>,
    /// Only for the node of this name; may be given more than once
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Vec<String>,
    /// Days until they expire
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) days: u16,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) command: KeysCommand,
}

/// What to do about keys.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Draws a key and prints it, this once, and the line for the file of keys
    New(NewKey),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild keys new --name alice | tee /dev/tty | tail -n 1 >> api-keys

{EXIT_CODES}"))]
pub(crate) struct NewKey {
    /// Whose key it is
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) common: Common,
}
