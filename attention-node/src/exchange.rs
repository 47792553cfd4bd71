//! The exchange of one layer: rows out to their experts, expert rows back.
//!
//! Secret: what is done when an expert cannot be reached. Routes are logical; they are resolved
//! by the newest placement at every attempt. Each node gets its part in a message of its own:
//! a part that fails, is silent or takes much longer than the other parts do goes to other homes
//! of its experts at once, while the rows of all other parts stay; the first answer for a row
//! counts, and any is as good, because homes compute the same bits. Without another home the part is repeated until the exchange's
//! deadline, or until the coordinator says that there will be none. Either every row comes back or the exchange fails with its origin named: there is
//! no partial result that anybody could sum. It must not know what a request is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use guild_model::gate::Routes;
use guild_model::workspace::Buffer;
use guild_transport::{
    Assignment, Batch, ExchangeCode, ExchangeError, Fabric, Handle, NodeId, Returned,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::peers::{Out, Peers, Plan, Trust, Wanted};
use crate::view::View;

mod fault;
mod late;
#[cfg(test)]
mod tests;

pub use fault::ExchangeFailure;
use fault::Fault;

pub use crate::peers::{ExchangeCounters, SUSPECT_AFTER};

/// How long one layer's exchange may take in all, retries included, unless configured.
pub const EXCHANGE_DEADLINE: Duration = Duration::from_secs(10);
/// Pause before the first retry; it doubles up to [`BACKOFF_MAX`]. A new placement ends it early.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// The longest pause between two attempts.
pub const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// How much longer than the deadline a fabric may take to say which node was silent.
const SILENCE_GRACE: Duration = Duration::from_millis(250);

/// How long expert nodes are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// One layer's exchange in all, retries included, before its requests fail.
    pub deadline: Duration,
    /// One node's answer, at least, before the node is suspected; more where it usually takes
    /// long. Other homes of its experts are asked as soon as it is later than nodes usually are.
    pub suspect_after: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            deadline: EXCHANGE_DEADLINE,
            suspect_after: SUSPECT_AFTER,
        }
    }
}

/// The newest ACTIVE placement; `None` before the first.
pub type Views = watch::Receiver<Option<Arc<View>>>;

/// Sends rows to experts wherever they are.
pub(crate) struct Exchange<F> {
    fabric: Arc<F>,
    views: Views,
    deadline: Duration,
    peers: Arc<Peers>,
}

/// Rows of one layer that are away.
pub(crate) struct Away<'a, F> {
    exchange: &'a Exchange<F>,
    layer: usize,
    /// `[n, hidden]`, after the layer's norm.
    x: Buffer,
    routes: Routes,
    /// When all rows had been sent for the first time.
    sent: Instant,
    /// When the last answer that brought something came.
    last: Option<Instant>,
    deadline: Instant,
    /// `[n * top_k, hidden]` in the order of the routes; a target is an index into its rows.
    rows: Vec<f32>,
    state: Vec<Target>,
    /// Targets without their row.
    missing: usize,
    parts: Vec<Part>,
    answers: FuturesUnordered<BoxFuture<'static, Answer>>,
    /// Nodes that have failed since the last pause: not tried again before the next one.
    failed: BTreeSet<NodeId>,
    attempts: u32,
    epoch: u64,
    fault: Fault,
}

/// Rows of one layer that are back.
pub(crate) struct Back {
    /// Where they were.
    pub(crate) routes: Routes,
    /// `[n * top_k, hidden]` in the order of the routes.
    pub(crate) rows: Vec<f32>,
    /// From when all had been sent until the last came; nothing where all experts are in this process.
    pub(crate) away: Duration,
    /// When the last came.
    pub(crate) last: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Target {
    here: bool,
    /// Parts under way that would bring it.
    parts: u32,
}

/// What one node was asked for in one message.
struct Part {
    node: NodeId,
    /// What it was sent by. A placement is in use for as long as parts of it are away.
    view: Arc<View>,
    /// By which the peers know the message.
    number: u64,
    targets: Vec<u32>,
    /// Neither answered, nor failed, nor given up.
    open: bool,
    /// When it is late enough for others to be asked, too; None: they were, or nobody knows.
    late_at: Option<Instant>,
    /// When its node is suspected; None: it is.
    suspect_at: Option<Instant>,
}

impl Part {
    fn name(&self) -> &str {
        self.view.name(self.node).unwrap_or_default()
    }
}

struct Answer {
    part: usize,
    out: Out,
    returned: Result<Returned, ExchangeError>,
}

impl<F: Fabric + 'static> Exchange<F> {
    pub(crate) fn new(fabric: Arc<F>, views: Views, patience: Patience) -> Self {
        Self {
            fabric,
            views,
            deadline: patience.deadline,
            peers: Arc::new(Peers::new(patience.suspect_after)),
        }
    }

    pub(crate) fn counters(&self) -> &Arc<ExchangeCounters> {
        self.peers.counters()
    }

    /// Sends every row of `x` to its experts and returns at once; [`Away::combine`] waits.
    /// Must be called in a runtime.
    pub(crate) fn dispatch(&self, layer: usize, x: Buffer, routes: Routes) -> Away<'_, F> {
        let targets = routes.experts.len();
        let now = Instant::now();
        let mut away = Away {
            exchange: self,
            layer,
            rows: vec![0.0; routes.top_k * x.len()],
            x,
            routes,
            sent: now,
            last: None,
            deadline: now + self.deadline,
            state: vec![Target::default(); targets],
            missing: targets,
            parts: Vec::new(),
            answers: FuturesUnordered::new(),
            failed: BTreeSet::new(),
            attempts: 1,
            epoch: 0,
            fault: Fault::retryable("no answer before the deadline"),
        };
        away.send((0..targets as u32).collect());
        away.probe();
        away.sent = Instant::now();
        away
    }
}

impl<F: Fabric + 'static> Away<'_, F> {
    /// What was sent: `[n, hidden]`, after the layer's norm.
    pub(crate) fn x(&self) -> &[f32] {
        &self.x
    }

    /// Waits for the rows. Faults that may pass (a lost connection, an unknown epoch, overload)
    /// are retried by the newest placement until the deadline.
    pub(crate) async fn combine(mut self) -> Result<Back, ExchangeFailure> {
        // What came while others computed is here, however long ago the deadline was.
        while let Some(Some(answer)) = self.answers.next().now_or_never() {
            self.take(answer);
        }
        let mut views = self.exchange.views.clone();
        views.mark_changed();
        let mut views_end = false;
        let mut backoff = BACKOFF_FIRST;
        let mut retry_at = None;
        while self.missing > 0 {
            let now = Instant::now();
            // A fabric gets a little longer to say which node was silent.
            let end = match self.answers.is_empty() {
                true => self.deadline,
                false => self.deadline + SILENCE_GRACE,
            };
            let stranded = self.is_stranded();
            if let Some(view) = self.view().filter(|_| stranded)
                && let Some(reason) = view.lost()
            {
                self.fault.retryable = false;
                reason.clone_into(&mut self.fault.message);
            }
            if !self.fault.retryable || now >= end {
                return Err(self.failure());
            }
            if retry_at.is_none() && now < self.deadline && stranded {
                tracing::warn!(
                    layer = self.layer,
                    epoch = self.epoch,
                    node = self.fault.node,
                    attempts = self.attempts,
                    "expert rows are late, trying again: {}",
                    self.fault.message
                );
                retry_at = Some(now + backoff);
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
            let wake = [retry_at, self.overdue_at()]
                .into_iter()
                .flatten()
                .fold(end, Instant::min);
            tokio::select! {
                biased;
                Some(answer) = self.answers.next(), if !self.answers.is_empty() => self.take(answer),
                changed = views.changed(), if !views_end => {
                    // Nobody will publish another placement: only answers and the deadline count.
                    views_end = changed.is_err();
                    let news = views.borrow_and_update().as_ref().map(|view| view.epoch());
                    if news.is_some_and(|epoch| epoch != self.epoch) {
                        self.leave_the_gone();
                        self.retry();
                        retry_at = None;
                    }
                }
                () = sleep_until(wake) => {
                    let now = Instant::now();
                    self.hedge(now);
                    if retry_at.is_some_and(|at| at <= now) {
                        self.retry();
                        retry_at = None;
                    }
                }
            }
        }
        self.hear_the_late();
        let away = self
            .last
            .map(|last| last.saturating_duration_since(self.sent));
        Ok(Back {
            routes: self.routes,
            rows: self.rows,
            away: away.unwrap_or_default(),
            last: self.last,
        })
    }

    fn view(&self) -> Option<Arc<View>> {
        self.exchange.views.borrow().clone()
    }

    fn is_stranded(&self) -> bool {
        self.state
            .iter()
            .any(|target| !target.here && target.parts == 0)
    }

    /// Sends again what nobody is about to bring, by the newest placement.
    fn retry(&mut self) {
        self.failed.clear();
        let stranded = (0u32..).zip(&self.state);
        let stranded = stranded.filter(|(_, target)| !target.here && target.parts == 0);
        let stranded: Vec<u32> = stranded.map(|(at, _)| at).collect();
        if !stranded.is_empty() {
            self.attempts += 1;
            self.send(stranded);
        }
    }

    /// Sends targets to their best homes, and to the next best while those fail at once. What
    /// has no home left is stranded until the next retry.
    fn send(&mut self, mut targets: Vec<u32>) {
        let Some(view) = self.view() else {
            self.fault = Fault::retryable("no placement is active yet");
            return;
        };
        if self.epoch != view.epoch() {
            self.epoch = view.epoch();
            self.exchange.peers.retain(&view);
        }
        while !targets.is_empty() {
            let wanted = self.with_experts(&targets);
            let homeless = wanted.iter().find(|(_, expert)| {
                let homes = view.resolve(self.layer as u32, *expert);
                homes.is_empty()
            });
            if let Some(&(_, expert)) = homeless {
                self.fault = Fault {
                    experts: vec![expert],
                    ..Fault::retryable("the expert has no home in the present placement")
                };
            }
            let plan = self.choose(&view, &wanted, &self.failed, Trust::Suspected);
            let mut parts: Vec<_> = plan.into_iter().collect();
            // Nodes of this process work while they are sent to: the others begin before.
            parts.sort_by_key(|(node, _)| self.exchange.fabric.is_here(*node));
            targets.clear();
            for (node, part) in parts {
                if let Err(error) = self.post(&view, node, &part) {
                    targets.extend(part.iter().map(|&(target, _)| target));
                    self.blame(node, error);
                }
            }
        }
    }

    fn with_experts(&self, targets: &[u32]) -> Vec<(u32, u32)> {
        let expert = |&target: &u32| (target, self.routes.experts[target as usize]);
        targets.iter().map(expert).collect()
    }

    /// Homes for pairs of a target and its expert, outside `avoid` and trusted at least so far.
    fn choose(
        &self,
        view: &View,
        targets: &[(u32, u32)],
        avoid: &BTreeSet<NodeId>,
        least: Trust,
    ) -> Plan {
        let (plan, _) = self.exchange.peers.choose(&Wanted {
            view,
            layer: self.layer as u32,
            targets,
            avoid,
            least,
            near: &|node| self.exchange.fabric.is_here(node),
        });
        plan
    }

    /// Sends one message. `part` has targets and their slots at the node.
    fn post(
        &mut self,
        view: &Arc<View>,
        node: NodeId,
        part: &[(u32, u32)],
    ) -> Result<(), ExchangeError> {
        let peers = &self.exchange.peers;
        let out = peers.send(view, node, part.len());
        let sent = Instant::now();
        let handle = self.hand_over(view, node, part)?;
        let rows = part.len() as u64;
        let late_after = peers.late_after(node, rows);
        let suspect_after = peers.suspect_after(node, rows);
        if self.exchange.fabric.is_here(node) {
            let local = &peers.counters().local;
            local.fetch_add(1, Ordering::Relaxed);
        }
        let index = self.parts.len();
        for &(target, _) in part {
            self.state[target as usize].parts += 1;
        }
        self.parts.push(Part {
            node,
            view: Arc::clone(view),
            number: out.number(),
            targets: part.iter().map(|&(target, _)| target).collect(),
            open: true,
            late_at: late_after.map(|after| sent + after),
            suspect_at: Some(sent + suspect_after),
        });
        let fabric = Arc::clone(&self.exchange.fabric);
        let answer = async move {
            Answer {
                part: index,
                returned: fabric.combine(handle).await,
                out,
            }
        };
        self.answers.push(answer.boxed());
        Ok(())
    }

    fn hand_over(
        &self,
        view: &View,
        node: NodeId,
        part: &[(u32, u32)],
    ) -> Result<Handle, ExchangeError> {
        let top_k = self.routes.top_k as u32;
        let assignments = part.iter().map(|&(target, slot)| Assignment {
            row: target / top_k,
            node,
            slot,
        });
        self.exchange.fabric.dispatch(Batch {
            epoch: view.epoch(),
            width: self.x.len() / self.routes.rows().max(1),
            rows: &self.x,
            assignments: &assignments.collect::<Vec<_>>(),
            deadline: Some(self.deadline.into_std()),
        })
    }

    /// Takes in what a node has answered.
    fn take(&mut self, answer: Answer) {
        let Answer {
            part,
            out,
            returned,
        } = answer;
        let was_open = self.close(part);
        let Part { node, targets, .. } = &self.parts[part];
        let (node, width) = (*node, self.x.len() / self.routes.rows().max(1));
        match returned {
            Ok(returned) if returned.rows.len() == targets.len() * width => {
                self.last = self.last.max(Some(returned.arrived));
                out.answered(returned.arrived);
                for (row, &target) in returned.rows.chunks_exact(width).zip(targets) {
                    let state = &mut self.state[target as usize];
                    if !state.here {
                        state.here = true;
                        self.missing -= 1;
                        let at = target as usize * width;
                        self.rows[at..at + width].copy_from_slice(row);
                    }
                }
            }
            Ok(returned) => {
                self.fault = Fault::fatal(format!("{} elements came back", returned.rows.len()));
            }
            Err(error) => {
                self.blame(node, error);
                if was_open {
                    self.send_elsewhere(part);
                }
            }
        }
    }

    /// The part will not be waited for. False: it was not before.
    fn close(&mut self, part: usize) -> bool {
        let part = &mut self.parts[part];
        if part.open {
            for &target in &part.targets {
                self.state[target as usize].parts -= 1;
            }
        }
        std::mem::take(&mut part.open)
    }

    /// Notes a failure of `node`, which gets nothing more before the next pause.
    fn blame(&mut self, node: NodeId, error: ExchangeError) {
        self.failed.insert(node);
        if is_away(&error) {
            self.exchange.peers.suspect(node);
        }
        self.fault = error.into();
    }

    /// What a closed part has not brought goes to homes that have not failed.
    fn send_elsewhere(&mut self, part: usize) {
        let targets = self.parts[part].targets.iter().copied();
        let stranded = targets.filter(|&target| {
            let target = self.state[target as usize];
            !target.here && target.parts == 0
        });
        let stranded: Vec<u32> = stranded.collect();
        if !stranded.is_empty() && self.fault.retryable && Instant::now() < self.deadline {
            let before = self.parts.len();
            self.send(stranded);
            let retries = (self.parts.len() - before) as u64;
            let counters = self.exchange.peers.counters();
            counters.retries.fetch_add(retries, Ordering::Relaxed);
            self.attempts += u32::from(retries > 0);
        }
    }

    /// Gives up what nodes owe that the newest placement no longer has: they will not answer.
    fn leave_the_gone(&mut self) {
        let Some(view) = self.view() else { return };
        for part in 0..self.parts.len() {
            let Part { node, open, .. } = &self.parts[part];
            if *open && !view.has_node(*node) {
                self.fault = Fault {
                    node: self.parts[part].name().to_owned(),
                    ..Fault::retryable("the node has left the placement")
                };
                self.close(part);
            }
        }
    }
}

/// Whether an error says that its node is not to be reached.
fn is_away(error: &ExchangeError) -> bool {
    matches!(
        error.code,
        ExchangeCode::Unreachable | ExchangeCode::Deadline | ExchangeCode::Draining
    )
}
