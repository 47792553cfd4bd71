//! The life of an expert node: open, join, load what the placement says, drain.
//!
//! Secret: the order of these and what the outside is told meanwhile. The node
//! is ready at an epoch when every expert that the epoch gives it is resident;
//! it goes on serving an epoch while it loads the next one.

use std::{sync::Arc, time::Duration};

use guild_model::{Checkpoint, Cpu};
use guild_node::{
    Shutdown,
    channel::Dialer,
    member::{Member, MemberConfig, NodeState},
    serve::{Health, Server},
    tls,
};
use guild_proto::{
    cluster::v1::{Placement, Role},
    experts::v1::experts_server::SERVICE_NAME,
};
use guild_transport::{ServiceLimits, SlotHost, Switchboard, service};
use tokio::{
    net::TcpListener,
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    Error, ExpertNodeConfig,
    host::Host,
    residents::{ExpertKey, LoadError, Progress, Residents},
};

/// A draining node is done when no rows have come for this long: those who
/// decode here send some at every step.
const QUIET: Duration = Duration::from_millis(500);
/// Between two looks at that.
const QUIET_POLL: Duration = Duration::from_millis(20);
/// What the last answers get to reach their readers before connections are cut.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Progress is logged each time another so many percent are resident.
const PROGRESS_PERCENT: usize = 10;

/// Runs an expert node on `listener` until `shutdown`; then it leaves the
/// cluster, goes on serving while rows come and the drain limit lasts, and
/// returns. With a `switchboard` it is reached in this process as well.
///
/// # Errors
/// The checkpoint or the listener cannot be used, or the coordinator refuses
/// this node.
pub async fn run(
    cfg: ExpertNodeConfig,
    listener: TcpListener,
    cpu: Cpu,
    switchboard: Option<Switchboard>,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let checkpoint = cfg.model.clone();
    let width = checkpoint.config().hidden_size;
    let numerics_class = cfg.dtype.numerics_class(&cpu);
    let host = Host::new(&cfg.name, width, cpu).merging(cfg.merging.clone());
    let host = Arc::new(host);

    let closing = CancellationToken::new();
    let experts = service(
        &cfg.name,
        Arc::clone(&host) as Arc<dyn SlotHost>,
        ServiceLimits::default(),
        closing.clone(),
    );
    let senders_only = cfg
        .tls
        .as_ref()
        .map(|tls| tls.acceptor(tls::Role::SENDING_ROWS));
    let server = Server::new()
        .await
        .add(experts)
        .with_tls(senders_only)
        .probed_at(cfg.health.clone());
    let health = server.health();
    health.set_serving(SERVICE_NAME, false).await;
    // Not a child of `shutdown`: rows are served while the node drains.
    let down = Shutdown::new();
    let serving = server.run(listener, down.clone(), LAST_WORDS);
    let mut serving = AbortOnDropHandle::new(tokio::spawn(serving));
    let attached = switchboard.map(|board| Attached::new(board, &cfg.name, &host));

    let node = Node {
        cfg,
        numerics_class,
        host,
        health,
        shutdown,
    };
    let outcome = tokio::select! {
        outcome = node.live(checkpoint) => outcome,
        ended = &mut serving => return Err(match ended {
            Ok(Err(error)) => error.into(),
            Ok(Ok(())) => failed("the server", &"it ended early"),
            Err(error) => failed("the server", &error),
        }),
    };
    drop(attached);
    closing.cancel();
    down.trigger();
    // What is not said by then is cut with the task.
    let _ = timeout(2 * LAST_WORDS, &mut serving).await;
    outcome
}

/// This node's place on a switchboard, for as long as it lives.
struct Attached {
    board: Switchboard,
    name: String,
}

impl Attached {
    fn new(board: Switchboard, name: &str, host: &Arc<Host>) -> Self {
        board.attach(name, Arc::clone(host) as Arc<dyn SlotHost>);
        Self {
            board,
            name: name.to_owned(),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.board.detach(&self.name);
    }
}

struct Node {
    cfg: ExpertNodeConfig,
    numerics_class: String,
    host: Arc<Host>,
    health: Health,
    shutdown: Shutdown,
}

/// What the newest placement has come to.
struct Loading {
    residents: Option<Residents>,
    /// The epoch that was last tried, resident or failed.
    tried: Option<u64>,
    /// The newest epoch that is resident.
    epoch: u64,
}

impl Node {
    /// From an open checkpoint to the end.
    async fn live(&self, checkpoint: Checkpoint) -> Result<(), Error> {
        let hashed = checkpoint.clone();
        let digest = tokio::select! {
            digest = on_thread("the checkpoint's digest", move || hashed.digest()) => digest??,
            () = self.shutdown.requested() => return Ok(()),
        };
        let membership = MemberConfig {
            coordinator: self.cfg.coordinator.clone(),
            role: Role::Expert,
            name: self.cfg.name.clone(),
            address: self.cfg.address.clone(),
            model_digest: digest,
            numerics_class: self.numerics_class.clone(),
            capacity_bytes: self.cfg.capacity_bytes,
            process: self.cfg.process.clone(),
            failure_domain: self.cfg.failure_domain.clone(),
        };
        let dialer = Dialer::to(tls::Role::COORDINATING, self.cfg.tls.as_ref());
        let member = Member::start_by(membership, dialer)?;
        self.host.count_by(member.lease());
        tokio::select! {
            outcome = self.follow(checkpoint, &member) => outcome?,
            Err(refused) = member.ended() => return Err(refused.into()),
        }
        self.drain(&member).await;
        Ok(())
    }

    /// Follows the placement until the node is asked to end.
    async fn follow(&self, checkpoint: Checkpoint, member: &Member) -> Result<(), Error> {
        let residents = Residents::new(checkpoint, self.cfg.dtype, self.cfg.capacity_bytes);
        let mut loading = Loading {
            residents: Some(residents),
            tried: None,
            epoch: 0,
        };
        self.report(member, 0, Err("no placement yet".to_owned()))
            .await;
        let (mut newest, mut active) = (member.placement(), member.active());
        newest.mark_changed();
        loop {
            tokio::select! {
                () = self.shutdown.requested() => return Ok(()),
                Ok(()) = newest.changed() => {}
            }
            // The newest is read first: an active one that came before it is
            // then seen below. It may have been active from its start, for its
            // experts are here when it is what was left of an earlier one.
            let newest = newest.borrow_and_update().clone();
            let active = active.borrow_and_update().clone();
            for placement in [active, newest].into_iter().flatten() {
                // The same epoch comes again when its state changes, and
                // what could not be read once is not tried for it again.
                if loading.tried.is_none_or(|tried| placement.epoch > tried) {
                    self.adopt(&placement, member, &mut loading).await?;
                }
            }
        }
    }

    /// Loads what a placement gives to this node and reports what came of it.
    async fn adopt(
        &self,
        placement: &Placement,
        member: &Member,
        loading: &mut Loading,
    ) -> Result<(), Error> {
        let epoch = placement.epoch;
        let mine = placement
            .nodes
            .iter()
            .find(|node| node.name == self.cfg.name);
        let slots: Vec<ExpertKey> = mine
            .map(|node| {
                node.slots
                    .iter()
                    .map(|slot| (slot.layer, slot.expert))
                    .collect()
            })
            .unwrap_or_default();
        let Some(mut residents) = loading.residents.take() else {
            return Err(failed("loading", &"it was not finished"));
        };
        let first = loading.epoch == 0;
        let watch = Watch {
            member: member.clone(),
            shutdown: self.shutdown.clone(),
            epoch,
            // While an older epoch is served, the node is ready at that one.
            report: first,
        };
        // Reading and widening weights is no work for the async threads.
        let (back, outcome) = on_thread("loading experts", move || {
            let outcome = residents.load(&slots, || watch.superseded(), |now| watch.tell(now));
            (residents, outcome)
        })
        .await?;
        loading.residents = Some(back);
        match outcome {
            Ok(Some(experts)) => {
                tracing::info!(epoch, slots = experts.len(), "resident");
                self.host.publish(epoch, experts);
                let host = Arc::clone(&self.host);
                on_thread("measuring this node", move || host.calibrate()).await?;
                loading.tried = Some(epoch);
                loading.epoch = epoch;
                self.report(member, epoch, Ok(())).await;
            }
            Ok(None) => tracing::info!(epoch, "no longer wanted"),
            // A checkpoint that cannot be read is for whoever started the node to mend; a node that
            // already serves an epoch goes on serving it and says what it could not load.
            Err(error @ LoadError::Expert { .. }) if first => {
                member.leave().await;
                return Err(error.into());
            }
            Err(error) => {
                let reason = describe(epoch, &error);
                tracing::error!("{reason}");
                loading.tried = Some(epoch);
                self.report(member, loading.epoch, Err(reason)).await;
            }
        }
        Ok(())
    }

    /// Tells the coordinator and those who ask for health.
    async fn report(&self, member: &Member, epoch: u64, state: Result<(), String>) {
        let ready = state.is_ok();
        member.set_state(NodeState {
            epoch,
            ready,
            reason: state.err().unwrap_or_default(),
            failed: None,
        });
        self.health.set_serving(SERVICE_NAME, ready).await;
        self.health.set_serving("", ready).await;
    }

    /// Leaves, so that others take over, and stays until nobody sends rows.
    async fn drain(&self, member: &Member) {
        tracing::info!(limit = ?self.cfg.drain, "draining");
        self.health.set_serving(SERVICE_NAME, false).await;
        self.health.set_serving("", false).await;
        let limit = Instant::now() + self.cfg.drain;
        member.leave().await;
        while !self.host.is_quiet(QUIET) {
            if Instant::now() >= limit {
                tracing::warn!("drain limit reached while rows still come");
                return;
            }
            sleep(QUIET_POLL).await;
        }
    }
}

/// What a load listens to and whom it tells.
struct Watch {
    member: Member,
    shutdown: Shutdown,
    epoch: u64,
    report: bool,
}

impl Watch {
    fn superseded(&self) -> bool {
        let newest = self.member.placement();
        let newer = newest
            .borrow()
            .as_ref()
            .is_some_and(|p| p.epoch > self.epoch);
        newer || self.shutdown.is_requested()
    }

    fn tell(&self, now: Progress) {
        let Progress {
            done,
            wanted,
            bytes,
        } = now;
        let percent = |done: usize| done * 100 / wanted.max(1) / PROGRESS_PERCENT;
        if percent(done) == percent(done - 1) {
            return;
        }
        tracing::info!(epoch = self.epoch, done, wanted, bytes, "loading experts");
        if self.report && done < wanted {
            self.member.set_state(NodeState {
                epoch: 0,
                ready: false,
                reason: format!("loading epoch {}: {done} of {wanted} experts", self.epoch),
                failed: None,
            });
        }
    }
}

fn describe(epoch: u64, error: &LoadError) -> String {
    format!("cannot load epoch {epoch}: {error}")
}

fn failed(what: &'static str, reason: &dyn std::fmt::Display) -> Error {
    Error::Task {
        what,
        reason: reason.to_string(),
    }
}

/// Runs `work` on a thread of its own: it may take minutes, and the end of the
/// process need not wait for it.
async fn on_thread<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("guild-loader".to_owned())
        .spawn(move || {
            // Nobody waits any more when the node ends early.
            let _ = done.send(work());
        })
        .map_err(|error| failed(what, &error))?;
    result
        .await
        .map_err(|_| failed(what, &"it has panicked, see the log"))
}
