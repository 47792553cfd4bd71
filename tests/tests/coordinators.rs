//! Promise: a lost coordinator costs nothing that is being served. Several of
//! them as real processes over one store: one leads, all serve the front door,
//! and whoever leads next goes on where the last one stopped.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guild_node::tls;
use guild_proto::cluster::v1::{RegisterRequest, Role, StatusResponse};
use guild_tests::certs::Door;
use guild_tests::client::{Answer, generate_all, generate_each, mixed_workload};
use guild_tests::etcd::Etcd;
use guild_tests::house::{Coordinator, House, Plan};
use guild_tests::load::Seen;
use guild_tests::process::{Cluster, START_LIMIT, Shape, demo};
use guild_tests::work::{EXTENT, Work, assert_nothing_failed, assert_stall, ms, report, seconds};
use serde_json::json;

/// Time to live of a leader, as in the coordinator.
const LEADER_TTL: Duration = Duration::from_secs(3);
/// Of nodes, in seconds: the usual one.
const LEASE: &str = "5";
/// How long anything may take that nobody waits for.
const SLACK: Duration = Duration::from_secs(10);
/// What another leader may cost a stream.
const UNLED: Duration = Duration::from_secs(1);
/// After that time a load has a quiet past to be compared with.
const QUIET: u64 = 2;

/// Several coordinators on one store, one attention and two expert nodes.
async fn house(store: String, coordinators: usize) -> House {
    House::start(Plan {
        coordinators,
        store: Some(store),
        experts: 2,
        replicas: 1,
        lease: LEASE,
        ..Plan::default()
    })
    .await
}

async fn wait_ready(coordinator: &Coordinator) {
    let end = Instant::now() + START_LIMIT;
    while !coordinator.is_ready() {
        let node = &coordinator.node;
        assert!(Instant::now() < end, "{}: {}", node.name, node.output());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until a coordinator knows of `epoch`, and of nothing newer.
async fn reaches(coordinator: &Coordinator, epoch: u64) {
    let end = Instant::now() + SLACK;
    loop {
        let known = coordinator.status().await.unwrap().epoch;
        if known == epoch {
            return;
        }
        assert!(known < epoch && Instant::now() < end, "{known} for {epoch}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The one that leads; waits for it.
async fn leader(house: &House, limit: Duration) -> usize {
    let end = Instant::now() + limit;
    loop {
        let mut leaders = Vec::new();
        for (index, coordinator) in house.coordinators.iter().enumerate() {
            if leads(&joining(coordinator)).await {
                leaders.push(index);
            }
        }
        match leaders.as_slice() {
            [leader] => return *leader,
            [] => assert!(Instant::now() < end, "nobody leads within {limit:?}"),
            many => panic!("coordinators {many:?} lead at the same time"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What a takeover may take: two leases, and more where the machine is busy with other things.
fn takeover() -> Duration {
    match std::env::var_os(EXTENT) {
        Some(_) => 2 * LEADER_TTL,
        None => 2 * LEADER_TTL + SLACK,
    }
}

/// What clients have seen of a takeover: nothing.
fn report_takeover(case: &str, seen: &Seen, fault: Instant, took: Duration) {
    report(case, seen, json!({ "takeover_ms": ms(took) }));
    assert_nothing_failed(seen);
    assert_stall(seen, fault, UNLED);
    assert!(took <= takeover(), "{took:?}");
}

/// Asks all coordinators all the time whether they lead.
struct Leaders {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicBool>,
    asking: Vec<tokio::task::JoinHandle<Vec<(usize, Instant)>>>,
}

impl Leaders {
    fn watch(coordinators: &[Coordinator]) -> Leaders {
        let [stop, heard] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let one = |(at, coordinator): (usize, &Coordinator)| {
            let (stop, heard) = (Arc::clone(&stop), Arc::clone(&heard));
            let door = joining(coordinator);
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    if leads(&door).await {
                        answers.push((at, Instant::now()));
                        heard.store(true, Ordering::SeqCst);
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                answers
            })
        };
        let asking = coordinators.iter().enumerate().map(one).collect();
        Leaders {
            stop,
            heard,
            asking,
        }
    }

    /// Until the first answer of a leader.
    async fn heard(&self) {
        while !self.heard.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// (coordinator, when) of every answer as a leader.
    async fn stop(self) -> Vec<(usize, Instant)> {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Vec::new();
        for asking in self.asking {
            all.extend(asking.await.unwrap());
        }
        all.sort_by_key(|(_, when)| *when);
        all
    }
}

/// Where an attention node would register.
fn joining(coordinator: &Coordinator) -> Door {
    coordinator.door(tls::Role::Attention)
}

/// Whether the coordinator there takes registrations: an empty one is refused as such by a leader
/// only.
async fn leads(door: &Door) -> bool {
    let Ok(mut client) = door.cluster().await else {
        return false;
    };
    let request = RegisterRequest {
        role: Role::Attention.into(),
        ..RegisterRequest::default()
    };
    let refused = client.register(request).await.unwrap_err();
    refused.code() == tonic::Code::InvalidArgument
}

fn file(folder: &tempfile::TempDir) -> String {
    format!("embedded:{}", folder.path().join("store").display())
}

async fn undisturbed() -> Vec<Answer> {
    let cluster = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
    generate_each(&cluster.grpc, &mixed_workload(2048)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_leader_is_killed_another_leads_and_nothing_is_interrupted() {
    let want = undisturbed().await;
    let work = Work::of(mixed_workload(2048)).await;
    let folder = tempfile::tempdir().unwrap();
    let mut house = house(file(&folder), 3).await;
    for round in 0..2 {
        let first = leader(&house, SLACK).await;
        let before = house.coordinators[first].status().await.unwrap();
        // Every front door serves, whoever leads.
        for coordinator in &house.coordinators {
            wait_ready(coordinator).await;
            reaches(coordinator, before.epoch).await;
        }
        let follower = (first + 1) % house.coordinators.len();
        let load = work.load(house.coordinators[follower].grpc.as_str());
        seconds(QUIET).await;
        house.coordinators[first].node.signal("KILL");
        let killed = Instant::now();
        house.coordinators.remove(first);
        leader(&house, takeover() + SLACK).await;
        let took = killed.elapsed();
        let seen = load.stop().await;
        report_takeover(&format!("leader_killed_{round}"), &seen, killed, took);
        for coordinator in &house.coordinators {
            assert!(
                coordinator.is_ready(),
                "round {round}: never out of service"
            );
            let status = coordinator.status().await.unwrap();
            assert_eq!(status.epoch, before.epoch, "nothing had to move");
            let ids = |status: &StatusResponse| {
                let mut ids: Vec<u32> = status.nodes.iter().map(|n| n.node_id).collect();
                ids.sort_unstable();
                ids
            };
            assert_eq!(
                ids(&status),
                ids(&before),
                "the nodes are known by the same ids"
            );
            let answers = generate_all(&coordinator.grpc, &mixed_workload(2048)).await;
            assert_eq!(want, answers, "round {round}");
        }
    }
    // Nodes beat to the leader that is left: otherwise they would be gone by now.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(house.coordinators[0].is_ready());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_restarted_goes_on_and_forgets_no_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let mut house = house(file(&folder), 1).await;
    let want = generate_all(&house.coordinators[0].grpc, &mixed_workload(2048)).await;
    let before = house.coordinators[0].status().await.unwrap();
    for signal in ["KILL", "TERM"] {
        let node = &mut house.coordinators[0].node;
        node.signal(signal);
        node.process().wait(Duration::from_secs(40));
        node.restart();
        let new = &house.coordinators[0];
        wait_ready(new).await;
        let after = new.status().await.unwrap();
        assert!(after.epoch >= before.epoch, "{signal}: epochs only grow");
        assert_eq!(after.nodes.len(), 3, "{signal}: {after:?}");
        let answers = generate_all(&new.grpc, &mixed_workload(2048)).await;
        assert_eq!(want, answers, "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_leader_is_replaced_and_etcd_may_be_away_while_the_cluster_serves() {
    let Some(mut etcd) = Etcd::start(1) else {
        println!("SKIPPED: etcd is not installed (apt-get install etcd-server)");
        return;
    };
    let want = undisturbed().await;
    let work = Work::of(mixed_workload(2048)).await;
    let house = house(etcd.store("test"), 2).await;
    let serves = async |coordinator: &Coordinator, when: &str| {
        let answers = generate_all(&coordinator.grpc, &mixed_workload(2048)).await;
        assert_eq!(want, answers, "{when}");
    };
    let old = leader(&house, SLACK).await;
    let new = 1 - old;
    let epoch = house.coordinators[old].status().await.unwrap().epoch;
    reaches(&house.coordinators[new], epoch).await;

    let watch = Leaders::watch(&house.coordinators);
    watch.heard().await;
    let load = work.load(house.coordinators[new].grpc.as_str());
    seconds(QUIET).await;
    // Silent, with every connection open.
    house.coordinators[old].node.signal("STOP");
    let frozen = Instant::now();
    while !leads(&joining(&house.coordinators[new])).await {
        let log = house.coordinators[new].node.output();
        assert!(frozen.elapsed() < takeover() + SLACK, "{log}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = frozen.elapsed();
    let seen = load.stop().await;
    report_takeover("leader_frozen", &seen, frozen, took);
    serves(&house.coordinators[new], "by the new leader").await;

    // Awake again, it gives no answer that only a leader may give: the other one leads.
    house.coordinators[old].node.signal("CONT");
    tokio::time::sleep(LEADER_TTL).await;
    let answers = watch.stop().await;
    let since = answers.iter().find(|(at, _)| *at == new).unwrap().1;
    let late = answers
        .iter()
        .filter(|(at, when)| *at == old && *when >= since);
    assert_eq!(late.count(), 0, "two have answered as leaders");
    assert!(answers.iter().any(|(at, _)| *at == old), "it did lead");
    assert_eq!(leader(&house, SLACK).await, new);
    serves(&house.coordinators[old], "through the old leader").await;

    // Without etcd nobody leads for long, and everything is served.
    etcd.kill(0);
    let away = Instant::now();
    while away.elapsed() < 3 * LEADER_TTL {
        for coordinator in &house.coordinators {
            assert!(coordinator.is_ready(), "{}", coordinator.node.output());
            serves(coordinator, "without etcd").await;
        }
    }
    etcd.restart(0);
    let first = leader(&house, takeover() + SLACK).await;
    let after = house.coordinators[first].status().await.unwrap();
    assert!(after.epoch >= epoch, "epochs only grow");
    // Long enough for nodes to be lost that have not come back.
    tokio::time::sleep(Duration::from_secs(6)).await;
    for coordinator in &house.coordinators {
        wait_ready(coordinator).await;
        serves(coordinator, "with etcd again").await;
        assert_eq!(coordinator.status().await.unwrap().nodes.len(), 3);
    }
}
