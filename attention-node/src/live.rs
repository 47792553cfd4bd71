//! The life of an attention node: load, join, serve, drain.
//!
//! Secret: the order of these and what the outside is told meanwhile. The node is ready when the
//! trunk is loaded, the engine alive and a placement active; it keeps to the last active
//! placement when the coordinator falls silent, and says that it serves by a new one as soon as
//! no row is away by the one before.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use guild_model::text::Text;
use guild_model::trunk::Trunk;
use guild_model::{Checkpoint, Config, Cpu};
use guild_node::Shutdown;
use guild_node::channel::Dialer;
use guild_node::member::{Load, Member, MemberConfig, NodeState};
use guild_node::metrics::MetricsPort;
use guild_node::serve::{Health, Server};
use guild_node::tls::Role;
use guild_proto::cluster::v1::{Placement, PlacementState, Role as NodeRole};
use guild_proto::inference::v1::inference_server::{InferenceServer, SERVICE_NAME};
use guild_proto::pages::v1::pages_server::PagesServer;
use guild_transport::{LinkLimits, Links, Switchboard};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::desk::EngineHandle;
use crate::engine::Engine;
use crate::meter::{Counted, Meter};
use crate::rules;
use crate::service::{Inference, Phase};
use crate::view::View;
use crate::{AttentionNodeConfig, Error, Speculate};

/// How often the coordinator is told how busy this node is.
const LOAD_EVERY: Duration = Duration::from_millis(200);
/// What failed or halted streams get to reach their readers before connections are cut.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Progress is logged each time another so many percent are read.
const PROGRESS_PERCENT: u64 = 10;

/// Runs an attention node on `listener` until `shutdown`; then it takes no more requests, lets
/// those it has end within the drain limit, leaves the cluster and returns. Expert nodes of the same
/// process are reached by name through `switchboard`, without a network.
///
/// # Errors
/// The checkpoint, the limits or the listener cannot be used, the coordinator refuses this node,
/// or the engine has failed.
#[tracing::instrument(name = "attention", skip_all, fields(node = cfg.name))]
pub async fn run(
    cfg: AttentionNodeConfig,
    listener: TcpListener,
    cpu: Cpu,
    switchboard: Option<Switchboard>,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let checkpoint = cfg.model.clone();
    let model = Arc::new(checkpoint.config().clone());
    // Contradictions are reported before anything is loaded.
    cfg.limits(&model)?;

    let (phase, phases) = watch::channel(Phase::Waiting("it is starting".to_owned()));
    let (dir, config) = (checkpoint.dir().to_owned(), Arc::clone(&model));
    let load_text = move || Text::load(&dir, &config).map_err(|e| e.to_string());
    let service =
        Inference::new(Arc::clone(&model), &cfg.model_name, phases).with_text(Arc::new(load_text));
    let others = Dialer::to(Role::ATTENDING, cfg.tls.as_ref());
    let service = service.pairing(others, &cfg.numerics_class(&cpu), cfg.duty);
    let meter = service.meter();
    let service = Arc::new(service);
    let shown = Arc::clone(&service);
    let requesting_only = cfg.tls.as_ref().map(|tls| tls.acceptor(Role::REQUESTING));
    let server = Server::new()
        .await
        .add(InferenceServer::from_arc(Arc::clone(&service)))
        .add(PagesServer::from_arc(Arc::clone(&service)))
        .with_tls(requesting_only)
        .guarded(Some(rules::guard()))
        .probed_at(cfg.health.clone())
        .measured_at(MetricsPort::at(cfg.metrics.clone(), move || shown.page()));
    let health = server.health();
    health.set_serving(SERVICE_NAME, false).await;
    let down = shutdown.child();
    let serving = server.run(listener, down.clone(), cfg.drain + LAST_WORDS);
    let mut serving = tokio::spawn(serving);

    let node = Node {
        cfg,
        model,
        cpu,
        switchboard,
        phase,
        meter,
        health,
        shutdown,
    };
    let outcome = tokio::select! {
        outcome = node.live(checkpoint) => outcome,
        Ok(Err(error)) = &mut serving => return Err(error.into()),
    };
    service.log();
    down.trigger();
    // What is left to say is said, or the connections are cut with the task. After a drain the
    // server has often ended first.
    if !serving.is_finished() && timeout(LAST_WORDS, &mut serving).await.is_err() {
        serving.abort();
    }
    outcome
}

struct Node {
    cfg: AttentionNodeConfig,
    model: Arc<Config>,
    cpu: Cpu,
    switchboard: Option<Switchboard>,
    phase: watch::Sender<Phase>,
    meter: Arc<Meter>,
    health: Health,
    shutdown: Shutdown,
}

impl Node {
    /// From an open checkpoint to the end.
    async fn live(&self, checkpoint: Checkpoint) -> Result<(), Error> {
        self.wait_for("the checkpoint's digest");
        let hashed = checkpoint.clone();
        let digest = tokio::select! {
            digest = on_thread("digest", move || hashed.digest()) => digest??,
            () = self.shutdown.requested() => return Ok(()),
        };
        let membership = MemberConfig {
            coordinator: self.cfg.coordinator.clone(),
            role: NodeRole::Attention,
            name: self.cfg.name.clone(),
            address: self.cfg.address.clone(),
            model_digest: digest.clone(),
            numerics_class: self.cfg.numerics_class(&self.cpu),
            capacity_bytes: 0,
            process: self.cfg.process.clone(),
            failure_domain: self.cfg.failure_domain.clone(),
            duty: self.cfg.duty,
        };
        let dialer = Dialer::to(Role::COORDINATING, self.cfg.tls.as_ref());
        let member = Member::start_by(membership, dialer)?;
        let outcome = tokio::select! {
            outcome = self.serve(checkpoint, digest, &member) => outcome,
            Err(refused) = member.ended() => Err(refused.into()),
        };
        self.phase.send_replace(Phase::Draining);
        self.health.set_serving(SERVICE_NAME, false).await;
        self.health.set_serving("", false).await;
        member.leave().await;
        outcome
    }

    /// Loads, serves, drains.
    async fn serve(
        &self,
        checkpoint: Checkpoint,
        digest: String,
        member: &Member,
    ) -> Result<(), Error> {
        self.wait_for("the weights are being loaded");
        member.set_state(not_ready("the weights are being loaded"));
        let trunk = tokio::select! {
            trunk = self.load(checkpoint) => trunk?,
            () = self.shutdown.requested() => return Ok(()),
        };
        let limits = self.cfg.limits(&self.model)?;
        tracing::info!(
            pages = limits.pages,
            page_tokens = limits.page_tokens,
            positions = limits.pages * limits.page_tokens,
            "latent KV cache"
        );
        let runtime = tokio::runtime::Handle::current();
        let dialer = Dialer::to(Role::TAKING_ROWS, self.cfg.tls.as_ref());
        let links = Links::new(&self.cfg.name, LinkLimits::default(), runtime).dialling(Arc::new(
            move |endpoint| {
                let dialer = dialer.clone();
                Box::pin(async move { dialer.connect(endpoint).await })
            },
        ));
        let links = Arc::new(links);
        let (views, newest) = watch::channel(None);
        let (engine, handle) = Engine::new(
            Arc::new(trunk),
            self.cpu.clone(),
            Arc::clone(&links),
            newest,
            limits,
            self.cfg.kv_format(),
            self.cfg.patience,
        )?;
        let engine = engine.overlapping(self.cfg.overlap.clone());
        let engine = match self.cfg.speculate {
            Speculate::Auto => engine.drafting_while_it_pays(),
            Speculate::Off | Speculate::Drafts(_) => engine,
        };
        let drafted = engine.draft_counters();
        member.count_routed(engine.routed_rows());
        let exchanged = engine.exchange_counters();
        self.meter.counting(Counted {
            engine: handle.clone(),
            steps: engine.steps(),
            drafted: Arc::clone(&drafted),
            exchanged: Arc::clone(&exchanged),
            overlap: self.cfg.overlap.clone(),
        });
        let ended = engine.spawn(&self.cfg.name);
        let mut ended = ended.map_err(|source| Error::Thread {
            name: "engine".to_owned(),
            source,
        })?;

        self.wait_for("no placement is active yet");
        member.set_state(not_ready("no placement is active yet"));
        let mut route = Route::new(self, member, links, views);
        let mut tick = interval(LOAD_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.requested() => break,
                end = &mut ended => return Err(engine_failed(end)),
                epoch = route.follow() => {
                    if !route.reports {
                        let (engine, digest) = (handle.clone(), digest.clone());
                        self.phase.send_replace(Phase::Serving { engine, digest });
                        self.health.set_serving(SERVICE_NAME, true).await;
                        self.health.set_serving("", true).await;
                        tracing::info!(epoch, "ready");
                    }
                    // Last: who hears this may send requests at once.
                    route.report(epoch);
                },
                _ = tick.tick() => member.set_load(load(&handle)),
            }
        }
        let follow = async {
            loop {
                let epoch = route.follow().await;
                if route.reports {
                    route.report(epoch);
                }
            }
        };
        let outcome = tokio::select! {
            outcome = self.drain(&handle, &mut ended, member) => outcome,
            never = follow => never,
        };
        exchanged.log();
        self.cfg.overlap.log();
        drafted.log();
        outcome
    }

    /// Lets running requests end, within the limit.
    async fn drain(
        &self,
        engine: &EngineHandle,
        ended: &mut oneshot::Receiver<Result<(), String>>,
        member: &Member,
    ) -> Result<(), Error> {
        let left = engine.counts();
        tracing::info!(running = left.running, waiting = left.waiting, "draining");
        self.phase.send_replace(Phase::Draining);
        member.set_draining();
        engine.close();
        let end = match timeout(self.cfg.drain, &mut *ended).await {
            Ok(end) => end,
            Err(_) => {
                tracing::warn!("drain limit reached: failing the requests that are left");
                engine.halt();
                match timeout(LAST_WORDS, &mut *ended).await {
                    Ok(end) => end,
                    // A step waits for experts that do not answer. The thread goes with the process.
                    Err(_) => Ok(Ok(())),
                }
            }
        };
        match end {
            Ok(Ok(())) => Ok(()),
            end => Err(engine_failed(end)),
        }
    }

    async fn load(&self, checkpoint: Checkpoint) -> Result<Trunk, Error> {
        let (dtype, cpu) = (self.cfg.dtype, self.cpu.clone());
        let shown = AtomicU64::new(0);
        let progress = move |done: u64, total: u64| {
            let percent = done.saturating_mul(100) / total.max(1);
            let step = percent / PROGRESS_PERCENT * PROGRESS_PERCENT;
            if shown.fetch_max(step, Ordering::Relaxed) < step {
                tracing::info!(percent = step, bytes = done, total, "loading weights");
            }
        };
        let load = move || Trunk::load(&checkpoint, dtype, &cpu, &progress);
        Ok(on_thread("load-weights", load).await??)
    }

    /// A view of a placement that can be served by: active, and with a home for every expert.
    fn adopt(&self, placement: &Placement, links: &Links) -> Option<View> {
        if placement.state() != PlacementState::Active {
            return None;
        }
        let (view, endpoints) = match View::from_wire(placement) {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(epoch = placement.epoch, "ignoring a placement: {error}");
                return None;
            }
        };
        let experts = self.model.n_routed_experts as u32;
        // A draft module's experts are needed by those who draft.
        let layers = self.model.num_hidden_layers + usize::from(self.cfg.drafts(&self.model) > 0);
        for layer in self.model.expert_layers().take_while(|&l| l < layers) {
            if let Some(expert) = view.first_homeless(layer as u32, experts) {
                tracing::error!(
                    epoch = view.epoch(),
                    layer,
                    expert,
                    "ignoring an active placement that leaves an expert without a home"
                );
                return None;
            }
        }
        let process = &self.cfg.process;
        links.set_nodes_where(&endpoints, |node| {
            let here = self.switchboard.as_ref();
            here.filter(|_| view.runs_in(node, process))
        });
        tracing::info!(
            epoch = view.epoch(),
            nodes = endpoints.len(),
            "placement is active"
        );
        Some(view)
    }

    fn wait_for(&self, reason: &str) {
        self.phase.send_replace(Phase::Waiting(reason.to_owned()));
    }
}

/// The way from the placements that are published to the one that is served by.
struct Route<'a> {
    node: &'a Node,
    member: &'a Member,
    links: Arc<Links>,
    placements: watch::Receiver<Option<Arc<Placement>>>,
    views: watch::Sender<Option<Arc<View>>>,
    /// Ends of the views that rows may still be away by.
    leaving: FuturesUnordered<BoxFuture<'static, ()>>,
    /// Whether the coordinator was told of an epoch.
    reports: bool,
}

impl<'a> Route<'a> {
    fn new(
        node: &'a Node,
        member: &'a Member,
        links: Arc<Links>,
        views: watch::Sender<Option<Arc<View>>>,
    ) -> Route<'a> {
        let mut placements = member.active();
        placements.mark_changed();
        Route {
            node,
            member,
            links,
            placements,
            views,
            leaving: FuturesUnordered::new(),
            reports: false,
        }
    }

    /// Serves by every placement that becomes active. Completes with an epoch when rows go by it
    /// and none is away by an earlier one; may be dropped and called again at any time.
    async fn follow(&mut self) -> u64 {
        loop {
            tokio::select! {
                Ok(()) = self.placements.changed() => {
                    let newest = self.placements.borrow_and_update().clone();
                    let view = newest.and_then(|newest| match newest.state() {
                        PlacementState::Lost => {
                            let now = self.views.borrow().clone()?;
                            tracing::warn!(epoch = now.epoch(), "experts are lost: {}", newest.reason);
                            Some(now.without(&newest.reason))
                        }
                        _ => self.node.adopt(&newest, &self.links),
                    });
                    let Some(view) = view else { continue };
                    let epoch = view.epoch();
                    match self.views.send_replace(Some(Arc::new(view))) {
                        None => return epoch,
                        Some(before) => self.leaving.push(before.left().boxed()),
                    }
                }
                Some(()) = self.leaving.next() => {
                    let epoch = self.views.borrow().as_ref().map(|view| view.epoch());
                    if let Some(epoch) = epoch.filter(|_| self.leaving.is_empty()) {
                        return epoch;
                    }
                }
                // The membership has ended: what is known stays.
                else => std::future::pending::<()>().await,
            }
        }
    }

    /// Tells the coordinator, at once, which epoch this node serves by.
    fn report(&mut self, epoch: u64) {
        self.reports = true;
        self.node.meter.routes_by(epoch);
        self.member.set_state(NodeState {
            epoch,
            ready: true,
            ..NodeState::default()
        });
    }
}

fn not_ready(reason: &str) -> NodeState {
    NodeState {
        epoch: 0,
        ready: false,
        reason: reason.to_owned(),
        failed: None,
    }
}

fn load(engine: &EngineHandle) -> Load {
    let counts = engine.counts();
    Load {
        running: counts.running as u32,
        waiting: counts.waiting as u32,
        outstanding_tokens: counts.outstanding,
        free_pages: counts.free_pages as u32,
        cached_pages: counts.cached_pages as u32,
        tokens_run: counts.run,
    }
}

fn engine_failed(end: Result<Result<(), String>, oneshot::error::RecvError>) -> Error {
    let message = match end {
        Ok(Err(message)) => message,
        Ok(Ok(())) => "it ended without being asked to".to_owned(),
        Err(_) => "it is gone".to_owned(),
    };
    Error::Failed {
        name: "engine".to_owned(),
        message,
    }
}

/// Runs blocking work on a thread of its own, which does not hold up the end of the process.
async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    let spawned = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody waits any more when the node ends early.
            let _ = done.send(work());
        });
    spawned.map_err(|source| Error::Thread {
        name: name.to_owned(),
        source,
    })?;
    result.await.map_err(|_| Error::Failed {
        name: name.to_owned(),
        message: "it has panicked, see the log".to_owned(),
    })
}
