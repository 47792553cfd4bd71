//! One host under several senders at once, with merging and without, in turn.
//!
//! A sender stands for an attention node elsewhere: it steps through the layers
//! with experts, sends some rows to a few random experts of each, and pauses
//! between two layers as if it computed attention. Routes are uniform, which is
//! the least that senders can have in common.
//!
//! `cargo run --release -p guild-expert-node --example senders -- MODEL_DIR [SECONDS] [ROUNDS] [PAUSE_US]`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use guild_expert_node::{
    host::Host,
    merge::{MERGE_FROM_BYTES, Merging, Products},
    residents::Residents,
};
use guild_model::{Checkpoint, Cpu, checkpoint::Dtype};
use guild_transport::{Rows, SlotHost, Work};

const SENDERS: [usize; 3] = [1, 2, 4];
const ROWS: [usize; 3] = [1, 4, 16];

struct Bench {
    host: Host,
    merging: Merging,
    width: usize,
    layers: usize,
    experts: usize,
    top_k: usize,
    pause: Duration,
}

/// What one run has reached.
struct Run {
    /// Rows through a layer, a second.
    rows: f64,
    /// The same of a second of CPU time, which other load of the machine changes less.
    per_cpu: f64,
    /// Mean rows of a product.
    together: f64,
    /// Milliseconds of a layer, median and 99th of a hundred.
    median: f64,
    p99: f64,
}

impl Bench {
    fn open(dir: &str, pause: Duration) -> Self {
        let checkpoint = Checkpoint::open(Path::new(dir)).unwrap();
        let config = checkpoint.config();
        let width = config.hidden_size;
        let (experts, top_k) = (config.n_routed_experts, config.num_experts_per_tok);
        let moe = (0..config.num_hidden_layers).filter(|&layer| config.is_moe(layer));
        let moe: Vec<u32> = moe.map(|layer| layer as u32).collect();
        let merging = Merging::default();
        let host = Host::new("bench", width, Cpu::new(0)).merging(merging.clone());
        let slots = moe
            .iter()
            .flat_map(|&layer| (0..experts as u32).map(move |e| (layer, e)));
        let slots: Vec<_> = slots.collect();
        let residents = Residents::new(checkpoint.clone(), Dtype::Auto, 0);
        let loaded = slots
            .iter()
            .map(|&key| residents.read(key).unwrap())
            .collect();
        host.publish(1, loaded);
        host.calibrate();
        println!(
            "rows/s as calibrated: {:.0}\n",
            host.rows_per_second().unwrap()
        );
        Self {
            host,
            merging,
            width,
            layers: moe.len(),
            experts,
            top_k,
            pause,
        }
    }

    fn run(&self, senders: usize, rows: usize, merge: bool, time: Duration) -> Run {
        let from = if merge { MERGE_FROM_BYTES } else { u64::MAX };
        self.merging.set_from_bytes(from);
        let before = self.merging.products();
        let cpu = cpu_seconds();
        let end = Instant::now() + time;
        let mut times: Vec<f64> = thread::scope(|scope| {
            let senders: Vec<_> = (0..senders)
                .map(|sender| scope.spawn(move || self.send(sender as u64, rows, end)))
                .collect();
            let times = senders
                .into_iter()
                .flat_map(|sender| sender.join().unwrap());
            times.collect()
        });
        let Products {
            products,
            rows: pairs,
        } = self.merging.products();
        times.sort_by(f64::total_cmp);
        Run {
            rows: (times.len() * rows) as f64 / time.as_secs_f64(),
            per_cpu: (times.len() * rows) as f64 / (cpu_seconds() - cpu),
            together: (pairs - before.rows) as f64 / (products - before.products) as f64,
            median: times[times.len() / 2],
            p99: times[times.len() * 99 / 100],
        }
    }

    /// Sends until `end`; milliseconds of every layer.
    fn send(&self, source: u64, rows: usize, end: Instant) -> Vec<f64> {
        let mut dice = 0x9E37_79B9_7F4A_7C15 ^ (source + 1);
        let mut below = |n: usize| {
            // xorshift64 (Marsaglia 2003).
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            (dice % n as u64) as usize
        };
        let x = vec![0.25; rows * self.width];
        let mut times = Vec::new();
        for layer in (0..self.layers).cycle() {
            let mut slots = vec![Vec::new(); self.experts];
            for row in 0..rows {
                let mut chosen = Vec::new();
                while chosen.len() < self.top_k {
                    let expert = below(self.experts);
                    if !chosen.contains(&expert) {
                        chosen.push(expert);
                        slots[expert].push(row as u32);
                    }
                }
            }
            let first = layer * self.experts;
            let slots = slots.into_iter().enumerate();
            let slots = slots.filter(|(_, rows)| !rows.is_empty());
            let begun = Instant::now();
            if begun >= end {
                break;
            }
            let work = Work {
                epoch: 1,
                width: self.width,
                rows: Rows::from(x.clone()),
                slots: slots.map(|(e, rows)| ((first + e) as u32, rows)).collect(),
                deadline: None,
                source,
            };
            self.host.execute(work).unwrap();
            times.push(begun.elapsed().as_secs_f64() * 1e3);
            thread::sleep(self.pause);
        }
        times
    }
}

/// CPU time of this process, all threads, from the ticks (10 ms) of proc(5).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    let ticks = fields
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<f64>().unwrap());
    ticks.sum::<f64>() / 100.0
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args
        .next()
        .expect("usage: senders MODEL_DIR [SECONDS] [ROUNDS] [PAUSE_US]");
    let mut number = |default: f64| args.next().map_or(default, |a| a.parse().unwrap());
    let time = Duration::from_secs_f64(number(2.0));
    let rounds = number(3.0) as usize;
    let pause = Duration::from_secs_f64(number(1000.0) * 1e-6);
    let bench = Arc::new(Bench::open(&dir, pause));
    println!(
        "| senders x rows | rows/s, on / off | rows/CPU s, off | on | on / off | rows a product, off | on | median ms, off | on | p99 ms, off | on |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for senders in SENDERS {
        for rows in ROWS {
            let mut runs = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for merge in [false, true] {
                    runs[usize::from(merge)].push(bench.run(senders, rows, merge, time));
                }
            }
            let each = |merge: usize, of: fn(&Run) -> f64| median(runs[merge].iter().map(of));
            let ratio = |of: fn(&Run) -> f64| {
                median(
                    runs[0]
                        .iter()
                        .zip(&runs[1])
                        .map(|(off, on)| of(on) / of(off)),
                )
            };
            println!(
                "| {senders} x {rows} | {:.2} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
                ratio(|run| run.rows),
                each(0, |run| run.per_cpu),
                each(1, |run| run.per_cpu),
                ratio(|run| run.per_cpu),
                each(0, |run| run.together),
                each(1, |run| run.together),
                each(0, |run| run.median),
                each(1, |run| run.median),
                each(0, |run| run.p99),
                each(1, |run| run.p99),
            );
        }
    }
    println!(
        "\nrows/s after all that: {:.0}",
        bench.host.rows_per_second().unwrap()
    );
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
