//! The life of an expert node: open, join, load what the placement says, drain.
//!
//! Secret: the order of these and what the outside is told meanwhile. The node
//! is ready at an epoch when every expert that the epoch gives it is resident;
//! it goes on serving an epoch while it loads the next one.

mod loading;
mod news;

use std::{collections::HashMap, convert::Infallible, pin::pin, sync::Arc, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use guild_model::{Checkpoint, Cpu, expert::Expert};
use guild_node::{
    Shutdown,
    channel::Dialer,
    failpoint,
    member::{Measured, Member, MemberConfig, NodeState},
    metrics::{MetricsPort, Page},
    serve::{Health, Server},
    tls,
};
use guild_proto::{
    cluster::v1::{Placement, Role},
    experts::v1::experts_server::SERVICE_NAME,
};
use guild_transport::{LinkLimits, Links, ServiceLimits, SlotHost, Switchboard, service};
use tokio::{
    net::TcpListener,
    runtime, select,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use self::{
    loading::Loading,
    news::{News, Published},
};
use crate::{
    Error, ExpertNodeConfig,
    copy::{COPIES, Copier},
    freeing::Freeing,
    host::Host,
    residents::{ExpertKey, LoadError, Residents},
    scrub::scrub,
    thread,
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
/// Connections that experts came by are kept for so long: one migration may be many placements,
/// and making a connection is a burst of work at both ends.
const PART_AFTER: Duration = Duration::from_secs(60);
/// How often this node looks at its memory and its speed.
const MEASURE_EVERY: Duration = Duration::from_secs(1);

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
    let host = Host::new(&cfg.name, width, cpu.clone()).merging(cfg.merging.clone());
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
    let residents = Residents::new(checkpoint.clone(), cfg.dtype, cfg.capacity_bytes);
    let residents = Arc::new(residents);
    let page = page(&cfg.model_name, &host, &residents);
    let server = server.measured_at(MetricsPort::at(cfg.metrics.clone(), page));
    let health = server.health();
    health.set_serving(SERVICE_NAME, false).await;
    // Not a child of `shutdown`: rows are served while the node drains.
    let down = Shutdown::new();
    let serving = server.run(listener, down.clone(), LAST_WORDS);
    let mut serving = AbortOnDropHandle::new(tokio::spawn(serving));
    let attached = switchboard
        .clone()
        .map(|board| Attached::new(board, &cfg.name, &host));

    let freeing = Arc::new(Freeing::new(Arc::clone(host.pace())));
    let copier = Copier {
        name: cfg.name.clone(),
        process: cfg.process.clone(),
        from: cfg.copy_from,
        residents: Arc::clone(&residents),
        pace: Arc::clone(host.pace()),
        freeing: Arc::clone(&freeing),
        cpu,
        width,
        links: Arc::new(links(&cfg)),
        board: switchboard,
    };
    let node = Node {
        residents,
        freeing,
        copier,
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
            Ok(Ok(())) => Error::task("the server", &"it ended early"),
            Err(error) => Error::task("the server", &error),
        }),
    };
    drop(attached);
    closing.cancel();
    down.trigger();
    // What is not said by then is cut with the task.
    let _ = timeout(2 * LAST_WORDS, &mut serving).await;
    outcome
}

/// Writes what this node says to Prometheus.
fn page(
    model: &str,
    host: &Arc<Host>,
    residents: &Arc<Residents>,
) -> impl Fn() -> Page + Send + Sync + 'static {
    let (model, host, residents) = (model.to_owned(), Arc::clone(host), Arc::clone(residents));
    move || {
        let mut page = Page::of(&model);
        host.write(&mut page);
        page.gauge(
            "guild_expert_resident_experts",
            "Experts in memory, those of every epoch.",
            residents.len(),
        );
        page.gauge(
            "guild_expert_resident_bytes",
            "Bytes of these.",
            residents.bytes(),
        );
        if let Some(free) = residents.free_bytes() {
            page.gauge(
                "guild_expert_free_bytes",
                "Bytes that further experts may take.",
                free,
            );
        }
        page.counters(
            "guild_expert_copies_total",
            "Experts that have come, by where from.",
            "from",
            residents.come(),
        );
        page
    }
}

/// Nobody yet: whom experts are copied from.
fn links(cfg: &ExpertNodeConfig) -> Links {
    let dialer = Dialer::to(tls::Role::TAKING_ROWS, cfg.tls.as_ref());
    let runtime = runtime::Handle::current();
    Links::new(&cfg.name, LinkLimits::default(), runtime).dialling(Arc::new(move |endpoint| {
        let dialer = dialer.clone();
        Box::pin(async move { dialer.connect(endpoint).await })
    }))
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
    residents: Arc<Residents>,
    freeing: Arc<Freeing>,
    copier: Copier,
    health: Health,
    shutdown: Shutdown,
}

impl Node {
    /// From an open checkpoint to the end.
    async fn live(&self, checkpoint: Checkpoint) -> Result<(), Error> {
        let hashed = checkpoint.clone();
        let digest = select! {
            digest = thread::alone("the checkpoint's digest", move || hashed.digest()) => digest??,
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
            duty: Default::default(),
        };
        let dialer = Dialer::to(tls::Role::COORDINATING, self.cfg.tls.as_ref());
        let member = Member::start_by(membership, dialer)?;
        self.host.count_by(member.lease());
        select! {
            outcome = self.follow(&member) => outcome?,
            Err(refused) = member.ended() => return Err(refused.into()),
            never = self.keep_measuring(&member) => match never {},
            Err(damaged) = scrub(&self.residents, self.host.pace()) => {
                tracing::error!("{damaged}");
                // What has been answered from it cannot be taken back; nothing more is.
                member.leave().await;
                return Err(damaged);
            }
        }
        self.drain(&member).await;
        Ok(())
    }

    /// Tells the coordinator, again and again, what this node holds and can do.
    async fn keep_measuring(&self, member: &Member) -> Infallible {
        loop {
            self.measure(member);
            sleep(MEASURE_EVERY).await;
            if self.host.is_to_be_calibrated_again() {
                let host = Arc::clone(&self.host);
                let again = thread::spawn_behind("measuring this node again", move || {
                    host.calibrate_again();
                });
                if let Err(error) = again {
                    tracing::debug!("not measured again: {error}");
                }
            }
        }
    }

    fn measure(&self, member: &Member) {
        member.set_measured(Measured {
            rows_per_second: self.host.rows_per_second().unwrap_or(0.0),
            resident_bytes: self.residents.bytes(),
            free_bytes: self.residents.free_bytes(),
        });
    }

    /// Follows the placement until the node is asked to end.
    async fn follow(&self, member: &Member) -> Result<(), Error> {
        let mut news = News {
            newest: member.placement(),
            active: member.active(),
        };
        let mut loading = Loading::default();
        let state = Err("no placement yet".to_owned());
        self.report(member, &loading, state).await;
        loop {
            let published = news.look();
            self.let_go(&published, member, &mut loading).await;
            // The same epoch comes again when its state changes, and what could
            // not be read is not tried for that. One may be active from
            // its start: its experts are here when it is what an earlier one left.
            let untried = |placement: &&Arc<Placement>| {
                loading.tried.is_none_or(|tried| placement.epoch > tried)
            };
            if let Some(placement) = published.all().find(untried).cloned() {
                self.adopt(&placement, &published, member, &mut loading, &mut news)
                    .await?;
                if self.shutdown.is_requested() {
                    return Ok(());
                }
                continue;
            }
            // What was copied for a placement that was withdrawn.
            if !loading.spare.is_empty() {
                self.free(&mut loading.spare);
            }
            let retry = loading.retry_at(published.active_epoch());
            select! {
                () = self.shutdown.requested() => return Ok(()),
                () = news.changed() => {}
                () = at(retry) => loading.tried = None,
                () = at(loading.part_at) => {
                    loading.part_at = None;
                    self.copier.part();
                }
            }
        }
    }

    /// Drops the tables that nobody sends rows by: those that all have left, and those that were
    /// withdrawn or superseded before they were active.
    async fn let_go(&self, published: &Published, member: &Member, loading: &mut Loading) {
        self.retire(published);
        if loading.epoch > 0 && !self.host.epochs().contains(&loading.epoch) {
            loading.epoch = self.host.epochs().last().copied().unwrap_or(0);
            let state = match loading.epoch {
                0 => Err("the placement was withdrawn".to_owned()),
                _ => Ok(()),
            };
            self.report(member, loading, state).await;
        }
        self.measure(member);
    }

    fn retire(&self, published: &Published) {
        let Some(active) = &published.active else {
            return;
        };
        let epochs = self.host.epochs();
        // What is left of an earlier placement is in older tables alone until it is taken from them.
        if !epochs.contains(&active.epoch) {
            return;
        }
        let oldest = active.oldest_epoch.min(active.epoch);
        let gone: Vec<u64> = epochs
            .into_iter()
            .filter(|&epoch| epoch < oldest || epoch > active.epoch && !published.has(epoch))
            .collect();
        if gone.is_empty() {
            return;
        }
        if let Err(fired) = failpoint::at("epoch::free") {
            tracing::warn!(?gone, %fired, "not freed");
            return;
        }
        let mut left = self.host.forget_before(oldest);
        for &epoch in &gone {
            left.extend(self.host.withdraw(epoch));
        }
        self.freeing.free(left);
        tracing::info!(epochs = ?gone, resident_bytes = self.residents.bytes(), "freed");
    }

    /// Lets go of what has been made resident in vain.
    fn free(&self, spare: &mut HashMap<ExpertKey, Arc<Expert>>) {
        let experts = spare.drain().map(|(_, expert)| expert);
        self.freeing.free(experts.collect());
    }

    /// Loads what a placement gives to this node and reports what came of it.
    async fn adopt(
        &self,
        placement: &Placement,
        published: &Published,
        member: &Member,
        loading: &mut Loading,
        news: &mut News,
    ) -> Result<(), Error> {
        let epoch = placement.epoch;
        let mine = placement
            .nodes
            .iter()
            .find(|node| node.name == self.cfg.name);
        let slots: Vec<ExpertKey> = mine
            .map(|node| {
                let keys = node.slots.iter().map(|slot| (slot.layer, slot.expert));
                keys.collect()
            })
            .unwrap_or_default();
        let first = loading.epoch == 0;
        let progress = Progress {
            member: member.clone(),
            epoch,
            // While an older epoch is served, the node is ready at that one.
            report: first,
        };
        loading.part_at = Some(Instant::now() + PART_AFTER);
        let outcome = {
            let spare = &mut loading.spare;
            let mut loads = pin!(self.load(epoch, &slots, published, spare, progress));
            loop {
                select! {
                    outcome = &mut loads => break outcome,
                    () = self.shutdown.requested() => return Ok(()),
                    () = news.changed() => {
                        let published = news.look();
                        self.retire(&published);
                        if !published.has(epoch) {
                            tracing::info!(epoch, "no longer wanted");
                            return Ok(());
                        }
                    }
                }
            }
        };
        let outcome = outcome.and_then(|experts| {
            failpoint::at("epoch::resident").map_err(LoadError::from)?;
            Ok(experts)
        });
        loading.tried = Some(epoch);
        self.free(&mut loading.spare);
        match outcome {
            Ok(experts) => {
                tracing::info!(epoch, slots = experts.len(), "resident");
                self.freeing.free(self.host.publish(epoch, experts));
                let host = Arc::clone(&self.host);
                thread::alone("measuring this node", move || host.calibrate()).await?;
                loading.succeeded(epoch);
                self.measure(member);
                self.report(member, loading, Ok(())).await;
            }
            // A checkpoint that cannot be read is for whoever started the node to mend; a node that
            // already serves an epoch goes on serving it and says what it could not load.
            Err(Error::Load(error @ LoadError::Expert { .. })) if first => {
                member.leave().await;
                return Err(error.into());
            }
            Err(Error::Load(error)) => {
                let reason = format!("cannot load epoch {epoch}: {error}");
                tracing::error!("{reason}");
                // Rows come by the active placement: without it, nothing older helps.
                let serves = !first && published.active_epoch() != epoch;
                let state = if serves { Ok(()) } else { Err(reason.clone()) };
                loading.cannot(epoch, reason);
                self.measure(member);
                self.report(member, loading, state).await;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The experts of `slots`, in that order; those that are not in memory are brought here.
    /// What has come when this is dropped stays in `spare`.
    async fn load(
        &self,
        epoch: u64,
        slots: &[ExpertKey],
        published: &Published,
        spare: &mut HashMap<ExpertKey, Arc<Expert>>,
        progress: Progress,
    ) -> Result<Vec<Arc<Expert>>, Error> {
        let unwanted = spare.extract_if(|key, _| !slots.contains(key));
        self.freeing
            .free(unwanted.map(|(_, expert)| expert).collect());
        // What is to go must not be in the way.
        self.freeing.done().await;
        let missing = self.residents.missing(slots);
        // Held from here on, whatever becomes of the tables they are in.
        for &key in slots {
            if let Some(resident) = self.residents.find(key) {
                spare.insert(key, resident);
            }
        }
        // Where nothing is active nobody sends rows, and a node that has joined again is counted on
        // as if it were empty: its older tables must not be in the way for ever.
        let counted_on = |active: &Placement| {
            let id = progress.member.node_id();
            active.nodes.iter().any(|node| Some(node.node_id) == id)
        };
        match self.residents.check_room(&missing) {
            Err(LoadError::Capacity { .. })
                if !published.active.as_deref().is_some_and(counted_on) =>
            {
                self.freeing.free(self.host.forget_before(epoch));
                self.freeing.done().await;
                self.residents.check_room(&missing)?;
            }
            room => room?,
        }
        let behind = published
            .active
            .as_deref()
            .filter(|active| active.epoch < epoch);
        let homes = self.copier.meet(behind, &missing);
        let wanted = spare.len() + missing.len();
        let mut coming = stream::iter(missing)
            .map(|key| {
                let brought = self.copier.bring(key, epoch, &homes);
                async move { Ok::<_, Error>((key, brought.await?)) }
            })
            .buffer_unordered(COPIES);
        while let Some((key, expert)) = coming.try_next().await? {
            spare.insert(key, expert);
            progress.tell(spare.len(), wanted, self.residents.bytes());
        }
        drop(coming);
        let found = slots.iter().filter_map(|key| spare.get(key).cloned());
        let found: Vec<_> = found.collect();
        match found.len() == slots.len() {
            true => Ok(found),
            false => Err(Error::task("loading", &"an expert was lost on the way")),
        }
    }

    /// Tells the coordinator and those who ask for health.
    async fn report(&self, member: &Member, loading: &Loading, state: Result<(), String>) {
        let ready = state.is_ok();
        member.set_state(NodeState {
            epoch: loading.epoch,
            ready,
            reason: state.err().unwrap_or_default(),
            failed: loading.failed.clone(),
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

/// Completes at a time; never without one.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Whom a load tells how far it has come.
struct Progress {
    member: Member,
    epoch: u64,
    report: bool,
}

impl Progress {
    /// `done` of `wanted` experts are here; all in memory take `bytes`.
    fn tell(&self, done: usize, wanted: usize, bytes: u64) {
        let percent = |done: usize| done * 100 / wanted.max(1) / PROGRESS_PERCENT;
        if percent(done) == percent(done.saturating_sub(1)) {
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
