//! Drafts change nothing that a client is told but how it was come by: with `--speculate` every token and every
//! log-probability is that of a cluster without, and what was drafted and accepted is in the usage and in the metrics.

#![allow(clippy::unwrap_used)]

use guild_tests::client::{generate_all, mixed_workload};
use guild_tests::house::{House, Plan};
use guild_tests::http;
use guild_tests::process::{Cluster, Shape, demo};
use serde_json::{Value, json};

const VOCAB: u32 = 2048;
const TOKENS: u64 = 48;

/// Texts that the model knows how to go on with: there drafts hold.
fn texts() -> Vec<String> {
    let file = std::fs::read_to_string(demo().join("prompts.txt")).unwrap();
    let lines = file.lines().take(6);
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// One completion over HTTP; every other one is drawn by a seed.
fn complete(address: &str, n: usize, text: &str) -> Value {
    let body = json!({
        "model": "demo", "prompt": text, "max_tokens": TOKENS, "ignore_eos": true,
        "temperature": if n.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": n,
    });
    let answer = http::post(address, "/v1/completions", body.to_string().as_bytes()).unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

fn answers(address: &str) -> Vec<Value> {
    let texts = texts();
    let all = texts.iter().enumerate();
    all.map(|(n, text)| complete(address, n, text)).collect()
}

fn said(answers: &[Value]) -> Vec<&str> {
    let texts = answers.iter().map(|answer| &answer["choices"][0]["text"]);
    texts.map(|text| text.as_str().unwrap()).collect()
}

/// Tokens accepted and rejected, as the usage of these answers says; absent without drafts.
fn drafted(answers: &[Value]) -> (u64, u64) {
    let count = |answer: &Value, field: &str| {
        let details = &answer["usage"]["completion_tokens_details"];
        details[field].as_u64().unwrap_or(0)
    };
    let sum = |field: &str| answers.iter().map(|answer| count(answer, field)).sum();
    (
        sum("accepted_prediction_tokens"),
        sum("rejected_prediction_tokens"),
    )
}

/// The value of a series in the metrics.
fn metric(address: &str, name: &str, labels: &str) -> Option<u64> {
    let page = http::get(address, "/metrics").unwrap();
    assert_eq!(page.status, 200);
    let kind = page.header("content-type").unwrap();
    assert!(kind.starts_with("text/plain"), "{kind}");
    let series = format!("{name}{{model_name=\"demo\"{labels}}} ");
    let page = page.text();
    let value = page.lines().find_map(|line| line.strip_prefix(&series))?;
    Some(value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_the_same_with_and_without_drafts_and_what_held_is_told() {
    let requests = mixed_workload(VOCAB);
    let off = Cluster::start(Shape::Local, &demo(), 1, 2, &["--speculate", "off"]);
    let want = generate_all(&off.grpc, &requests).await;
    let plain = answers(&off.http);
    assert_eq!(drafted(&plain), (0, 0));
    let none = metric(&off.http, "guild_spec_decode_num_draft_tokens_total", "");
    assert_eq!(none, Some(0));
    drop(off);

    for setting in ["auto", "1", "2"] {
        let cluster = Cluster::start(Shape::Local, &demo(), 1, 2, &["--speculate", setting]);
        let with = answers(&cluster.http);
        assert_eq!(said(&plain), said(&with), "--speculate {setting}");
        let (accepted, rejected) = drafted(&with);
        let total = with.len() as u64 * TOKENS;
        // `auto` may have found that it does not pay on this machine.
        let some = if setting == "auto" { 0 } else { total / 8 };
        assert!(
            accepted >= some && rejected >= some,
            "{accepted} {rejected}"
        );
        assert!(accepted < total);

        let counted = |name: &str, labels: &str| {
            let name = format!("guild_spec_decode_num_{name}_total");
            metric(&cluster.http, &name, labels)
        };
        assert_eq!(counted("draft_tokens", ""), Some(accepted + rejected));
        assert_eq!(counted("accepted_tokens", ""), Some(accepted));
        let places = (0..2).map(|at| format!(",position=\"{at}\""));
        let places = places.map(|at| counted("accepted_tokens_per_pos", &at));
        let places: Vec<u64> = places.flatten().collect();
        assert_eq!(places.iter().sum::<u64>(), accepted, "{places:?}");
        if setting == "2" {
            assert!(places[0] > places[1] && places[1] > 0, "{places:?}");
            let tried = counted("draft_tokens_per_pos", ",position=\"0\"");
            assert_eq!(counted("drafts", ""), tried);
        }
        let generated = metric(&cluster.http, "guild_generation_tokens_total", "");
        assert_eq!(generated, Some(total));
        let ended = metric(
            &cluster.http,
            "guild_request_success_total",
            ",finished_reason=\"length\"",
        );
        assert_eq!(ended, Some(with.len() as u64));

        let got = generate_all(&cluster.grpc, &requests).await;
        assert_eq!(want, got, "--speculate {setting}");
    }

    let flags = ["--speculate", "2"].map(str::to_owned);
    let house = House::start(Plan {
        attention: 2,
        experts: 2,
        replicas: 1,
        attention_flags: flags.into(),
        ..Plan::default()
    })
    .await;
    let got = generate_all(house.grpc(), &requests).await;
    assert_eq!(want, got, "a process for every role");
    let with = answers(&house.coordinators[0].http);
    assert_eq!(said(&plain), said(&with), "a process for every role");
    assert!(drafted(&with).0 > 0);
}
