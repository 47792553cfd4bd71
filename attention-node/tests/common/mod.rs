//! An attention node's engine with its experts in the same process, on the checkpoints of the
//! repository. Experts can be told to fail.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use guild_attention_node::engine::Engine;
use guild_attention_node::exchange::{ExchangeCounters, Views};
use guild_attention_node::sequence::{Event, Events, Request};
use guild_attention_node::view::View;
use guild_attention_node::{EngineHandle, MicroBatches, Overlap, Patience, RoutedRows};
use guild_model::cache::Format;
use guild_model::checkpoint::Dtype;
use guild_model::expert::Expert;
use guild_model::sampler::{Sampling, Shaping};
use guild_model::trunk::Trunk;
use guild_model::{Checkpoint, Cpu, random};
use guild_scheduler::batch::Limits;
use guild_scheduler::placement::{NodeSlots, Placement};
use guild_transport::{
    Batch, ExchangeCode, ExchangeError, Fabric, Handle, LinkLimits, Links, NodeId, Returned,
    SlotHost, Switchboard, Work,
};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

/// Generous: nothing waits for it unless something is wrong.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A checkpoint in memory: trunk and all experts of the main model.
pub struct Model {
    pub cpu: Cpu,
    pub trunk: Arc<Trunk>,
    experts: HashMap<(u32, u32), Arc<Expert>>,
}

impl Model {
    pub fn v3_basic() -> &'static Model {
        static MODEL: OnceLock<Model> = OnceLock::new();
        MODEL.get_or_init(|| Model::load("tests/golden/v3-basic"))
    }

    pub fn demo() -> &'static Model {
        static MODEL: OnceLock<Model> = OnceLock::new();
        MODEL.get_or_init(|| Model::load("models/demo"))
    }

    pub fn v3_mtp() -> &'static Model {
        static MODEL: OnceLock<Model> = OnceLock::new();
        MODEL.get_or_init(|| Model::load("tests/golden/v3-mtp"))
    }

    /// Random weights, and so few of them that a step takes microseconds.
    pub fn tiny() -> &'static Model {
        static MODEL: OnceLock<Model> = OnceLock::new();
        MODEL.get_or_init(|| {
            let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let dir = dir.join(format!("tiny-{}", std::process::id()));
            let fields = [
                "hidden_size=32",
                "num_hidden_layers=2",
                "intermediate_size=32",
                "moe_intermediate_size=16",
                "n_routed_experts=4",
                "num_experts_per_tok=2",
                "n_group=1",
                "topk_group=1",
                "num_attention_heads=2",
                "num_key_value_heads=2",
                "q_lora_rank=16",
                "kv_lora_rank=16",
                "qk_nope_head_dim=8",
                "qk_rope_head_dim=8",
                "v_head_dim=8",
                "vocab_size=48",
                "bos_token_id=0",
                "eos_token_id=1",
                "max_position_embeddings=512",
                "num_nextn_predict_layers=1",
            ];
            let fields = fields.map(|field| random::parse_override(field).unwrap());
            let shape = random::shape("tiny").unwrap();
            let shard = random::DEFAULT_SHARD_BYTES;
            random::write(shape, &fields, 5, shard, &dir, &|_, _| ()).unwrap();
            let model = Model::load(dir.to_str().unwrap());
            std::fs::remove_dir_all(dir).unwrap();
            model
        })
    }

    fn load(dir: &str) -> Model {
        let checkpoint = Checkpoint::open(&repository().join(dir)).unwrap();
        let cpu = Cpu::new(2);
        let trunk = Trunk::load(&checkpoint, Dtype::Auto, &cpu, &|_, _| ()).unwrap();
        let config = checkpoint.config();
        let mut experts = HashMap::new();
        for layer in config.expert_layers() {
            for expert in 0..config.n_routed_experts {
                let loaded = Expert::load(&checkpoint, layer, expert, Dtype::Auto).unwrap();
                experts.insert((layer as u32, expert as u32), Arc::new(loaded));
            }
        }
        Model {
            cpu,
            trunk: Arc::new(trunk),
            experts,
        }
    }

    /// Experts dealt to `nodes` nodes with ids from `first` on, shuffled by `seed`.
    pub fn deal(&self, epoch: u64, first: NodeId, nodes: u32, seed: u64) -> Placement {
        let mut all: Vec<(u32, u32)> = self.experts.keys().copied().collect();
        all.sort_unstable();
        let mut random = Random(seed);
        for at in (1..all.len()).rev() {
            all.swap(at, random.below(at + 1));
        }
        let slots = |node: u32| NodeSlots {
            node: first + node,
            slots: all
                .iter()
                .copied()
                .skip(node as usize)
                .step_by(nodes as usize)
                .collect(),
        };
        Placement::new(epoch, (0..nodes).map(slots).collect()).unwrap()
    }

    /// The same with two homes for every expert, the second on the next node.
    pub fn deal_twice(&self, epoch: u64, first: NodeId, nodes: u32, seed: u64) -> Placement {
        let once = self.deal(epoch, first, nodes, seed);
        let mut twice = once.nodes().to_vec();
        let turned = once.nodes().iter().cycle().skip(nodes as usize - 1);
        for (node, before) in twice.iter_mut().zip(turned) {
            node.slots.extend(&before.slots);
        }
        Placement::new(epoch, twice).unwrap()
    }
}

/// Deterministic numbers for schedules (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    pub fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// What an expert node of a test does wrong: refuses so many batches; for ever when negative. Or
/// answers so many and finds the next one at fault.
#[derive(Default)]
pub struct Trouble {
    refusals: AtomicI64,
    /// Batches until then, and that one; 0: never.
    fault_in: AtomicI64,
    pub executed: AtomicI64,
}

impl Trouble {
    pub fn refuse(&self, batches: i64) {
        self.refusals.store(batches, Ordering::SeqCst);
    }

    /// The batch after `batches` more is answered with a fault that no retry cures.
    pub fn fault_after(&self, batches: i64) {
        self.fault_in.store(batches + 1, Ordering::SeqCst);
    }

    fn is_faulty(&self) -> bool {
        let count = |left: i64| (left > 0).then_some(left - 1);
        let left = { &self.fault_in }.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count);
        left == Ok(1)
    }

    fn strikes(&self) -> bool {
        let left = self.refusals.load(Ordering::SeqCst);
        if left > 0 {
            self.refusals.fetch_sub(1, Ordering::SeqCst);
        }
        left != 0
    }
}

struct Host {
    model: &'static Model,
    name: String,
    slots: HashMap<u64, Vec<(u32, u32)>>,
    trouble: Arc<Trouble>,
}

impl SlotHost for Host {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        let refuse = |code, text: &str| Err(ExchangeError::new(code, self.name.as_str(), text));
        if self.trouble.strikes() {
            return refuse(ExchangeCode::Unreachable, "made to fail");
        }
        if self.trouble.is_faulty() {
            return refuse(ExchangeCode::Internal, "made to fail for good");
        }
        let Some(slots) = self.slots.get(&work.epoch) else {
            return refuse(ExchangeCode::UnknownEpoch, "never heard of it");
        };
        self.trouble.executed.fetch_add(1, Ordering::SeqCst);
        let mut out = Vec::new();
        for (slot, rows) in &work.slots {
            let expert = &self.model.experts[&slots[*slot as usize]];
            let rows = rows
                .iter()
                .map(|&r| &work.rows[r as usize * work.width..][..work.width]);
            out.extend(expert.forward(&self.model.cpu, &rows.collect::<Vec<_>>().concat()));
        }
        Ok(out)
    }
}

/// What the node of this id is called.
pub fn name(node: NodeId) -> String {
    format!("expert-{node}")
}

/// The expert nodes of a placement, in this process.
pub fn board(model: &'static Model, placement: &Placement, trouble: &Arc<Trouble>) -> Switchboard {
    let board = Switchboard::default();
    for node in placement.nodes() {
        let host = Host {
            model,
            name: name(node.node),
            slots: HashMap::from([(placement.epoch(), node.slots.clone())]),
            trouble: Arc::clone(trouble),
        };
        board.attach(name(node.node), Arc::new(host));
    }
    board
}

/// A running engine and the experts behind it.
pub struct Rig {
    model: &'static Model,
    pub engine: EngineHandle,
    pub ended: oneshot::Receiver<Result<(), String>>,
    pub trouble: Arc<Trouble>,
    pub views: watch::Sender<Option<Arc<View>>>,
    pub wire: Arc<Wire>,
    pub counters: Arc<ExchangeCounters>,
    pub routed: Arc<RoutedRows>,
    pub overlap: Overlap,
}

/// What a network does to one node.
#[derive(Clone, Copy)]
pub enum Fate {
    /// Nothing can be sent there.
    Dead,
    /// Answers get lost without a word.
    Silent,
    /// Answers take this much longer.
    Slow(Duration),
}

/// The links, with a switch that makes answers get lost without a word, and a fate for each node.
pub struct Wire {
    links: Links,
    pub silent: AtomicBool,
    pub fates: Mutex<HashMap<NodeId, Fate>>,
    /// Messages sent to each node.
    pub sent: Mutex<HashMap<NodeId, usize>>,
}

impl Wire {
    pub fn strike(&self, node: NodeId, fate: Fate) {
        self.fates.lock().unwrap().insert(node, fate);
    }

    pub fn heal(&self, node: NodeId) {
        self.fates.lock().unwrap().remove(&node);
    }

    pub fn sent_to(&self, node: NodeId) -> usize {
        self.sent.lock().unwrap().get(&node).copied().unwrap_or(0)
    }
}

impl Fabric for Wire {
    fn dispatch(&self, batch: Batch<'_>) -> Result<Handle, ExchangeError> {
        for assignment in batch.assignments.iter().take(1) {
            let node = assignment.node;
            if let Some(Fate::Dead) = self.fates.lock().unwrap().get(&node) {
                let text = "no connection";
                return Err(ExchangeError::new(
                    ExchangeCode::Unreachable,
                    name(node),
                    text,
                ));
            }
            *self.sent.lock().unwrap().entry(node).or_default() += 1;
        }
        self.links.dispatch(batch)
    }

    fn is_here(&self, node: NodeId) -> bool {
        self.links.is_here(node)
    }

    async fn combine(&self, handle: Handle) -> Result<Returned, ExchangeError> {
        if self.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let fate = handle.nodes().find_map(|node| {
            let fates = self.fates.lock().unwrap();
            fates.get(&node).copied()
        });
        match fate {
            None => {}
            Some(Fate::Slow(more)) => tokio::time::sleep(more).await,
            Some(Fate::Dead | Fate::Silent) => std::future::pending::<()>().await,
        }
        let returned = self.links.combine(handle).await?;
        Ok(Returned {
            arrived: Instant::now(),
            ..returned
        })
    }
}

impl Rig {
    /// Experts on three nodes, default limits.
    pub fn new(model: &'static Model) -> Rig {
        Rig::with(model, limits(), model.deal(1, 1, 3, 0), DEADLINE)
    }

    pub fn with(
        model: &'static Model,
        limits: Limits,
        placement: Placement,
        deadline: Duration,
    ) -> Rig {
        let patience = Patience {
            deadline,
            ..Patience::default()
        };
        Rig::patient(model, limits, placement, patience)
    }

    pub fn patient(
        model: &'static Model,
        limits: Limits,
        placement: Placement,
        patience: Patience,
    ) -> Rig {
        Rig::made(model, limits, placement, Format::F32, patience, |engine| {
            engine
        })
    }

    /// The same with an engine that `finish` has had in its hands.
    pub fn made(
        model: &'static Model,
        limits: Limits,
        placement: Placement,
        format: Format,
        patience: Patience,
        finish: impl FnOnce(Engine<Wire>) -> Engine<Wire>,
    ) -> Rig {
        let runtime = tokio::runtime::Handle::current();
        let wire = Arc::new(Wire {
            links: Links::new("attention", LinkLimits::default(), runtime),
            silent: AtomicBool::new(false),
            fates: Mutex::default(),
            sent: Mutex::default(),
        });
        let (views, newest): (_, Views) = watch::channel(None);
        let (engine, handle) = Engine::new(
            Arc::clone(&model.trunk),
            model.cpu.clone(),
            Arc::clone(&wire),
            newest,
            limits,
            format,
            patience,
        )
        .unwrap();
        let overlap = Overlap::default();
        let engine = finish(engine.overlapping(overlap.clone()));
        let rig = Rig {
            overlap,
            model,
            engine: handle,
            counters: engine.exchange_counters(),
            routed: engine.routed_rows(),
            ended: engine.spawn("test").unwrap(),
            trouble: Arc::default(),
            views,
            wire,
        };
        rig.place(placement);
        rig
    }

    /// Makes a placement active; its nodes know no other epoch.
    pub fn place(&self, placement: Placement) {
        let board = board(self.model, &placement, &self.trouble);
        let nodes = placement.nodes().iter().map(|node| node.node);
        let nodes: Vec<(NodeId, String)> = nodes.map(|node| (node, name(node))).collect();
        let endpoints = nodes
            .iter()
            .map(|(node, name)| (*node, name.clone(), String::new()));
        self.wire.links.set_nodes(&[], None);
        self.wire
            .links
            .set_nodes(&endpoints.collect::<Vec<_>>(), Some(&board));
        let view = View::new(placement, nodes);
        self.views.send_replace(Some(Arc::new(view)));
    }

    pub fn submit(&self, request: &Request) -> Events {
        self.engine.submit(request.clone()).unwrap()
    }

    /// One request, alone or not, to its end.
    pub async fn run(&self, request: &Request) -> Vec<Event> {
        read_all(self.submit(request)).await
    }

    /// Waits until nobody is here and all pages are free.
    pub async fn settle(&self) {
        let pages = self.engine.limits().pages;
        for _ in 0..10_000 {
            let counts = self.engine.counts();
            self.engine.audit().unwrap();
            if counts.running + counts.waiting == 0 {
                assert_eq!(counts.free_pages, pages, "pages leaked");
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("the engine does not settle: {:?}", self.engine.counts());
    }
}

pub fn limits() -> Limits {
    Limits {
        max_running: 16,
        max_waiting: 64,
        max_step_tokens: 64,
        page_tokens: 16,
        pages: 256,
        max_context: 256,
        ..Limits::default()
    }
}

/// A greedy request with log-probabilities.
pub fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens,
        sampling: Sampling::GREEDY,
        shaping: Shaping::default(),
        output_before: 0,
        stop_tokens: Vec::new(),
        min_tokens: 0,
        logprobs: Some(2),
        prompt_logprobs: None,
        priority: 0,
        tenant: 0,
        timeout: None,
        max_queue: None,
    }
}

pub async fn read_all(mut events: Events) -> Vec<Event> {
    let mut all = Vec::new();
    while let Some(event) = events.recv().await {
        all.push(event);
    }
    all
}

pub fn tokens(events: &[Event]) -> Vec<u32> {
    let token = |event: &Event| match event {
        Event::Token { token, .. } => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

/// Everything a reader saw, with the bits of every float.
pub fn bits(events: &[Event]) -> Vec<String> {
    use guild_model::sampler::Sampled;
    let sampled = |s: &Sampled| {
        let top = s.top.iter().map(|&(token, l)| (token, l.to_bits()));
        format!(
            "{} {:08x} {:x?}",
            s.token,
            s.logprob.to_bits(),
            top.collect::<Vec<_>>()
        )
    };
    let show = |event: &Event| match event {
        Event::Prompt { logprobs } => {
            format!(
                "prompt {:?}",
                logprobs.iter().map(sampled).collect::<Vec<_>>()
            )
        }
        Event::Token {
            token, logprobs, ..
        } => {
            format!("token {token} {:?}", logprobs.as_ref().map(sampled))
        }
        // What it took depends on what else happened.
        Event::Finished {
            reason, generated, ..
        } => format!("finished {reason:?} {generated}"),
        Event::Failed(failure) => format!("{failure:?}"),
    };
    events.iter().map(show).collect()
}

/// The bits of each request by itself, in steps of one piece and with nothing in its way.
pub async fn undisturbed(requests: &[Request]) -> Vec<Vec<String>> {
    let rig = Rig::new(Model::v3_basic());
    rig.overlap.set(MicroBatches::Off);
    let mut all = Vec::new();
    for request in requests {
        all.push(bits(&rig.run(request).await));
    }
    assert_eq!(rig.overlap.so_far().split, 0);
    all
}

/// Runs all requests together; when tokens of the first are here, `strike` happens. Each must give
/// the bits that it gives undisturbed.
pub async fn assert_same_bits(rig: &Rig, requests: &[Request], strike: impl FnOnce(&Rig)) {
    let expected = undisturbed(requests).await;
    let mut readers: Vec<Events> = requests.iter().map(|request| rig.submit(request)).collect();
    let mut first: Vec<Event> = Vec::new();
    while first.len() < 2 {
        first.push(readers[0].recv().await.unwrap());
    }
    strike(rig);
    for (which, reader) in readers.into_iter().enumerate() {
        let mut got = match which {
            0 => std::mem::take(&mut first),
            _ => Vec::new(),
        };
        got.extend(read_all(reader).await);
        assert_eq!(bits(&got), expected[which], "request {which}");
    }
    rig.settle().await;
}
