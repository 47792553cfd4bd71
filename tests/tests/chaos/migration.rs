//! Experts on the move while nodes join, leave, die and are drained, leaders change, and every fail
//! point of a migration fires: with an error, a crash and a delay.
//!
//! Streams go to the attention nodes' own ports: coordinators crash here. At most one process at a
//! time is armed to crash and nobody is killed meanwhile, so that no expert loses both homes by
//! anything but a migration.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guild_node::{failpoint, tls};
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    DrainNodeRequest, MigrationPhase, MigrationStatus, NodeStatus, RebalanceRequest, Role,
    StatusRequest, StatusResponse, WatchMigrationRequest,
};
use guild_tests::certs::Door;
use guild_tests::client::mixed_workload;
use guild_tests::house::{House, Plan, ready};
use guild_tests::work::{Work, assert_nothing_failed, line, long, ms, report, seconds};
use serde_json::json;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// (runs, joins, leaves, deaths, drains, rebalances and changes of the leader in each): at least
/// so many, until every fail point has done everything.
const SHORT: (u64, usize) = (1, 25);
/// The same, with other random numbers each time.
const LONG: (u64, usize) = (3, 100);
/// A fail point that is still not reached then is never reached.
const MAX_ROUNDS: usize = 200;
/// Expert nodes between two events.
const EXPERTS: usize = 4;
/// After an event the cluster must be whole and at rest within this time; nodes that have failed
/// are left alone for seconds.
const SETTLED: Duration = Duration::from_secs(60);
/// What a draining process may take to end.
const ENDED: Duration = Duration::from_secs(35);
/// What fail points do here.
const ACTIONS: [&str; 3] = ["error", "crash", "delay 100"];
/// How many there are of the coordinator; they come first.
const OF_COORDINATORS: &str = "migrate::";

/// What a process is armed with.
#[derive(Clone, Debug)]
struct Arms {
    /// (place, action) that are to fire.
    wanted: Vec<(&'static str, &'static str)>,
    /// `FAILPOINTS`.
    variable: String,
}

impl Arms {
    /// All of these places, once each.
    fn all(places: &[&'static str], action: &'static str) -> Arms {
        Arms {
            wanted: places.iter().map(|&place| (place, action)).collect(),
            variable: places
                .iter()
                .map(|&place| setting(place, action))
                .collect::<Vec<_>>()
                .join(";"),
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        vec![("FAILPOINTS".to_owned(), self.variable.clone())]
    }

    fn crash(&self) -> bool {
        self.wanted.iter().any(|(_, action)| *action == "crash")
    }

    /// Those that have not fired, by the log.
    fn left(&self, log: &str) -> bool {
        let mut wanted = self.wanted.iter();
        wanted.any(|(place, action)| times(log, place, action) == 0)
    }
}

fn setting(place: &str, action: &str) -> String {
    let once = format!("{place}=1*return({action})");
    match place {
        // While peers have the expert nobody reads.
        "copy::checkpoint" => format!("copy::source=return(error);{once}"),
        _ => once,
    }
}

/// One that holds nothing may have failed to take up an epoch: the next one is another try.
fn is_of_use_or_idle(epoch: u64) -> impl Fn(&NodeStatus) -> bool {
    move |node| node.slots == 0 || node.ready && node.epoch == epoch
}

/// How often a place has done this, by a log.
fn times(log: &str, place: &str, action: &str) -> usize {
    let (name, what) = (format!("name=\"{place}\""), format!("what=\"{action}\""));
    let lines = log.lines().filter(|line| line.contains("fail point"));
    lines
        .filter(|line| line.contains(&name) && line.contains(&what))
        .count()
}

/// What is to be fired still, one entry for a process.
fn arms(places: &[&'static str], together: &[&'static str]) -> VecDeque<Arms> {
    let apart = |place: &&&'static str| **place != "copy::checkpoint";
    let most: Vec<&'static str> = places.iter().filter(apart).copied().collect();
    let mut arms = VecDeque::from([Arms::all(&most, ACTIONS[2])]);
    if most.len() < places.len() {
        arms.push_back(Arms::all(&["copy::checkpoint"], ACTIONS[2]));
    }
    for action in [ACTIONS[0], ACTIONS[1]] {
        if together.contains(&action) {
            arms.push_back(Arms::all(&most, action));
        } else {
            arms.extend(places.iter().map(|&place| Arms::all(&[place], action)));
        }
    }
    arms
}

/// The cluster, what is armed in it, and what has happened to it.
struct Site {
    house: House,
    /// By name of the process.
    armed: BTreeMap<String, Arms>,
    for_experts: VecDeque<Arms>,
    for_coordinators: VecDeque<Arms>,
    /// Logs of processes that are gone.
    logs: Vec<String>,
    happened: BTreeMap<&'static str, usize>,
    next_name: usize,
    random: u64,
}

impl Site {
    fn random(&mut self, below: usize) -> usize {
        // A linear congruential generator; its upper bits are the good ones.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % below
    }

    fn count(&mut self, what: &'static str) {
        *self.happened.entry(what).or_default() += 1;
    }

    fn events(&self) -> usize {
        self.happened.values().sum()
    }

    /// What whoever leads answers; what has crashed meanwhile is replaced.
    async fn leader<R>(
        &mut self,
        what: &str,
        ask: impl AsyncFn(ClusterClient<Channel>) -> Result<R, Status>,
    ) -> Result<R, Status> {
        let end = Instant::now() + SETTLED;
        loop {
            self.replace_what_crashed();
            for coordinator in &self.house.coordinators {
                let Some(client) = coordinator.client(tls::Role::Operator).await else {
                    continue;
                };
                match ask(client).await {
                    // It follows, or has just crashed.
                    Err(status)
                        if matches!(
                            status.code(),
                            Code::Unavailable | Code::Unknown | Code::Cancelled
                        ) => {}
                    answer => return answer,
                }
            }
            assert!(Instant::now() < end, "nobody leads: {what}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn status(&mut self) -> StatusResponse {
        let status = async |mut client: ClusterClient<Channel>| {
            // Only a leader answers the second.
            let status = client.status(StatusRequest {}).await?.into_inner();
            client.watch_migration(WatchMigrationRequest {}).await?;
            Ok(status)
        };
        self.leader("status", status).await.unwrap()
    }

    async fn migration(&mut self) -> MigrationStatus {
        let first = async |mut client: ClusterClient<Channel>| {
            let watched = client.watch_migration(WatchMigrationRequest {}).await?;
            let first = watched.into_inner().message().await?;
            first.ok_or_else(|| Status::unavailable("the watch has ended"))
        };
        self.leader("migration", first).await.unwrap()
    }

    /// Waits until the cluster is whole: what has crashed is replaced, every expert has its homes,
    /// everybody goes by the newest epoch, and nothing moves.
    async fn settle(&mut self, what: &str) {
        let begun = Instant::now();
        loop {
            let status = self.status().await;
            let migration = self.migration().await;
            let whole = status.ready
                && status.replicas >= status.replicas_wanted
                && self.are_the_members(&status)
                && ready(&status, Role::Attention) == self.house.attention.len()
                && status.nodes.iter().all(is_of_use_or_idle(status.epoch));
            if whole && migration.phase() == MigrationPhase::Idle {
                return;
            }
            if begun.elapsed() > SETTLED {
                let nodes = self.house.experts.iter().chain(&self.house.attention);
                let nodes = nodes.chain(self.house.coordinators.iter().map(|c| &c.node));
                let logs: Vec<String> = nodes
                    .map(|node| format!("== {}\n{}", node.name, node.output()))
                    .collect();
                let logs = logs.join("\n");
                panic!("not at rest after {what}: {status:?} {migration:?}\n{logs}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether the members are the processes that run: one that was killed is a member for a lease.
    fn are_the_members(&self, status: &StatusResponse) -> bool {
        let nodes = self.house.experts.iter().chain(&self.house.attention);
        let running: BTreeSet<&str> = nodes.map(|node| node.name.as_str()).collect();
        let members = status.nodes.iter().map(|node| node.name.as_str());
        running == members.collect()
    }

    fn replace_what_crashed(&mut self) {
        for at in (0..self.house.experts.len()).rev() {
            if !self.house.experts[at].process().is_running() {
                self.bury(at);
                self.join();
            }
        }
        for at in 0..self.house.coordinators.len() {
            let node = &mut self.house.coordinators[at].node;
            if !node.process().is_running() {
                let (name, log) = (node.name.clone(), node.output());
                node.set_environment(Vec::new());
                node.restart();
                self.retire(&name, log);
            }
        }
    }

    /// An expert node is gone.
    fn bury(&mut self, at: usize) {
        let mut node = self.house.experts.remove(at);
        node.process().wait(ENDED);
        let log = node.output();
        self.retire(&node.name, log);
    }

    /// What was not fired by this process is another's to fire.
    fn retire(&mut self, name: &str, log: String) {
        if let Some(arms) = self.armed.remove(name)
            && arms.left(&log)
        {
            match name.starts_with("expert") {
                true => self.for_experts.push_front(arms),
                false => self.for_coordinators.push_front(arms),
            }
        }
        self.logs.push(log);
    }

    /// Whether somebody may crash any moment.
    fn danger(&self) -> bool {
        let experts = self.house.experts.iter();
        { experts }.any(|node| {
            let arms = self.armed.get(&node.name);
            arms.is_some_and(|arms| arms.crash() && arms.left(&node.output()))
        })
    }

    fn join(&mut self) {
        let danger = self.danger();
        let at = self
            .for_experts
            .iter()
            .position(|arms| !(danger && arms.crash()));
        let arms = at.and_then(|at| self.for_experts.remove(at));
        let name = format!("expert-{}", self.next_name);
        self.next_name += 1;
        let environment = arms.as_ref().map_or_else(Vec::new, Arms::environment);
        if let Some(arms) = arms {
            self.armed.insert(name.clone(), arms);
        }
        self.house.add_expert(name, environment);
        self.count("joined");
    }

    async fn drain(&mut self, node: &str, undo: bool) -> Result<(), Status> {
        let request = DrainNodeRequest {
            node: node.to_owned(),
            undo,
        };
        let ask = async |mut client: ClusterClient<Channel>| {
            client.drain_node(request.clone()).await.map(|_| ())
        };
        self.leader("drain", ask).await
    }

    /// A node that is not the newest, so that what it holds goes to that one, too.
    fn anybody(&mut self) -> (usize, String) {
        let at = self.random(self.house.experts.len() - 1);
        (at, self.house.experts[at].name.clone())
    }

    /// One joins; another is emptied and leaves.
    async fn swap(&mut self) {
        self.join();
        self.settle("a join").await;
        let (_, name) = self.anybody();
        let end = Instant::now() + SETTLED;
        self.count("drained");
        // It holds for as long as its process lives: a leader that crashes is asked again.
        loop {
            if !self.house.experts.iter().any(|node| node.name == name) {
                return self.settle("a crash of the drained node").await;
            }
            let asked = self.drain(&name, false).await;
            let status = self.status().await;
            let node = status.nodes.iter().find(|node| node.name == name);
            if asked.is_ok() && node.is_none_or(|node| node.slots == 0) {
                break;
            }
            assert!(
                Instant::now() < end,
                "{name} is not empty: {asked:?} {status:?}"
            );
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.settle("a drain").await;
        let at = self.house.experts.iter().position(|node| node.name == name);
        if let Some(at) = at {
            let ended = self.house.experts[at].terminate(ENDED).await;
            assert!(ended.success(), "{name}: {ended}");
            self.bury(at);
            self.count("left");
        }
        self.settle("a leave").await;
    }

    /// One is drained, and is not: the migration is given up on its way.
    async fn undo(&mut self) {
        let (_, name) = self.anybody();
        // Both may be refused: a leader has crashed in between.
        let _ = self.drain(&name, false).await;
        let _ = self.drain(&name, true).await;
        self.count("drained");
        self.count("undone");
        self.settle("a drain that was undone").await;
    }

    async fn kill(&mut self) {
        if self.danger() {
            return;
        }
        let (at, _) = self.anybody();
        self.house.experts[at].signal("KILL");
        self.bury(at);
        self.count("killed");
        self.join();
        self.settle("a death").await;
    }

    async fn rebalance(&mut self) {
        let ask = async |mut client: ClusterClient<Channel>| {
            let asked = client.rebalance(RebalanceRequest::default()).await;
            asked.map(|_| ())
        };
        match self.leader("rebalance", ask).await {
            Ok(()) => {}
            // The planner has failed as it was told to, or there is nothing to plan by.
            Err(status) => assert!(
                matches!(status.code(), Code::Internal | Code::FailedPrecondition),
                "{status:?}"
            ),
        }
        self.count("rebalanced");
        self.settle("a rebalance").await;
    }

    /// Another coordinator leads: the one that followed, started again with something armed.
    async fn turn(&mut self) {
        let mut leader = None;
        for (at, coordinator) in self.house.coordinators.iter().enumerate() {
            if let Some(mut client) = coordinator.client(tls::Role::Operator).await
                && client
                    .watch_migration(WatchMigrationRequest {})
                    .await
                    .is_ok()
            {
                leader = Some(at);
            }
        }
        let Some(leader) = leader else {
            return;
        };
        let arms = self.for_coordinators.pop_front();
        let follower = &mut self.house.coordinators[1 - leader].node;
        let (name, log) = (follower.name.clone(), follower.output());
        follower.set_environment(arms.as_ref().map_or_else(Vec::new, Arms::environment));
        follower.restart();
        self.retire(&name, log);
        if let Some(arms) = arms {
            self.armed.insert(name, arms);
        }
        self.settle("a follower's restart").await;
        self.house.coordinators[leader].node.signal("KILL");
        self.count("leaders");
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.settle("a leader's death").await;
    }

    /// Whether nothing is left to be fired.
    fn all_fired(&self) -> bool {
        let nodes = self.house.experts.iter();
        let mut nodes = nodes.chain(self.house.coordinators.iter().map(|c| &c.node));
        let left = nodes.any(|node| {
            let arms = self.armed.get(&node.name);
            arms.is_some_and(|arms| arms.left(&node.output()))
        });
        !left && self.for_experts.is_empty() && self.for_coordinators.is_empty()
    }

    fn all_logs(&self) -> String {
        let nodes = self.house.experts.iter();
        let nodes = nodes.chain(self.house.coordinators.iter().map(|c| &c.node));
        let now: Vec<String> = nodes.map(|node| node.output()).collect();
        [self.logs.as_slice(), &now].concat().join("\n")
    }
}

/// Looks all the time whether an expert has lost its last home; returns how often it has looked,
/// or what it has seen then.
fn watch(house: &House, stop: Arc<AtomicBool>) -> JoinHandle<Result<usize, String>> {
    let doors: Vec<Door> = (house.coordinators.iter())
        .map(|c| c.door(tls::Role::Operator))
        .collect();
    tokio::spawn(async move {
        let mut looks = 0;
        let mut newest = 0;
        while !stop.load(Ordering::SeqCst) {
            for door in &doors {
                if let Ok(mut client) = door.cluster().await
                    && let Ok(status) = client.status(StatusRequest {}).await
                {
                    let status = status.into_inner();
                    // Before it has read the store a coordinator knows nothing.
                    if status.epoch > 0 {
                        if status.replicas == 0 {
                            return Err(format!("{status:?}"));
                        }
                        newest = newest.max(status.epoch);
                        looks += 1;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(newest > 0);
        Ok(looks)
    })
}

/// Bytes of memory for each slot, the same on every node.
async fn bytes_per_slot(site: &mut Site) -> u64 {
    let end = Instant::now() + SETTLED;
    loop {
        let status = site.status().await;
        let experts = status.nodes.iter().filter(|n| n.role() == Role::Expert);
        let each: Vec<(u32, u64)> = experts.map(|n| (n.slots, n.resident_bytes)).collect();
        let holding: Vec<&(u32, u64)> = each.iter().filter(|(slots, _)| *slots > 0).collect();
        let per_slot = holding[0].1 / u64::from(holding[0].0);
        if per_slot > 0
            && each
                .iter()
                .all(|(slots, bytes)| *bytes == u64::from(*slots) * per_slot)
        {
            return per_slot;
        }
        assert!(
            Instant::now() < end,
            "(slots, bytes) of the expert nodes: {each:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_move_under_load_while_every_fail_point_fires() {
    let work = Work::of(mixed_workload(2048)).await;
    let (runs, events) = if long() { LONG } else { SHORT };
    for run in 0..runs {
        a_run(&work, 1 + run, events).await;
    }
}

async fn a_run(work: &Work, seed: u64, events: usize) {
    let folder = tempfile::tempdir().unwrap();
    let house = House::start(Plan {
        coordinators: 2,
        store: Some(format!(
            "embedded:{}",
            folder.path().join("store").display()
        )),
        attention: 2,
        experts: EXPERTS,
        coordinator_flags: ["--rebalance-interval", "0"].map(str::to_owned).into(),
        ..Plan::default()
    })
    .await;
    let of = |coordinators: bool| {
        let places = failpoint::ALL.iter().copied();
        places
            .filter(|place| place.starts_with(OF_COORDINATORS) == coordinators)
            .collect::<Vec<_>>()
    };
    let mut site = Site {
        house,
        armed: BTreeMap::new(),
        for_experts: arms(&of(false), &[]),
        for_coordinators: arms(&of(true), &["error"]),
        logs: Vec::new(),
        happened: BTreeMap::new(),
        next_name: EXPERTS,
        random: seed,
    };
    let load = work.load_at(&site.house.direct());
    seconds(1).await;
    let stop = Arc::new(AtomicBool::new(false));
    let watching = watch(&site.house, Arc::clone(&stop));
    let baseline = bytes_per_slot(&mut site).await;
    let begun = Instant::now();
    for round in 0..MAX_ROUNDS {
        if site.events() >= events && site.all_fired() || watching.is_finished() {
            break;
        }
        // First everything once.
        let event = if round < 5 { round } else { site.random(8) };
        match event {
            0 => site.turn().await,
            1 => site.swap().await,
            2 => site.rebalance().await,
            3 => site.undo().await,
            4 => site.kill().await,
            5 => site.turn().await,
            _ => site.swap().await,
        }
    }
    let took = begun.elapsed();
    if !watching.is_finished() {
        site.settle("everything").await;
    }
    let last = bytes_per_slot(&mut site).await;
    stop.store(true, Ordering::SeqCst);
    let log = site.all_logs();
    let looks = match watching.await.unwrap() {
        Ok(looks) => looks,
        Err(status) => panic!("an expert has no home: {status}\n{log}"),
    };
    let seen = load.stop().await;
    let mut fired = serde_json::Map::new();
    let mut missing = Vec::new();
    for &place in failpoint::ALL {
        let each = ACTIONS.map(|action| times(&log, place, action));
        fired.insert(place.to_owned(), json!(each));
        if each.contains(&0) {
            missing.push((place, each));
        }
    }
    let ended = |how: &str| log.matches(how).count();
    let more = json!({
        "seed": seed, "events": site.events(), "what": site.happened, "took_ms": ms(took),
        "completed": ended("a migration is complete"),
        "rolled_back": ended("a migration was rolled back"),
        "looks": looks, "bytes_per_slot": [baseline, last],
    });
    report("migration", &seen, more);
    line(&json!({ "test": "chaos", "case": "fail_points", "error_crash_delay": fired }));
    assert_nothing_failed(&seen);
    assert_eq!(
        baseline, last,
        "memory of what was moved away is given back"
    );
    assert!(missing.is_empty(), "never fired: {missing:?}");
    for door in site.house.direct() {
        work.again(door).await;
    }
}
