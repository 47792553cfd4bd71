//! Decoding on one expert node with one, two and four attention nodes, with rows merged and not, in
//! turn. The tokens must be the same before a time counts.
//!
//! The expert node runs here, so that merging can be switched; the others are processes.
//!
//! `cargo run --release -p guild-tests --example merging -- MODEL_DIR [STREAMS] [ROUNDS]`, with `GUILD_BIN`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use guild_expert_node::ExpertNodeConfig;
use guild_expert_node::merge::{MERGE_FROM_BYTES, Merging};
use guild_model::{Checkpoint, Cpu};
use guild_node::Shutdown;
use guild_node::tls::Role;
use guild_proto::inference::v1::SamplingParams;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_tests::client::request;
use guild_tests::house::{House, Plan};
use tokio::net::TcpListener;
use tonic::transport::Channel;

const ATTENTION: [usize; 3] = [1, 2, 4];
const PROMPT: u32 = 16;
const OUTPUT: u32 = 24;

/// What one run has reached.
struct Run {
    tokens: Vec<Vec<u32>>,
    /// Tokens per second from the moment that every stream has its first.
    rate: f64,
    /// Mean rows of a product.
    together: f64,
}

/// Tokens, and when each came, in seconds from `start`.
async fn stream(
    mut client: InferenceClient<Channel>,
    prompt: Vec<u32>,
    start: Instant,
) -> Vec<(u32, f64)> {
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
        if let Some(Event::Chunk(chunk)) = response.event {
            let at = start.elapsed().as_secs_f64();
            tokens.extend(chunk.token_ids.into_iter().map(|token| (token, at)));
        }
    }
    tokens
}

async fn run(door: &str, streams: usize, vocab: u32, merging: &Merging, merge: bool) -> Run {
    merging.set_from_bytes(if merge { MERGE_FROM_BYTES } else { u64::MAX });
    let before = merging.products();
    let client = InferenceClient::connect(door.to_owned()).await.unwrap();
    let start = Instant::now();
    let all = join_all((0..streams as u32).map(|salt| {
        let prompt =
            (0..PROMPT).map(|p| 3 + (p * 7919 + salt * 104_729 + p * p * 31) % (vocab - 3));
        stream(client.clone(), prompt.collect(), start)
    }))
    .await;
    let after = merging.products();
    let first = all.iter().map(|tokens| tokens[0].1).fold(0.0, f64::max);
    let last = all.iter().map(|tokens| tokens[tokens.len() - 1].1);
    let last = last.fold(0.0, f64::max);
    let decoded = all.iter().flatten().filter(|(_, at)| *at > first).count();
    Run {
        rate: decoded as f64 / (last - first),
        together: (after.rows - before.rows) as f64 / (after.products - before.products) as f64,
        tokens: all
            .into_iter()
            .map(|tokens| tokens.into_iter().map(|(token, _)| token).collect())
            .collect(),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let model = args
        .next()
        .expect("usage: merging MODEL_DIR [STREAMS] [ROUNDS]");
    let mut number = |default: usize| args.next().map_or(default, |a| a.parse().unwrap());
    let (streams, rounds) = (number(8), number(3));
    let checkpoint = Checkpoint::open(Path::new(&model)).unwrap();
    let vocab = checkpoint.config().vocab_size as u32;
    println!(
        "| attention nodes x streams | tokens/s, off | on | on / off | rows a product, off | on |"
    );
    println!("|---|---|---|---|---|---|");
    for attention in ATTENTION {
        let flags = |flags: &[&str]| flags.iter().map(|&flag| flag.to_owned()).collect();
        let plan = Plan {
            model: Path::new(&model).to_owned(),
            attention,
            experts: 0,
            replicas: 1,
            coordinator_flags: flags(&["--rebalance", "off"]),
            node_flags: Vec::new(),
            ..Plan::default()
        };
        let house = House::begin(plan, |_| None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let here = listener.local_addr().unwrap().to_string();
        let mut config = ExpertNodeConfig::new(checkpoint.clone(), "expert-0", here, &house.urls);
        config.tls = house.certs.as_ref().map(|certs| certs.tls(Role::Expert));
        config.drain = Duration::ZERO;
        let merging = config.merging.clone();
        let shutdown = Shutdown::new();
        let node = guild_expert_node::run(config, listener, Cpu::new(0), None, shutdown.clone());
        let node = tokio::spawn(node);
        house.ready_with("ready", |_| true).await;
        let door = house.grpc().to_owned();
        let mut runs = [Vec::new(), Vec::new()];
        let mut expected = None;
        for round in 0..=rounds {
            for merge in [false, true] {
                let run = run(&door, attention * streams, vocab, &merging, merge).await;
                let expected = expected.get_or_insert_with(|| run.tokens.clone());
                assert_eq!(*expected, run.tokens, "merging has changed tokens");
                if round > 0 {
                    runs[usize::from(merge)].push(run);
                }
            }
        }
        let [off, on] = &runs;
        println!(
            "| {attention} x {streams} | {:.1} | {:.1} | {:.2} | {:.2} | {:.2} |",
            median(off.iter().map(|run| run.rate)),
            median(on.iter().map(|run| run.rate)),
            median(off.iter().zip(on).map(|(off, on)| on.rate / off.rate)),
            median(off.iter().map(|run| run.together)),
            median(on.iter().map(|run| run.together)),
        );
        drop(house);
        shutdown.trigger();
        // Its coordinator has gone: how it ends does not matter.
        let _ = tokio::time::timeout(Duration::from_secs(10), node).await;
    }
}
