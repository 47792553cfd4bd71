//! What an operator does to a cluster that serves, with the commands an operator has: a node is
//! emptied and stopped, another comes in its place, and the load is spread anew.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guild_tests::client::{generate, greedy, request};
use guild_tests::house::{House, Plan};
use guild_tests::process::{START_LIMIT, guild};
use serde_json::Value;

/// Tokens of an answer.
const ANSWER: u32 = 12;

/// What a command of an operator prints as JSON.
fn json(house: &House, args: &[&str]) -> Value {
    let mut args = [
        &["experts"],
        args,
        &["--json", "--coordinator", &house.urls],
    ]
    .concat();
    let protection = house.protection();
    args.extend(protection.iter().map(String::as_str));
    let (code, stdout, stderr) = guild(&args);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

/// Experts that a node holds; None: it is no member.
fn held(house: &House, name: &str) -> Option<usize> {
    let list = json(house, &["ls"]);
    let nodes = list["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|node| node["name"] == name)?;
    Some(node["slots"].as_array().unwrap().len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_emptied_stopped_and_replaced_under_requests_and_no_token_changes() {
    let mut house = House::start(Plan {
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let prompt: Vec<u32> = (0..9).map(|at| 3 + at * 7).collect();
    let ask = move || request(&prompt, greedy(ANSWER, 0));
    let want = generate(house.grpc(), ask()).await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let (told, door, again) = (Arc::clone(&stop), house.grpc().to_owned(), ask.clone());
    let asking = tokio::spawn(async move {
        let mut served = 0;
        while !told.load(Ordering::SeqCst) {
            let answer = generate(&door, again()).await.unwrap();
            assert_eq!(answer, want);
            served += 1;
        }
        served
    });

    assert!(held(&house, "expert-1").unwrap() > 0);
    let drained = json(&house, &["drain", "expert-1", "--wait"]);
    assert_eq!(drained["slots"], 0);
    assert_eq!(held(&house, "expert-1"), Some(0));
    let mut emptied = house.experts.remove(1);
    assert!(emptied.terminate(START_LIMIT).await.success());
    assert_eq!(held(&house, "expert-1"), None);

    // One that comes now holds nothing before the load is spread anew.
    house.add_expert("expert-9".to_owned(), Vec::new());
    let newcomer = house.experts.last_mut().unwrap().process();
    newcomer.wait_for_line("joined the cluster", START_LIMIT);
    let plan = json(&house, &["rebalance", "--wait"]);
    assert!(plan["before"].as_f64() > plan["after"].as_f64(), "{plan}");
    assert!(plan["migration"].as_u64().is_some(), "{plan}");
    assert!(held(&house, "expert-9").unwrap() > 0);

    stop.store(true, Ordering::SeqCst);
    assert!(asking.await.unwrap() > 0);
}
