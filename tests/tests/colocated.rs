//! Processes that are an attention node and an expert node at the same time: the same tokens as
//! one process gives, no wire between the two, and nothing lost when one of them dies or leaves.

#![allow(clippy::unwrap_used)]

use guild_proto::cluster::v1::{Role, StatusResponse};
use guild_tests::certs::Certs;
use guild_tests::client::mixed_workload;
use guild_tests::house::{House, Node, Plan, ready};
use guild_tests::process::{START_LIMIT, demo, guild};
use guild_tests::proxy::Proxy;
use guild_tests::work::{Work, assert_nothing_failed, line, report, seconds};
use serde_json::json;

/// Tokens of the demo checkpoint.
const VOCABULARY: u32 = 2048;

/// A coordinator and processes of both roles, the expert ports of which are behind proxies.
async fn house(nodes: usize, replicas: usize) -> House {
    House::start(Plan {
        attention: nodes,
        together: true,
        experts: 0,
        replicas,
        proxies: nodes,
        ..Plan::default()
    })
    .await
}

/// Waits until the cluster serves and it has so many nodes, all with its placement.
async fn down_to(house: &House, nodes: usize) {
    let told = |status: &StatusResponse| {
        let ready = ready(status, Role::Attention) + ready(status, Role::Expert);
        ready == nodes && status.nodes.len() == nodes
    };
    house
        .ready_with(&format!("down to {nodes} nodes"), told)
        .await;
}

/// Bytes and connections of all proxies.
fn wire(house: &House) -> (u64, u64) {
    let bytes = house.proxies.iter().map(Proxy::bytes).sum();
    let connections = house.proxies.iter().map(Proxy::connections).sum();
    (bytes, connections)
}

/// SIGTERM; what the process says of its messages in the end: all of them, those without a wire.
fn messages(node: Node) -> (u64, u64) {
    node.signal("TERM");
    let mut node = node.into_process();
    assert!(node.wait(START_LIMIT).success(), "{}", node.output());
    let output = node.output();
    let line = output.lines().find(|line| line.contains("in all")).unwrap();
    let number = |key: &str| {
        let (_, rest) = line.split_once(&format!("{key}=")).unwrap();
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
        digits.unwrap().parse().unwrap()
    };
    (number("messages"), number("local"))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_of_both_roles_serves_the_same_tokens_and_sends_no_row_over_a_wire() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    let mut house = house(1, 1).await;
    work.again(house.grpc()).await;
    let status = house.status().await.unwrap();
    let processes: Vec<&str> = status.nodes.iter().map(|n| n.process.as_str()).collect();
    assert!(!processes[0].is_empty() && processes[0] == processes[1]);
    let domains = status.nodes.iter().map(|n| n.failure_domain.as_str());
    assert!(domains.eq(["host-0"; 2]));
    assert_eq!(wire(&house), (0, 0));
    let (all, local) = messages(house.attention.remove(0));
    assert!(all > 0 && all == local, "{local} of {all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_processes_of_both_roles_serve_the_same_tokens() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    for (nodes, replicas) in [(2, 1), (2, 2), (3, 2)] {
        let mut house = house(nodes, replicas).await;
        work.again(house.grpc()).await;
        let status = house.status().await.unwrap();
        let mut processes: Vec<_> = status.nodes.iter().map(|n| &n.process).collect();
        processes.sort_unstable();
        processes.dedup();
        assert_eq!(processes.len(), nodes);
        let (bytes, _) = wire(&house);
        let (mut all, mut local) = (0, 0);
        for node in std::mem::take(&mut house.attention) {
            let (messages, without) = messages(node);
            (all, local) = (all + messages, local + without);
        }
        line(&json!({
            "test": "colocated",
            "processes": nodes,
            "replicas": replicas,
            "messages": all,
            "without_wire": local,
            "wire_bytes": bytes,
        }));
        if nodes == replicas {
            // Each could send everything to the others, and has no reason to.
            assert!(local > all / 2, "{local} of {all}");
        } else {
            assert!(0 < local && local < all && bytes > 0, "{local} of {all}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_one_costs_no_request_and_no_token() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    let house = house(3, 2).await;
    let load = work.load(house.grpc());
    seconds(2).await;
    house.attention[0].signal("KILL");
    down_to(&house, 4).await;
    seconds(1).await;
    let seen = load.stop().await;
    report("colocated_killed", &seen, json!({ "processes": 3 }));
    assert_nothing_failed(&seen);
    work.again(house.grpc()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_asked_to_end_takes_nothing_with_it() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    let mut house = house(3, 2).await;
    let load = work.load(house.grpc());
    seconds(2).await;
    let (all, local) = messages(house.attention.remove(0));
    assert!(all > local && local > 0, "{local} of {all}");
    down_to(&house, 4).await;
    seconds(1).await;
    let seen = load.stop().await;
    report("colocated_drained", &seen, json!({ "processes": 3 }));
    assert_nothing_failed(&seen);
    work.again(house.grpc()).await;
}

#[test]
fn each_of_both_roles_has_its_certificate() {
    let certs = Certs::new(&[]);
    let model = demo();
    let node = [
        "attention-node",
        "--experts",
        "--coordinator",
        "127.0.0.1:1",
    ];
    let flags = |role: &str, to: &str| {
        let files = [
            ("cert", format!("{role}.pem")),
            ("key", format!("{role}.key")),
        ];
        files.map(|(flag, file)| [format!("--{to}tls-{flag}"), certs.path(&file)])
    };
    let ca = ["--tls-ca".to_owned(), certs.path("ca.pem")];
    let refused = |more: &[String], code: i32, says: &str| {
        let model = ["--model", model.to_str().unwrap()];
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let (ended, _, stderr) = guild(&[&node[..], &model, &more].concat());
        assert!(ended == code && stderr.contains(says), "{more:?}: {stderr}");
    };
    let attention = [flags("attention", "").concat(), ca.to_vec()].concat();
    refused(&attention, 2, "--expert-tls-cert");
    // That of the attention node is none of an expert node.
    let twice = [attention, flags("attention", "expert-").concat()].concat();
    refused(&twice, 3, "attention.pem");
}
