//! Load that is not even, on one attention and four expert nodes: what the planners make of it, and
//! what their moves cost those who are served meanwhile. A line of JSON for every run, and in the end
//! one for each planner over all rounds; planners take turns.
//!
//! Each expert node is a process of its own and gets a quarter of one processor, where control
//! groups let us, so that four machines are four machines here, too. Two workloads: `skew`, where
//! the router's biases favour the experts of the first node, and `drift`, where half-way other
//! prompts come, which like other experts.
//!
//! `cargo run --release -p guild-tests --example balance -- [SECONDS] [ROUNDS] [INTERVAL]
//! [PLANNER]...`, with `GUILD_BIN`. Planners plan every INTERVAL seconds. EPLB lays everything out anew each time, as where
//! it is published and built in, and has no budget; it is given the favour that what a node already
//! has is left there. An INTERVAL in which it cannot finish its moves leaves plans out.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guild_model::random;
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    ExpertLoadRequest, MigrationPhase, MigrationStatus, Role, StatusRequest, WatchMigrationRequest,
};
use guild_proto::inference::v1::SamplingParams;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_tests::client::request;
use guild_tests::process::{Guild, free_port};
use serde_json::{Map, Value, json};
use tonic::transport::Channel;

/// Experts of 3 MB, which do most of the work.
const SHAPE: [(&str, i64); 11] = [
    ("hidden_size", 512),
    ("num_hidden_layers", 5),
    ("intermediate_size", 1024),
    ("moe_intermediate_size", 1024),
    ("n_routed_experts", EXPERTS as i64),
    ("num_experts_per_tok", 4),
    ("n_group", 1),
    ("topk_group", 1),
    ("kv_lora_rank", 128),
    ("q_lora_rank", 128),
    ("vocab_size", VOCAB as i64),
];
const EXPERTS: usize = 32;
const VOCAB: u32 = 2048;
const NODES: usize = 4;
/// Added to the bias of the first expert of the first node; its last gets nothing.
const RAISE: f32 = 0.3;
/// They take turns, unless told which.
const PLANNERS: [&str; 3] = ["off", "eplb", "guild"];
const STREAMS: usize = 8;
const PROMPT: u32 = 24;
/// Of the first prompt; every further one has one of [`LENGTHS`] more, so that streams do not begin anew together
/// and no prefill of many of them passes for the price of a move.
const OUTPUT: u32 = 36;
const LENGTHS: u32 = 24;
/// Between the first requests of two streams.
const STAGGER: Duration = Duration::from_millis(70);
/// Prompts that take turns.
const PROMPTS: u32 = 16;
/// Tokens that the prompts of one half of a drifting load are made of.
const FEW_TOKENS: u32 = 6;
/// Seconds between two plans, unless told otherwise; the load is counted for as long before the first.
const INTERVAL: u32 = 6;
const BUDGET: &str = "64MiB";
const REDUNDANT: &str = "4";
/// A node's processor time, of a period in microseconds.
const QUOTA: (u64, u64) = (2_500, 10_000);
/// So many gaps under one table, while nothing moves, say what is usual under it.
const ENOUGH_GAPS: usize = 200;
/// A migration that is under way when the load ends may take so long.
const AFTERWARDS: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq)]
enum Workload {
    Skew,
    Drift,
}

impl Workload {
    fn name(self) -> &'static str {
        match self {
            Workload::Skew => "skew",
            Workload::Drift => "drift",
        }
    }
}

/// Groups of processes with a part of a processor, one a node.
struct Quotas(Vec<PathBuf>);

impl Quotas {
    const ROOT: &str = "/sys/fs/cgroup/cpu";

    /// An error says why this machine has no such thing.
    fn new() -> std::io::Result<Quotas> {
        let mut groups = Quotas(Vec::new());
        for node in 0..NODES {
            let name = format!("guild-balance-{}-{node}", std::process::id());
            let dir = Path::new(Self::ROOT).join(name);
            fs::create_dir(&dir)?;
            groups.0.push(dir.clone());
            fs::write(dir.join("cpu.cfs_period_us"), QUOTA.1.to_string())?;
            fs::write(dir.join("cpu.cfs_quota_us"), QUOTA.0.to_string())?;
        }
        Ok(groups)
    }

    fn put(&self, node: usize, process: u32) {
        fs::write(self.0[node].join("cgroup.procs"), process.to_string()).unwrap();
    }
}

impl Drop for Quotas {
    fn drop(&mut self) {
        for dir in &self.0 {
            // Processes that are still ending go back to the root, and do not mind.
            for process in fs::read_to_string(dir.join("cgroup.procs"))
                .unwrap_or_default()
                .lines()
            {
                let _ = fs::write(Path::new(Self::ROOT).join("cgroup.procs"), process);
            }
            let _ = fs::remove_dir(dir);
        }
    }
}

/// A checkpoint in `dir`; with `raise` its biases favour the experts of the first node.
fn write_model(dir: &Path, raise: f32) {
    let set: Vec<_> = SHAPE
        .iter()
        .map(|(key, value)| ((*key).to_owned(), Value::from(*value)))
        .collect();
    let tiny = random::shape("tiny").unwrap();
    random::write(tiny, &set, 1, random::DEFAULT_SHARD_BYTES, dir, &|_, _| ()).unwrap();
    // It lists digests, and the biases will be others.
    fs::remove_file(dir.join("guild-manifest.json")).unwrap();
    let shards = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut shards = shards.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    raise_biases(&shards.next().unwrap(), raise);
}

/// The file begins with the length of a JSON header (u64, little-endian), which says where each tensor's bytes are.
fn raise_biases(path: &Path, raise: f32) {
    let mut file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut length = [0; 8];
    file.read_exact(&mut length).unwrap();
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header).unwrap();
    let data = file.stream_position().unwrap();
    let header: Map<String, Value> = serde_json::from_slice(&header).unwrap();
    let first = EXPERTS / NODES;
    for (name, tensor) in header {
        if !name.ends_with("e_score_correction_bias") {
            continue;
        }
        assert_eq!(tensor["dtype"], "F32");
        let mut values = [0; 4 * EXPERTS];
        let begin = SeekFrom::Start(data + tensor["data_offsets"][0].as_u64().unwrap());
        file.seek(begin).unwrap();
        file.read_exact(&mut values).unwrap();
        for (expert, value) in values.chunks_exact_mut(4).take(first).enumerate() {
            let more = raise * (first - 1 - expert) as f32 / (first - 1) as f32;
            let was = f32::from_le_bytes(value.try_into().unwrap());
            value.copy_from_slice(&(was + more).to_le_bytes());
        }
        file.seek(begin).unwrap();
        file.write_all(&values).unwrap();
    }
}

/// Processes, and where to talk to them.
struct Cluster {
    coordinator: String,
    door: String,
    _processes: Vec<Guild>,
}

impl Cluster {
    fn start(model: &Path, planner: &str, interval: u32, quotas: Option<&Quotas>) -> Cluster {
        let address = || format!("127.0.0.1:{}", free_port());
        let (at, http, grpc) = (address(), address(), address());
        let (url, model) = (format!("http://{at}"), model.to_str().unwrap());
        let interval = interval.to_string();
        let nodes = NODES.to_string();
        let mut processes = vec![Guild::start(&[
            "coordinator",
            "--model",
            model,
            "--listen",
            &at,
            "--http",
            &http,
            "--grpc",
            &grpc,
            "--min-expert-nodes",
            &nodes,
            "--replicas",
            "1",
            "--redundant-experts",
            REDUNDANT,
            "--rebalance",
            planner,
            "--rebalance-interval",
            &interval,
            "--rebalance-budget",
            BUDGET,
            "--insecure",
        ])];
        let node = |role: &str, name: &str| {
            Guild::start(&[
                role,
                "--model",
                model,
                "--coordinator",
                &url,
                "--name",
                name,
                "--threads",
                "1",
                "--insecure",
            ])
        };
        for i in 0..NODES {
            let process = node("expert-node", &format!("expert-{i}"));
            if let Some(quotas) = quotas {
                quotas.put(i, process.id());
            }
            processes.push(process);
        }
        processes.push(node("attention-node", "attention-0"));
        let mut cluster = guild_tests::process::Cluster {
            http,
            grpc: format!("http://{grpc}"),
            processes,
            certs: None,
        };
        cluster.wait_ready(Duration::from_secs(60));
        Cluster {
            coordinator: url,
            door: cluster.grpc,
            _processes: cluster.processes,
        }
    }

    /// What the expert nodes say they can do, rows a second.
    async fn capacities(&self) -> Vec<f64> {
        let mut client = ClusterClient::connect(self.coordinator.clone())
            .await
            .unwrap();
        let asked = client.status(StatusRequest {}).await;
        let nodes = asked.unwrap().into_inner().nodes;
        let experts = nodes.iter().filter(|node| node.role() == Role::Expert);
        experts.map(|node| node.rows_per_second.round()).collect()
    }

    /// Mean over the layers of (mean load of the nodes over the highest), by the load of the last seconds: with
    /// rows poured over homes by water-filling against the nodes' speeds, and as EPLB reckons, with rows shared
    /// evenly by homes on like nodes.
    async fn balancedness(&self) -> [f64; 2] {
        let mut client = ClusterClient::connect(self.coordinator.clone())
            .await
            .unwrap();
        let asked = client.expert_load(ExpertLoadRequest::default()).await;
        let load = asked.unwrap().into_inner();
        [load.balancedness, load.even_balancedness]
            .map(|layers| layers.iter().sum::<f64>() / layers.len() as f64)
    }
}

/// A token: when it came, and how long after the one before in its stream.
struct Token {
    at: Instant,
    gap: Option<Duration>,
}

type Prompts = Arc<Vec<Vec<u32>>>;

/// The same prompt gives the same tokens, as many as are asked for, wherever its experts are.
type Known = Arc<std::sync::Mutex<HashMap<(Vec<u32>, u32), Vec<u32>>>>;

/// Prompts of all tokens, or of a few that `half` chooses.
fn prompts(workload: Workload, half: u32) -> Prompts {
    let prompt = |salt: u32| {
        (0..PROMPT).map(move |p| {
            let token = p * 7919 + salt * 104_729 + p * p * 31;
            match workload {
                Workload::Skew => 3 + token % (VOCAB - 3),
                Workload::Drift => 10 + half * 1000 + 17 * (token % FEW_TOKENS),
            }
        })
    };
    Arc::new((0..PROMPTS).map(|salt| prompt(salt).collect()).collect())
}

/// Streams at the door until `stop`; all tokens that came.
async fn load(door: String, prompts: Prompts, known: Known, stop: Arc<AtomicBool>) -> Vec<Token> {
    let streams = (0..STREAMS).map(|first| {
        let (door, prompts, known) = (door.clone(), Arc::clone(&prompts), Arc::clone(&known));
        let stop = Arc::clone(&stop);
        tokio::spawn(async move {
            let client = InferenceClient::connect(door).await.unwrap();
            let mut tokens = Vec::new();
            tokio::time::sleep(STAGGER * first as u32).await;
            for turn in (first..).step_by(STREAMS + 1) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let which = turn % prompts.len();
                let (prompt, length) = (&prompts[which], OUTPUT + which as u32 * 7 % LENGTHS);
                let answer = stream(client.clone(), prompt, length, &mut tokens).await;
                let mut known = known.lock().unwrap();
                let expected = known
                    .entry((prompt.clone(), length))
                    .or_insert_with(|| answer.clone());
                assert_eq!(*expected, answer, "a move has changed tokens");
            }
            tokens
        })
    });
    let ended = futures::future::join_all(streams).await;
    ended.into_iter().flat_map(Result::unwrap).collect()
}

async fn stream(
    mut client: InferenceClient<Channel>,
    prompt: &[u32],
    length: u32,
    tokens: &mut Vec<Token>,
) -> Vec<u32> {
    let sampling = SamplingParams {
        max_tokens: Some(length),
        temperature: Some(0.0),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let asked = client.generate(request(prompt, sampling)).await;
    let mut stream = asked.unwrap().into_inner();
    let (mut answer, mut last) = (Vec::new(), None::<Instant>);
    while let Some(response) = stream.message().await.unwrap() {
        if let Some(Event::Chunk(chunk)) = response.event {
            let at = Instant::now();
            for token in chunk.token_ids {
                let gap = last.replace(at).map(|last| at - last);
                tokens.push(Token { at, gap });
                answer.push(token);
            }
        }
    }
    answer
}

/// What moved, and when.
#[derive(Default)]
struct Moves {
    /// From the first copy to the end of the drain.
    spans: Vec<(Instant, Instant)>,
    /// Of each migration, by its number.
    bytes: BTreeMap<u64, u64>,
    last: MigrationStatus,
}

/// Watches until `stop` and nothing moves.
async fn watch(coordinator: String, stop: Arc<AtomicBool>) -> Moves {
    let mut client = ClusterClient::connect(coordinator).await.unwrap();
    let asked = client.watch_migration(WatchMigrationRequest {}).await;
    let mut changes = asked.unwrap().into_inner();
    let (mut moves, mut since) = (Moves::default(), None);
    let mut ended = None;
    loop {
        if stop.load(Ordering::Relaxed) {
            let ended = *ended.get_or_insert_with(Instant::now);
            if since.is_none() || ended.elapsed() > AFTERWARDS {
                break;
            }
        }
        let change = tokio::time::timeout(Duration::from_millis(100), changes.message()).await;
        let Ok(change) = change else { continue };
        let Some(status) = change.unwrap() else { break };
        let busy = matches!(
            status.phase(),
            MigrationPhase::Copying | MigrationPhase::Draining
        );
        match (busy, since) {
            (true, None) => since = Some(Instant::now()),
            (false, Some(begun)) => {
                moves.spans.push((begun, Instant::now()));
                since = None;
            }
            _ => {}
        }
        let bytes = moves.bytes.entry(status.migration).or_default();
        *bytes = (*bytes).max(status.bytes_done);
        moves.last = status;
    }
    moves
        .spans
        .extend(since.map(|begun| (begun, Instant::now())));
    moves
}

/// Gaps between tokens while nothing moves and while something does, as multiples of the median gap
/// while nothing moves under the same table and the same load: a table that is worth a move is a
/// slow one, whether anything moves or not.
fn calm(tokens: &[Token], spans: &[(Instant, Instant)], half: Instant) -> (Vec<f64>, Vec<f64>) {
    let gaps = tokens
        .iter()
        .filter_map(|token| Some((token.at, token.gap?)));
    let mut states: HashMap<_, [Vec<f64>; 2]> = HashMap::new();
    for (at, gap) in gaps {
        let from = at - gap;
        let moving = spans.iter().any(|span| from < span.1 && at > span.0);
        let table = spans.iter().filter(|span| span.1 <= from).count();
        let kinds = states.entry((table, from >= half)).or_default();
        kinds[usize::from(moving)].push(gap.as_secs_f64());
    }
    let (mut quiet, mut during) = (Vec::new(), Vec::new());
    for [mut still, moving] in states.into_values() {
        if still.len() >= ENOUGH_GAPS {
            still.sort_by(f64::total_cmp);
            let median = still[still.len() / 2];
            quiet.extend(still.iter().map(|gap| gap / median));
            during.extend(moving.iter().map(|gap| gap / median));
        }
    }
    (quiet, during)
}

/// So many of a hundred are no longer; 0 without any.
fn percentile(gaps: &[f64], part: usize) -> f64 {
    let mut gaps = gaps.to_vec();
    gaps.sort_by(f64::total_cmp);
    let at = (gaps.len() * part).div_ceil(100).saturating_sub(1);
    gaps.get(at).copied().unwrap_or_default()
}

async fn run(
    workload: Workload,
    (planner, interval): (&str, u32),
    model: &Path,
    quotas: Option<&Quotas>,
    known: &Known,
    time: Duration,
) -> (Value, [Vec<f64>; 2]) {
    let cluster = Cluster::start(model, planner, interval, quotas);
    let stop = Arc::new(AtomicBool::new(false));
    let watching = watch(cluster.coordinator.clone(), Arc::clone(&stop));
    let watching = tokio::spawn(watching);
    let begun = Instant::now();
    let mut tokens = Vec::new();
    let mut balance = Vec::new();
    let mut capacities = vec![cluster.capacities().await];
    for half in 0..2 {
        let enough = Arc::new(AtomicBool::new(false));
        let load = load(
            cluster.door.clone(),
            prompts(workload, half),
            Arc::clone(known),
            Arc::clone(&enough),
        );
        let load = tokio::spawn(load);
        tokio::time::sleep(time / 2).await;
        balance.push(cluster.balancedness().await);
        capacities.push(cluster.capacities().await);
        enough.store(true, Ordering::Relaxed);
        tokens.extend(load.await.unwrap());
    }
    let end = Instant::now();
    stop.store(true, Ordering::Relaxed);
    let moves = watching.await.unwrap();
    let rate = |from: Instant, to: Instant| {
        let came = tokens
            .iter()
            .filter(|token| token.at > from && token.at <= to);
        came.count() as f64 / (to - from).as_secs_f64()
    };
    let (quiet, during) = calm(&tokens, &moves.spans, begun + time / 2);
    let round = |x: f64| (x * 100.0).round() / 100.0;
    let line = json!({
        "bench": "balance",
        "workload": workload.name(),
        "planner": planner,
        "own_processors": quotas.is_some(),
        "rows_per_s": capacities,
        "balancedness_half": round(balance[0][0]),
        "balancedness_end": round(balance[1][0]),
        "even_balancedness_half": round(balance[0][1]),
        "even_balancedness_end": round(balance[1][1]),
        "tokens_per_s": round(rate(begun, end)),
        "tokens_per_s_last_third": round(rate(begun + (end - begun) * 2 / 3, end)),
        "migrations": moves.last.completed,
        "rolled_back": moves.last.rolled_back,
        "last_failure": moves.last.last_failure,
        "moved_bytes": moves.bytes.values().sum::<u64>(),
        "moved_bytes_by_migration": moves.bytes.values().filter(|bytes| **bytes > 0).collect::<Vec<_>>(),
        "moving_s": round(moves.spans.iter().map(|span| (span.1 - span.0).as_secs_f64()).sum()),
        "gaps_moving": during.len(),
        "itl_p99_quiet": round(percentile(&quiet, 99)),
        "itl_p99_moving": round(percentile(&during, 99)),
        "itl_p99_ratio": round(percentile(&during, 99) / percentile(&quiet, 99)),
    });
    (line, [quiet, during])
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u32| args.next().map_or(default, |a| a.parse().unwrap());
    let time = Duration::from_secs(number(30).into());
    let rounds = number(2);
    let interval = number(INTERVAL);
    let mut planners: Vec<String> = args.collect();
    if planners.is_empty() {
        planners = PLANNERS.map(str::to_owned).into();
    }
    let quotas = Quotas::new();
    if let Err(error) = &quotas {
        eprintln!("the nodes share all processors: {error}");
    }
    let models = tempfile::tempdir().unwrap();
    for (workload, raise) in [(Workload::Skew, RAISE), (Workload::Drift, 0.0)] {
        let model = models.path().join(workload.name());
        write_model(&model, raise);
        let known = Known::default();
        let mut all = vec![[Vec::new(), Vec::new()]; planners.len()];
        for _ in 0..rounds {
            for (planner, all) in planners.iter().zip(&mut all) {
                let (quotas, planner) = (quotas.as_ref().ok(), (planner.as_str(), interval));
                let (line, gaps) = run(workload, planner, &model, quotas, &known, time).await;
                println!("{line}");
                for (all, gaps) in all.iter_mut().zip(gaps) {
                    all.extend(gaps);
                }
            }
        }
        for (planner, [quiet, during]) in planners.iter().zip(all) {
            let round = |x: f64| (x * 100.0).round() / 100.0;
            let of = |gaps: &[f64]| [50, 90, 99].map(|part| round(percentile(gaps, part)));
            println!(
                "{}",
                json!({
                    "bench": "balance", "workload": workload.name(), "planner": planner, "rounds": rounds,
                    "gaps": [quiet.len(), during.len()],
                    "itl_quiet_p50_p90_p99": of(&quiet), "itl_moving_p50_p90_p99": of(&during),
                    "itl_p99_ratio": round(percentile(&during, 99) / percentile(&quiet, 99)),
                })
            );
        }
    }
}
