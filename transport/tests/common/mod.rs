//! Nodes to exchange rows with: an honest one, one that waits, and the means to
//! put them behind a socket and to kill them.
#![allow(dead_code, unreachable_pub)]

use std::{
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use guild_proto::{
    experts::v1::{
        CombineFrame, DispatchFrame, RowFormat, SlotRows,
        experts_client::ExpertsClient,
        experts_server::{Experts, ExpertsServer},
    },
    frame::Combine,
};
use guild_transport::{
    Assignment, ExchangeCode, ExchangeError, LinkLimits, Links, NodeId, ServiceLimits, SlotHost,
    Switchboard, Work, service,
};
use tokio::{net::TcpListener, runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Channel};

/// The epoch that test nodes know.
pub const EPOCH: u64 = 7;
/// The slots that test nodes have.
pub const SLOTS: u32 = 16;

/// What slot `slot` of node `node` makes of an element.
pub fn oracle(node: NodeId, slot: u32, x: f32) -> f32 {
    x * (slot as f32 + 1.0) + node as f32
}

/// A node that computes [`oracle`].
pub struct Honest {
    pub node: NodeId,
    pub name: String,
    pub executed: AtomicUsize,
}

pub fn honest(node: NodeId) -> Arc<Honest> {
    Arc::new(Honest {
        node,
        name: name(node),
        executed: AtomicUsize::new(0),
    })
}

pub fn name(node: NodeId) -> String {
    format!("e{node}")
}

impl SlotHost for Honest {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        self.executed.fetch_add(1, Ordering::Relaxed);
        let refuse = |code, message| Err(ExchangeError::new(code, self.name.as_str(), message));
        if work.epoch != EPOCH {
            return refuse(ExchangeCode::UnknownEpoch, format!("epoch {}", work.epoch));
        }
        let mut out = Vec::with_capacity(work.pairs() * work.width);
        for (slot, rows) in &work.slots {
            if *slot >= SLOTS {
                return refuse(ExchangeCode::UnknownSlot, format!("slot {slot}"));
            }
            for &row in rows {
                let start = row as usize * work.width;
                let row = &work.rows[start..start + work.width];
                out.extend(row.iter().map(|&x| oracle(self.node, *slot, x)));
            }
        }
        Ok(out)
    }
}

/// A node made of a closure.
pub struct Made<F>(pub F);

impl<F> SlotHost for Made<F>
where
    F: Fn(Work) -> Result<Vec<f32>, ExchangeError> + Send + Sync + 'static,
{
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        (self.0)(work)
    }
}

/// A node that computes [`oracle`] once the gate is open.
pub struct Gated {
    inner: Arc<Honest>,
    open: Mutex<bool>,
    changed: Condvar,
    pub waiting: AtomicUsize,
}

pub fn gated(node: NodeId) -> Arc<Gated> {
    Arc::new(Gated {
        inner: honest(node),
        open: Mutex::new(false),
        changed: Condvar::new(),
        waiting: AtomicUsize::new(0),
    })
}

impl Gated {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Until `n` frames have arrived at the gate.
    pub async fn arrived(&self, n: usize) {
        while self.waiting.load(Ordering::Relaxed) < n {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl SlotHost for Gated {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self.open.lock().unwrap();
        drop(self.changed.wait_while(guard, |open| !*open).unwrap());
        self.inner.execute(work)
    }
}

/// A server with a runtime of its own: dropping it kills every connection.
pub struct Node {
    pub address: String,
    pub closing: CancellationToken,
    runtime: Option<Runtime>,
}

impl Node {
    pub fn serve(node: NodeId, host: Arc<dyn SlotHost>, limits: ServiceLimits) -> Node {
        Self::serve_at("127.0.0.1:0".parse().unwrap(), node, host, limits)
    }

    pub fn serve_at(
        address: SocketAddr,
        node: NodeId,
        host: Arc<dyn SlotHost>,
        limits: ServiceLimits,
    ) -> Node {
        let closing = CancellationToken::new();
        let service = service(name(node), host, limits, closing.clone());
        Self::start(address, closing, service)
    }

    /// A node that speaks the protocol as it likes.
    pub fn raw(experts: impl Experts) -> Node {
        Self::start(
            "127.0.0.1:0".parse().unwrap(),
            CancellationToken::new(),
            ExpertsServer::new(experts),
        )
    }

    fn start(
        address: SocketAddr,
        closing: CancellationToken,
        service: ExpertsServer<impl Experts>,
    ) -> Node {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        // The port of a killed node may take a moment to come free.
        let listener = runtime.block_on_elsewhere(async move {
            loop {
                match TcpListener::bind(address).await {
                    Ok(listener) => break listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        let address = listener.local_addr().unwrap().to_string();
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Node {
            address,
            closing,
            runtime: Some(runtime),
        }
    }

    pub fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

trait BlockOnElsewhere {
    fn block_on_elsewhere<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> T;
}

impl BlockOnElsewhere for Runtime {
    /// `block_on` that may be called from within another runtime.
    fn block_on_elsewhere<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let handle = self.handle().clone();
        std::thread::spawn(move || handle.block_on(future))
            .join()
            .unwrap()
    }
}

pub fn links(limits: LinkLimits, nodes: &[(NodeId, &str)]) -> Links {
    let links = Links::new("a0", limits, tokio::runtime::Handle::current());
    set_nodes(&links, nodes);
    links
}

pub fn set_nodes(links: &Links, nodes: &[(NodeId, &str)]) {
    let nodes: Vec<_> = nodes
        .iter()
        .map(|(node, address)| (*node, name(*node), (*address).to_owned()))
        .collect();
    links.set_nodes(&nodes, None);
}

/// The same host behind both leaves.
pub fn both(host: Arc<dyn SlotHost>) -> (Node, [Links; 2]) {
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    let remote = links(LinkLimits::default(), &[(0, &server.address)]);
    let board = Switchboard::default();
    board.attach(name(0), host);
    let handle = tokio::runtime::Handle::current();
    let local = Links::new("a0", LinkLimits::default(), handle);
    local.set_nodes(&[(0, name(0), String::new())], Some(&board));
    (server, [remote, local])
}

pub fn to(node: NodeId, slot: u32, row: u32) -> Assignment {
    Assignment { row, node, slot }
}

/// A stream of frames by hand.
pub struct Raw {
    pub frames: mpsc::Sender<DispatchFrame>,
    answers: Streaming<CombineFrame>,
    _client: ExpertsClient<Channel>,
}

impl Raw {
    pub async fn connect(address: &str) -> Result<Raw, tonic::Status> {
        let mut client = ExpertsClient::connect(format!("http://{address}"))
            .await
            .unwrap();
        let (frames, outgoing) = mpsc::channel(64);
        let answers = client
            .exchange(ReceiverStream::new(outgoing))
            .await?
            .into_inner();
        Ok(Raw {
            frames,
            answers,
            _client: client,
        })
    }

    pub async fn send(&self, frame: DispatchFrame) {
        self.frames.send(frame).await.unwrap();
    }

    /// The next answer; `None` when the stream has ended.
    pub async fn next(&mut self) -> Option<Combine> {
        let frame = self.answers.message().await.unwrap()?;
        Some(Combine::try_from(frame).unwrap())
    }
}

/// A well-formed frame: two rows of width 2, both to slot 1, the second to slot 3.
pub fn frame(id: u64) -> DispatchFrame {
    DispatchFrame {
        id,
        epoch: EPOCH,
        deadline_ms: 0,
        format: RowFormat::F32.into(),
        width: 2,
        rows: [1.0f32, 2.0, 3.0, 4.0]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect(),
        slots: vec![
            SlotRows {
                slot: 1,
                row_index: vec![0, 1],
            },
            SlotRows {
                slot: 3,
                row_index: vec![1],
            },
        ],
        crc: 0,
    }
}
