//! The life of an expert node, seen by a coordinator made for the test and by
//! those who send rows.
#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use guild_expert_node::{Error, ExpertNodeConfig, run};
use guild_model::{Checkpoint, Cpu, checkpoint::Dtype, expert::Expert};
use guild_node::{ExitKind, HasExitKind, Shutdown};
use guild_proto::cluster::v1::{
    HeartbeatRequest, HeartbeatResponse, LeaveRequest, LeaveResponse, Placement, PlacementNode,
    PlacementState, RegisterRequest, RegisterResponse, Role, Slot, WatchPlacementRequest,
    cluster_server::{Cluster, ClusterServer},
};
use guild_transport::{
    Assignment, Batch, ExchangeCode, ExchangeError, Fabric, LinkLimits, Links, Switchboard,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::{
    StreamExt,
    wrappers::{TcpListenerStream, WatchStream},
};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, transport::Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

const NODE: u32 = 5;
const NAME: &str = "expert-0";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-basic")
}

/// A coordinator that says what the test tells it to and remembers what it hears.
struct Coordinator {
    refuse: bool,
    placements: watch::Receiver<Placement>,
    registered: Mutex<Option<RegisterRequest>>,
    heard: watch::Sender<HeartbeatRequest>,
    left: watch::Sender<bool>,
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
        *self.registered.lock().unwrap() = Some(request.into_inner());
        Ok(Response::new(RegisterResponse {
            node_id: NODE,
            lease_ms: 300,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        self.heard.send_replace(request.into_inner());
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
        let placements = WatchStream::new(self.placements.clone())
            .filter(|placement| placement.epoch > 0)
            .map(Ok);
        Ok(Response::new(Box::pin(placements)))
    }
}

/// A node under test, and its coordinator.
struct Stage {
    coordinator: Arc<Coordinator>,
    placements: watch::Sender<Placement>,
    address: String,
    shutdown: Shutdown,
    running: JoinHandle<Result<(), Error>>,
    board: Switchboard,
}

async fn stage(refuse: bool, change: impl FnOnce(&mut ExpertNodeConfig)) -> Stage {
    let (placements, published) = watch::channel(Placement::default());
    let coordinator = Arc::new(Coordinator {
        refuse,
        placements: published,
        registered: Mutex::new(None),
        heard: watch::Sender::new(HeartbeatRequest::default()),
        left: watch::Sender::new(false),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(ClusterServer::from_arc(Arc::clone(&coordinator)))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut cfg = ExpertNodeConfig::new(Checkpoint::open(&golden()).unwrap(), NAME, &address, url);
    cfg.drain = Duration::from_secs(5);
    change(&mut cfg);
    let shutdown = Shutdown::new();
    let board = Switchboard::default();
    let running = tokio::spawn(run(
        cfg,
        listener,
        Cpu::new(1),
        Some(board.clone()),
        shutdown.clone(),
    ));
    Stage {
        coordinator,
        placements,
        address,
        shutdown,
        running,
        board,
    }
}

impl Stage {
    fn publish(&self, epoch: u64, state: PlacementState, slots: &[(u32, u32)]) {
        let slots = slots
            .iter()
            .map(|&(layer, expert)| Slot { layer, expert })
            .collect();
        let other = PlacementNode {
            node_id: 1,
            name: "expert-1".into(),
            address: "127.0.0.1:1".into(),
            slots: vec![Slot {
                layer: 77,
                expert: 77,
            }],
            ..Default::default()
        };
        let mine = PlacementNode {
            node_id: NODE,
            name: NAME.into(),
            address: self.address.clone(),
            slots,
            ..Default::default()
        };
        self.placements.send_replace(Placement {
            epoch,
            state: state.into(),
            nodes: vec![other, mine],
            ..Default::default()
        });
    }

    /// Waits for a heartbeat of a kind.
    async fn hears(&self, what: impl Fn(&HeartbeatRequest) -> bool) -> HeartbeatRequest {
        let mut heard = self.coordinator.heard.subscribe();
        let found = tokio::time::timeout(Duration::from_secs(20), heard.wait_for(what)).await;
        found.expect("the heartbeat never came").unwrap().clone()
    }

    async fn ready(&self, epoch: u64) {
        let beat = self.hears(|beat| beat.ready && beat.epoch == epoch).await;
        assert_eq!(beat.reason, "");
        assert_eq!(beat.node_id, NODE);
    }

    fn links(&self, board: Option<&Switchboard>) -> Links {
        let handle = tokio::runtime::Handle::current();
        let links = Links::new("attention-0", LinkLimits::default(), handle);
        links.set_nodes(&[(NODE, NAME.into(), self.address.clone())], board);
        links
    }

    async fn serving(&self) -> bool {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let mut health = HealthClient::new(endpoint.connect().await.unwrap());
        let request = HealthCheckRequest {
            service: "guild.experts.v1.Experts".into(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        answer.status() == ServingStatus::Serving
    }

    async fn end(self) -> Result<(), Error> {
        self.shutdown.trigger();
        let ended = tokio::time::timeout(Duration::from_secs(20), self.running).await;
        ended.expect("the node never ended").unwrap()
    }
}

/// One row through slot 0, and what it should be.
async fn exchange(links: &Links, epoch: u64) -> Result<Vec<f32>, ExchangeError> {
    let row = row();
    let batch = Batch {
        epoch,
        width: row.len(),
        rows: &row,
        assignments: &[Assignment {
            row: 0,
            node: NODE,
            slot: 0,
        }],
        deadline: None,
    };
    let returned = links.combine(links.dispatch(batch)?).await?;
    Ok(returned.rows)
}

fn row() -> Vec<f32> {
    (0..64).map(|i| i as f32 / 32.0 - 1.0).collect()
}

fn expected(layer: usize, expert: usize) -> Vec<f32> {
    let checkpoint = Checkpoint::open(&golden()).unwrap();
    let expert = Expert::load(&checkpoint, layer, expert, Dtype::Auto).unwrap();
    expert.forward(&Cpu::new(1), &row())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_joins_loads_what_it_is_given_and_serves_it_at_both_leaves() {
    let stage = stage(false, |_| ()).await;
    let beat = stage.hears(|beat| !beat.reason.is_empty()).await;
    assert!(!beat.ready);
    assert_eq!(beat.reason, "no placement yet");
    assert!(!stage.serving().await);
    let registered = stage
        .coordinator
        .registered
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(registered.role(), Role::Expert);
    assert_eq!(
        (registered.name.as_str(), registered.address.as_str()),
        (NAME, stage.address.as_str())
    );
    let digest = Checkpoint::open(&golden()).unwrap().digest().unwrap();
    assert_eq!(registered.model_digest, digest);
    assert_eq!(registered.numerics_class, Cpu::new(1).numerics_class());

    stage.publish(3, PlacementState::Loading, &[(2, 7), (1, 0)]);
    stage.ready(3).await;
    stage.publish(3, PlacementState::Active, &[(2, 7), (1, 0)]);
    assert!(stage.serving().await);
    let remote = stage.links(None);
    let local = stage.links(Some(&stage.board));
    for links in [&remote, &local] {
        assert_eq!(exchange(links, 3).await.unwrap(), expected(2, 7));
        let error = exchange(links, 4).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::UnknownEpoch);
        assert_eq!(error.node, NAME);
    }
    let (coordinator, board) = (Arc::clone(&stage.coordinator), stage.board.clone());
    stage.end().await.unwrap();
    assert!(*coordinator.left.borrow());
    assert!(board.get(NAME).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_placement_that_cannot_be_loaded_is_told_and_the_last_one_serves_on() {
    let stage = stage(false, |_| ()).await;
    stage.publish(1, PlacementState::Loading, &[(1, 0)]);
    stage.ready(1).await;
    let links = stage.links(None);
    let first = exchange(&links, 1).await.unwrap();
    assert_eq!(first, expected(1, 0));

    stage.publish(2, PlacementState::Loading, &[(1, 99)]);
    let beat = stage.hears(|beat| beat.failed_epoch == 2).await;
    assert_eq!((beat.epoch, beat.ready), (1, true));
    assert!(
        beat.failure.contains("epoch 2") && beat.failure.contains("expert 99"),
        "{}",
        beat.failure
    );
    assert!(stage.serving().await);
    assert_eq!(exchange(&links, 1).await.unwrap(), first);
    assert_eq!(
        exchange(&links, 2).await.unwrap_err().code,
        ExchangeCode::UnknownEpoch
    );

    stage.publish(3, PlacementState::Loading, &[(3, 3)]);
    stage.ready(3).await;
    let beat = stage.hears(|beat| beat.epoch == 3).await;
    assert_eq!((beat.failed_epoch, beat.failure.as_str()), (0, ""));
    assert_eq!(exchange(&links, 3).await.unwrap(), expected(3, 3));
    assert_eq!(exchange(&links, 1).await.unwrap(), first);
    // No experts at all is a placement like any other.
    stage.publish(4, PlacementState::Loading, &[]);
    stage.ready(4).await;
    stage.publish(5, PlacementState::Loading, &[]);
    stage.ready(5).await;
    assert_eq!(
        exchange(&links, 1).await.unwrap_err().code,
        ExchangeCode::UnknownEpoch
    );
    stage.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_active_placement_that_cannot_be_loaded_leaves_the_node_not_ready() {
    let stage = stage(false, |_| ()).await;
    stage.publish(1, PlacementState::Active, &[(1, 0)]);
    stage.ready(1).await;
    stage.publish(2, PlacementState::Active, &[(1, 99)]);
    let beat = stage
        .hears(|beat| !beat.ready && beat.failed_epoch == 2)
        .await;
    assert!(beat.reason.contains("expert 99"), "{}", beat.reason);
    assert!(!stage.serving().await);
    stage.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_its_capacity_is_not_loaded() {
    let stage = stage(false, |cfg| cfg.capacity_bytes = 1).await;
    stage.publish(1, PlacementState::Loading, &[(1, 0)]);
    let beat = stage.hears(|beat| beat.reason.contains("--capacity")).await;
    assert_eq!((beat.ready, beat.epoch), (false, 0));
    let registered = stage
        .coordinator
        .registered
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(registered.capacity_bytes, 1);
    stage.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaving_node_serves_until_nobody_sends_rows() {
    let stage = stage(false, |_| ()).await;
    stage.publish(1, PlacementState::Loading, &[(1, 0)]);
    stage.ready(1).await;
    let links = stage.links(None);
    let right = exchange(&links, 1).await.unwrap();
    stage.shutdown.trigger();
    // Rows come until it has left, and some more.
    let left = stage.coordinator.left.subscribe();
    let mut after = 0;
    while after < 100 {
        assert_eq!(exchange(&links, 1).await.unwrap(), right);
        after += usize::from(*left.borrow());
    }
    stage.end().await.unwrap();
    let error = exchange(&links, 1).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_ends_the_node_with_its_reason() {
    let stage = stage(true, |_| ()).await;
    let error = stage.running.await.unwrap().unwrap_err();
    assert!(
        error.to_string().contains("another model is served here"),
        "{error}"
    );
    assert_eq!(error.exit_kind(), ExitKind::Network);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_coordinator_it_waits_and_can_still_be_ended() {
    let stage = stage(false, |cfg| cfg.coordinator = "http://127.0.0.1:1".into()).await;
    // Its door is open before anybody has let it in.
    while tokio::net::TcpStream::connect(&stage.address)
        .await
        .is_err()
    {}
    assert!(!stage.serving().await);
    stage.end().await.unwrap();
}
