//! The flags of `guild coordinator`, and those of them that `guild up` has, too.

use std::path::PathBuf;

use clap::Args;
use guild_coordinator::CoordinatorConfig as Defaults;
use guild_node::store::StoreUrl;

use super::{Balance, Common, DoorArgs, Exposure, Named, NodeTls, Weights};
use crate::failure::EXIT_CODES;
use crate::units;

/// What a coordinator does about nodes that are lost.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Redundancy {
    /// Homes of every expert, each on another node, as far as nodes and their memory allow
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64), value_name = "N")]
    pub(crate) replicas: u16,
    /// Seconds of silence after which a node is taken for dead
    #[arg(
        long,
        default_value_t = Defaults::LEASE.as_secs_f64(),
        value_parser = units::parse_seconds,
        value_name = "SECONDS"
    )]
    pub(crate) lease: f64,
}

impl Default for Redundancy {
    fn default() -> Self {
        Self {
            replicas: Defaults::REPLICAS as u16,
            lease: Defaults::LEASE.as_secs_f64(),
        }
    }
}

/// Where clients come in.
#[derive(Clone, Debug, Args)]
pub(crate) struct Doors {
    /// OpenAI-compatible front door
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    pub(crate) http: String,
    /// gRPC front door
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "HOST:PORT")]
    pub(crate) grpc: String,
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
    #[command(flatten)]
    pub(crate) named: Named,
    /// Where nodes join
    #[arg(long, default_value = "127.0.0.1:7000", value_name = "HOST:PORT")]
    pub(crate) listen: String,
    #[command(flatten)]
    pub(crate) doors: Doors,
    /// Where nodes reach this coordinator, for other coordinators to name; default: --listen
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// Where `/metrics` (Prometheus) and `/health` are answered over plain HTTP, without keys or certificates; they say
    /// nothing of requests' content. Default: at the front door alone
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<String>,

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
    pub(crate) weights: Weights,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) tls: NodeTls,
    #[command(flatten)]
    pub(crate) door: DoorArgs,
    #[command(flatten)]
    pub(crate) common: Common,
}
