//! A whole attention node on a listener, with a coordinator made of a few variables: it comes up
//! in order, tells the truth about its readiness, and drains.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Model, Trouble, board, name, repository};
use futures::StreamExt;
use guild_attention_node::{AttentionNodeConfig, Error, run};
use guild_model::Checkpoint;
use guild_node::Shutdown;
use guild_node::status::reason_of;
use guild_proto::cluster::v1::cluster_server::{Cluster, ClusterServer};
use guild_proto::cluster::v1::*;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{GenerateRequest, ModelInfoRequest, SamplingParams, TokenIds};
use guild_scheduler::placement::Placement as Homes;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tonic::codegen::BoxStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of the node and of its experts.
const PROCESS: &str = "all-in-one";

/// What the coordinator has heard, and what it publishes.
#[derive(Clone)]
struct Coordinator {
    registered: Arc<Mutex<Vec<RegisterRequest>>>,
    beats: watch::Sender<HeartbeatRequest>,
    left: watch::Sender<bool>,
    placement: watch::Sender<Option<Placement>>,
    refuse: bool,
}

#[tonic::async_trait]
impl Cluster for Coordinator {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        if self.refuse {
            return Err(Status::failed_precondition("another model is served here"));
        }
        self.registered.lock().unwrap().push(request.into_inner());
        Ok(Response::new(RegisterResponse {
            node_id: 77,
            lease_ms: 150,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        self.beats.send_replace(request.into_inner());
        Ok(Response::new(HeartbeatResponse {}))
    }

    async fn leave(&self, _: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        self.left.send_replace(true);
        Ok(Response::new(LeaveResponse {}))
    }

    async fn watch_placement(
        &self,
        _: Request<WatchPlacementRequest>,
    ) -> Result<Response<BoxStream<Placement>>, Status> {
        let placements = WatchStream::new(self.placement.subscribe());
        Ok(Response::new(
            placements.filter_map(|p| async { p.map(Ok) }).boxed(),
        ))
    }
}

/// Publishes `homes` in the given state.
fn wire(homes: &Homes, state: PlacementState) -> Placement {
    let slot = |&(layer, expert): &(u32, u32)| Slot { layer, expert };
    let node = |n: &guild_scheduler::placement::NodeSlots| PlacementNode {
        node_id: n.node,
        name: name(n.node),
        address: "127.0.0.1:1".to_owned(),
        slots: n.slots.iter().map(slot).collect(),
        process: PROCESS.to_owned(),
        ..Default::default()
    };
    Placement {
        epoch: homes.epoch(),
        state: state.into(),
        nodes: homes.nodes().iter().map(node).collect(),
        ..Default::default()
    }
}

struct Cluster1 {
    coordinator: Coordinator,
    serving: JoinHandle<()>,
    homes: Homes,
    node: JoinHandle<Result<(), Error>>,
    shutdown: Shutdown,
    client: InferenceClient<Channel>,
    health: tonic_health::pb::health_client::HealthClient<Channel>,
}

impl Cluster1 {
    async fn start(refuse: bool, drain: Duration) -> Cluster1 {
        let model = Model::v3_basic();
        let coordinator = Coordinator {
            registered: Arc::default(),
            beats: watch::channel(HeartbeatRequest::default()).0,
            left: watch::channel(false).0,
            placement: watch::channel(None).0,
            refuse,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = ClusterServer::new(coordinator.clone());
        let serving = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        let homes = model.deal(5, 1, 2, 0);
        let board = board(model, &homes, &Arc::new(Trouble::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let dir = repository().join("tests/golden/v3-basic");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let cfg = AttentionNodeConfig {
            drain,
            max_context: Some(4000),
            process: PROCESS.to_owned(),
            ..AttentionNodeConfig::new(checkpoint, "attention-1", &address, url)
        };
        let shutdown = Shutdown::new();
        let run = run(
            cfg,
            listener,
            model.cpu.clone(),
            Some(board),
            shutdown.clone(),
        );
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy();
        Cluster1 {
            coordinator,
            serving,
            homes,
            node: tokio::spawn(run),
            shutdown,
            client: InferenceClient::new(channel.clone()),
            health: tonic_health::pb::health_client::HealthClient::new(channel),
        }
    }

    fn publish(&self, state: PlacementState) {
        self.coordinator
            .placement
            .send_replace(Some(wire(&self.homes, state)));
    }

    async fn beat(&self, until: impl Fn(&HeartbeatRequest) -> bool) -> HeartbeatRequest {
        let mut beats = self.coordinator.beats.subscribe();
        let heard = tokio::time::timeout(PATIENCE, beats.wait_for(until)).await;
        heard.unwrap().unwrap().clone()
    }

    async fn serves(&mut self) -> bool {
        let asked = tonic_health::pb::HealthCheckRequest {
            service: "guild.inference.v1.Inference".to_owned(),
        };
        let status = self
            .health
            .check(asked)
            .await
            .unwrap()
            .into_inner()
            .status();
        status == tonic_health::pb::health_check_response::ServingStatus::Serving
    }

    async fn generate(
        &mut self,
        max_tokens: u32,
    ) -> Result<tonic::Streaming<guild_proto::inference::v1::GenerateResponse>, Status> {
        let sampling = SamplingParams {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let call = GenerateRequest {
            input: Some(Input::TokenIds(TokenIds { ids: vec![5, 6, 7] })),
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        Ok(self.client.generate(call).await?.into_inner())
    }

    /// Ready and serving.
    async fn up(&mut self) {
        self.publish(PlacementState::Active);
        self.beat(|beat| beat.ready).await;
    }

    async fn ended(self) -> Result<(), Error> {
        let outcome = tokio::time::timeout(PATIENCE, self.node).await;
        self.serving.abort();
        outcome.unwrap().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_serves_when_a_placement_is_active_and_not_before() {
    let mut cluster = Cluster1::start(false, PATIENCE).await;
    cluster
        .beat(|beat| beat.reason.contains("no placement"))
        .await;
    let joined = cluster.coordinator.registered.lock().unwrap()[0].clone();
    assert_eq!(
        (joined.role(), joined.name.as_str()),
        (Role::Attention, "attention-1")
    );
    assert!(!joined.model_digest.is_empty() && !joined.numerics_class.is_empty());

    cluster.publish(PlacementState::Loading);
    let status = cluster.generate(1).await.unwrap_err();
    assert_eq!(
        (status.code(), reason_of(&status).as_deref()),
        (Code::Unavailable, Some("NOT_READY"))
    );
    assert!(!cluster.serves().await);

    // A placement that leaves an expert without a home is not believed.
    let mut holes = wire(&cluster.homes, PlacementState::Active);
    holes.nodes[0].slots.truncate(3);
    holes.epoch = 4;
    cluster.coordinator.placement.send_replace(Some(holes));

    cluster.up().await;
    let ready = cluster.beat(|beat| beat.ready).await;
    assert_eq!(ready.epoch, 5);
    while !cluster.serves().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let info = cluster
        .client
        .model_info(ModelInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((info.model.as_str(), info.max_context), ("v3-basic", 4000));
    assert_eq!(info.digest, joined.model_digest);

    // What is loaded, or was to be and will not, is not served by.
    for state in [PlacementState::Loading, PlacementState::Withdrawn] {
        let mut next = wire(&cluster.homes, state);
        next.epoch = 6;
        cluster.coordinator.placement.send_replace(Some(next));
        let events: Vec<_> = cluster.generate(3).await.unwrap().collect().await;
        assert_eq!(events.len(), 5, "{events:?}");
        assert_eq!(cluster.beat(|beat| beat.ready).await.epoch, 5);
    }
    // The coordinator falls silent: what is known stays valid.
    cluster.serving.abort();
    let events: Vec<_> = cluster.generate(20).await.unwrap().collect().await;
    assert_eq!(events.len(), 22, "{events:?}");
    assert!(matches!(
        events.last().unwrap().as_ref().unwrap().event,
        Some(Event::Complete(_))
    ));
    cluster.shutdown.trigger();
    cluster.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_active_placement_is_reported_although_nobody_asks_for_anything() {
    let mut cluster = Cluster1::start(false, PATIENCE).await;
    cluster.up().await;
    for epoch in [7, 8, 12] {
        let mut next = wire(&cluster.homes, PlacementState::Active);
        next.epoch = epoch;
        cluster.coordinator.placement.send_replace(Some(next));
        cluster.beat(|beat| beat.ready && beat.epoch == epoch).await;
    }
    cluster.shutdown.trigger();
    cluster.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_frees_its_place() {
    let mut cluster = Cluster1::start(false, PATIENCE).await;
    cluster.up().await;
    let mut stream = cluster.generate(3900).await.unwrap();
    stream.message().await.unwrap();
    cluster.beat(|beat| beat.running == 1).await;
    drop(stream);
    cluster.beat(|beat| beat.running == 0).await;
    cluster.shutdown.trigger();
    cluster.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_streams_end_and_leaves_the_cluster() {
    let mut cluster = Cluster1::start(false, PATIENCE).await;
    cluster.up().await;
    let mut stream = cluster.generate(300).await.unwrap();
    stream.message().await.unwrap();
    cluster.shutdown.trigger();
    let rest: Vec<_> = stream.collect().await;
    assert_eq!(rest.len(), 301);
    assert!(rest.iter().all(Result::is_ok), "{:?}", rest.last());
    let left = cluster.coordinator.left.subscribe();
    cluster.ended().await.unwrap();
    assert!(*left.borrow());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_at_its_limit() {
    let mut cluster = Cluster1::start(false, Duration::ZERO).await;
    cluster.up().await;
    let mut stream = cluster.generate(3900).await.unwrap();
    stream.message().await.unwrap();
    cluster.shutdown.trigger();
    let rest: Vec<_> = stream.collect().await;
    let status = rest.last().unwrap().as_ref().unwrap_err();
    assert_eq!(
        (status.code(), reason_of(status).as_deref()),
        (Code::Unavailable, Some("DRAINING"))
    );
    cluster.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_by_the_coordinator_ends_it() {
    let cluster = Cluster1::start(true, PATIENCE).await;
    let error = cluster.ended().await.unwrap_err();
    assert!(
        error.to_string().contains("another model is served here"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contradictions_are_reported_before_anything_is_loaded() {
    let dir = repository().join("tests/golden/v3-basic");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let cfg =
        || AttentionNodeConfig::new(checkpoint.clone(), "a", "127.0.0.1:1", "http://127.0.0.1:1");
    let kv_memory = "100".parse().unwrap();
    let cases = [
        (
            "max_step_tokens",
            AttentionNodeConfig {
                max_step_tokens: 3,
                ..cfg()
            },
        ),
        (
            "page_tokens",
            AttentionNodeConfig {
                page_tokens: 0,
                ..cfg()
            },
        ),
        ("--kv-memory", AttentionNodeConfig { kv_memory, ..cfg() }),
    ];
    for (named, cfg) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cpu = Model::v3_basic().cpu.clone();
        let error = run(cfg, listener, cpu, None, Shutdown::new())
            .await
            .unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
}
