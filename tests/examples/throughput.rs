//! Tokens per second of prefill and decode, over the local and the gRPC fabric
//! in turn, beside the candle reference on the same weights. Check, then time:
//! every run's tokens must equal the first run's before its time counts.
//!
//! `cargo xtask bench MODEL_DIR [PROMPT_TOKENS] [REPEATS]`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use futures::future::join_all;
use guild_model::Checkpoint;
use guild_model::reference::Reference;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{GenerateRequest, SamplingParams};
use guild_tests::client::request;
use guild_tests::process::{Cluster, Shape};

const BATCH: usize = 16;
const DECODE_TOKENS: u32 = 32;

/// One request's tokens with the seconds at which each arrived, from a common start.
async fn timed(
    mut client: InferenceClient<tonic::transport::Channel>,
    start: Instant,
    request: GenerateRequest,
) -> Vec<(u32, f64)> {
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        if let Some(Event::Chunk(chunk)) = response.event {
            tokens.extend(
                chunk
                    .token_ids
                    .iter()
                    .map(|&t| (t, start.elapsed().as_secs_f64())),
            );
        }
    }
    tokens
}

fn prompt(length: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..length)
        .map(|p| (3 + (p * 7919 + salt * 104_729 + p * p * 31) % (vocab - 3)) as u32)
        .collect()
}

/// (tokens of every request, prefill tokens/s, decode tokens/s): decode counts from the moment the last request has its first token.
async fn run(
    endpoint: &str,
    batch: usize,
    prompt_tokens: usize,
    output: u32,
    vocab: usize,
) -> (Vec<Vec<u32>>, f64, f64) {
    let client = InferenceClient::connect(endpoint.to_owned()).await.unwrap();
    let sampling = || SamplingParams {
        max_tokens: Some(output),
        ignore_eos: true,
        ..Default::default()
    };
    let start = Instant::now();
    let answers = join_all((0..batch).map(|i| {
        timed(
            client.clone(),
            start,
            request(&prompt(prompt_tokens, i, vocab), sampling()),
        )
    }))
    .await;
    let first = answers.iter().map(|a| a[0].1).fold(0.0, f64::max);
    let last = answers.iter().map(|a| a[a.len() - 1].1).fold(0.0, f64::max);
    let decoded = answers
        .iter()
        .flatten()
        .filter(|(_, at)| *at > first)
        .count();
    let tokens = answers
        .iter()
        .map(|a| a.iter().map(|(t, _)| *t).collect())
        .collect();
    (
        tokens,
        (batch * prompt_tokens) as f64 / first,
        decoded as f64 / (last - first),
    )
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args
        .next()
        .expect("usage: throughput MODEL_DIR [PROMPT_TOKENS] [REPEATS]");
    let prompt_tokens: usize = args.next().map_or(512, |a| a.parse().unwrap());
    let repeats: usize = args.next().map_or(5, |a| a.parse().unwrap());
    let checkpoint = Checkpoint::open(Path::new(&dir)).unwrap();
    let vocab = checkpoint.config().vocab_size;

    println!(
        "| what | reference (candle f32) | local fabric | gRPC fabric | gRPC / local |\n|---|---|---|---|---|"
    );
    let mut reference = reference_rates(&checkpoint, prompt_tokens, vocab);
    let workloads = [
        ("prefill, batch 1", 1, prompt_tokens, 1, true),
        ("decode, batch 1", 1, 16, DECODE_TOKENS, false),
        ("decode, batch 16", BATCH, 16, DECODE_TOKENS, false),
    ];
    let fabrics = [Shape::Local, Shape::Grpc];
    let clusters = fabrics.map(|shape| Cluster::start(shape, Path::new(&dir), 1, 2, &[]));
    for (what, batch, prompt_tokens, output, prefill) in workloads {
        let mut rates = [Vec::new(), Vec::new()];
        let mut expected = None;
        for repeat in 0..=repeats {
            for (cluster, rates) in clusters.iter().zip(&mut rates) {
                let (tokens, prefill_rate, decode_rate) =
                    run(&cluster.grpc, batch, prompt_tokens, output, vocab).await;
                assert_eq!(
                    expected.get_or_insert_with(|| tokens.clone()),
                    &tokens,
                    "both fabrics emit the same tokens"
                );
                if repeat > 0 {
                    rates.push(if prefill { prefill_rate } else { decode_rate });
                }
            }
        }
        let mut ratios: Vec<f64> = rates[0]
            .iter()
            .zip(&rates[1])
            .map(|(local, grpc)| grpc / local)
            .collect();
        let [mut local, mut grpc] = rates;
        let slow = reference
            .remove(0)
            .map_or("-".into(), |r| format!("{r:.1}"));
        println!(
            "| {what} | {slow} | {:.1} | {:.1} | {:.2} |",
            median(&mut local),
            median(&mut grpc),
            median(&mut ratios)
        );
    }
}

/// Tokens/s of the reference: a forward pass over the prompt, and one whole pass per decoded token, since it keeps no cache.
fn reference_rates(
    checkpoint: &Checkpoint,
    prompt_tokens: usize,
    vocab: usize,
) -> Vec<Option<f64>> {
    let reference = Reference::load(checkpoint).unwrap();
    let rate = |length: usize, tokens: f64| {
        let ids = prompt(length, 0, vocab);
        reference.forward(&ids).unwrap();
        let start = Instant::now();
        reference.forward(&ids).unwrap();
        tokens / start.elapsed().as_secs_f64()
    };
    vec![
        Some(rate(prompt_tokens, prompt_tokens as f64)),
        Some(rate(32, 1.0)),
        None,
    ]
}
