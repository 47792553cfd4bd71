//! `guild bench model`: the engine with a whole model, without servers or sockets.
//!
//! Secret: how a cluster is put together in one process. Prompts are of tokens drawn anew for each request, so that they route
//! differently and share no prefix. The floor is what reading the weights and latents that a step needs, or the arithmetic,
//! would take at this minute's rates; both are printed. Experts touched are those of even routing; integers are held to the peak
//! of their dot products, weights of bf16 and FP8 to that of the rule they are multiplied by, attention to FMA. What a step of decoding takes beside products and attention is its
//! overhead: norms, routing, sums, sampling, the engine, the exchange within the process.

use std::sync::Arc;
use std::time::Instant;

use guild_attention_node::engine::Engine;
use guild_attention_node::sequence::{Event, Events, Request};
use guild_attention_node::view::View;
use guild_attention_node::{EngineHandle, Patience};
use guild_expert_node::host::Host;
use guild_kernels::floor::{self, Unit};
use guild_kernels::pack::Int;
use guild_kernels::{Arithmetic, Cpu};
use guild_model::cache::{Format, LatentCache};
use guild_model::checkpoint::Dtype;
use guild_model::config::Packed;
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
    cpu.count_time();
    let format = args.latents.format().unwrap_or(Format::F32);
    let runs = runs(args, checkpoint.config())?;
    let (trunk, host) = load(&checkpoint, args, &cpu)?;
    let model = Model::new(checkpoint.config(), &trunk, &host, format, args);
    let memory = figures::filled(&cpu, READ)?;
    let (mut read, mut fma) = (Vec::new(), Vec::new());
    let (mut floats, mut int8) = (Vec::new(), Vec::new());
    let unit = match cpu.arithmetic() {
        Arithmetic::Fma => Unit::Fma,
        Arithmetic::DotAvx512 | Arithmetic::DotAmx => Unit::Bf16,
    };
    let mut rates = vec![Vec::new(); runs.len()];
    block_on(async {
        let rig = Rig::new(trunk, &host, &cpu, &runs, format)?;
        let mut random = StdRng::seed_from_u64(args.seed);
        // The first round warms up and does not count.
        for round in 0..=args.rounds {
            read.push(floor::read(&cpu, &memory));
            fma.extend(floor::peak(&cpu, Unit::Fma));
            floats.extend(floor::peak(&cpu, unit));
            int8.extend(floor::peak(&cpu, Unit::Int8));
            for (run, rates) in runs.iter().zip(&mut rates) {
                let measured = rig.measure(run, &mut random).await?;
                if round > 0 {
                    rates.push(measured);
                }
            }
        }
        Ok(())
    })?;
    // Where a machine has no such unit, FMA does its work.
    let or_fma = |peaks: &[f64]| median(if peaks.is_empty() { &fma } else { peaks });
    let machine = Machine {
        read: median(&read),
        fma: median(&fma),
        floats: or_fma(&floats),
        int8: or_fma(&int8),
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
    for (run, measured) in runs.iter().zip(&rates) {
        let floors = model.floors(run, &machine);
        let figure = Figure {
            name: run.name(),
            format: args.compute.weights.dtype.to_string(),
            m: run.batch,
            threads: cpu.threads(),
            value: median_of(measured, |m| m.rate),
            unit: "tokens/s",
            floor: run.tokens() as f64 / floors.seconds(),
            bound: floors.bound(),
        };
        table.extend(floors.figures(run, &figure));
        if run.output > 0 {
            table.extend(overhead(measured, checkpoint.config(), &figure));
        }
        table.push(figure);
    }
    figures::print(&cpu.describe(), &table, args.json)
}

fn median_of(measured: &[Measured], value: impl Fn(&Measured) -> f64) -> f64 {
    median(&measured.iter().map(value).collect::<Vec<_>>())
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Tokens a second.
    rate: f64,
    /// Seconds of a step; of decoding alone.
    step: f64,
    /// Seconds of it outside products and attention.
    overhead: f64,
}

/// The part of a step's time that goes by outside products and attention, by token and by layer, beside the whole.
fn overhead(measured: &[Measured], config: &Config, run: &Figure) -> [Figure; 2] {
    let micros = |parts: usize, value: fn(&Measured) -> f64| {
        1e6 * median_of(measured, value) / parts.max(1) as f64
    };
    let figure = |what, unit, parts| Figure {
        name: format!("{}, overhead a {what}", run.name),
        value: micros(parts, |m| m.overhead),
        unit,
        floor: micros(parts, |m| m.step),
        bound: "the whole step",
        ..run.clone()
    };
    let layers = config.num_hidden_layers;
    [figure("token", "us", run.m), figure("layer", "us", layers)]
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
    let dtype = args.compute.weights.dtype;
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
    products: Ops,
    head: Ops,
    /// Operations of one token for each position that it sees.
    attention_ops: f64,
}

/// Operations, by what they are done with.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Ops {
    floats: f64,
    integers: f64,
}

impl Ops {
    fn of(parameters: f64, are_integers: bool) -> Ops {
        let ops = 2.0 * parameters;
        match are_integers {
            true => Ops {
                integers: ops,
                ..Ops::default()
            },
            false => Ops {
                floats: ops,
                ..Ops::default()
            },
        }
    }

    fn times(self, n: f64) -> Ops {
        Ops {
            floats: n * self.floats,
            integers: n * self.integers,
        }
    }

    fn and(self, other: Ops) -> Ops {
        Ops {
            floats: self.floats + other.floats,
            integers: self.integers + other.integers,
        }
    }
}

/// Seconds that a run takes at the least.
#[derive(Clone, Copy, Debug)]
struct Floors {
    read: f64,
    arithmetic: f64,
}

impl Floors {
    fn seconds(&self) -> f64 {
        self.read.max(self.arithmetic)
    }

    fn bound(&self) -> &'static str {
        if self.read > self.arithmetic {
            "read"
        } else {
            "arithmetic"
        }
    }

    /// Both, as the rates that they allow.
    fn figures(&self, run: &Run, figure: &Figure) -> [Figure; 2] {
        let both = [("read", self.read), ("arithmetic", self.arithmetic)];
        both.map(|(bound, seconds)| Figure {
            name: format!("{}, by {bound}", figure.name),
            value: run.tokens() as f64 / seconds,
            bound,
            ..figure.clone()
        })
    }
}

struct Machine {
    read: f64,
    fma: f64,
    /// Products of bf16 and FP8 weights.
    floats: f64,
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
        let moe_layers = c.moe_layers().count() as f64;
        let packed = c.packed.or(match args.compute.weights.dtype {
            Dtype::Int8 { group } => Some(Packed::int8(group)),
            Dtype::Int4 { group } => Some(Packed::int4(group)),
            _ => None,
        });
        let is = |role: fn(&Packed) -> Option<Int>| packed.as_ref().and_then(role).is_some();
        let routed = moe_layers * c.num_experts_per_tok as f64 * c.expert_parameters() as f64;
        // Routers, and what queries and values are carried to the latent space and back by, are never packed.
        let absorbed = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank;
        let plain = (c.num_hidden_layers * absorbed) as f64
            + moe_layers * (c.n_routed_experts * c.hidden_size) as f64;
        let linear = c.active_parameters() as f64 - head - routed - plain;
        Model {
            trunk: (trunk.bytes() - embedding) as f64,
            expert: expert as f64,
            moe_layers,
            experts: c.n_routed_experts as f64,
            top_k: c.num_experts_per_tok as f64,
            latents: LatentCache::bytes_per_token(c, format) as f64,
            products: Ops::of(plain, false)
                .and(Ops::of(routed, is(|p| p.experts)))
                .and(Ops::of(linear, is(|p| p.linear))),
            head: Ops::of(head, is(|p| p.head)),
            attention_ops: (2 * c.num_hidden_layers * heads) as f64,
        }
    }

    fn floors(&self, run: &Run, machine: &Machine) -> Floors {
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
        let products = self.products.times(run.tokens() as f64);
        let all = products.and(self.head.times(heads as f64));
        let attention = seen * self.attention_ops / machine.fma;
        Floors {
            read: bytes / machine.read,
            arithmetic: all.floats / machine.floats + all.integers / machine.int8 + attention,
        }
    }
}

/// The engine and its experts.
struct Rig {
    cpu: Cpu,
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
            format,
            Patience::default(),
        );
        let (engine, handle) = engine.map_err(|e| Failure::usage(e.to_string()))?;
        // It ends when the handle is dropped with its last request.
        drop(engine.spawn("bench")?);
        Ok(Rig {
            cpu: cpu.clone(),
            engine: handle,
            vocab: config.vocab_size as u32,
            _views: views,
        })
    }

    async fn measure(&self, run: &Run, random: &mut StdRng) -> Result<Measured, Failure> {
        let start = Instant::now();
        let mut readers = Vec::new();
        for _ in 0..run.batch {
            let prompt = (0..run.prompt).map(|_| random.random_range(0..self.vocab));
            let request = request(prompt.collect(), run.output + 1);
            let events = self.engine.submit(request);
            let events = events.map_err(|e| Failure::usage(e.to_string()))?;
            readers.push(tokio::spawn(arrivals(events, start, self.cpu.clone())));
        }
        let mut times = Vec::new();
        for reader in readers {
            let arrived = reader.await.map_err(|e| Failure::usage(e.to_string()))?;
            times.push(arrived.map_err(Failure::usage)?);
        }
        let later = |a: Arrival, b: &Arrival| if b.at > a.at { *b } else { a };
        let nobody = Arrival::default();
        let first = times.iter().filter_map(|t| t.first());
        let first = first.fold(nobody, later);
        let last = times.iter().filter_map(|t| t.last());
        let last = last.fold(nobody, later);
        if run.output == 0 {
            return Ok(Measured {
                rate: run.prompt as f64 / first.at,
                step: f64::NAN,
                overhead: f64::NAN,
            });
        }
        let after = times.iter().flatten().filter(|t| t.at > first.at).count();
        let took = last.at - first.at;
        let products = last.products - first.products;
        Ok(Measured {
            rate: after as f64 / took,
            step: took / run.output as f64,
            overhead: (took - products).max(0.0) / run.output as f64,
        })
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

/// When a token came, in seconds since the start of its run, and those that products and attention have taken by then.
#[derive(Clone, Copy, Debug, Default)]
struct Arrival {
    at: f64,
    products: f64,
}

async fn arrivals(mut events: Events, start: Instant, cpu: Cpu) -> Result<Vec<Arrival>, String> {
    let mut times = Vec::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Token { .. } => times.push(Arrival {
                at: start.elapsed().as_secs_f64(),
                products: cpu.counted_time().as_secs_f64(),
            }),
            Event::Failed(failure) => return Err(failure.to_string()),
            Event::Prompt { .. } | Event::Finished { .. } => {}
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_on_integers_are_held_to_their_own_peak() {
        let model = Model {
            trunk: 100.0,
            expert: 10.0,
            moe_layers: 1.0,
            experts: 4.0,
            top_k: 4.0,
            latents: 0.0,
            products: Ops::of(3.0, true).and(Ops::of(1.0, false)),
            head: Ops::of(2.0, true),
            attention_ops: 0.0,
        };
        let machine = Machine {
            read: 14.0,
            fma: 1.0,
            floats: 2.0,
            int8: 10.0,
        };
        let run = Run {
            batch: 1,
            prompt: 16,
            output: 2,
        };
        let floors = model.floors(&run, &machine);
        // Two steps, each of all weights; two tokens, each with 10 operations on integers and 2 on others.
        assert_eq!((floors.read, floors.arithmetic), (20.0, 4.0));
        assert_eq!((floors.seconds(), floors.bound()), (20.0, "read"));
    }
}
