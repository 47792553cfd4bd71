//! Measures the planner against EPLB on synthetic drifting loads, and the time
//! both take: `cargo run --release -p guild-scheduler --example planning`.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use guild_scheduler::eplb::{Shape, rebalance};
use guild_scheduler::load::{Shot, Synthetic, Trace, balancedness};
use guild_scheduler::planner::{
    Cluster, Layer, Node, Policy, Split, fresh, node_loads, plan, relabel,
};

/// Shots between two plans.
const INTERVAL: usize = 8;

struct Case {
    nodes: u32,
    slots: u32,
    trace: Synthetic,
    split: Split,
}

fn main() {
    published();
    for split in [Split::Filled, Split::Even] {
        for (nodes, slots, zipf, drift, jump) in [
            (32, 9, 0.3, 0.05, 0.05),
            (32, 9, 0.6, 0.05, 0.05),
            (32, 9, 0.6, 0.10, 0.10),
            (32, 9, 1.0, 0.05, 0.05),
            (16, 18, 0.6, 0.05, 0.05),
            (8, 36, 0.8, 0.05, 0.05),
            (144, 2, 0.6, 0.05, 0.05),
        ] {
            let trace = Synthetic {
                seed: 7,
                layers: 58,
                experts: 256,
                shots: INTERVAL * 7,
                rows: 65_536,
                zipf,
                drift,
                jump,
            };
            against(&Case {
                nodes,
                slots,
                trace,
                split,
            });
        }
    }
}

/// EPLB of DeepSeek-V3 on four hosts of eight devices: best of 50.
fn published() {
    let trace = Synthetic {
        seed: 1,
        layers: 58,
        experts: 256,
        shots: 1,
        rows: 1 << 20,
        zipf: 0.6,
        drift: 0.1,
        jump: 0.0,
    };
    let trace = trace.trace().unwrap();
    let shape = Shape {
        num_replicas: 288,
        num_groups: 8,
        num_nodes: 4,
        num_gpus: 32,
    };
    let weight: Vec<Vec<f32>> = trace.shots[0]
        .rows
        .iter()
        .map(|r| r.iter().map(|&n| n as f32).collect())
        .collect();
    let mut best = Duration::MAX;
    for _ in 0..50 {
        let start = Instant::now();
        std::hint::black_box(rebalance(&weight, shape).unwrap());
        best = best.min(start.elapsed());
    }
    println!("EPLB 58x256 -> 288, 8 groups, 4 nodes, 32 devices: {best:?}");
}

fn against(case: &Case) {
    let trace = case.trace.trace().unwrap();
    let mut eplb = empty(case, &trace);
    let windows: Vec<Vec<&Shot>> = trace
        .shots
        .chunks(INTERVAL)
        .map(|c| c.iter().collect())
        .collect();
    eplb.layers = anew(&eplb, &windows[0]);
    let mut ours = eplb.clone();
    let (mut raw, mut moved, mut mine, mut worst) = (0, 0, 0, Duration::ZERO);
    let (mut theirs_score, mut ours_score, mut kept_score) = (0.0, 0.0, 0.0);
    let kept = eplb.clone();
    let intervals = windows.len() - 2;
    for pair in windows[1..].windows(2) {
        let layers = anew(&eplb, &pair[0]);
        raw += changed(&eplb.layers, &layers);
        let near: Vec<Layer> = (layers.iter().zip(&eplb.layers))
            .map(|(new, old)| Layer {
                layer: new.layer,
                slots: relabel(&eplb.nodes, &old.slots, new.slots.clone()),
            })
            .collect();
        moved += changed(&eplb.layers, &near);
        eplb.layers = near;
        let policy = Policy {
            split: case.split,
            ..Policy::default()
        };
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            std::hint::black_box(plan(&ours, &pair[0], &policy).unwrap());
            best = best.min(start.elapsed());
        }
        worst = worst.max(best);
        let next = plan(&ours, &pair[0], &policy).unwrap();
        mine += next.bytes;
        assert_eq!(next.lost_bytes, 0);
        ours.layers = next.layers;
        theirs_score += score(&eplb, &pair[1], case.split) / intervals as f64;
        ours_score += score(&ours, &pair[1], case.split) / intervals as f64;
        kept_score += score(&kept, &pair[1], case.split) / intervals as f64;
    }
    println!(
        "{:?} {}x{} zipf {} drift {} jump {}: EPLB {:.4} moving {} ({} relabelled), planner {:.4} moving {} ({:.1} % / {:.1} %), nothing moved {:.4}; planning {:?}",
        case.split,
        case.nodes,
        case.slots,
        case.trace.zipf,
        case.trace.drift,
        case.trace.jump,
        theirs_score,
        raw,
        moved,
        ours_score,
        mine,
        100.0 * mine as f64 / raw as f64,
        100.0 * mine as f64 / moved as f64,
        kept_score,
        worst,
    );
}

fn empty(case: &Case, trace: &Trace) -> Cluster {
    let node = |id| Node {
        id,
        capacity: 1.0,
        slots: case.slots,
        domain: id / 8,
        live: true,
    };
    let layer = |&layer: &u32| Layer {
        layer,
        slots: vec![vec![None; case.slots as usize]; case.nodes as usize],
    };
    Cluster {
        nodes: (0..case.nodes).map(node).collect(),
        layers: trace.layers.iter().map(layer).collect(),
        experts: trace.experts,
        expert_bytes: 1,
    }
}

/// EPLB on the sum of a window.
fn anew(cluster: &Cluster, window: &[&Shot]) -> Vec<Layer> {
    let row = |at: usize| -> Vec<f64> {
        let sum = |e: usize| window.iter().map(|s| s.rows[at][e] as f64).sum();
        (0..cluster.experts as usize).map(sum).collect()
    };
    (cluster.layers.iter().enumerate())
        .map(|(at, layer)| Layer {
            layer: layer.layer,
            slots: fresh(&cluster.nodes, &row(at)),
        })
        .collect()
}

/// Experts that are on a node where they were not: what must be copied.
fn changed(old: &[Layer], new: &[Layer]) -> u64 {
    let nodes = |l: &Layer| l.slots.clone();
    (old.iter().zip(new))
        .flat_map(|(o, n)| nodes(o).into_iter().zip(nodes(n)))
        .map(|(had, has)| {
            has.iter()
                .flatten()
                .filter(|e| !had.contains(&Some(**e)))
                .count() as u64
        })
        .sum()
}

fn score(cluster: &Cluster, window: &[&Shot], split: Split) -> f64 {
    let one = |shot: &&Shot| balancedness(&node_loads(cluster, shot, split).unwrap()).unwrap();
    window.iter().map(one).sum::<f64>() / window.len() as f64
}
