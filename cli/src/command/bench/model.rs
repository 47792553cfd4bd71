//! `guild bench model`: the engine with a whole model, without servers or sockets.
//!
//! Secret: how a cluster is put together in one process. Prompts are of tokens drawn anew for each request, so that they route
//! differently and share no prefix. The floor is what reading the weights and latents that a step needs, or the arithmetic,
//! would take at this minute's rates; experts touched are those of even routing.

use std::sync::Arc;
use std::time::Instant;

use guild_attention_node::engine::Engine;
use guild_attention_node::sequence::{Event, Events, Request};
use guild_attention_node::view::View;
use guild_attention_node::{EngineHandle, Patience};
use guild_expert_node::host::Host;
use guild_kernels::Cpu;
use guild_kernels::floor::{self, Unit};
use guild_model::cache::{Format, LatentCache};
use guild_model::expert::Expert;
use guild_model::sampler::{Sampling, Shaping};
use guild_model::trunk::Trunk;
use guild_model::{Checkpoint, Config};
use guild_scheduler::batch::Limits;
use guild_scheduler::placement::{NodeSlots, Placement};
use guild_transport::{LinkLimits, Links, Switchboard};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;

use super::figures::{self, Figure, median};
use crate::args::BenchModel;
use crate::command::{block_on, log_tool};
use crate::failure::Failure;

/// Rows of a step, as an attention node has them by default.
const STEP_TOKENS: usize = guild_attention_node::AttentionNodeConfig::MAX_STEP_TOKENS;
/// Positions of a page.
const PAGE_TOKENS: usize = guild_attention_node::AttentionNodeConfig::PAGE_TOKENS;
/// Prompt of a request whose decoding is measured, where no context is asked for.
const SHORT: usize = 16;
/// Read in one measure of bandwidth: beyond any cache.
const READ: usize = 256 << 20;
/// The expert node of this process.
const NODE: u32 = 1;
const NODE_NAME: &str = "experts";

pub(super) fn run(args: &BenchModel) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let cpu = args.compute.cpu()?;
    let format = args.latents.format().unwrap_or(Format::F32);
    let runs = runs(args, checkpoint.config())?;
    let (trunk, host) = load(&checkpoint, args, &cpu)?;
    let model = Model::new(checkpoint.config(), &trunk, &host, format, args);
    let memory = figures::filled(&cpu, READ)?;
    let (mut read, mut fma, mut int8) = (Vec::new(), Vec::new(), Vec::new());
    let mut rates = vec![Vec::new(); runs.len()];
    block_on(async {
        let rig = Rig::new(trunk, &host, &cpu, &runs, format)?;
        let mut random = StdRng::seed_from_u64(args.seed);
        // The first round warms up and does not count.
        for round in 0..=args.rounds {
            read.push(floor::read(&cpu, &memory));
            fma.extend(floor::peak(&cpu, Unit::Fma));
            int8.extend(floor::peak(&cpu, Unit::Int8));
            for (run, rates) in runs.iter().zip(&mut rates) {
                let rate = rig.measure(run, &mut random).await?;
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        Ok(())
    })?;
    let machine = Machine {
        read: median(&read),
        fma: median(&fma),
        int8: if int8.is_empty() {
            median(&fma)
        } else {
            median(&int8)
        },
    };
    let mut table = vec![Figure {
        name: "machine: read".to_owned(),
        format: "-".to_owned(),
        m: 0,
        threads: cpu.threads(),
        value: machine.read / 1e9,
        unit: "GB/s",
        floor: machine.read / 1e9,
        bound: "itself",
    }];
    table.extend(runs.iter().zip(&rates).map(|(run, rates)| {
        let (seconds, bound) = model.floor(run, &machine);
        Figure {
            name: run.name(),
            format: args.compute.dtype.to_string(),
            m: run.batch,
            threads: cpu.threads(),
            value: median(rates),
            unit: "tokens/s",
            floor: run.tokens() as f64 / seconds,
            bound,
        }
    }));
    figures::print(&cpu.describe(), &table, args.json)
}

/// One workload: so many requests at the same time, of so many tokens, prompt and output.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    batch: usize,
    prompt: usize,
    /// 0: the prompt is what is measured.
    output: usize,
}

impl Run {
    fn name(&self) -> String {
        match self.output {
            0 => format!("prefill {}", self.prompt),
            n => format!("decode {n} after {}", self.prompt),
        }
    }

    /// Tokens that count.
    fn tokens(&self) -> usize {
        self.batch
            * if self.output == 0 {
                self.prompt
            } else {
                self.output
            }
    }
}

fn runs(args: &BenchModel, config: &Config) -> Result<Vec<Run>, Failure> {
    let prefills = args.prefill.iter().map(|&prompt| Run {
        batch: 1,
        prompt: prompt as usize,
        output: 0,
    });
    let decode = |&batch: &u32| Run {
        batch: batch as usize,
        prompt: (args.context as usize).max(SHORT),
        output: args.decode as usize,
    };
    let decodes = args.batch.iter().filter(|_| args.decode > 0).map(decode);
    let runs: Vec<Run> = prefills.chain(decodes).collect();
    let longest = config.max_position_embeddings;
    match runs
        .iter()
        .find(|run| run.prompt + run.output + 1 > longest)
    {
        Some(run) => Err(Failure::usage(format!(
            "{} is longer than the {longest} positions the model was made for",
            run.name()
        ))),
        None => Ok(runs),
    }
}

fn load(
    checkpoint: &Checkpoint,
    args: &BenchModel,
    cpu: &Cpu,
) -> Result<(Arc<Trunk>, Arc<Host>), Failure> {
    let dtype = args.compute.dtype;
    let trunk = Trunk::load(checkpoint, dtype, cpu, &|_, _| ())?;
    let config = checkpoint.config();
    let mut slots = Vec::new();
    for (layer, expert) in slots_of(config) {
        let loaded = Expert::load(checkpoint, layer as usize, expert as usize, dtype);
        slots.push(Arc::new(loaded?));
    }
    let host = Host::new(NODE_NAME, config.hidden_size, cpu.clone());
    host.publish(1, slots);
    Ok((Arc::new(trunk), Arc::new(host)))
}

/// (layer, expert) by slot.
fn slots_of(config: &Config) -> Vec<(u32, u32)> {
    let experts = config.n_routed_experts as u32;
    let layers = config.moe_layers().map(|layer| layer as u32);
    layers
        .flat_map(|layer| (0..experts).map(move |e| (layer, e)))
        .collect()
}

/// What steps need, for their floor.
struct Model {
    /// Weights that every step reads: all but embedding and routed experts.
    trunk: f64,
    expert: f64,
    moe_layers: f64,
    experts: f64,
    top_k: f64,
    /// Cached bytes of one position, all layers.
    latents: f64,
    /// Operations of one token in matrix products, without the head.
    ops: f64,
    head_ops: f64,
    /// Operations of one token for each position that it sees.
    attention_ops: f64,
    integers: bool,
}

struct Machine {
    read: f64,
    fma: f64,
    int8: f64,
}

impl Model {
    fn new(c: &Config, trunk: &Trunk, host: &Host, format: Format, args: &BenchModel) -> Model {
        let head = (c.vocab_size * c.hidden_size) as f64;
        let embedding = if c.tie_word_embeddings {
            0
        } else {
            trunk.embedding_bytes()
        };
        let expert = host.expert(1, 0).map_or(0, |expert| expert.bytes());
        let heads = c.num_attention_heads * (c.latent_width() + c.kv_lora_rank);
        Model {
            trunk: (trunk.bytes() - embedding) as f64,
            expert: expert as f64,
            moe_layers: c.moe_layers().count() as f64,
            experts: c.n_routed_experts as f64,
            top_k: c.num_experts_per_tok as f64,
            latents: LatentCache::bytes_per_token(c, format) as f64,
            ops: 2.0 * (c.active_parameters() as f64 - head),
            head_ops: 2.0 * head,
            attention_ops: (2 * c.num_hidden_layers * heads) as f64,
            integers: args.compute.dtype.to_string().starts_with("int"),
        }
    }

    /// Seconds that a run takes at the least, and what binds it.
    fn floor(&self, run: &Run, machine: &Machine) -> (f64, &'static str) {
        let positions = |from: usize, n: usize| (n * from) as f64 + (n * (n + 1)) as f64 / 2.0;
        let (steps, rows, heads, seen, cached) = if run.output == 0 {
            let steps = run.prompt.div_ceil(STEP_TOKENS);
            let seen = positions(0, run.prompt);
            (
                steps,
                run.prompt.min(STEP_TOKENS),
                1,
                seen,
                run.prompt as f64,
            )
        } else {
            let seen = run.batch as f64 * positions(run.prompt, run.output);
            (run.output, run.batch, run.tokens(), seen, seen)
        };
        // The chance that none of the rows is routed to an expert.
        let idle = (1.0 - self.top_k / self.experts.max(1.0)).powi(rows as i32);
        let experts = self.moe_layers * self.experts * (1.0 - idle) * self.expert;
        let bytes = steps as f64 * (self.trunk + experts) + cached * self.latents;
        let read = bytes / machine.read;
        let products = run.tokens() as f64 * self.ops + heads as f64 * self.head_ops;
        let peak = if self.integers {
            machine.int8
        } else {
            machine.fma
        };
        let ops = products / peak + seen * self.attention_ops / machine.fma;
        if read > ops {
            (read, "read")
        } else {
            (ops, "arithmetic")
        }
    }
}

/// The engine and its experts.
struct Rig {
    engine: EngineHandle,
    vocab: u32,
    _views: watch::Sender<Option<Arc<View>>>,
}

impl Rig {
    fn new(
        trunk: Arc<Trunk>,
        host: &Arc<Host>,
        cpu: &Cpu,
        runs: &[Run],
        format: Format,
    ) -> Result<Rig, Failure> {
        let config = trunk.config().clone();
        let batch = runs.iter().map(|run| run.batch).max().unwrap_or(1);
        let context = runs.iter().map(|run| run.prompt + run.output + 1).max();
        let context = context.unwrap_or(1);
        let limits = Limits {
            max_running: batch,
            max_waiting: batch,
            max_step_tokens: STEP_TOKENS.max(batch),
            page_tokens: PAGE_TOKENS,
            pages: batch * context.div_ceil(PAGE_TOKENS),
            max_context: context,
            // Runs repeat their prompts, and every one is to be computed.
            prefix_cache: false,
            ..Limits::default()
        };
        let slots = slots_of(&config);
        let placement = Placement::new(1, vec![NodeSlots { node: NODE, slots }]);
        let placement = placement.map_err(|e| Failure::usage(e.to_string()))?;
        let board = Switchboard::default();
        board.attach(NODE_NAME, Arc::clone(host) as _);
        let runtime = tokio::runtime::Handle::current();
        let links = Arc::new(Links::new("bench", LinkLimits::default(), runtime));
        links.set_nodes(&[(NODE, NODE_NAME.to_owned(), String::new())], Some(&board));
        let view = View::new(placement, [(NODE, NODE_NAME.to_owned())]);
        let (views, newest) = watch::channel(Some(Arc::new(view)));
        let engine = Engine::new(
            trunk,
            cpu.clone(),
            links,
            newest,
            limits,
            Patience::default(),
        );
        let (engine, handle) = engine.map_err(|e| Failure::usage(e.to_string()))?;
        // It ends when the handle is dropped with its last request.
        drop(engine.caching(format).spawn("bench")?);
        Ok(Rig {
            engine: handle,
            vocab: config.vocab_size as u32,
            _views: views,
        })
    }

    /// Tokens per second of a run.
    async fn measure(&self, run: &Run, random: &mut StdRng) -> Result<f64, Failure> {
        let start = Instant::now();
        let mut readers = Vec::new();
        for _ in 0..run.batch {
            let prompt = (0..run.prompt).map(|_| random.random_range(0..self.vocab));
            let request = request(prompt.collect(), run.output + 1);
            let events = self.engine.submit(request);
            let events = events.map_err(|e| Failure::usage(e.to_string()))?;
            readers.push(tokio::spawn(arrivals(events, start)));
        }
        let mut times = Vec::new();
        for reader in readers {
            let arrived = reader.await.map_err(|e| Failure::usage(e.to_string()))?;
            times.push(arrived.map_err(Failure::usage)?);
        }
        let first = times
            .iter()
            .filter_map(|t| t.first())
            .copied()
            .fold(0.0, f64::max);
        let last = times
            .iter()
            .filter_map(|t| t.last())
            .copied()
            .fold(0.0, f64::max);
        if run.output == 0 {
            return Ok(run.prompt as f64 / first);
        }
        let after = times.iter().flatten().filter(|&&t| t > first).count();
        Ok(after as f64 / (last - first))
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: Sampling::GREEDY,
        shaping: Shaping::default(),
        output_before: 0,
        stop_tokens: Vec::new(),
        min_tokens: 0,
        logprobs: None,
        prompt_logprobs: None,
        priority: 0,
        tenant: 0,
        timeout: None,
        max_queue: None,
    }
}

/// Seconds since `start` at which each token came.
async fn arrivals(mut events: Events, start: Instant) -> Result<Vec<f64>, String> {
    let mut times = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { .. } => times.push(start.elapsed().as_secs_f64()),
            Event::Failed(failure) => return Err(failure.to_string()),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(times)
}
