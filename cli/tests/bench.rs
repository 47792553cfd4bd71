//! `guild bench kernels` and `guild bench model`: what they print can be read by a program.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn lines(args: &[&str]) -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let run = Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(args)
        .current_dir(root)
        .output()
        .unwrap();
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    for line in &lines {
        for (field, is) in [
            ("name", line["name"].is_string()),
            ("format", line["format"].is_string()),
            ("m", line["m"].is_u64()),
            ("value", line["value"].as_f64().is_some_and(|v| v > 0.0)),
            ("unit", line["unit"].is_string()),
            ("floor", line["floor"].as_f64().is_some_and(|v| v > 0.0)),
            ("ratio", line["ratio"].as_f64().is_some_and(|v| v > 0.0)),
        ] {
            assert!(is, "{field} in {line}");
        }
        let ratio = line["value"].as_f64().unwrap() / line["floor"].as_f64().unwrap();
        assert!(
            (line["ratio"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9,
            "{line}"
        );
    }
    lines
}

fn named<'a>(lines: &'a [Value], name: &str) -> Vec<&'a Value> {
    let named = lines
        .iter()
        .filter(|l| l["name"].as_str().unwrap().starts_with(name));
    named.collect()
}

#[test]
fn kernels_are_held_against_the_machine() {
    let lines = lines(&["bench", "kernels", "--quick", "--json", "--threads", "2"]);
    for (name, formats) in [
        ("machine: read", &["-"][..]),
        ("machine: fma", &["-"]),
        ("gemm hot", &["f32", "bf16", "fp8", "int8", "int4"]),
        ("ffn cold", &["bf16", "fp8", "int8", "int4"]),
        ("moe layer", &["int8", "int4"]),
        ("mla decode", &["bf16", "fp8"]),
    ] {
        let of = named(&lines, name);
        for format in formats {
            assert!(of.iter().any(|l| l["format"] == *format), "{name} {format}");
        }
    }
}

#[test]
fn a_model_runs_without_servers() {
    let run =
        "bench model --model models/demo --prefill 24,40 --decode 3 --batch 1,4 --rounds 1 --json";
    for cache in ["f32", "bf16", "fp8"] {
        let args: Vec<&str> = run.split(' ').chain(["--kv-dtype", cache]).collect();
        let lines = lines(&args);
        let exactly = |name: &str| -> Vec<&Value> {
            lines.iter().filter(|line| line["name"] == name).collect()
        };
        for what in [
            "prefill 24",
            "prefill 40",
            "decode 3 after 16, overhead a token",
        ] {
            assert!(!exactly(what).is_empty(), "{what}");
        }
        let decode = exactly("decode 3 after 16");
        let batches: Vec<u64> = decode.iter().map(|l| l["m"].as_u64().unwrap()).collect();
        assert_eq!(batches, [1, 4]);
        assert!(decode.iter().all(|l| l["unit"] == "tokens/s"));
    }
}

#[test]
fn what_the_model_cannot_hold_is_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let run = Command::new(env!("CARGO_BIN_EXE_guild"))
        .args([
            "bench",
            "model",
            "--model",
            "models/demo",
            "--prefill",
            "9999999",
        ])
        .current_dir(root)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status.code(), Some(2), "{text}");
    assert!(text.contains("positions the model was made for"), "{text}");
}
