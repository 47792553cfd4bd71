//! What an attention node holds of a model: everything but the routed experts.
//!
//! Secret: the order of operations inside a layer, up to where rows leave for the experts and after
//! they come back. A caller walks the layers: [`Layer::attend`], then [`DenseFfn::forward`], or
//! [`Moe::norm`], [`Moe::route`], the experts wherever they are, [`Moe::combine`]. All parts share the
//! [`Workspace`] of their trunk: rows that one of them gives go back to it when they are dropped, and the next
//! layer has the same memory. Nothing here knows where experts live.

use std::sync::Arc;

use guild_kernels::Cpu;

use crate::cache::{LatentCache, SeqRows};
use crate::checkpoint::{Dtype, schema};
use crate::expert::Mlp;
use crate::gate::{Gate, Routes};
use crate::mla::{Mla, Rope};
use crate::mtp::Mtp;
use crate::weights::{Loader, Matrix};
use crate::workspace::{Buffer, Workspace};
use crate::{Checkpoint, Config, ModelError};

/// Elements that one task reads and writes of rows that are summed: some microseconds of work.
const TASK_ELEMENTS: usize = 1 << 15;

/// Embedding, layers, final norm, head, and the MTP module if the model has one.
#[derive(Debug)]
pub struct Trunk {
    config: Config,
    workspace: Workspace,
    embedding: Arc<Matrix>,
    layers: Vec<Layer>,
    norm: Norm,
    head: Arc<Matrix>,
    mtp: Option<Mtp>,
}

impl Trunk {
    /// Reads an attention node's share of a checkpoint; routed experts are not touched. `progress` hears
    /// stored bytes done and in all, from any thread, now and then and at the end (all, all).
    ///
    /// # Errors
    /// A tensor that is missing or cannot be used.
    pub fn load(
        ckpt: &Checkpoint,
        dtype: Dtype,
        cpu: &Cpu,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Trunk, ModelError> {
        let cfg = ckpt.config();
        let (vocab, hidden) = (cfg.vocab_size, cfg.hidden_size);
        let loader = Loader::new(ckpt, dtype, Trunk::stored_bytes(ckpt), progress);
        let rope = Arc::new(Rope::new(cfg));
        let workspace = Workspace::new(cpu);
        let embedding = Arc::new(loader.matrix(EMBEDDING, vocab, hidden)?);
        let head = match cfg.tie_word_embeddings {
            true => Arc::clone(&embedding),
            false => Arc::new(loader.matrix(HEAD, vocab, hidden)?),
        };
        let mut layers: Vec<Option<Result<Layer, ModelError>>> = Vec::new();
        layers.resize_with(cfg.num_hidden_layers, || None);
        cpu.par_chunks(&mut layers, 1, |index, slot| {
            slot[0] = Some(Layer::load(&loader, index, &workspace, &rope))
        });
        let trunk = Trunk {
            layers: layers.into_iter().flatten().collect::<Result<_, _>>()?,
            norm: Norm::load(&loader, "model.norm")?,
            mtp: match cfg.num_nextn_predict_layers {
                0 => None,
                _ => Some(Mtp::load(&loader, &workspace, &rope, &embedding, &head)?),
            },
            config: cfg.clone(),
            workspace,
            embedding,
            head,
        };
        loader.finish();
        Ok(trunk)
    }

    /// Bytes that [`Trunk::load`] reads, as stored: all tensors but the routed experts'.
    pub fn stored_bytes(ckpt: &Checkpoint) -> u64 {
        // Of several MTP modules the first is used.
        let cfg = ckpt.config();
        let cfg = Config {
            num_nextn_predict_layers: cfg.num_nextn_predict_layers.min(1),
            ..cfg.clone()
        };
        schema(&cfg)
            .filter(|t| !t.name.contains(".mlp.experts."))
            .map(|t| ckpt.stored_bytes(&t.name))
            .sum()
    }

    /// What the model is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Threads and memory of all parts.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Embeddings `[n, hidden]` of token ids.
    ///
    /// # Panics
    /// An id that is not below `vocab_size`: whoever takes ids in refuses those.
    pub fn embed(&self, tokens: &[u32]) -> Buffer {
        embed(&self.workspace, &self.embedding, tokens)
    }

    /// Layers of the main model, in order.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The norm before the head, `[n, hidden]`; its output is also what the MTP module takes.
    pub fn final_norm(&self, hidden: &[f32]) -> Buffer {
        self.norm.forward(&self.workspace, hidden)
    }

    /// Logits `[n, vocab]` of normed rows.
    pub fn logits(&self, normed: &[f32]) -> Buffer {
        self.head.apply(&self.workspace, normed)
    }

    /// The module that drafts the token after the next, if the model has one.
    pub fn mtp(&self) -> Option<&Mtp> {
        self.mtp.as_ref()
    }

    /// Resident bytes of the embedding, of which a token needs one row.
    pub fn embedding_bytes(&self) -> u64 {
        self.embedding.bytes()
    }

    /// Resident bytes of weights.
    pub fn bytes(&self) -> u64 {
        let head = if self.config.tie_word_embeddings {
            0
        } else {
            self.head.bytes()
        };
        let mtp = self
            .mtp
            .as_ref()
            .map_or(0, |m| m.bytes(&self.embedding, &self.head));
        self.embedding.bytes()
            + head
            + self.norm.bytes()
            + mtp
            + self.layers.iter().map(Layer::bytes).sum::<u64>()
    }
}

/// Name of the embedding, without `.weight`.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// Name of the head, without `.weight`.
pub(crate) const HEAD: &str = "lm_head";

pub(crate) fn embed(workspace: &Workspace, embedding: &Matrix, tokens: &[u32]) -> Buffer {
    let mut out = workspace.take(tokens.len() * embedding.cols());
    for (row, &token) in out.chunks_exact_mut(embedding.cols()).zip(tokens) {
        embedding.widen_row(token as usize, row);
    }
    out
}

/// A root-mean-square norm over the hidden width.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Vec<f32>,
    eps: f32,
}

impl Norm {
    pub(crate) fn load(loader: &Loader<'_>, name: &str) -> Result<Norm, ModelError> {
        let cfg = loader.config();
        Ok(Norm {
            weight: loader.vector(&format!("{name}.weight"), cfg.hidden_size)?,
            eps: cfg.rms_norm_eps,
        })
    }

    pub(crate) fn forward(&self, workspace: &Workspace, x: &[f32]) -> Buffer {
        let mut out = workspace.take(x.len());
        { workspace.cpu() }.rms_norm(&mut out, x, &self.weight, self.eps);
        out
    }

    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(self.weight.as_slice()) as u64
    }

    fn width(&self) -> usize {
        self.weight.len()
    }
}

/// One decoder layer without its routed experts.
#[derive(Debug)]
pub struct Layer {
    index: usize,
    workspace: Workspace,
    norm: Norm,
    attention: Mla,
    ffn: Ffn,
}

impl Layer {
    pub(crate) fn load(
        loader: &Loader<'_>,
        index: usize,
        workspace: &Workspace,
        rope: &Arc<Rope>,
    ) -> Result<Layer, ModelError> {
        let cfg = loader.config();
        let prefix = format!("model.layers.{index}");
        let norm = Norm::load(loader, &format!("{prefix}.post_attention_layernorm"))?;
        let mlp = format!("{prefix}.mlp");
        let workspace = workspace.clone();
        let ffn = if cfg.is_moe(index) {
            let shared = match cfg.shared_intermediate_size() {
                0 => None,
                inner => Some(Mlp::load(loader, &format!("{mlp}.shared_experts"), inner)?),
            };
            Ffn::Moe(Moe {
                workspace: workspace.clone(),
                norm,
                gate: Gate::load(loader, &mlp)?,
                shared,
            })
        } else {
            Ffn::Dense(DenseFfn {
                workspace: workspace.clone(),
                norm,
                mlp: Mlp::load(loader, &mlp, cfg.intermediate_size)?,
            })
        };
        Ok(Layer {
            index,
            norm: Norm::load(loader, &format!("{prefix}.input_layernorm"))?,
            attention: Mla::load(loader, &format!("{prefix}.self_attn"), Arc::clone(rope))?,
            workspace,
            ffn,
        })
    }

    /// Index in the checkpoint, and in the cache; the MTP layer's is `num_hidden_layers`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Norm, attention and residual in place, for rows `hidden` `[n, hidden]` of several sequences. Their
    /// latents are cached first, so rows of one sequence in one call see each other, causally.
    ///
    /// Every row of the batch belongs to exactly one of `seqs`. Of pages that are written here, no two of them
    /// share one.
    pub fn attend(&self, hidden: &mut [f32], seqs: &[SeqRows<'_>], cache: &mut LatentCache) {
        let workspace = &self.workspace;
        let x = self.norm.forward(workspace, hidden);
        let attended = { &self.attention }.forward(workspace, &x, seqs, cache, self.index);
        workspace.cpu().add(hidden, &attended);
    }

    /// The feed-forward half.
    pub fn ffn(&self) -> &Ffn {
        &self.ffn
    }

    pub(crate) fn bytes(&self) -> u64 {
        let ffn = match &self.ffn {
            Ffn::Dense(dense) => dense.norm.bytes() + dense.mlp.bytes(),
            Ffn::Moe(moe) => {
                moe.norm.bytes() + moe.gate.bytes() + moe.shared.as_ref().map_or(0, Mlp::bytes)
            }
        };
        self.norm.bytes() + self.attention.bytes() + ffn
    }
}

/// The feed-forward half of a layer.
#[derive(Debug)]
pub enum Ffn {
    /// One MLP for every token.
    Dense(DenseFfn),
    /// Routed experts, and perhaps shared ones.
    Moe(Moe),
}

/// The feed-forward half of a dense layer.
#[derive(Debug)]
pub struct DenseFfn {
    workspace: Workspace,
    norm: Norm,
    mlp: Mlp,
}

impl DenseFfn {
    /// Norm, MLP and residual in place, for rows `[n, hidden]`.
    pub fn forward(&self, hidden: &mut [f32]) {
        let x = self.norm.forward(&self.workspace, hidden);
        let out = self.mlp.forward(&self.workspace, &x);
        self.workspace.cpu().add(hidden, &out);
    }
}

/// The feed-forward half of a MoE layer, without the routed experts themselves.
#[derive(Debug)]
pub struct Moe {
    workspace: Workspace,
    norm: Norm,
    gate: Gate,
    shared: Option<Mlp>,
}

impl Moe {
    /// What router and experts take: rows `[n, hidden]` normed.
    pub fn norm(&self, hidden: &[f32]) -> Buffer {
        self.norm.forward(&self.workspace, hidden)
    }

    /// Chooses experts for normed rows `[n, hidden]`.
    pub fn route(&self, x: &[f32]) -> Routes {
        self.gate.route(&self.workspace, x)
    }

    /// What the shared experts make of normed rows `[n, hidden]`; None when the model has none.
    pub fn shared(&self, x: &[f32]) -> Option<Buffer> {
        let mlp = self.shared.as_ref()?;
        Some(mlp.forward(&self.workspace, x))
    }

    /// Adds the experts' share to the residual stream `hidden` `[n, hidden]`. `rows` `[n * top_k, hidden]` are
    /// the experts' unweighted outputs in the order of `routes`, so a token's come by ascending expert:
    /// the order of the sum is a matter of the model alone, never of where experts run
    /// (DeepSeek-V3 report, eq. 12).
    ///
    /// # Panics
    /// `rows` or `shared` of another size: whoever carries rows checks that all came back.
    pub fn combine(
        &self,
        hidden: &mut [f32],
        routes: &Routes,
        rows: &[f32],
        shared: Option<&[f32]>,
    ) {
        let (width, top_k) = (self.norm.width(), routes.top_k);
        assert_eq!(
            rows.len(),
            hidden.len() * top_k,
            "one expert row for each choice"
        );
        let cpu = self.workspace.cpu();
        let each = (TASK_ELEMENTS / (width * (top_k + 2))).max(1);
        cpu.par_chunks(hidden, each * width, |task, hidden| {
            let mut sum = self.workspace.take::<f32>(width);
            for (n, hidden) in (task * each..).zip(hidden.chunks_exact_mut(width)) {
                sum.fill(0.0);
                for choice in n * top_k..(n + 1) * top_k {
                    let row = &rows[choice * width..][..width];
                    cpu.fma(&mut sum, routes.weights[choice], row);
                }
                if let Some(shared) = shared {
                    cpu.add(&mut sum, &shared[n * width..][..width]);
                }
                cpu.add(hidden, &sum);
            }
        });
    }
}
