//! What clients see while nodes die, fall silent or speak nonsense. Real processes under a steady
//! load, some of them behind a proxy that spoils their connections; every answer is compared bit
//! for bit with an undisturbed run. Each case prints a line of JSON.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{Role, StatusRequest, StatusResponse};
use guild_proto::inference::v1::GenerateRequest;
use guild_tests::client::{Answer, generate_each, greedy, mixed_workload, request};
use guild_tests::load::{Load, STREAMS, Seen};
use guild_tests::process::{Cluster, Guild, START_LIMIT, Shape, demo, free_port};
use guild_tests::proxy::Proxy;
use serde_json::{Value, json};
use tonic::Code;

/// Lease of nodes, in seconds.
const LEASE: &str = "1.5";
/// Longer than a lease, and than what follows from its end.
const PAST_THE_LEASE: Duration = Duration::from_secs(3);
/// Bytes between two flipped bits in the mean.
const FLIP_EVERY: u64 = 500_000;
/// No stream of a case without a slow node may stand still for longer, whatever the machine is
/// busy with.
const LONGEST_STALL: Duration = Duration::from_secs(10);
/// Set to `long`, it asks for every combination.
const EXTENT: &str = "GUILD_CHAOS";

/// A coordinator, an attention node, and expert nodes where every expert has two homes.
struct House {
    cluster: String,
    grpc: String,
    /// The attention node's own port.
    direct: String,
    coordinator: Guild,
    attention: Guild,
    experts: Vec<Guild>,
    /// Before the first expert nodes.
    proxies: Vec<Proxy>,
}

impl House {
    async fn start(experts: usize, proxies: usize) -> House {
        let [cluster, http, grpc, direct] = [(); 4].map(|()| format!("127.0.0.1:{}", free_port()));
        let model = demo();
        let coordinator = Guild::start(&[
            "coordinator",
            "--model",
            model.to_str().unwrap(),
            "--listen",
            &cluster,
            "--http",
            &http,
            "--grpc",
            &grpc,
            "--min-expert-nodes",
            &experts.to_string(),
            "--replicas",
            "2",
            "--lease",
            LEASE,
        ]);
        let cluster = format!("http://{cluster}");
        let attention = node(&cluster, "attention-node", "attention-0", &direct, &direct);
        let (mut nodes, mut before) = (Vec::new(), Vec::new());
        for at in 0..experts {
            let address = format!("127.0.0.1:{}", free_port());
            let proxy = (at < proxies).then(|| Proxy::to(address.clone()));
            let public = proxy.as_ref().map_or(address.as_str(), Proxy::address);
            nodes.push(expert(&cluster, at, &address, public));
            before.extend(proxy);
        }
        let house = House {
            cluster,
            grpc: format!("http://{grpc}"),
            direct: format!("http://{direct}"),
            coordinator,
            attention,
            experts: nodes,
            proxies: before,
        };
        house.all_ready().await;
        house
    }

    async fn status(&self) -> Option<StatusResponse> {
        let mut client = ClusterClient::connect(self.cluster.clone()).await.ok()?;
        let status = client.status(StatusRequest {}).await;
        status.ok().map(tonic::Response::into_inner)
    }

    /// Waits until the cluster serves, by a placement that is as told; returns its epoch.
    async fn ready_with(&self, what: &str, told: impl Fn(&StatusResponse) -> bool) -> u64 {
        let end = Instant::now() + START_LIMIT;
        loop {
            let status = self.status().await;
            if let Some(status) = &status
                && status.ready
                && told(status)
            {
                return status.epoch;
            }
            let log = self.coordinator.output();
            assert!(Instant::now() < end, "not {what}: {status:?}\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until every process is a member and has the newest placement.
    async fn all_ready(&self) -> u64 {
        let all = self.experts.len();
        let attends = |status: &StatusResponse| ready(status, Role::Attention) == 1;
        self.ready_with("all ready", |status| {
            attends(status) && ready(status, Role::Expert) == all
        })
        .await
    }

    /// An expert node that was killed, again by the same name.
    fn restart(&mut self, at: usize) {
        let address = format!("127.0.0.1:{}", free_port());
        self.experts[at] = expert(&self.cluster, at, &address, &address);
    }
}

fn expert(cluster: &str, at: usize, listen: &str, public: &str) -> Guild {
    node(
        cluster,
        "expert-node",
        &format!("expert-{at}"),
        listen,
        public,
    )
}

fn node(cluster: &str, role: &str, name: &str, listen: &str, public: &str) -> Guild {
    let model = demo();
    Guild::start(&[
        role,
        "--model",
        model.to_str().unwrap(),
        "--coordinator",
        cluster,
        "--name",
        name,
        "--listen",
        listen,
        "--advertise",
        public,
        "--threads",
        "1",
    ])
}

/// Nodes of a role that serve by the newest placement.
fn ready(status: &StatusResponse, role: Role) -> usize {
    let nodes = status.nodes.iter().filter(|node| node.role() == role);
    let ready = nodes.filter(|node| node.ready && node.epoch == status.epoch);
    ready.count()
}

/// Requests, and what each gives in a cluster where nothing happens.
struct Work {
    requests: Arc<Vec<GenerateRequest>>,
    want: Arc<Vec<Answer>>,
}

impl Work {
    async fn of(requests: Vec<GenerateRequest>) -> Work {
        let cluster = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
        let want = without_text(generate_each(&cluster.grpc, &requests).await);
        Work {
            requests: Arc::new(requests),
            want: Arc::new(want),
        }
    }

    fn load(&self, endpoint: &str) -> Load {
        Load::start(endpoint, &self.requests, &self.want)
    }

    /// Every request once more, in a quiet cluster: none may fail now.
    async fn again(&self, endpoint: &str) {
        let answers = without_text(generate_each(endpoint, &self.requests).await);
        assert_eq!(*self.want, answers, "afterwards");
    }
}

/// Attention nodes know no text.
fn without_text(mut answers: Vec<Answer>) -> Vec<Answer> {
    for answer in &mut answers {
        answer.text.clear();
    }
    answers
}

fn report(case: &str, seen: &Seen, more: Value) {
    let mut line = json!({
        "test": "chaos",
        "case": case,
        "whole": seen.whole,
        "failed": seen.failed.len(),
        "wrong": 0,
        "itl_p99_ms": seen.p99().as_millis() as u64,
        "longest_stall_ms": seen.stall().as_millis() as u64,
    });
    let more = more.as_object().unwrap().clone();
    line.as_object_mut().unwrap().extend(more);
    println!("{line}");
}

fn assert_nothing_failed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{:?}", seen.failed);
    assert!(seen.whole >= STREAMS);
}

async fn seconds(n: u64) {
    tokio::time::sleep(Duration::from_secs(n)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_make_no_wrong_token() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(2, 2).await;
    let load = work.load(&house.grpc);
    for proxy in &house.proxies {
        proxy.flip_a_bit_every(FLIP_EVERY);
    }
    seconds(6).await;
    for proxy in &house.proxies {
        proxy.flip_a_bit_every(0);
    }
    let seen = load.stop().await;
    let total = |of: fn(&Proxy) -> u64| house.proxies.iter().map(of).sum::<u64>();
    let (flips, connections) = (total(Proxy::flips), total(Proxy::connections));
    let more = json!({ "flips": flips, "connections": connections, "bytes": total(Proxy::bytes) });
    report("flipped_bits", &seen, more);
    // Every spoiled frame costs its connection: what was under way is asked for again.
    assert!(flips > 2 && connections > 2);
    for status in &seen.failed {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    assert!(seen.whole >= STREAMS);
    work.again(&house.grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_swallows_everything_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(3, 1).await;
    let load = work.load(&house.grpc);
    seconds(1).await;
    // The node's heartbeats take another way: it stays a member.
    house.proxies[0].black_hole(true);
    seconds(6).await;
    let status = house.status().await.unwrap();
    assert_eq!(ready(&status, Role::Expert), 3, "{status:?}");
    house.proxies[0].black_hole(false);
    let before = house.proxies[0].bytes();
    seconds(1).await;
    let seen = load.stop().await;
    let after = house.proxies[0].bytes() - before;
    report("black_hole", &seen, json!({ "bytes_afterwards": after }));
    assert_nothing_failed(&seen);
    assert!(seen.stall() < LONGEST_STALL);
    work.again(&house.grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_joins_again_under_load_and_epochs_only_grow() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(3, 0).await;
    let first = house.status().await.unwrap().epoch;
    let load = work.load(&house.grpc);
    seconds(1).await;
    house.experts[0].signal("STOP");
    tokio::time::sleep(PAST_THE_LEASE).await;
    let without = |status: &StatusResponse| ready(status, Role::Expert) == 2;
    let without = house.ready_with("without the silent node", without).await;
    let woken = Instant::now();
    house.experts[0].signal("CONT");
    house.experts[0].wait_for_line("joining again", START_LIMIT);
    let again = house.all_ready().await;
    let rejoined = woken.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    let epochs = [first, without, again];
    let rejoined = rejoined.as_millis() as u64;
    report(
        "zombie",
        &seen,
        json!({ "epochs": epochs, "rejoined_ms": rejoined }),
    );
    assert_nothing_failed(&seen);
    assert!(epochs.is_sorted() && first < again, "{epochs:?}");
    work.again(&house.grpc).await;
}

/// With two homes for an expert and less than a lease between two deaths, some experts lose
/// both; they are read from disk again by those that are left.
#[tokio::test(flavor = "multi_thread")]
async fn any_two_of_four_expert_nodes_may_die_one_after_the_other() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(4, 0).await;
    let all = [(0, 1), (2, 3), (0, 2), (1, 3), (3, 0), (2, 1)];
    let long = std::env::var(EXTENT).is_ok_and(|extent| extent == "long");
    let pairs = if long { &all[..] } else { &all[..2] };
    for &(first, second) in pairs {
        let before = house.status().await.unwrap().epoch;
        let load = work.load(&house.grpc);
        seconds(1).await;
        house.experts[first].signal("KILL");
        seconds(1).await;
        house.experts[second].signal("KILL");
        let killed = Instant::now();
        let two = |status: &StatusResponse| ready(status, Role::Expert) == 2;
        house
            .ready_with("down to two", |s| s.epoch > before && two(s))
            .await;
        let recovered = killed.elapsed().as_millis() as u64;
        seconds(1).await;
        let seen = load.stop().await;
        let more = json!({ "killed": [first, second], "recovered_ms": recovered });
        report("pair_killed", &seen, more);
        for status in &seen.failed {
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        }
        assert!(seen.whole >= STREAMS);
        work.again(&house.grpc).await;
        // With room for them, copies are made up for without an operator.
        house.restart(first);
        house.restart(second);
        house.all_ready().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_coordinator_a_dying_expert_node_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(3, 0).await;
    let load = work.load(&house.direct);
    seconds(1).await;
    house.coordinator.signal("KILL");
    tokio::time::sleep(PAST_THE_LEASE).await;
    house.experts[0].signal("KILL");
    seconds(4).await;
    let seen = load.stop().await;
    report("no_coordinator", &seen, json!({}));
    assert_nothing_failed(&seen);
    assert!(seen.stall() < LONGEST_STALL);
    assert!(house.attention.is_running());
    assert!(house.experts[1..].iter_mut().all(Guild::is_running));
    work.again(&house.direct).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_expert_node_makes_no_wrong_token() {
    let short = |i: u32| {
        let prompt: Vec<u32> = (0..4 + i).map(|p| 3 + (p * 7919 + i * 31) % 2045).collect();
        request(&prompt, greedy(6, 1))
    };
    let work = Work::of((0..8).map(short).collect()).await;
    let house = House::start(3, 1).await;
    let load = work.load(&house.grpc);
    seconds(2).await;
    let quiet = load.stop().await;
    house.proxies[0].delay(Duration::from_millis(200));
    let load = work.load(&house.grpc);
    seconds(4).await;
    let seen = load.stop().await;
    let quiet = quiet.p99().as_millis() as u64;
    report(
        "slow_node",
        &seen,
        json!({ "quiet_itl_p99_ms": quiet, "delay_ms": 400 }),
    );
    assert_nothing_failed(&seen);
}
