//! A node that answers, but late: one that has moved far away, and one that gets no time on its
//! processor. Less than one in a hundred tokens may notice, and when the node is cured it has to
//! be of use again soon.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use guild_tests::client::{greedy, request};
use guild_tests::house::{House, Plan};
use guild_tests::load::{Load, Seen};
use guild_tests::proxy::Proxy;
use guild_tests::work::{EXTENT, Work, assert_nothing_failed, line, ms, report};
use serde_json::json;

/// Of each part of a case: quiet, slow.
const PART: Duration = Duration::from_secs(8);
/// How much longer the 99th of 100 gaps may be than in the quiet part.
const SLOWER: u32 = 2;
/// What a busy machine may do to that gap in the ordinary tests.
const BUSY: Duration = Duration::from_secs(1);
/// A cured node has rows again within this time.
const CURED: Duration = Duration::from_secs(10);
/// The same in the ordinary tests: a busy machine makes nodes late that are not slow.
const CURED_BUSY: Duration = Duration::from_secs(40);
/// Between two looks at what goes where.
const LOOK: Duration = Duration::from_millis(500);
/// A node that takes part gets at least this part of the share it got before.
const TAKES_PART: f64 = 4.0;
/// Of nodes, in seconds: this is about nodes that are slow and are not taken for dead.
const LEASE: &str = "20";

async fn work() -> Work {
    let short = |i: u32| {
        let prompt: Vec<u32> = (0..4 + i).map(|p| 3 + (p * 7919 + i * 31) % 2045).collect();
        request(&prompt, greedy(24, 1))
    };
    Work::of((0..8).map(short).collect()).await
}

/// Four expert nodes, each behind a proxy that counts what it gets.
async fn house() -> House {
    House::start(Plan {
        experts: 4,
        proxies: 4,
        lease: LEASE,
        ..Plan::default()
    })
    .await
}

/// Bytes to and from each node so far.
fn bytes(house: &House) -> Vec<u64> {
    house.proxies.iter().map(Proxy::bytes).collect()
}

/// Of what has gone over all wires since `before`: how much, and the first node's share.
fn since(house: &House, before: &[u64]) -> (u64, f64) {
    let gone = bytes(house).into_iter().zip(before);
    let gone: Vec<u64> = gone.map(|(now, before)| now - before).collect();
    let all: u64 = gone.iter().sum();
    (all, gone[0] as f64 / all.max(1) as f64)
}

/// Under load until the first node gets its share again; how long that took. A look at what goes
/// where is over when as much has gone as does in [`LOOK`] on a quiet machine.
async fn cured(house: &House, load: Load, usual: f64, look: u64) -> (Seen, Duration) {
    let limit = match std::env::var_os(EXTENT) {
        Some(_) => CURED,
        None => CURED_BUSY,
    };
    let begun = Instant::now();
    let mut before = bytes(house);
    loop {
        tokio::time::sleep(LOOK).await;
        let (all, share) = since(house, &before);
        if all >= look {
            if share >= usual / TAKES_PART {
                break;
            }
            before = bytes(house);
        }
        let attention = house.attention[0].output();
        assert!(
            begun.elapsed() < limit,
            "it is left alone for {limit:?}: {:?}\n{attention}",
            house.status().await
        );
    }
    let took = begun.elapsed();
    (load.stop().await, took)
}

/// Quiet, then slow by `sicken`, then cured by `cure`.
async fn fall_ill(case: &str, house: &House, sicken: impl FnOnce(), cure: impl FnOnce()) {
    let work = work().await;
    // Connections, caches and what nodes are thought of.
    work.load(house.grpc()).stop().await;
    let before = bytes(house);
    let load = work.load(house.grpc());
    tokio::time::sleep(PART).await;
    let (all, usual) = since(house, &before);
    let look = all * LOOK.as_millis() as u64 / PART.as_millis() as u64;
    let quiet = load.stop().await;
    sicken();
    let before = bytes(house);
    let load = work.load(house.grpc());
    tokio::time::sleep(PART).await;
    let (_, share) = since(house, &before);
    let slow = load.stop().await;
    let load = work.load(house.grpc());
    cure();
    let (after, again) = cured(house, load, usual, look).await;
    let more = json!({
        "quiet_itl_p99_ms": ms(quiet.p99()),
        "quiet_longest_stall_ms": ms(quiet.stall()),
        "gaps": slow.gaps.len(),
        "quiet_gaps": quiet.gaps.len(),
        "share_of_bytes": [usual, share],
        "used_again_ms": ms(again),
    });
    report(case, &slow, more);
    for seen in [&quiet, &slow, &after] {
        assert_nothing_failed(seen);
    }
    let limit = match std::env::var_os(EXTENT) {
        Some(_) => SLOWER * quiet.p99(),
        None => (SLOWER * quiet.p99()).max(BUSY),
    };
    assert!(slow.p99() <= limit, "{:?} of {limit:?}", slow.p99());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_has_moved_far_away_is_hardly_noticed_and_used_again_when_it_is_back() {
    let house = house().await;
    let proxy = &house.proxies[0];
    // There and back: under the time after which a node is suspected.
    let sicken = || proxy.delay(Duration::from_millis(200));
    fall_ill("slow_far_away", &house, sicken, || {
        proxy.delay(Duration::ZERO);
    })
    .await;
}

/// A group of processes that get a tenth of one processor; they are let go when it is dropped.
struct Starved(PathBuf);

impl Starved {
    const ROOT: &str = "/sys/fs/cgroup/cpu";

    /// An error says why this machine has no such thing.
    fn new() -> std::io::Result<Starved> {
        let dir = PathBuf::from(Self::ROOT).join(format!("guild-chaos-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let group = Starved(dir);
        group.set("cpu.cfs_period_us", "100000")?;
        group.set("cpu.cfs_quota_us", "10000")?;
        Ok(group)
    }

    fn set(&self, file: &str, to: &str) -> std::io::Result<()> {
        fs::write(self.0.join(file), to)
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        let members = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for member in members.lines() {
            // One that has ended meanwhile needs no freedom.
            let _ = fs::write(PathBuf::from(Self::ROOT).join("cgroup.procs"), member);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_time_on_its_processor_is_hardly_noticed_and_used_again_when_it_has_some() {
    let group = match Starved::new() {
        Ok(group) => group,
        Err(error) => {
            let why = format!("no processor time to withhold: {error}");
            return line(&json!({ "test": "chaos", "case": "slow_starved", "skipped": why }));
        }
    };
    let mut house = house().await;
    let id = house.experts[0].process().id().to_string();
    let sicken = || group.set("cgroup.procs", &id).unwrap();
    fall_ill("slow_starved", &house, sicken, || {
        group.set("cpu.cfs_quota_us", "-1").unwrap();
    })
    .await;
}
