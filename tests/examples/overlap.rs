//! What two micro-batches hide of a long way to the experts: 32 streams that decode together on one attention node,
//! with two expert nodes that are a millisecond away in each direction and, in turn, at once there. Prints one line
//! of JSON. Tokens must be the same in all runs before a time counts.
//!
//! The expert nodes are processes behind proxies that hold every byte up for the time of the way, in order and as many
//! as there are; the attention node runs here, on one thread of arithmetic, so that its steps can be cut or not while
//! everything else stays as it is. Layers are Moonlight's but for fewer and smaller routed experts: on this one
//! machine the expert nodes have to share the processor that is left, and it is the way that is to be measured.
//! Times are means over the steps in which all streams decode, and medians of those over the rounds:
//!
//! - `step_ms`: a step of 32 rows;
//! - `away_ms`: how long rows were away in a step: for each exchange from when all rows were sent until the last came
//!   back, summed;
//! - `exposed_ms`: how much of a step there was nothing to compute, only rows to be waited for;
//! - `hidden`: 1 - exposed_ms(far, on) / exposed_ms(far, off), the part of the waiting that micro-batches hide;
//! - `hidden_of_way`: (step_ms(far, off) - step_ms(far, on)) / (step_ms(far, off) - step_ms(near, off)), the part of
//!   what the way adds to a step that they take away again, with all that cutting costs;
//! - `auto`: share of the steps that went in two when nobody says how, after it has had a run to find out.
//!
//! `cargo run --release -p guild-tests --example overlap -- [ROUNDS] [ONE_WAY_US]`, with `GUILD_BIN`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener as Echo, TcpStream};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use guild_attention_node::overlap::Overlapped;
use guild_attention_node::{AttentionNodeConfig, MicroBatches, Overlap};
use guild_model::{Checkpoint, Cpu, random};
use guild_node::Shutdown;
use guild_node::tls::Role;
use guild_proto::inference::v1::SamplingParams;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_tests::client::request;
use guild_tests::house::{House, Plan};
use guild_tests::proxy::Proxy;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::transport::Channel;

/// Overrides of Moonlight's dimensions. The shared experts are as wide as there.
const SHAPE: [(&str, i64); 8] = [
    ("num_hidden_layers", 9),
    ("intermediate_size", 2816),
    ("moe_intermediate_size", 256),
    ("n_shared_experts", 11),
    ("n_routed_experts", 16),
    ("num_experts_per_tok", 4),
    ("vocab_size", VOCAB as i64),
    ("max_position_embeddings", 1024),
];
const VOCAB: u32 = 2048;
const NODES: usize = 2;
const STREAMS: usize = 32;
const PROMPT: u32 = 64;
const OUTPUT: u32 = 56;
/// Bytes that the way of the proxies is measured with, and how often.
const PING: (usize, usize) = (64, 200);

/// The steps in which all streams decode.
#[derive(Default)]
struct Window {
    /// Streams that have their first token.
    here: AtomicUsize,
    begin: OnceLock<(Instant, Overlapped)>,
    end: OnceLock<(Instant, Overlapped)>,
}

/// What a step was like, in the mean.
#[derive(Clone, Copy)]
struct Steps {
    step_ms: f64,
    away_ms: f64,
    exposed_ms: f64,
    /// Part of the steps that went in two micro-batches.
    in_two: f64,
}

async fn stream(
    mut client: InferenceClient<Channel>,
    prompt: Vec<u32>,
    window: &Window,
    overlap: &Overlap,
) -> Vec<u32> {
    let sampling = SamplingParams {
        max_tokens: Some(OUTPUT),
        temperature: Some(0.0),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let asked = client.generate(request(&prompt, sampling)).await;
    let mut stream = asked.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        let Some(Event::Chunk(chunk)) = response.event else {
            continue;
        };
        let now = || (Instant::now(), overlap.so_far());
        if tokens.is_empty() && window.here.fetch_add(1, Ordering::SeqCst) + 1 == STREAMS {
            window.begin.set(now()).unwrap();
        }
        tokens.extend(chunk.token_ids);
        // The first that is about to leave.
        if tokens.len() + 1 >= OUTPUT as usize {
            window.end.get_or_init(now);
        }
    }
    tokens
}

/// All streams, once. Every prompt is another one.
async fn run(door: &str, overlap: &Overlap) -> (Vec<Vec<u32>>, Steps) {
    let client = InferenceClient::connect(door.to_owned()).await.unwrap();
    let window = Window::default();
    let tokens = join_all((0..STREAMS as u32).map(|salt| {
        let token = |p: u32| 3 + (p * 7919 + salt * 104_729 + p * p * 31) % (VOCAB - 3);
        stream(
            client.clone(),
            (0..PROMPT).map(token).collect(),
            &window,
            overlap,
        )
    }))
    .await;
    let (&(from, before), &(to, after)) = (window.begin.get().unwrap(), window.end.get().unwrap());
    let during = after.since(&before);
    let each = |time: Duration| time.as_secs_f64() * 1e3 / during.steps as f64;
    let steps = Steps {
        step_ms: each(to - from),
        away_ms: each(during.away),
        exposed_ms: each(during.exposed),
        in_two: during.split as f64 / during.steps as f64,
    };
    (tokens, steps)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

/// Milliseconds that a few bytes take through a proxy and back.
fn round_trip(one_way: Duration) -> f64 {
    let listener = Echo::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::to(listener.local_addr().unwrap().to_string());
    proxy.delay(one_way);
    let mut near = TcpStream::connect(proxy.address()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    for end in [&near, &far] {
        end.set_nodelay(true).unwrap();
    }
    let echo = std::thread::spawn(move || {
        let mut bytes = [0; PING.0];
        while far.read_exact(&mut bytes).is_ok() {
            far.write_all(&bytes).unwrap();
        }
    });
    let pings = (0..PING.1).map(|_| {
        let (begun, mut bytes) = (Instant::now(), [1; PING.0]);
        near.write_all(&bytes).unwrap();
        near.read_exact(&mut bytes).unwrap();
        begun.elapsed().as_secs_f64() * 1e3
    });
    let median = median(pings);
    drop(near);
    echo.join().unwrap();
    median
}

fn write_model(dir: &Path) {
    let set = SHAPE.map(|(key, value)| (key.to_owned(), Value::from(value)));
    let shape = random::shape("moonlight").unwrap();
    random::write(shape, &set, 1, random::DEFAULT_SHARD_BYTES, dir, &|_, _| ()).unwrap();
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u64| args.next().map_or(default, |a| a.parse().unwrap());
    let (rounds, one_way) = (number(5).max(1), Duration::from_micros(number(1000)));
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("moonlight-9L");
    write_model(&model);
    let plan = Plan {
        model: model.clone(),
        attention: 0,
        experts: NODES,
        replicas: 1,
        proxies: NODES,
        ..Plan::default()
    };
    let house = House::begin(plan, |_| None);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap().to_string();
    let checkpoint = Checkpoint::open(&model).unwrap();
    let mut config = AttentionNodeConfig::new(checkpoint, "attention-0", here, &house.urls);
    config.tls = house.certs.as_ref().map(|certs| certs.tls(Role::Attention));
    config.drain = Duration::ZERO;
    // Prompts are not what is measured.
    config.itl_target = None;
    let (overlap, shutdown) = (config.overlap.clone(), Shutdown::new());
    let node = guild_attention_node::run(config, listener, Cpu::new(1), None, shutdown.clone());
    let node = tokio::spawn(node);
    house.ready_with("ready", |_| true).await;
    let door = house.grpc().to_owned();

    let ways = [("far", one_way), ("near", Duration::ZERO)];
    let mut expected = None;
    let mut one = async |way: Duration, wanted: MicroBatches| {
        house.proxies.iter().for_each(|proxy| proxy.delay(way));
        overlap.set(wanted);
        let (tokens, steps) = run(&door, &overlap).await;
        let expected = expected.get_or_insert_with(|| tokens.clone());
        assert_eq!(*expected, tokens, "a cut has changed tokens");
        steps
    };
    let mut runs: [[Vec<Steps>; 2]; 2] = Default::default();
    for round in 0..=rounds {
        for (way, runs) in ways.iter().zip(&mut runs) {
            for (wanted, runs) in [MicroBatches::Off, MicroBatches::On].into_iter().zip(runs) {
                let steps = one(way.1, wanted).await;
                // The first round warms up.
                if round > 0 {
                    runs.push(steps);
                }
            }
        }
    }
    let mut auto = serde_json::Map::new();
    for (name, way) in ways {
        one(way, MicroBatches::Auto).await;
        let steps = one(way, MicroBatches::Auto).await;
        auto.insert(
            name.to_owned(),
            json!({ "in_two": rounded(steps.in_two), "step_ms": rounded(steps.step_ms) }),
        );
    }

    let of = |runs: &[Steps], field: fn(&Steps) -> f64| median(runs.iter().map(field));
    let table = |field: fn(&Steps) -> f64| {
        let way = |[off, on]: &[Vec<Steps>; 2]| json!({ "off": rounded(of(off, field)), "on": rounded(of(on, field)) });
        json!({ "far": way(&runs[0]), "near": way(&runs[1]) })
    };
    let [[far_off, far_on], [near_off, _]] = &runs;
    // Runs of a round are beside each other in time: shares are taken there.
    let hidden = (far_off.iter().zip(far_on)).map(|(off, on)| 1.0 - on.exposed_ms / off.exposed_ms);
    let of_way = far_off.iter().zip(far_on).zip(near_off);
    let of_way =
        of_way.map(|((off, on), near)| (off.step_ms - on.step_ms) / (off.step_ms - near.step_ms));
    let line = json!({
        "bench": "overlap",
        "streams": STREAMS,
        "expert_nodes": NODES,
        "moe_layers": SHAPE[0].1 - 1,
        "rounds": rounds,
        "one_way_ms": one_way.as_secs_f64() * 1e3,
        "round_trip_ms": rounded(round_trip(one_way)),
        "step_ms": table(|steps| steps.step_ms),
        "away_ms": table(|steps| steps.away_ms),
        "exposed_ms": table(|steps| steps.exposed_ms),
        "hidden": rounded(median(hidden)),
        "hidden_of_way": rounded(median(of_way)),
        "auto": auto,
    });
    println!("{line}");
    drop(house);
    shutdown.trigger();
    // Its coordinator has gone: how it ends does not matter.
    let _ = tokio::time::timeout(Duration::from_secs(10), node).await;
}
