//! Expert nodes that die, fall silent, or come back from the dead.

use std::time::{Duration, Instant};

use guild_tests::client::mixed_workload;
use guild_tests::house::{House, PAST_THE_LEASE, Plan};
use guild_tests::load::{STREAMS, Seen};
use guild_tests::process::START_LIMIT;
use guild_tests::work::{
    Work, assert_nothing_failed, assert_stall, limit, long, ms, report, seconds,
};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

/// What a dead node may cost a stream: its connections are closed at once.
const DEAD: Duration = Duration::from_secs(1);
/// What a silent node may cost a stream.
const SILENT: Duration = Duration::from_millis(2500);
/// What experts without any home may cost where there is room for them: a lease, and reading them.
const REHOMED: Duration = Duration::from_secs(3);
/// What it may take to serve again once there is room.
const RECOVERED: Duration = Duration::from_secs(15);
/// After so long without a home for an expert whoever needs it has been told.
const TOLD: Duration = Duration::from_secs(3);
/// For more than a half of all experts, and not for all.
const ROOM: &str = "5MiB";
/// What joining again may take.
const REJOINED: Duration = Duration::from_secs(10);
/// After that time the load has a quiet past to be compared with.
const QUIET: u64 = 2;

/// Whoever was not served was told why: an expert has no home, or nobody is let in before it has.
/// Returns how many had been let in, each with an end in time.
fn assert_told_why(seen: &Seen, fault: Instant) -> usize {
    let limit = limit(TOLD, seen.stall_before(fault));
    let mut lost = 0;
    for (status, waited) in seen.failed.iter().zip(&seen.waited) {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        let info = status.get_details_error_info();
        match info.map(|info| info.reason).as_deref() {
            Some("NOT_READY" | "CLUSTER_NOT_READY") => {}
            Some("EXPERT_LOST") => lost += 1,
            _ => panic!("{status:?}"),
        }
        assert!(*waited <= limit, "{waited:?} of {limit:?}: {status:?}");
    }
    assert!(seen.whole >= STREAMS);
    lost
}

/// The same where the experts had another home within [`REHOMED`] of the fault: whoever had been let
/// in has waited, and was served.
fn assert_rehomed(seen: &Seen, fault: Instant, recovered: Duration) {
    assert_eq!(assert_told_why(seen, fault), 0, "{:?}", seen.failed);
    let limit = limit(REHOMED, seen.stall_before(fault));
    assert!(recovered <= limit, "{recovered:?} of {limit:?}");
    assert_stall(seen, fault, REHOMED);
}

/// Readiness must not waver for so long.
async fn stays_ready(house: &House, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let log = house.coordinators[0].node.output();
        assert!(house.coordinators[0].is_ready(), "not ready:\n{log}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_expert_node_with_copies_elsewhere_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan::default()).await;
    let before = house.status().await.unwrap().epoch;
    let load = work.load(house.grpc());
    seconds(QUIET).await;
    let fault = Instant::now();
    house.experts[0].signal("KILL");
    stays_ready(&house, Duration::from_secs(5)).await;
    house.down_to(2, before).await;
    let seen = load.stop().await;
    report("killed", &seen, json!({}));
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, DEAD);
    // The copies are made up for on the two that are left: either can go now.
    house.experts[1].signal("KILL");
    work.again(house.grpc()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_expert_node_costs_no_request() {
    let work = Work::of(mixed_workload(2048)).await;
    let house = House::start(Plan::default()).await;
    let load = work.load(house.grpc());
    seconds(QUIET).await;
    let fault = Instant::now();
    house.experts[0].signal("STOP");
    stays_ready(&house, Duration::from_secs(6)).await;
    let seen = load.stop().await;
    report("silent", &seen, json!({}));
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, SILENT);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_joins_again_under_load_and_epochs_only_grow() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(Plan::default()).await;
    let first = house.status().await.unwrap().epoch;
    let load = work.load(house.grpc());
    seconds(QUIET).await;
    let fault = Instant::now();
    house.experts[0].signal("STOP");
    // Its experts get other homes meanwhile.
    let without = house.down_to(2, first).await;
    let silence = if long() {
        Duration::from_secs(60)
    } else {
        PAST_THE_LEASE
    };
    tokio::time::sleep(silence).await;
    let woken = Instant::now();
    house.experts[0].signal("CONT");
    house.experts[0]
        .process()
        .wait_for_line("joining again", START_LIMIT);
    let again = house.all_ready().await;
    let rejoined = woken.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    let epochs = [first, without, again];
    let more = json!({
        "epochs": epochs, "silent_ms": ms(silence), "rejoined_ms": ms(rejoined),
    });
    report("zombie", &seen, more);
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, SILENT);
    assert!(rejoined < REJOINED, "{rejoined:?}");
    assert!(epochs.is_sorted() && first < without, "{epochs:?}");
    work.again(house.grpc()).await;
}

/// The node that is left reads the experts from disk while who needs them waits; nobody gets a token
/// of a partial sum.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_sole_copy_is_waited_for_and_never_makes_a_wrong_token() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(Plan {
        experts: 2,
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let before = house.status().await.unwrap().epoch;
    let load = work.load(house.grpc());
    seconds(QUIET).await;
    let lost = Instant::now();
    house.experts[0].signal("KILL");
    // Reading these experts takes milliseconds: the log is slower to forget than `/health`.
    let needle = "not ready: waiting for 1 of 1 expert nodes to load";
    house.coordinators[0]
        .node
        .process()
        .wait_for_line(needle, START_LIMIT);
    house.down_to(1, before).await;
    let recovered = lost.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    report("sole_copy", &seen, json!({ "recovered_ms": ms(recovered) }));
    assert_rehomed(&seen, lost, recovered);
    work.again(house.grpc()).await;
}

/// The coordinator ends the wait, and a node with room ends the trouble.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_sole_copy_that_nobody_has_room_for_is_told_in_time_until_there_is_room() {
    let work = Work::of(mixed_workload(2048)).await;
    let plan = Plan {
        experts: 0,
        replicas: 1,
        // As clusters have it unless told otherwise.
        lease: "5",
        ..Plan::default()
    };
    let mut house = House::begin(plan, |_| None);
    for at in 0..2 {
        let room = ("GUILD_CAPACITY".to_owned(), ROOM.to_owned());
        house.add_expert(format!("expert-{at}"), vec![room]);
    }
    house.all_ready().await;
    let load = work.load(house.grpc());
    seconds(QUIET).await;
    let fault = Instant::now();
    house.experts[0].signal("KILL");
    seconds(6).await;
    assert!(!house.coordinators[0].is_ready());
    let back = Instant::now();
    house.experts[0].restart();
    house.all_ready().await;
    let recovered = back.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    let waited = seen.waited.iter().max().copied().unwrap_or_default();
    let more = json!({ "recovered_ms": ms(recovered), "longest_wait_ms": ms(waited) });
    report("sole_copy_without_room", &seen, more);
    assert!(assert_told_why(&seen, fault) > 0, "{:?}", seen.failed);
    assert!(recovered <= RECOVERED, "{recovered:?}");
    work.again(house.grpc()).await;
}

/// With two homes for an expert and less than a lease between two deaths, some experts lose
/// both; they are read from disk again by those that are left.
#[tokio::test(flavor = "multi_thread")]
async fn any_two_of_four_expert_nodes_may_die_one_after_the_other() {
    let work = Work::of(mixed_workload(2048)).await;
    let mut house = House::start(Plan {
        experts: 4,
        ..Plan::default()
    })
    .await;
    let all = [(0, 1), (2, 3), (0, 2), (1, 3), (3, 0), (2, 1)];
    let pairs = if long() { &all[..] } else { &all[..2] };
    for &(first, second) in pairs {
        let before = house.status().await.unwrap().epoch;
        let load = work.load(house.grpc());
        seconds(QUIET).await;
        let fault = Instant::now();
        house.experts[first].signal("KILL");
        seconds(1).await;
        house.experts[second].signal("KILL");
        let killed = Instant::now();
        house.down_to(2, before).await;
        let recovered = killed.elapsed();
        seconds(1).await;
        let seen = load.stop().await;
        let more = json!({ "killed": [first, second], "recovered_ms": ms(recovered) });
        report("pair_killed", &seen, more);
        assert_rehomed(&seen, fault, recovered);
        work.again(house.grpc()).await;
        // With room for them, copies are made up for without an operator.
        house.experts[first].restart();
        house.experts[second].restart();
        house.all_ready().await;
    }
}
