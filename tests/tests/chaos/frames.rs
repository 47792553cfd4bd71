//! Connections that spoil or swallow what goes over them.

use guild_proto::cluster::v1::Role;
use guild_tests::client::mixed_workload;
use guild_tests::house::{House, Plan, ready};
use guild_tests::proxy::{Damage, Proxy};
use guild_tests::work::{Work, assert_nothing_failed, assert_stall, report, seconds};
use serde_json::json;
use std::time::{Duration, Instant};

/// Bytes between two damages in the mean.
const SPOIL_EVERY: u64 = 500_000;
/// What a silent node may cost a stream.
const SILENT: Duration = Duration::from_millis(2500);

/// Under load, every now and then `damage` is done to the bytes between attention and expert nodes.
async fn spoil(case: &str, damage: Damage) {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan {
        proxies: 3,
        // Inside TLS nothing spoiled would get as far as a frame.
        tls: false,
        ..Plan::default()
    })
    .await;
    let load = work.load(house.grpc());
    seconds(1).await;
    for proxy in &house.proxies {
        proxy.spoil(Some((damage, SPOIL_EVERY)));
    }
    seconds(6).await;
    for proxy in &house.proxies {
        proxy.spoil(None);
    }
    let seen = load.stop().await;
    let total = |of: fn(&Proxy) -> u64| house.proxies.iter().map(of).sum::<u64>();
    let (damages, connections) = (total(Proxy::damages), total(Proxy::connections));
    let more =
        json!({ "damages": damages, "connections": connections, "bytes": total(Proxy::bytes) });
    report(case, &seen, more);
    // Every spoiled frame costs its connection: what was under way is asked for again.
    assert!(damages > 2 && connections > 3);
    assert_nothing_failed(&seen);
    work.again(house.grpc()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_make_no_wrong_token_and_fail_no_request() {
    spoil("flipped_bits", Damage::Flip).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_bytes_make_no_wrong_token_and_fail_no_request() {
    spoil("lost_bytes", Damage::Truncate).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_come_twice_make_no_wrong_token_and_fail_no_request() {
    spoil("bytes_twice", Damage::Duplicate).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_swallows_everything_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan {
        proxies: 1,
        ..Plan::default()
    })
    .await;
    let load = work.load(house.grpc());
    seconds(2).await;
    // The node's heartbeats take another way: it stays a member.
    let fault = Instant::now();
    house.proxies[0].black_hole(true);
    seconds(6).await;
    let status = house.status().await.unwrap();
    assert_eq!(ready(&status, Role::Expert), 3, "{status:?}");
    house.proxies[0].black_hole(false);
    let before = house.proxies[0].bytes();
    seconds(1).await;
    let seen = load.stop().await;
    let after = house.proxies[0].bytes() - before;
    report("swallowed", &seen, json!({ "bytes_afterwards": after }));
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, SILENT);
    work.again(house.grpc()).await;
}
