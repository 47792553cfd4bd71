//! The whole family, slow and plain: the oracle of every faster path.
//!
//! One file to read beside the DeepSeek-V3 report (sections 2.1 and 2.2). Every step is one tensor operation in f32 with
//! its shape beside it; keys and values are rebuilt in full for every head (no absorbed projections), there is no cache
//! and no batch. It uses only [`Config`] and [`Checkpoint`]; candle's types stay inside. Letters in shapes: n tokens,
//! H hidden, h heads, E experts, K experts per token, V vocabulary, L layers; c = `kv_lora_rank`, dn, dr, dv = widths
//! of a head without position, with rotation, and of its value.

use candle_core::{D, Device, Tensor};

use crate::config::{LATENT_NORM_EPS, Scoring, TopkMethod};
use crate::{Checkpoint, Config, ModelError};

type Result<T> = std::result::Result<T, ModelError>;

/// What one MoE layer's router did.
#[derive(Debug, Clone)]
pub struct Routed {
    /// The layer.
    pub layer: usize,
    /// Chosen experts [n, K], ascending in each row.
    pub ids: Vec<u32>,
    /// Their weights [n, K], normalised and scaled as the configuration says.
    pub weights: Vec<f32>,
    /// Logits of all experts [n, E].
    pub logits: Vec<f32>,
}

/// Everything a forward pass went through.
#[derive(Debug, Clone)]
pub struct Trace {
    /// [n, V]; row i scores token i + 1.
    pub logits: Vec<f32>,
    /// [L + 1, n, H]: the embedding, then the output of each layer, before the final norm.
    pub hidden: Vec<f32>,
    /// [n, H].
    pub final_norm: Vec<f32>,
    /// One per MoE layer, ascending.
    pub routed: Vec<Routed>,
}

/// Everything the multi-token-prediction module went through.
#[derive(Debug, Clone)]
pub struct MtpTrace {
    /// [m, H]: what enters its layer.
    pub eh: Vec<f32>,
    /// [m, H]: what leaves it, before its norm.
    pub block_out: Vec<f32>,
    /// [m, V]; row i scores token i + 2.
    pub draft_logits: Vec<f32>,
    /// Its router, if its layer has experts.
    pub routed: Option<Routed>,
}

/// A model in memory, all weights widened to f32.
pub struct Reference {
    config: Config,
    embed: Tensor, // [V, H]
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear, // [V, H]
    mtp: Option<Mtp>,
}

struct Linear {
    weight: Tensor,       // [out, in]
    bias: Option<Tensor>, // [out]
}

struct Norm {
    weight: Tensor, // [width]
    eps: f32,
}

struct Mlp {
    gate: Linear, // [inner, H]
    up: Linear,   // [inner, H]
    down: Linear, // [H, inner]
}

enum Query {
    Direct(Linear),                                // [h (dn + dr), H]
    LowRank { a: Linear, norm: Norm, b: Linear }, // [r, H], [r], [h (dn + dr), r]
}

struct Attention {
    query: Query,
    kv_a: Linear, // [c + dr, H]
    kv_norm: Norm,
    kv_b: Linear, // [h (dn + dv), c]
    out: Linear,  // [H, h dv]
}

struct Moe {
    layer: usize,
    gate: Linear,           // [E, H]
    bias: Option<Vec<f32>>, // [E]
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
}

enum Ffn {
    Dense(Mlp),
    Moe(Moe),
}

struct Layer {
    input_norm: Norm,
    attention: Attention,
    post_norm: Norm,
    ffn: Ffn,
}

struct Mtp {
    enorm: Norm,
    hnorm: Norm,
    eh_proj: Linear, // [H, 2H]
    layer: Layer,
    norm: Norm,
}

impl Reference {
    /// Widens a whole checkpoint into memory (4 bytes a parameter).
    ///
    /// # Errors
    /// A tensor with a value that is not finite.
    pub fn load(checkpoint: &Checkpoint) -> Result<Reference> {
        let config = checkpoint.config().clone();
        let from = Load { checkpoint, config: &config };
        let embed = from.linear("model.embed_tokens")?;
        let head = if config.tie_word_embeddings { from.linear("model.embed_tokens")? } else { from.linear("lm_head")? };
        let layers = (0..config.num_hidden_layers).map(|l| from.layer(l)).collect::<Result<_>>()?;
        let mtp = if config.num_nextn_predict_layers > 0 { Some(from.mtp(config.num_hidden_layers)?) } else { None };
        let norm = from.norm("model.norm", config.rms_norm_eps)?;
        Ok(Reference { embed: embed.weight, layers, norm, head, mtp, config })
    }

    /// Runs the main model over a sequence from position 0.
    ///
    /// # Errors
    /// No tokens, too many, or an id outside the vocabulary.
    pub fn forward(&self, tokens: &[u32]) -> Result<Trace> {
        let (hidden, final_norm, routed) = self.run(tokens)?;
        Ok(Trace {
            logits: flat(&self.head.forward(&final_norm)?)?, // [n, V]
            hidden: flat(&Tensor::stack(&hidden, 0)?)?,      // [L + 1, n, H]
            final_norm: flat(&final_norm)?,
            routed,
        })
    }

    /// The `n` likeliest tokens after a prompt, one after another; end of sequence is not heeded, ties go to the lowest id.
    ///
    /// # Errors
    /// As [`Reference::forward`].
    pub fn greedy(&self, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
        let mut tokens = prompt.to_vec();
        for _ in 0..n {
            let (_, normed, _) = self.run(&tokens)?;
            let last = normed.narrow(0, tokens.len() - 1, 1)?; // [1, H]
            let logits = flat(&self.head.forward(&last)?)?; // [V]
            tokens.push(best(&logits, 1)[0] as u32);
        }
        Ok(tokens.split_off(prompt.len()))
    }

    /// Runs the first MTP module over a sequence: row i takes `hidden[i]` and token i + 1 and drafts token i + 2.
    ///
    /// `hidden` [m, H] is the main model's output after its final norm, m one less than the tokens (or as many; the last row is left out).
    ///
    /// # Errors
    /// A model without MTP, fewer than two tokens, or another number of hidden rows.
    pub fn mtp(&self, tokens: &[u32], hidden: &[f32]) -> Result<MtpTrace> {
        let Some(mtp) = &self.mtp else { return Err(ModelError::input("mtp", "this model has no multi-token-prediction layer")) };
        self.check(tokens)?;
        let (m, width) = (tokens.len() - 1, self.config.hidden_size);
        if m == 0 || (hidden.len() != m * width && hidden.len() != (m + 1) * width) {
            let reason = format!("{} values for {} tokens; a row of {width} for every token but the last", hidden.len(), tokens.len());
            return Err(ModelError::input("hidden", reason));
        }
        let hidden = Tensor::from_slice(&hidden[..m * width], (m, width), &Device::Cpu)?; // [m, H]
        let next = self.embed_tokens(&tokens[1..])?; // [m, H]
        // The report's equation 21 writes the hidden state first; the released weights want the embedding first.
        let pair = Tensor::cat(&[mtp.enorm.forward(&next)?, mtp.hnorm.forward(&hidden)?], 1)?; // [m, 2H]
        let eh = mtp.eh_proj.forward(&pair)?; // [m, H]
        let (block_out, routed) = mtp.layer.forward(&self.config, &eh)?; // [m, H]
        let draft_logits = self.head.forward(&mtp.norm.forward(&block_out)?)?; // [m, V]
        Ok(MtpTrace { eh: flat(&eh)?, block_out: flat(&block_out)?, draft_logits: flat(&draft_logits)?, routed })
    }

    fn run(&self, tokens: &[u32]) -> Result<(Vec<Tensor>, Tensor, Vec<Routed>)> {
        self.check(tokens)?;
        let mut x = self.embed_tokens(tokens)?; // [n, H]
        let mut hidden = vec![x.clone()];
        let mut routed = Vec::new();
        for layer in &self.layers {
            let (out, choice) = layer.forward(&self.config, &x)?; // [n, H]
            routed.extend(choice);
            hidden.push(out.clone());
            x = out;
        }
        Ok((hidden, self.norm.forward(&x)?, routed))
    }

    fn embed_tokens(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?; // [n]
        Ok(self.embed.index_select(&ids, 0)?) // [n, H]
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let (longest, vocab) = (self.config.max_position_embeddings, self.config.vocab_size);
        if tokens.is_empty() || tokens.len() > longest {
            return Err(ModelError::input("tokens", format!("{} of them; from 1 to {longest} are possible", tokens.len())));
        }
        match tokens.iter().find(|&&t| t as usize >= vocab) {
            Some(t) => Err(ModelError::input("tokens", format!("id {t} is outside the vocabulary of {vocab}"))),
            None => Ok(()),
        }
    }
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?; // [n, in] [in, out] -> [n, out]
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

impl Norm {
    /// x / sqrt(mean(x²) + eps) * weight, over the last dimension.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?; // [n, 1]
        let x = x.broadcast_div(&(mean + f64::from(self.eps))?.sqrt()?)?;
        Ok(x.broadcast_mul(&self.weight)?)
    }
}

impl Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let inner = (self.gate.forward(x)?.silu()? * self.up.forward(x)?)?; // [n, inner]
        self.down.forward(&inner) // [n, H]
    }
}

impl Layer {
    fn forward(&self, config: &Config, x: &Tensor) -> Result<(Tensor, Option<Routed>)> {
        let x = (x + self.attention.forward(config, &self.input_norm.forward(x)?)?)?; // [n, H]
        let normed = self.post_norm.forward(&x)?; // [n, H]
        let (y, routed) = match &self.ffn {
            Ffn::Dense(mlp) => (mlp.forward(&normed)?, None),
            Ffn::Moe(moe) => {
                let (y, routed) = moe.forward(config, &normed)?;
                (y, Some(routed))
            }
        };
        Ok(((x + y)?, routed))
    }
}

impl Attention {
    /// Multi-head latent attention (report, equations 1 to 11), keys and values rebuilt for every head.
    fn forward(&self, config: &Config, x: &Tensor) -> Result<Tensor> {
        let (n, h) = (x.dim(0)?, config.num_attention_heads);
        let (c, dn, dr, dv) = (config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim);
        let q = match &self.query {
            Query::Direct(q) => q.forward(x)?,
            Query::LowRank { a, norm, b } => b.forward(&norm.forward(&a.forward(x)?)?)?,
        };
        let q = q.reshape((n, h, dn + dr))?;
        let q_pe = rotate(config, &q.narrow(2, dn, dr)?)?; // [n, h, dr]
        let q = Tensor::cat(&[q.narrow(2, 0, dn)?, q_pe], 2)?; // [n, h, dn + dr]

        let latent = self.kv_a.forward(x)?; // [n, c + dr]
        let c_kv = self.kv_norm.forward(&latent.narrow(1, 0, c)?)?; // [n, c]
        let k_pe = latent.narrow(1, c, dr)?.reshape((n, 1, dr))?;
        let k_pe = rotate(config, &k_pe)?.broadcast_as((n, h, dr))?; // one key for all heads
        let kv = self.kv_b.forward(&c_kv)?.reshape((n, h, dn + dv))?;
        let k = Tensor::cat(&[kv.narrow(2, 0, dn)?, k_pe.contiguous()?], 2)?; // [n, h, dn + dr]
        let v = kv.narrow(2, dn, dv)?; // [n, h, dv]

        let heads_first = |t: &Tensor| t.transpose(0, 1).and_then(|t| t.contiguous()); // [n, h, d] -> [h, n, d]
        let (q, k, v) = (heads_first(&q)?, heads_first(&k)?, heads_first(&v)?);
        let scores = (q.matmul(&k.transpose(1, 2)?)? * f64::from(config.softmax_scale()))?; // [h, n, n]
        let future: Vec<f32> = (0..n * n).map(|i| if i % n > i / n { f32::NEG_INFINITY } else { 0.0 }).collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(future, (n, n), &Device::Cpu)?)?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(2)?)?; // [h, n, n], rows sum to 1
        let mixed = weights.matmul(&v)?.transpose(0, 1)?.reshape((n, h * dv))?;
        self.out.forward(&mixed) // [n, H]
    }
}

/// Rotates pairs of the last dimension of [n, heads, dr] by position times frequency.
fn rotate(config: &Config, x: &Tensor) -> Result<Tensor> {
    let (n, heads, dr) = x.dims3()?;
    let (freqs, factor) = (config.rope_inv_freq(), config.rope_factor());
    let angles = (0..n).flat_map(|p| freqs.iter().map(move |f| p as f32 * f)); // [n, dr / 2]
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (libm::cosf(a) * factor, libm::sinf(a) * factor)).unzip();
    // The two halves of a pair lie next to each other, or half the width apart.
    let (pairs, table, halves) = if config.rope.interleave {
        ((n, heads, dr / 2, 2), (n, 1, dr / 2, 1), 3)
    } else {
        ((n, heads, 2, dr / 2), (n, 1, 1, dr / 2), 2)
    };
    let (cos, sin) = (Tensor::from_vec(cos, table, &Device::Cpu)?, Tensor::from_vec(sin, table, &Device::Cpu)?);
    let x = x.reshape(pairs)?;
    let (a, b) = (x.narrow(halves, 0, 1)?, x.narrow(halves, 1, 1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Ok(Tensor::cat(&[first, second], halves)?.reshape((n, heads, dr))?)
}

impl Moe {
    /// Routed and shared experts (report, equations 12 to 16).
    fn forward(&self, config: &Config, x: &Tensor) -> Result<(Tensor, Routed)> {
        let logits = self.gate.forward(x)?.to_vec2::<f32>()?; // [n, E]
        let chosen: Vec<Vec<(u32, f32)>> = logits.iter().map(|row| route(config, row, self.bias.as_deref())).collect(); // [n, K]
        let mut y = match &self.shared {
            Some(shared) => shared.forward(x)?,
            None => x.zeros_like()?,
        }; // [n, H]
        for (e, expert) in self.experts.iter().enumerate() {
            let of_expert = |row: &Vec<(u32, f32)>| row.iter().find(|(id, _)| *id == e as u32).map(|(_, w)| *w);
            let picked = chosen.iter().enumerate().filter_map(|(i, row)| Some((i as u32, of_expert(row)?)));
            let (rows, weights): (Vec<u32>, Vec<f32>) = picked.unzip();
            if rows.is_empty() {
                continue;
            }
            let m = rows.len();
            let rows = Tensor::from_vec(rows, m, &Device::Cpu)?;
            let out = expert.forward(&x.index_select(&rows, 0)?)?; // [m, H]
            let out = out.broadcast_mul(&Tensor::from_vec(weights, (m, 1), &Device::Cpu)?)?;
            y = y.index_add(&rows, &out, 0)?;
        }
        let (ids, weights) = chosen.into_iter().flatten().unzip();
        Ok((y, Routed { layer: self.layer, ids, weights, logits: logits.concat() }))
    }
}

/// The experts of one token and their weights, ascending by expert.
fn route(config: &Config, logits: &[f32], bias: Option<&[f32]>) -> Vec<(u32, f32)> {
    let scores: Vec<f32> = match config.scoring_func {
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
            let sum: f32 = exp.iter().sum();
            exp.iter().map(|x| x / sum).collect()
        }
    };
    // The bias has a say in the choice only, never in the weight (report, section 2.1.2).
    let mut choice: Vec<f32> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
        None => scores.clone(),
    };
    let groups = config.routing_groups();
    if groups > 1 {
        let size = choice.len() / groups;
        let counted = if config.topk_method == TopkMethod::NoauxTc { 2 } else { 1 };
        let worth: Vec<f32> = choice.chunks(size).map(|g| best(g, counted).iter().map(|&i| g[i]).sum()).collect();
        let kept = best(&worth, config.topk_group);
        // Not 0 for the others: a kept score may be negative and must still win.
        let others = choice.chunks_mut(size).enumerate().filter(|(g, _)| !kept.contains(g));
        others.for_each(|(_, group)| group.fill(f32::NEG_INFINITY));
    }
    let mut ids = best(&choice, config.num_experts_per_tok);
    ids.sort_unstable();
    let sum: f32 = ids.iter().map(|&i| scores[i]).sum();
    let norm = if config.norm_topk_prob { sum + 1e-20 } else { 1.0 };
    ids.iter().map(|&i| (i as u32, scores[i] / norm * config.routed_scaling_factor)).collect()
}

/// Indices of the `k` largest values, largest first; equal values by lowest index.
fn best(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // Adding zero makes the two zeros equal.
    order.sort_by(|&a, &b| (values[b] + 0.0).total_cmp(&(values[a] + 0.0)).then(a.cmp(&b)));
    order.truncate(k);
    order
}

fn flat(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Finds the tensors of each part by their published names.
struct Load<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
}

impl Load<'_> {
    fn linear(&self, name: &str) -> Result<Linear> {
        let (values, shape) = self.checkpoint.weight_f32(name)?;
        Ok(Linear { weight: Tensor::from_vec(values, shape, &Device::Cpu)?, bias: None })
    }

    /// A projection that has a bias where `attention_bias` says so.
    fn biased(&self, name: &str) -> Result<Linear> {
        let mut linear = self.linear(name)?;
        if self.config.attention_bias {
            let bias = self.checkpoint.tensor(&format!("{name}.bias"))?.to_f32()?;
            linear.bias = Some(Tensor::new(bias, &Device::Cpu)?);
        }
        Ok(linear)
    }

    fn norm(&self, name: &str, eps: f32) -> Result<Norm> {
        Ok(Norm { weight: self.linear(name)?.weight, eps })
    }

    fn mlp(&self, p: &str) -> Result<Mlp> {
        let part = |name: &str| self.linear(&format!("{p}.{name}_proj"));
        Ok(Mlp { gate: part("gate")?, up: part("up")?, down: part("down")? })
    }

    fn attention(&self, p: &str) -> Result<Attention> {
        let query = match self.config.q_lora_rank {
            None => Query::Direct(self.linear(&format!("{p}.q_proj"))?),
            Some(_) => Query::LowRank {
                a: self.biased(&format!("{p}.q_a_proj"))?,
                norm: self.norm(&format!("{p}.q_a_layernorm"), LATENT_NORM_EPS)?,
                b: self.linear(&format!("{p}.q_b_proj"))?,
            },
        };
        Ok(Attention {
            query,
            kv_a: self.biased(&format!("{p}.kv_a_proj_with_mqa"))?,
            kv_norm: self.norm(&format!("{p}.kv_a_layernorm"), LATENT_NORM_EPS)?,
            kv_b: self.linear(&format!("{p}.kv_b_proj"))?,
            out: self.biased(&format!("{p}.o_proj"))?,
        })
    }

    fn moe(&self, layer: usize, p: &str) -> Result<Moe> {
        let c = self.config;
        let bias = format!("{p}.gate.e_score_correction_bias");
        Ok(Moe {
            layer,
            gate: self.linear(&format!("{p}.gate"))?,
            bias: if c.has_router_bias() { Some(self.checkpoint.tensor(&bias)?.to_f32()?) } else { None },
            experts: (0..c.n_routed_experts).map(|e| self.mlp(&format!("{p}.experts.{e}"))).collect::<Result<_>>()?,
            shared: if c.n_shared_experts > 0 { Some(self.mlp(&format!("{p}.shared_experts"))?) } else { None },
        })
    }

    fn layer(&self, layer: usize) -> Result<Layer> {
        let (p, eps) = (format!("model.layers.{layer}"), self.config.rms_norm_eps);
        let mlp = format!("{p}.mlp");
        Ok(Layer {
            input_norm: self.norm(&format!("{p}.input_layernorm"), eps)?,
            attention: self.attention(&format!("{p}.self_attn"))?,
            post_norm: self.norm(&format!("{p}.post_attention_layernorm"), eps)?,
            ffn: if self.config.is_moe(layer) { Ffn::Moe(self.moe(layer, &mlp)?) } else { Ffn::Dense(self.mlp(&mlp)?) },
        })
    }

    /// The module's copies of embedding and head are the main model's, so they are not read.
    fn mtp(&self, layer: usize) -> Result<Mtp> {
        let (p, eps) = (format!("model.layers.{layer}"), self.config.rms_norm_eps);
        Ok(Mtp {
            enorm: self.norm(&format!("{p}.enorm"), eps)?,
            hnorm: self.norm(&format!("{p}.hnorm"), eps)?,
            eh_proj: self.linear(&format!("{p}.eh_proj"))?,
            layer: self.layer(layer)?,
            norm: self.norm(&format!("{p}.shared_head.norm"), eps)?,
        })
    }
}
