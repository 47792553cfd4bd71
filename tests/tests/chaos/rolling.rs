//! Everything is replaced, one process after the other.

use std::time::{Duration, Instant};

use guild_tests::client::mixed_workload;
use guild_tests::etcd::Etcd;
use guild_tests::house::{House, Plan};
use guild_tests::work::{Work, assert_nothing_failed, assert_stall, long, report, seconds};
use serde_json::json;

/// What replacing a process may cost a stream.
const REPLACED: Duration = Duration::from_secs(1);
/// What a process may take to end: its drain limit, and a little.
const ENDED: Duration = Duration::from_secs(35);

/// Clients know both front doors and turn to the other one when theirs is shut.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_everything_fails_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let etcd = Etcd::start(1);
    let folder = tempfile::tempdir().unwrap();
    let store = match &etcd {
        Some(etcd) => etcd.store("rolling"),
        None => format!("embedded:{}", folder.path().join("store").display()),
    };
    let mut house = House::start(Plan {
        coordinators: 2,
        store: Some(store.clone()),
        attention: 2,
        ..Plan::default()
    })
    .await;
    let load = work.load_at(&house.doors());
    seconds(2).await;
    let fault = Instant::now();
    let mut replaced = 0;
    for _ in 0..if long() { 3 } else { 1 } {
        for at in 0..house.experts.len() {
            let ended = house.experts[at].terminate(ENDED).await;
            assert!(ended.success(), "expert node {at}: {ended}");
            house.experts[at].restart();
            house.all_ready().await;
        }
        for at in 0..house.attention.len() {
            let ended = house.attention[at].terminate(ENDED).await;
            assert!(ended.success(), "attention node {at}: {ended}");
            house.attention[at].restart();
            house.all_ready().await;
        }
        for at in 0..house.coordinators.len() {
            let ended = house.coordinators[at].node.terminate(ENDED).await;
            assert!(ended.success(), "coordinator {at}: {ended}");
            house.coordinators[at].node.restart();
            house.all_ready().await;
        }
        replaced += house.experts.len() + house.attention.len() + house.coordinators.len();
    }
    seconds(1).await;
    let seen = load.stop().await;
    report(
        "rolling",
        &seen,
        json!({ "replaced": replaced, "store": store }),
    );
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, REPLACED);
    for door in house.doors() {
        work.again(door).await;
    }
}
