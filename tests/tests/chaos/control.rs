//! The control plane goes away, comes back, or is replaced, while everything is served.

use std::time::{Duration, Instant};

use guild_node::member::{REASON_NO_LEADER, REASON_NOT_LEADER};
use guild_node::status::reason_of;
use guild_node::tls;
use guild_proto::cluster::v1::{DrainNodeRequest, RebalanceRequest, RegisterRequest, Role};
use guild_tests::client::mixed_workload;
use guild_tests::etcd::Etcd;
use guild_tests::house::{Coordinator, House, PAST_THE_LEASE, Plan, ready};
use guild_tests::work::{Work, assert_nothing_failed, assert_stall, long, ms, report, seconds};
use serde_json::json;
use tonic::{Code, Status};

/// What a dead expert node may cost a stream when nobody gives it up but the attention node.
const UNLED: Duration = Duration::from_secs(1);
/// After that time the load has a quiet past to be compared with.
const QUIET: u64 = 2;
/// What the cluster may take to agree again once its coordinators are back: a lease for what has
/// died meanwhile, and a takeover.
const CONVERGED: Duration = Duration::from_secs(20);
/// What a coordinator may take to lead once its store is back: a lease and a campaign.
const BACK: Duration = Duration::from_secs(10);

/// Streams come through the attention nodes' own ports: the front doors are gone with their
/// coordinators.
#[tokio::test(flavor = "multi_thread")]
async fn without_any_coordinator_a_dying_expert_node_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let mut house = House::start(Plan {
        coordinators: 2,
        store: Some(format!("embedded:{}", store.display())),
        attention: 2,
        ..Plan::default()
    })
    .await;
    let before = house.all_ready().await;
    let load = work.load_at(&house.direct());
    seconds(QUIET).await;
    let fault = Instant::now();
    for coordinator in &house.coordinators {
        coordinator.node.signal("KILL");
    }
    tokio::time::sleep(PAST_THE_LEASE).await;
    house.experts[0].signal("KILL");
    let away = Duration::from_secs(if long() { 600 } else { 10 });
    tokio::time::sleep(away).await;
    assert!(
        house
            .attention
            .iter_mut()
            .all(|node| node.process().is_running())
    );
    let mut left = house.experts[1..].iter_mut();
    assert!(left.all(|node| node.process().is_running()));
    let back = Instant::now();
    for coordinator in &mut house.coordinators {
        coordinator.node.restart();
    }
    house.down_to(2, before).await;
    let converged = back.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    let more = json!({ "away_ms": ms(away), "converged_ms": ms(converged) });
    report("no_coordinator", &seen, more);
    assert_nothing_failed(&seen);
    assert_eq!(seen.turned, 0, "the attention nodes' doors stay open");
    assert_stall(&seen, fault, UNLED);
    assert!(converged < CONVERGED, "{converged:?}");
    for door in house.doors() {
        work.again(door).await;
    }
    house.experts[0].restart();
    house.all_ready().await;
}

/// How a coordinator answers an empty registration: a leader finds the first fault in it, others
/// say that they do not lead.
async fn register(coordinator: &Coordinator) -> Status {
    let mut client = coordinator.client(tls::Role::Attention).await.unwrap();
    let request = RegisterRequest {
        role: Role::Attention.into(),
        ..RegisterRequest::default()
    };
    client.register(request).await.unwrap_err()
}

/// How a coordinator refuses what operators want changed.
async fn changes(coordinator: &Coordinator) -> [Status; 2] {
    let mut client = coordinator.client(tls::Role::Operator).await.unwrap();
    let drain = DrainNodeRequest {
        node: "expert-0".to_owned(),
        undo: false,
    };
    [
        client.drain_node(drain).await.unwrap_err(),
        client
            .rebalance(RebalanceRequest::default())
            .await
            .unwrap_err(),
    ]
}

async fn leaders(house: &House) -> usize {
    let mut leaders = 0;
    for coordinator in &house.coordinators {
        leaders += usize::from(register(coordinator).await.code() == Code::InvalidArgument);
    }
    leaders
}

/// Waits until one coordinator leads and every node serves; returns (epoch, how long it took).
async fn converged(house: &House, since: Instant) -> (u64, Duration) {
    while leaders(house).await != 1 {
        assert!(since.elapsed() < BACK, "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let epoch = house.all_ready().await;
    (epoch, since.elapsed())
}

/// No coordinator may lose sight of a node or an epoch for so long.
async fn shrinks_nowhere(house: &House, least: u64, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        for coordinator in &house.coordinators {
            let status = coordinator.status().await.unwrap();
            assert!(status.ready && status.epoch >= least, "{status:?}");
            assert_eq!(ready(&status, Role::Expert), 3, "{status:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_lose_a_member_its_quorum_and_all_its_data_while_the_cluster_serves() {
    let Some(mut etcd) = Etcd::start(3) else {
        println!("SKIPPED: etcd is not installed (apt-get install etcd-server)");
        return;
    };
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(Plan {
        coordinators: 2,
        store: Some(etcd.store("chaos")),
        ..Plan::default()
    })
    .await;
    let fault = Instant::now() + Duration::from_secs(QUIET);
    let load = work.load_at(&house.doors());
    seconds(QUIET).await;

    // One of three: changes are still made.
    etcd.kill(0);
    let before = house.all_ready().await;
    house.experts[2].signal("KILL");
    let changed = house.down_to(2, before).await;
    house.experts[2].restart();
    let grown = house.all_ready().await;
    assert!(grown >= changed);

    // No quorum: nothing is changed, everything is served, and whoever asks is told.
    etcd.kill(1);
    let lost = Instant::now();
    for coordinator in &house.coordinators {
        loop {
            let refused = register(coordinator).await;
            if refused
                .message()
                .contains("no coordinator leads at present")
            {
                assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
                assert_eq!(reason_of(&refused).as_deref(), Some(REASON_NOT_LEADER));
                break;
            }
            assert!(lost.elapsed() < BACK, "without its store: {refused:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(leaders(&house).await, 0);
    for coordinator in &house.coordinators {
        for refused in changes(coordinator).await {
            assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
            assert_eq!(reason_of(&refused).as_deref(), Some(REASON_NO_LEADER));
        }
    }
    let away = Duration::from_secs(if long() { 600 } else { 6 });
    shrinks_nowhere(&house, grown, away).await;
    etcd.restart(0);
    etcd.restart(1);
    let (regained, quorum) = converged(&house, Instant::now()).await;
    assert!(regained >= grown);

    // Empty: what the cluster is is still known to its coordinators and nodes.
    etcd.wipe();
    let wiped = Instant::now();
    shrinks_nowhere(&house, regained, Duration::from_secs(3)).await;
    let (last, rebuilt) = converged(&house, wiped).await;
    shrinks_nowhere(&house, last, PAST_THE_LEASE).await;
    let seen = load.stop().await;
    let more = json!({
        "epochs": [before, changed, grown, regained, last], "away_ms": ms(away),
        "quorum_back_ms": ms(quorum), "rebuilt_ms": ms(rebuilt),
    });
    report("etcd", &seen, more);
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, UNLED);
    assert!(quorum < BACK && rebuilt < BACK, "{quorum:?} {rebuilt:?}");
    assert!(last >= regained, "epochs only grow");
    for door in house.doors() {
        work.again(door).await;
    }
}

/// While it is frozen it hears nobody: that is no reason to take them for dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_coordinator_that_wakes_gives_no_node_up() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan::default()).await;
    let before = house.status().await.unwrap();
    let load = work.load_at(&house.direct());
    seconds(QUIET).await;
    let fault = Instant::now();
    house.coordinators[0].node.signal("STOP");
    tokio::time::sleep(PAST_THE_LEASE).await;
    house.coordinators[0].node.signal("CONT");
    shrinks_nowhere(&house, before.epoch, PAST_THE_LEASE).await;
    let after = house.status().await.unwrap();
    let seen = load.stop().await;
    report(
        "frozen_coordinator",
        &seen,
        json!({ "epochs": [before.epoch, after.epoch] }),
    );
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, UNLED);
    assert_eq!(before.epoch, after.epoch, "nothing had to move");
    work.again(house.grpc()).await;
}
