//! What a step asks the system for once it has run a few times: nothing.
//!
//! One test, for the allocator counts whatever the process does.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::golden;
use guild_kernels::reused;
use guild_model::cache::{Format, LatentCache, SeqRows};
use guild_model::checkpoint::Dtype;
use guild_model::expert::Expert;
use guild_model::sampler::{self, Sampling};
use guild_model::trunk::{Ffn, Trunk};
use guild_model::{Checkpoint, Cpu};

#[global_allocator]
static COUNTED: dhat::Alloc = dhat::Alloc;

const PAGE: usize = 64;
/// Steps that are counted together, and how often: it may be a while until every thread has met its largest task, for
/// what goes to one expert depends on the tokens, and threads share tasks out as they please.
const STEPS: usize = 4;
const ATTEMPTS: usize = 50;

/// A model that decodes `batch` sequences, with everything that its caller keeps from step to step.
struct Decoding {
    cpu: Cpu,
    trunk: Trunk,
    /// By layer and number.
    experts: Vec<Vec<Expert>>,
    cache: LatentCache,
    pages: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    position: usize,
    /// For each expert of a layer the rows that go to it, and where their results belong.
    rows: Vec<Vec<u32>>,
    places: Vec<usize>,
    calls: Vec<(&'static Expert, &'static [u32])>,
}

impl Decoding {
    fn new(threads: usize, dtype: Dtype, format: Format, batch: usize) -> Decoding {
        let checkpoint = Checkpoint::open(&golden::demo()).unwrap();
        let cpu = Cpu::new(threads);
        let config = checkpoint.config();
        let experts = (0..config.num_hidden_layers).map(|layer| match config.is_moe(layer) {
            false => Vec::new(),
            true => (0..config.n_routed_experts)
                .map(|e| Expert::load(&checkpoint, layer, e, dtype).unwrap())
                .collect(),
        });
        let experts: Vec<Vec<Expert>> = experts.collect();
        let pages = config.max_position_embeddings.div_ceil(PAGE);
        let layers = config.num_hidden_layers + 1;
        Decoding {
            trunk: Trunk::load(&checkpoint, dtype, &cpu, &|_, _| ()).unwrap(),
            cache: LatentCache::new(config, layers, pages * batch, PAGE, format),
            pages: { 0..batch as u32 }
                .map(|of| (of * pages as u32..(of + 1) * pages as u32).collect())
                .collect(),
            tokens: (0..batch as u32).map(|salt| 3 + 7 * salt).collect(),
            position: 0,
            rows: vec![Vec::new(); config.n_routed_experts],
            places: Vec::new(),
            calls: Vec::new(),
            experts,
            cpu,
        }
    }

    /// One token of every sequence, and a draft behind it.
    fn step(&mut self, seqs: &mut [SeqRows<'_>]) {
        seqs.iter_mut().for_each(|seq| seq.start = self.position);
        let (trunk, workspace) = (&self.trunk, self.trunk.workspace());
        let mut hidden = trunk.embed(&self.tokens);
        let width = trunk.config().hidden_size;
        for layer in trunk.layers() {
            layer.attend(&mut hidden, seqs, &mut self.cache);
            let moe = match layer.ffn() {
                Ffn::Dense(ffn) => {
                    ffn.forward(&mut hidden);
                    continue;
                }
                Ffn::Moe(moe) => moe,
            };
            let x = moe.norm(&hidden);
            let routes = moe.route(&x);
            self.rows.iter_mut().for_each(Vec::clear);
            for (choice, &expert) in routes.experts.iter().enumerate() {
                self.rows[expert as usize].push((choice / routes.top_k) as u32);
            }
            self.places.clear();
            for expert in 0..self.rows.len() as u32 {
                let choices = (0..).zip(routes.experts.iter());
                let choices = choices.filter(|&(_, &chosen)| chosen == expert);
                self.places.extend(choices.map(|(at, _)| at));
            }
            let mut calls = reused(std::mem::take(&mut self.calls));
            let all = self.experts[layer.index()].iter().zip(&self.rows);
            calls.extend(all.map(|(expert, rows)| (expert, &rows[..])));
            let mut out = workspace.take::<f32>(routes.experts.len() * width);
            Expert::forward_all(&self.cpu, &mut out, &x, &calls);
            self.calls = reused(calls);
            let mut sorted = workspace.take::<f32>(out.len());
            for (row, &place) in out.chunks_exact(width).zip(&self.places) {
                sorted[place * width..][..width].copy_from_slice(row);
            }
            let shared = moe.shared(&x);
            moe.combine(&mut hidden, &routes, &sorted, shared.as_deref());
        }
        let normed = trunk.final_norm(&hidden);
        let logits = trunk.logits(&normed);
        let vocab = trunk.config().vocab_size;
        let drawn = Sampling {
            temperature: 0.8,
            top_p: 0.9,
            min_p: 0.01,
            ..Sampling::GREEDY
        };
        let limited = Sampling { top_k: 40, ..drawn };
        let ways = [Sampling::GREEDY, drawn, limited];
        for ((token, logits), how) in { self.tokens.iter_mut() }
            .zip(logits.chunks_exact(vocab))
            .zip(ways.iter().cycle())
        {
            let position = self.position as u64 + 1;
            *token = sampler::choose(&self.cpu, logits, how, position);
            let sampled = sampler::sample(&self.cpu, logits, how, position, 0);
            assert_eq!(sampled.token, *token);
        }
        let mtp = trunk.mtp().unwrap();
        let mut draft = mtp.combine_input(&self.tokens, &normed);
        mtp.layer().attend(&mut draft, seqs, &mut self.cache);
        drop((mtp.carry(&draft), mtp.draft_logits(&draft)));
        self.position += 1;
    }
}

#[test]
fn decoding_allocates_nothing_once_it_goes() {
    let int8 = Dtype::Int8 { group: 64 };
    for (threads, dtype, format, batch) in [
        (1, Dtype::Auto, Format::F32, 1),
        (1, Dtype::F32, Format::Bf16, 16),
        (1, int8, Format::Fp8, 16),
        (2, Dtype::Auto, Format::F32, 64),
    ] {
        let what = format!("{threads} threads, {dtype}, {format}, {batch} sequences");
        let mut decoding = Decoding::new(threads, dtype, format, batch);
        let pages = decoding.pages.clone();
        let seqs = (0..).zip(&pages).map(|(row, pages)| SeqRows {
            rows: row..row + 1,
            start: 0,
            pages,
        });
        let mut seqs: Vec<SeqRows<'_>> = seqs.collect();
        let _counting = dhat::Profiler::builder().testing().build();
        let steady = (0..ATTEMPTS).position(|_| {
            let before = dhat::HeapStats::get().total_blocks;
            (0..STEPS).for_each(|_| decoding.step(&mut seqs));
            dhat::HeapStats::get().total_blocks == before
        });
        assert!(steady.is_some(), "{what}: it never ends");
    }
}
