//! Multi-head latent attention over the paged latent cache (DeepSeek-V2 report, section 2.1).
//!
//! Secret: the absorbed form. Keys and values are never built: a query is carried into the latent
//! space by W_uk, attends to the cached (c_kv | k_pe) rows there, and comes back by W_uv. Prefill and
//! decode share this one arithmetic and every row is computed alone, so chunking, page layout and batch
//! mates cannot change a bit.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use guild_kernels::{HeadLayout, LatentAttention, MatrixRef, QueryRow, reused};

use crate::ModelError;
use crate::cache::{LatentCache, SeqRows};
use crate::config::{Config, LATENT_NORM_EPS};
use crate::weights::{Loader, Matrix};
use crate::workspace::{Buffer, Workspace};

/// Positions whose rotations are computed together, when the first of them is seen.
const ROPE_BLOCK: usize = 1024;
/// Elements that one task norms, rotates or moves: some microseconds of work.
const TASK_ELEMENTS: usize = 1 << 15;

thread_local! {
    /// Memory of the lists that a call makes for the kernels.
    static ROWS: Cell<Vec<QueryRow<'static>>> = const { Cell::new(Vec::new()) };
    static HEADS: Cell<Vec<MatrixRef<'static>>> = const { Cell::new(Vec::new()) };
}

/// The attention block of one layer, without its norm and residual.
#[derive(Debug)]
pub(crate) struct Mla {
    query: Query,
    kv_a: Linear,
    kv_a_norm: Vec<f32>,
    /// Per head `[kv_lora_rank, qk_nope_head_dim]`: the transpose of its key rows of kv_b_proj.
    w_uk: Vec<Matrix>,
    /// Per head `[v_head_dim, kv_lora_rank]`: its value rows of kv_b_proj.
    w_uv: Vec<Matrix>,
    output: Linear,
    rope: Arc<Rope>,
    scale: f32,
    nope: usize,
}

/// How queries are made.
#[derive(Debug)]
enum Query {
    Direct(Linear),
    LowRank {
        a: Linear,
        norm: Vec<f32>,
        b: Linear,
    },
}

/// A projection that may have a bias.
#[derive(Debug)]
struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    fn load(
        loader: &Loader<'_>,
        name: &str,
        rows: usize,
        cols: usize,
        bias: bool,
    ) -> Result<Linear, ModelError> {
        let weight = loader.matrix(name, rows, cols)?;
        let bias = if bias {
            Some(loader.vector(&format!("{name}.bias"), rows)?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn forward(&self, workspace: &Workspace, x: &[f32]) -> Buffer {
        let mut out = self.weight.apply(workspace, x);
        if let Some(bias) = &self.bias {
            out.chunks_exact_mut(bias.len())
                .for_each(|row| workspace.cpu().add(row, bias));
        }
        out
    }

    fn bytes(&self) -> u64 {
        self.weight.bytes()
            + self
                .bias
                .as_ref()
                .map_or(0, |b| size_of_val(b.as_slice()) as u64)
    }
}

impl Mla {
    pub(crate) fn load(
        loader: &Loader<'_>,
        prefix: &str,
        rope: Arc<Rope>,
    ) -> Result<Mla, ModelError> {
        let c = loader.config();
        let (hidden, heads, latent) = (c.hidden_size, c.num_attention_heads, c.kv_lora_rank);
        let (nope, value) = (c.qk_nope_head_dim, c.v_head_dim);
        let name = |n: &str| format!("{prefix}.{n}");
        let norm = |n: &str, len| loader.vector(&format!("{prefix}.{n}.weight"), len);
        let query = match c.q_lora_rank {
            Some(rank) => Query::LowRank {
                a: Linear::load(loader, &name("q_a_proj"), rank, hidden, c.attention_bias)?,
                norm: norm("q_a_layernorm", rank)?,
                b: Linear::load(
                    loader,
                    &name("q_b_proj"),
                    heads * c.qk_head_dim(),
                    rank,
                    false,
                )?,
            },
            None => Query::Direct(Linear::load(
                loader,
                &name("q_proj"),
                heads * c.qk_head_dim(),
                hidden,
                false,
            )?),
        };
        let kv_b = loader.matrix(&name("kv_b_proj"), heads * (nope + value), latent)?;
        let keys = |h: usize| h * (nope + value)..h * (nope + value) + nope;
        let values = |h: usize| keys(h).end..(h + 1) * (nope + value);
        Ok(Mla {
            query,
            kv_a: Linear::load(
                loader,
                &name("kv_a_proj_with_mqa"),
                c.latent_width(),
                hidden,
                c.attention_bias,
            )?,
            kv_a_norm: norm("kv_a_layernorm", latent)?,
            w_uk: (0..heads)
                .map(|h| kv_b.slice(keys(h)).transposed())
                .collect(),
            w_uv: (0..heads).map(|h| kv_b.slice(values(h))).collect(),
            output: Linear::load(
                loader,
                &name("o_proj"),
                hidden,
                heads * value,
                c.attention_bias,
            )?,
            rope,
            scale: c.softmax_scale(),
            nope,
        })
    }

    /// Attends rows `x` `[n, hidden]` (normed) of several sequences, after caching their latents in
    /// `layer`; gives `[n, hidden]` without the residual.
    pub(crate) fn forward(
        &self,
        workspace: &Workspace,
        x: &[f32],
        seqs: &[SeqRows<'_>],
        cache: &mut LatentCache,
        layer: usize,
    ) -> Buffer {
        let latent = self.kv_a_norm.len();
        let (width, heads) = (latent + self.rope.dim, self.w_uk.len());
        let n = x.len() / self.kv_a.weight.cols();
        let mut at = workspace.take::<u32>(n);
        at.fill(0);
        positions(seqs).for_each(|(row, _, position)| at[row] = position as u32);
        self.store(workspace, x, &at, seqs, cache, layer);
        let q = self.absorbed_queries(workspace, x, &at);
        // Rows that no sequence claims (there are none in a sound batch) see no key and attend to nothing.
        let mut rows = reused(ROWS.take());
        let unseen = QueryRow {
            pages: &[],
            visible: 0,
        };
        rows.resize(n, unseen);
        for (row, seq, position) in positions(seqs) {
            rows[row] = QueryRow {
                pages: seq.pages,
                visible: position + 1,
            };
        }
        let mut attended = workspace.take(n * heads * latent);
        workspace.cpu().attend_latent(LatentAttention {
            q: &q,
            out: &mut attended,
            heads,
            width,
            value_width: latent,
            scale: self.scale,
            rows: &rows,
            cache: cache.as_bytes(),
            format: cache.format(),
            page_tokens: cache.page_tokens(),
            page_stride: cache.page_stride(),
            offset: cache.layer_offset(layer),
        });
        ROWS.set(reused(rows));
        let value = self.w_uv[0].rows();
        let values = per_head(workspace, &self.w_uv, &attended, latent, value);
        self.output.forward(workspace, &values)
    }

    /// Resident bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let query = match &self.query {
            Query::Direct(q) => q.bytes(),
            Query::LowRank { a, norm, b } => {
                a.bytes() + b.bytes() + size_of_val(norm.as_slice()) as u64
            }
        };
        let heads: u64 = self.w_uk.iter().chain(&self.w_uv).map(Matrix::bytes).sum();
        query
            + heads
            + self.kv_a.bytes()
            + self.output.bytes()
            + size_of_val(self.kv_a_norm.as_slice()) as u64
    }

    /// Caches normed c_kv and rotated k_pe of every row; `at` has their positions.
    fn store(
        &self,
        workspace: &Workspace,
        x: &[f32],
        at: &[u32],
        seqs: &[SeqRows<'_>],
        cache: &mut LatentCache,
        layer: usize,
    ) {
        let latent = self.kv_a_norm.len();
        let width = latent + self.rope.dim;
        let (cpu, kv) = (workspace.cpu(), self.kv_a.forward(workspace, x));
        let mut rows = workspace.take(kv.len());
        let each = (TASK_ELEMENTS / width).max(1);
        cpu.par_chunks(&mut rows, each * width, |task, rows| {
            for (row, out) in (task * each..).zip(rows.chunks_exact_mut(width)) {
                let (c_kv, k_pe) = kv[row * width..][..width].split_at(latent);
                let (to_c_kv, to_k_pe) = out.split_at_mut(latent);
                cpu.rms_norm(to_c_kv, c_kv, &self.kv_a_norm, LATENT_NORM_EPS);
                to_k_pe.copy_from_slice(k_pe);
                self.rope.rotate(at[row] as usize, to_k_pe);
            }
        });
        for (row, seq, position) in positions(seqs) {
            cache.write(layer, seq.pages, position, &rows[row * width..][..width]);
        }
    }

    /// Queries in the latent space `[n, heads, kv_lora_rank + rope]`: (q_nope W_uk | rotated q_pe).
    fn absorbed_queries(&self, workspace: &Workspace, x: &[f32], at: &[u32]) -> Buffer {
        let cpu = workspace.cpu();
        let q = match &self.query {
            Query::Direct(q) => q.forward(workspace, x),
            Query::LowRank { a, norm, b } => {
                let low = a.forward(workspace, x);
                let mut normed = workspace.take(low.len());
                cpu.rms_norm(&mut normed, &low, norm, LATENT_NORM_EPS);
                b.forward(workspace, &normed)
            }
        };
        let (heads, latent, rope) = (self.w_uk.len(), self.kv_a_norm.len(), self.rope.dim);
        let (head_width, width) = (self.nope + rope, latent + rope);
        let mut absorbed = per_head(workspace, &self.w_uk, &q, head_width, width);
        let each = (TASK_ELEMENTS / (heads * rope)).max(1);
        cpu.par_chunks(&mut absorbed, each * heads * width, |task, absorbed| {
            let first = task * each * heads;
            for (head, out) in (first..).zip(absorbed.chunks_exact_mut(width)) {
                let q_pe = &q[head * head_width + self.nope..][..rope];
                out[latent..].copy_from_slice(q_pe);
                self.rope
                    .rotate(at[head / heads] as usize, &mut out[latent..]);
            }
        });
        absorbed
    }
}

/// Row of the batch, its sequence and its position, for every row of every sequence.
fn positions<'s, 'p>(
    seqs: &'s [SeqRows<'p>],
) -> impl Iterator<Item = (usize, &'s SeqRows<'p>, usize)> {
    seqs.iter().flat_map(|seq| {
        seq.rows
            .clone()
            .zip(seq.start..)
            .map(move |(row, position)| (row, seq, position))
    })
}

/// Applies each head's matrix to its part of rows `x` `[n, heads, x_width]`, of which it takes the first
/// elements; the results are the first elements of rows `[n, heads, out_width]`.
fn per_head(
    workspace: &Workspace,
    weights: &[Matrix],
    x: &[f32],
    x_width: usize,
    out_width: usize,
) -> Buffer {
    let layout = |width: usize| HeadLayout {
        row: weights.len() * width,
        head: width,
        offset: 0,
    };
    let n = x.len() / (weights.len() * x_width);
    let mut out = workspace.take(n * weights.len() * out_width);
    let mut heads = reused(HEADS.take());
    heads.extend(weights.iter().map(Matrix::as_ref));
    let (out_at, x_at) = (layout(out_width), layout(x_width));
    { workspace.cpu() }.matmul_heads(&mut out, out_at, x, x_at, n, &heads);
    HEADS.set(reused(heads));
    out
}

/// Rotary position embedding (Su et al. 2021) with the frequencies the configuration gives, YaRN included.
#[derive(Debug)]
pub(crate) struct Rope {
    dim: usize,
    interleaved: bool,
    inv_freq: Vec<f32>,
    factor: f32,
    /// (cos, sin) `[ROPE_BLOCK, dim / 2]` for each block of positions, made when first asked for.
    blocks: Vec<OnceLock<Vec<(f32, f32)>>>,
}

impl Rope {
    pub(crate) fn new(cfg: &Config) -> Rope {
        Rope {
            dim: cfg.qk_rope_head_dim,
            interleaved: cfg.rope.interleave,
            inv_freq: cfg.rope_inv_freq(),
            factor: cfg.rope_factor(),
            blocks: vec![OnceLock::new(); cfg.max_position_embeddings.div_ceil(ROPE_BLOCK)],
        }
    }

    /// Rotates one vector `[dim]` in place: element pairs stay where they are, so a cached k_pe has the
    /// layout of the checkpoint.
    pub(crate) fn rotate(&self, position: usize, x: &mut [f32]) {
        let half = self.dim / 2;
        let in_block = position % ROPE_BLOCK * half;
        match self.blocks.get(position / ROPE_BLOCK) {
            Some(block) => {
                let start = position - position % ROPE_BLOCK;
                let turns = block.get_or_init(|| {
                    (start..start + ROPE_BLOCK)
                        .flat_map(|p| self.turns(p))
                        .collect()
                });
                self.turn(x, turns[in_block..in_block + half].iter().copied());
            }
            None => self.turn(x, self.turns(position)),
        }
    }

    /// cos and sin of every pair at a position. The angle is an f32 product, as in the published code;
    /// cos and sin are ours, not the platform's, so that every machine has the same.
    fn turns(&self, position: usize) -> impl Iterator<Item = (f32, f32)> + '_ {
        self.inv_freq.iter().map(move |freq| {
            let (sin, cos) = libm::sincos(f64::from(position as f32 * freq));
            (cos as f32 * self.factor, sin as f32 * self.factor)
        })
    }

    fn turn(&self, x: &mut [f32], turns: impl Iterator<Item = (f32, f32)>) {
        for (i, (cos, sin)) in turns.enumerate() {
            let (a, b) = if self.interleaved {
                (2 * i, 2 * i + 1)
            } else {
                (i, i + self.dim / 2)
            };
            (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
        }
    }
}
