//! The one place where the membership meets the clock: every event goes through
//! [`ClusterState::with`], which carries out what follows from it.

mod leading;
mod load;
mod rebalance;
mod wire;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guild_node::store::{Leader, Validity};
use guild_scheduler::membership::{
    Action, Loss, Membership, MigrationStatus, Outcome, Settings, Snapshot,
};
use guild_scheduler::placement::NodeId;
use tokio::sync::{broadcast, watch};

use crate::Rebalance;

pub(crate) use leading::NotLeading;
use load::LoadBook;
pub(crate) use rebalance::RebalanceError;
pub(crate) use wire::Placements;

/// Shortest lease: heartbeats cannot be kept much below a third of it.
pub(crate) const MIN_LEASE: Duration = Duration::from_millis(100);
/// Longest lease that still deserves the name.
pub(crate) const MAX_LEASE: Duration = Duration::from_secs(600);
/// How often time is told to the membership, at most and at least.
const TICK: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));
/// Ticks that may be missed before this process counts as having been frozen.
const FROZEN_TICKS: u32 = 4;
/// Losses that a slow listener may miss; it then looks at the membership itself.
const LOSSES: usize = 256;
/// What the cluster waits for while nobody has ever led it.
const LEADERLESS: &str = "waiting for a coordinator to lead";
/// What the cluster waits for once it is shutting down.
const DRAINING: &str = "the coordinator is shutting down";

/// The membership, its clock, and those who follow it.
pub(crate) struct ClusterState {
    inner: Mutex<Inner>,
    settings: Settings,
    tick: Duration,
    pub(crate) lease: Duration,
    pub(crate) model: String,
    pub(crate) digest: String,
    /// What nodes are told: written to the store before.
    placements: watch::Sender<Placements>,
    proposal: watch::Sender<Option<leading::Proposal>>,
    leads: watch::Sender<bool>,
    /// What is being waited for; None: ready.
    waiting_for: watch::Sender<Option<String>>,
    lost: broadcast::Sender<NodeId>,
    /// What attention nodes report to this coordinator while it leads.
    pub(crate) load: LoadBook,
    rebalance: Rebalance,
    /// One plan at a time: it takes a core and a copy of all that is known.
    planning: tokio::sync::Mutex<()>,
    /// As the leader sees it.
    migration: watch::Sender<MigrationStatus>,
}

struct Inner {
    /// The leader's own; what it has written, with the others.
    membership: Membership,
    /// What the store holds of it, as far as is known.
    written: Option<Arc<Snapshot>>,
    clock: Clock,
    draining: bool,
    /// None: it follows.
    leading: Option<Validity>,
    /// Whom this coordinator follows.
    leader: Option<Leader>,
    /// How its own leadership has ended, if it has.
    deposed: Option<String>,
    /// Epochs that the log has, and whether as active.
    announced: Vec<(u64, bool)>,
}

impl Inner {
    /// Whether nobody else can lead now.
    fn leads(&self) -> bool {
        self.leading.as_ref().is_some_and(Validity::holds)
    }

    /// Logs what the placements are, once each.
    fn announce(&mut self) {
        let membership = &self.membership;
        let all = [membership.active(), membership.next()];
        let mut now = Vec::new();
        for published in all.into_iter().flatten() {
            let epoch = published.placement.epoch();
            now.push((epoch, published.active));
            if self.announced.contains(&(epoch, published.active)) {
                continue;
            }
            tracing::info!(
                epoch,
                active = published.active,
                nodes = published.nodes.len(),
                homes = published.placement.homes(),
                "placement"
            );
            let (wanted, has) = membership.redundancy();
            if published.active && has < wanted && !self.draining {
                tracing::warn!(
                    wanted,
                    has,
                    "experts have fewer copies than --replicas asks for: more expert nodes or memory would help"
                );
            }
        }
        self.announced = now;
    }
}

/// Time in which this process runs. While it is frozen it hears nobody, so nobody's silence
/// counts.
struct Clock {
    /// Of the last look.
    at: Instant,
    /// Then.
    time: Duration,
    /// More than that between two looks was spent frozen.
    most: Duration,
}

impl Clock {
    fn now(&mut self) -> Duration {
        let at = Instant::now();
        self.time += (at - self.at).min(self.most);
        self.at = at;
        self.time
    }
}

impl ClusterState {
    pub(crate) fn new(
        settings: Settings,
        model: String,
        digest: String,
        rebalance: Rebalance,
    ) -> Arc<ClusterState> {
        let tick = (settings.lease / 8)
            .min(settings.settle / 4)
            .clamp(TICK.0, TICK.1);
        let load = LoadBook::new(&settings.layers, settings.experts);
        let state = ClusterState {
            tick,
            lease: settings.lease,
            settings: settings.clone(),
            model,
            digest,
            inner: Mutex::new(Inner {
                membership: Membership::new(settings, Duration::ZERO),
                written: None,
                clock: Clock {
                    at: Instant::now(),
                    time: Duration::ZERO,
                    most: tick * FROZEN_TICKS,
                },
                draining: false,
                leading: None,
                leader: None,
                deposed: None,
                announced: Vec::new(),
            }),
            placements: watch::Sender::new(Placements::default()),
            proposal: watch::Sender::new(None),
            leads: watch::Sender::new(false),
            waiting_for: watch::Sender::new(Some("starting".to_owned())),
            lost: broadcast::Sender::new(LOSSES),
            load,
            rebalance,
            planning: tokio::sync::Mutex::default(),
            migration: watch::Sender::default(),
        };
        state.with(|_, _| ());
        Arc::new(state)
    }

    /// Runs `event` on the membership at the present time and carries out what
    /// follows.
    pub(crate) fn with<R>(&self, event: impl FnOnce(&mut Membership, Duration) -> R) -> R {
        self.with_inner(|inner, now| event(&mut inner.membership, now))
    }

    fn with_inner<R>(&self, event: impl FnOnce(&mut Inner, Duration) -> R) -> R {
        // A panic elsewhere must not take the cluster down with it: the
        // membership is consistent between its own calls.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = inner.clock.now();
        let result = event(&mut inner, now);
        for action in inner.membership.take_actions() {
            self.carry_out(&mut inner, action);
        }
        self.migration.send_if_modified(|known| {
            let now = inner.membership.migration();
            let news = inner.leads() && known != now;
            if news {
                known.clone_from(now);
            }
            news
        });
        let unled = inner.leading.is_none() && inner.leader.is_none();
        let waiting = match inner.draining {
            true => Some(DRAINING.to_owned()),
            false if unled && inner.membership.active().is_none() => Some(LEADERLESS.to_owned()),
            false => inner.membership.waiting_for(),
        };
        // Still under the lock, so that the last word is the newest.
        self.waiting_for.send_if_modified(|known| {
            if *known == waiting {
                return false;
            }
            match &waiting {
                Some(reason) => tracing::info!("not ready: {reason}"),
                None => tracing::info!(
                    epoch = inner.membership.active_epoch(),
                    "ready: the cluster can serve"
                ),
            }
            *known = waiting;
            true
        });
        result
    }

    fn carry_out(&self, inner: &mut Inner, action: Action) {
        match action {
            Action::Publish => {
                inner.announce();
                self.propose(inner);
            }
            Action::StepBegun {
                migration,
                epoch,
                copies,
            } => tracing::info!(migration, epoch, copies, "a step of a migration is loading"),
            Action::StepPublished { migration, epoch } => {
                tracing::info!(migration, epoch, "a step of a migration is active");
            }
            Action::Withdrawn { epoch, reason } => {
                tracing::warn!(epoch, "an epoch is withdrawn: {reason}");
            }
            Action::Freed { oldest_epoch } => {
                tracing::info!(oldest_epoch, "earlier epochs are no longer used");
            }
            Action::MigrationEnded { migration, outcome } => match outcome {
                Outcome::Completed => tracing::info!(migration, "a migration is complete"),
                Outcome::RolledBack(reason) => {
                    tracing::warn!(migration, "a migration was rolled back: {reason}");
                }
            },
            Action::Joined { node, name } => tracing::info!(node, name, "a node has joined"),
            Action::Lost { node, name, how } => {
                match how {
                    Loss::Left => tracing::info!(node, name, "a node has left"),
                    Loss::Silent => tracing::warn!(
                        node,
                        name,
                        "a node has been silent for its whole lease and is taken for dead"
                    ),
                    Loss::Gone => tracing::warn!(
                        node,
                        name,
                        "a node has hung up, was not heard of since, and is taken for dead"
                    ),
                    Loss::Replaced => {
                        tracing::info!(node, name, "a new process has taken a node's name");
                    }
                }
                self.load.forget(node);
                // Nobody listening is fine: nothing is running then.
                let _ = self.lost.send(node);
            }
        }
    }

    /// The placements that hold and every change of them.
    pub(crate) fn placements(&self) -> watch::Receiver<Placements> {
        self.placements.subscribe()
    }

    /// What the cluster waits for and every change of it.
    pub(crate) fn waiting_for(&self) -> watch::Receiver<Option<String>> {
        self.waiting_for.subscribe()
    }

    /// The migration under way, or the last one, and every change of it.
    pub(crate) fn migration(&self) -> watch::Receiver<MigrationStatus> {
        self.migration.subscribe()
    }

    /// Completes when `node` is no longer a member.
    pub(crate) async fn lost(&self, node: NodeId) {
        let mut losses = self.lost.subscribe();
        loop {
            // Also covers what was missed: before subscribing, or by lagging.
            if self.with(|membership, _| membership.node(node).is_none()) {
                return;
            }
            while let Ok(lost) = losses.recv().await {
                if lost == node {
                    return;
                }
            }
        }
    }

    /// From now on the cluster is not ready, whatever its nodes say.
    pub(crate) fn begin_drain(&self) {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .draining = true;
        self.with(|_, _| ());
    }

    /// Tells the membership of the leader the time, for ever, and notes what has
    /// changed of its nodes.
    pub(crate) async fn keep_time(&self) {
        let mut interval = tokio::time::interval(self.tick);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.with_inner(|inner, now| {
                if inner.leads() {
                    self.load.tick(now);
                    inner.membership.tick(now);
                    self.propose(inner);
                }
            });
        }
    }
}
