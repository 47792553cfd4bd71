//! A node that answers, but late.

use std::time::Duration;

use guild_tests::client::{greedy, request};
use guild_tests::house::{House, Plan, Work, assert_nothing_failed, ms, report, seconds};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_expert_node_makes_no_wrong_token() {
    let short = |i: u32| {
        let prompt: Vec<u32> = (0..4 + i).map(|p| 3 + (p * 7919 + i * 31) % 2045).collect();
        request(&prompt, greedy(6, 1))
    };
    let work = Work::of((0..8).map(short).collect()).await;
    let house = House::start(Plan {
        proxies: 1,
        ..Plan::default()
    })
    .await;
    let load = work.load(house.grpc());
    seconds(2).await;
    let quiet = load.stop().await;
    house.proxies[0].delay(Duration::from_millis(200));
    let load = work.load(house.grpc());
    seconds(4).await;
    let seen = load.stop().await;
    report(
        "slow_node",
        &seen,
        json!({ "quiet_itl_p99_ms": ms(quiet.p99()), "delay_ms": 400 }),
    );
    assert_nothing_failed(&seen);
}
