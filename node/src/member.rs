//! Being a member of a cluster: the client side of guild.cluster.v1.
//!
//! One OS thread with its own small runtime registers, sends heartbeats and
//! watches the placement, so that neither a long kernel nor a blocked worker
//! pool of the process can make it look dead. A coordinator that cannot be
//! reached is retried for ever; one that refuses this node for good ends the
//! membership with an error.

mod coordinators;
mod lease;
mod routed;
mod session;

use std::sync::Arc;

use guild_proto::cluster::v1::{Duty, Placement, Role};
use tokio::sync::watch;

use crate::channel::{AddressError, Dialer};
use crate::exit::{ExitKind, HasExitKind};

pub use coordinators::check_coordinators;
pub use lease::Lease;
pub use routed::{Routed, RoutedSource};

/// ErrorInfo reason of a refusal because config or weights differ.
pub const REASON_DIGEST: &str = "MODEL_DIGEST_MISMATCH";
/// ErrorInfo reason of a refusal because the node would compute other bits.
pub const REASON_NUMERICS: &str = "NUMERICS_CLASS_MISMATCH";
/// ErrorInfo reason of a coordinator that does not lead; its metadata may say
/// who does.
pub const REASON_NOT_LEADER: &str = "NOT_LEADER";
/// ErrorInfo reason where an operator wants something changed and no coordinator leads.
pub const REASON_NO_LEADER: &str = "NO_LEADER";
/// ErrorInfo metadata: address of the coordinator that leads.
pub const LEADER_KEY: &str = "leader";
/// Bytes of one placement message: 2^20 slots of up to 8 bytes, and names.
const MAX_PLACEMENT_BYTES: usize = 32 << 20;
/// ErrorInfo reason of an answer to a node that is not (or no longer) known.
pub const REASON_UNKNOWN_NODE: &str = "UNKNOWN_NODE";

/// Who this node is.
#[derive(Clone, Debug)]
pub struct MemberConfig {
    /// `http://host:port` of the coordinator's cluster service; several,
    /// separated by commas, where several coordinators run.
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
    /// Nodes with the same value are one process and reach each other without a
    /// wire. Empty: alone.
    pub process: String,
    /// What fails together with this node: a host, a rack. Empty: nothing else.
    pub failure_domain: String,
    /// What of a request it does (attention nodes).
    pub duty: Duty,
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
    /// The newest epoch that the node was given and cannot load, and why; it may
    /// be ready at an older one all the same.
    pub failed: Option<(u64, String)>,
}

/// What an expert node has measured of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Rows executed in a second of work; 0: not known.
    pub rows_per_second: f64,
    /// Bytes of all experts in memory, those of every epoch.
    pub resident_bytes: u64,
    /// Bytes that further experts may take; None: not known.
    pub free_bytes: Option<u64>,
}

/// Requests of an attention node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in the batch.
    pub running: u32,
    /// Requests admitted and waiting.
    pub waiting: u32,
    /// Tokens that may still have to be run for all of them.
    pub outstanding_tokens: u64,
    /// Pages of the cache that no request holds.
    pub free_pages: u32,
    /// Those of them whose contents are known.
    pub cached_pages: u32,
    /// Tokens run since the start.
    pub tokens_run: u64,
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
    active: watch::Receiver<Option<Arc<Placement>>>,
    lease: Lease,
    node_id: watch::Receiver<Option<u32>>,
    routed: routed::Slot,
    ended: watch::Receiver<Option<Result<(), MemberError>>>,
}

/// All that the owner of a membership has said so far.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    state: NodeState,
    load: Load,
    measured: Measured,
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
        Member::start_by(config, Dialer::Plain)
    }

    /// The same over connections that `dialer` makes.
    ///
    /// # Errors
    /// As [`Member::start`].
    pub fn start_by(config: MemberConfig, dialer: Dialer) -> Result<Member, MemberError> {
        // Judged here, because the thread has nobody to tell. The channel
        // itself has to be made in the runtime that drives it.
        check_coordinators(&config.coordinator, &dialer)?;
        let (said, said_rx) = watch::channel(Said::default());
        let (placement_tx, placement) = watch::channel(None);
        let (active_tx, active) = watch::channel(None);
        let lease = Lease::default();
        let told = session::Told {
            placement: placement_tx,
            active: active_tx,
            lease: lease.clone(),
        };
        let routed = routed::Slot::default();
        let counted = Arc::clone(&routed);
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
                    session::Session::new(config, &dialer, said_rx, told, node_id_tx, counted)?
                        .run()
                        .await
                });
                ended_tx.send_replace(Some(end));
            })
            .map_err(|e| MemberError::Thread(e.to_string()))?;
        Ok(Member {
            shared: Arc::new(Shared {
                said,
                placement,
                active,
                lease,
                node_id,
                routed,
                ended,
            }),
        })
    }

    /// The newest placement the coordinator has published and not withdrawn;
    /// None before the first. The same epoch comes again when its state or
    /// anything else of it changes. Its epoch falls only when it was LOADING and
    /// is withdrawn: then this is the active one again.
    pub fn placement(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        self.shared.placement.clone()
    }

    /// The newest placement that is ACTIVE, while the next one may be loading; as LOST, when
    /// experts of it are; None before the first. Its epoch only grows, and with it or without it
    /// the epoch that is the oldest anybody uses.
    pub fn active(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        self.shared.active.clone()
    }

    /// Whether the coordinator counts on this node, as far as the node can know.
    pub fn lease(&self) -> Lease {
        self.shared.lease.clone()
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
                failed: None,
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

    /// Tells the coordinator what this node has measured: at once when experts
    /// have come or gone, with the next heartbeat otherwise.
    pub fn set_measured(&self, measured: Measured) {
        self.shared.said.send_if_modified(|said| {
            let before = std::mem::replace(&mut said.measured, measured);
            before.resident_bytes != measured.resident_bytes
        });
    }

    /// From now on the coordinator is told every second what the gates of this
    /// node have chosen. The first source stays.
    pub fn count_routed(&self, source: Arc<dyn RoutedSource>) {
        // A membership belongs to one engine.
        let _ = self.shared.routed.set(source);
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
