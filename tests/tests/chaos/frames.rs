//! Connections that spoil or swallow what goes over them.

use guild_proto::cluster::v1::Role;
use guild_tests::client::mixed_workload;
use guild_tests::house::{House, Plan, ready};
use guild_tests::load::STREAMS;
use guild_tests::proxy::Proxy;
use guild_tests::work::{Work, assert_nothing_failed, assert_stall, report, seconds};
use serde_json::json;
use std::time::{Duration, Instant};
use tonic::Code;

/// Bytes between two flipped bits in the mean.
const FLIP_EVERY: u64 = 500_000;
/// What a silent node may cost a stream.
const SILENT: Duration = Duration::from_millis(2500);

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_make_no_wrong_token() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan {
        experts: 2,
        proxies: 2,
        // Inside TLS no flipped bit would get as far as a frame.
        tls: false,
        ..Plan::default()
    })
    .await;
    let load = work.load(house.grpc());
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
    work.again(house.grpc()).await;
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
