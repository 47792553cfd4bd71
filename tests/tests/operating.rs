//! What an operator does to a cluster that serves, with the commands an operator has: a node is
//! emptied and stopped, another comes in its place, and the load is spread anew.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guild_tests::client::{generate, greedy, request};
use guild_tests::process::{Cluster, Guild, START_LIMIT, Shape, demo, guild};
use serde_json::Value;

/// Tokens of an answer.
const ANSWER: u32 = 12;

/// What a command prints as JSON.
fn json(args: &[&str]) -> Value {
    let (code, stdout, stderr) = guild(args);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

/// Experts that a node holds; None: it is no member.
fn held(url: &str, name: &str) -> Option<usize> {
    let list = json(&["experts", "ls", "--coordinator", url, "--json"]);
    let nodes = list["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|node| node["name"] == name)?;
    Some(node["slots"].as_array().unwrap().len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_emptied_stopped_and_replaced_under_requests_and_no_token_changes() {
    let mut cluster = Cluster::start(Shape::Processes, &demo(), 1, 3, &["--threads", "1"]);
    let line = cluster.processes[0].wait_for_line("guild: listening on ", START_LIMIT);
    let url = line.rsplit(' ').next().unwrap().to_owned();
    let prompt: Vec<u32> = (0..9).map(|at| 3 + at * 7).collect();
    let ask = move || request(&prompt, greedy(ANSWER, 0));
    let want = generate(&cluster.grpc, ask()).await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let (told, door, again) = (Arc::clone(&stop), cluster.grpc.clone(), ask.clone());
    let asking = tokio::spawn(async move {
        let mut served = 0;
        while !told.load(Ordering::SeqCst) {
            let answer = generate(&door, again()).await.unwrap();
            assert_eq!(answer, want);
            served += 1;
        }
        served
    });

    assert!(held(&url, "expert-1").unwrap() > 0);
    let drain = [
        "experts",
        "drain",
        "expert-1",
        "--coordinator",
        &url,
        "--wait",
        "--json",
    ];
    assert_eq!(json(&drain)["slots"], 0);
    assert_eq!(held(&url, "expert-1"), Some(0));
    let joined = "joined the cluster name=\"expert-1\"";
    let mut processes = cluster.processes.iter();
    let at = processes.position(|process| process.output().contains(joined));
    let emptied = cluster.processes.remove(at.unwrap());
    assert!(emptied.terminate().success());
    assert_eq!(held(&url, "expert-1"), None);

    // One that comes now holds nothing before the load is spread anew.
    let model = demo();
    let mut newcomer = Guild::start(&[
        "expert-node",
        "--model",
        model.to_str().unwrap(),
        "--coordinator",
        &url,
        "--name",
        "expert-9",
        "--threads",
        "1",
    ]);
    newcomer.wait_for_line("joined the cluster", START_LIMIT);
    let rebalance = [
        "experts",
        "rebalance",
        "--coordinator",
        &url,
        "--wait",
        "--json",
    ];
    let plan = json(&rebalance);
    assert!(plan["before"].as_f64() > plan["after"].as_f64(), "{plan}");
    assert!(plan["migration"].as_u64().is_some(), "{plan}");
    assert!(held(&url, "expert-9").unwrap() > 0);

    stop.store(true, Ordering::SeqCst);
    assert!(asking.await.unwrap() > 0);
}
