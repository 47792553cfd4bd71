//! Measures the planner against EPLB on synthetic loads that stay, drift, jump and change suddenly, and
//! the time both take: `cargo run --release -p guild-scheduler --example planning -- [LAYERS] [SEED]`.
//!
//! Balancedness by both ways to share rows out, mean over the shots after each plan and the worst of
//! them; experts copied, and as a part of what EPLB copies with its rows given to the nodes so that most
//! stays where it is.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use guild_scheduler::eplb::{Shape, rebalance};
use guild_scheduler::load::{Shot, Synthetic};
use guild_scheduler::planner::{Aim, Policy, plan};

#[path = "../tests/rivals/mod.rs"]
mod rivals;

fn main() {
    let mut args = std::env::args().skip(1);
    let layers = args.next().map_or(58, |n| n.parse().unwrap());
    let seed = args.next().map_or(7, |n| n.parse().unwrap());
    published();
    for case in rivals::cases(seed, layers) {
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
        let interval = rivals::INTERVAL;
        let window: Vec<&Shot> = case.shots[interval..2 * interval].iter().collect();
        let start = Instant::now();
        std::hint::black_box(plan(&cluster, &window, &Policy::default()).unwrap());
        println!("  the first plan takes {:?}", start.elapsed());
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
