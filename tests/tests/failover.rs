//! Promise 3: a lost expert node costs no request. Real processes under a steady load of
//! concurrent streams; every answer is compared bit for bit with an undisturbed run.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guild_proto::inference::v1::GenerateRequest;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_tests::client::{Answer, generate, generate_each, mixed_workload};
use guild_tests::process::{Cluster, Guild, START_LIMIT, Shape, demo, free_port};
use tokio::task::JoinSet;
use tonic::Status;

/// Streams that run at the same time.
const STREAMS: usize = 6;
/// No stream may stand still for longer, whatever the machine is busy with.
const LONGEST_STALL: Duration = Duration::from_secs(10);

/// One attention node, expert nodes, a coordinator; experts have `replicas` homes.
struct House {
    grpc: String,
    http: String,
    coordinator: Guild,
    _attention: Guild,
    experts: Vec<Guild>,
}

impl House {
    fn start(experts: usize, replicas: usize, lease: &str) -> House {
        let model = demo();
        let model = model.to_str().unwrap();
        let address = || format!("127.0.0.1:{}", free_port());
        let (cluster, http, grpc) = (address(), address(), address());
        let url = format!("http://{cluster}");
        let node = |role: &str, name: &str| {
            let args = [
                role,
                "--model",
                model,
                "--coordinator",
                &url,
                "--name",
                name,
            ];
            let more = ["--threads", "1", "--insecure"];
            Guild::start(&[&args[..], &more[..]].concat())
        };
        let names = (0..experts).map(|i| format!("expert-{i}"));
        let experts: Vec<Guild> = names.map(|name| node("expert-node", &name)).collect();
        let attention = node("attention-node", "attention-0");
        let coordinator = Guild::start(&[
            "coordinator",
            "--model",
            model,
            "--listen",
            &cluster,
            "--http",
            &http,
            "--grpc",
            &grpc,
            "--min-expert-nodes",
            &experts.len().to_string(),
            "--replicas",
            &replicas.to_string(),
            "--lease",
            lease,
            "--insecure",
        ]);
        let house = House {
            grpc: format!("http://{grpc}"),
            http,
            coordinator,
            _attention: attention,
            experts,
        };
        house.wait_ready();
        house
    }

    fn is_ready(&self) -> bool {
        guild_tests::http::get(&self.http, "/health").is_ok_and(|answer| answer.status == 200)
    }

    fn wait_ready(&self) {
        let end = Instant::now() + START_LIMIT;
        while !self.is_ready() {
            assert!(
                Instant::now() < end,
                "not ready:\n{}",
                self.coordinator.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What each request gives in a cluster where nothing happens.
async fn undisturbed(requests: &[GenerateRequest]) -> Vec<Answer> {
    let cluster = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
    generate_each(&cluster.grpc, requests).await
}

/// What a load has seen.
#[derive(Default)]
struct Seen {
    whole: usize,
    failed: Vec<Status>,
    /// The longest time between two events of a stream.
    stall: Duration,
}

/// Keeps [`STREAMS`] streams running until told to stop, and compares every token with `want`.
async fn load(
    endpoint: String,
    requests: Arc<Vec<GenerateRequest>>,
    want: Arc<Vec<Answer>>,
    stop: Arc<AtomicBool>,
) -> Seen {
    let mut streams = JoinSet::new();
    for first in 0..STREAMS {
        let (requests, want) = (Arc::clone(&requests), Arc::clone(&want));
        let (endpoint, stop) = (endpoint.clone(), Arc::clone(&stop));
        streams.spawn(async move {
            let mut seen = Seen::default();
            let mut at = first;
            while !stop.load(Ordering::SeqCst) {
                let which = at % requests.len();
                at += STREAMS + 1;
                match follow(&endpoint, &requests[which], &want[which], &mut seen.stall).await {
                    Ok(()) => seen.whole += 1,
                    Err(status) => {
                        seen.failed.push(status);
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            seen
        });
    }
    let mut all = Seen::default();
    while let Some(seen) = streams.join_next().await {
        let seen = seen.expect("an answer differed");
        all.whole += seen.whole;
        all.failed.extend(seen.failed);
        all.stall = all.stall.max(seen.stall);
    }
    all
}

/// One stream; panics at the first token or log-probability that is not the expected one.
async fn follow(
    endpoint: &str,
    request: &GenerateRequest,
    want: &Answer,
    stall: &mut Duration,
) -> Result<(), Status> {
    let mut client = InferenceClient::connect(endpoint.to_owned())
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let mut last = Instant::now();
    let mut stream = client.generate(request.clone()).await?.into_inner();
    let mut tokens = 0;
    let mut complete = false;
    while let Some(response) = stream.message().await? {
        *stall = (*stall).max(last.elapsed());
        last = Instant::now();
        match response.event.unwrap() {
            Event::Chunk(chunk) => {
                for (token, logprobs) in chunk.token_ids.iter().zip(chunk.logprobs) {
                    assert_eq!(*token, want.token_ids[tokens], "a wrong token");
                    assert_eq!(
                        want.logprobs[tokens],
                        logprobs.into(),
                        "other log-probabilities"
                    );
                    tokens += 1;
                }
            }
            Event::Prompt(_) => {}
            Event::Complete(_) => complete = true,
        }
    }
    assert!(
        complete && tokens == want.token_ids.len(),
        "an answer was cut short"
    );
    Ok(())
}

fn line(what: &str, seen: &Seen, recovered: Duration) {
    println!(
        "{}",
        serde_json::json!({
            "test": what,
            "whole": seen.whole,
            "failed": seen.failed.len(),
            "longest_stall_ms": seen.stall.as_millis() as u64,
            "recovered_ms": recovered.as_millis() as u64,
        })
    );
}

/// Runs a load, does `what` to the first expert node in the middle of it, and goes on for a while.
async fn under_load(house: &House, signal: &str, after: Duration) -> (Seen, bool) {
    let requests = Arc::new(mixed_workload(2048));
    let want = Arc::new(undisturbed(&requests).await);
    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(load(house.grpc.clone(), requests, want, Arc::clone(&stop)));
    tokio::time::sleep(Duration::from_secs(2)).await;
    house.experts[0].signal(signal);
    // Readiness must not waver meanwhile.
    let end = Instant::now() + after;
    let mut ready = true;
    while Instant::now() < end {
        ready &= house.is_ready();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::SeqCst);
    (load.await.unwrap(), ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_expert_node_with_copies_elsewhere_costs_no_request() {
    let house = House::start(3, 2, "1.5");
    let (seen, ready) = under_load(&house, "KILL", Duration::from_secs(6)).await;
    line("kill", &seen, Duration::ZERO);
    assert_eq!(seen.failed.len(), 0, "{:?}", seen.failed);
    assert!(ready, "readiness wavered:\n{}", house.coordinator.output());
    assert!(seen.whole >= STREAMS && seen.stall < LONGEST_STALL);
    // The copies are made up for on the two that are left: either can go now.
    house.experts[1].signal("KILL");
    let request = &mixed_workload(2048)[3];
    let again = generate(&house.grpc, request.clone()).await.unwrap();
    assert_eq!(again, undisturbed(std::slice::from_ref(request)).await[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_expert_node_costs_no_request_and_comes_back_as_a_new_member() {
    let mut house = House::start(3, 2, "1.5");
    let (seen, ready) = under_load(&house, "STOP", Duration::from_secs(6)).await;
    line("stop", &seen, Duration::ZERO);
    assert_eq!(seen.failed.len(), 0, "{:?}", seen.failed);
    assert!(ready, "readiness wavered:\n{}", house.coordinator.output());
    assert!(seen.whole >= STREAMS && seen.stall < LONGEST_STALL);
    // The zombie finds out that it was given up, and joins again.
    house.experts[0].signal("CONT");
    house.experts[0].wait_for_line("joining again", START_LIMIT);
    house.wait_ready();
    let request = &mixed_workload(2048)[5];
    let again = generate(&house.grpc, request.clone()).await.unwrap();
    assert_eq!(again, undisturbed(std::slice::from_ref(request)).await[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_sole_copy_fails_or_delays_requests_and_never_makes_a_wrong_token() {
    let mut house = House::start(2, 1, "1.5");
    let requests = Arc::new(mixed_workload(2048));
    let want = Arc::new(undisturbed(&requests).await);
    let stop = Arc::new(AtomicBool::new(false));
    let running = tokio::spawn(load(
        house.grpc.clone(),
        Arc::clone(&requests),
        Arc::clone(&want),
        Arc::clone(&stop),
    ));
    tokio::time::sleep(Duration::from_secs(1)).await;
    house.experts[0].signal("KILL");
    let lost = Instant::now();
    // Reading these experts takes milliseconds: the log is slower to forget than `/health`.
    let needle = "not ready: waiting for 1 of 1 expert nodes to load";
    house.coordinator.wait_for_line(needle, START_LIMIT);
    house.wait_ready();
    let recovered = lost.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::SeqCst);
    let seen = running.await.unwrap();
    line("sole copy", &seen, recovered);
    for status in &seen.failed {
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}");
    }
    assert!(seen.whole >= STREAMS);
    for which in [0, 7] {
        let answer = generate(&house.grpc, requests[which].clone())
            .await
            .unwrap();
        assert_eq!(answer, want[which]);
    }
}
