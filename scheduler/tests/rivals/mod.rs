//! EPLB, the planner and whoever moves nothing over one sequence of shots.
//!
//! Every plan is made from the shots of one interval and scored on those of the next, shot by shot,
//! by both ways in which rows may be shared out among the homes of an expert: evenly, as EPLB
//! reckons, and by water-filling, as attention nodes do it.

use guild_scheduler::eplb::{Shape, rebalance};
use guild_scheduler::load::{Shot, Synthetic, balancedness};
use guild_scheduler::planner::{Cluster, Layer, Node, Policy, Split, node_loads, plan, relabel};

/// Shots between two plans.
pub(crate) const INTERVAL: usize = 8;

/// Where everything is at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// As EPLB lays out the first interval.
    Eplb,
    /// In the order of the experts, as a cluster that knows no load begins.
    InOrder,
}

/// A cluster of like nodes and its load.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) nodes: u32,
    /// Of each layer on each node.
    pub(crate) slots: u32,
    pub(crate) experts: u32,
    pub(crate) shots: Vec<Shot>,
    /// Between two plans.
    pub(crate) interval: usize,
    /// Shots that a plan looks back on.
    pub(crate) window: usize,
    pub(crate) start: Start,
}

/// Balancedness over the shots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    pub(crate) mean: f64,
    pub(crate) worst: f64,
}

/// What a planner has made of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) even: Figure,
    pub(crate) filled: Figure,
    /// Experts copied.
    pub(crate) copies: u64,
}

/// Rows routed per layer and shot: tokens times experts per token.
pub(crate) const ROWS: u64 = 65_536;

/// A load that stays what it is but for noise, drifts, or jumps, by its numbers.
pub(crate) fn synthetic(
    seed: u64,
    (layers, experts): (u32, u32),
    shots: usize,
    zipf: f64,
    drift: f64,
    jump: f64,
) -> Vec<Shot> {
    let trace = Synthetic {
        seed,
        layers,
        experts,
        shots,
        rows: ROWS,
        zipf,
        drift,
        jump,
    };
    trace
        .trace()
        .map_or_else(|_| Vec::new(), |trace| trace.shots)
}

impl Case {
    /// What is seen when `at` shots have passed.
    fn seen(&self, at: usize) -> Vec<&Shot> {
        self.shots[at.saturating_sub(self.window)..at]
            .iter()
            .collect()
    }

    /// The cluster as it starts.
    pub(crate) fn cluster(&self) -> Cluster {
        let node = |id| Node {
            id,
            capacity: 1.0,
            slots: self.slots,
            domain: id,
            live: true,
        };
        let layers = self.shots.first().map_or(0, |shot| shot.rows.len()) as u32;
        let empty = |layer| Layer {
            layer,
            slots: vec![vec![None; self.slots as usize]; self.nodes as usize],
        };
        let mut cluster = Cluster {
            nodes: (0..self.nodes).map(node).collect(),
            layers: (0..layers).map(empty).collect(),
            experts: self.experts,
            expert_bytes: 1,
        };
        cluster.layers = match self.start {
            Start::Eplb => by_eplb(&cluster, &self.seen(self.interval)),
            Start::InOrder => cluster
                .layers
                .iter()
                .map(|layer| self.in_order(layer.layer))
                .collect(),
        };
        cluster
    }

    /// Neighbours together, and further homes of the first experts where there is room.
    fn in_order(&self, layer: u32) -> Layer {
        let all = self.experts;
        let each = all.div_ceil(self.nodes);
        let mut slots: Vec<Vec<Option<u32>>> = (0..self.nodes)
            .map(|n| (n * each..((n + 1) * each).min(all)).map(Some).collect())
            .collect();
        for (n, held) in slots.iter_mut().enumerate() {
            let next = ((n as u32 + 1) * each) % all;
            let more = (self.slots as usize).saturating_sub(held.len()) as u32;
            held.extend((next..next + more).map(|e| Some(e % all)));
        }
        Layer { layer, slots }
    }
}

/// As EPLB is published, two copies on one node included, the rows of the layout given to the nodes
/// that hold most of them.
fn by_eplb(cluster: &Cluster, window: &[&Shot]) -> Vec<Layer> {
    let (gpus, slots) = (cluster.nodes.len(), cluster.nodes[0].slots as usize);
    let shape = Shape {
        num_replicas: gpus * slots,
        num_groups: 1,
        num_nodes: 1,
        num_gpus: gpus,
    };
    let one = |(at, layer): (usize, &Layer)| {
        let sum = |e: usize| window.iter().map(|s| s.rows[at][e] as f32).sum();
        let weight: Vec<f32> = (0..cluster.experts as usize).map(sum).collect();
        let laid = rebalance(&[weight], shape).expect("a shape that EPLB takes");
        let layout = { laid.phy2log(0).chunks(slots) }
            .map(|held| held.iter().copied().map(Some).collect())
            .collect();
        Layer {
            layer: layer.layer,
            slots: relabel(&cluster.nodes, &layer.slots, layout),
        }
    };
    cluster.layers.iter().enumerate().map(one).collect()
}

/// Experts that are on a node where they were not: what must be copied.
fn copied(old: &[Layer], new: &[Layer]) -> u64 {
    let one = |(had, has): (&Vec<Option<u32>>, &Vec<Option<u32>>)| {
        let mut new: Vec<u32> = has
            .iter()
            .flatten()
            .copied()
            .filter(|e| !had.contains(&Some(*e)))
            .collect();
        new.sort_unstable();
        new.dedup();
        new.len() as u64
    };
    let nodes = old
        .iter()
        .zip(new)
        .flat_map(|(old, new)| old.slots.iter().zip(&new.slots));
    nodes.map(one).sum()
}

/// Runs a case; `next` says where everything is to be after an interval.
pub(crate) fn over(case: &Case, mut next: impl FnMut(&Cluster, &[&Shot]) -> Vec<Layer>) -> Outcome {
    let mut cluster = case.cluster();
    let (mut copies, mut even, mut filled) = (0, Vec::new(), Vec::new());
    // The first interval only says where EPLB begins.
    for at in (2 * case.interval..case.shots.len()).step_by(case.interval) {
        let layers = next(&cluster, &case.seen(at));
        copies += copied(&cluster.layers, &layers);
        cluster.layers = layers;
        for shot in case.shots[at..].iter().take(case.interval) {
            let figure = |split| {
                let loads = node_loads(&cluster, shot, split).expect("a cluster that makes sense");
                balancedness(&loads).unwrap_or(1.0)
            };
            even.push(figure(Split::Even));
            filled.push(figure(Split::Filled));
        }
    }
    Outcome {
        even: Figure::of(&even),
        filled: Figure::of(&filled),
        copies,
    }
}

impl Figure {
    fn of(shots: &[f64]) -> Figure {
        Figure {
            mean: shots.iter().sum::<f64>() / shots.len().max(1) as f64,
            worst: shots.iter().copied().fold(1.0, f64::min),
        }
    }
}

/// EPLB, made anew after every interval.
pub(crate) fn eplb(case: &Case) -> Outcome {
    over(case, by_eplb)
}

/// The planner, after every interval.
pub(crate) fn guild(case: &Case, policy: &Policy) -> Outcome {
    over(case, |cluster, window| {
        plan(cluster, window, policy)
            .expect("a cluster that can be planned for")
            .layers
    })
}

/// The loads that planners are held to: stationary, drifting slowly and fast, changed suddenly, and
/// skewed towards what the first node holds at the start.
pub(crate) fn cases(seed: u64, layers: u32) -> Vec<Case> {
    let shape = (layers, 256);
    let shots = 7 * INTERVAL;
    let mut cases = Vec::new();
    for (nodes, slots) in [(32, 9), (16, 18), (8, 36)] {
        let case = |name: &str, start, shots| Case {
            name: format!("{name}, {nodes} nodes"),
            nodes,
            slots,
            experts: 256,
            shots,
            interval: INTERVAL,
            window: INTERVAL,
            start,
        };
        for start in [Start::Eplb, Start::InOrder] {
            cases.push(case(
                "stationary",
                start,
                synthetic(seed, shape, shots, 0.6, 0.0, 0.0),
            ));
        }
        cases.push(case(
            "slow drift",
            Start::Eplb,
            synthetic(seed, shape, shots, 0.6, 0.02, 0.0),
        ));
        cases.push(case(
            "drift and jumps",
            Start::Eplb,
            synthetic(seed, shape, shots, 0.6, 0.05, 0.05),
        ));
        let half = synthetic(seed, shape, shots / 2 + INTERVAL / 2, 0.6, 0.02, 0.0);
        let other = synthetic(seed + 1, shape, shots / 2 - INTERVAL / 2, 0.6, 0.02, 0.0);
        cases.push(case("sudden change", Start::Eplb, [half, other].concat()));
    }
    let small = (4, 32);
    let mut skew = synthetic(seed, small, shots, 0.1, 0.0, 0.0);
    // What the first node holds gets up to four times as much.
    for row in skew.iter_mut().flat_map(|shot| &mut shot.rows) {
        for (e, rows) in row.iter_mut().enumerate().take(8) {
            *rows += *rows * 3 * (7 - e as u64) / 7;
        }
    }
    cases.push(Case {
        name: "skew, 4 nodes".into(),
        nodes: 4,
        slots: 9,
        experts: 32,
        shots: skew,
        interval: INTERVAL,
        window: INTERVAL,
        start: Start::InOrder,
    });
    cases
}

/// What `guild experts record` saw of the demo model, a shot a second, while eight streams went over from verse to
/// tokens at random, to speakers' names and to a narrow range of tokens.
pub(crate) fn recorded((nodes, slots): (u32, u32), start: Start) -> Case {
    let mut lines = include_str!("../recorded/demo.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line of a trace"));
    let head = lines.next().expect("the form of a trace");
    let rows = |shot: serde_json::Value| serde_json::from_value(shot["rows"].clone());
    Case {
        name: format!("recorded, {nodes} nodes"),
        nodes,
        slots,
        experts: head["experts"].as_u64().expect("a number of experts") as u32,
        shots: lines
            .map(|shot| Shot {
                rows: rows(shot).expect("rows of a shot"),
            })
            .collect(),
        interval: INTERVAL,
        window: INTERVAL,
        start,
    }
}

/// A small cluster that serves few requests of a few kinds, each of which likes other experts. The
/// load stays what it is, but which requests happen to run makes shots differ by far more than
/// chance makes of single rows.
pub(crate) fn few_requests(seed: u64) -> Case {
    let (layers, experts, interval) = (4, 32, 4);
    let (kinds, at_once, shots) = (16, 13, 24 * interval);
    let mut random = Random(seed);
    let likes: Vec<Vec<Vec<f64>>> = (0..kinds)
        .map(|_| { 0..layers }.map(|_| likes(experts, &mut random)).collect())
        .collect();
    let shot = |random: &mut Random| {
        let mut of_kind = vec![0.0; kinds];
        for _ in 0..at_once {
            of_kind[random.below(kinds)] += 1.0;
        }
        let row = |layer: usize, expert: usize, random: &mut Random| {
            let kinds = likes.iter().zip(&of_kind);
            let mean: f64 = kinds.map(|(kind, n)| kind[layer][expert] * n).sum();
            (mean + mean.sqrt() * random.normal()).round().max(0.0) as u64
        };
        let rows = { 0..layers }
            .map(|layer| (0..experts).map(|e| row(layer, e, random)).collect())
            .collect();
        Shot { rows }
    };
    Case {
        name: format!("few requests, seed {seed}"),
        nodes: 4,
        slots: 9,
        experts: experts as u32,
        shots: (0..shots).map(|_| shot(&mut random)).collect(),
        interval,
        window: 4 * interval,
        start: Start::InOrder,
    }
}

/// Rows of one request for each expert: log-normal, a few hundred in all.
fn likes(experts: usize, random: &mut Random) -> Vec<f64> {
    const ROWS: f64 = 192.0;
    let weights: Vec<f64> = (0..experts).map(|_| random.normal().exp()).collect();
    let all: f64 = weights.iter().sum();
    weights
        .into_iter()
        .map(|weight| weight / all * ROWS)
        .collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Close to normal: the sum of twelve uniform draws.
    fn normal(&mut self) -> f64 {
        let unit = |_| (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        (0..12).map(unit).sum::<f64>() - 6.0
    }
}
