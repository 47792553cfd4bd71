//! A node that runs prompts and one that decodes are, to a client, one: the same tokens and
//! log-probabilities as of one process, whichever of the two goes.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use guild_proto::cluster::v1::{Duty, Role};
use guild_proto::inference::v1::{GenerateRequest, SamplingParams};
use guild_tests::client::{greedy, request};
use guild_tests::house::{House, PAST_THE_LEASE, Plan};
use guild_tests::process::START_LIMIT;
use guild_tests::work::{Work, assert_nothing_failed, report, seconds};

/// Requests, no two of which begin alike: what one node has run is of no use to another request.
const REQUESTS: u32 = 140;
/// What nodes may take to report that all their pages are free.
const FREE_LIMIT: Duration = Duration::from_secs(10);

/// What a dozen requests may take, one after the other, while a frozen node is asked for their prompts: less than the
/// first of them would wait for a page that takes long to compute.
const FROZEN_LIMIT: Duration = Duration::from_secs(14);

/// Long prompts, every other one sampled by a seed, all with log-probabilities.
fn workload() -> Vec<GenerateRequest> {
    (0..REQUESTS)
        .map(|i| {
            let token = |p: u32| 3 + (p * 7919 + i * 104_729 + p * p * 31) % 2000;
            let prompt: Vec<u32> = (0..130 + i % 90).map(token).collect();
            let mut sampling = SamplingParams {
                prompt_logprobs: None,
                ..greedy(10, 2)
            };
            if i % 2 == 1 {
                sampling.temperature = Some(0.9);
                sampling.seed = Some(u64::from(i));
            }
            request(&prompt, sampling)
        })
        .collect()
}

/// Pages that no request holds, of each attention node.
async fn free_pages(house: &House) -> Vec<u32> {
    let status = house.status().await.unwrap();
    let nodes = status.nodes.iter();
    let attention = nodes.filter(|node| node.role() == Role::Attention);
    attention.map(|node| node.free_pages).collect()
}

/// Prompts of the node that others have run for it, and pages that came, by what it says at its end.
fn moved(log: &str) -> (u64, u64) {
    let said = "prompts that other nodes have run for this one";
    let line = log.lines().find(|line| line.contains(said));
    let line = line.unwrap_or_else(|| panic!("no page has moved:\n{log}"));
    let plain: String = line.replace("\u{1b}[3m", "").replace("\u{1b}[0m", "");
    let plain = plain.replace("\u{1b}[2m", "");
    let number = |field: &str| {
        let (_, rest) = plain.split_once(field).unwrap_or_else(|| panic!("{plain}"));
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        digits.parse().unwrap()
    };
    (number("prompts="), number("pages="))
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_outputs_of_two_nodes_are_those_of_one_and_either_may_go() {
    let mut house = House::start(Plan {
        attention: 2,
        roles: vec!["prefill", "decode"],
        experts: 2,
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let status = house.status().await.unwrap();
    let duty = |name: &str| status.nodes.iter().find(|n| n.name == name).unwrap().duty();
    assert_eq!(duty("attention-0"), Duty::Prefill);
    assert_eq!(duty("attention-1"), Duty::Decode);
    assert!(status.degraded.is_empty());
    let free = free_pages(&house).await;
    let work = Work::of(workload()).await;

    // The node that runs prompts is killed in the middle of them.
    let load = work.load(house.grpc());
    seconds(2).await;
    house.attention[0].signal("KILL");
    seconds(3).await;
    let seen = load.stop().await;
    assert_nothing_failed(&seen);
    report("prefill_node_killed", &seen, serde_json::json!({}));
    house.attention[0].restart();
    house.attention[0]
        .process()
        .wait_for_line("joined the cluster", START_LIMIT);
    house.all_ready().await;
    work.again(house.grpc()).await;
    let all_free = async {
        while free_pages(&house).await != free {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let freed = tokio::time::timeout(FREE_LIMIT, all_free).await;
    assert!(freed.is_ok(), "{:?} of {free:?}", free_pages(&house).await);

    // The one that decodes says what it was brought, and the other one has to do its work.
    let decoding = &mut house.attention[1];
    decoding.terminate(START_LIMIT).await;
    let (prompts, pages) = moved(&decoding.output());
    assert!(prompts > 0 && pages >= prompts * 8, "{prompts}, {pages}");
    tokio::time::sleep(PAST_THE_LEASE).await;
    work.again(house.grpc()).await;
    let degraded = house.status().await.unwrap().degraded;
    assert!(degraded.contains("prefill"), "{degraded}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_that_is_frozen_holds_up_nobody_for_long() {
    let house = House::start(Plan {
        attention: 2,
        roles: vec!["prefill", "decode"],
        experts: 2,
        replicas: 1,
        // Nobody is told that it is gone.
        lease: "60",
        ..Plan::default()
    })
    .await;
    let mut requests = workload();
    let after = Work::of(requests.split_off(REQUESTS as usize - 12)).await;
    let before = Work::of(requests.split_off(requests.len() - 4)).await;
    before.again(house.grpc()).await;
    house.attention[0].signal("STOP");
    let answered = tokio::time::timeout(FROZEN_LIMIT, after.again(house.grpc())).await;
    house.attention[0].signal("CONT");
    assert!(answered.is_ok(), "{}", house.logs());
    let log = house.attention[1].output();
    assert!(log.contains("pages are computed here"), "{log}");
}
