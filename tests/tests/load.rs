//! The load of experts as an operator sees it: counted on real attention nodes, merged by the
//! coordinator, shown by `guild experts`, recorded and played to the planner.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use guild_proto::inference::v1::GenerateRequest;
use guild_tests::client::{generate, greedy, request};
use guild_tests::process::{Cluster, Guild, START_LIMIT, Shape, demo, guild};
use serde_json::Value;

/// Tokens of an answer.
const ANSWER: u32 = 6;

fn requests() -> Vec<GenerateRequest> {
    (0..6)
        .map(|n: u32| {
            let prompt: Vec<u32> = (0..5 + n).map(|at| 3 + (at * 7 + n * 11) % 90).collect();
            request(&prompt, greedy(ANSWER, 0))
        })
        .collect()
}

/// Rows that the requests take through every layer: the last token is never an input.
fn rows() -> u64 {
    (0..6u64).map(|n| 5 + n + u64::from(ANSWER) - 1).sum()
}

/// The cluster address that `guild up` shows when it starts.
fn cluster_of(up: &mut Guild) -> String {
    let line = up.wait_for_line("  cluster ", START_LIMIT);
    line.split_whitespace().last().unwrap().to_owned()
}

fn json(args: &[&str]) -> Value {
    let (code, stdout, stderr) = guild(args);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn numbers(list: &Value) -> Vec<u64> {
    let list = list.as_array().unwrap();
    list.iter().map(|n| n.as_u64().unwrap()).collect()
}

/// (layer, rows of each expert) once every row of `want` is counted.
fn counted(url: &str, want: u64) -> Vec<(u64, Vec<u64>)> {
    let end = Instant::now() + START_LIMIT;
    loop {
        let load = json(&["experts", "load", "--coordinator", url, "--json"]);
        let layers: Vec<(u64, Vec<u64>)> = (load["layers"].as_array().unwrap().iter())
            .map(|layer| (layer["layer"].as_u64().unwrap(), numbers(&layer["rows"])))
            .collect();
        let most = layers.iter().map(|(_, rows)| rows.iter().sum::<u64>());
        if most.max().unwrap() >= want {
            for layer in load["layers"].as_array().unwrap() {
                let balance = layer["balancedness"].as_f64().unwrap();
                assert!(balance > 0.0 && balance <= 1.0, "{layer}");
            }
            return layers;
        }
        assert!(Instant::now() < end, "{want} rows are not counted: {load}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_counts_are_those_of_the_workload_however_many_attention_nodes() {
    let config = std::fs::read_to_string(demo().join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let want = rows() * config["num_experts_per_tok"].as_u64().unwrap();
    let mut seen = Vec::new();
    for attention in [1, 2] {
        let mut cluster = Cluster::start(Shape::Local, &demo(), attention, 2, &["--threads", "1"]);
        let url = cluster_of(&mut cluster.processes[0]);
        for request in requests() {
            generate(&cluster.grpc, request).await.unwrap();
        }
        let layers = counted(&url, want);
        for (layer, rows) in &layers {
            let mtp = *layer >= config["num_hidden_layers"].as_u64().unwrap();
            let want = if mtp { 0 } else { want };
            assert_eq!(rows.iter().sum::<u64>(), want, "layer {layer}");
        }
        seen.push(layers);

        let map = guild(&["experts", "load", "--coordinator", &url]).1;
        assert!(map.contains("hottest experts:"), "{map}");
        let held = json(&["experts", "ls", "--coordinator", &url, "--json"]);
        let slots = held["nodes"].as_array().unwrap().iter();
        let slots: usize = slots.map(|n| n["slots"].as_array().unwrap().len()).sum();
        assert_eq!(slots, held["single"].as_array().unwrap().len(), "{held}");
        let words = guild(&["experts", "ls", "--coordinator", &url]).1;
        assert!(
            words.contains("expert-1") && words.contains("1 copy"),
            "{words}"
        );
    }
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_load_can_be_planned_with() {
    let mut cluster = Cluster::up(&demo());
    let url = cluster_of(&mut cluster.processes[0]);
    let file = std::env::temp_dir().join(format!("guild-load-{}.jsonl", std::process::id()));
    let out = file.to_str().unwrap();
    let mut recording = Guild::start(&[
        "experts",
        "record",
        "--coordinator",
        &url,
        "--out",
        out,
        "--seconds",
        "8",
    ]);
    while recording.is_running() {
        for request in requests() {
            generate(&cluster.grpc, request).await.unwrap();
        }
    }
    assert!(recording.wait(START_LIMIT).success());
    let said = recording.output();
    let flags = [
        "--nodes",
        "2",
        "--interval",
        "1",
        "--expert-bytes",
        "1000",
        "--json",
    ];
    let plan = [&["experts", "plan", "--trace", out][..], &flags].concat();
    let (code, stdout, stderr) = guild(&plan);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(code, 0, "{said}: {stderr}");
    let all: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert!(all["balancedness"].as_f64().unwrap() > 0.0, "{stdout}");
}
