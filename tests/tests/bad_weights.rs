//! Two hundred mutated checkpoints under their manifests: one flipped bit in every kind of tensor, damaged headers,
//! exchanged tensors and shards, edited configurations and manifests. Every one is refused by the real binary before
//! anything serves, and the message names file and tensor, or field. Damaged headers must not cost time or memory.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "bad_weights/attacks.rs"]
mod attacks;
#[path = "bad_weights/cases.rs"]
mod cases;
#[path = "bad_weights/file.rs"]
mod file;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cases::Case;
use file::Templates;
use guild_tests::process::{guild, guild_bin};

/// Exit codes of a refused configuration and a refused model.
const CONFIG_OR_MODEL: [i32; 2] = [3, 4];
/// Processes at a time: they wait for files as much as they compute.
const WORKERS: usize = 4;
/// Processor time that a damaged header may cost.
const HEADER_LIMIT: Duration = Duration::from_secs(2);
/// Resident memory that a damaged header may cost in all, in KiB.
const HEADER_MEMORY_KIB: u64 = 256 << 10;
/// Clock ticks of processor time in a second, in `/proc`.
const TICKS: u64 = 100;

/// The command line of a role over a checkpoint; nodes have no coordinator and no certificate, and need none to refuse.
fn role(number: usize, model: &str) -> Vec<&str> {
    let coordinator = "http://127.0.0.1:9";
    let mut args = match number % 4 {
        0 => vec![
            "expert-node",
            "--insecure",
            "--coordinator",
            coordinator,
            "--listen",
        ],
        1 => vec![
            "attention-node",
            "--insecure",
            "--coordinator",
            coordinator,
            "--listen",
        ],
        _ => vec!["up", "--grpc", "127.0.0.1:0", "--http"],
    };
    args.extend(["127.0.0.1:0", "--model", model]);
    args
}

/// What is wrong with how a case ended.
fn judge(case: &Case, code: i32, stdout: &str, stderr: &str) -> Option<String> {
    let why = if !CONFIG_OR_MODEL.contains(&code) {
        format!("exit code {code}")
    } else if stderr.contains("panicked") {
        "panicked".into()
    } else if stdout.contains("guild: serving") {
        "was ready".into()
    } else {
        let error = stderr.split("error: ").last().unwrap_or_default();
        let silent = case.names.iter().find(|n| !error.contains(n.as_str()))?;
        format!("does not name {silent:?}")
    };
    let last = stderr
        .lines()
        .rev()
        .find(|l| l.contains("error"))
        .unwrap_or(stderr);
    Some(format!("{}: {why}: {last}", case.what))
}

#[test]
fn two_hundred_mutated_weight_files_are_refused_before_readiness_by_file_and_tensor() {
    let begun = Instant::now();
    let templates = Templates::new();
    let cases = cases::all(&templates);
    assert!(cases.len() >= 200, "{} cases", cases.len());
    let (next, ups) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(number) else { break };
                    let dir = templates.copy(case.source);
                    (case.apply)(dir.path());
                    // What the manifest lists so is found only by who loads it.
                    let number = if case.listed { 2 } else { number };
                    let args = role(number, dir.path().to_str().unwrap());
                    let (code, stdout, stderr) = guild(&args);
                    ups.fetch_add(usize::from(args[0] == "up"), Ordering::Relaxed);
                    wrong
                        .lock()
                        .unwrap()
                        .extend(judge(case, code, &stdout, &stderr));
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    println!(
        "{}",
        serde_json::json!({
            "what": "mutated weights refused before readiness",
            "cases": cases.len(),
            "refused": cases.len() - wrong.len(),
            "through_guild_up": ups.into_inner(),
            "seconds": begun.elapsed().as_secs(),
        })
    );
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn a_hostile_header_index_or_manifest_costs_neither_time_nor_memory() {
    let templates = Templates::new();
    let cases = attacks::all();
    let mut wrong = Vec::new();
    let (mut slowest, mut largest) = (Duration::ZERO, 0);
    for case in &cases {
        let dir = templates.copy(case.source);
        (case.apply)(dir.path());
        let cost = measured(&role(2, dir.path().to_str().unwrap()), dir.path());
        wrong.extend(judge(case, cost.code, &cost.stdout, &cost.stderr));
        if cost.processor > HEADER_LIMIT || cost.memory_kib > HEADER_MEMORY_KIB {
            let (time, memory) = (cost.processor, cost.memory_kib);
            wrong.push(format!("{}: {time:?}, {memory} KiB", case.what));
        }
        slowest = slowest.max(cost.processor);
        largest = largest.max(cost.memory_kib);
    }
    println!(
        "{}",
        serde_json::json!({
            "what": "hostile headers refused",
            "cases": cases.len(),
            "slowest_processor_seconds": slowest.as_secs_f64(),
            "largest_resident_mib": largest >> 10,
        })
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// How a process ended, and what it took.
struct Cost {
    code: i32,
    stdout: String,
    stderr: String,
    /// Of all threads; zero where there is no `/proc`.
    processor: Duration,
    /// High-water mark as last seen.
    memory_kib: u64,
}

fn measured(args: &[&str], dir: &Path) -> Cost {
    let [out, err] = ["stdout", "stderr"].map(|name| dir.join(name));
    let mut child = Command::new(guild_bin())
        .args(args)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap())
        .spawn()
        .unwrap();
    let proc = Path::new("/proc").join(child.id().to_string());
    let mut memory_kib = 0;
    // An ended process keeps its times until it is waited for.
    let ticks = loop {
        let status = fs::read_to_string(proc.join("status")).unwrap_or_default();
        let high = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let high = high.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok());
        memory_kib = memory_kib.max(high.unwrap_or(0));
        let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
        // Behind the name in brackets: state, and user and system time as the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
        if matches!(fields.first(), None | Some(&("" | "Z" | "X"))) {
            let time = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok());
            break time(11).unwrap_or(0) + time(12).unwrap_or(0);
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let status = child.wait().unwrap();
    Cost {
        code: status.code().unwrap_or(-1),
        stdout: fs::read_to_string(out).unwrap(),
        stderr: fs::read_to_string(err).unwrap(),
        processor: Duration::from_millis(ticks * 1000 / TICKS),
        memory_kib,
    }
}
