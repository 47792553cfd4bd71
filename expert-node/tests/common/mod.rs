//! A cluster of expert nodes around a coordinator made for the test, and nodes made for the test
//! that give experts away as they like.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use guild_expert_node::{Error, ExpertNodeConfig, run};
use guild_model::{Checkpoint, Cpu, checkpoint::Dtype, expert::Expert};
use guild_node::Shutdown;
use guild_proto::cluster::v1::{
    cluster_server::{Cluster, ClusterServer},
    *,
};
use guild_proto::experts::v1::experts_server::{Experts, ExpertsServer};
use guild_transport::{
    Assignment, Batch, ExchangeError, Fabric, LinkLimits, Links, ServiceLimits, SlotBlob, SlotHost,
    Switchboard, Work, service,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// What anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const WIDTH: usize = 64;

pub type Key = (u32, u32);

/// Another checkpoint than the golden one, for all tests of a binary.
pub static INSTEAD: OnceLock<PathBuf> = OnceLock::new();

pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-basic")
}

pub fn checkpoint() -> Checkpoint {
    Checkpoint::open(INSTEAD.get().unwrap_or(&golden())).unwrap()
}

pub fn expert((layer, expert): Key) -> Expert {
    Expert::load(&checkpoint(), layer as usize, expert as usize, Dtype::Auto).unwrap()
}

/// Says what the test tells it to and remembers the newest it has heard of every node.
struct Coordinator {
    placements: watch::Receiver<Vec<Placement>>,
    names: Mutex<Vec<String>>,
    heard: watch::Sender<HashMap<String, HeartbeatRequest>>,
}

#[tonic::async_trait]
impl Cluster for Coordinator {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let name = request.into_inner().name;
        let mut names = self.names.lock().unwrap();
        if !names.contains(&name) {
            names.push(name.clone());
        }
        let node_id = names.iter().position(|known| *known == name).unwrap() as u32;
        Ok(Response::new(RegisterResponse {
            node_id,
            lease_ms: 300,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let beat = request.into_inner();
        let name = self.names.lock().unwrap()[beat.node_id as usize].clone();
        self.heard.send_modify(|heard| {
            heard.insert(name, beat);
        });
        Ok(Response::new(HeartbeatResponse {}))
    }

    async fn leave(&self, _: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        Ok(Response::new(LeaveResponse {}))
    }

    async fn watch_placement(
        &self,
        _: Request<WatchPlacementRequest>,
    ) -> Result<Response<BoxStream<Placement>>, Status> {
        let all = WatchStream::new(self.placements.clone());
        let each = all.flat_map(|all| stream::iter(all.into_iter().map(Ok)));
        Ok(Response::new(Box::pin(each)))
    }
}

/// Where a node is, real or not, and what it is given.
#[derive(Clone)]
pub struct Place {
    pub id: u32,
    pub name: String,
    pub address: String,
}

impl Place {
    pub fn with(&self, slots: &[Key]) -> PlacementNode {
        PlacementNode {
            node_id: self.id,
            name: self.name.clone(),
            address: self.address.clone(),
            slots: slots
                .iter()
                .map(|&(layer, expert)| Slot { layer, expert })
                .collect(),
            ..Default::default()
        }
    }
}

pub fn placement(epoch: u64, state: PlacementState, nodes: &[PlacementNode]) -> Placement {
    Placement {
        epoch,
        state: state.into(),
        nodes: nodes.to_vec(),
        ..Default::default()
    }
}

pub struct Stage {
    coordinator: Arc<Coordinator>,
    url: String,
    placements: watch::Sender<Vec<Placement>>,
    board: Option<Switchboard>,
}

impl Stage {
    pub async fn new() -> Stage {
        let (placements, published) = watch::channel(Vec::new());
        let coordinator = Arc::new(Coordinator {
            placements: published,
            names: Mutex::default(),
            heard: watch::Sender::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(ClusterServer::from_arc(Arc::clone(&coordinator)))
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Stage {
            coordinator,
            url,
            placements,
            board: None,
        }
    }

    /// The same with nodes that reach each other in this process.
    pub fn on_a_board(mut self) -> Stage {
        self.board = Some(Switchboard::default());
        self
    }

    pub async fn node(&self, name: &str, change: impl FnOnce(&mut ExpertNodeConfig)) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut cfg = ExpertNodeConfig::new(checkpoint(), name, &address, &self.url);
        cfg.drain = Duration::ZERO;
        change(&mut cfg);
        let shutdown = Shutdown::new();
        let board = self.board.clone();
        let running = tokio::spawn(run(cfg, listener, Cpu::new(1), board, shutdown.clone()));
        self.hears(name, |_| true).await;
        let known = |known: &String| known == name;
        let names = self.coordinator.names.lock().unwrap();
        let id = names.iter().position(known).unwrap() as u32;
        Node {
            place: Place {
                id,
                name: name.to_owned(),
                address,
            },
            shutdown,
            running,
        }
    }

    /// Publishes all of them, in that order.
    pub fn publish(&self, placements: &[Placement]) {
        self.placements.send_replace(placements.to_vec());
    }

    /// Waits for a heartbeat of a kind.
    pub async fn hears(
        &self,
        name: &str,
        what: impl Fn(&HeartbeatRequest) -> bool,
    ) -> HeartbeatRequest {
        let mut heard = self.coordinator.heard.subscribe();
        let found = heard.wait_for(|heard| heard.get(name).is_some_and(&what));
        match tokio::time::timeout(PATIENCE, found).await {
            Ok(heard) => heard.unwrap()[name].clone(),
            Err(_) => {
                let last = self.coordinator.heard.borrow().get(name).cloned();
                panic!("{name} never said it; the last was {last:?}")
            }
        }
    }

    pub async fn ready(&self, name: &str, epoch: u64) -> HeartbeatRequest {
        self.hears(name, |beat| beat.ready && beat.epoch == epoch)
            .await
    }
}

pub struct Node {
    pub place: Place,
    shutdown: Shutdown,
    running: JoinHandle<Result<(), Error>>,
}

impl Node {
    pub async fn end(self) -> Result<(), Error> {
        self.shutdown.trigger();
        let ended = tokio::time::timeout(PATIENCE, self.running).await;
        ended.expect("the node never ended").unwrap()
    }
}

pub fn row() -> Vec<f32> {
    (0..WIDTH).map(|i| i as f32 / 32.0 - 1.0).collect()
}

/// One row through a slot.
pub async fn through(place: &Place, epoch: u64, slot: u32) -> Result<Vec<f32>, ExchangeError> {
    let handle = tokio::runtime::Handle::current();
    let links = Links::new("attention-0", LinkLimits::default(), handle);
    let Place { id, name, address } = place.clone();
    links.set_nodes(&[(id, name, address)], None);
    let row = row();
    let batch = Batch {
        epoch,
        width: row.len(),
        rows: &row,
        assignments: &[Assignment {
            row: 0,
            node: id,
            slot,
        }],
        deadline: None,
    };
    Ok(links.combine(links.dispatch(batch)?).await?.rows)
}

pub fn expected(key: Key) -> Vec<f32> {
    expert(key).forward(&Cpu::new(1), &row())
}

type Change = Box<dyn Fn(SlotBlob) -> SlotBlob + Send + Sync>;

/// A node that has one expert in every slot of every epoch, and gives it away as it likes.
pub struct Source {
    expert: Expert,
    blob: Change,
    /// Added to every element of an answer.
    pub off_by: f32,
    pub given: AtomicUsize,
    pub asked: AtomicUsize,
}

impl Source {
    pub fn honest(key: Key) -> Source {
        Source::lying(key, |blob| blob)
    }

    pub fn lying(key: Key, blob: impl Fn(SlotBlob) -> SlotBlob + Send + Sync + 'static) -> Source {
        Source {
            expert: expert(key),
            blob: Box::new(blob),
            off_by: 0.0,
            given: AtomicUsize::new(0),
            asked: AtomicUsize::new(0),
        }
    }

    /// Puts it behind a door of its own.
    pub async fn serve(self, id: u32, name: &str) -> (Place, Arc<Source>) {
        let source = Arc::new(self);
        let host = Arc::clone(&source) as Arc<dyn SlotHost>;
        let limits = ServiceLimits::default();
        let experts = service(name, host, limits, CancellationToken::new());
        (serve(experts, id, name).await, source)
    }
}

impl SlotHost for Source {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let out = self.expert.forward(&Cpu::new(1), &work.rows);
        Ok(out.iter().map(|x| x + self.off_by).collect())
    }

    fn blob(&self, _: u64, _: u32) -> Result<SlotBlob, ExchangeError> {
        self.given.fetch_add(1, Ordering::Relaxed);
        Ok((self.blob)(SlotBlob {
            bytes: Bytes::copy_from_slice(self.expert.blob()),
            digest: self.expert.digest(),
        }))
    }
}

/// Puts anything behind a door.
pub async fn serve(experts: ExpertsServer<impl Experts>, id: u32, name: &str) -> Place {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(experts)
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    Place {
        id,
        name: name.to_owned(),
        address,
    }
}
