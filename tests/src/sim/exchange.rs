//! The exchange of one layer: a model of `attention-node::exchange` and `peers`, rule by rule. Rows
//! are spread over homes by the scheduler's own `spread`; a part that fails or is late goes to
//! other homes at once; the first answer for a row counts; what has no home left is tried again by
//! the newest placement until the deadline.

use std::collections::{BTreeMap, BTreeSet};

use guild_scheduler::placement::NodeId;
use guild_scheduler::spread::{Queue, spread};

use super::Defect;
use super::arithmetic::Model;
use super::event::{MS, SEC, Time, Who};
use super::message::{Answer, Call, Timer, Wire};
use super::relay::index_of;
use super::world::World;

/// One layer's exchange in all. In production ten seconds: here the world turns faster.
const DEADLINE: Time = 5 * SEC;
const SILENCE_GRACE: Time = 250 * MS;
const SUSPECT_AFTER: Time = 500 * MS;
const BACKOFF: (Time, Time) = (10 * MS, 500 * MS);
const PROBE: (Time, Time) = (SEC, 30 * SEC);
/// As in `attention-node::peers`.
const HEDGE_SHARE: u64 = 10;
const HEDGE_BURST: u64 = 8;

/// What a node thinks of expert nodes.
#[derive(Debug, Default)]
pub(super) struct Peers {
    /// Rows that were not answered.
    queued: BTreeMap<NodeId, u64>,
    /// When it is tried again, and the pause after that.
    suspected: BTreeMap<NodeId, (Time, Time)>,
    dispatches: u64,
    hedges: u64,
    /// Calls out: the node and its rows.
    out: BTreeMap<u64, (NodeId, u64)>,
}

/// Rows of one layer that are away.
#[derive(Debug)]
pub(super) struct Exchange {
    layer: u32,
    top_k: usize,
    /// Of every target: its row, its expert, its answer, and parts under way that would bring it.
    inputs: Vec<u64>,
    experts: Vec<u32>,
    answers: Vec<Option<u64>>,
    coming: Vec<u32>,
    parts: Vec<Part>,
    failed: BTreeSet<NodeId>,
    deadline: Time,
    backoff: Time,
    retry_at: Option<Time>,
    epoch: u64,
}

#[derive(Debug)]
struct Part {
    rpc: u64,
    node: NodeId,
    targets: Vec<u32>,
    open: bool,
    overdue_at: Option<Time>,
}

type Plan = BTreeMap<NodeId, Vec<(u32, u32)>>;

impl Exchange {
    pub(super) fn new(model: &Model, layer: u32, rows: &[u64], now: Time) -> Exchange {
        let routes: Vec<Vec<u32>> = rows.iter().map(|&row| model.routes(layer, row)).collect();
        let experts: Vec<u32> = routes.iter().flatten().copied().collect();
        let inputs = rows.iter().zip(&routes);
        let inputs: Vec<u64> = inputs
            .flat_map(|(&row, experts)| vec![row; experts.len()])
            .collect();
        Exchange {
            layer,
            top_k: routes.first().map_or(1, Vec::len),
            answers: vec![None; experts.len()],
            coming: vec![0; experts.len()],
            inputs,
            experts,
            parts: Vec::new(),
            failed: BTreeSet::new(),
            deadline: now + DEADLINE,
            backoff: BACKOFF.0,
            retry_at: None,
            epoch: 0,
        }
    }

    /// The answers of each of `n` rows, in ascending expert.
    pub(super) fn rows(&self, n: usize) -> impl Iterator<Item = &[Option<u64>]> {
        self.answers.chunks(self.top_k).take(n)
    }

    fn is_whole(&self) -> bool {
        self.answers.iter().all(Option::is_some)
    }

    fn stranded(&self) -> Vec<u32> {
        let all = (0u32..).zip(self.answers.iter().zip(&self.coming));
        all.filter(|(_, (answer, coming))| answer.is_none() && **coming == 0)
            .map(|(at, _)| at)
            .collect()
    }

    /// Nobody waits for the part any more. False: nobody did.
    fn close(&mut self, part: usize) -> bool {
        let part = &mut self.parts[part];
        if part.open {
            for &target in &part.targets {
                self.coming[target as usize] -= 1;
            }
        }
        std::mem::take(&mut part.open)
    }

    /// Spreads targets over homes outside of `failed`, those under suspicion last.
    fn choose(&self, peers: &Peers, view: &Wire, targets: &[u32], trusted_only: bool) -> Plan {
        let mut by_expert: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &target in targets {
            by_expert
                .entry(self.experts[target as usize])
                .or_default()
                .push(target);
        }
        let nodes: Vec<NodeId> = view
            .placement
            .nodes()
            .iter()
            .map(|slots| slots.node)
            .collect();
        let queue = |node: &NodeId| Queue {
            rows: peers.queued.get(node).copied().unwrap_or(0),
            capacity: 1.0,
            latency: 0.0,
        };
        let queues: Vec<Queue> = nodes.iter().map(queue).collect();
        let mut wanted = Vec::new();
        for (expert, targets) in by_expert {
            let homes = view.placement.resolve(self.layer, expert).iter().copied();
            let homes: Vec<_> = homes
                .filter(|(node, _)| !self.failed.contains(node))
                .collect();
            let trusted = homes
                .iter()
                .copied()
                .filter(|(node, _)| !peers.suspected.contains_key(node));
            let trusted: Vec<_> = trusted.collect();
            let homes = if trusted.is_empty() && !trusted_only {
                homes
            } else {
                trusted
            };
            if !homes.is_empty() {
                wanted.push((targets, homes));
            }
        }
        let rows: Vec<u32> = wanted
            .iter()
            .map(|(targets, _)| targets.len() as u32)
            .collect();
        let place =
            |(node, _): &(NodeId, u32)| nodes.iter().position(|n| n == node).unwrap_or(0) as u32;
        let replicas: Vec<Vec<u32>> = wanted
            .iter()
            .map(|(_, homes)| homes.iter().map(place).collect())
            .collect();
        let mut shares = spread(&rows, &replicas, &queues)
            .unwrap_or_default()
            .into_iter();
        let mut plan = Plan::new();
        for (targets, homes) in wanted {
            let mut targets = targets.into_iter();
            for (node, slot) in homes {
                let share = shares.next().unwrap_or(0) as usize;
                let part = targets.by_ref().take(share).map(|target| (target, slot));
                let part: Vec<_> = part.collect();
                if !part.is_empty() {
                    plan.entry(node).or_default().extend(part);
                }
            }
        }
        plan
    }
}

impl World {
    pub(super) fn exchange_begin(&mut self, at: usize) {
        self.probe(at);
        self.exchange_send_stranded(at);
        self.exchange_go_on(at);
    }

    /// The exchange under way at a node, with what it needs to know.
    fn exchange(&mut self, at: usize) -> Option<&mut Exchange> {
        self.attentions[at]
            .step
            .as_mut()
            .map(|step| &mut step.exchange)
    }

    fn exchange_send_stranded(&mut self, at: usize) {
        let now = self.now;
        let node = &mut self.attentions[at];
        let (Some(view), Some(step)) = (node.view.clone(), &mut node.step) else {
            return;
        };
        let exchange = &mut step.exchange;
        exchange.epoch = view.epoch();
        let stranded = exchange.stranded();
        if stranded.is_empty() || now >= exchange.deadline {
            return;
        }
        node.peers
            .queued
            .retain(|&id, _| view.name_of(id).is_some());
        node.peers
            .suspected
            .retain(|&id, _| view.name_of(id).is_some());
        let plan = exchange.choose(&node.peers, &view, &stranded, false);
        for (home, part) in plan {
            self.post(at, &view, home, &part);
        }
    }

    fn post(&mut self, at: usize, view: &Wire, node: NodeId, part: &[(u32, u32)]) {
        let now = self.now;
        let Some(index) = view.name_of(node).and_then(index_of) else {
            return;
        };
        let epoch = view.epoch();
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        let rows = part
            .iter()
            .map(|&(target, slot)| (slot, exchange.inputs[target as usize]));
        let body = Call::Frame {
            epoch,
            rows: rows.collect(),
        };
        let left = exchange.deadline.saturating_sub(now).max(1);
        let rpc = self.call(Who::Attention(at), Who::Expert(index), left, body);
        let peers = &mut self.attentions[at].peers;
        peers.dispatches += 1;
        peers.out.insert(rpc, (node, part.len() as u64));
        *peers.queued.entry(node).or_default() += part.len() as u64;
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        for &(target, _) in part {
            exchange.coming[target as usize] += 1;
        }
        exchange.parts.push(Part {
            rpc,
            node,
            targets: part.iter().map(|&(target, _)| target).collect(),
            open: true,
            overdue_at: Some(now + SUSPECT_AFTER),
        });
    }

    /// Suspected nodes are asked for one row, beside what is sent elsewhere.
    fn probe(&mut self, at: usize) {
        let now = self.now;
        let Some(view) = self.attentions[at].view.clone() else {
            return;
        };
        let suspected = &mut self.attentions[at].peers.suspected;
        let due = suspected
            .iter_mut()
            .filter(|(_, (probe_at, _))| *probe_at <= now);
        let due: Vec<NodeId> = due
            .map(|(&node, (probe_at, pause))| {
                *pause = (*pause * 2).min(PROBE.1);
                *probe_at = now + *pause;
                node
            })
            .collect();
        for node in due {
            let Some(index) = view.name_of(node).and_then(index_of) else {
                continue;
            };
            let body = Call::Frame {
                epoch: view.epoch(),
                rows: vec![(0, 1)],
            };
            let rpc = self.call(Who::Attention(at), Who::Expert(index), DEADLINE, body);
            self.attentions[at].peers.out.insert(rpc, (node, 1));
            self.report.count("suspected node probed");
        }
    }

    fn suspect(&mut self, at: usize, node: NodeId) {
        let probe = (self.now + PROBE.0, PROBE.0);
        let suspected = &mut self.attentions[at].peers.suspected;
        if suspected.insert(node, probe).is_none() {
            self.report.count("expert node suspected");
        }
    }

    /// A new placement: what nodes owe that it no longer has will not come.
    pub(super) fn exchange_news(&mut self, at: usize) {
        let Some(view) = self.attentions[at].view.clone() else {
            return;
        };
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        for part in 0..exchange.parts.len() {
            let node = exchange.parts[part].node;
            if exchange.parts[part].open && view.name_of(node).is_none() {
                exchange.close(part);
            }
        }
        exchange.failed.clear();
        exchange.retry_at = None;
        self.exchange_send_stranded(at);
        self.exchange_go_on(at);
    }

    pub(super) fn exchange_answer(&mut self, at: usize, rpc: u64, answer: Answer) {
        let peers = &mut self.attentions[at].peers;
        let Some((node, rows)) = peers.out.remove(&rpc) else {
            return;
        };
        if let Some(queued) = peers.queued.get_mut(&node) {
            *queued = queued.saturating_sub(rows);
        }
        if let Answer::Rows(_) = answer
            && peers.suspected.remove(&node).is_some()
        {
            self.report.count("suspected node is back");
        }
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        let Some(part) = exchange.parts.iter().position(|part| part.rpc == rpc) else {
            return;
        };
        let was_open = exchange.close(part);
        match answer {
            Answer::Rows(rows) if rows.len() == exchange.parts[part].targets.len() => {
                for (target, row) in exchange.parts[part].targets.clone().into_iter().zip(rows) {
                    exchange.answers[target as usize].get_or_insert(row);
                }
            }
            Answer::Rows(_) => {
                return self
                    .report
                    .wrong("an answer has another number of rows".to_owned());
            }
            failure => {
                exchange.failed.insert(node);
                if matches!(failure, Answer::Unreachable | Answer::TimedOut) {
                    self.suspect(at, node);
                }
                if matches!(failure, Answer::UnknownEpoch | Answer::UnknownSlot) {
                    self.report.count("frame of an unknown epoch refused");
                }
                if was_open {
                    self.report.count("rows go to another home");
                    self.exchange_send_stranded(at);
                }
            }
        }
        self.exchange_go_on(at);
    }

    pub(super) fn exchange_timer(&mut self, at: usize) {
        let now = self.now;
        self.hedge(at);
        if self
            .exchange(at)
            .is_some_and(|e| e.retry_at.is_some_and(|at| at <= now))
        {
            if let Some(exchange) = self.exchange(at) {
                exchange.retry_at = None;
                exchange.failed.clear();
            }
            self.exchange_send_stranded(at);
        }
        self.exchange_go_on(at);
    }

    /// Asks other homes for what is overdue.
    fn hedge(&mut self, at: usize) {
        let now = self.now;
        let Some(view) = self.attentions[at].view.clone() else {
            return;
        };
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        let late = exchange.parts.iter().enumerate();
        let late = late.filter(|(_, p)| p.open && p.overdue_at.is_some_and(|at| at <= now));
        let late: Vec<usize> = late.map(|(part, _)| part).collect();
        for part in late {
            let Some(exchange) = self.exchange(at) else {
                return;
            };
            exchange.parts[part].overdue_at = None;
            let (node, targets) = (
                exchange.parts[part].node,
                exchange.parts[part].targets.clone(),
            );
            self.suspect(at, node);
            let Attention {
                step: Some(step),
                peers,
                ..
            } = &mut self.attentions[at]
            else {
                return;
            };
            let exchange = &mut step.exchange;
            let missing = targets
                .into_iter()
                .filter(|&t| exchange.answers[t as usize].is_none());
            let missing: Vec<u32> = missing.collect();
            let plan = exchange.choose(peers, &view, &missing, true);
            if plan.is_empty() {
                continue;
            }
            if peers.hedges + plan.len() as u64 > peers.dispatches / HEDGE_SHARE + HEDGE_BURST {
                exchange.parts[part].overdue_at = Some(now + SUSPECT_AFTER);
                self.report.count("hedge over its budget");
                continue;
            }
            peers.hedges += plan.len() as u64;
            self.report.count("late rows hedged");
            for (other, rows) in plan {
                self.post(at, &view, other, &rows);
            }
        }
    }

    /// Ends the exchange, or sets its alarm.
    fn exchange_go_on(&mut self, at: usize) {
        let now = self.now;
        let skips = self.has(Defect::SkipsAMissingRow);
        let Some(exchange) = self.exchange(at) else {
            return;
        };
        let patient = exchange.parts.iter().any(|part| part.open);
        let end = exchange.deadline + if patient { SILENCE_GRACE } else { 0 };
        // What the defect does: a home that fails is not made up for.
        let gives_up = skips && !patient && !exchange.parts.is_empty();
        if exchange.is_whole() {
            return self.layer_done(at);
        }
        if now >= end || gives_up {
            return self.layer_failed(at);
        }
        if exchange.retry_at.is_none() && now < exchange.deadline && !exchange.stranded().is_empty()
        {
            exchange.retry_at = Some(now + exchange.backoff);
            exchange.backoff = (exchange.backoff * 2).min(BACKOFF.1);
        }
        let open = exchange.parts.iter().filter(|part| part.open);
        let overdue = open.filter_map(|part| part.overdue_at).min();
        let wake = [exchange.retry_at, overdue]
            .into_iter()
            .flatten()
            .fold(end, Time::min);
        let node = &mut self.attentions[at];
        node.stamp += 1;
        let stamp = node.stamp;
        self.timer(
            Who::Attention(at),
            wake.saturating_sub(now).max(1),
            Timer::Exchange { stamp },
        );
    }
}

use super::attention::Attention;
