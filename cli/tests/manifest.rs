//! `guild manifest`: made, held against the files, and seen by the other tools.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn guild(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_guild"))
        .args(args)
        .output()
        .unwrap()
}

/// What a successful command says on stdout.
#[track_caller]
fn says(args: &[&str]) -> String {
    let output = guild(args);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code and stderr of a command that fails.
fn fails(args: &[&str]) -> (i32, String) {
    let output = guild(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr)
}

#[test]
fn a_manifest_is_written_held_against_the_files_and_names_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-yarn");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(file), dir.path().join(file)).unwrap();
    }
    let model = dir.path().to_str().unwrap();
    let inspected = || -> Value {
        serde_json::from_str(&says(&["inspect", "--model", model, "--json"])).unwrap()
    };

    let (code, told) = fails(&["manifest", model, "--check"]);
    assert!(code == 4 && told.contains("--write"), "{code}: {told}");
    assert_eq!(inspected()["manifest"], false);
    assert!(says(&["inspect", "--model", model]).contains("not verified"));

    let line = says(&["manifest", model, "--write"]);
    assert!(
        line.contains("written") && line.lines().count() == 1,
        "{line}"
    );
    assert_eq!(inspected()["manifest"], true);
    assert!(says(&["manifest", model]).contains("verified"));
    let summary: Value = serde_json::from_str(&says(&["manifest", model, "--json"])).unwrap();
    assert_eq!(summary["done"], "verified");
    assert!(summary["tensors"].as_u64().unwrap() > 100);

    // The last byte belongs to one tensor, the first of the data to another.
    let file = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let last = bytes.len() - 1;
    bytes[8 + header] ^= 1;
    bytes[last - 3] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (code, told) = fails(&["manifest", model]);
    assert_eq!(code, 4, "{told}");
    assert!(
        told.matches("model.safetensors: tensor `").count() == 2,
        "{told}"
    );
    assert!(told.contains("2 of "), "{told}");
    let (code, told) = fails(&["inspect", "--model", model]);
    assert!(code == 4 && told.contains("tensor `"), "{code}: {told}");

    // Another configuration is another model, and its manifest is made anew.
    let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
    fs::write(dir.path().join("config.json"), config + " ").unwrap();
    let (code, told) = fails(&["manifest", model]);
    assert!(code == 4 && told.contains("config.json"), "{code}: {told}");
    says(&["manifest", model, "--write"]);
    says(&["manifest", model, "--check"]);
}

#[test]
fn both_at_once_are_refused_and_help_tells_exit_codes() {
    let (code, told) = fails(&["manifest", "x", "--write", "--check"]);
    assert!(code == 2 && told.contains("--check"), "{code}: {told}");
    let (code, told) = fails(&["manifest"]);
    assert!(code == 2 && told.contains("MODEL"), "{code}: {told}");
    assert!(says(&["manifest", "--help"]).contains("Exit codes:"));
}

#[test]
fn a_random_model_has_a_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny");
    let out = out.to_str().unwrap();
    let small = ["--set", "num_hidden_layers=2", "--set", "vocab_size=300"];
    says(
        &[
            &["random-model", "--shape", "tiny", "--out", out],
            &small[..],
        ]
        .concat(),
    );
    assert!(says(&["manifest", out]).contains("verified"));
}

#[test]
fn the_demo_has_a_manifest_that_fits_it() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    assert!(says(&["manifest", demo.to_str().unwrap()]).contains("verified"));
}
