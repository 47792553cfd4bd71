//! One layer under planning: who holds what, and what each shot does to it.

use std::collections::BTreeMap;

use super::window::Window;
use super::{Aim, Layer, Node, Policy, Reason, Split};
use crate::spread::level;

/// Rounds of water-filling from an even split, when a board is set up.
const SETTLE_ROUNDS: usize = 8;
/// Rounds after one step: only few rows have to find a new level.
const STEP_ROUNDS: usize = 2;

/// What a row on a wire adds to the penalty, in whose units a row on a node in
/// perfect balance adds 8: it decides between places that differ by less than a
/// thousandth of a node's load.
const WIRE: f64 = 0.05;

/// What of the nodes the arithmetic needs, in columns.
pub(super) struct Nodes {
    pub(super) capacity: Vec<f64>,
    /// Slots of a layer; 0 on a dead node.
    pub(super) slots: Vec<usize>,
    pub(super) domain: Vec<u32>,
    pub(super) live: Vec<bool>,
    /// Nodes that may be given something.
    pub(super) open: Vec<bool>,
    /// Nodes that rows reach by a wire, where there are others.
    wired: Vec<bool>,
    /// Homes that every expert keeps, and homes beyond which none is added.
    pub(super) min_homes: usize,
    pub(super) max_homes: usize,
    /// Capacity of all live nodes.
    total: f64,
}

impl Nodes {
    pub(super) fn new(nodes: &[Node], policy: &Policy) -> Nodes {
        let live = nodes.iter().filter(|n| n.live);
        Nodes {
            capacity: nodes.iter().map(|n| n.capacity).collect(),
            slots: (nodes.iter())
                .map(|n| if n.live { n.slots as usize } else { 0 })
                .collect(),
            domain: nodes.iter().map(|n| n.domain).collect(),
            live: nodes.iter().map(|n| n.live).collect(),
            open: (nodes.iter())
                .map(|n| n.live && !policy.closed.contains(&n.id))
                .collect(),
            wired: (nodes.iter())
                .map(|n| !policy.wireless.is_empty() && !policy.wireless.contains(&n.id))
                .collect(),
            min_homes: policy.min_homes,
            max_homes: policy.max_homes,
            total: live.map(|n| n.capacity).sum(),
        }
    }

    /// Indices of the live nodes.
    pub(super) fn live(&self) -> impl Iterator<Item = u32> {
        (0u32..)
            .zip(&self.live)
            .filter(|(_, live)| **live)
            .map(|(n, _)| n)
    }
}

/// One expert that leaves a node, comes to one, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edit {
    pub(super) expert: u32,
    pub(super) from: Option<u32>,
    pub(super) to: Option<u32>,
}

/// Edits of different experts that are made together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Step(pub(super) [Option<Edit>; 3]);

impl Step {
    pub(super) fn edits(&self) -> impl Iterator<Item = Edit> {
        self.0.into_iter().flatten()
    }

    /// Experts that must be copied.
    pub(super) fn copies(&self) -> usize {
        self.edits().filter(|e| e.to.is_some()).count()
    }
}

#[derive(Clone)]
pub(super) struct Board<'a> {
    pub(super) nodes: &'a Nodes,
    /// [nodes]: the experts on it, no two alike.
    pub(super) held: Vec<Vec<u32>>,
    /// [experts]: the nodes that hold it, ascending.
    pub(super) homes: Vec<Vec<u32>>,
    /// [shots of one way after the other, experts], in units in which perfect
    /// balance is load = capacity. Row 0 is the mean of the others, or stands alone.
    pub(super) rows: Vec<Vec<f64>>,
    /// Every shot in every way to share rows out, shot after shot.
    scenes: Vec<Scene>,
    /// Scenes of one shot.
    ways: usize,
    /// Which of the shots of each way were seen, and are neither a mean nor foreseen.
    seen: std::ops::Range<usize>,
    /// [scenes, nodes]
    load: Vec<Vec<f64>>,
    /// [scenes, experts, homes]
    share: Vec<Vec<Vec<f64>>>,
    /// Hot experts, which keep two homes once they have them.
    pub(super) hot: Vec<bool>,
    /// Why an expert came to a node, and what its step gained.
    pub(super) why: BTreeMap<(u32, u32), (Reason, f64)>,
    scratch: Scratch,
}

/// A shot, and how its rows are shared out among homes.
#[derive(Clone, Copy)]
struct Scene {
    /// Index into [`Board::rows`].
    shot: usize,
    split: Split,
    weight: f64,
}

#[derive(Clone, Default)]
struct Scratch {
    floors: Vec<(f64, f64)>,
    shares: Vec<f64>,
    homes: Vec<u32>,
    value: Vec<f64>,
    touched: Vec<u32>,
    stamp: Vec<u32>,
    now: u32,
}

/// The penalty of a node at relative load `r`: steep, so that the sum over the
/// nodes follows the worst of them, and smooth, so that it has no plateaus.
fn penalty(r: f64) -> f64 {
    let r2 = r * r;
    let r4 = r2 * r2;
    r4 * r4
}

/// Pours `rows` over `homes` on `load`; writes a share for each home.
pub(super) fn pour(
    nodes: &Nodes,
    split: Split,
    rows: f64,
    homes: &[u32],
    load: impl Fn(u32) -> f64,
    floors: &mut Vec<(f64, f64)>,
    shares: &mut Vec<f64>,
) {
    shares.clear();
    let capacity = |n: u32| nodes.capacity[n as usize];
    match (homes, split) {
        ([_], _) => shares.push(rows),
        (_, Split::Even) => {
            let all: f64 = homes.iter().map(|&n| capacity(n)).sum();
            shares.extend(homes.iter().map(|&n| rows * capacity(n) / all));
        }
        (_, Split::Filled) => {
            floors.clear();
            floors.extend(homes.iter().map(|&n| (load(n) / capacity(n), capacity(n))));
            let level = level(rows, floors);
            let share = |&n: &u32| (level * capacity(n) - load(n)).max(0.0);
            shares.extend(homes.iter().map(share));
        }
    }
}

impl<'a> Board<'a> {
    pub(super) fn new(
        nodes: &'a Nodes,
        layer: &Layer,
        experts: usize,
        shots: &[&[u64]],
        aim: Aim,
    ) -> Board<'a> {
        let ways = aim.splits();
        let seen: Vec<Window> = (ways.iter())
            .map(|&split| Window::new(shots, experts, nodes.total, split))
            .collect();
        let many = seen[0].rows.len();
        let were = seen[0].seen.clone();
        let scenes: Vec<Scene> = (0..many)
            .flat_map(|shot| {
                let ways = ways.iter().zip(&seen).enumerate();
                ways.map(move |(way, (&split, window))| Scene {
                    shot: way * many + shot,
                    split,
                    weight: window.weight[shot],
                })
            })
            .collect();
        let rows: Vec<Vec<f64>> = seen.into_iter().flat_map(|window| window.rows).collect();
        let mut held = vec![Vec::new(); nodes.live.len()];
        let mut homes = vec![Vec::new(); experts];
        for (node, slots) in (0u32..).zip(&layer.slots) {
            if !nodes.live[node as usize] {
                continue;
            }
            for &expert in slots.iter().flatten() {
                let homes: &mut Vec<u32> = &mut homes[expert as usize];
                if homes.last() != Some(&node) {
                    homes.push(node);
                    held[node as usize].push(expert);
                }
            }
        }
        let mut board = Board {
            nodes,
            held,
            load: vec![Vec::new(); scenes.len()],
            share: vec![vec![Vec::new(); experts]; scenes.len()],
            hot: vec![false; experts],
            why: BTreeMap::new(),
            scratch: Scratch {
                value: vec![0.0; nodes.live.len()],
                stamp: vec![0; nodes.live.len()],
                ..Scratch::default()
            },
            homes,
            rows,
            scenes,
            ways: ways.len(),
            seen: were,
        };
        board.settle();
        board
    }

    /// Shares everything out anew, from an even split.
    pub(super) fn settle(&mut self) {
        for (at, scene) in self.scenes.iter().enumerate() {
            self.load[at] = vec![0.0; self.nodes.live.len()];
            for expert in 0..self.homes.len() {
                let homes = &self.homes[expert];
                let shares = &mut self.share[at][expert];
                let floors = &mut self.scratch.floors;
                let rows = self.rows[scene.shot][expert];
                pour(
                    self.nodes,
                    Split::Even,
                    rows,
                    homes,
                    |_| 0.0,
                    floors,
                    shares,
                );
                for (&n, share) in homes.iter().zip(shares.iter()) {
                    self.load[at][n as usize] += share;
                }
            }
        }
        self.refill(SETTLE_ROUNDS);
    }

    fn refill(&mut self, rounds: usize) {
        let many: Vec<usize> = (0..self.homes.len())
            .filter(|&e| self.homes[e].len() > 1)
            .collect();
        for scene in 0..self.scenes.len() {
            if self.scenes[scene].split == Split::Even {
                continue;
            }
            for _ in 0..rounds {
                for &expert in &many {
                    self.repour(scene, expert);
                }
            }
        }
    }

    /// Pours one expert anew on what is there without it.
    fn repour(&mut self, at: usize, expert: usize) {
        let Scene { shot, split, .. } = self.scenes[at];
        let (load, shares) = (&mut self.load[at], &mut self.share[at][expert]);
        let homes = &self.homes[expert];
        for (&n, share) in homes.iter().zip(shares.iter()) {
            load[n as usize] -= share;
        }
        let rows = self.rows[shot][expert];
        let floors = &mut self.scratch.floors;
        pour(
            self.nodes,
            split,
            rows,
            homes,
            |n| load[n as usize],
            floors,
            shares,
        );
        for (&n, share) in homes.iter().zip(shares.iter()) {
            load[n as usize] += share;
        }
    }

    /// The worst node's relative load, mean and 90th percentile over the shots
    /// in equal parts, and so over the ways to share rows out. 1 is perfect balance.
    pub(super) fn objective(&self) -> f64 {
        let first = self.means() % self.scenes.len();
        let way = |way: usize| {
            let (mut sum, mut weights) = (0.0, 0.0);
            let mut all: Vec<f64> = (first + way..self.scenes.len())
                .step_by(self.ways)
                .map(|at| {
                    let load = self.load[at].iter().zip(&self.nodes.capacity);
                    let worst = load.map(|(l, c)| l / c).fold(0.0, f64::max);
                    sum += worst * self.scenes[at].weight;
                    weights += self.scenes[at].weight;
                    worst
                })
                .collect();
            all.sort_unstable_by(f64::total_cmp);
            let p90 = all[(all.len() * 9).div_ceil(10) - 1];
            (sum / weights + p90) / 2.0
        };
        (0..self.ways).map(way).sum::<f64>() / self.ways as f64
    }

    /// The worst node's relative load in each shot that was seen, in the mean of the ways to share
    /// rows out.
    pub(super) fn each(&self) -> Vec<f64> {
        let worst = |at: usize| {
            let load = self.load[at].iter().zip(&self.nodes.capacity);
            load.map(|(l, c)| l / c).fold(0.0, f64::max)
        };
        let shot = |first: usize| {
            let ways = first * self.ways..(first + 1) * self.ways;
            ways.map(worst).sum::<f64>() / self.ways as f64
        };
        self.seen.clone().map(shot).collect()
    }

    /// How much each node adds to the penalty, over all shots.
    pub(super) fn heat(&self) -> Vec<f64> {
        let capacity = &self.nodes.capacity;
        let of = |n: usize| {
            let scenes = self.load.iter().zip(&self.scenes);
            scenes
                .map(|(load, s)| s.weight * capacity[n] * penalty(load[n] / capacity[n]))
                .sum()
        };
        (0..capacity.len()).map(of).collect()
    }

    /// A node's relative load in the mean of the shots.
    pub(super) fn relative(&self, node: u32) -> f64 {
        self.load[0][node as usize] / self.nodes.capacity[node as usize]
    }

    /// A node's relative load in the mean of the shots without one of its experts.
    pub(super) fn relative_without(&self, expert: u32, node: u32) -> f64 {
        self.relative(node) - self.share_at(expert, node) / self.nodes.capacity[node as usize]
    }

    /// The rows that, handed over, bring two nodes to one relative load.
    pub(super) fn gap(&self, hot: u32, cold: u32) -> f64 {
        let slowness = |n: u32| 1.0 / self.nodes.capacity[n as usize];
        (self.relative(hot) - self.relative(cold)) / (slowness(hot) + slowness(cold))
    }

    /// What an expert adds to one of its homes in the mean of the shots.
    pub(super) fn share_at(&self, expert: u32, node: u32) -> f64 {
        let homes = &self.homes[expert as usize];
        let at = homes.iter().position(|&n| n == node);
        at.map_or(0.0, |i| self.share[0][expert as usize][i])
    }

    pub(super) fn holds(&self, node: u32, expert: u32) -> bool {
        self.homes[expert as usize].contains(&node)
    }

    pub(super) fn has_room(&self, node: u32) -> bool {
        self.held[node as usize].len() < self.nodes.slots[node as usize]
    }

    /// Number of scenes, with those of the mean of the shots first.
    pub(super) fn scenes(&self) -> usize {
        self.scenes.len()
    }

    /// Number of scenes of the mean of the shots: one for each way to share rows out.
    pub(super) fn means(&self) -> usize {
        self.ways
    }

    /// Whether a step gives something to nodes only that may be given something.
    pub(super) fn is_open(&self, step: &Step) -> bool {
        let mut targets = step.edits().filter_map(|edit| edit.to);
        targets.all(|to| self.nodes.open[to as usize])
    }

    /// Whether a step adds no home to a layer that has as many as it may.
    pub(super) fn is_modest(&self, step: &Step) -> bool {
        let leave = step.edits().filter(|edit| edit.from.is_some()).count();
        let come = step.copies();
        come <= leave || self.all_homes() + come - leave <= self.nodes.max_homes
    }

    /// Homes of the layer in all.
    pub(super) fn all_homes(&self) -> usize {
        self.held.iter().map(Vec::len).sum()
    }

    /// Homes that an expert is to keep.
    pub(super) fn least(&self, expert: u32) -> usize {
        let hot = 1 + usize::from(self.hot[expert as usize]);
        hot.max(self.nodes.min_homes)
    }

    /// Whether `edit` leaves the expert with the homes it is to keep, and with two
    /// failure domains if it has them and is to keep two homes.
    pub(super) fn allows(&self, edit: Edit) -> bool {
        let homes = &self.homes[edit.expert as usize];
        let Some(from) = edit.from else { return true };
        let after = homes.iter().copied().filter(|&n| n != from).chain(edit.to);
        let left = after.clone().count();
        let least = self.least(edit.expert);
        if left < least.min(homes.len()).max(1) {
            return false;
        }
        least < 2 || homes.len() < 2 || self.spans(after) >= self.spans(homes.iter().copied())
    }

    /// 2 when the nodes are of different failure domains, else 1.
    pub(super) fn spans(&self, mut nodes: impl Iterator<Item = u32>) -> usize {
        let domain = |n: u32| self.nodes.domain[n as usize];
        let Some(first) = nodes.next() else { return 0 };
        1 + usize::from(nodes.any(|n| domain(n) != domain(first)))
    }

    /// The change of the penalty by a step, over the scenes named, when only the
    /// rows of its own experts are poured anew: an upper bound of the change.
    pub(super) fn delta(&mut self, step: &Step, scenes: std::ops::Range<usize>) -> f64 {
        let mut sum = 0.0;
        let mut scratch = std::mem::take(&mut self.scratch);
        for at in scenes {
            sum += self.scenes[at].weight * self.delta_of(step, at, &mut scratch);
        }
        self.scratch = scratch;
        sum
    }

    fn delta_of(&self, step: &Step, at: usize, scratch: &mut Scratch) -> f64 {
        let Scene { shot, split, .. } = self.scenes[at];
        let load = &self.load[at];
        let Scratch {
            floors,
            shares,
            homes,
            value,
            touched,
            stamp,
            now,
        } = scratch;
        if *now == u32::MAX {
            stamp.fill(0);
            *now = 0;
        }
        *now += 1;
        touched.clear();
        for edit in step.edits() {
            let expert = edit.expert as usize;
            for (&n, share) in self.homes[expert].iter().zip(&self.share[at][expert]) {
                touch(n, load, value, touched, stamp, *now);
                value[n as usize] -= share;
            }
        }
        for edit in step.edits() {
            let expert = edit.expert as usize;
            homes.clear();
            homes.extend(
                self.homes[expert]
                    .iter()
                    .copied()
                    .filter(|&n| Some(n) != edit.from),
            );
            homes.extend(edit.to);
            for &n in homes.iter() {
                touch(n, load, value, touched, stamp, *now);
            }
            let rows = self.rows[shot][expert];
            pour(
                self.nodes,
                split,
                rows,
                homes,
                |n| value[n as usize],
                floors,
                shares,
            );
            for (&n, share) in homes.iter().zip(shares.iter()) {
                value[n as usize] += share;
            }
        }
        let change = |&n: &u32| {
            let capacity = self.nodes.capacity[n as usize];
            let (after, before) = (value[n as usize], load[n as usize]);
            let wire = match self.nodes.wired[n as usize] {
                true => WIRE * (after - before),
                false => 0.0,
            };
            capacity * (penalty(after / capacity) - penalty(before / capacity)) + wire
        };
        touched.iter().map(change).sum()
    }

    /// Makes a step.
    pub(super) fn apply(&mut self, step: &Step) {
        for edit in step.edits() {
            self.edit(edit);
        }
        self.refill(STEP_ROUNDS);
    }

    fn edit(&mut self, edit: Edit) {
        let expert = edit.expert as usize;
        for at in 0..self.scenes.len() {
            for (&n, share) in self.homes[expert].iter().zip(&self.share[at][expert]) {
                self.load[at][n as usize] -= share;
            }
            self.share[at][expert].clear();
        }
        if let Some(from) = edit.from {
            self.homes[expert].retain(|&n| n != from);
            self.held[from as usize].retain(|&e| e != edit.expert);
        }
        if let Some(to) = edit.to {
            let homes = &mut self.homes[expert];
            homes.insert(homes.partition_point(|&n| n < to), to);
            self.held[to as usize].push(edit.expert);
        }
        for at in 0..self.scenes.len() {
            self.share[at][expert].resize(self.homes[expert].len(), 0.0);
            self.repour(at, expert);
        }
    }
}

fn touch(
    n: u32,
    load: &[f64],
    value: &mut [f64],
    touched: &mut Vec<u32>,
    stamp: &mut [u32],
    now: u32,
) {
    let i = n as usize;
    if stamp[i] != now {
        stamp[i] = now;
        value[i] = load[i];
        touched.push(n);
    }
}
