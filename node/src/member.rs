//! Being a member of a cluster: the client side of guild.cluster.v1.
//!
//! One OS thread with its own small runtime registers, sends heartbeats and
//! watches the placement, so that neither a long kernel nor a blocked worker
//! pool of the process can make it look dead. A coordinator that cannot be
//! reached is retried for ever; one that refuses this node for good ends the
//! membership with an error.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    HeartbeatRequest, LeaveRequest, Placement, RegisterRequest, Role, WatchPlacementRequest,
};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::channel::{self, AddressError};
use crate::exit::{ExitKind, HasExitKind};
use crate::serve::chain;
use crate::status::reason_of;

/// ErrorInfo reason of a refusal because config or weights differ.
pub const REASON_DIGEST: &str = "MODEL_DIGEST_MISMATCH";
/// ErrorInfo reason of a refusal because the node would compute other bits.
pub const REASON_NUMERICS: &str = "NUMERICS_CLASS_MISMATCH";
/// ErrorInfo reason of an answer to a node that is not (or no longer) known.
pub const REASON_UNKNOWN_NODE: &str = "UNKNOWN_NODE";

/// First pause after a failed attempt; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause between attempts, so that a coordinator that comes back finds
/// its nodes within about this time.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Heartbeats in one lease: two may be lost before the third is too late.
const BEATS_PER_LEASE: u32 = 3;
/// Fastest heartbeat, whatever the lease says.
const BEAT_MIN: Duration = Duration::from_millis(20);
/// What a call may take before it counts as failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// What saying goodbye may take: the lease does the same, only later.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of one placement message: 2^20 slots of up to 8 bytes, and names.
const MAX_PLACEMENT_BYTES: usize = 32 << 20;

/// Who this node is.
#[derive(Clone, Debug)]
pub struct MemberConfig {
    /// `http://host:port` of the coordinator's cluster service.
    pub coordinator: String,
    /// What the node does.
    pub role: Role,
    /// Stable and unique in the cluster.
    pub name: String,
    /// `host:port` where others reach this node.
    pub address: String,
    /// Digest of configuration and weights.
    pub model_digest: String,
    /// Nodes of one class compute the same bits.
    pub numerics_class: String,
    /// Bytes for resident experts (expert nodes); 0 is unlimited.
    pub capacity_bytes: u64,
}

/// What a node says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Newest epoch loaded (expert nodes) or served by (attention nodes).
    pub epoch: u64,
    /// Whether it can do its work at that epoch.
    pub ready: bool,
    /// Why not; empty when ready.
    pub reason: String,
}

/// Requests of an attention node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the batch.
    pub running: u32,
    /// Requests admitted and waiting.
    pub waiting: u32,
}

/// Why a node cannot be a member.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MemberError {
    /// The coordinator's address is malformed.
    #[error("--coordinator: {0}")]
    Address(String),
    /// The operating system gives no thread for the membership.
    #[error("cannot start the membership thread: {0}")]
    Thread(String),
    /// The coordinator will not have this node, now or later.
    #[error("the coordinator at {coordinator} refused this node: {message}")]
    Refused {
        /// Who refused.
        coordinator: String,
        /// Its words; both values are named where two differ.
        message: String,
        /// Its ErrorInfo reason, if any.
        reason: Option<String>,
    },
}

impl From<AddressError> for MemberError {
    fn from(error: AddressError) -> Self {
        MemberError::Address(error.to_string())
    }
}

impl HasExitKind for MemberError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            MemberError::Address(_) => ExitKind::Usage,
            MemberError::Thread(_) => ExitKind::Resources,
            MemberError::Refused { reason, .. } if reason.as_deref() == Some(REASON_DIGEST) => {
                ExitKind::Model
            }
            MemberError::Refused { .. } => ExitKind::Network,
        }
    }
}

/// A membership. Clones share it; when the last one is dropped the heartbeats
/// stop and the lease runs out.
#[derive(Clone, Debug)]
pub struct Member {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    said: watch::Sender<Said>,
    placement: watch::Receiver<Option<Arc<Placement>>>,
    node_id: watch::Receiver<Option<u32>>,
    ended: watch::Receiver<Option<Result<(), MemberError>>>,
}

/// All that the owner of a membership has said so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    state: NodeState,
    load: Load,
    draining: bool,
    leaving: bool,
}

impl Member {
    /// Begins to join and keeps at it in the background until
    /// [`leave`](Member::leave) or a refusal.
    ///
    /// # Errors
    /// The coordinator's address is malformed, or no thread can be started.
    /// An unreachable coordinator is not an error.
    pub fn start(config: MemberConfig) -> Result<Member, MemberError> {
        // Judged here, because the thread has nobody to tell. The channel
        // itself has to be made in the runtime that drives it.
        channel::check(&config.coordinator)?;
        let (said, said_rx) = watch::channel(Said::default());
        let (placement_tx, placement) = watch::channel(None);
        let (node_id_tx, node_id) = watch::channel(None);
        let (ended_tx, ended) = watch::channel(None);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| MemberError::Thread(e.to_string()))?;
        std::thread::Builder::new()
            .name("guild-member".to_owned())
            .spawn(move || {
                let end = runtime.block_on(async {
                    let client = ClusterClient::new(channel::lazy(&config.coordinator)?)
                        .max_decoding_message_size(MAX_PLACEMENT_BYTES);
                    let session = Session {
                        client,
                        incarnation: draw_incarnation(),
                        config,
                        said: said_rx,
                        placement: placement_tx,
                        node_id: node_id_tx,
                    };
                    session.run().await
                });
                ended_tx.send_replace(Some(end));
            })
            .map_err(|e| MemberError::Thread(e.to_string()))?;
        Ok(Member {
            shared: Arc::new(Shared {
                said,
                placement,
                node_id,
                ended,
            }),
        })
    }

    /// The newest placement the coordinator has published; None before the
    /// first. Its epoch never falls; the same epoch comes again when its state
    /// changes.
    pub fn placement(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        self.shared.placement.clone()
    }

    /// The id the coordinator knows this node by; None while not registered.
    pub fn node_id(&self) -> Option<u32> {
        *self.shared.node_id.borrow()
    }

    /// Tells the coordinator, at once when it changes something, what this node
    /// can do.
    pub fn set_state(&self, state: NodeState) {
        self.say(|said| said.state = state);
    }

    /// Short for [`set_state`](Member::set_state) and [`set_load`](Member::set_load).
    pub fn set_status(&self, epoch: u64, ready: bool, reason: impl Into<String>, load: Load) {
        let reason = reason.into();
        self.say(|said| {
            said.state = NodeState {
                epoch,
                ready,
                reason,
            };
            said.load = load;
        });
    }

    /// Tells the coordinator, with the next heartbeat, how busy this node is.
    pub fn set_load(&self, load: Load) {
        // Not worth a heartbeat of its own: the next one carries it.
        self.shared.said.send_if_modified(|said| {
            said.load = load;
            false
        });
    }

    /// Tells the coordinator to send nothing new here.
    pub fn set_draining(&self) {
        self.say(|said| said.draining = true);
    }

    /// Completes when the membership has ended: with the coordinator's refusal,
    /// or with Ok after [`leave`](Member::leave).
    pub async fn ended(&self) -> Result<(), MemberError> {
        let mut ended = self.shared.ended.clone();
        let end = ended.wait_for(Option::is_some).await;
        match end {
            Ok(end) => end.clone().unwrap_or(Ok(())),
            Err(_) => Err(MemberError::Thread("it ended early".to_owned())),
        }
    }

    /// Leaves the cluster: the coordinator is told, within a short limit, and
    /// the heartbeats stop.
    pub async fn leave(&self) {
        self.say(|said| said.leaving = true);
        // An earlier refusal is what `ended` is for.
        let _ = self.ended().await;
    }

    fn say(&self, change: impl FnOnce(&mut Said)) {
        self.shared.said.send_if_modified(|said| {
            let before = said.clone();
            change(said);
            *said != before
        });
    }
}

/// Tells a restarted process from a reconnect; not a secret.
fn draw_incarnation() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Why a registration ended.
enum Lost {
    /// The coordinator does not know this node (any more).
    Unknown,
    /// The owner wants to leave.
    Leaving,
    /// Every handle was dropped without leaving.
    Abandoned,
}

/// The state of the membership thread.
struct Session {
    client: ClusterClient<Channel>,
    config: MemberConfig,
    incarnation: u64,
    said: watch::Receiver<Said>,
    placement: watch::Sender<Option<Arc<Placement>>>,
    node_id: watch::Sender<Option<u32>>,
}

impl Session {
    async fn run(self) -> Result<(), MemberError> {
        let mut complaint = Complaint::default();
        loop {
            let registered = tokio::select! {
                _ = left(self.said.clone()) => return Ok(()),
                registered = self.register(&mut complaint) => registered?,
            };
            let (node_id, lease) = registered;
            self.node_id.send_replace(Some(node_id));
            let lost = tokio::select! {
                lost = left(self.said.clone()) => lost,
                lost = self.beat(node_id, lease) => lost,
                lost = self.watch(node_id) => lost,
            };
            self.node_id.send_replace(None);
            match lost {
                Lost::Leaving => {
                    self.say_goodbye(node_id).await;
                    return Ok(());
                }
                // Like a crash: the lease runs out.
                Lost::Abandoned => return Ok(()),
                Lost::Unknown => {
                    tracing::warn!(
                        name = self.config.name,
                        "the coordinator no longer knows this node: joining again"
                    );
                }
            }
        }
    }

    /// Registers, however long it takes. Returns the node id and the lease.
    async fn register(&self, complaint: &mut Complaint) -> Result<(u32, Duration), MemberError> {
        let mut backoff = Backoff::default();
        loop {
            let request = RegisterRequest {
                role: self.config.role.into(),
                name: self.config.name.clone(),
                address: self.config.address.clone(),
                model_digest: self.config.model_digest.clone(),
                numerics_class: self.config.numerics_class.clone(),
                capacity_bytes: self.config.capacity_bytes,
                newest_epoch: self.newest_epoch(),
                incarnation: self.incarnation,
            };
            match self.client.clone().register(timed(request)).await {
                Ok(response) => {
                    let response = response.into_inner();
                    let lease = Duration::from_millis(response.lease_ms.into());
                    tracing::info!(
                        name = self.config.name,
                        coordinator = self.config.coordinator,
                        node_id = response.node_id,
                        "joined the cluster"
                    );
                    complaint.settle();
                    return Ok((response.node_id, lease));
                }
                Err(status) if is_final(&status) => {
                    return Err(MemberError::Refused {
                        coordinator: self.config.coordinator.clone(),
                        message: status.message().to_owned(),
                        reason: reason_of(&status),
                    });
                }
                Err(status) => {
                    complaint.say(&format!(
                        "waiting for the coordinator at {}: {}",
                        self.config.coordinator,
                        in_words(&status)
                    ));
                    backoff.wait().await;
                }
            }
        }
    }

    /// Sends heartbeats until the coordinator does not know this node.
    async fn beat(&self, node_id: u32, lease: Duration) -> Lost {
        let interval = (lease / BEATS_PER_LEASE).max(BEAT_MIN);
        let mut said = self.said.clone();
        let mut complaint = Complaint::default();
        loop {
            let now = said.borrow_and_update().clone();
            let request = HeartbeatRequest {
                node_id,
                incarnation: self.incarnation,
                epoch: now.state.epoch,
                ready: now.state.ready && !now.draining,
                reason: if now.draining {
                    "draining".to_owned()
                } else {
                    now.state.reason
                },
                running: now.load.running,
                waiting: now.load.waiting,
                draining: now.draining,
            };
            match self.client.clone().heartbeat(timed(request)).await {
                Ok(_) => complaint.settle(),
                Err(status) if status.code() == Code::NotFound => return Lost::Unknown,
                Err(status) => complaint.say(&format!(
                    "heartbeat to {} failed: {}",
                    self.config.coordinator,
                    in_words(&status)
                )),
            }
            // News goes out at once, silence is broken once an interval.
            let news = tokio::time::timeout(interval, said.changed()).await;
            if matches!(news, Ok(Err(_))) {
                return Lost::Abandoned;
            }
        }
    }

    /// Follows the placement until the coordinator does not know this node.
    async fn watch(&self, node_id: u32) -> Lost {
        let mut complaint = Complaint::default();
        let mut backoff = Backoff::default();
        loop {
            let end = self.follow(node_id, &mut complaint, &mut backoff).await;
            if end.code() == Code::NotFound {
                return Lost::Unknown;
            }
            complaint.say(&format!(
                "no placement from {}: {}",
                self.config.coordinator,
                in_words(&end)
            ));
            backoff.wait().await;
        }
    }

    async fn follow(
        &self,
        node_id: u32,
        complaint: &mut Complaint,
        backoff: &mut Backoff,
    ) -> Status {
        let request = WatchPlacementRequest { node_id };
        let mut stream = match self.client.clone().watch_placement(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return status,
        };
        loop {
            match stream.message().await {
                Ok(Some(placement)) => {
                    complaint.settle();
                    backoff.reset();
                    if placement.epoch < self.newest_epoch() {
                        tracing::warn!(
                            epoch = placement.epoch,
                            newest = self.newest_epoch(),
                            "ignored a placement older than the one in use"
                        );
                        continue;
                    }
                    self.placement.send_replace(Some(Arc::new(placement)));
                }
                Ok(None) => return Status::unavailable("the coordinator ended the stream"),
                Err(status) => return status,
            }
        }
    }

    async fn say_goodbye(&self, node_id: u32) {
        let mut client = self.client.clone();
        let request = LeaveRequest {
            node_id,
            incarnation: self.incarnation,
        };
        let left = tokio::time::timeout(LEAVE_TIMEOUT, client.leave(request)).await;
        if !matches!(left, Ok(Ok(_))) {
            tracing::info!("the coordinator was not told of leaving: the lease will run out");
        }
    }

    fn newest_epoch(&self) -> u64 {
        self.placement.borrow().as_ref().map_or(0, |p| p.epoch)
    }
}

/// Completes when the owner wants to leave or is gone.
async fn left(mut said: watch::Receiver<Said>) -> Lost {
    match said.wait_for(|said| said.leaving).await {
        Ok(_) => Lost::Leaving,
        Err(_) => Lost::Abandoned,
    }
}

fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Whether asking again cannot help.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
    )
}

fn in_words(status: &Status) -> String {
    // A transport error hides its cause in its sources.
    match std::error::Error::source(status) {
        Some(source) => chain(source),
        None if status.message().is_empty() => status.code().to_string(),
        None => status.message().to_owned(),
    }
}

/// Doubling pauses.
#[derive(Default)]
struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    async fn wait(&mut self) {
        let pause = self
            .last
            .map_or(BACKOFF_MIN, |last| (last * 2).min(BACKOFF_MAX));
        self.last = Some(pause);
        tokio::time::sleep(pause).await;
    }

    fn reset(&mut self) {
        self.last = None;
    }
}

/// Says why something is being waited for, once per reason.
#[derive(Default)]
struct Complaint {
    last: Option<String>,
}

impl Complaint {
    fn say(&mut self, reason: &str) {
        if self.last.as_deref() != Some(reason) {
            tracing::warn!("{reason}");
            self.last = Some(reason.to_owned());
        }
    }

    fn settle(&mut self) {
        self.last = None;
    }
}
