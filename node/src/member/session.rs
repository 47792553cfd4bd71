//! The membership thread: register, beat, watch, and over again.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    HeartbeatRequest, LeaveRequest, Placement, PlacementState, RegisterRequest,
    WatchPlacementRequest,
};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::coordinators::Coordinators;
use super::routed::{self, Outbox};
use super::{Lease, MemberConfig, MemberError, Said};
use crate::channel::Dialer;
use crate::serve::chain;
use crate::status::reason_of;

/// First pause after a failed attempt; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause between attempts, so that a coordinator that comes back finds
/// its nodes within about this time.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Heartbeats in one lease: two may be lost before the third is too late.
const BEATS_PER_LEASE: u32 = 3;
/// Fastest heartbeat, whatever the lease says.
const BEAT_MIN: Duration = Duration::from_millis(20);
/// How often load is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// What a call may take before it counts as failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// What saying goodbye may take: the lease does the same, only later.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

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

/// Why a watch of the placement ended.
enum End {
    /// By the coordinator, or on the way.
    Status(Status),
    /// By this node, whose lease has run out.
    Fenced,
}

/// What the coordinator has told this node, for its owner.
pub(super) struct Told {
    /// The newest placement.
    pub(super) placement: watch::Sender<Option<Arc<Placement>>>,
    /// The newest that is ACTIVE.
    pub(super) active: watch::Sender<Option<Arc<Placement>>>,
    /// Until when the coordinator counts on this node.
    pub(super) lease: Lease,
}

/// The state of the membership thread.
pub(super) struct Session {
    coordinators: Coordinators,
    config: MemberConfig,
    incarnation: u64,
    said: watch::Receiver<Said>,
    told: Told,
    node_id: watch::Sender<Option<u32>>,
    routed: routed::Slot,
    /// The newest epoch that was withdrawn.
    withdrawn: AtomicU64,
}

impl Session {
    /// Must be made in the runtime that drives it.
    pub(super) fn new(
        config: MemberConfig,
        dialer: &Dialer,
        said: watch::Receiver<Said>,
        told: Told,
        node_id: watch::Sender<Option<u32>>,
        routed: routed::Slot,
    ) -> Result<Session, MemberError> {
        Ok(Session {
            coordinators: Coordinators::new(&config.coordinator, dialer)?,
            config,
            incarnation: draw_incarnation(),
            said,
            told,
            node_id,
            routed,
            withdrawn: AtomicU64::new(0),
        })
    }

    /// Joins and stays until the owner leaves or is gone, or the coordinator
    /// refuses this node for good.
    pub(super) async fn run(self) -> Result<(), MemberError> {
        let mut complaint = Complaint::default();
        let mut outbox = Outbox::default();
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
                () = self.report_load(node_id, &mut outbox) => continue,
            };
            self.node_id.send_replace(None);
            self.told.lease.end();
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
                // An epoch that was withdrawn is not used again either.
                newest_epoch: self.newest_epoch().max(self.withdrawn()),
                incarnation: self.incarnation,
                process: self.config.process.clone(),
                failure_domain: self.config.failure_domain.clone(),
                duty: self.config.duty.into(),
            };
            let asked = Instant::now();
            let (at, coordinator, mut client) = self.coordinators.current();
            match client.register(timed(request)).await {
                Ok(response) => {
                    let response = response.into_inner();
                    let lease = Duration::from_millis(response.lease_ms.into());
                    self.told.lease.renew(asked + lease);
                    tracing::info!(
                        name = self.config.name,
                        coordinator,
                        node_id = response.node_id,
                        "joined the cluster"
                    );
                    complaint.settle();
                    return Ok((response.node_id, lease));
                }
                Err(status) if is_final(&status) => {
                    return Err(MemberError::Refused {
                        coordinator: coordinator.to_owned(),
                        message: status.message().to_owned(),
                        reason: reason_of(&status),
                    });
                }
                Err(status) => {
                    complaint.say(&format!(
                        "waiting for the coordinator at {coordinator}: {}",
                        in_words(&status)
                    ));
                    self.coordinators.turn_from(at, &status);
                    backoff.wait().await;
                }
            }
        }
    }

    /// Sends heartbeats until the coordinator does not know this node.
    async fn beat(&self, node_id: u32, lease: Duration) -> Lost {
        let interval = (lease / BEATS_PER_LEASE).max(BEAT_MIN);
        // A coordinator that does not answer must not cost the lease: another may be leading.
        let patience = CALL_TIMEOUT.min((lease / 2).max(BEAT_MIN));
        let mut said = self.said.clone();
        let mut complaint = Complaint::default();
        let mut backoff = Backoff::default();
        loop {
            let mut pause = interval;
            let now = said.borrow_and_update().clone();
            let (failed_epoch, failure) = now.state.failed.unwrap_or_default();
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
                rows_per_second: now.measured.rows_per_second,
                resident_bytes: now.measured.resident_bytes,
                free_bytes: now.measured.free_bytes,
                failed_epoch,
                failure,
                outstanding_tokens: now.load.outstanding_tokens,
                free_pages: now.load.free_pages,
                cached_pages: now.load.cached_pages,
                tokens_run: now.load.tokens_run,
            };
            let sent = Instant::now();
            let (at, coordinator, mut client) = self.coordinators.current();
            let mut request = timed(request);
            request.set_timeout(patience);
            match client.heartbeat(request).await {
                Ok(_) => {
                    self.told.lease.renew(sent + lease);
                    complaint.settle();
                    backoff.reset();
                }
                Err(status) if status.code() == Code::NotFound => return Lost::Unknown,
                Err(status) => {
                    complaint.say(&format!(
                        "heartbeat to {coordinator} failed: {}",
                        in_words(&status)
                    ));
                    self.coordinators.turn_from(at, &status);
                    pause = interval.min(backoff.next());
                }
            }
            // News goes out at once, silence is broken once an interval.
            let news = tokio::time::timeout(pause, said.changed()).await;
            if matches!(news, Ok(Err(_))) {
                return Lost::Abandoned;
            }
        }
    }

    /// Reports what the gates choose, for ever. Whether the coordinator knows
    /// this node is for the heartbeats to find out.
    async fn report_load(&self, node_id: u32, outbox: &mut Outbox) {
        let mut ticks = tokio::time::interval(REPORT_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut complaint = Complaint::default();
        loop {
            ticks.tick().await;
            let Some(report) = outbox.next(&self.routed, node_id) else {
                continue;
            };
            let (_, coordinator, mut client) = self.coordinators.current();
            match client.report_load(timed(report)).await {
                Ok(_) => {
                    outbox.counted();
                    complaint.settle();
                }
                Err(status) => {
                    complaint.say(&format!(
                        "load report to {coordinator} failed: {}",
                        in_words(&status)
                    ));
                    if is_final(&status) {
                        outbox.counted();
                    }
                }
            }
        }
    }

    /// Follows the placement until the coordinator does not know this node.
    async fn watch(&self, node_id: u32) -> Lost {
        let mut complaint = Complaint::default();
        let mut backoff = Backoff::default();
        loop {
            let (at, coordinator, client) = self.coordinators.current();
            let end = tokio::select! {
                end = self.follow(client, node_id, &mut complaint, &mut backoff) => end,
                // The heartbeats have found a reason.
                () = self.coordinators.turned(at) => continue,
            };
            match end {
                // That is about this node: the coordinator may well be the one that leads.
                End::Fenced => {
                    complaint.say("the lease has run out: asking for the placement anew")
                }
                End::Status(status) if status.code() == Code::NotFound => return Lost::Unknown,
                End::Status(status) => {
                    complaint.say(&format!(
                        "no placement from {coordinator}: {}",
                        in_words(&status)
                    ));
                    self.coordinators.turn_from(at, &status);
                }
            }
            backoff.wait().await;
        }
    }

    async fn follow(
        &self,
        mut client: ClusterClient<Channel>,
        node_id: u32,
        complaint: &mut Complaint,
        backoff: &mut Backoff,
    ) -> End {
        let request = WatchPlacementRequest { node_id };
        let mut stream = match client.watch_placement(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return End::Status(status),
        };
        loop {
            match stream.message().await {
                Ok(Some(_)) if !self.told.lease.is_held() => {
                    // A node that may be taken for dead is fenced: what was on
                    // its way to it meanwhile is not for it any more. Asked for
                    // again, the coordinator says what is, or that it must rejoin.
                    return End::Fenced;
                }
                Ok(Some(placement)) => {
                    complaint.settle();
                    backoff.reset();
                    self.take(Arc::new(placement));
                }
                Ok(None) => {
                    return End::Status(Status::unavailable("the coordinator ended the stream"));
                }
                Err(status) => return End::Status(status),
            }
        }
    }

    /// Passes a placement on, unless it is older than what was passed on before
    /// or was withdrawn.
    fn take(&self, placement: Arc<Placement>) {
        let epoch = placement.epoch;
        match placement.state() {
            PlacementState::Withdrawn => return self.withdraw(epoch),
            PlacementState::Lost => return self.lose(&placement),
            PlacementState::Active => {
                let news = self.told.active.send_if_modified(|known| {
                    let news = known.as_ref().is_none_or(|known| {
                        let age = |p: &Placement| (p.epoch, p.oldest_epoch);
                        age(known) <= age(&placement) && *known != placement
                    });
                    if news {
                        *known = Some(Arc::clone(&placement));
                    }
                    news
                });
                if !news {
                    tracing::debug!(epoch, "nothing new");
                    return;
                }
            }
            _ if epoch <= self.withdrawn() => {
                tracing::debug!(epoch, "withdrawn already");
                return;
            }
            _ => {}
        }
        // An active placement is told of again before the one being loaded.
        if epoch < self.newest_epoch() {
            tracing::debug!(
                epoch,
                newest = self.newest_epoch(),
                "not the newest placement"
            );
            return;
        }
        self.told.placement.send_replace(Some(placement));
    }

    /// What was served by is lost: it is what is there, in that state.
    fn lose(&self, lost: &Placement) {
        self.told.active.send_if_modified(|known| {
            let Some(known) = known.as_mut().filter(|known| known.epoch <= lost.epoch) else {
                return false;
            };
            let now = Placement {
                state: lost.state,
                reason: lost.reason.clone(),
                ..Placement::clone(known)
            };
            let news = now != **known;
            *known = Arc::new(now);
            news
        });
    }

    /// What loads at `epoch` will never be active: back to what is.
    fn withdraw(&self, epoch: u64) {
        self.withdrawn.fetch_max(epoch, Ordering::Relaxed);
        let active = self.told.active.borrow().clone();
        self.told.placement.send_if_modified(|newest| {
            let gone = newest.as_ref().is_some_and(|newest| {
                newest.state() != PlacementState::Active && newest.epoch <= epoch
            });
            if gone {
                tracing::info!(epoch, "withdrawn");
                *newest = active;
            }
            gone
        });
    }

    fn withdrawn(&self) -> u64 {
        self.withdrawn.load(Ordering::Relaxed)
    }

    async fn say_goodbye(&self, node_id: u32) {
        let (_, _, mut client) = self.coordinators.current();
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
        self.told.placement.borrow().as_ref().map_or(0, |p| p.epoch)
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
    fn next(&mut self) -> Duration {
        let pause = self
            .last
            .map_or(BACKOFF_MIN, |last| (last * 2).min(BACKOFF_MAX));
        self.last = Some(pause);
        pause
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
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
