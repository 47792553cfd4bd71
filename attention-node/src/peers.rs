//! What this node thinks of the expert nodes, and which home of an expert it sends rows to.
//!
//! Secret: trust. Rows go where they are answered first, by what each node's answers have taken
//! so far. A node that fails, or is silent for longer than it should be, is suspected, and one
//! whose answers others had to be asked for again and again is slow: rows go to other homes while
//! there are any, and a single row now and then finds out whether it is back. All that is an
//! opinion of this node alone, changed by the node's next answers; who is a member is for the
//! coordinator to say. It must not know how rows travel.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_scheduler::spread::spread;
use guild_transport::NodeId;
use tokio::time::Instant;

use crate::view::View;
use pace::{Fit, Pace};
use standing::Standing;

mod outlook;
mod pace;
mod standing;
#[cfg(test)]
mod tests;

/// A node that owes an answer is suspected after this long at the earliest, unless configured.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(500);
/// A node may take this many times as long as it usually does before it is suspected.
const SUSPECT_FACTOR: u32 = 4;
/// How long a suspected node is left alone before it is probed; doubled by every probe.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// The longest time between two probes of a suspected node.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// How often a slow node is probed.
const PROBE_SLOW: Duration = Duration::from_millis(500);
/// A node that rows could go to and have not for so long is probed: what was thought of it then
/// may no longer be true.
const PROBE_IDLE: Duration = Duration::from_secs(1);
/// Rows are sent a second time, to another home, in at most one of so many dispatches: where
/// everything is slow, more work would make it slower.
const HEDGE_SHARE: u64 = 10;
/// Second dispatches that are allowed on top of that share, for the first moments.
const HEDGE_BURST: u64 = 8;
/// No answer is late before this: less is the noise of a busy machine.
const LATE_FLOOR: Duration = Duration::from_millis(5);
/// How much longer than the others a node may take that usually does so.
const LATE_FACTOR: f64 = 2.0;
/// An answer that takes this many times as long as it may is two strikes.
const LATE_BADLY: u32 = 4;
/// An answer counts in the pace up to this many times what nearly all answers take: a stall says
/// little about how long answers take.
const OUTLIER: f64 = 2.0;
/// One of so many nodes may be left alone for being slow, and one in any case: the others have to
/// do its work.
const SLOW_PART: usize = 3;

/// What the exchange with expert nodes has come to so far.
#[derive(Debug, Default)]
pub struct ExchangeCounters {
    /// Rows sent to expert nodes, one for each expert.
    pub rows: AtomicU64,
    /// Messages to expert nodes, of all kinds.
    pub dispatches: AtomicU64,
    /// Those of them to nodes of this process.
    pub local: AtomicU64,
    /// Messages that replace one that failed.
    pub retries: AtomicU64,
    /// Messages that repeat one whose answer is late, to other nodes.
    pub hedges: AtomicU64,
    /// Times that a node came under suspicion.
    pub suspected: AtomicU64,
    /// Times that a node was found to be slow.
    pub slow: AtomicU64,
}

impl ExchangeCounters {
    /// Says what it has come to.
    pub(crate) fn log(&self) {
        let so_far = |of: &AtomicU64| of.load(Ordering::Relaxed);
        tracing::info!(
            messages = so_far(&self.dispatches),
            local = so_far(&self.local),
            retries = so_far(&self.retries),
            hedges = so_far(&self.hedges),
            suspected = so_far(&self.suspected),
            slow = so_far(&self.slow),
            "exchange with expert nodes, in all"
        );
    }
}

/// The expert nodes as seen from here.
#[derive(Debug)]
pub(crate) struct Peers {
    suspect_after: Duration,
    counters: Arc<ExchangeCounters>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Nodes of the placement.
    nodes: usize,
    peers: BTreeMap<NodeId, Peer>,
    /// Number of the next message.
    next: u64,
}

#[derive(Debug, Default)]
struct Peer {
    name: String,
    /// Seconds that a row takes by what the placement says of the node's capacity.
    per_row: Option<f64>,
    pace: Pace,
    standing: Standing,
    /// Messages that it has not answered, by number.
    owed: BTreeMap<u64, Owed>,
    /// When rows went there last.
    asked: Option<Instant>,
    suspicion: Option<Suspicion>,
}

#[derive(Debug)]
struct Owed {
    rows: u64,
    /// Others are waited for no more, or were asked for it, too.
    late: bool,
}

#[derive(Debug)]
struct Suspicion {
    probe_at: Instant,
    pause: Duration,
}

/// How far a node is trusted, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trust {
    /// Like any.
    Full,
    /// It answers, but late.
    Slow,
    /// It may not answer.
    Suspected,
}

/// Rows that are out to a node; they count as its queue until dropped.
#[derive(Debug)]
pub(crate) struct Out {
    peers: Arc<Peers>,
    node: NodeId,
    number: u64,
    rows: u64,
    sent: Instant,
}

/// What to send where: for each node, pairs of a target and its slot there.
pub(crate) type Plan = BTreeMap<NodeId, Vec<(u32, u32)>>;

/// What rows are looked for homes for.
pub(crate) struct Wanted<'a> {
    pub(crate) view: &'a View,
    pub(crate) layer: u32,
    /// Pairs of a target and its expert.
    pub(crate) targets: &'a [(u32, u32)],
    /// Nodes that get nothing.
    pub(crate) avoid: &'a BTreeSet<NodeId>,
    /// Nodes that are trusted less get nothing.
    pub(crate) least: Trust,
    /// Nodes that rows take no wire to.
    pub(crate) near: &'a dyn Fn(NodeId) -> bool,
}

impl Peers {
    pub(crate) fn new(suspect_after: Duration) -> Peers {
        Peers {
            suspect_after,
            counters: Arc::default(),
            known: Mutex::default(),
        }
    }

    pub(crate) fn counters(&self) -> &Arc<ExchangeCounters> {
        &self.counters
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets nodes that are not part of the placement.
    pub(crate) fn retain(&self, view: &View) {
        let mut known = self.known();
        known.nodes = view.nodes().count();
        known.peers.retain(|&node, _| view.has_node(node));
    }

    /// Spreads targets over the most trusted homes of their experts so that the last answer comes
    /// as early as it can. Targets that no home is left for come back as second.
    pub(crate) fn choose(&self, wanted: &Wanted<'_>) -> (Plan, Vec<u32>) {
        let Wanted { view, layer, .. } = *wanted;
        let known = self.known();
        let heeds_late = known.heeds_late();
        let trust = |node: NodeId| known.trust(node, heeds_late);
        let mut experts: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &(target, expert) in wanted.targets {
            experts.entry(expert).or_default().push(target);
        }
        let (mut plan, mut left) = (Plan::new(), Vec::new());
        let mut open = Vec::new();
        for (expert, targets) in experts {
            let homes = view.resolve(layer, expert).iter().copied();
            let homes = homes.filter(|(node, _)| !wanted.avoid.contains(node));
            let best = homes.clone().map(|(node, _)| trust(node)).min();
            let best = best.filter(|&best| best <= wanted.least);
            let homes: Vec<_> = homes
                .filter(|&(node, _)| Some(trust(node)) == best)
                .collect();
            match homes.as_slice() {
                [] => left.extend(targets),
                [(node, slot)] => {
                    let rows = plan.entry(*node).or_default();
                    rows.extend(targets.into_iter().map(|target| (target, *slot)));
                }
                _ => open.push((targets, homes)),
            }
        }
        let nodes: Vec<NodeId> = view.nodes().collect();
        let mut queues = known.queues(view, &nodes, wanted.near);
        // What has no choice is poured first: it waits at its node like the rest.
        for (node, queue) in nodes.iter().zip(&mut queues) {
            queue.rows += plan.get(node).map_or(0, Vec::len) as u64;
        }
        let rows: Vec<u32> = open
            .iter()
            .map(|(targets, _)| targets.len() as u32)
            .collect();
        let place = |(node, _): &(NodeId, u32)| nodes.binary_search(node).unwrap_or(0) as u32;
        let replicas: Vec<Vec<u32>> = open
            .iter()
            .map(|(_, homes)| homes.iter().map(place).collect())
            .collect();
        // Every home has a queue and every expert a home: `spread` has nothing to refuse.
        let mut shares = spread(&rows, &replicas, &queues)
            .unwrap_or_default()
            .into_iter();
        for (targets, homes) in open {
            let mut targets = targets.into_iter();
            for (node, slot) in homes {
                let share = shares.next().unwrap_or(0) as usize;
                if share > 0 {
                    let rows = plan.entry(node).or_default();
                    rows.extend(targets.by_ref().take(share).map(|target| (target, slot)));
                }
            }
            left.extend(targets);
        }
        (plan, left)
    }

    /// How long `node` may take for `rows` rows before it is suspected.
    pub(crate) fn suspect_after(&self, node: NodeId, rows: u64) -> Duration {
        let known = self.known();
        let fit = known.peers.get(&node).and_then(Peer::fit);
        let usual = seconds(fit.map_or(0.0, |fit| fit.expected(rows)));
        usual.saturating_mul(SUSPECT_FACTOR).max(self.suspect_after)
    }

    /// How long `node` may take for `rows` rows before others are asked, by what the others
    /// usually take; None: not known.
    pub(crate) fn late_after(&self, node: NodeId, rows: u64) -> Option<Duration> {
        self.known().late_after(node, rows)
    }

    /// Rows go to `node` now.
    pub(crate) fn send(self: &Arc<Self>, view: &View, node: NodeId, rows: usize) -> Out {
        self.counters.dispatches.fetch_add(1, Ordering::Relaxed);
        self.counters.rows.fetch_add(rows as u64, Ordering::Relaxed);
        let (rows, now) = (rows as u64, Instant::now());
        let mut known = self.known();
        let number = known.next;
        known.next += 1;
        let peer = known.peers.entry(node).or_default();
        peer.name = view.name(node).unwrap_or_default().to_owned();
        peer.per_row = view.rows_per_second(node).map(f64::recip);
        peer.owed.insert(number, Owed { rows, late: false });
        peer.asked = Some(now);
        if let Some(suspicion) = &mut peer.suspicion {
            suspicion.pause = (suspicion.pause * 2).min(PROBE_MAX);
            suspicion.probe_at = now + suspicion.pause;
        }
        Out {
            peers: Arc::clone(self),
            node,
            number,
            rows,
            sent: now,
        }
    }

    /// Sends as little as possible to `node` until it answers.
    pub(crate) fn suspect(&self, node: NodeId) {
        let mut known = self.known();
        if let Some(peer) = known.peers.get_mut(&node)
            && peer.suspicion.is_none()
        {
            self.counters.suspected.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(node = peer.name, "suspected: no answer");
            peer.suspicion = Some(Suspicion {
                probe_at: Instant::now() + PROBE_AFTER,
                pause: PROBE_AFTER,
            });
        }
    }

    /// The answer to message `number` of `node` is late: nothing more goes there before it comes.
    pub(crate) fn late(&self, node: NodeId, number: u64) {
        let mut known = self.known();
        let owed = known.peers.get_mut(&node);
        let owed = owed.and_then(|peer| peer.owed.get_mut(&number));
        if let Some(owed) = owed
            && !std::mem::replace(&mut owed.late, true)
        {
            self.strike(&mut known, node);
        }
    }

    fn strike(&self, known: &mut Known, node: NodeId) {
        let others = known.peers.iter().filter(|&(&other, _)| other != node);
        let slow = others.filter(|(_, peer)| peer.standing.is_slow()).count();
        let may = slow < known.may_be_slow();
        if let Some(peer) = known.peers.get_mut(&node)
            && peer.standing.strike(Instant::now(), 1.0, may)
        {
            self.counters.slow.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(node = peer.name, "slow: rows go to other homes");
        }
    }

    /// Nodes that it is time to ask for a row, the most urgent first.
    pub(crate) fn to_probe(&self, near: &dyn Fn(NodeId) -> bool) -> Vec<NodeId> {
        let now = Instant::now();
        let known = self.known();
        let due = known.peers.iter().filter(|&(&node, peer)| {
            let since = peer.asked.map_or(Duration::ZERO, |asked| now - asked);
            match &peer.suspicion {
                Some(suspicion) => suspicion.probe_at <= now,
                None if !peer.owed.is_empty() => false,
                None if peer.standing.is_slow() => since >= PROBE_SLOW,
                None => since >= PROBE_IDLE && !near(node),
            }
        });
        let mut due: Vec<_> = due
            .map(|(&node, peer)| (peer.suspicion.is_none(), peer.asked, node))
            .collect();
        due.sort_unstable();
        due.into_iter().map(|(_, _, node)| node).collect()
    }

    /// Whether `messages` more second dispatches are within the budget; then they count.
    pub(crate) fn may_hedge(&self, messages: u64) -> bool {
        let hedges = &self.counters.hedges;
        let done = hedges.load(Ordering::Relaxed) + messages;
        let allowed = self.counters.dispatches.load(Ordering::Relaxed) / HEDGE_SHARE + HEDGE_BURST;
        if done > allowed {
            return false;
        }
        hedges.fetch_add(messages, Ordering::Relaxed);
        true
    }
}

impl Known {
    /// Nodes that may be left alone for being slow.
    fn may_be_slow(&self) -> usize {
        (self.nodes / SLOW_PART).max(1)
    }

    /// Whether nodes that owe a late answer are left alone: not when there are so many that the
    /// reason must be elsewhere.
    fn heeds_late(&self) -> bool {
        let late = self.peers.values().filter(|peer| {
            peer.suspicion.is_none() && (peer.standing.is_slow() || peer.owes_late())
        });
        late.count() <= self.may_be_slow()
    }

    fn trust(&self, node: NodeId, heeds_late: bool) -> Trust {
        match self.peers.get(&node) {
            Some(peer) if peer.suspicion.is_some() => Trust::Suspected,
            Some(peer) if peer.standing.is_slow() || (heeds_late && peer.owes_late()) => {
                Trust::Slow
            }
            _ => Trust::Full,
        }
    }

    /// See [`Peers::late_after`].
    fn late_after(&self, node: NodeId, rows: u64) -> Option<Duration> {
        let others = self.peers.iter().filter(|&(&other, peer)| {
            other != node && peer.suspicion.is_none() && !peer.standing.is_slow()
        });
        let others = others.filter_map(|(_, peer)| Some(peer.fit()?.nearly_all(rows)));
        let others = outlook::median(others)?;
        let own = self.peers.get(&node).and_then(Peer::fit);
        let own = own.map_or(others, |fit| fit.nearly_all(rows));
        let most = own.max(others).min(others * LATE_FACTOR);
        Some(seconds(most).max(LATE_FLOOR))
    }
}

impl Peer {
    fn fit(&self) -> Option<Fit> {
        self.pace.fit(self.per_row)
    }

    fn owes_late(&self) -> bool {
        self.owed.values().any(|owed| owed.late)
    }

    /// Takes an answer of `rows` rows into account.
    fn keep_pace(&mut self, rows: u64, took: Duration) {
        let most = self.fit().map_or(f64::MAX, |fit| {
            (fit.nearly_all(rows) * OUTLIER).max(LATE_FLOOR.as_secs_f64())
        });
        self.pace.add(rows, took.as_secs_f64().min(most));
    }
}

impl Out {
    /// The number that [`Peers::late`] knows it by.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The answer came at `arrived`: the node is there.
    pub(crate) fn answered(self, arrived: Instant) {
        let (now, took) = (Instant::now(), arrived - self.sent);
        let mut known = self.peers.known();
        let may = known.late_after(self.node, self.rows);
        let Some(peer) = known.peers.get_mut(&self.node) else {
            return;
        };
        if peer.suspicion.take().is_some() {
            // What it did not answer meanwhile it may never answer: a new start.
            peer.owed.retain(|&number, _| number == self.number);
        }
        let owed = peer.owed.remove(&self.number);
        let was_slow = peer.standing.is_slow();
        if may.is_none_or(|may| took <= may) {
            if peer.standing.in_time(now) {
                peer.pace = Pace::default();
                tracing::info!(node = peer.name, "slow no more");
            }
        } else if was_slow || owed.is_some_and(|owed| owed.late) {
            let badly = may.is_some_and(|may| took >= may * LATE_BADLY);
            if was_slow || badly {
                self.peers.strike(&mut known, self.node);
            }
        }
        if !was_slow && let Some(peer) = known.peers.get_mut(&self.node) {
            peer.keep_pace(self.rows, took);
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if let Some(peer) = self.peers.known().peers.get_mut(&self.node) {
            peer.owed.remove(&self.number);
        }
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
