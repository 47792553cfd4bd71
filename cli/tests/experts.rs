//! `guild experts`: maps and dry runs from files.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn guild(args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A process that refuses its flags does not read.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn eplb(input: &str) -> Output {
    guild(&["experts", "eplb", "--input", "-"], input)
}

/// Exit code 2 and all of this on stderr.
fn refused(output: &Output, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(says), "does not say {says:?}: {stderr}");
    assert!(output.stdout.is_empty());
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/eplb")
}

#[test]
fn eplb_prints_the_published_maps() {
    for name in ["readme", "ties-3x64-r80", "global-8x256-r384"] {
        let path = goldens().join(format!("{name}.json"));
        let golden: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let output = guild(&["experts", "eplb", "--input", path.to_str().unwrap()], "");
        assert!(output.status.success(), "{name}");
        let maps: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(maps.as_object().unwrap().len(), 3);
        for field in ["phy2log", "log2phy", "logcnt"] {
            assert!(maps[field] == golden["portable"][field], "{name}: {field}");
        }
    }
}

#[test]
fn eplb_names_the_field_that_is_wrong() {
    let good = json!({"weight": [[4, 3, 2, 1.5]], "num_replicas": 8, "num_groups": 2, "num_nodes": 2, "num_gpus": 4});
    assert!(eplb(&good.to_string()).status.success());
    let cases = [
        (
            "num_gpus",
            json!(3),
            "num_gpus: 3 is not a multiple of num_nodes",
        ),
        ("num_gpus", json!(0), "num_gpus: must be at least 1"),
        ("num_nodes", json!(-2), "num_nodes: -2 is not a count"),
        (
            "num_groups",
            json!("two"),
            "num_groups: \"two\" is not a count",
        ),
        (
            "num_groups",
            json!(6),
            "weight: 4 is not a multiple of num_groups",
        ),
        (
            "num_replicas",
            json!(9),
            "num_replicas: 9 is not a multiple of num_gpus",
        ),
        ("num_replicas", json!(1u64 << 60), "num_replicas:"),
        ("weight", json!([]), "weight:"),
        ("weight", json!([[]]), "weight:"),
        ("weight", json!({"a": 1}), "weight:"),
        ("weight", json!([7]), "weight[0]: 7 is not a list"),
        ("weight", json!([[1, 2, 3, 4], [1, 2, 3]]), "weight[1]:"),
        (
            "weight",
            json!([[1, 2, null, 4]]),
            "weight[0][2]: null is not a load",
        ),
        (
            "weight",
            json!([[1, 2, 3, -4]]),
            "weight[0][3]: -4 is not a load",
        ),
        ("weight", json!([[1, 1e300, 3, 4]]), "weight[0][1]:"),
    ];
    for (field, value, says) in cases {
        let mut bad = good.clone();
        bad[field] = value;
        refused(&eplb(&bad.to_string()), says);
    }
    for field in [
        "weight",
        "num_replicas",
        "num_groups",
        "num_nodes",
        "num_gpus",
    ] {
        let mut bad = good.clone();
        bad.as_object_mut().unwrap().remove(field);
        refused(&eplb(&bad.to_string()), &format!("{field}: is missing"));
    }
    refused(&eplb("{"), "not JSON");
    refused(&eplb("[]"), "weight: is missing");
    refused(
        &guild(&["experts", "eplb", "--input", "/nowhere.json"], ""),
        "--input: /nowhere.json",
    );
    refused(&guild(&["experts", "eplb"], ""), "--input");
}

/// 24 shots of two layers of 16 experts; the hot expert changes once.
fn trace() -> String {
    let mut text = json!({"layers": [1, 2], "experts": 16}).to_string();
    for shot in 0..24u64 {
        let row = |hot: u64| -> Vec<u64> {
            (0..16)
                .map(|e| 100 + (e * 7 + shot * 5) % 11 + if e == hot { 400 } else { 0 })
                .collect()
        };
        let hot = if shot < 12 { 2 } else { 9 };
        text.push('\n');
        text.push_str(&json!({"rows": [row(hot), row(5)]}).to_string());
    }
    text
}

#[test]
fn a_dry_run_tells_balance_and_bytes_of_every_plan() {
    let flags = [
        "experts",
        "plan",
        "--trace",
        "-",
        "--nodes",
        "4",
        "--interval",
        "4",
        "--expert-bytes",
        "1000",
    ];
    let output = guild(&[&flags[..], &["--json", "--explain"]].concat(), &trace());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 5, "four plans and their sum: {text}");
    let all = &lines[4];
    assert!(
        all["balancedness"].as_f64() > all["unplanned_balancedness"].as_f64(),
        "{all}"
    );
    assert!(all["bytes"].as_u64() < all["eplb_bytes"].as_u64(), "{all}");
    let moves: Vec<&str> = lines
        .iter()
        .filter_map(|l| l["moves"].as_array())
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    assert!(
        moves.iter().any(|m| m.starts_with("layer 1: expert ")),
        "{moves:?}"
    );

    // Nothing moves without a budget, and people get sentences.
    let output = guild(&[&flags[..], &["--budget", "0"]].concat(), &trace());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("all plans: balancedness ") && text.contains(" moving 0 B;"),
        "{text}"
    );
}

#[test]
fn a_bad_trace_is_refused_by_line_and_field() {
    let plan = |trace: &str, more: &[&str]| {
        guild(
            &[&["experts", "plan", "--trace", "-", "--nodes", "4"], more].concat(),
            trace,
        )
    };
    refused(&plan("", &[]), "--trace: -: is empty");
    refused(
        &plan("{\"layers\": [1]}", &[]),
        "line 1: missing field `experts`",
    );
    refused(
        &plan(&trace().replacen("rows", "row", 1), &[]),
        "line 2: unknown field `row`",
    );
    refused(
        &plan(&trace().replace("[1,2]", "[2,1]"), &[]),
        "layers: 1 is listed out of order",
    );
    refused(
        &plan(&trace(), &["--interval", "9"]),
        "24 shots are fewer than three intervals of 9",
    );
    refused(
        &plan(&trace(), &["--interval", "4", "--slots", "2"]),
        "room for 8 experts",
    );
    refused(
        &plan(&trace(), &["--interval", "4", "--slots", "4000000000"]),
        "slots:",
    );
}
