//! The control plane goes away, comes back, or is replaced, while everything is served.

use std::time::{Duration, Instant};

use guild_tests::client::mixed_workload;
use guild_tests::house::{
    House, PAST_THE_LEASE, Plan, Work, assert_nothing_failed, assert_stall, long, ms, report,
    seconds,
};
use serde_json::json;

/// What a dead expert node may cost a stream when nobody gives it up but the attention node.
const UNLED: Duration = Duration::from_secs(1);
/// After that time the load has a quiet past to be compared with.
const QUIET: u64 = 2;
/// What the cluster may take to agree again once its coordinators are back: a lease for what has
/// died meanwhile, and a takeover.
const CONVERGED: Duration = Duration::from_secs(20);

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
        work.again(&door).await;
    }
    house.experts[0].restart();
    house.all_ready().await;
}
