//! Experts on the move, over real loopback gRPC: nodes are only pretended, what
//! they are told and what clients get is real.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Attention, Coordinator, Node, Script, expect, generate_at};
use guild_coordinator::CoordinatorConfig;
use guild_node::member::NodeState;
use guild_node::status::reason_of;
use guild_node::store::StoreUrl;
use guild_proto::cluster::v1::{
    DrainNodeRequest, DrainNodeResponse, ExpertLoadRequest, MigrationPhase, MigrationStatus,
    Placement, PlacementNode, PlacementState, RebalanceRequest, RebalanceResponse,
    ReportLoadRequest, Role, WatchMigrationRequest, WatchPlacementRequest,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::{Code, Status, Streaming};

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Rows of a hot expert; a cold one gets one.
const HOT: u64 = 400;

/// What expert nodes do about a placement that is to be loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Conduct {
    /// Report it resident at once.
    Load,
    /// Nothing.
    Hold,
    /// Report that it cannot be, and why.
    Fail(&'static str),
}

/// A cluster that serves: an attention node and expert nodes.
struct Cluster {
    coordinator: Coordinator,
    attention: Attention,
    experts: Vec<Node>,
    conduct: watch::Sender<Conduct>,
}

impl Cluster {
    /// With so many expert nodes, and a coordinator that only moves what it is
    /// asked to, unless it is told something else.
    async fn of(experts: usize, tell: impl FnOnce(&mut CoordinatorConfig)) -> Cluster {
        let coordinator = Coordinator::start_by(|config| {
            config.min_expert_nodes = experts;
            config.rebalance.interval = None;
            tell(config);
        })
        .await;
        let attention = Attention::join(&coordinator, "attention-1", Script::Echo).await;
        attention.node.serve();
        let mut nodes = Vec::new();
        for index in 1..=experts {
            let name = format!("expert-{index}");
            nodes.push(Node::join(&coordinator, Role::Expert, &name).await);
        }
        let conduct = watch::Sender::new(Conduct::Load);
        for node in &nodes {
            behave(node, conduct.subscribe());
        }
        let cluster = Cluster {
            coordinator,
            attention,
            experts: nodes,
            conduct,
        };
        cluster.coordinator.is_ready().await;
        // From now on nothing live moves by itself.
        cluster.coordinator.generate(&[1]).await.unwrap();
        cluster
    }

    /// Experts of `expert-1` get hundreds of rows, the others one, until it is planned with.
    async fn skew(&self) {
        let active = self.active().await;
        let mut client = self.coordinator.cluster();
        let asked = client.expert_load(ExpertLoadRequest::default()).await;
        let layout = asked.unwrap().into_inner();
        let experts = layout.experts as usize;
        let mut rows = vec![1; layout.layers.len() * experts];
        for slot in &home(&active, "expert-1").slots {
            let layer = layout.layers.iter().position(|l| *l == slot.layer).unwrap();
            rows[layer * experts + slot.expert as usize] = HOT;
        }
        let report = ReportLoadRequest {
            node_id: self.attention.node.id(),
            sequence: 1,
            layers: layout.layers,
            experts: layout.experts,
            rows,
        };
        client.report_load(report).await.unwrap();
        expect("a closed shot", || async {
            let asked = self.coordinator.cluster();
            let answer = { asked }.expert_load(ExpertLoadRequest::default()).await;
            answer.unwrap().into_inner().closed > 0
        })
        .await;
    }

    /// The placement that is active.
    async fn active(&self) -> Placement {
        self.attention.node.placement(PlacementState::Active).await
    }

    async fn rebalance(&self, dry_run: bool) -> Result<RebalanceResponse, Status> {
        let request = RebalanceRequest {
            dry_run,
            budget_bytes: None,
        };
        let answer = self.coordinator.cluster().rebalance(request).await?;
        Ok(answer.into_inner())
    }

    async fn drain(&self, node: &str, undo: bool) -> Result<DrainNodeResponse, Status> {
        let request = DrainNodeRequest {
            node: node.to_owned(),
            undo,
        };
        let answer = self.coordinator.cluster().drain_node(request).await?;
        Ok(answer.into_inner())
    }

    async fn changes(&self) -> Streaming<MigrationStatus> {
        let mut client = self.coordinator.cluster();
        let stream = client.watch_migration(WatchMigrationRequest {}).await;
        stream.unwrap().into_inner()
    }

    /// What a node is told of placements from now on.
    async fn placements(&self, node: &Node) -> Streaming<Placement> {
        let request = WatchPlacementRequest { node_id: node.id() };
        let mut client = self.coordinator.cluster();
        client.watch_placement(request).await.unwrap().into_inner()
    }

    /// Asks for one completion after the other until told to stop; all must come.
    fn keep_asking(&self) -> (Arc<AtomicBool>, JoinHandle<usize>) {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let door = self.coordinator.grpc.clone();
        let task = tokio::spawn(async move {
            let mut served = 0;
            while !told.load(Ordering::SeqCst) {
                generate_at(&door, &[5, 6, 7]).await.unwrap();
                served += 1;
            }
            served
        });
        (stop, task)
    }
}

/// Lets a node do with placements what it is told to.
fn behave(node: &Node, mut conduct: watch::Receiver<Conduct>) {
    let member = node.member().clone();
    tokio::spawn(async move {
        let mut placements = member.placement();
        let mut epoch = 0;
        loop {
            let newest = placements.borrow_and_update().clone();
            let conduct_now = *conduct.borrow_and_update();
            if let Some(placement) = newest {
                let mut failed = None;
                match (placement.state(), conduct_now) {
                    (PlacementState::Loading, Conduct::Hold) => {}
                    (PlacementState::Loading, Conduct::Fail(why)) => {
                        failed = Some((placement.epoch, why.to_owned()));
                    }
                    _ => epoch = placement.epoch,
                }
                member.set_state(NodeState {
                    epoch,
                    ready: epoch > 0,
                    reason: String::new(),
                    failed,
                });
            }
            let over = tokio::select! {
                changed = placements.changed() => changed.is_err(),
                changed = conduct.changed() => changed.is_err(),
            };
            if over {
                return;
            }
        }
    });
}

/// What a node of this name holds.
fn home<'a>(placement: &'a Placement, name: &str) -> &'a PlacementNode {
    let mut nodes = placement.nodes.iter();
    nodes.find(|node| node.name == name).unwrap()
}

async fn next<T>(stream: &mut Streaming<T>) -> T {
    let next = tokio::time::timeout(PATIENCE, stream.message()).await;
    next.expect("news").unwrap().expect("a stream without end")
}

/// The changes until nothing is being moved any more, this one included.
async fn to_its_end(changes: &mut Streaming<MigrationStatus>, id: u64) -> Vec<MigrationStatus> {
    let mut seen = Vec::new();
    loop {
        let now = next(changes).await;
        let ended = now.migration == id && now.phase() == MigrationPhase::Idle;
        seen.push(now);
        if ended {
            return seen;
        }
    }
}

/// Every expert of the model has a home, and as many homes as before in all.
fn assert_whole(placement: &Placement, experts: usize) {
    let mut homes: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    for slot in placement.nodes.iter().flat_map(|node| &node.slots) {
        *homes.entry((slot.layer, slot.expert)).or_default() += 1;
    }
    assert_eq!(homes.len(), experts, "an expert has no home");
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_experts_move_while_requests_are_served() {
    let cluster = Cluster::of(2, |_| ()).await;
    let before = cluster.active().await;
    // Without load there is nothing to plan by, or nothing worth it.
    if let Ok(plan) = cluster.rebalance(false).await {
        assert_eq!((plan.moves.len(), plan.migration), (0, 0), "{plan:?}");
    }
    cluster.skew().await;
    let mut changes = cluster.changes().await;
    assert_eq!(next(&mut changes).await.migration, 0);

    let plan = cluster.rebalance(true).await.unwrap();
    assert!(!plan.moves.is_empty() && plan.bytes > 0, "{plan:?}");
    assert!(plan.after < plan.before, "{plan:?}");
    assert_eq!(plan.migration, 0);
    assert_eq!(cluster.coordinator.status().await.epoch, before.epoch);

    let (stop, asking) = cluster.keep_asking();
    let begun = cluster.rebalance(false).await.unwrap();
    assert_eq!((&begun.moves, begun.migration), (&plan.moves, 1));
    let seen = to_its_end(&mut changes, 1).await;
    let end = seen.last().unwrap();
    assert_eq!((end.completed, end.rolled_back), (1, 0), "{end:?}");
    assert!(end.copies > 0 && end.copies_done == end.copies, "{end:?}");
    assert_eq!(end.cause, "balance");

    let after = cluster.attention.node.placement_above(before.epoch).await;
    assert_whole(&after, cluster.coordinator.experts_in_all());
    assert_ne!(
        home(&after, "expert-1").slots,
        home(&before, "expert-1").slots
    );
    // Nobody sends rows by what was before any more, and nodes know it.
    expect("the old epochs freed", || async {
        let now = cluster.active().await;
        now.oldest_epoch == now.epoch
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    assert!(asking.await.unwrap() > 0);
    let status = cluster.coordinator.status().await;
    assert_eq!((status.replicas_wanted, status.replicas), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_plans_by_itself() {
    let cluster = Cluster::of(2, |config| {
        config.rebalance.interval = Some(Duration::from_millis(200));
    })
    .await;
    let before = cluster.active().await;
    cluster.skew().await;
    let after = cluster.attention.node.placement_above(before.epoch).await;
    assert_whole(&after, cluster.coordinator.experts_in_all());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_fails_is_rolled_back_on_the_wire_and_nothing_else_changes() {
    let cluster = Cluster::of(2, |_| ()).await;
    let before = cluster.active().await;
    cluster.skew().await;
    cluster
        .conduct
        .send_replace(Conduct::Fail("the disk is full"));

    let mut told = cluster.placements(&cluster.experts[0]).await;
    assert_eq!(next(&mut told).await.epoch, before.epoch);
    let mut changes = cluster.changes().await;
    let (stop, asking) = cluster.keep_asking();
    let begun = cluster.rebalance(false).await.unwrap();
    assert_eq!(begun.migration, 1);
    let seen = to_its_end(&mut changes, 1).await;
    let end = seen.last().unwrap();
    assert_eq!((end.completed, end.rolled_back), (0, 1), "{end:?}");
    assert!(end.last_failure.contains("the disk is full"), "{end:?}");
    assert!(end.last_failure.contains("expert-"), "{end:?}");

    let mut loading = None;
    let withdrawn = loop {
        let now = next(&mut told).await;
        match now.state() {
            PlacementState::Loading => loading = Some(now.epoch),
            PlacementState::Withdrawn => break now,
            _ => assert_eq!(now.epoch, before.epoch, "nothing else was active"),
        }
    };
    assert!(withdrawn.nodes.is_empty());
    assert!(withdrawn.epoch > before.epoch);
    // A watcher may miss the LOADING one that is withdrawn, never the other way round.
    assert!(loading.is_none_or(|loading| loading == withdrawn.epoch));
    // Who comes back only now hears of it, too: it may be loading that epoch.
    let mut late = cluster.placements(&cluster.experts[1]).await;
    let first = next(&mut late).await;
    assert_eq!(
        (first.epoch, first.state()),
        (before.epoch, PlacementState::Active)
    );
    let second = next(&mut late).await;
    assert_eq!(
        (second.epoch, second.state()),
        (withdrawn.epoch, PlacementState::Withdrawn)
    );

    stop.store(true, Ordering::SeqCst);
    assert!(asking.await.unwrap() > 0);
    let now = cluster.active().await;
    assert_eq!((now.epoch, &now.nodes), (before.epoch, &before.nodes));
    assert_eq!(cluster.coordinator.status().await.reason, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_is_emptied_and_may_come_back() {
    let cluster = Cluster::of(3, |config| config.replicas = 2).await;
    let unknown = cluster.drain("expert-9", false).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    for name in ["expert-9", "expert-1", "expert-2", "expert-3"] {
        assert!(unknown.message().contains(name), "{unknown}");
    }
    for name in ["", &"x".repeat(1000)] {
        let refused = cluster.drain(name, false).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    // Attention nodes hold no experts.
    let attention = cluster.drain("attention-1", false).await.unwrap_err();
    assert_eq!(attention.code(), Code::NotFound);

    let before = cluster.active().await;
    let held = home(&before, "expert-2").slots.len() as u32;
    let (stop, asking) = cluster.keep_asking();
    let mut changes = cluster.changes().await;
    let drained = cluster.drain("expert-2", false).await.unwrap();
    assert_eq!((drained.slots, drained.migration), (held, 1));
    let end = to_its_end(&mut changes, 1).await.pop().unwrap();
    assert_eq!((end.completed, end.rolled_back), (1, 0), "{end:?}");
    assert!(end.cause.contains("expert-2"), "{end:?}");

    let status = cluster.coordinator.status().await;
    let nodes = &status.nodes;
    let node = |name: &str| nodes.iter().find(|node| node.name == name).unwrap();
    assert!(node("expert-2").draining && node("expert-2").slots == 0);
    assert!(!node("expert-1").draining && node("expert-1").slots > 0);
    assert_eq!((status.replicas_wanted, status.replicas), (2, 2));
    let again = cluster.drain("expert-2", false).await.unwrap();
    assert_eq!((again.slots, again.migration), (0, 0));

    cluster.drain("expert-2", true).await.unwrap();
    let status = cluster.coordinator.status().await;
    assert!(status.nodes.iter().all(|node| !node.draining));
    stop.store(true, Ordering::SeqCst);
    assert!(asking.await.unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_is_refused_in_words() {
    let cluster = Cluster::of(1, |_| ()).await;
    let refused = cluster.drain("expert-1", false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert_eq!(reason_of(&refused).as_deref(), Some("NO_ROOM"), "{refused}");
    let status = cluster.coordinator.status().await;
    assert!(status.ready && status.nodes.iter().all(|node| !node.draining));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_goes_on_with_a_step_or_withdraws_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = StoreUrl::Embedded(folder.path().join("cluster.store"));
    let tell = |config: &mut CoordinatorConfig| {
        config.store = store.clone();
        config.leader_ttl = Duration::from_millis(300);
        config.rebalance.interval = None;
        config.replicas = 2;
    };
    let cluster = Cluster::of(3, tell).await;
    let before = cluster.active().await;
    cluster.conduct.send_replace(Conduct::Hold);
    let drained = cluster.drain("expert-2", false).await.unwrap();
    assert_eq!(drained.migration, 1);
    let loading = cluster.experts[0].placement(PlacementState::Loading).await;
    assert!(loading.epoch > before.epoch);

    // As after SIGKILL: the next process finds what is in the store.
    let coordinator = cluster.coordinator.restart_by(tell).await;
    let cluster = Cluster {
        coordinator,
        ..cluster
    };
    // Before it leads it serves by what it has read.
    expect("a leader", || async {
        let mut client = cluster.coordinator.cluster();
        let asked = client.watch_migration(WatchMigrationRequest {}).await;
        asked.is_ok()
    })
    .await;
    cluster.coordinator.is_ready().await;
    let mut told = cluster.placements(&cluster.experts[0]).await;
    let active = next(&mut told).await;
    assert_eq!(
        (active.epoch, active.state(), &active.nodes),
        (before.epoch, PlacementState::Active, &before.nodes)
    );
    let fate = next(&mut told).await;
    assert_eq!(fate.epoch, loading.epoch);
    let withdrawn = fate.state() == PlacementState::Withdrawn;
    assert!(withdrawn || fate.state() == PlacementState::Loading);

    cluster.conduct.send_replace(Conduct::Load);
    expect("an empty expert-2", || async {
        let now = cluster.active().await;
        now.nodes.iter().all(|node| node.name != "expert-2")
    })
    .await;
    let now = cluster.active().await;
    assert_whole(&now, cluster.coordinator.experts_in_all());
    assert!(now.epoch >= loading.epoch + u64::from(withdrawn));
    cluster.coordinator.generate(&[1]).await.unwrap();
}

#[cfg(feature = "failpoints")]
mod fail_points {
    use std::time::Instant;

    use guild_node::failpoint;

    use super::*;

    /// Fails twice; the leader pauses after each.
    const TWICE: &str = "2*return(error)->off";
    /// What two pauses take at least.
    const TWO_PAUSES: Duration = Duration::from_millis(400);

    /// A migration during which the leader cannot tell of something at first.
    /// Fail points are of a process: every test needs its own.
    async fn is_told_later(point: &str) {
        let cluster = Cluster::of(3, |config| config.replicas = 2).await;
        let (stop, asking) = cluster.keep_asking();
        let mut changes = cluster.changes().await;
        failpoint::set(point, TWICE).unwrap();
        let begun = Instant::now();
        let drained = cluster.drain("expert-2", false).await.unwrap();
        let end = to_its_end(&mut changes, drained.migration).await.pop();
        assert_eq!(end.unwrap().completed, 1);
        expect("the old epochs freed", || async {
            let now = cluster.active().await;
            now.oldest_epoch == now.epoch
        })
        .await;
        assert!(begun.elapsed() >= TWO_PAUSES, "{point} has not failed");
        stop.store(true, Ordering::SeqCst);
        assert!(asking.await.unwrap() > 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_step_that_cannot_be_told_at_once_is_told_later() {
        is_told_later("migrate::step").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_epoch_that_cannot_be_published_at_once_is_published_later() {
        is_told_later("migrate::publish").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_cannot_be_freed_at_once_is_freed_later() {
        is_told_later("migrate::free").await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_never_told_is_given_up_and_withdrawn_later() {
        let cluster = Cluster::of(3, |config| {
            config.replicas = 2;
            config.copy_deadline = Duration::from_millis(300);
        })
        .await;
        let before = cluster.active().await;
        let mut told = cluster.placements(&cluster.experts[0]).await;
        assert_eq!(next(&mut told).await.epoch, before.epoch);
        let mut changes = cluster.changes().await;
        failpoint::set("migrate::step", "return(error)").unwrap();
        failpoint::set("migrate::withdraw", TWICE).unwrap();
        let drained = cluster.drain("expert-2", false).await.unwrap();
        loop {
            let now = next(&mut changes).await;
            if now.rolled_back > 0 {
                break;
            }
        }
        failpoint::set("migrate::step", "off").unwrap();
        let withdrawn = next(&mut told).await;
        assert_eq!(withdrawn.state(), PlacementState::Withdrawn);
        assert!(withdrawn.epoch > before.epoch && drained.migration == 1);
        cluster.coordinator.generate(&[1]).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_planner_that_fails_moves_nothing_and_is_asked_again() {
        let cluster = Cluster::of(2, |_| ()).await;
        cluster.skew().await;
        failpoint::set("migrate::plan", "1*return(error)->off").unwrap();
        let failed = cluster.rebalance(false).await.unwrap_err();
        assert_eq!(failed.code(), Code::Internal);
        assert!(failed.message().contains("migrate::plan"), "{failed}");
        assert_eq!(cluster.rebalance(false).await.unwrap().migration, 1);
    }
}
