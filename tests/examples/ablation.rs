//! What single parts of the engine are worth: the same load with a part and without it, in turns, against real
//! processes. A line of JSON for each part, with the median over the rounds and the ratio of every round.
//!
//! - `chunked_prefill`: gaps between tokens of streams that decode while long prompts come, with chunks kept to
//!   `--itl-target` and with chunks as long as the prompt.
//! - `prefix_cache`: time to the first token of prompts that share their beginning, with the cache and without.
//! - `mtp`: tokens/s of greedy decoding by drafts that are always made, by drafts as long as they pay, and without;
//!   and which part of them held, by place. The tokens are compared before their time counts.
//!
//! `cargo run --release -p guild-tests --example ablation -- MODEL_DIR [SECONDS] [ROUNDS] [ITL_TARGET_MS] [FLAG...]`,
//! with `GUILD_BIN`; SECONDS is the length of one run, and the flags are for every `guild up`. A folder with a
//! `prompts.txt` (a JSON string a line) is asked with those texts, any other with random tokens.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::future::{join, join_all};
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{
    GenerateRequest, ModelInfoRequest, SamplingParams, TokenIds, Usage,
};
use guild_tests::process::{Cluster, Shape};
use serde_json::{Value, json};
use tonic::transport::Channel;

/// Streams that decode while long prompts come.
const STREAMS: usize = 4;
/// Tokens of a long prompt at most, and of a prefix that prompts share.
const LONG: u32 = 4096;
const SHARED: u32 = 1024;
/// Tokens that follow what is shared.
const OWN: u32 = 16;
/// Different prefixes.
const PREFIXES: u32 = 2;
/// Tokens of an answer, and requests at a time, of the runs with drafts.
const ANSWER: u32 = 64;
const BATCHES: [usize; 2] = [1, 8];

/// One request as its client saw it.
#[derive(Default)]
struct Seen {
    tokens: Vec<u32>,
    /// Seconds from the request to each token.
    at: Vec<f64>,
    usage: Usage,
}

/// A server with one setting, and who asks it.
struct Server {
    client: InferenceClient<Channel>,
    _cluster: Cluster,
}

/// What all runs have in common.
struct Plan {
    model: PathBuf,
    seconds: Duration,
    rounds: usize,
    flags: Vec<String>,
    /// Tokens of prompt and output together, and the vocabulary.
    context: u32,
    vocab: u32,
    texts: Vec<String>,
    /// No prompt comes twice.
    salt: AtomicU32,
}

fn sampling(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

fn ask(ids: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids })),
        sampling: Some(sampling(max_tokens)),
        ..GenerateRequest::default()
    }
}

impl Server {
    async fn start(plan: &Plan, more: &[&str]) -> Server {
        let mut flags: Vec<&str> = plan.flags.iter().map(String::as_str).collect();
        flags.extend(more);
        let cluster = Cluster::start(Shape::Local, &plan.model, 1, 1, &flags);
        let client = InferenceClient::connect(cluster.grpc.clone()).await;
        Server {
            client: client.unwrap(),
            _cluster: cluster,
        }
    }

    /// The answer, or what has come of it by `until`.
    async fn run(&self, request: GenerateRequest, until: Option<Instant>) -> Seen {
        let begun = Instant::now();
        let mut client = self.client.clone();
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let mut seen = Seen::default();
        while until.is_none_or(|until| Instant::now() < until) {
            let Some(response) = stream.message().await.unwrap() else {
                break;
            };
            match response.event {
                Some(Event::Chunk(chunk)) => {
                    let now = begun.elapsed().as_secs_f64();
                    seen.at.extend(chunk.token_ids.iter().map(|_| now));
                    seen.tokens.extend(chunk.token_ids);
                }
                Some(Event::Complete(complete)) => seen.usage = complete.usage.unwrap_or_default(),
                _ => {}
            }
        }
        seen
    }
}

impl Plan {
    /// A prompt of its own for every `salt`.
    fn prompt(&self, length: u32, salt: u32) -> Vec<u32> {
        let mut state = u64::from(salt) << 32;
        let token = |_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            3 + ((mixed >> 32) as u32) % (self.vocab - 3)
        };
        (0..length).map(token).collect()
    }

    fn another(&self) -> u32 {
        self.salt.fetch_add(1, Ordering::Relaxed)
    }

    /// Gaps between tokens of [`STREAMS`] streams while long prompts come one after the other, and the times to the
    /// first token of those.
    async fn mixed(&self, server: &Server) -> (Vec<f64>, Vec<f64>) {
        let until = Instant::now() + self.seconds;
        let stream = async || {
            let mut gaps = Vec::new();
            while Instant::now() < until {
                let short = ask(self.prompt(8, self.another()), self.context - 8);
                let seen = server.run(short, Some(until)).await;
                gaps.extend(seen.at.windows(2).map(|pair| pair[1] - pair[0]));
            }
            gaps
        };
        let long = async {
            let mut firsts = Vec::new();
            while Instant::now() < until {
                let prompt = self.prompt(LONG.min(self.context - 8), self.another());
                firsts.extend(server.run(ask(prompt, 1), None).await.at);
            }
            firsts
        };
        let streams = join_all((0..STREAMS).map(|_| stream()));
        let (gaps, firsts) = join(streams, long).await;
        (gaps.concat(), firsts)
    }

    async fn chunked_prefill(&self, target: &str) {
        let whole = LONG.max(self.context).to_string();
        let on = Server::start(self, &["--itl-target", target]).await;
        let off = ["--itl-target", "0", "--max-step-tokens", &whole];
        let off = Server::start(self, &off).await;
        let mut rounds = Rounds::default();
        for round in 0..=self.rounds {
            let mut p99 = [0.0; 2];
            for (at, server) in [&on, &off].into_iter().enumerate() {
                let (mut gaps, mut firsts) = self.mixed(server).await;
                if round == 0 {
                    continue;
                }
                let name = ["on", "off"][at];
                p99[at] = quantile(&mut gaps, 0.99) * 1e3;
                rounds.add(&format!("{name}_itl_p99_ms"), p99[at]);
                rounds.add(
                    &format!("{name}_itl_p50_ms"),
                    quantile(&mut gaps, 0.5) * 1e3,
                );
                let first = quantile(&mut firsts, 0.5) * 1e3;
                rounds.add(&format!("{name}_long_ttft_p50_ms"), first);
            }
            if round > 0 {
                rounds.ratio(p99[1] / p99[0]);
            }
        }
        rounds.print(
            "chunked_prefill",
            json!({"ratio_is": "off / on of itl_p99_ms"}),
        );
    }

    /// Times to the first token of prompts with `beginnings`, each of which has been asked before.
    async fn shared(&self, server: &Server, beginnings: &[Vec<u32>]) -> Vec<f64> {
        for beginning in beginnings {
            server.run(ask(beginning.clone(), 1), None).await;
        }
        let until = Instant::now() + self.seconds;
        let mut firsts = Vec::new();
        for beginning in beginnings.iter().cycle() {
            if Instant::now() >= until {
                break;
            }
            let mut prompt = beginning.clone();
            prompt.extend(self.prompt(OWN, self.another()));
            firsts.extend(server.run(ask(prompt, 1), None).await.at);
        }
        firsts
    }

    async fn prefix_cache(&self) {
        let on = Server::start(self, &[]).await;
        let off = Server::start(self, &["--no-prefix-cache"]).await;
        let length = SHARED.min(self.context - OWN - 8);
        let mut rounds = Rounds::default();
        for round in 0..=self.rounds {
            let beginnings = (0..PREFIXES).map(|_| self.prompt(length, self.another()));
            let beginnings: Vec<_> = beginnings.collect();
            let mut p50 = [0.0; 2];
            for (at, server) in [&on, &off].into_iter().enumerate() {
                let mut firsts = self.shared(server, &beginnings).await;
                p50[at] = quantile(&mut firsts, 0.5) * 1e3;
                if round > 0 {
                    rounds.add(&format!("{}_ttft_p50_ms", ["on", "off"][at]), p50[at]);
                }
            }
            if round > 0 {
                rounds.ratio(p50[1] / p50[0]);
            }
        }
        let more = json!({"shared_tokens": length, "own_tokens": OWN, "ratio_is": "off / on of ttft_p50_ms"});
        rounds.print("prefix_cache", more);
    }

    /// What is asked where drafts are tried: texts that the model knows how to go on with, if there are any.
    fn drafted(&self, n: usize) -> GenerateRequest {
        let input = match self.texts.is_empty() {
            false => Input::Text(self.texts[n % self.texts.len()].clone()),
            true => Input::TokenIds(TokenIds {
                ids: self.prompt(24, n as u32),
            }),
        };
        GenerateRequest {
            input: Some(input),
            sampling: Some(sampling(ANSWER)),
            ..GenerateRequest::default()
        }
    }

    /// `batch` streams at a time: tokens/s, what was drafted and held by place, and the tokens of the first answer of
    /// each stream.
    async fn decode(&self, server: &Server, batch: usize) -> (f64, [Vec<u32>; 2], Vec<Vec<u32>>) {
        let begun = Instant::now();
        let until = begun + self.seconds / BATCHES.len() as u32;
        let stream = async |first: usize| {
            let (mut answers, mut n) = (Vec::new(), first);
            while answers.is_empty() || Instant::now() < until {
                answers.push(server.run(self.drafted(n), None).await);
                n += batch;
            }
            answers
        };
        let all = join_all((0..batch).map(stream)).await;
        let seconds = begun.elapsed().as_secs_f64();
        let first = all.iter().map(|answers| answers[0].tokens.clone());
        let first = first.collect();
        let mut places = [Vec::new(), Vec::new()];
        let mut tokens = 0;
        for seen in all.iter().flatten() {
            tokens += seen.tokens.len();
            let counted = [&seen.usage.drafted_tokens, &seen.usage.accepted_tokens];
            for (sums, counts) in places.iter_mut().zip(counted) {
                sums.resize(sums.len().max(counts.len()), 0);
                sums.iter_mut()
                    .zip(counts)
                    .for_each(|(sum, &count)| *sum += count);
            }
        }
        (tokens as f64 / seconds, places, first)
    }

    async fn mtp(&self) {
        let settings = ["off", "1", "2", "auto"];
        let mut servers = Vec::new();
        for setting in settings {
            servers.push(Server::start(self, &["--speculate", setting]).await);
        }
        for batch in BATCHES {
            let mut rounds = Rounds::default();
            let mut want = None;
            let mut held = serde_json::Map::new();
            for round in 0..=self.rounds {
                let mut rates = Vec::new();
                for (setting, server) in settings.iter().zip(&servers) {
                    let (rate, [tried, kept], tokens) = self.decode(server, batch).await;
                    let want = want.get_or_insert_with(|| tokens.clone());
                    assert_eq!(*want, tokens, "drafts {setting}: the tokens differ");
                    let shares = tried.iter().zip(&kept);
                    let shares = shares.map(|(&n, &k)| rounded(f64::from(k) / f64::from(n.max(1))));
                    held.insert((*setting).to_owned(), shares.collect());
                    if round > 0 {
                        rounds.add(&format!("tokens_per_s_{setting}"), rate);
                    }
                    rates.push(rate);
                }
                if round > 0 {
                    rounds.ratio(rates[settings.len() - 1] / rates[0]);
                }
            }
            let more = json!({"batch": batch, "held_by_place": held, "ratio_is": "auto / off of tokens_per_s"});
            rounds.print("mtp", more);
        }
    }
}

/// Figures of every round, by name, and a ratio for each.
#[derive(Default)]
struct Rounds {
    figures: Vec<(String, Vec<f64>)>,
    ratios: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, name: &str, value: f64) {
        match self.figures.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.figures.push((name.to_owned(), vec![value])),
        }
    }

    fn ratio(&mut self, ratio: f64) {
        self.ratios.push(ratio);
    }

    /// A line of JSON: medians, the median ratio, and all ratios.
    fn print(mut self, ablation: &str, more: Value) {
        let mut line = json!({"ablation": ablation});
        let fields = line.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        for (name, mut values) in self.figures {
            fields.insert(name, rounded(quantile(&mut values, 0.5)));
        }
        let ratios: Vec<Value> = self.ratios.iter().copied().map(rounded).collect();
        fields.insert("ratio".to_owned(), rounded(quantile(&mut self.ratios, 0.5)));
        fields.insert("ratios".to_owned(), ratios.into());
        println!("{line}");
    }
}

fn rounded(value: f64) -> Value {
    json!((value * 1e3).round() / 1e3)
}

/// The value that a share `q` of `values` does not exceed.
fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * q).ceil() as usize;
    values
        .get(at.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let model = args
        .next()
        .expect("usage: ablation MODEL_DIR [SECONDS] [ROUNDS] [ITL_TARGET_MS] [FLAG...]");
    let mut number = |default: f64| args.next().map_or(default, |arg| arg.parse().unwrap());
    let (seconds, rounds, target) = (number(4.0), number(3.0), number(20.0));
    let model = PathBuf::from(model);
    let texts = std::fs::read_to_string(model.join("prompts.txt")).unwrap_or_default();
    let mut plan = Plan {
        model,
        seconds: Duration::from_secs_f64(seconds),
        rounds: rounds as usize,
        flags: args.collect(),
        context: 0,
        vocab: 0,
        texts: texts
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
        salt: AtomicU32::new(1),
    };
    let mut first = Server::start(&plan, &[]).await;
    let info = first.client.model_info(ModelInfoRequest {}).await.unwrap();
    let info = info.into_inner();
    (plan.context, plan.vocab) = (info.max_context, info.vocab_size);
    drop(first);
    plan.chunked_prefill(&format!("{target}")).await;
    plan.prefix_cache().await;
    plan.mtp().await;
}
