//! A node behind a network that swallows everything, by a route of the kernel: no connection is
//! closed and none refused. Needs the right to make network namespaces.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guild_tests::client::mixed_workload;
use guild_tests::house::{House, Plan};
use guild_tests::work::{Work, assert_nothing_failed, assert_stall, ms, report, seconds};
use serde_json::json;

/// What a silent node may cost a stream.
const SILENT: Duration = Duration::from_millis(2500);
/// What joining again may take once the route is back; TCP may wait that long before it tries.
const REJOINED: Duration = Duration::from_secs(30);

/// A network namespace joined to this one by a pair of interfaces; removed when dropped.
struct Namespace {
    name: String,
    /// Address of this side.
    here: String,
    /// Address inside.
    there: String,
}

impl Namespace {
    /// Err: why there can be none.
    fn make() -> Result<Namespace, String> {
        // Unlike that of every other process of the machine.
        let id = std::process::id();
        let net = format!("10.{}.{}", 64 + (id >> 8) % 128, id % 256);
        let space = Namespace {
            name: format!("guild-{id}"),
            here: format!("{net}.1"),
            there: format!("{net}.2"),
        };
        let (name, outside) = (space.name.as_str(), format!("gh{id}"));
        let inside = format!("gn{id}");
        let here = format!("{}/30", space.here);
        let there = format!("{}/30", space.there);
        ip(&["netns", "add", name])?;
        ip(&[
            "link", "add", &outside, "type", "veth", "peer", "name", &inside,
        ])?;
        ip(&["link", "set", &inside, "netns", name])?;
        ip(&["addr", "add", &here, "dev", &outside])?;
        ip(&["link", "set", &outside, "up"])?;
        ip(&["-n", name, "addr", "add", &there, "dev", &inside])?;
        ip(&["-n", name, "link", "set", &inside, "up"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        Ok(space)
    }

    /// From now on, or no longer, nothing that is sent inside arrives here.
    fn black_hole(&self, on: bool) {
        let verb = if on { "add" } else { "del" };
        let here = format!("{}/32", self.here);
        ip(&["-n", &self.name, "route", verb, "blackhole", &here]).unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The interfaces go with it.
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let ran = Command::new("ip")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("ip: {error}"))?;
    let said = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
    match ran.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {said}", args.join(" "))),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_holed_route_costs_no_request() {
    let space = match Namespace::make() {
        Ok(space) => space,
        Err(why) => {
            println!("SKIPPED: no network namespace: {why}");
            return;
        }
    };
    let work = Work::of(mixed_workload(2048)).await;
    let plan = Plan {
        host: space.here.clone(),
        ..Plan::default()
    };
    let inside = |at| (at == 0).then(|| (space.name.clone(), space.there.clone()));
    let house = House::begin(plan, inside);
    let first = house.all_ready().await;
    let load = work.load(house.grpc());
    seconds(2).await;
    let fault = Instant::now();
    space.black_hole(true);
    let without = house.down_to(2, first).await;
    seconds(4).await;
    space.black_hole(false);
    let back = Instant::now();
    let again = house.all_ready().await;
    let rejoined = back.elapsed();
    seconds(1).await;
    let seen = load.stop().await;
    let more = json!({ "epochs": [first, without, again], "rejoined_ms": ms(rejoined) });
    report("black_holed_route", &seen, more);
    assert_nothing_failed(&seen);
    assert_stall(&seen, fault, SILENT);
    assert!(rejoined < REJOINED, "{rejoined:?}");
    assert!(first < without && without <= again);
    work.again(house.grpc()).await;
}
