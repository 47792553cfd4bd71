//! Processes that are an attention node and an expert node at the same time: the same tokens as
//! one process gives, no wire between the two, and nothing lost when one of them dies or leaves.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{StatusRequest, StatusResponse};
use guild_tests::client::mixed_workload;
use guild_tests::house::{LEASE, Work, assert_nothing_failed, line, report, seconds};
use guild_tests::http;
use guild_tests::process::{Guild, START_LIMIT, demo, free_port, guild};
use guild_tests::proxy::Proxy;
use serde_json::json;

/// Tokens of the demo checkpoint.
const VOCABULARY: u32 = 2048;

/// A coordinator and processes of both roles, the expert ports of which are behind proxies.
struct House {
    cluster: String,
    grpc: String,
    _coordinator: Guild,
    nodes: Vec<Guild>,
    proxies: Vec<Proxy>,
}

impl House {
    async fn start(nodes: usize, replicas: usize) -> House {
        let [cluster, http, grpc] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
        let model = demo();
        let model = model.to_str().unwrap();
        let (many, replicas) = (nodes.to_string(), replicas.to_string());
        let coordinator = Guild::start(&[
            "coordinator",
            "--model",
            model,
            "--listen",
            &cluster,
            "--http",
            &http,
            "--grpc",
            &grpc,
            "--min-expert-nodes",
            &many,
            "--replicas",
            &replicas,
            "--lease",
            LEASE,
        ]);
        let cluster = format!("http://{cluster}");
        let mut house = House {
            grpc: format!("http://{grpc}"),
            cluster: cluster.clone(),
            _coordinator: coordinator,
            nodes: Vec::new(),
            proxies: Vec::new(),
        };
        for at in 0..nodes {
            let listen = format!("127.0.0.1:{}", free_port());
            let proxy = Proxy::to(listen.clone());
            house.nodes.push(Guild::start(&[
                "attention-node",
                "--experts",
                "--model",
                model,
                "--coordinator",
                &cluster,
                "--name",
                &format!("node-{at}"),
                "--expert-listen",
                &listen,
                "--expert-advertise",
                proxy.address(),
                "--failure-domain",
                &format!("host-{at}"),
                "--threads",
                "1",
            ]));
            house.proxies.push(proxy);
        }
        house.ready(2 * nodes).await;
        house
    }

    /// Waits until the cluster serves and so many nodes have its placement; what it says then.
    async fn ready(&self, nodes: usize) -> StatusResponse {
        let end = Instant::now() + START_LIMIT;
        loop {
            let client = ClusterClient::connect(self.cluster.clone()).await;
            let status = match client {
                Ok(mut client) => client.status(StatusRequest {}).await.ok(),
                Err(_) => None,
            };
            let status = status.map(tonic::Response::into_inner).unwrap_or_default();
            let up = status.nodes.iter();
            let up = up.filter(|node| node.ready && node.epoch == status.epoch);
            if status.ready && up.count() == nodes && status.nodes.len() == nodes {
                return status;
            }
            let logs: Vec<String> = self.nodes.iter().map(Guild::output).collect();
            assert!(
                Instant::now() < end,
                "not ready: {status:?}\n{}",
                logs.join("\n")
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Bytes and connections of all proxies.
    fn wire(&self) -> (u64, u64) {
        let bytes = self.proxies.iter().map(Proxy::bytes).sum();
        let connections = self.proxies.iter().map(Proxy::connections).sum();
        (bytes, connections)
    }
}

/// SIGTERM; what the process says of its messages in the end: all of them, those without a wire.
fn messages(node: Guild) -> (u64, u64) {
    node.signal("TERM");
    let mut node = node;
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
    let mut house = House::start(1, 1).await;
    work.again(&house.grpc).await;
    let status = house.ready(2).await;
    let processes: Vec<&str> = status.nodes.iter().map(|n| n.process.as_str()).collect();
    assert!(!processes[0].is_empty() && processes[0] == processes[1]);
    let domains = status.nodes.iter().map(|n| n.failure_domain.as_str());
    assert!(domains.eq(["host-0"; 2]));
    assert_eq!(house.wire(), (0, 0));
    let (all, local) = messages(house.nodes.remove(0));
    assert!(all > 0 && all == local, "{local} of {all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_processes_of_both_roles_serve_the_same_tokens() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    for (nodes, replicas) in [(2, 1), (2, 2), (3, 2)] {
        let mut house = House::start(nodes, replicas).await;
        work.again(&house.grpc).await;
        let status = house.ready(2 * nodes).await;
        let mut processes: Vec<_> = status.nodes.iter().map(|n| &n.process).collect();
        processes.sort_unstable();
        processes.dedup();
        assert_eq!(processes.len(), nodes);
        let (bytes, _) = house.wire();
        let (mut all, mut local) = (0, 0);
        for node in std::mem::take(&mut house.nodes) {
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
    let house = House::start(3, 2).await;
    let load = work.load(&house.grpc);
    seconds(2).await;
    house.nodes[0].signal("KILL");
    house.ready(4).await;
    seconds(1).await;
    let seen = load.stop().await;
    report("colocated_killed", &seen, json!({ "processes": 3 }));
    assert_nothing_failed(&seen);
    work.again(&house.grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_asked_to_end_takes_nothing_with_it() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    let mut house = House::start(3, 2).await;
    let load = work.load(&house.grpc);
    seconds(2).await;
    let (all, local) = messages(house.nodes.remove(0));
    assert!(all > local && local > 0, "{local} of {all}");
    house.ready(4).await;
    seconds(1).await;
    let seen = load.stop().await;
    report("colocated_drained", &seen, json!({ "processes": 3 }));
    assert_nothing_failed(&seen);
    work.again(&house.grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_both_roles_have_their_certificates() {
    let work = Work::of(mixed_workload(VOCABULARY)).await;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("certs");
    let (code, _, stderr) = guild(&["certs", "--out", out.to_str().unwrap()]);
    assert_eq!(code, 0, "{stderr}");
    let path = |file: &str| out.join(file).to_str().unwrap().to_owned();
    let of = |role: &str, to: &str| {
        let (cert, key) = (format!("--{to}tls-cert"), format!("--{to}tls-key"));
        let (pem, secret) = (format!("{role}.pem"), format!("{role}.key"));
        [cert, path(&pem), key, path(&secret)]
    };
    let ca = ["--tls-ca".to_owned(), path("ca.pem")];
    let [cluster, http, grpc] = [(); 3].map(|()| format!("127.0.0.1:{}", free_port()));
    let url = format!("https://{cluster}");
    let model = demo();
    let model = model.to_str().unwrap();
    let node = |more: &[String]| {
        let args = ["attention-node", "--experts", "--model", model];
        let args = args.into_iter().chain(["--coordinator", &url]);
        let args = args.map(str::to_owned);
        let args = args.chain(of("attention", "")).chain(ca.clone());
        args.chain(more.iter().cloned()).collect::<Vec<String>>()
    };
    let without = node(&[]);
    let (code, _, stderr) = guild(&without.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("--expert-tls-cert"), "{stderr}");

    let nodes: Vec<Guild> = (0..2)
        .map(|_| Guild::start(&node(&of("expert", "expert-"))))
        .collect();
    let coordinator = [
        "coordinator",
        "--model",
        model,
        "--listen",
        &cluster,
        "--http",
        &http,
        "--grpc",
        &grpc,
        "--min-expert-nodes",
        "2",
    ];
    let coordinator = coordinator.iter().map(|&arg| arg.to_owned());
    let coordinator = coordinator.chain(of("coordinator", "")).chain(ca.clone());
    let _coordinator = Guild::start(&coordinator.collect::<Vec<_>>());
    let end = Instant::now() + START_LIMIT;
    while !http::get(&http, "/health").is_ok_and(|answer| answer.status == 200) {
        let logs: Vec<String> = nodes.iter().map(Guild::output).collect();
        assert!(Instant::now() < end, "not ready:\n{}", logs.join("\n"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    work.again(&format!("http://{grpc}")).await;
    // Each has half of the experts: what the other has came over TLS. Either may have served all.
    let sent: Vec<(u64, u64)> = nodes.into_iter().map(messages).collect();
    let all: u64 = sent.iter().map(|(all, _)| all).sum();
    let local: u64 = sent.iter().map(|(_, local)| local).sum();
    assert!(0 < local && local < all, "{local} of {all}");
}
