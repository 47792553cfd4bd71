//! The attention node: prefill, decode and the latent KV cache.
//!
//! Secret of this room: the step loop. [`engine`] runs requests a step at a time, [`exchange`]
//! gets rows to their experts and back, [`service`] is the door to it, and [`run`] is the whole
//! node: it loads the trunk, joins the cluster, follows the placement and drains. It uses
//! `model` for arithmetic, `scheduler` for decisions, `transport` for rows, `node` for the host
//! and `proto` for the wire. It must not know where an expert runs beyond a
//! (node, slot) of the present placement, nor of a tokenizer more than what each token stands for,
//! which [`constraint`] needs.

pub mod constraint;
mod desk;
pub mod engine;
pub mod exchange;
mod keys;
mod live;
mod memory;
mod meter;
mod moving;
pub mod overlap;
mod pages;
mod peers;
mod routed;
mod rules;
pub mod sequence;
pub mod service;
mod speculate;
pub mod view;

use std::time::Duration;

use guild_model::cache::Format;
use guild_model::checkpoint::Dtype;
use guild_model::{Checkpoint, Config, Cpu, ModelError};
use guild_node::member::MemberError;
use guild_node::serve::ServeError;
use guild_node::tls::Tls;
use guild_node::{ExitKind, HasExitKind};
use guild_proto::cluster::v1::Duty;
use guild_proto::limits::max_step_tokens;
use guild_scheduler::batch::{InvalidLimits, Limits};
use guild_scheduler::membership::NUMERICS_OF_CACHE;

pub use desk::{EngineHandle, READERS_PER_PLACE, SubmitError};
pub use exchange::Patience;
pub use live::run;
pub use memory::KvMemory;
pub use overlap::{MicroBatches, Overlap};
pub use routed::RoutedRows;
pub use speculate::Speculate;

/// What an attention node is told.
#[derive(Clone, Debug)]
pub struct AttentionNodeConfig {
    /// The open checkpoint; roles of one process share it, and with it the digest.
    pub model: Checkpoint,
    /// What clients call the model.
    pub model_name: String,
    /// How weights are kept.
    pub dtype: Dtype,
    /// Stable and unique in the cluster.
    pub name: String,
    /// `host:port` where others reach this node.
    pub address: String,
    /// `http://host:port` of the coordinator.
    pub coordinator: String,
    /// Certificates for the connections inside the cluster; None: they are not encrypted, and
    /// anybody is let in.
    pub tls: Option<Tls>,
    /// `host:port` where health alone is answered without TLS, for probes that have no
    /// certificate; None: nowhere.
    pub health: Option<String>,
    /// `host:port` where `/metrics` and `/health` are answered over plain HTTP; None: nowhere.
    pub metrics: Option<String>,
    /// Nodes with the same value are one process; empty: alone.
    pub process: String,
    /// What fails together with this node: a host, a rack; empty: nothing else.
    pub failure_domain: String,
    /// Whether it runs prompts, decodes, or both.
    pub duty: Duty,
    /// Memory for the latent KV cache.
    pub kv_memory: KvMemory,
    /// How the latent KV cache stores rows; None: as [`AttentionNodeConfig::kv_format`] chooses.
    pub kv_dtype: Option<Format>,
    /// Positions of a KV page.
    pub page_tokens: usize,
    /// Requests that run at the same time.
    pub max_running: usize,
    /// Requests that wait for that; one more is refused.
    pub max_waiting: usize,
    /// Prompt tokens that wait together; further requests are refused. None: any number.
    pub max_waiting_tokens: Option<usize>,
    /// Requests that are expected to wait longer are refused at once; None: however long.
    pub max_wait: Option<Duration>,
    /// Rows of a step, prefill, decode and drafts together.
    pub max_step_tokens: usize,
    /// What a step should take at most while tokens are generated: prompts are cut so; None: as long
    /// as `max_step_tokens` rows take.
    pub itl_target: Option<Duration>,
    /// Whether pages of the KV cache are kept for prompts that begin the same way.
    pub prefix_cache: bool,
    /// Whether tokens are drafted.
    pub speculate: Speculate,
    /// When steps go in two micro-batches; it counts, too, what that hides.
    pub overlap: Overlap,
    /// Positions of a request, prompt and output together; None: what the model was made for.
    pub max_context: Option<usize>,
    /// How long expert nodes are waited for.
    pub patience: Patience,
    /// How long running requests may take to end after a request to shut down.
    pub drain: Duration,
}

impl AttentionNodeConfig {
    /// Positions of a KV page, by default.
    pub const PAGE_TOKENS: usize = 16;
    /// Requests that run at the same time, by default.
    pub const MAX_RUNNING: usize = 64;
    /// Requests that wait, by default.
    pub const MAX_WAITING: usize = 256;
    /// Rows of a step, by default.
    pub const MAX_STEP_TOKENS: usize = 512;
    /// Requests that would wait longer than this are refused, by default.
    pub const MAX_WAIT: Duration = Duration::from_secs(60);
    /// What a step should take at most while tokens are generated, by default.
    pub const ITL_TARGET: Duration = Duration::from_millis(250);
    /// Drain limit, by default.
    pub const DRAIN: Duration = Duration::from_secs(30);

    /// Everything by default but what has none. The model is called as its directory is.
    pub fn new(
        model: Checkpoint,
        name: impl Into<String>,
        address: impl Into<String>,
        coordinator: impl Into<String>,
    ) -> AttentionNodeConfig {
        AttentionNodeConfig {
            model_name: model.name(),
            model,
            dtype: Dtype::Auto,
            name: name.into(),
            address: address.into(),
            coordinator: coordinator.into(),
            tls: None,
            health: None,
            metrics: None,
            process: String::new(),
            failure_domain: String::new(),
            duty: Duty::Both,
            kv_memory: KvMemory::Auto,
            kv_dtype: None,
            page_tokens: Self::PAGE_TOKENS,
            max_running: Self::MAX_RUNNING,
            max_waiting: Self::MAX_WAITING,
            max_waiting_tokens: None,
            max_wait: Some(Self::MAX_WAIT),
            max_step_tokens: Self::MAX_STEP_TOKENS,
            itl_target: Some(Self::ITL_TARGET),
            prefix_cache: true,
            speculate: Speculate::default(),
            overlap: Overlap::default(),
            max_context: None,
            patience: Patience::default(),
            drain: Self::DRAIN,
        }
    }

    /// How the latent KV cache stores rows: what was asked for, else f32, in which a stream is what it would be without a
    /// cache.
    pub fn kv_format(&self) -> Format {
        self.kv_dtype.unwrap_or(Format::F32)
    }

    /// Names the numerics of this node: those of weights and arithmetic, and how rows are cached where that rounds.
    fn numerics_class(&self, cpu: &Cpu) -> String {
        let class = self.dtype.numerics_class(cpu);
        match self.kv_format() {
            Format::F32 => class,
            format => format!("{class}{NUMERICS_OF_CACHE}{format}"),
        }
    }

    /// Drafts after each token, at most: none where the model has no module that makes them.
    fn drafts(&self, model: &Config) -> usize {
        match model.num_nextn_predict_layers {
            0 => 0,
            _ => self.speculate.drafts(),
        }
    }

    /// What the scheduler may hand out on this host, now.
    fn limits(&self, model: &Config) -> Result<Limits, Error> {
        let step = max_step_tokens(model.hidden_size, model.num_experts_per_tok.max(1));
        let longest = model.max_position_embeddings;
        let max_context = self.max_context.map_or(longest, |asked| asked.min(longest));
        let drafts = self.drafts(model);
        let limits = Limits {
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            max_waiting_tokens: self.max_waiting_tokens.unwrap_or(usize::MAX),
            max_wait: self.max_wait,
            itl_target: self.itl_target,
            drafts,
            prefix_cache: self.prefix_cache,
            // The rows of a step travel in one message, and come back in one.
            max_step_tokens: self.max_step_tokens.min(step),
            page_tokens: self.page_tokens,
            pages: 1,
            max_context,
        };
        // Before anything is divided by one of them.
        limits.validate()?;
        let memory = self.kv_memory;
        let pages = memory::pages(
            memory,
            model,
            self.kv_format(),
            model.num_hidden_layers + usize::from(drafts > 0),
            self.page_tokens,
            self.max_running,
            max_context,
        );
        if pages == 0 {
            return Err(Error::KvMemory { memory });
        }
        Ok(Limits { pages, ..limits })
    }
}

/// Why an attention node ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The limits contradict themselves.
    #[error("attention node: {0}")]
    Limits(#[from] InvalidLimits),
    /// The KV memory does not hold a page.
    #[error(
        "--kv-memory: {memory:?} is less than one page; give more or make --page-tokens smaller"
    )]
    KvMemory {
        /// What was asked for.
        memory: KvMemory,
    },
    /// The server could not be set up or has failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The node cannot be a member of the cluster.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// The host gives no thread.
    #[error("cannot start thread {name}: {source}")]
    Thread {
        /// What it was for.
        name: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A defect: a thread of the node has panicked.
    #[error("thread {name} has failed: {message}")]
    Failed {
        /// What it was for.
        name: String,
        /// The panic's message.
        message: String,
    },
}

impl HasExitKind for Error {
    fn exit_kind(&self) -> ExitKind {
        match self {
            Error::Model(_) => ExitKind::Model,
            Error::Limits(_) | Error::KvMemory { .. } => ExitKind::Usage,
            Error::Serve(error) => error.exit_kind(),
            Error::Member(error) => error.exit_kind(),
            Error::Thread { .. } => ExitKind::Resources,
            Error::Failed { .. } => ExitKind::Internal,
        }
    }
}
