//! `guild up` on every golden checkpoint: an independent implementation agrees,
//! through the command line that a user types.

#![allow(clippy::unwrap_used)]

use guild_tests::golden::{CASES, Expected, LOGPROB_BOUND_F32, Prompt, prompts, variants};
use guild_tests::process::{Cluster, demo, golden_dir, guild, root};
use serde_json::Value;

fn ids(tokens: &[u32]) -> String {
    tokens
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

fn numbers(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

/// Every reported log-probability, chosen and alternative, against the reference's row.
fn check_positions(case: &str, reported: &Value, rows: &[Vec<f32>], tokens: &[u32]) {
    let reported = reported.as_array().unwrap();
    assert_eq!(reported.len(), tokens.len(), "{case}: one entry per token");
    for (i, entry) in reported.iter().enumerate() {
        let row = &rows[i];
        let token = entry["token_id"].as_u64().unwrap() as u32;
        assert_eq!(token, tokens[i], "{case}: token at {i}");
        let close = |id: u32, logprob: &Value, what: &str| {
            let got = logprob.as_f64().unwrap() as f32;
            let want = row[id as usize];
            assert!(
                (got - want).abs() <= LOGPROB_BOUND_F32,
                "{case}: {what} of token {id} at {i}: {got}, reference {want}"
            );
        };
        close(token, &entry["logprob"], "logprob");
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 5, "{case}: as many alternatives as asked for");
        for pair in top {
            close(pair[0].as_u64().unwrap() as u32, &pair[1], "alternative");
        }
    }
}

fn check_prompt(case: &str, endpoint: &str, prompt: &Prompt) {
    let (code, stdout, stderr) = guild(&[
        "generate",
        "--endpoint",
        endpoint,
        "--token-ids",
        &ids(&prompt.ids),
        "--max-tokens",
        &prompt.greedy.len().to_string(),
        "--logprobs",
        "5",
        "--prompt-logprobs",
        "5",
        "--ignore-eos",
        "--json",
    ]);
    assert_eq!(code, 0, "{case}: {stderr}");
    let out: Value =
        serde_json::from_str(stdout.trim()).unwrap_or_else(|e| panic!("{case}: {e}: {stdout}"));
    assert_eq!(
        numbers(&out["token_ids"]),
        prompt.greedy,
        "{case}: greedy continuation of {} tokens",
        prompt.ids.len()
    );
    check_positions(
        case,
        &out["prompt_logprobs"],
        &prompt.logprobs,
        &prompt.ids[1..],
    );
    assert_eq!(
        out["logprobs"].as_array().unwrap().len(),
        prompt.greedy.len()
    );
    let first = out["logprobs"][0]["logprob"].as_f64().unwrap() as f32;
    let want = prompt.logprobs.last().unwrap()[prompt.greedy[0] as usize];
    assert!(
        (first - want).abs() <= LOGPROB_BOUND_F32,
        "{case}: first output logprob {first}, reference {want}"
    );
    assert_eq!(out["finish_reason"], "length");
    assert_eq!(out["usage"]["prompt_tokens"], prompt.ids.len());
    assert_eq!(out["usage"]["completion_tokens"], prompt.greedy.len());
    assert!(out["text"].is_null(), "{case} has no tokenizer");
}

#[test]
fn every_golden_checkpoint_is_served_as_the_reference_computed_it() {
    for case in CASES {
        let cluster = Cluster::up(&golden_dir(case));
        for prompt in prompts(case) {
            check_prompt(case, &cluster.grpc, &prompt);
        }
    }
}

/// Runs a command that prints one JSON answer and holds it to what was expected.
fn check_expected(what: &str, args: &[&str], expected: &Expected) {
    let (prompt, tokens) = (ids(&expected.ids), expected.greedy.len().to_string());
    let asked = ["--token-ids", &prompt, "--max-tokens", &tokens, "--json"];
    let (code, stdout, stderr) = guild(&[args, &asked].concat());
    assert_eq!(code, 0, "{what}: {stderr}");
    let out: Value = serde_json::from_str(stdout.trim()).unwrap();
    let length = expected.ids.len();
    assert_eq!(
        numbers(&out["token_ids"]),
        expected.greedy,
        "{what}: after {length} tokens"
    );
    let reported = out["prompt_logprobs"].as_array().unwrap();
    assert_eq!(reported.len(), expected.logprobs.len(), "{what}");
    for (at, (reported, want)) in reported.iter().zip(&expected.logprobs).enumerate() {
        let got = reported["logprob"].as_f64().unwrap() as f32;
        assert!(
            (got - want).abs() <= LOGPROB_BOUND_F32,
            "{what}: prompt token {at}: {got}, expected {want}"
        );
    }
}

#[test]
fn every_variant_of_the_family_is_served_as_transformers_computed_it() {
    let variants = variants();
    assert!(variants.len() >= 13);
    for (dir, prompts) in variants {
        let what = dir.file_name().unwrap().to_string_lossy().into_owned();
        let cluster = Cluster::up(&dir);
        let model = dir.to_str().unwrap();
        for expected in &prompts {
            let served = [
                "generate",
                "--endpoint",
                &cluster.grpc,
                "--ignore-eos",
                "--prompt-logprobs",
                "0",
            ];
            check_expected(&what, &served, expected);
            let reference = ["inspect", "--model", model, "--reference"];
            check_expected(&format!("{what}, reference"), &reference, expected);
        }
    }
}

#[test]
fn the_demo_continues_as_the_reference_did() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(root().join("tests/golden/demo.json")).unwrap())
            .unwrap();
    let cluster = Cluster::up(&demo());
    for case in golden["cases"].as_array().unwrap() {
        let (prompt, greedy) = (numbers(&case["prompt_ids"]), numbers(&case["greedy_ids"]));
        let (code, stdout, stderr) = guild(&[
            "generate",
            "--endpoint",
            &cluster.grpc,
            "--token-ids",
            &ids(&prompt),
            "--max-tokens",
            &greedy.len().to_string(),
            "--ignore-eos",
            "--json",
        ]);
        assert_eq!(code, 0, "{stderr}");
        let out: Value = serde_json::from_str(stdout.trim()).unwrap();
        assert_eq!(numbers(&out["token_ids"]), greedy);
        assert!(!out["text"].as_str().unwrap().is_empty());
    }
}
