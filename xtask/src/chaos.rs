//! The bars: tests in which something fails under load, run as a whole: real processes, the same
//! decisions in virtual time, and an attention node whose experts go. Each case of the first two
//! leaves a line of JSON; this module knows which tests these are and shows what they have measured.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::recipe::{FAIL_POINTS, Steps, cargo, runs, target_dir};
use crate::system;

/// The packages with bars.
const PACKAGES: &[&str] = &["guild-tests", "guild-attention-node"];
/// The test binaries; the shortest and most telling first.
const BARS: &[&str] = &[
    "simulation",
    "failover",
    "chaos",
    "resume",
    "colocated",
    "coordinators",
    "security",
    "bad_checkpoints",
    "bad_weights",
    "overload",
];
/// Tells the simulation how many histories are asked for.
const HISTORIES: &str = "GUILD_SIM_SEEDS";
/// Histories of a long run.
const LONG_HISTORIES: &str = "100000";
/// Tells the tests how much is asked for.
const EXTENT: &str = "GUILD_CHAOS";
/// Tells the tests where their lines go.
const REPORT: &str = "GUILD_CHAOS_REPORT";
/// Columns of the table; what else a line says follows them.
const COLUMNS: &[(&str, usize)] = &[
    ("case", 36),
    ("whole", 7),
    ("failed", 7),
    ("wrong", 6),
    ("itl_p99_ms", 11),
    ("longest_stall_ms", 17),
];

/// Runs all of them; the table comes also when some have failed.
pub(crate) fn run(long: bool) -> Result<()> {
    let mut steps = Steps::new("chaos");
    let target = target_dir()?;
    let report = target.join("chaos.jsonl");
    fs::create_dir_all(&target).context("cannot make the target directory")?;
    fs::write(&report, "").with_context(|| format!("cannot write {}", report.display()))?;
    if let Err(error) = system::etcd() {
        steps.skip("etcd", &format!("{error:#}"));
    }
    let features = ["--features", FAIL_POINTS];
    steps.run("build", cargo(&["build", "-p", "guild"]).args(features))?;
    let nextest = runs("cargo", &["nextest", "--version"]);
    let mut tests = match nextest {
        true => cargo(&["nextest", "run", "--no-fail-fast"]),
        false => cargo(&["test", "--no-fail-fast"]),
    };
    for package in PACKAGES {
        tests.args(["-p", package]);
    }
    if long {
        tests.env(HISTORIES, LONG_HISTORIES);
    }
    if nextest && long {
        tests.args(["--profile", "long"]);
    }
    for bar in BARS {
        tests.args(["--test", bar]);
    }
    if !nextest {
        // Clusters of processes would starve each other.
        tests.args(["--", "--test-threads", "1"]);
    }
    tests
        .env(EXTENT, if long { "long" } else { "short" })
        .env(REPORT, &report)
        .env("GUILD_BIN", target.join("debug").join("guild"));
    let outcome = steps.run("bars", &mut tests);
    show(&report)?;
    outcome?;
    steps.finish();
    Ok(())
}

fn show(report: &Path) -> Result<()> {
    let lines =
        fs::read_to_string(report).with_context(|| format!("cannot read {}", report.display()))?;
    let mut head = String::new();
    for (name, width) in COLUMNS {
        head.push_str(&cell(name, *width));
    }
    eprintln!("{head}  more");
    for line in lines.lines() {
        let Ok(Value::Object(mut line)) = serde_json::from_str(line) else {
            continue;
        };
        line.remove("test");
        let mut row = String::new();
        for (name, width) in COLUMNS {
            let value = line.remove(*name).unwrap_or(Value::Null);
            row.push_str(&cell(&shown(&value), *width));
        }
        // Lists and maps are for the file.
        let more = line
            .iter()
            .filter(|(_, value)| !value.is_object() && !value.is_array())
            .map(|(name, value)| format!("{name}={}", shown(value)));
        eprintln!("{row}  {}", more.collect::<Vec<_>>().join(" "));
    }
    eprintln!("== {}", report.display());
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Words to the left, numbers to the right.
fn cell(text: &str, width: usize) -> String {
    match text.starts_with(|first: char| first.is_ascii_digit() || first == '-') {
        true => format!("{text:>width$}"),
        false => format!("{text:<width$}"),
    }
}
