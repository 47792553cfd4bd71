//! Measures the planner against EPLB on loads made up that stay, drift, jump and change suddenly, on a recorded one, and
//! the time both take: `cargo run --release -p guild-scheduler --example planning -- [LAYERS] [SEED]`.
//!
//! Balancedness by both ways to share rows out, mean over the shots after each plan and the worst of
//! them; experts copied, and as a part of what EPLB copies with its rows given to the nodes so that most
//! stays where it is.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use guild_scheduler::eplb::{Shape, rebalance};
use guild_scheduler::load::{Shot, Synthetic};
use guild_scheduler::placement::{NodeSlots, Placement};
use guild_scheduler::planner::{Aim, Cluster, Layer, Node, Policy, plan};
use guild_scheduler::spread::{Queue, spread};

#[path = "../tests/rivals/mod.rs"]
mod rivals;

fn main() {
    let mut args = std::env::args().skip(1);
    let layers = args.next().map_or(58, |n| n.parse().unwrap());
    let seed = args.next().map_or(7, |n| n.parse().unwrap());
    published();
    at_hand();
    let few = rivals::few_requests(seed);
    let recorded = [(4, 9), (8, 5)].map(|cluster| rivals::recorded(cluster, rivals::Start::Eplb));
    let cases = rivals::cases(seed, layers).into_iter();
    for case in cases.chain([few]).chain(recorded) {
        println!("{}, at first {:?}", case.name, case.start);
        let theirs = rivals::eplb(&case);
        let guild = |aim| {
            let policy = Policy {
                aim,
                ..Policy::default()
            };
            rivals::guild(&case, &policy)
        };
        let rows = [
            (
                "nothing moved",
                rivals::over(&case, |cluster, _| cluster.layers.clone()),
            ),
            ("EPLB", theirs),
            ("guild", guild(Aim::Both)),
            ("guild, water-filling alone", guild(Aim::Filled)),
        ];
        for (name, outcome) in rows {
            let rivals::Outcome {
                even,
                filled,
                copies,
            } = outcome;
            println!(
                "  {name:<26}  even {:.4} (worst {:.4})  filled {:.4} (worst {:.4})  copies {copies:>6} ({:.1} %)",
                even.mean,
                even.worst,
                filled.mean,
                filled.worst,
                100.0 * copies as f64 / theirs.copies as f64
            );
        }
        let cluster = case.cluster();
        let window: Vec<&Shot> = case.shots[case.interval..2 * case.interval]
            .iter()
            .collect();
        let start = Instant::now();
        std::hint::black_box(plan(&cluster, &window, &Policy::default()).unwrap());
        println!("  the first plan takes {:?}", start.elapsed());
    }
}

/// The least time of 50.
fn best<T>(mut work: impl FnMut() -> T) -> Duration {
    let once = |_| {
        let start = Instant::now();
        std::hint::black_box(work());
        start.elapsed()
    };
    (0..50).map(once).min().unwrap_or_default()
}

/// What an attention node does with a placement of DeepSeek-V3's size: once an epoch, and once for
/// every layer of every batch.
fn at_hand() {
    let cases = rivals::cases(1, 58);
    let cluster = cases[0].cluster();
    let nodes = slots(&cluster);
    let table = best(|| Placement::new(1, nodes.clone()).unwrap());
    println!("58x256 -> 288 on 32 nodes: the table of an epoch {table:?}");
    let placement = Placement::new(1, nodes).unwrap();
    let layer = cluster.layers[0].layer;
    let homes: Vec<Vec<u32>> = (0..cluster.experts)
        .map(|expert| {
            let homes = placement.resolve(layer, expert).iter();
            homes.map(|&(node, _)| node).collect()
        })
        .collect();
    let queue = Queue {
        rows: 0,
        capacity: 1e5,
        latency: 1e-3,
    };
    let queues = vec![queue; cluster.nodes.len()];
    for tokens in [1u64, 64, 4096] {
        let rows: Vec<u32> = cases[0].shots[0].rows[0]
            .iter()
            .map(|&n| (n * tokens * 8 / rivals::ROWS) as u32)
            .collect();
        let time = best(|| spread(&rows, &homes, &queues).unwrap());
        println!("  {tokens} tokens of 8 experts spread over their homes: {time:?}");
    }
}

fn slots(cluster: &Cluster) -> Vec<NodeSlots> {
    let node = |(n, node): (usize, &Node)| {
        let held = |layer: &Layer| {
            let mut held: Vec<(u32, u32)> = { layer.slots[n].iter().flatten() }
                .map(|&expert| (layer.layer, expert))
                .collect();
            held.sort_unstable();
            // EPLB puts two copies on one node.
            held.dedup();
            held
        };
        NodeSlots {
            node: node.id,
            slots: cluster.layers.iter().flat_map(held).collect(),
        }
    };
    cluster.nodes.iter().enumerate().map(node).collect()
}

/// EPLB of DeepSeek-V3 on four hosts of eight devices.
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
    let time = best(|| rebalance(&weight, shape).unwrap());
    println!("EPLB 58x256 -> 288, 8 groups, 4 nodes, 32 devices: {time:?}");
}
