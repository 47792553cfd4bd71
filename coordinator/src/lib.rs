//! The coordinator: the cluster's front door, its membership and its placement.
//!
//! A shell: it puts the decisions of `scheduler` behind guild.cluster.v1, the
//! clients' door in [`front`] before the attention nodes, and both on
//! listeners. It uses `scheduler`, `node`, `proto`, and of `model` only what
//! identifies a checkpoint and turns text into tokens; it never computes with
//! weights and never sees a row.

mod backend;
mod cluster;
mod state;

pub mod front;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use front::{FrontDoor, FrontLimits, ServedModel};
use guild_model::checkpoint::Dtype;
use guild_model::text::Text;
use guild_model::{Checkpoint, ModelError};
use guild_node::channel::Dialer;
use guild_node::keys::ApiKeys;
use guild_node::metrics::MetricsPort;
use guild_node::serve::{Health, ServeError, Server};
use guild_node::store::{self, Candidate, StoreError, StoreUrl};
use guild_node::tls::{FrontTls, Role, Tls};
use guild_node::{ExitKind, HasExitKind, Shutdown};
use guild_proto::cluster::v1::cluster_server::ClusterServer;
use guild_scheduler::membership::Settings;
use guild_scheduler::rebalance::Mode;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;

use backend::AttentionNodes;
use cluster::ClusterService;
use state::ClusterState;

/// Service whose health says whether the cluster can take requests.
const INFERENCE: &str = "guild.inference.v1.Inference";
/// Service by which nodes join.
const CLUSTER: &str = "guild.cluster.v1.Cluster";
/// Time the cluster service gets to end its streams once the front door is shut.
const CLUSTER_DRAIN: Duration = Duration::from_secs(1);

/// Time that resigning the leadership may take.
const RESIGNING: Duration = Duration::from_secs(1);

/// What a coordinator is told.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// The open checkpoint; roles of one process share it, and with it the digest.
    /// Only its description, its identity and its tokenizer are used here.
    pub model: Checkpoint,
    /// What clients call the model.
    pub model_name: String,
    /// How expert nodes keep weights, to turn their bytes into experts.
    pub dtype: Dtype,
    /// Tokens of prompt and output together, at most; None: what the model was
    /// made for.
    pub max_context: Option<usize>,
    /// Expert nodes that must have joined before the first placement.
    pub min_expert_nodes: usize,
    /// Homes of every expert, each on another node, as far as nodes and their
    /// memory allow.
    pub replicas: u32,
    /// Homes that each layer may have beyond these: room for copies of hot experts.
    pub redundant_experts: u32,
    /// How the load of the expert nodes is kept even.
    pub rebalance: Rebalance,
    /// What the copies of one step of a migration may take.
    pub copy_deadline: Duration,
    /// How long to wait for further expert nodes after one has joined.
    pub settle: Duration,
    /// A node that is silent for this long is taken for dead.
    pub lease: Duration,
    /// How long running streams may take to end after a request to shut down.
    pub drain: Duration,
    /// How long a stream that has lost its attention node waits for another.
    pub resume_wait: Duration,
    /// Certificates for the connections inside the cluster; None: they are not encrypted, and
    /// anybody is let in.
    pub tls: Option<Tls>,
    /// Certificate that clients see; None: they are served without encryption.
    pub front_tls: Option<FrontTls>,
    /// Whom the front door serves; None: everybody.
    pub api_keys: Option<ApiKeys>,
    /// What clients may ask for.
    pub limits: FrontLimits,
    /// Where the state of the cluster is kept and a leader elected.
    pub store: StoreUrl,
    /// `host:port` where nodes reach this coordinator, for others to name when
    /// it leads; None: where it listens.
    pub advertise: Option<String>,
    /// `host:port` where `/metrics` and `/health` are answered over plain HTTP and without a key, beside the front door;
    /// None: nowhere.
    pub metrics: Option<String>,
    /// A leader that the store has not heard of for so long is deposed.
    pub leader_ttl: Duration,
    /// Where one owner ends the coordinator and its nodes; None: the coordinator
    /// does not wait for nodes to leave.
    pub farewell: Option<Farewell>,
}

/// How the load of the expert nodes is kept even while the cluster serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebalance {
    /// Who plans.
    pub planner: Mode,
    /// Between two plans; None: only when an operator asks for one.
    pub interval: Option<Duration>,
    /// Bytes that one plan may move.
    pub budget_bytes: u64,
}

/// How an owner ends a coordinator together with its nodes: doors first, then
/// the nodes, while they still have somebody to say goodbye to.
#[derive(Clone, Debug, Default)]
pub struct Farewell {
    /// Triggered by the coordinator: the doors are shut and no stream is left.
    pub doors_shut: Shutdown,
    /// Triggered by the owner: the nodes have left.
    pub nodes_left: Shutdown,
}

impl CoordinatorConfig {
    /// Expert nodes to wait for, by default.
    pub const MIN_EXPERT_NODES: usize = 1;
    /// Homes of every expert, by default.
    pub const REPLICAS: u32 = 1;
    /// Homes of a layer beyond its replicas, by default.
    pub const REDUNDANT_EXPERTS: u32 = 0;
    /// Time between two plans, by default.
    pub const REBALANCE_INTERVAL: Duration = Duration::from_secs(60);
    /// Bytes that one plan may move, by default: a second or two of 10 GbE.
    pub const REBALANCE_BUDGET: u64 = 1 << 30;
    /// What the copies of one step may take, by default: some gigabytes from a
    /// slow disk, or behind the rows of a busy node.
    pub const COPY_DEADLINE: Duration = Duration::from_secs(600);
    /// Settle time, by default.
    pub const SETTLE: Duration = Duration::from_millis(500);
    /// Lease, by default.
    pub const LEASE: Duration = Duration::from_secs(5);
    /// Drain limit, by default.
    pub const DRAIN: Duration = Duration::from_secs(30);
    /// Time to live of a leader's lease, by default.
    pub const LEADER_TTL: Duration = Duration::from_secs(3);
    /// How long a stream waits for another attention node, by default.
    pub const RESUME_WAIT: Duration = Duration::from_secs(30);

    /// The defaults for a checkpoint, called by the name of its directory.
    pub fn new(model: Checkpoint) -> CoordinatorConfig {
        CoordinatorConfig {
            model_name: model.name(),
            model,
            dtype: Dtype::Auto,
            max_context: None,
            min_expert_nodes: CoordinatorConfig::MIN_EXPERT_NODES,
            replicas: CoordinatorConfig::REPLICAS,
            redundant_experts: CoordinatorConfig::REDUNDANT_EXPERTS,
            rebalance: Rebalance {
                planner: Mode::Guild,
                interval: Some(CoordinatorConfig::REBALANCE_INTERVAL),
                budget_bytes: CoordinatorConfig::REBALANCE_BUDGET,
            },
            copy_deadline: CoordinatorConfig::COPY_DEADLINE,
            settle: CoordinatorConfig::SETTLE,
            lease: CoordinatorConfig::LEASE,
            drain: CoordinatorConfig::DRAIN,
            resume_wait: CoordinatorConfig::RESUME_WAIT,
            tls: None,
            front_tls: None,
            api_keys: None,
            limits: FrontLimits::default(),
            store: StoreUrl::Memory,
            advertise: None,
            metrics: None,
            leader_ttl: CoordinatorConfig::LEADER_TTL,
            farewell: None,
        }
    }
}

/// Where a coordinator listens.
#[derive(Debug)]
pub struct Listeners {
    /// guild.cluster.v1, for nodes.
    pub cluster: TcpListener,
    /// The OpenAI-shaped API and guild.inference.v1, for clients.
    pub http: TcpListener,
    /// guild.inference.v1, for clients.
    pub grpc: TcpListener,
}

/// Why a coordinator cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A listener cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The store is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A setting makes no sense.
    #[error("{field}: {problem}")]
    Setting {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A part of the coordinator has ended without being asked to.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
}

impl HasExitKind for CoordinatorError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            CoordinatorError::Model(_) => ExitKind::Model,
            CoordinatorError::Serve(error) => error.exit_kind(),
            CoordinatorError::Store(error) => error.exit_kind(),
            CoordinatorError::Setting { .. } => ExitKind::Usage,
            CoordinatorError::Ended(_) => ExitKind::Internal,
        }
    }
}

/// Runs a coordinator until `shutdown`, then drains: readiness falls first,
/// running streams get up to the drain limit, then everything is closed.
///
/// # Errors
/// The checkpoint or a setting is unusable, or a server has failed.
pub async fn run(
    config: CoordinatorConfig,
    listeners: Listeners,
    shutdown: Shutdown,
) -> Result<(), CoordinatorError> {
    check(&config)?;
    tracing::info!(model = %config.model.dir().display(), "reading the checkpoint's description");
    let identified = tokio::task::spawn_blocking({
        let config = config.clone();
        move || identify(&config)
    });
    let (settings, model) = tokio::select! {
        identified = identified => {
            identified.map_err(|_| CoordinatorError::Ended("reading the checkpoint"))??
        }
        () = shutdown.requested() => return Ok(()),
    };
    tracing::info!(
        model = model.name,
        digest = model.digest,
        expert_layers = settings.layers.len(),
        experts = settings.experts,
        "serving this model"
    );

    let state = ClusterState::new(
        settings,
        model.name.clone(),
        model.digest.clone(),
        config.rebalance,
    );
    let election_end = Shutdown::new();
    let mut election = Election::begin(&config, &listeners, &state, election_end.clone()).await?;
    let nodes = AttentionNodes::new(
        Arc::clone(&state),
        Dialer::to(Role::ATTENDING, config.tls.as_ref()),
        &model.config.eos_token_ids,
        config.resume_wait,
    );
    let front = FrontDoor::new(model, Arc::new(nodes), config.limits.clone());

    let http = Server::on(Routes::from(front.router()), true)
        .await
        .listing(INFERENCE)
        .with_tls(config.front_tls.as_ref().map(FrontTls::acceptor))
        .guarded(config.api_keys.clone().map(front::guard))
        .measured_at(MetricsPort::at(config.metrics.clone(), {
            let front = Arc::clone(&front);
            move || front.page()
        }));
    let health = http.health();
    let grpc = Server::with_health(Routes::default(), false, health.clone())
        .add(front.inference_service())
        .with_tls(config.front_tls.as_ref().map(FrontTls::acceptor))
        .guarded(config.api_keys.clone().map(front::guard));
    let cluster_end = Shutdown::new();
    let service = ClusterService::new(Arc::clone(&state), cluster_end.clone());
    let certified = config.tls.as_ref().map(|tls| tls.acceptor(Role::JOINING));
    let cluster = Server::new()
        .await
        .add(ClusterServer::new(service))
        .with_tls(certified)
        .guarded(Some(cluster::guard()));
    cluster.health().set_serving("", true).await;
    cluster.health().set_serving(CLUSTER, true).await;

    let doors = async {
        let result = tokio::try_join!(
            http.run(listeners.http, shutdown.clone(), config.drain),
            grpc.run(listeners.grpc, shutdown.clone(), config.drain),
        );
        // Nodes stay members until the last stream is through.
        if let Some(farewell) = &config.farewell {
            farewell.doors_shut.trigger();
            farewell.nodes_left.requested().await;
        }
        cluster_end.trigger();
        result
    };
    let serving = async {
        tokio::try_join!(
            doors,
            cluster.run(listeners.cluster, cluster_end.clone(), CLUSTER_DRAIN),
        )
    };
    let drain_begins = async {
        shutdown.requested().await;
        state.begin_drain();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = serving => { result?; }
        ended = &mut election.task => {
            ended.map_err(|_| CoordinatorError::Ended("the election"))??;
        }
        () = state.keep_time() => return Err(CoordinatorError::Ended("the clock")),
        () = state.keep_balance() => return Err(CoordinatorError::Ended("the planner")),
        () = report_health(&state, &health) => return Err(CoordinatorError::Ended("health")),
        () = drain_begins => {}
    }
    election_end.trigger();
    // Otherwise its lease runs out.
    let _ = tokio::time::timeout(RESIGNING, &mut election.task).await;
    tracing::info!("the coordinator has ended");
    Ok(())
}

/// This coordinator's part in the election, until dropped.
struct Election {
    task: AbortOnDropHandle<Result<(), StoreError>>,
}

impl Election {
    /// Takes part from now on; in a store of its own it leads already.
    async fn begin(
        config: &CoordinatorConfig,
        listeners: &Listeners,
        state: &Arc<ClusterState>,
        end: Shutdown,
    ) -> Result<Election, StoreError> {
        let store = store::open(&config.store);
        let listening = listeners.cluster.local_addr();
        let listening = listening.map_or_else(|_| "unknown".to_owned(), |at| at.to_string());
        let candidate = Candidate {
            id: uuid::Uuid::new_v4().to_string(),
            address: config.advertise.clone().unwrap_or(listening),
        };
        let ttl = config.leader_ttl;
        // Nobody else can lead by a store of this process's own.
        let first = match config.store {
            StoreUrl::Memory => Some(store.campaign(&candidate, ttl).await?),
            _ => None,
        };
        let leads = first.is_some();
        let taking_part = Arc::clone(state);
        let task = tokio::spawn(async move {
            let state = taking_part;
            state.take_part(store, candidate, ttl, first, end).await
        });
        if leads {
            state.leads().await;
        }
        Ok(Election {
            task: AbortOnDropHandle::new(task),
        })
    }
}

fn check(config: &CoordinatorConfig) -> Result<(), CoordinatorError> {
    let wrong = |field, problem: &str| {
        Err(CoordinatorError::Setting {
            field,
            problem: problem.to_owned(),
        })
    };
    if config.model_name.is_empty() {
        return wrong("--served-model-name", "must not be empty");
    }
    if config.lease < state::MIN_LEASE || config.lease > state::MAX_LEASE {
        return wrong(
            "--lease",
            &format!(
                "must be between {:?} and {:?}",
                state::MIN_LEASE,
                state::MAX_LEASE
            ),
        );
    }
    if config.replicas == 0 {
        return wrong("--replicas", "must be at least 1");
    }
    if config.max_context == Some(0) {
        return wrong("--max-context", "must be at least 1");
    }
    Ok(())
}

/// Takes from the checkpoint what a coordinator needs. Reads the
/// weights once, for the digest.
fn identify(config: &CoordinatorConfig) -> Result<(Settings, ServedModel), ModelError> {
    let checkpoint = &config.model;
    let description = checkpoint.config();
    let digest = checkpoint.digest()?;
    let mut slot_bytes = 0;
    for layer in description.expert_layers() {
        slot_bytes = slot_bytes.max(checkpoint.expert_memory(layer, 0, config.dtype)?);
    }
    let settings = Settings {
        model_digest: digest.clone(),
        layers: description
            .expert_layers()
            .map(|layer| layer as u32)
            .collect(),
        experts: description.n_routed_experts as u32,
        slot_bytes,
        lease: config.lease,
        settle: config.settle,
        min_expert_nodes: config.min_expert_nodes,
        replicas: config.replicas,
        redundant_experts: config.redundant_experts,
        copy_deadline: config.copy_deadline,
    };
    let made_for = description.max_position_embeddings;
    let max_context = config
        .max_context
        .map_or(made_for, |limit| limit.min(made_for));
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let model = ServedModel {
        name: config.model_name.clone(),
        config: Arc::new(description.clone()),
        digest,
        created,
        max_context: u32::try_from(max_context).unwrap_or(u32::MAX),
        text: Text::load(checkpoint.dir(), description)?,
    };
    Ok((settings, model))
}

/// Keeps the health answers of the front door equal to the readiness.
async fn report_health(state: &ClusterState, health: &Health) {
    let mut waiting_for = state.waiting_for();
    loop {
        let ready = waiting_for.borrow_and_update().is_none();
        health.set_serving("", ready).await;
        health.set_serving(INFERENCE, ready).await;
        if waiting_for.changed().await.is_err() {
            return;
        }
    }
}
