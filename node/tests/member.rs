//! Membership from the node's side, against a coordinator that misbehaves.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guild_node::member::{
    Load, Measured, Member, MemberConfig, MemberError, NodeState, REASON_DIGEST,
};
use guild_node::serve::{Server, bind};
use guild_node::{ExitKind, HasExitKind, Shutdown, status};
use guild_proto::cluster::v1::cluster_server::{Cluster, ClusterServer};
use guild_proto::cluster::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// What the node did, as the coordinator saw it.
#[derive(Debug)]
enum Seen {
    Register(RegisterRequest),
    Beat(HeartbeatRequest),
    Leave,
    Watch(u32, mpsc::Sender<Result<Placement, Status>>),
}

/// A coordinator that does as it is told.
#[derive(Clone)]
struct Fake {
    seen: mpsc::Sender<Seen>,
    /// Answers to registrations, then always Ok.
    register: Arc<Mutex<VecDeque<Status>>>,
    /// Answers to heartbeats, then always Ok.
    beat: Arc<Mutex<VecDeque<Status>>>,
    lease: Duration,
}

impl Fake {
    fn new(lease: Duration) -> (Fake, mpsc::Receiver<Seen>) {
        let (seen, rx) = mpsc::channel(1000);
        let fake = Fake {
            seen,
            register: Arc::default(),
            beat: Arc::default(),
            lease,
        };
        (fake, rx)
    }

    async fn serve(&self, address: &str) -> (String, Shutdown) {
        let listener = bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::new().await.add(ClusterServer::new(self.clone()));
        let shutdown = Shutdown::new();
        tokio::spawn(server.run(listener, shutdown.clone(), Duration::ZERO));
        (address, shutdown)
    }
}

fn answer<T>(queue: &Mutex<VecDeque<Status>>, ok: T) -> Result<Response<T>, Status> {
    match queue.lock().unwrap().pop_front() {
        Some(status) => Err(status),
        None => Ok(Response::new(ok)),
    }
}

#[tonic::async_trait]
impl Cluster for Fake {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        self.seen
            .send(Seen::Register(request.into_inner()))
            .await
            .unwrap();
        let lease_ms = self.lease.as_millis() as u32;
        answer(
            &self.register,
            RegisterResponse {
                node_id: 7,
                lease_ms,
            },
        )
    }
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        self.seen
            .send(Seen::Beat(request.into_inner()))
            .await
            .unwrap();
        answer(&self.beat, HeartbeatResponse {})
    }
    async fn leave(&self, _: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        self.seen.send(Seen::Leave).await.unwrap();
        Ok(Response::new(LeaveResponse {}))
    }
    async fn watch_placement(
        &self,
        request: Request<WatchPlacementRequest>,
    ) -> Result<Response<BoxStream<Placement>>, Status> {
        let (tx, rx) = mpsc::channel(4);
        let node = request.into_inner().node_id;
        self.seen.send(Seen::Watch(node, tx)).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

fn config(coordinator: &str) -> MemberConfig {
    MemberConfig {
        coordinator: format!("http://{coordinator}"),
        role: Role::Expert,
        name: "expert-1".into(),
        address: "127.0.0.1:9".into(),
        model_digest: "d".into(),
        numerics_class: "c".into(),
        capacity_bytes: 5,
        process: String::new(),
        failure_domain: String::new(),
        duty: Default::default(),
    }
}

/// Waits for what `pick` wants, skipping the rest.
async fn next<T>(seen: &mut mpsc::Receiver<Seen>, pick: impl Fn(Seen) -> Option<T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Some(found) = pick(seen.recv().await.unwrap()) {
                return found;
            }
        }
    })
    .await
    .expect("the node did not do it")
}

fn registration(seen: Seen) -> Option<RegisterRequest> {
    match seen {
        Seen::Register(request) => Some(request),
        _ => None,
    }
}

fn watch(seen: Seen) -> Option<mpsc::Sender<Result<Placement, Status>>> {
    match seen {
        Seen::Watch(7, stream) => Some(stream),
        _ => None,
    }
}

fn ready_beat(seen: Seen) -> Option<HeartbeatRequest> {
    match seen {
        Seen::Beat(beat) if beat.ready => Some(beat),
        _ => None,
    }
}

fn placement(epoch: u64, state: PlacementState) -> Placement {
    Placement {
        epoch,
        state: state.into(),
        nodes: Vec::new(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_coordinator_that_comes_later_finds_the_node_waiting() {
    let probe = bind("127.0.0.1:0").await.unwrap();
    let address = probe.local_addr().unwrap().to_string();
    drop(probe);
    let member = Member::start(config(&address)).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(member.node_id(), None);

    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    fake.register
        .lock()
        .unwrap()
        .push_back(Status::unavailable("not yet"));
    fake.serve(&address).await;
    next(&mut seen, registration).await;
    let request = next(&mut seen, registration).await;
    assert_eq!(
        (request.name.as_str(), request.capacity_bytes),
        ("expert-1", 5)
    );
    next(&mut seen, watch).await;
    assert_eq!(member.node_id(), Some(7));
}

#[tokio::test]
async fn the_placement_is_followed_through_breaks_and_never_backwards() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let mut placements = member.placement();
    let first = next(&mut seen, watch).await;
    first
        .send(Ok(placement(3, PlacementState::Loading)))
        .await
        .unwrap();
    placements
        .wait_for(|p| p.as_ref().is_some_and(|p| p.epoch == 3))
        .await
        .unwrap();
    first
        .send(Err(Status::unavailable("restarting")))
        .await
        .unwrap();

    let second = next(&mut seen, watch).await;
    second
        .send(Ok(placement(2, PlacementState::Active)))
        .await
        .unwrap();
    second
        .send(Ok(placement(3, PlacementState::Active)))
        .await
        .unwrap();
    let state = placements
        .wait_for(|p| {
            p.as_ref()
                .is_some_and(|p| p.state() == PlacementState::Active)
        })
        .await
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(state.epoch, 3, "an older one is not taken");
}

#[tokio::test]
async fn the_active_placement_stays_while_the_next_one_loads() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let (mut newest, mut active) = (member.placement(), member.active());
    let stream = next(&mut seen, watch).await;
    for (epoch, state) in [
        (4, PlacementState::Active),
        (5, PlacementState::Loading),
        // What is left of the active one, and what loads behind it.
        (6, PlacementState::Active),
        (7, PlacementState::Loading),
    ] {
        stream.send(Ok(placement(epoch, state))).await.unwrap();
    }
    let is = |epoch| move |p: &Option<Arc<Placement>>| p.as_ref().is_some_and(|p| p.epoch == epoch);
    newest.wait_for(is(7)).await.unwrap();
    assert!(is(6)(&active.borrow_and_update()));
    // After a break both are told again, and nothing falls back.
    drop(stream);
    let stream = next(&mut seen, watch).await;
    for (epoch, state) in [(6, PlacementState::Active), (7, PlacementState::Active)] {
        stream.send(Ok(placement(epoch, state))).await.unwrap();
    }
    active.wait_for(is(7)).await.unwrap();
    assert!(is(7)(&newest.borrow_and_update()));
}

#[tokio::test]
async fn a_withdrawn_placement_gives_way_to_the_active_one_and_does_not_come_back() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let mut newest = member.placement();
    let stream = next(&mut seen, watch).await;
    let tell = async |epoch, state| stream.send(Ok(placement(epoch, state))).await.unwrap();
    let is = |epoch| move |p: &Option<Arc<Placement>>| p.as_ref().is_some_and(|p| p.epoch == epoch);
    tell(4, PlacementState::Active).await;
    tell(6, PlacementState::Loading).await;
    newest.wait_for(is(6)).await.unwrap();
    tell(6, PlacementState::Withdrawn).await;
    let back = newest.wait_for(is(4)).await.unwrap().clone().unwrap();
    assert_eq!(back.state(), PlacementState::Active);
    // Late news of it, and of what came before it, are nothing new; what comes after it is.
    tell(6, PlacementState::Loading).await;
    tell(5, PlacementState::Loading).await;
    tell(7, PlacementState::Loading).await;
    newest.changed().await.unwrap();
    assert!(is(7)(&newest.borrow_and_update()));
    // An old withdrawal does not touch what is newer.
    tell(6, PlacementState::Withdrawn).await;
    tell(7, PlacementState::Active).await;
    newest.changed().await.unwrap();
    let active = newest.borrow_and_update().clone().unwrap();
    assert_eq!((active.epoch, active.state()), (7, PlacementState::Active));
}

#[tokio::test]
async fn what_is_lost_is_told_with_its_reason_until_something_is_active_again() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let mut active = member.active();
    let stream = next(&mut seen, watch).await;
    let tell = async |placement| stream.send(Ok(placement)).await.unwrap();
    let lost = |epoch| Placement {
        reason: "there is no room".to_owned(),
        ..placement(epoch, PlacementState::Lost)
    };
    let is = |epoch, state| {
        move |p: &Option<Arc<Placement>>| {
            p.as_ref()
                .is_some_and(|p| p.epoch == epoch && p.state() == state)
        }
    };
    let whole = placement(4, PlacementState::Active);
    tell(whole.clone()).await;
    // What was lost before it was made says nothing of it.
    tell(lost(3)).await;
    tell(lost(5)).await;
    let told = active.wait_for(is(4, PlacementState::Lost)).await.unwrap();
    let (reason, nodes) = told
        .as_ref()
        .map(|p| (p.reason.clone(), p.nodes.clone()))
        .unwrap();
    drop(told);
    assert_eq!(reason, "there is no room");
    assert_eq!(nodes, whole.nodes);
    tell(whole).await;
    active
        .wait_for(is(4, PlacementState::Active))
        .await
        .unwrap();
    tell(lost(4)).await;
    tell(placement(6, PlacementState::Active)).await;
    active
        .wait_for(is(6, PlacementState::Active))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_withdrawn_epoch_is_named_to_the_next_coordinator() {
    // Long enough to be held on a busy machine: placements are refused without it.
    let (fake, mut seen) = Fake::new(Duration::from_secs(6));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let stream = next(&mut seen, watch).await;
    next(&mut seen, |s| matches!(s, Seen::Beat(_)).then_some(())).await;
    for (epoch, state) in [
        (4, PlacementState::Active),
        (9, PlacementState::Withdrawn),
        (5, PlacementState::Active),
    ] {
        stream.send(Ok(placement(epoch, state))).await.unwrap();
    }
    let mut active = member.active();
    let is_5 = |p: &Option<Arc<Placement>>| p.as_ref().is_some_and(|p| p.epoch == 5);
    active.wait_for(is_5).await.unwrap();
    let gone = status::not_found("UNKNOWN_NODE", "who?");
    fake.beat.lock().unwrap().push_back(gone);
    assert_eq!(next(&mut seen, registration).await.newest_epoch, 9);
}

#[tokio::test]
async fn the_oldest_epoch_in_use_grows_and_never_falls() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let (mut newest, mut active) = (member.placement(), member.active());
    let stream = next(&mut seen, watch).await;
    for oldest_epoch in [3, 5, 4] {
        let placement = Placement {
            oldest_epoch,
            ..placement(5, PlacementState::Active)
        };
        stream.send(Ok(placement)).await.unwrap();
    }
    for placements in [&mut active, &mut newest] {
        let freed = |p: &Option<Arc<Placement>>| p.as_ref().is_some_and(|p| p.oldest_epoch == 5);
        placements.wait_for(freed).await.unwrap();
    }
    stream
        .send(Ok(placement(6, PlacementState::Loading)))
        .await
        .unwrap();
    newest.changed().await.unwrap();
    assert_eq!(active.borrow().as_ref().unwrap().oldest_epoch, 5);
}

#[tokio::test]
async fn a_node_says_where_it_runs_what_it_has_measured_and_what_it_could_not_load() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(600));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(MemberConfig {
        process: "p".into(),
        failure_domain: "rack-1".into(),
        ..config(&address)
    })
    .unwrap();
    let joined = next(&mut seen, registration).await;
    assert_eq!(
        (joined.process.as_str(), joined.failure_domain.as_str()),
        ("p", "rack-1")
    );
    next(&mut seen, |s| matches!(s, Seen::Beat(_)).then_some(())).await;
    // More bytes are news, another rate is not.
    for (rows_per_second, resident_bytes) in [(1.0, 0), (2.0, 7)] {
        member.set_measured(Measured {
            rows_per_second,
            resident_bytes,
            free_bytes: Some(0),
        });
    }
    let beat = next(&mut seen, |s| match s {
        Seen::Beat(beat) => Some(beat),
        _ => None,
    })
    .await;
    let said = (beat.rows_per_second, beat.resident_bytes, beat.free_bytes);
    assert_eq!(said, (2.0, 7, Some(0)));
    assert_eq!((beat.failed_epoch, beat.failure.as_str()), (0, ""));
    member.set_state(NodeState {
        epoch: 4,
        ready: true,
        failed: Some((5, "no room".into())),
        ..NodeState::default()
    });
    let beat = next(&mut seen, ready_beat).await;
    assert_eq!((beat.epoch, beat.failed_epoch), (4, 5));
    assert_eq!(beat.failure, "no room");
}

#[tokio::test]
async fn a_node_without_a_lease_takes_no_placement_until_it_has_one_again() {
    let (fake, mut seen) = Fake::new(Duration::from_millis(300));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let stream = next(&mut seen, watch).await;
    let deaf = std::iter::repeat_with(|| Status::unavailable("deaf")).take(1000);
    fake.beat.lock().unwrap().extend(deaf);
    while member.lease().is_held() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // On its way while the node may have been taken for dead.
    stream
        .send(Ok(placement(5, PlacementState::Active)))
        .await
        .unwrap();
    let mut stream = next(&mut seen, watch).await;
    assert!(member.placement().borrow().is_none() && member.active().borrow().is_none());

    fake.beat.lock().unwrap().clear();
    while !member.lease().is_held() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut active = member.active();
    while active.borrow_and_update().is_none() {
        let sent = stream.send(Ok(placement(5, PlacementState::Active))).await;
        if sent.is_err() {
            stream = next(&mut seen, watch).await;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_unknown_node_registers_again_with_the_newest_epoch_and_the_same_incarnation() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(6));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let first = next(&mut seen, registration).await;
    assert_eq!(first.newest_epoch, 0);
    let stream = next(&mut seen, watch).await;
    stream
        .send(Ok(placement(9, PlacementState::Active)))
        .await
        .unwrap();
    let mut placements = member.placement();
    placements.wait_for(Option::is_some).await.unwrap();
    fake.beat
        .lock()
        .unwrap()
        .push_back(status::not_found("UNKNOWN_NODE", "who?"));
    let again = next(&mut seen, registration).await;
    assert_eq!(again.newest_epoch, 9);
    assert_eq!(again.incarnation, first.incarnation);
    // Whatever the node says about itself holds for the new registration too.
    member.set_state(NodeState {
        epoch: 9,
        ready: true,
        reason: String::new(),
        failed: None,
    });
    assert_eq!(next(&mut seen, ready_beat).await.epoch, 9);
}

#[tokio::test]
async fn a_coordinator_that_takes_calls_and_never_answers_does_not_cost_the_lease() {
    // The kernel takes connections for it.
    let silent = bind("127.0.0.1:0").await.unwrap();
    let (fake, mut seen) = Fake::new(Duration::from_millis(300));
    let (address, _end) = fake.serve("127.0.0.1:0").await;
    let both = format!("{address},{}", silent.local_addr().unwrap());
    let member = Member::start(config(&both)).unwrap();
    next(&mut seen, registration).await;
    let gone = Status::unavailable("does not lead");
    fake.beat.lock().unwrap().push_back(gone);
    member.set_status(0, true, "", Load::default());
    next(&mut seen, ready_beat).await;
    // By way of the silent one, before a call to it ends by its own limit, which is 3 s.
    let limit = Duration::from_millis(2800);
    tokio::time::timeout(limit, next(&mut seen, ready_beat))
        .await
        .expect("it waits for an answer that will not come");
}

#[tokio::test]
async fn news_does_not_wait_for_the_next_heartbeat() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(600));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    next(&mut seen, |s| matches!(s, Seen::Beat(_)).then_some(())).await;
    member.set_status(
        4,
        true,
        "",
        Load {
            running: 2,
            waiting: 1,
            outstanding_tokens: 640,
            ..Load::default()
        },
    );
    let beat = next(&mut seen, ready_beat).await;
    assert_eq!((beat.epoch, beat.running, beat.waiting), (4, 2, 1));
    assert_eq!(beat.outstanding_tokens, 640);
    member.set_draining();
    let beat = next(&mut seen, |s| match s {
        Seen::Beat(beat) if beat.draining => Some(beat),
        _ => None,
    })
    .await;
    assert!(!beat.ready, "a node that drains is not ready");
}

#[tokio::test]
async fn heartbeats_go_on_while_the_process_blocks_every_worker() {
    let (fake, mut seen) = Fake::new(Duration::from_millis(60));
    // The coordinator gets a runtime of its own; this one is blocked below.
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (address, _) = fake.serve("127.0.0.1:0").await;
            tx.send(address).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let _member = Member::start(config(&rx.recv().unwrap())).unwrap();
    next(&mut seen, registration).await;
    while seen.try_recv().is_ok() {}
    std::thread::sleep(Duration::from_millis(400));
    let mut beats = 0;
    while let Ok(event) = seen.try_recv() {
        beats += usize::from(matches!(event, Seen::Beat(_)));
    }
    assert!(beats >= 3, "{beats} heartbeats");
}

#[tokio::test]
async fn a_refusal_is_final_and_keeps_the_coordinators_words() {
    let (fake, mut seen) = Fake::new(Duration::from_secs(60));
    let words = "this node has model aa, the cluster bb";
    fake.register
        .lock()
        .unwrap()
        .push_back(status::precondition(REASON_DIGEST, words, []));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    let error = member.ended().await.unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(error.exit_kind(), ExitKind::Model);
    next(&mut seen, registration).await;
    member.leave().await;
    assert!(seen.try_recv().is_err(), "it does not ask again");
}

#[tokio::test]
async fn leaving_says_goodbye_and_dropping_does_not() {
    let (fake, mut seen) = Fake::new(Duration::from_millis(60));
    let (address, _) = fake.serve("127.0.0.1:0").await;
    let member = Member::start(config(&address)).unwrap();
    next(&mut seen, watch).await;
    member.leave().await;
    member.ended().await.unwrap();
    next(&mut seen, |s| matches!(s, Seen::Leave).then_some(())).await;

    let member = Member::start(config(&address)).unwrap();
    next(&mut seen, watch).await;
    drop(member);
    tokio::time::sleep(Duration::from_millis(200)).await;
    while let Ok(event) = seen.try_recv() {
        assert!(!matches!(event, Seen::Leave));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(seen.try_recv().is_err(), "silence");
}

#[tokio::test]
async fn leaving_works_while_the_coordinator_is_away() {
    let member = Member::start(config("127.0.0.1:1")).unwrap();
    member.leave().await;
    member.ended().await.unwrap();
}

#[test]
fn an_address_that_is_none_is_refused_at_once() {
    let error = Member::start(MemberConfig {
        coordinator: "nonsense".into(),
        ..config("x:1")
    });
    assert!(matches!(error, Err(MemberError::Address(_))));
}
