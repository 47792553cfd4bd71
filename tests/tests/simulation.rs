//! Thousands of histories of a simulated cluster: what must never be is never, what must come
//! comes, every rare thing has happened, and defects put in on purpose are found.
//!
//! `GUILD_SIM_SEEDS=100000` asks for more histories, `GUILD_SIM_FROM` for other ones, and
//! `GUILD_SIM_SEED=123 cargo nextest run -p guild-tests --test simulation replay --no-capture`
//! tells the history of one.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use guild_tests::sim::{Defect, Options, Report, run};
use guild_tests::work::line;
use serde_json::json;

/// Histories of a plain run.
const SEEDS: u64 = 3000;
/// Histories in which each defect put in must show at least once.
const SEEDS_FOR_A_DEFECT: u64 = 400;

/// What a plain run must have seen at least once: what is rare is worth simulating.
const SOMETIMES: [&str; 52] = [
    "call duplicated",
    "copy source failed",
    "copy with a wrong digest",
    "deposed leader forgets what it never wrote",
    "disk read failed",
    "drain asked for",
    "drain completed",
    "drain undone",
    "epoch failed at a node",
    "epoch withdrawn after a failed copy",
    "epoch withdrawn at its deadline",
    "epoch withdrawn for another reason",
    "epoch withdrawn with a lost node",
    "expert copied from a peer",
    "expert node suspected",
    "expert read from disk",
    "frame of an unknown epoch refused",
    "late rows hedged",
    "leader crashed",
    "leader deposed",
    "leader frozen",
    "leader inherits an epoch being loaded",
    "load given up",
    "machine lost",
    "migration completed after a rollback",
    "migration completed in good weather",
    "migration rolled back",
    "migration step published",
    "no room for a copy",
    "node joins again after its lease ran out",
    "node left",
    "old table freed",
    "old tables make room after joining again",
    "one-way cut",
    "placement refused without a lease",
    "process crashed",
    "process frozen",
    "readiness lost with an expert's last home",
    "rebalance completed",
    "rows answered without a lease",
    "rows go to another home",
    "store outage",
    "store wiped",
    "slow store",
    "stream ends with EXPERT_LOST",
    "stream goes on at another node",
    "stream leaves a silent node",
    "stream lost with its front door",
    "suspected node is back",
    "write fenced",
    "write not answered",
    "write overtaken",
];

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}: `{text}` is not a number")),
        Err(_) => default,
    }
}

fn how_to_replay(seed: u64) -> String {
    format!(
        "GUILD_SIM_SEED={seed} cargo nextest run -p guild-tests --test simulation replay --no-capture"
    )
}

/// Runs seeds on all cores until `enough` says so of one; returns the sum and the seeds that
/// failed with what went wrong.
fn sweep(
    seeds: std::ops::Range<u64>,
    options: Options,
    stop: bool,
) -> (Report, BTreeMap<u64, String>) {
    let next = AtomicU64::new(seeds.start);
    let over = AtomicBool::new(false);
    let sum = Mutex::new((Report::default(), BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Report::default();
                let mut failed = BTreeMap::new();
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let report = run(seed, &options);
                    mine.add(&report);
                    if let Some(wrong) = report.violation {
                        failed.insert(seed, wrong);
                        over.fetch_or(stop, Ordering::Relaxed);
                    }
                }
                let mut sum = sum.lock().unwrap();
                sum.0.add(&mine);
                sum.1.extend(failed);
            });
        }
    });
    sum.into_inner().unwrap()
}

#[test]
fn histories_break_no_promise_and_reach_every_rare_branch() {
    let from = number("GUILD_SIM_FROM", 0);
    let seeds = number("GUILD_SIM_SEEDS", SEEDS);
    let begun = Instant::now();
    let (sum, failed) = sweep(from..from + seeds, Options::default(), false);
    line(&json!({
        "case": "simulation",
        "seeds": seeds,
        "violations": failed.len(),
        "events": sum.events,
        "tokens": sum.tokens,
        "virtual_s": sum.virtual_time / 1_000_000,
        "wall_s": (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        "sometimes": sum.sometimes,
    }));
    for (seed, wrong) in failed.iter().take(20) {
        println!("seed {seed}: {wrong}\n  {}", how_to_replay(*seed));
    }
    assert!(
        failed.is_empty(),
        "{} of {seeds} histories break a promise",
        failed.len()
    );
    let never = SOMETIMES
        .iter()
        .filter(|what| !sum.sometimes.contains_key(*what));
    let never: Vec<_> = never.collect();
    assert!(
        seeds < SEEDS || never.is_empty(),
        "never happened: {never:?}"
    );
}

#[test]
fn replay() {
    let seed = number("GUILD_SIM_SEED", 1);
    let report = run(
        seed,
        &Options {
            loud: true,
            ..Options::default()
        },
    );
    if std::env::var("GUILD_SIM_SEED").is_ok() {
        for line in &report.log {
            println!("{line}");
        }
    }
    if let Some(wrong) = &report.violation {
        println!("seed {seed}: {wrong}");
    }
    assert_eq!(report.violation, None);
    let again = run(seed, &Options::default());
    assert_eq!(
        report.fingerprint, again.fingerprint,
        "one seed, one history"
    );
}

#[test]
fn every_defect_put_in_on_purpose_is_found() {
    let mut unfound = Vec::new();
    for defect in Defect::ALL {
        let options = Options {
            defect: Some(defect),
            ..Options::default()
        };
        let begun = Instant::now();
        let (_, failed) = sweep(0..SEEDS_FOR_A_DEFECT, options, true);
        let first = failed.first_key_value();
        line(&json!({
            "case": "simulation_finds_defect",
            "defect": format!("{defect:?}"),
            "seed": first.map(|(seed, _)| seed),
            "violation": first.map(|(_, wrong)| wrong),
            "wall_s": (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        }));
        if first.is_none() {
            unfound.push(defect);
        }
    }
    assert!(
        unfound.is_empty(),
        "not found in {SEEDS_FOR_A_DEFECT} histories: {unfound:?}"
    );
}
