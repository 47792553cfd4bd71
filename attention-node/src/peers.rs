//! What this node thinks of the expert nodes, and which home of an expert it sends rows to.
//!
//! Secret: suspicion. A node that fails, or is silent for longer than it should be, is suspected:
//! rows go to other homes while there are any. That is an opinion of this node alone, changed by
//! the node's next answer; who is a member is for the coordinator to say. It must not know how
//! rows travel.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_scheduler::spread::{Queue, spread};
use guild_transport::NodeId;
use tokio::time::Instant;

use crate::view::View;

/// A node that owes an answer is suspected after this long at the earliest, unless configured.
pub const SUSPECT_AFTER: Duration = Duration::from_millis(500);
/// A node may take this many times as long as it usually does.
const SUSPECT_FACTOR: u32 = 4;
/// How long a suspected node is left alone before it is probed; doubled by every probe.
const PROBE_AFTER: Duration = Duration::from_secs(1);
/// The longest time between two probes.
const PROBE_MAX: Duration = Duration::from_secs(30);
/// Rows are sent a second time, to another home, in at most one of so many dispatches: where
/// everything is slow, more work would make it slower.
const HEDGE_SHARE: u64 = 10;
/// Second dispatches that are allowed on top of that share, for the first moments.
const HEDGE_BURST: u64 = 8;
/// Weight of the newest answer in the mean reply time.
const EWMA_WEIGHT: f64 = 0.2;

/// What the exchange with expert nodes has come to so far.
#[derive(Debug, Default)]
pub struct ExchangeCounters {
    /// Messages to expert nodes, of all kinds.
    pub dispatches: AtomicU64,
    /// Messages that replace one that failed.
    pub retries: AtomicU64,
    /// Messages that repeat one whose answer is late, to other nodes.
    pub hedges: AtomicU64,
    /// Times that a node came under suspicion.
    pub suspected: AtomicU64,
}

/// The expert nodes as seen from here.
#[derive(Debug)]
pub(crate) struct Peers {
    suspect_after: Duration,
    counters: Arc<ExchangeCounters>,
    known: Mutex<HashMap<NodeId, Peer>>,
}

#[derive(Debug, Default)]
struct Peer {
    /// Rows that it has not answered.
    rows: u64,
    /// Mean time of an answer, and of a row of an answer, in seconds.
    reply: f64,
    reply_row: f64,
    suspicion: Option<Suspicion>,
}

#[derive(Debug)]
struct Suspicion {
    probe_at: Instant,
    pause: Duration,
}

/// Rows that are out to a node; they count as its queue until dropped.
#[derive(Debug)]
pub(crate) struct Out {
    peers: Arc<Peers>,
    node: NodeId,
    rows: u64,
    sent: Instant,
}

/// What to send where: for each node, pairs of a target and its slot there.
pub(crate) type Plan = BTreeMap<NodeId, Vec<(u32, u32)>>;

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

    fn known(&self) -> MutexGuard<'_, HashMap<NodeId, Peer>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets nodes that are not part of the placement.
    pub(crate) fn retain(&self, view: &View) {
        self.known().retain(|&node, _| view.has_node(node));
    }

    /// Spreads `targets`, pairs of a target and its expert, over the homes outside `avoid` by
    /// what waits there. Suspected homes get rows only when an expert has no other, and none
    /// when `trusted_only`. Targets that no home is left for come back as second.
    pub(crate) fn choose(
        &self,
        view: &View,
        layer: u32,
        targets: &[(u32, u32)],
        avoid: &BTreeSet<NodeId>,
        trusted_only: bool,
    ) -> (Plan, Vec<u32>) {
        let known = self.known();
        let suspected = |node: &NodeId| known.get(node).is_some_and(|p| p.suspicion.is_some());
        let mut experts: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &(target, expert) in targets {
            experts.entry(expert).or_default().push(target);
        }
        let (mut plan, mut left) = (Plan::new(), Vec::new());
        let nodes: Vec<NodeId> = view.nodes().collect();
        let mut open = Vec::new();
        for (expert, targets) in experts {
            let homes = view.resolve(layer, expert).iter().copied();
            let homes: Vec<_> = homes.filter(|(node, _)| !avoid.contains(node)).collect();
            let trusted = homes.iter().copied().filter(|(node, _)| !suspected(node));
            let trusted: Vec<_> = trusted.collect();
            let homes = if trusted.is_empty() && !trusted_only {
                homes
            } else {
                trusted
            };
            match homes.as_slice() {
                [] => left.extend(targets),
                [(node, slot)] => {
                    let rows = plan.entry(*node).or_default();
                    rows.extend(targets.into_iter().map(|target| (target, *slot)));
                }
                _ => open.push((targets, homes)),
            }
        }
        // What has no choice is poured first: it waits at its node like the rest.
        let waits = |node: &NodeId| {
            let queued = known.get(node).map_or(0, |peer| peer.rows);
            queued + plan.get(node).map_or(0, Vec::len) as u64
        };
        let queues: Vec<Queue> = nodes
            .iter()
            .map(|node| Queue {
                rows: waits(node),
                capacity: 1.0,
                latency: 0.0,
            })
            .collect();
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
    pub(crate) fn patience(&self, node: NodeId, rows: usize) -> Duration {
        let known = self.known();
        let usual = known
            .get(&node)
            .map_or(0.0, |peer| peer.reply.max(peer.reply_row * rows as f64));
        let usual = Duration::try_from_secs_f64(usual).unwrap_or(Duration::MAX);
        usual.saturating_mul(SUSPECT_FACTOR).max(self.suspect_after)
    }

    /// Rows go to `node` now.
    pub(crate) fn send(self: &Arc<Self>, node: NodeId, rows: usize) -> Out {
        self.counters.dispatches.fetch_add(1, Ordering::Relaxed);
        let rows = rows as u64;
        self.known().entry(node).or_default().rows += rows;
        Out {
            peers: Arc::clone(self),
            node,
            rows,
            sent: Instant::now(),
        }
    }

    /// Sends as little as possible to `node` until it answers.
    pub(crate) fn suspect(&self, node: NodeId) {
        let mut known = self.known();
        let suspicion = &mut known.entry(node).or_default().suspicion;
        if suspicion.is_none() {
            self.counters.suspected.fetch_add(1, Ordering::Relaxed);
            *suspicion = Some(Suspicion {
                probe_at: Instant::now() + PROBE_AFTER,
                pause: PROBE_AFTER,
            });
        }
    }

    /// Suspected nodes that it is time to try again; each comes once in a while.
    pub(crate) fn to_probe(&self) -> Vec<NodeId> {
        let now = Instant::now();
        let mut due = Vec::new();
        for (&node, peer) in self.known().iter_mut() {
            if let Some(suspicion) = &mut peer.suspicion
                && suspicion.probe_at <= now
            {
                suspicion.pause = (suspicion.pause * 2).min(PROBE_MAX);
                suspicion.probe_at = now + suspicion.pause;
                due.push(node);
            }
        }
        due.sort_unstable();
        due
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

impl Out {
    /// The answer is here: the node is as good as any.
    pub(crate) fn answered(self) {
        let patience = self.peers.patience(self.node, self.rows as usize);
        // A stall says little about how long answers take: it counts up to what is tolerated.
        let took = self.sent.elapsed().min(patience).as_secs_f64();
        if let Some(peer) = self.peers.known().get_mut(&self.node) {
            let mean = |mean: &mut f64, new: f64| *mean += EWMA_WEIGHT * (new - *mean);
            mean(&mut peer.reply, took);
            mean(&mut peer.reply_row, took / self.rows.max(1) as f64);
            if peer.suspicion.take().is_some() {
                // What it did not answer meanwhile it may never answer: a new start.
                peer.rows = 0;
            }
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if let Some(peer) = self.peers.known().get_mut(&self.node) {
            peer.rows = peer.rows.saturating_sub(self.rows);
        }
    }
}
