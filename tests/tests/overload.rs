//! More than can be served: what cannot be is refused at once and says when to come again, what is
//! admitted hardly notices, and when the rush is over everything is as before. Many streams at a
//! time are no overload: all of them are served, each as if it were alone.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use guild_node::status::retry_after;
use guild_proto::inference::v1::GenerateRequest;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_tests::certs::Door;
use guild_tests::client::{generate_all, generate_each, greedy, request};
use guild_tests::http;
use guild_tests::process::{Cluster, Shape, demo};
use guild_tests::work::{EXTENT, line, long, ms};
use serde_json::json;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Requests in one batch, and those that may wait for a place in it: as long as one takes.
const RUNNING: usize = 16;
const WAITING: usize = 16;
/// Tokens of answers, least and most: places become free one by one, not all at once.
const ANSWER: (u32, u32) = (20, 76);
/// Requests unlike each other.
const KINDS: u32 = 8;
/// How often more is offered than can be served.
const RUSH: f64 = 10.0;
/// What admitted requests may wait for their first token, compared with the knee.
const SLOWER: u32 = 3;
/// What a refusal may take.
const REFUSED: Duration = Duration::from_millis(100);
/// Everything is as before within this time.
const RECOVERED: Duration = Duration::from_secs(10);
/// Bytes by which the process may grow in the rush.
const GROWTH: u64 = 256 << 20;
/// What a busy machine may do to a first token and to a refusal of the ordinary tests.
const BUSY: Duration = Duration::from_secs(10);
/// Connections that the load comes over.
const CONNECTIONS: usize = 8;
/// Streams of the crowd.
const CROWD: usize = 64;

/// How one request ended.
#[derive(Clone)]
struct Outcome {
    /// Time to the first token; None: there was none.
    first: Option<Duration>,
    /// Time to the end.
    took: Duration,
    end: Result<(), Status>,
}

/// What is asked for, and what has to come.
struct Load {
    clients: Vec<InferenceClient<Channel>>,
    requests: Vec<GenerateRequest>,
    want: Vec<Vec<u32>>,
}

impl Load {
    async fn of(grpc: &str) -> Arc<Load> {
        let requests: Vec<GenerateRequest> = (0..KINDS)
            .map(|i| {
                let prompt: Vec<u32> = (0..24 + i).map(|p| 3 + (p * 97 + i * 31) % 2000).collect();
                let (least, most) = ANSWER;
                let answer = least + (most - least) * (i * 3 % KINDS) / (KINDS - 1);
                request(&prompt, greedy(answer, 0))
            })
            .collect();
        let want = generate_each(grpc, &requests).await;
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(Door::from(grpc).inference().await.unwrap());
        }
        Arc::new(Load {
            clients,
            requests,
            want: want.into_iter().map(|answer| answer.token_ids).collect(),
        })
    }

    /// Request number `n`, to its end.
    async fn ask(&self, n: usize) -> Outcome {
        let begun = Instant::now();
        let mut first = None;
        let end = self.follow(n, begun, &mut first).await;
        let took = begun.elapsed();
        Outcome { first, took, end }
    }

    async fn follow(
        &self,
        n: usize,
        begun: Instant,
        first: &mut Option<Duration>,
    ) -> Result<(), Status> {
        let mut client = self.clients[n % self.clients.len()].clone();
        let which = n % self.requests.len();
        let asked = client.generate(self.requests[which].clone()).await?;
        let mut stream = asked.into_inner();
        let mut tokens = Vec::new();
        while let Some(response) = stream.message().await? {
            if let Some(Event::Chunk(chunk)) = response.event {
                first.get_or_insert_with(|| begun.elapsed());
                tokens.extend(chunk.token_ids);
            }
        }
        assert_eq!(tokens, self.want[which], "a wrong token, or one too few");
        Ok(())
    }

    /// As many streams as there are places, one after the other each: answers in a second, and
    /// how long first tokens took. No more can be served, which is the knee.
    async fn saturated(self: &Arc<Self>, time: Duration) -> (f64, Duration) {
        let begun = Instant::now();
        let mut streams = JoinSet::new();
        for at in 0..RUNNING + WAITING {
            let load = Arc::clone(self);
            streams.spawn(async move {
                let mut served = Vec::new();
                while begun.elapsed() < time {
                    let outcome = load.ask(at + served.len()).await;
                    match &outcome.end {
                        Ok(()) => served.push(outcome),
                        // All have come at once.
                        Err(status) => tokio::time::sleep(retry_after(status).unwrap()).await,
                    }
                }
                served
            });
        }
        let served = streams.join_all().await.concat();
        let rate = served.len() as f64 / begun.elapsed().as_secs_f64();
        (rate, first_token(&served))
    }

    /// Requests arrive at random, `rate` in a second, whatever becomes of them.
    async fn offered(self: &Arc<Self>, rate: f64, time: Duration) -> Vec<Outcome> {
        let begun = Instant::now();
        let mut random = 1u64;
        let mut due = Duration::ZERO;
        let mut asked = JoinSet::new();
        for n in 0.. {
            // Gaps of a Poisson process, by a linear congruential generator.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let uniform = ((random >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
            due += Duration::from_secs_f64(-uniform.ln() / rate);
            if due > time {
                break;
            }
            tokio::time::sleep_until((begun + due).into()).await;
            let load = Arc::clone(self);
            asked.spawn(async move { load.ask(n).await });
        }
        asked.join_all().await
    }
}

/// 99 of 100 are no longer.
fn p99(lengths: impl Iterator<Item = Duration>) -> Duration {
    let mut lengths: Vec<Duration> = lengths.collect();
    lengths.sort_unstable();
    let at = (lengths.len() * 99).div_ceil(100).saturating_sub(1);
    lengths.get(at).copied().unwrap_or_default()
}

fn first_token(outcomes: &[Outcome]) -> Duration {
    p99(outcomes.iter().filter_map(|outcome| outcome.first))
}

fn served(outcomes: &[Outcome]) -> usize {
    outcomes
        .iter()
        .filter(|outcome| outcome.end.is_ok())
        .count()
}

/// Bytes of memory that a process has.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// Asks over HTTP until told to stop: (answers, refusals); whatever else comes is a fault.
fn over_http(address: &str, stop: &AtomicBool) -> (usize, usize) {
    let body = json!({ "model": "demo", "prompt": [5, 6, 7], "max_tokens": 2 }).to_string();
    let (mut answered, mut refused) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        let answer = http::post(address, "/v1/completions", body.as_bytes()).unwrap();
        match answer.status {
            200 => answered += 1,
            503 => {
                let seconds = answer.header("retry-after").unwrap();
                assert!(seconds.parse::<u64>().is_ok_and(|seconds| seconds > 0));
                refused += 1;
            }
            _ => panic!("{}: {}", answer.status, answer.text()),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    (answered, refused)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_refused_at_once_and_the_rest_hardly_notices() {
    let (running, waiting) = (RUNNING.to_string(), WAITING.to_string());
    let limits = ["--max-running", &running, "--max-waiting", &waiting];
    let mut cluster = Cluster::start(Shape::Local, &demo(), 1, 2, &limits);
    let process = cluster.processes[0].id();
    let load = Load::of(&cluster.grpc).await;
    let rush = Duration::from_secs(if long() { 60 } else { 8 });

    let (knee, usual) = load.saturated(Duration::from_secs(5)).await;
    let before = resident(process);
    let stop = Arc::new(AtomicBool::new(false));
    let (door, told) = (cluster.http.clone(), Arc::clone(&stop));
    let http = tokio::task::spawn_blocking(move || over_http(&door, &told));
    let begun = Instant::now();
    let rushed = load.offered(RUSH * knee, rush).await;
    let took = begun.elapsed();
    let grown = resident(process).saturating_sub(before);
    stop.store(true, Ordering::SeqCst);
    let (answered, refused_on_http) = http.await.unwrap();

    let over = Instant::now();
    let slow = match std::env::var_os(EXTENT) {
        Some(_) => SLOWER * usual,
        None => (SLOWER * usual).max(BUSY),
    };
    loop {
        let again = load.offered(knee / 2.0, Duration::from_secs(1)).await;
        if served(&again) == again.len() && first_token(&again) <= slow {
            break;
        }
        assert!(over.elapsed() < RECOVERED, "it does not recover");
    }
    let recovered = over.elapsed();

    let refused: Vec<&Outcome> = rushed.iter().filter(|o| o.end.is_err()).collect();
    let refusal = p99(refused.iter().map(|outcome| outcome.took));
    let whole = served(&rushed);
    let goodput = whole as f64 / took.as_secs_f64() / knee;
    line(&json!({
        "test": "overload", "case": "ten_times_the_knee", "whole": whole, "failed": 0, "wrong": 0,
        "knee_per_second": knee, "offered": rushed.len(), "refused": refused.len(),
        "goodput": goodput, "refusal_p99_ms": ms(refusal), "knee_ttft_p99_ms": ms(usual),
        "ttft_p99_ms": ms(first_token(&rushed)), "http": [answered, refused_on_http],
        "grown_mib": grown >> 20, "recovered_ms": ms(recovered),
    }));
    for outcome in &refused {
        let status = outcome.end.as_ref().unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(retry_after(status).is_some(), "{status:?}");
        assert!(outcome.first.is_none(), "refused after it was taken");
    }
    assert!(whole > 0 && refused.len() > whole, "{whole} were served");
    assert!(refused_on_http > 0, "{answered} were served over HTTP");
    assert!(grown < GROWTH, "{grown} bytes");
    let first = first_token(&rushed);
    assert!(first <= slow, "{first:?} of {slow:?}");
    if std::env::var_os(EXTENT).is_some() {
        assert!(refusal <= REFUSED, "{refusal:?}");
    }
    assert!(cluster.processes[0].is_running());
}

/// The text of an OpenAI stream, put together.
fn text_over_http(address: &str, n: usize) -> String {
    let prompt: Vec<usize> = (0..4 + n % 8)
        .map(|p| 3 + (p * 97 + n * 131) % 2000)
        .collect();
    let body = json!({
        "model": "demo", "prompt": prompt, "max_tokens": 40, "stream": true, "ignore_eos": true,
        "temperature": 0.8, "seed": n,
    });
    let answer = http::post(address, "/v1/completions", body.to_string().as_bytes()).unwrap();
    let events = answer.text();
    assert_eq!(answer.status, 200, "{events}");
    assert!(events.trim_end().ends_with("data: [DONE]"), "{events}");
    let events = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let events = events.filter_map(|event| serde_json::from_str::<serde_json::Value>(event).ok());
    let text = |event: serde_json::Value| event["choices"][0]["text"].as_str().map(str::to_owned);
    events.filter_map(text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streams_at_once_are_served_as_if_each_were_alone() {
    let cluster = Cluster::up(&demo());
    let alone: Vec<String> = (0..CROWD)
        .map(|n| text_over_http(&cluster.http, n))
        .collect();
    assert!(alone.iter().all(|text| text.len() > 20), "{alone:?}");
    let (address, start) = (&cluster.http, &Barrier::new(CROWD));
    let together: Vec<String> = std::thread::scope(|scope| {
        let clients = (0..CROWD).map(|n| {
            scope.spawn(move || {
                start.wait();
                text_over_http(address, n)
            })
        });
        let clients: Vec<_> = clients.collect();
        let texts = clients.into_iter().map(|client| client.join().unwrap());
        texts.collect()
    });
    assert_eq!(alone, together, "over HTTP");

    let requests: Vec<GenerateRequest> = (0..CROWD as u32)
        .map(|n| {
            let prompt: Vec<u32> = (0..2 + n % 30)
                .map(|p| 3 + (p * 89 + n * 17) % 2000)
                .collect();
            request(&prompt, greedy(24, 2))
        })
        .collect();
    let alone = generate_each(&cluster.grpc, &requests).await;
    assert_eq!(
        alone,
        generate_all(&cluster.grpc, &requests).await,
        "over gRPC"
    );
}
