//! A coordinator on loopback, and nodes without a model.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{StreamExt, stream};
use guild_coordinator::{CoordinatorConfig, CoordinatorError, Listeners, run};
use guild_model::Checkpoint;
use guild_node::member::{Member, MemberConfig, NodeState};
use guild_node::serve::{Server, bind};
use guild_node::{Shutdown, channel};
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{Placement, PlacementState, Role, StatusRequest, StatusResponse};
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::inference_server::{Inference, InferenceServer};
use guild_proto::inference::v1::{
    AbortRequest, AbortResponse, Chunk, Complete, FinishReason, GenerateRequest, GenerateResponse,
    ModelInfoRequest, ModelInfoResponse, Prompt, TokenIds, Usage,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tonic::codegen::BoxStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Short, so that silence is noticed within a test.
pub(crate) const LEASE: Duration = Duration::from_millis(900);
/// What all pretended nodes compute in.
pub(crate) const NUMERICS: &str = "pretended";
/// How long a stream waits for another attention node, unless a test says so.
const RESUME_WAIT: Duration = Duration::from_millis(500);
/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

fn checkpoint() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-basic")
}

/// Waits until `holds`.
pub(crate) async fn expect<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let all = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, all).await.is_err() {
        panic!("this did not come about: {what}");
    }
}

async fn open(address: &str, ids: &[u32]) -> Result<Streaming<GenerateResponse>, Status> {
    let request = GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: ids.to_vec() })),
        ..GenerateRequest::default()
    };
    send(address, request).await
}

async fn send(
    address: &str,
    request: GenerateRequest,
) -> Result<Streaming<GenerateResponse>, Status> {
    let mut client = InferenceClient::new(channel::lazy(address).unwrap());
    Ok(client.generate(request).await?.into_inner())
}

/// A coordinator in this process.
pub(crate) struct Coordinator {
    /// Where nodes join.
    pub(crate) cluster: String,
    /// The front door.
    pub(crate) grpc: String,
    http: String,
    /// Of the model it serves.
    pub(crate) digest: String,
    /// End tokens of that model.
    pub(crate) eos: Vec<u32>,
    experts: usize,
    /// Ends it.
    pub(crate) shutdown: Shutdown,
    /// Its end.
    pub(crate) task: JoinHandle<Result<(), CoordinatorError>>,
}

impl Coordinator {
    /// Starts one for a small model.
    pub(crate) async fn start() -> Coordinator {
        Coordinator::start_with(RESUME_WAIT).await
    }

    /// One whose streams wait so long for another attention node.
    pub(crate) async fn start_with(resume_wait: Duration) -> Coordinator {
        Coordinator::start_by(|config| config.resume_wait = resume_wait).await
    }

    /// One that is told something else.
    pub(crate) async fn start_by(tell: impl FnOnce(&mut CoordinatorConfig)) -> Coordinator {
        Coordinator::listen_on("127.0.0.1:0", tell).await
    }

    async fn listen_on(address: &str, tell: impl FnOnce(&mut CoordinatorConfig)) -> Coordinator {
        let listeners = Listeners {
            cluster: bind(address).await.unwrap(),
            http: bind("127.0.0.1:0").await.unwrap(),
            grpc: bind("127.0.0.1:0").await.unwrap(),
        };
        let checkpoint = Checkpoint::open(&checkpoint()).unwrap();
        let mut config = CoordinatorConfig {
            lease: LEASE,
            settle: Duration::from_millis(150),
            resume_wait: RESUME_WAIT,
            ..CoordinatorConfig::new(checkpoint.clone())
        };
        tell(&mut config);
        let shutdown = Shutdown::new();
        let description = checkpoint.config();
        Coordinator {
            cluster: listeners.cluster.local_addr().unwrap().to_string(),
            grpc: listeners.grpc.local_addr().unwrap().to_string(),
            http: listeners.http.local_addr().unwrap().to_string(),
            digest: checkpoint.digest().unwrap(),
            eos: description.eos_token_ids.clone(),
            experts: description.expert_layers().count() * description.n_routed_experts,
            task: tokio::spawn(run(config, listeners, shutdown.clone())),
            shutdown,
        }
    }

    /// Another process on the same address, which knows nothing of this one.
    pub(crate) async fn restart(self) -> Coordinator {
        self.restart_by(|_| ()).await
    }

    /// Another process on the same address, which is told something else.
    pub(crate) async fn restart_by(self, tell: impl FnOnce(&mut CoordinatorConfig)) -> Coordinator {
        self.task.abort();
        let _ = self.task.await;
        Coordinator::listen_on(&self.cluster, tell).await
    }

    /// (layer, expert) pairs of the model.
    pub(crate) fn experts_in_all(&self) -> usize {
        self.experts
    }

    /// A client for nodes.
    pub(crate) fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(channel::lazy(&self.cluster).unwrap())
    }

    /// What it says of the cluster.
    pub(crate) async fn status(&self) -> StatusResponse {
        let mut client = self.cluster();
        client.status(StatusRequest {}).await.unwrap().into_inner()
    }

    /// Whether health says SERVING, for the whole and for the service alike.
    pub(crate) async fn serving(&self) -> bool {
        let mut client = HealthClient::new(channel::lazy(&self.grpc).unwrap());
        let mut said = Vec::new();
        for service in ["", "guild.inference.v1.Inference"] {
            let request = HealthCheckRequest {
                service: service.into(),
            };
            said.push(client.check(request).await.unwrap().into_inner().status());
        }
        said.iter().all(|status| *status == ServingStatus::Serving)
    }

    /// Status code of `GET /health`, asked over HTTP/1.1.
    pub(crate) async fn http_health(&self) -> u16 {
        let mut stream = TcpStream::connect(&self.http).await.unwrap();
        let request = "GET /health HTTP/1.1\r\nhost: guild\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let code = answer.split_whitespace().nth(1);
        code.and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    /// Waits for readiness, in status and health.
    pub(crate) async fn is_ready(&self) {
        let ready = async {
            while !(self.status().await.ready && self.serving().await) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, ready).await.is_err() {
            panic!("never ready: {:?}", self.status().await);
        }
    }

    /// Waits for that many attention nodes that can serve.
    pub(crate) async fn ready_attention_nodes(&self, count: usize) {
        expect("attention nodes", || async {
            let nodes = self.status().await.nodes;
            let ready = |node: &&guild_proto::cluster::v1::NodeStatus| {
                node.role() == Role::Attention && node.ready
            };
            nodes.iter().filter(ready).count() == count
        })
        .await;
        self.is_ready().await;
    }

    /// Waits until the reason for not being ready contains `words`, and health
    /// agrees.
    pub(crate) async fn waits_for(&self, words: &str) {
        expect(words, || async {
            self.status().await.reason.contains(words)
        })
        .await;
    }

    /// Opens a stream on the HTTP port, which speaks gRPC too.
    pub(crate) async fn open_on_http(
        &self,
        ids: &[u32],
    ) -> Result<Streaming<GenerateResponse>, Status> {
        open(&self.http, ids).await
    }

    /// Opens a stream at the front door.
    pub(crate) async fn open(&self, ids: &[u32]) -> Result<Streaming<GenerateResponse>, Status> {
        open(&self.grpc, ids).await
    }

    /// Opens a stream for a request at the front door.
    pub(crate) async fn send(
        &self,
        request: GenerateRequest,
    ) -> Result<Streaming<GenerateResponse>, Status> {
        send(&self.grpc, request).await
    }

    /// Runs one prompt to its end.
    pub(crate) async fn generate(&self, ids: &[u32]) -> Result<Vec<Event>, Status> {
        all(self.open(ids).await?).await
    }

    /// Runs one request to its end.
    pub(crate) async fn run(&self, request: GenerateRequest) -> Result<Vec<Event>, Status> {
        all(self.send(request).await?).await
    }
}

/// Runs one prompt to its end at a front door.
pub(crate) async fn generate_at(address: &str, ids: &[u32]) -> Result<Vec<Event>, Status> {
    all(open(address, ids).await?).await
}

async fn all(mut stream: Streaming<GenerateResponse>) -> Result<Vec<Event>, Status> {
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.extend(event.event);
    }
    Ok(events)
}

/// What a node at `address` says that joins `coordinator` for the model with this digest, does all that its role does,
/// and shares nothing with others.
pub(crate) fn member(
    coordinator: &str,
    model_digest: &str,
    role: Role,
    name: &str,
    address: &str,
) -> MemberConfig {
    MemberConfig {
        coordinator: format!("http://{coordinator}"),
        role,
        name: name.into(),
        address: address.into(),
        model_digest: model_digest.into(),
        numerics_class: NUMERICS.into(),
        capacity_bytes: 0,
        process: String::new(),
        failure_domain: String::new(),
        duty: Default::default(),
    }
}

/// A node that is a member and nothing else. Dropped, it falls silent.
pub(crate) struct Node {
    member: Member,
}

impl Node {
    /// Joins with an address nobody listens on.
    pub(crate) async fn join(coordinator: &Coordinator, role: Role, name: &str) -> Node {
        Node::join_at(coordinator, role, name, "127.0.0.1:1").await
    }

    async fn join_at(coordinator: &Coordinator, role: Role, name: &str, address: &str) -> Node {
        let (cluster, digest) = (&coordinator.cluster, &coordinator.digest);
        let member = Member::start(member(cluster, digest, role, name, address)).unwrap();
        expect("joining", || async { member.node_id().is_some() }).await;
        Node { member }
    }

    /// Waits for the placement to be in `state`.
    pub(crate) async fn placement(&self, state: PlacementState) -> Placement {
        self.wait_for(|placement| placement.state() == state).await
    }

    /// Waits for a placement newer than `epoch`.
    pub(crate) async fn placement_above(&self, epoch: u64) -> Placement {
        self.wait_for(|placement| placement.epoch > epoch).await
    }

    async fn wait_for(&self, wanted: impl Fn(&Placement) -> bool) -> Placement {
        let mut placements = self.member.placement();
        let wanted = placements.wait_for(|p| p.as_ref().is_some_and(|p| wanted(p)));
        let found = tokio::time::timeout(PATIENCE, wanted)
            .await
            .expect("a placement");
        Placement::clone(found.unwrap().as_ref().unwrap())
    }

    /// What the coordinator calls it.
    pub(crate) fn id(&self) -> u32 {
        self.member.node_id().unwrap()
    }

    /// Its membership.
    pub(crate) fn member(&self) -> &Member {
        &self.member
    }

    /// Claims to have loaded every placement there is and will be.
    pub(crate) fn follow(&self) {
        self.report_all(self.member.placement());
    }

    /// Serves by every placement that is active, as attention nodes do.
    pub(crate) fn serve(&self) {
        self.report_all(self.member.active());
    }

    fn report_all(&self, mut placements: watch::Receiver<Option<Arc<Placement>>>) {
        let member = self.member.clone();
        tokio::spawn(async move {
            loop {
                let newest = placements.borrow_and_update().clone();
                if let Some(placement) = newest {
                    member.set_state(NodeState {
                        epoch: placement.epoch,
                        ready: true,
                        reason: String::new(),
                        failed: None,
                    });
                }
                if placements.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Claims to have loaded the newest placement.
    pub(crate) async fn load(&self) {
        let epoch = self.wait_for(|_| true).await.epoch;
        self.member.set_state(NodeState {
            epoch,
            ready: true,
            reason: String::new(),
            failed: None,
        });
    }
}

/// What a pretended attention node does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// Gives the prompt back.
    Echo,
    /// UNAVAILABLE before the first event.
    Refuse,
    /// A Prompt event, then nothing until released.
    Hang,
}

/// A pretended attention node with a real inference service.
pub(crate) struct Attention {
    /// Its membership.
    pub(crate) node: Node,
    service: Service,
    shutdown: Shutdown,
}

impl Attention {
    /// Serves and joins.
    pub(crate) async fn join(coordinator: &Coordinator, name: &str, script: Script) -> Attention {
        let listener = bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = Service {
            script,
            calls: Arc::default(),
            running: Arc::default(),
            release: Arc::new(Semaphore::new(0)),
        };
        let shutdown = Shutdown::new();
        let server = Server::new()
            .await
            .add(InferenceServer::new(service.clone()));
        tokio::spawn(server.run(listener, shutdown.clone(), Duration::ZERO));
        Attention {
            node: Node::join_at(coordinator, Role::Attention, name, &address).await,
            service,
            shutdown,
        }
    }

    /// Requests it has got.
    pub(crate) fn calls(&self) -> usize {
        self.service.calls.load(Ordering::SeqCst)
    }

    /// Streams that are open.
    pub(crate) fn running(&self) -> usize {
        self.service.running.load(Ordering::SeqCst)
    }

    /// Lets hanging requests end well.
    pub(crate) fn release(&self) {
        self.service.release.add_permits(1000);
    }

    /// Stops the heartbeats for good; connections stay.
    pub(crate) fn fall_silent(&mut self) {
        // A membership that goes nowhere takes the place of the real one.
        let nowhere = "127.0.0.1:1";
        let nobody = member(nowhere, "none", Role::Attention, "nobody", nowhere);
        self.node.member = Member::start(nobody).unwrap();
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

#[derive(Clone)]
struct Service {
    script: Script,
    calls: Arc<AtomicUsize>,
    running: Arc<AtomicUsize>,
    release: Arc<Semaphore>,
}

/// Counts a stream for as long as it is open.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl Inference for Service {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<BoxStream<GenerateResponse>>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.script == Script::Refuse {
            return Err(Status::unavailable("full"));
        }
        let request = request.into_inner();
        let Some(Input::TokenIds(TokenIds { ids })) = request.input else {
            return Err(Status::invalid_argument("token ids are expected"));
        };
        self.running.fetch_add(1, Ordering::SeqCst);
        let open = Open(Arc::clone(&self.running));
        let prompt = Event::Prompt(Prompt {
            request_id: request.request_id,
            token_ids: ids.clone(),
            logprobs: Vec::new(),
        });
        let chunk = Event::Chunk(Chunk {
            token_ids: ids.clone(),
            ..Chunk::default()
        });
        let complete = Event::Complete(Complete {
            finish_reason: FinishReason::Length.into(),
            matched_stop: None,
            usage: Some(Usage {
                prompt_tokens: ids.len() as u32,
                completion_tokens: ids.len() as u32,
                ..Usage::default()
            }),
        });
        let release = (self.script == Script::Hang).then(|| Arc::clone(&self.release));
        let rest = stream::once(async move {
            if let Some(release) = release {
                let _ = release.acquire().await;
            }
            stream::iter([chunk, complete])
        })
        .flatten();
        let events = stream::iter([prompt]).chain(rest).map(move |event| {
            let _counted = &open;
            Ok(GenerateResponse { event: Some(event) })
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented("streams are dropped here"))
    }

    async fn model_info(
        &self,
        _: Request<ModelInfoRequest>,
    ) -> Result<Response<ModelInfoResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
