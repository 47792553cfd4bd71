//! The path of a token, written plainly: trunk and experts in one process, no scheduler, no exchange.
//!
//! This loop is what the attention node's step loop must equal bit for bit.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use guild_model::cache::{Format, LatentCache, SeqRows};
use guild_model::checkpoint::Dtype;
use guild_model::expert::Expert;
use guild_model::gate::Routes;
use guild_model::sampler::{self, Sampling};
use guild_model::trunk::{Ffn, Layer, Trunk};
use guild_model::{Checkpoint, Cpu};

/// A whole model in one process.
pub struct Oracle {
    pub checkpoint: Checkpoint,
    pub cpu: Cpu,
    pub trunk: Trunk,
    dtype: Dtype,
    experts: Mutex<HashMap<(usize, u32), Arc<Expert>>>,
}

/// Everything one pass computes.
pub struct Pass {
    /// `[layers + 1][n, hidden]`: embeddings, then the output of each layer.
    pub hidden: Vec<Vec<f32>>,
    /// Of each MoE layer.
    pub routes: BTreeMap<usize, Routes>,
    pub final_norm: Vec<f32>,
    pub logits: Vec<f32>,
}

/// One sequence's part of a batch.
pub struct Piece<'a> {
    pub tokens: &'a [u32],
    /// Position of the first token.
    pub start: usize,
    pub pages: &'a [u32],
}

impl Oracle {
    pub fn open(dir: &Path, dtype: Dtype, cpu: Cpu) -> Oracle {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let trunk = Trunk::load(&checkpoint, dtype, &cpu, &|_, _| ()).unwrap();
        Oracle {
            checkpoint,
            cpu,
            trunk,
            dtype,
            experts: Mutex::new(HashMap::new()),
        }
    }

    /// A cache for the main model and, if there is one, the MTP layer.
    pub fn cache(&self, pages: usize, page_tokens: usize) -> LatentCache {
        self.cache_in(Format::F32, pages, page_tokens)
    }

    /// The same, rows stored in `format`.
    pub fn cache_in(&self, format: Format, pages: usize, page_tokens: usize) -> LatentCache {
        let layers = self.trunk.layers().len() + usize::from(self.trunk.mtp().is_some());
        LatentCache::new(self.trunk.config(), layers, pages, page_tokens, format)
    }

    /// One batch of pieces of sequences through the main model.
    pub fn forward(&self, pieces: &[Piece<'_>], cache: &mut LatentCache) -> Pass {
        let tokens: Vec<u32> = pieces.iter().flat_map(|p| p.tokens).copied().collect();
        let mut seqs = Vec::new();
        let mut row = 0;
        for piece in pieces {
            seqs.push(SeqRows {
                rows: row..row + piece.tokens.len(),
                start: piece.start,
                pages: piece.pages,
            });
            row += piece.tokens.len();
        }
        let mut stream = self.trunk.embed(&tokens);
        let mut hidden = vec![stream.to_vec()];
        let mut routes = BTreeMap::new();
        for layer in self.trunk.layers() {
            routes.extend(
                self.layer(layer, &mut stream, &seqs, cache)
                    .map(|r| (layer.index(), r)),
            );
            hidden.push(stream.to_vec());
        }
        let final_norm = self.trunk.final_norm(&stream);
        let logits = self.trunk.logits(&final_norm);
        Pass {
            hidden,
            routes,
            final_norm: final_norm.to_vec(),
            logits: logits.to_vec(),
        }
    }

    /// One layer, attention and feed-forward, of the main model or the MTP module.
    pub fn layer(
        &self,
        layer: &Layer,
        stream: &mut [f32],
        seqs: &[SeqRows<'_>],
        cache: &mut LatentCache,
    ) -> Option<Routes> {
        layer.attend(stream, seqs, cache);
        match layer.ffn() {
            Ffn::Dense(dense) => {
                dense.forward(stream);
                None
            }
            Ffn::Moe(moe) => {
                let x = moe.norm(stream);
                let routes = moe.route(&x);
                let rows = self.experts(layer.index(), &x, &routes);
                let shared = moe.shared(&x);
                moe.combine(stream, &routes, &rows, shared.as_deref());
                Some(routes)
            }
        }
    }

    /// The whole prompt in one piece.
    pub fn prefill(&self, tokens: &[u32]) -> Pass {
        let mut cache = self.cache(1, tokens.len());
        self.forward(
            &[Piece {
                tokens,
                start: 0,
                pages: &[0],
            }],
            &mut cache,
        )
    }

    /// Prefill, then one token at a time.
    pub fn greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut cache = self.cache(1, prompt.len() + count);
        let mut tokens = prompt.to_vec();
        let mut done = 0;
        while tokens.len() < prompt.len() + count {
            let pass = self.forward(
                &[Piece {
                    tokens: &tokens[done..],
                    start: done,
                    pages: &[0],
                }],
                &mut cache,
            );
            done = tokens.len();
            let last = pass
                .logits
                .chunks_exact(self.trunk.config().vocab_size)
                .next_back()
                .unwrap();
            tokens.push(sampler::sample(&self.cpu, last, &Sampling::GREEDY, done as u64, 0).token);
        }
        tokens.split_off(prompt.len())
    }

    /// Expert outputs `[n * top_k, hidden]` in the order of the routes, each expert running its rows together.
    fn experts(&self, layer: usize, x: &[f32], routes: &Routes) -> Vec<f32> {
        let width = self.trunk.config().hidden_size;
        let mut choices: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (choice, &expert) in routes.experts.iter().enumerate() {
            choices.entry(expert).or_default().push(choice);
        }
        let mut out = vec![0.0; routes.experts.len() * width];
        for (expert, choices) in choices {
            let rows = choices
                .iter()
                .flat_map(|c| &x[c / routes.top_k * width..][..width])
                .copied()
                .collect::<Vec<_>>();
            let returned = self.expert(layer, expert).forward(&self.cpu, &rows);
            for (choice, row) in choices.iter().zip(returned.chunks_exact(width)) {
                out[choice * width..][..width].copy_from_slice(row);
            }
        }
        out
    }

    fn expert(&self, layer: usize, expert: u32) -> Arc<Expert> {
        let mut experts = self.experts.lock().unwrap();
        let load = || {
            Arc::new(Expert::load(&self.checkpoint, layer, expert as usize, self.dtype).unwrap())
        };
        Arc::clone(experts.entry((layer, expert)).or_insert_with(load))
    }
}
