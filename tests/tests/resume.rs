//! A stream outlives the node that it runs on: whatever becomes of attention
//! nodes, every client sees the tokens and log-probabilities of an undisturbed
//! run, once each and in one stream. Every case prints a line of JSON with the
//! longest stall that a client saw.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use guild_proto::cluster::v1::Role;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{
    Constraint, FinishReason, GenerateRequest, SamplingParams, Usage, constraint::Form,
};
use guild_tests::client::{Answer, Logprobs, greedy, request};
use guild_tests::house::{House, Plan};
use guild_tests::process::START_LIMIT;
use guild_tests::{http, work};

/// What going on elsewhere may cost a stream, beside the time that its tokens so far take to be
/// computed anew.
const RESUMED: Duration = Duration::from_secs(2);
/// What a node may be silent for before its streams go on elsewhere: a connection that is closed
/// tells at once, a process that is stopped closes none. The front door asks for a sign of life
/// after half a second without one, and waits a second for it.
const SILENCE: Duration = Duration::from_millis(1500);
/// What replacing a process that is told to end may cost a stream.
const REPLACED: Duration = Duration::from_secs(1);
/// What a draining attention node gives its streams here: less than they need.
const DRAIN_SECONDS: &str = "1";
/// Of nodes, in seconds: longer than any stall may be, so that none ends by it.
const LEASE: &str = "60";

async fn house(attention: usize, experts: usize, replicas: usize) -> House {
    House::start(Plan {
        attention,
        experts,
        replicas,
        lease: LEASE,
        attention_flags: ["--drain", DRAIN_SECONDS].map(str::to_owned).into(),
        ..Plan::default()
    })
    .await
}

/// Streams that have gone on at another node so far: without any, a test has shown nothing.
fn resumed(house: &House) -> usize {
    let log = house.coordinators[0].node.output();
    log.matches("a stream goes on elsewhere").count()
}

/// What a client has seen of one stream.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    answer: Answer,
    usage: Usage,
}

/// Tokens that clients have got so far, and the longest time one has waited.
#[derive(Default)]
struct Watch {
    tokens: AtomicUsize,
    longest_ms: AtomicUsize,
    /// The longest time that one has waited for its first token.
    first_ms: AtomicUsize,
}

impl Watch {
    async fn follow(&self, endpoint: &str, request: GenerateRequest) -> Seen {
        let mut client = InferenceClient::connect(endpoint.to_owned()).await.unwrap();
        let begun = Instant::now();
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let (mut prompts, mut usage) = (0, None);
        let mut answer = Answer {
            token_ids: vec![],
            text: String::new(),
            logprobs: vec![],
            prompt_logprobs: vec![],
            finish: Default::default(),
        };
        let mut last = None;
        while let Some(response) = stream.message().await.unwrap() {
            assert!(usage.is_none(), "something came after Complete");
            match response.event.unwrap() {
                Event::Prompt(prompt) => {
                    prompts += 1;
                    let logprobs = prompt.logprobs.into_iter().map(Logprobs::from);
                    answer.prompt_logprobs.extend(logprobs);
                }
                Event::Chunk(chunk) => {
                    self.tokens
                        .fetch_add(chunk.token_ids.len(), Ordering::SeqCst);
                    answer.token_ids.extend(chunk.token_ids);
                    answer.text.push_str(&chunk.text);
                    let logprobs = chunk.logprobs.into_iter().map(Logprobs::from);
                    answer.logprobs.extend(logprobs);
                    let now = Instant::now();
                    let (since, longest) = match last.replace(now) {
                        Some(last) => (last, &self.longest_ms),
                        None => (begun, &self.first_ms),
                    };
                    let waited = (now - since).as_millis() as usize;
                    longest.fetch_max(waited, Ordering::SeqCst);
                }
                Event::Complete(complete) => {
                    answer.finish = complete.finish_reason();
                    // What was in a cache, and what was drafted, is the business of the node.
                    usage = complete.usage.map(|usage| Usage {
                        prompt_tokens: usage.prompt_tokens,
                        completion_tokens: usage.completion_tokens,
                        ..Usage::default()
                    });
                }
            }
        }
        assert_eq!(prompts, 1, "one Prompt event");
        Seen {
            answer,
            usage: usage.expect("a stream ends with Complete"),
        }
    }

    async fn all(&self, endpoint: &str, requests: &[GenerateRequest]) -> Vec<Seen> {
        join_all(requests.iter().map(|r| self.follow(endpoint, r.clone()))).await
    }

    /// Waits until clients have got so many tokens.
    async fn passed(&self, tokens: usize) {
        while self.tokens.load(Ordering::SeqCst) < tokens {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// What streams may stand still that go on elsewhere when `bar` has passed, by the `quiet` run of
    /// the same requests: their tokens so far are a prompt there.
    fn replayed(quiet: &Watch, bar: Duration) -> Duration {
        let of = |ms: &AtomicUsize| Duration::from_millis(ms.load(Ordering::SeqCst) as u64);
        work::limit(bar + of(&quiet.first_ms), of(&quiet.longest_ms))
    }

    fn report(&self, case: &str, streams: usize, resumed: usize, limit: Duration) {
        let longest = self.longest_ms.load(Ordering::SeqCst);
        work::line(&serde_json::json!({
            "test": "resume", "case": case, "whole": streams, "failed": 0, "wrong": 0,
            "longest_stall_ms": longest, "limit_ms": work::ms(limit), "resumed": resumed,
            "tokens": self.tokens.load(Ordering::SeqCst),
        }));
        let longest = Duration::from_millis(longest as u64);
        assert!(longest <= limit, "{case}: {longest:?} of {limit:?}");
    }
}

/// Sixteen streams, every other one sampled by a seed, all with log-probabilities.
fn workload() -> Vec<GenerateRequest> {
    (0..16u32)
        .map(|i| {
            let token = |p: u32| 3 + (p * 7919 + i * 104_729 + p * p * 31) % 2000;
            let prompt: Vec<u32> = (0..1 + 5 * i).map(token).collect();
            let mut sampling = greedy(180 + 7 * i, 3);
            if i % 2 == 1 {
                sampling.temperature = Some(0.9);
                sampling.top_p = Some(0.95);
                sampling.seed = Some(500 + u64::from(i));
            }
            request(&prompt, sampling)
        })
        .collect()
}

fn assert_same(case: &str, want: &[Seen], got: &[Seen]) {
    assert_eq!(want.len(), got.len());
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        let tokens = (&want.answer.token_ids, &got.answer.token_ids);
        assert_eq!(tokens.0, tokens.1, "{case}: tokens of stream {i}");
        assert_eq!(want, got, "{case}: stream {i}");
    }
}

/// The text of an OpenAI stream, put together.
fn text_over_http(address: &str, seed: Option<u64>) -> String {
    let body = serde_json::json!({
        "model": "demo", "prompt": "The first thing to know is", "max_tokens": 300, "stream": true,
        "temperature": if seed.is_some() { 0.8 } else { 0.0 }, "seed": seed, "ignore_eos": true,
    });
    let answer = http::post(address, "/v1/completions", body.to_string().as_bytes()).unwrap();
    let events = answer.text();
    assert_eq!(answer.status, 200, "{events}");
    assert!(events.trim_end().ends_with("data: [DONE]"), "{events}");
    let mut text = String::new();
    for event in events
        .lines()
        .filter_map(|line| line.strip_prefix("data: {"))
    {
        let event: serde_json::Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        assert!(event.get("error").is_none(), "{event}");
        text.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
    }
    text
}

async fn texts_over_http(address: &str) -> Vec<String> {
    let each = [None, Some(1), Some(2), None].map(|seed| {
        let address = address.to_owned();
        tokio::task::spawn_blocking(move || text_over_http(&address, seed))
    });
    join_all(each)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_outlive_a_killed_and_a_stopped_attention_node() {
    let mut house = house(2, 2, 1).await;
    let requests = workload();
    let quiet = Watch::default();
    let want = quiet.all(house.grpc(), &requests).await;
    let texts = texts_over_http(&house.coordinators[0].http).await;
    assert!(texts.iter().all(|text| text.len() > 100), "{texts:?}");

    let kill = Watch::default();
    let fault = async {
        kill.passed(16 * 30).await;
        house.attention[0].signal("KILL");
    };
    let (got, on_http, ()) = tokio::join!(
        kill.all(house.grpc(), &requests),
        texts_over_http(&house.coordinators[0].http),
        fault
    );
    assert_same("kill -9", &want, &got);
    assert_eq!(texts, on_http, "kill -9: text over HTTP");
    let killed = resumed(&house);
    assert!(killed > 0);
    let limit = Watch::replayed(&quiet, RESUMED);
    kill.report("attention_node_killed", 20, killed, limit);

    house.attention[0].restart();
    // Until then the one that was killed may still count as a member.
    let again = house.attention[0].process();
    again.wait_for_line("joined the cluster", START_LIMIT);
    house.all_ready().await;
    let stop = Watch::default();
    let fault = async {
        stop.passed(16 * 30).await;
        house.attention[1].signal("STOP");
    };
    let (got, on_http, ()) = tokio::join!(
        stop.all(house.grpc(), &requests),
        texts_over_http(&house.coordinators[0].http),
        fault
    );
    assert_same("SIGSTOP", &want, &got);
    assert_eq!(texts, on_http, "SIGSTOP: text over HTTP");
    let stopped = resumed(&house) - killed;
    assert!(stopped > 0);
    let limit = Watch::replayed(&quiet, SILENCE + RESUMED);
    stop.report("attention_node_stopped", 20, stopped, limit);

    // It wakes up with streams that are no longer its own, and is of use again.
    house.attention[1].signal("CONT");
    house.all_ready().await;
    let got = Watch::default().all(house.grpc(), &requests).await;
    assert_same("after SIGCONT", &want, &got);
}

/// Members of the lists that bound streams say.
const MEMBERS: usize = 8;

/// Eight streams whose output has to be a list of so many objects; every other one is sampled by a seed.
fn bound_workload() -> Vec<GenerateRequest> {
    let schema = serde_json::json!({
        "type": "array", "minItems": MEMBERS, "maxItems": MEMBERS,
        "items": {
            "type": "object",
            "properties": {
                "speaker": {"type": "string", "maxLength": 16},
                "lines": {"type": "integer", "minimum": 0, "maximum": 999},
                "alive": {"type": "boolean"},
            },
            "required": ["speaker", "lines", "alive"],
            "additionalProperties": false,
        },
    });
    (0..8u32)
        .map(|i| {
            let prompt: Vec<u32> = (0..4 + i).map(|p| 3 + (p * 97 + i * 31) % 2000).collect();
            let sampling = SamplingParams {
                max_tokens: Some(450),
                temperature: Some(if i % 2 == 1 { 0.9 } else { 0.0 }),
                seed: Some(u64::from(i)),
                logprobs: Some(2),
                constraint: Some(Constraint {
                    form: Some(Form::JsonSchema(schema.to_string())),
                    after_token: None,
                }),
                ..SamplingParams::default()
            };
            request(&prompt, sampling)
        })
        .collect()
}

/// Whether a text is what [`bound_workload`] asks for.
fn assert_bound(text: &str) {
    let list: Vec<serde_json::Map<String, serde_json::Value>> =
        serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(list.len(), MEMBERS, "{text}");
    for member in list {
        let speaker = member["speaker"].as_str().map(|s| s.chars().count());
        assert!(speaker.is_some_and(|length| length <= 16), "{text}");
        assert!(member["lines"].as_u64().is_some_and(|n| n <= 999), "{text}");
        assert!(member["alive"].is_boolean() && member.len() == 3, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_with_a_schema_keep_to_it_when_their_attention_node_is_killed() {
    let house = house(2, 1, 1).await;
    let requests = bound_workload();
    let quiet = Watch::default();
    let want = quiet.all(house.grpc(), &requests).await;
    for seen in &want {
        assert_eq!(seen.answer.finish, FinishReason::Stop);
        assert_bound(&seen.answer.text);
    }
    let watch = Watch::default();
    let fault = async {
        watch.passed(requests.len() * 30).await;
        house.attention[0].signal("KILL");
    };
    let (got, ()) = tokio::join!(watch.all(house.grpc(), &requests), fault);
    for seen in &got {
        assert_bound(&seen.answer.text);
    }
    assert_same("bound streams", &want, &got);
    assert!(resumed(&house) > 0);
    watch.report(
        "attention_node_killed_under_bound_streams",
        requests.len(),
        resumed(&house),
        Watch::replayed(&quiet, RESUMED),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_wait_for_the_only_attention_node_to_come_back() {
    let mut house = house(1, 1, 1).await;
    let requests = workload();
    let quiet = Watch::default();
    let want = quiet.all(house.grpc(), &requests).await;
    let watch = Watch::default();
    let grpc = house.grpc().to_owned();
    let fault = async {
        watch.passed(16 * 30).await;
        let begun = Instant::now();
        house.attention[0].restart();
        // The one that was killed still counts as a member.
        while !house.attention[0].output().contains("joined the cluster") {
            assert!(begun.elapsed() < START_LIMIT, "it does not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        house.all_ready().await;
        begun.elapsed()
    };
    let (got, away) = tokio::join!(watch.all(&grpc, &requests), fault);
    assert_same("restart of the only node", &want, &got);
    assert!(resumed(&house) > 0);
    let limit = Watch::replayed(&quiet, away + RESUMED);
    watch.report("only_attention_node_restarted", 16, resumed(&house), limit);
}

/// Restarts every node of a role, one after the other, while clients come back
/// for more as soon as they are served.
async fn rolling_restart(case: &str, house: &mut House, role: Role, nodes: usize) {
    let requests = workload();
    let quiet = Watch::default();
    let want = quiet.all(house.grpc(), &requests).await;
    let (watch, over) = (Watch::default(), AtomicBool::new(false));
    let (grpc, served) = (house.grpc().to_owned(), AtomicUsize::new(0));
    let client = |i: usize| {
        let (watch, over, served, grpc) = (&watch, &over, &served, &grpc);
        let (request, want) = (&requests[i], &want[i]);
        async move {
            while !over.load(Ordering::SeqCst) {
                let got = watch.follow(grpc, request.clone()).await;
                assert_eq!(want, &got, "{case}: stream {i}");
                served.fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    let restarts = async {
        watch.passed(16 * 30).await;
        for at in 0..nodes {
            let node = match role {
                Role::Attention => &mut house.attention[at],
                _ => &mut house.experts[at],
            };
            let ended = node.terminate(START_LIMIT).await;
            assert!(ended.success(), "{} ended with {ended}", node.name);
            node.restart();
            house.all_ready().await;
        }
        over.store(true, Ordering::SeqCst);
    };
    tokio::join!(join_all((0..requests.len()).map(client)), restarts);
    let limit = Watch::replayed(&quiet, REPLACED);
    watch.report(case, served.load(Ordering::SeqCst), resumed(house), limit);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_the_attention_nodes_fails_no_request() {
    let mut house = house(2, 2, 1).await;
    let case = "rolling_restart_of_attention_nodes";
    rolling_restart(case, &mut house, Role::Attention, 2).await;
    assert!(resumed(&house) > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_the_expert_nodes_fails_no_request() {
    let mut house = house(1, 2, 2).await;
    let case = "rolling_restart_of_expert_nodes";
    rolling_restart(case, &mut house, Role::Expert, 2).await;
}
