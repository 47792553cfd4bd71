//! Descent from the present placement, and which layers' steps are worth it.

use super::board::{Board, Edit, Step};
use super::{Cluster, Layer, Node, Policy, Reason, fresh, secure};

/// Nodes that are relieved in one step: those that add most to the penalty.
const HOT_NODES: usize = 3;
/// Nodes that take over: the least loaded.
const COLD_NODES: usize = 6;
/// Replicas that may go, at most, that are looked at in one step.
const SPARES: usize = 32;
/// Experts of a hot node, by falling share, that are put in place of a spare replica.
const RETARGETED: usize = 4;
/// Experts of a hot node, by falling share, for which another one must move on.
const CHAINED: usize = 2;
/// Experts that move on, and places they move to, that are tried for one of these.
const CHAIN_WIDTH: usize = 6;
/// Candidates, by the mean of the shots, that are tried on every shot.
const FINALISTS: usize = 12;
/// A layer this close to perfect balance is left alone.
const GOOD_ENOUGH: f64 = 0.002;
/// What a step without copies counts in comparisons, in copies.
const FREE_STEP: f64 = 0.5;
/// Standard errors by which a gain is taken for smaller than the shots make it:
/// else every plan would follow the requests that happened to run, and the next
/// one go back.
const DOUBT: f64 = 1.0;
/// A step must lower the penalty by this part of a layer's whole.
const PROGRESS: f64 = 1e-6;

/// The descent of one layer.
struct Trail {
    steps: Vec<Step>,
    /// Copies after each step, from 0 before the first.
    cost: Vec<usize>,
    /// Objective after each step.
    objective: Vec<f64>,
    /// What each shot alone makes of it, after each step.
    each: Vec<Vec<f64>>,
    /// A fresh layout that beats all steps by far.
    fresh: Option<(Layer, usize, f64)>,
    /// What one copy must gain.
    least: f64,
    /// Steps taken so far.
    at: usize,
    /// Whether nothing more can be taken.
    done: bool,
}

/// Improves all layers: the best gain per copy first, whatever its layer.
pub(super) fn improve(
    boards: &mut [Board],
    cluster: &Cluster,
    views: &[Vec<Node>],
    policy: &Policy,
    budget: &mut usize,
) {
    let mut trails: Vec<Trail> = (boards.iter().zip(&cluster.layers).zip(views))
        .map(|((board, layer), view)| Trail::descend(board, layer, view, policy, *budget))
        .collect();
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, trail) in trails.iter_mut().enumerate() {
            if let Some((ratio, to)) = trail.next(policy, *budget)
                && best.is_none_or(|(highest, ..)| ratio > highest)
            {
                best = Some((ratio, i, to));
            }
        }
        let Some((_, i, to)) = best else { return };
        let (trail, board) = (&mut trails[i], &mut boards[i]);
        if let Some((layout, cost, objective)) = trail.fresh.take() {
            *budget -= cost;
            let gain = trail.objective[0] - objective;
            relay(board, &layout, gain);
            trail.done = true;
            continue;
        }
        *budget -= trail.cost[to] - trail.cost[trail.at];
        for k in trail.at..to {
            let gain = trail.objective[k] - trail.objective[k + 1];
            secure::take(board, &trail.steps[k], Reason::Balance, gain);
        }
        trail.at = to;
    }
}

impl Trail {
    fn descend(
        board: &Board,
        layer: &Layer,
        view: &[Node],
        policy: &Policy,
        budget: usize,
    ) -> Trail {
        let start = board.objective();
        let mut trail = Trail {
            steps: Vec::new(),
            cost: vec![0],
            objective: vec![start],
            each: vec![board.each()],
            fresh: None,
            least: policy.min_gain_per_layout / board.all_homes().max(1) as f64,
            at: 0,
            done: false,
        };
        if start < 1.0 + policy.min_gain {
            trail.done = true;
            return trail;
        }
        let most = policy.max_copies_per_layer.min(budget);
        let mut board = board.clone();
        let (mut copies, mut now) = (0, start);
        // Free steps and copies alike end the descent.
        while trail.steps.len() < 2 * most && now > 1.0 + GOOD_ENOUGH {
            let Some(step) = best_step(&mut board, most - copies) else {
                break;
            };
            board.apply(&step);
            now = board.objective();
            copies += step.copies();
            trail.steps.push(step);
            trail.cost.push(copies);
            trail.objective.push(now);
            trail.each.push(board.each());
        }
        let reached = trail
            .objective
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min);
        if reached > 1.0 + policy.fresh_gain {
            trail.fresh = afresh(&board, layer, view, reached - policy.fresh_gain, budget);
        }
        trail
    }

    /// By how much chance may have made the gain of the steps up to `to` look
    /// greater than it is: the less the shots agree about it, the more.
    fn doubt(&self, to: usize) -> f64 {
        let gains: Vec<f64> = { self.each[self.at].iter().zip(&self.each[to]) }
            .map(|(before, after)| before - after)
            .collect();
        let many = gains.len() as f64;
        if gains.len() < 2 {
            return 0.0;
        }
        let mean = gains.iter().sum::<f64>() / many;
        let square = gains.iter().map(|gain| (gain - mean).powi(2)).sum::<f64>();
        DOUBT * (square / (many - 1.0) / many).sqrt()
    }

    /// The stretch of steps that gains most per copy, and where it ends.
    fn next(&mut self, policy: &Policy, budget: usize) -> Option<(f64, usize)> {
        if self.done {
            return None;
        }
        if let Some((_, cost, objective)) = &self.fresh {
            if *cost <= budget {
                let gain = self.objective[0] - objective;
                return Some((gain / (*cost).max(1) as f64, 0));
            }
            self.fresh = None;
        }
        let mut best: Option<(f64, usize)> = None;
        for to in self.at + 1..=self.steps.len() {
            let cost = self.cost[to] - self.cost[self.at];
            let gain = self.objective[self.at] - self.objective[to];
            let ratio = gain / (cost as f64).max(FREE_STEP);
            let sure = gain - self.doubt(to);
            let enough = if self.at == 0 {
                policy.min_gain
            } else {
                f64::MIN_POSITIVE
            };
            if cost <= budget
                && gain >= enough
                && sure >= self.least * (cost as f64).max(FREE_STEP)
                && best.is_none_or(|(highest, _)| ratio > highest)
            {
                best = Some((ratio, to));
            }
        }
        self.done = best.is_none();
        best
    }
}

/// The step that lowers the penalty most per copy.
fn best_step(board: &mut Board, copies: usize) -> Option<Step> {
    let heat = board.heat();
    let all: f64 = heat.iter().sum();
    let mut hot: Vec<u32> = board.nodes.live().collect();
    let mut cold = hot.clone();
    hot.sort_by(|&a, &b| heat[b as usize].total_cmp(&heat[a as usize]));
    hot.truncate(HOT_NODES);
    cold.sort_by(|&a, &b| board.relative(a).total_cmp(&board.relative(b)));
    cold.truncate(COLD_NODES);

    let ground = Ground::new(board, cold);
    let mut steps = Vec::new();
    // Chains cost two copies and are many: only where nothing simple helps.
    for chained in [false, true] {
        steps.clear();
        for &from in &hot {
            if chained {
                ground.chains(board, from, &mut steps);
            } else {
                ground.candidates(board, from, &mut steps);
            }
        }
        steps
            .retain(|step| step.copies() <= copies && board.is_open(step) && board.is_modest(step));
        let best = pick(board, &steps, PROGRESS * all);
        if best.is_some() {
            return best;
        }
    }
    None
}

/// The step that lowers the penalty most per copy, and by more than `least`.
fn pick(board: &mut Board, steps: &[Step], least: f64) -> Option<Step> {
    let means = board.means();
    let mut ranked: Vec<(f64, usize)> = (steps.iter().enumerate())
        .map(|(i, step)| (per_copy(board.delta(step, 0..means), step), i))
        .collect();
    let order = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if ranked.len() > FINALISTS {
        ranked.select_nth_unstable_by(FINALISTS, order);
        ranked.truncate(FINALISTS);
    }
    ranked.sort_unstable_by(order);
    let mut best: Option<(f64, Step)> = None;
    for (_, i) in ranked {
        let delta = board.delta(&steps[i], 0..board.scenes());
        let value = per_copy(delta, &steps[i]);
        if delta < -least && best.is_none_or(|(lowest, _)| value < lowest) {
            best = Some((value, steps[i]));
        }
    }
    best.map(|(_, step)| step)
}

fn per_copy(delta: f64, step: &Step) -> f64 {
    delta / (step.copies() as f64).max(FREE_STEP)
}

/// Where load can go to.
struct Ground {
    /// The least loaded nodes, each with its experts by falling share.
    cold: Vec<(u32, Vec<(f64, u32)>)>,
    /// Replicas that may go, those on the least loaded nodes first.
    spares: Vec<Edit>,
}

impl Ground {
    fn new(board: &Board, cold: Vec<u32>) -> Ground {
        let mut spares: Vec<(f64, Edit)> = (secure::spares(board, None))
            .filter_map(|edit| {
                edit.from
                    .map(|n| (board.relative_without(edit.expert, n), edit))
            })
            .collect();
        spares.sort_by(|a, b| a.0.total_cmp(&b.0));
        spares.truncate(SPARES);
        Ground {
            cold: cold.into_iter().map(|n| (n, by_share(board, n))).collect(),
            spares: spares.into_iter().map(|(_, edit)| edit).collect(),
        }
    }

    /// All that can relieve one node: drop a replica, add or move one to a free
    /// slot, put one in place of a spare replica, swap with a lighter expert.
    fn candidates(&self, board: &Board, from: u32, steps: &mut Vec<Step>) {
        for (rank, (share, expert)) in by_share(board, from).into_iter().enumerate() {
            let leave = |to: Option<u32>| Edit {
                expert,
                from: Some(from),
                to,
            };
            let copy = |to: u32| Edit {
                expert,
                from: None,
                to: Some(to),
            };
            if board.allows(leave(None)) {
                steps.push(Step([Some(leave(None)), None, None]));
            }
            for (to, held) in &self.cold {
                let to = *to;
                if to == from || board.holds(to, expert) {
                    continue;
                }
                let moves = board.allows(leave(Some(to)));
                if board.has_room(to) {
                    steps.push(Step([Some(copy(to)), None, None]));
                    if moves {
                        steps.push(Step([Some(leave(Some(to))), None, None]));
                    }
                }
                if moves {
                    // The swap that evens out the two nodes hands over this much.
                    let wanted = share - board.gap(from, to);
                    let near = held.partition_point(|&(s, _)| s > wanted);
                    for &(_, other) in &held[near.saturating_sub(2)..(near + 2).min(held.len())] {
                        let back = Edit {
                            expert: other,
                            from: Some(to),
                            to: Some(from),
                        };
                        if !board.holds(from, other) && board.allows(back) {
                            steps.push(Step([Some(leave(Some(to))), Some(back), None]));
                        }
                    }
                }
            }
            if rank < RETARGETED {
                for &spare in &self.spares {
                    if let Some(to) = spare.from
                        && to != from
                        && spare.expert != expert
                        && !board.holds(to, expert)
                    {
                        steps.push(Step([Some(copy(to)), Some(spare), None]));
                    }
                }
            }
        }
    }

    /// A copy of the heaviest expert of a node to one without a spare replica:
    /// one of the experts there takes the place of a spare replica elsewhere.
    fn chains(&self, board: &Board, from: u32, steps: &mut Vec<Step>) {
        for (_, expert) in by_share(board, from).into_iter().take(CHAINED) {
            for (to, held) in &self.cold {
                let to = *to;
                if to == from || board.holds(to, expert) {
                    continue;
                }
                let copy = Edit {
                    expert,
                    from: None,
                    to: Some(to),
                };
                for &(_, other) in held.iter().rev().take(CHAIN_WIDTH) {
                    let fits = |s: &&Edit| {
                        let apart = s.expert != other && s.expert != expert && s.from != Some(to);
                        apart && s.from.is_some_and(|n| !board.holds(n, other))
                    };
                    for &spare in self.spares.iter().filter(fits).take(CHAIN_WIDTH) {
                        let away = Edit {
                            expert: other,
                            from: Some(to),
                            to: spare.from,
                        };
                        if board.allows(away) {
                            steps.push(Step([Some(copy), Some(away), Some(spare)]));
                        }
                    }
                }
            }
        }
    }
}

/// The experts of a node, by falling share of their rows there.
fn by_share(board: &Board, node: u32) -> Vec<(f64, u32)> {
    let held = board.held[node as usize].iter();
    let mut held: Vec<(f64, u32)> = held.map(|&e| (board.share_at(e, node), e)).collect();
    held.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    held
}

/// A fresh layout of the layer, relabelled, if it ends below `below`, fits the
/// budget and leaves every expert as safe as it is.
fn afresh(
    board: &Board,
    layer: &Layer,
    view: &[Node],
    below: f64,
    budget: usize,
) -> Option<(Layer, usize, f64)> {
    if board.nodes.open != board.nodes.live {
        return None;
    }
    let layout = fresh::fresh(view, &board.rows[0]);
    let layout = fresh::relabel(view, &layer.slots, layout);
    let mut trial = board.clone();
    let layout = Layer {
        layer: layer.layer,
        slots: layout,
    };
    relay(&mut trial, &layout, 0.0);
    let safe = (0u32..)
        .zip(board.homes.iter().zip(&trial.homes))
        .all(|(expert, (old, new))| {
            let least = board.least(expert);
            let kept = new.len() >= old.len().min(least);
            kept && (least < 2
                || board.spans(new.iter().copied()) >= board.spans(old.iter().copied()))
        });
    let safe = safe && trial.all_homes() <= board.nodes.max_homes.max(board.all_homes());
    let news = |(had, has): (&Vec<Option<u32>>, &Vec<u32>)| {
        has.iter().filter(|&&e| !had.contains(&Some(e))).count()
    };
    let cost = layer.slots.iter().zip(&trial.held).map(news).sum();
    let objective = trial.objective();
    (safe && objective < below && cost <= budget).then_some((layout, cost, objective))
}

/// Lays a board out by EPLB, which knows like nodes only, with as many homes as
/// the layer may have.
pub(super) fn relay_evenly(
    board: &mut Board,
    layer: &Layer,
    view: &[Node],
    policy: &Policy,
    rows: &[f64],
) {
    let live = view.iter().filter(|node| node.live).count().max(1);
    let most = policy
        .max_homes
        .div_ceil(live)
        .max(rows.len().div_ceil(live));
    let even = |node: &Node| Node {
        capacity: 1.0,
        slots: node.slots.min(u32::try_from(most).unwrap_or(u32::MAX)),
        live: node.live,
        ..node.clone()
    };
    let even: Vec<Node> = view.iter().map(even).collect();
    let layout = fresh::fresh(&even, rows);
    let slots = fresh::relabel(&even, &layer.slots, layout);
    let layout = Layer {
        layer: layer.layer,
        slots,
    };
    relay(board, &layout, 0.0);
}

/// Lays a board out anew.
fn relay(board: &mut Board, layout: &Layer, gain: f64) {
    board.homes.iter_mut().for_each(Vec::clear);
    board.why.clear();
    for (node, slots) in (0u32..).zip(&layout.slots) {
        let held: Vec<u32> = slots.iter().flatten().copied().collect();
        for &expert in &held {
            board.homes[expert as usize].push(node);
            board.why.insert((node, expert), (Reason::Fresh, gain));
        }
        board.held[node as usize] = held;
    }
    board.settle();
}
