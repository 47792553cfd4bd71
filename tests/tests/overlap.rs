//! Steps in two micro-batches over a network that takes its time: the tokens of a cluster in one process.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use guild_tests::client::{generate_all, generate_each, mixed_workload};
use guild_tests::house::{House, Plan};
use guild_tests::process::{Cluster, START_LIMIT, Shape, demo};

/// Tokens of the demo checkpoint.
const VOCABULARY: u32 = 2048;
/// From one node to the other.
const ONE_WAY: Duration = Duration::from_millis(1);

#[tokio::test(flavor = "multi_thread")]
async fn steps_in_two_micro_batches_over_a_slow_network_emit_the_bits_of_one_process() {
    let requests = mixed_workload(VOCABULARY);
    let up = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
    let want = generate_each(&up.grpc, &requests).await;
    drop(up);
    let flags = ["--micro-batches", "on"];
    let mut house = House::start(Plan {
        experts: 2,
        replicas: 1,
        proxies: 2,
        attention_flags: flags.map(str::to_owned).to_vec(),
        ..Plan::default()
    })
    .await;
    for proxy in &house.proxies {
        proxy.delay(ONE_WAY);
    }
    let got = generate_all(house.grpc(), &requests).await;
    for (which, (want, got)) in want.iter().zip(&got).enumerate() {
        assert_eq!(want, got, "request {which}");
    }
    let node = house.attention.remove(0);
    node.signal("TERM");
    let mut node = node.into_process();
    assert!(node.wait(START_LIMIT).success(), "{}", node.output());
    let output = node.output();
    let line = output
        .lines()
        .find(|line| line.contains("in_two="))
        .unwrap();
    assert!(!line.contains("in_two=0 "), "{line}");
}
