//! The whole family, slow and plain: the oracle of every faster path.
//!
//! One file to read beside the DeepSeek-V3 report (sections 2.1 and 2.2). Weights are called by
//! their published names, every step is one tensor operation in f32 with its shape beside it. Keys
//! and values are rebuilt in full for every head (no absorbed projections); there is no cache and
//! no batch. It uses only [`Config`] and [`Checkpoint`]; candle's types stay inside.
//!
//! Letters in shapes: n tokens, H hidden, h heads, E experts, K experts per token, V vocabulary,
//! L layers; c = `kv_lora_rank`; dn, dr, dv = widths of a head without position, with rotation,
//! and of its value.

use std::collections::HashMap;

use candle_core::{D, Device, Tensor};

use crate::checkpoint::schema;
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
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    /// Widens a whole checkpoint into memory (4 bytes a parameter).
    ///
    /// # Errors
    /// A tensor with a value that is not finite.
    pub fn load(checkpoint: &Checkpoint) -> Result<Reference> {
        let config = checkpoint.config().clone();
        let mut tensors = HashMap::new();
        // The MTP layer's own embedding and head repeat the main model's: optional, not needed.
        for spec in schema(&config).filter(|spec| !spec.optional) {
            let values = match spec.name.strip_suffix(".weight") {
                Some(name) => checkpoint.weight_f32(name)?.0,
                None => checkpoint.tensor(&spec.name)?.to_f32()?,
            };
            let tensor = Tensor::from_vec(values, spec.shape, &Device::Cpu)?;
            tensors.insert(spec.name, tensor);
        }
        Ok(Reference { config, tensors })
    }

    /// Runs the main model over a sequence from position 0.
    ///
    /// # Errors
    /// No tokens, too many, or an id outside the vocabulary.
    pub fn forward(&self, tokens: &[u32]) -> Result<Trace> {
        let (hidden, final_norm, routed) = self.run(tokens)?;
        Ok(Trace {
            logits: flat(&self.head(&final_norm)?)?,    // [n, V]
            hidden: flat(&Tensor::stack(&hidden, 0)?)?, // [L + 1, n, H]
            final_norm: flat(&final_norm)?,
            routed,
        })
    }

    /// The `n` likeliest tokens after a prompt, one after another. The end of sequence is not
    /// heeded; ties go to the lowest id.
    ///
    /// # Errors
    /// As [`Reference::forward`].
    pub fn greedy(&self, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
        let mut tokens = prompt.to_vec();
        for _ in 0..n {
            let (_, normed, _) = self.run(&tokens)?;
            let last = normed.narrow(0, tokens.len() - 1, 1)?; // [1, H]
            let logits = flat(&self.head(&last)?)?; // [V]
            tokens.push(best(&logits, 1)[0] as u32);
        }
        Ok(tokens.split_off(prompt.len()))
    }

    /// Runs the first MTP module over a sequence: row i takes `hidden[i]` and token i + 1 and
    /// drafts token i + 2.
    ///
    /// `hidden` [m, H] is the main model's output after its final norm, for every token but the
    /// last (a row for the last one is left out).
    ///
    /// # Errors
    /// A model without MTP, fewer than two tokens, or another number of hidden rows.
    pub fn mtp(&self, tokens: &[u32], hidden: &[f32]) -> Result<MtpTrace> {
        if self.config.num_nextn_predict_layers == 0 {
            return Err(ModelError::input(
                "mtp",
                "this model predicts no further tokens",
            ));
        }
        self.check(tokens)?;
        let (m, width) = (tokens.len() - 1, self.config.hidden_size);
        if m == 0 || (hidden.len() != m * width && hidden.len() != (m + 1) * width) {
            let (values, n) = (hidden.len(), tokens.len());
            let reason = format!("{values} values for {n} tokens; {width} for all but the last");
            return Err(ModelError::input("hidden", reason));
        }
        let layer = self.config.num_hidden_layers;
        let (p, eps) = (format!("model.layers.{layer}"), self.config.rms_norm_eps);
        let hidden = Tensor::from_slice(&hidden[..m * width], (m, width), &Device::Cpu)?; // [m, H]
        let hidden = self.norm(&format!("{p}.hnorm"), eps, &hidden)?;
        let next = self.norm(&format!("{p}.enorm"), eps, &self.embed(&tokens[1..])?)?; // [m, H]
        // Equation 21 writes the hidden state first; the released weights want the embedding first.
        let pair = Tensor::cat(&[next, hidden], 1)?; // [m, 2H]
        let eh = self.linear(&format!("{p}.eh_proj"), &pair)?; // [m, H]
        let (block_out, routed) = self.layer(layer, &eh)?; // [m, H]
        let normed = self.norm(&format!("{p}.shared_head.norm"), eps, &block_out)?;
        Ok(MtpTrace {
            eh: flat(&eh)?,
            block_out: flat(&block_out)?,
            draft_logits: flat(&self.head(&normed)?)?, // [m, V]
            routed,
        })
    }

    /// Hidden states [n, H] after the embedding and after each layer, the normed last one, routers.
    fn run(&self, tokens: &[u32]) -> Result<(Vec<Tensor>, Tensor, Vec<Routed>)> {
        self.check(tokens)?;
        let mut x = self.embed(tokens)?; // [n, H]
        let mut hidden = vec![x.clone()];
        let mut routed = Vec::new();
        for layer in 0..self.config.num_hidden_layers {
            let (out, choice) = self.layer(layer, &x)?; // [n, H]
            routed.extend(choice);
            hidden.push(out.clone());
            x = out;
        }
        let normed = self.norm("model.norm", self.config.rms_norm_eps, &x)?;
        Ok((hidden, normed, routed))
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?; // [n]
        let table = self.tensor("model.embed_tokens.weight")?; // [V, H]
        Ok(table.index_select(&ids, 0)?) // [n, H]
    }

    fn head(&self, normed: &Tensor) -> Result<Tensor> {
        let tied = self.config.tie_word_embeddings;
        self.linear(
            if tied {
                "model.embed_tokens"
            } else {
                "lm_head"
            },
            normed,
        ) // [n, V]
    }

    /// One decoder layer: x + attention(norm(x)), then x + ffn(norm(x)).
    fn layer(&self, layer: usize, x: &Tensor) -> Result<(Tensor, Option<Routed>)> {
        let (p, eps) = (format!("model.layers.{layer}"), self.config.rms_norm_eps);
        let normed = self.norm(&format!("{p}.input_layernorm"), eps, x)?; // [n, H]
        let x = (x + self.attention(&format!("{p}.self_attn"), &normed)?)?; // [n, H]
        let normed = self.norm(&format!("{p}.post_attention_layernorm"), eps, &x)?; // [n, H]
        let mlp = format!("{p}.mlp");
        let (y, routed) = if self.config.is_moe(layer) {
            let (y, routed) = self.moe(layer, &mlp, &normed)?;
            (y, Some(routed))
        } else {
            (self.mlp(&mlp, &normed)?, None)
        };
        Ok(((x + y)?, routed))
    }

    /// Multi-head latent attention (equations 1 to 11), keys and values rebuilt for every head.
    fn attention(&self, p: &str, x: &Tensor) -> Result<Tensor> {
        let config = &self.config;
        let (n, h, c) = (x.dim(0)?, config.num_attention_heads, config.kv_lora_rank);
        let (dn, dr, dv) = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        );

        let q = if config.q_lora_rank.is_some() {
            let low = self.linear(&format!("{p}.q_a_proj"), x)?; // [n, rank]
            let low = self.norm(&format!("{p}.q_a_layernorm"), LATENT_NORM_EPS, &low)?;
            self.linear(&format!("{p}.q_b_proj"), &low)?
        } else {
            self.linear(&format!("{p}.q_proj"), x)?
        };
        let q = q.reshape((n, h, dn + dr))?;
        let q_pe = rotate(config, &q.narrow(2, dn, dr)?)?; // [n, h, dr]
        let q = Tensor::cat(&[q.narrow(2, 0, dn)?, q_pe], 2)?; // [n, h, dn + dr]

        let latent = self.linear(&format!("{p}.kv_a_proj_with_mqa"), x)?; // [n, c + dr]
        let (c_kv, k_pe) = (latent.narrow(1, 0, c)?, latent.narrow(1, c, dr)?);
        let c_kv = self.norm(&format!("{p}.kv_a_layernorm"), LATENT_NORM_EPS, &c_kv)?; // [n, c]
        let kv = self.linear(&format!("{p}.kv_b_proj"), &c_kv)?;
        let kv = kv.reshape((n, h, dn + dv))?;
        let k_pe = rotate(config, &k_pe.reshape((n, 1, dr))?)?; // one rotated key for all heads
        let k_pe = k_pe.broadcast_as((n, h, dr))?.contiguous()?;
        let k = Tensor::cat(&[kv.narrow(2, 0, dn)?, k_pe], 2)?; // [n, h, dn + dr]
        let v = kv.narrow(2, dn, dv)?; // [n, h, dv]

        let heads_first = |t: &Tensor| t.transpose(0, 1)?.contiguous(); // [n, h, d] -> [h, n, d]
        let (q, k, v) = (heads_first(&q)?, heads_first(&k)?, heads_first(&v)?);
        let scale = f64::from(config.softmax_scale());
        let scores = (q.matmul(&k.transpose(1, 2)?)? * scale)?; // [h, n, n]
        let hide = |i: usize| {
            if i % n > i / n {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        };
        let future = Tensor::from_vec((0..n * n).map(hide).collect(), (n, n), &Device::Cpu)?;
        let scores = scores.broadcast_add(&future)?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(2)?)?; // [h, n, n], rows sum to 1
        let mixed = weights.matmul(&v)?.transpose(0, 1)?; // [n, h, dv]
        self.linear(&format!("{p}.o_proj"), &mixed.reshape((n, h * dv))?) // [n, H]
    }

    /// Shared and routed experts (equations 12 to 16).
    fn moe(&self, layer: usize, p: &str, x: &Tensor) -> Result<(Tensor, Routed)> {
        let config = &self.config;
        let logits = self.linear(&format!("{p}.gate"), x)?.to_vec2::<f32>()?; // [n, E]
        let bias = match config.has_router_bias() {
            true => Some(flat(
                self.tensor(&format!("{p}.gate.e_score_correction_bias"))?,
            )?), // [E]
            false => None,
        };
        let choose = |row: &Vec<f32>| route(config, row, bias.as_deref());
        let chosen: Vec<Vec<(u32, f32)>> = logits.iter().map(choose).collect(); // [n, K]
        let mut y = match config.n_shared_experts {
            0 => x.zeros_like()?,
            _ => self.mlp(&format!("{p}.shared_experts"), x)?,
        }; // [n, H]
        for e in 0..config.n_routed_experts as u32 {
            let weight = |row: &[(u32, f32)]| row.iter().find(|(id, _)| *id == e).map(|(_, w)| *w);
            let picked = chosen
                .iter()
                .zip(0..)
                .filter_map(|(row, i)| Some((i, weight(row)?)));
            let (rows, weights): (Vec<u32>, Vec<f32>) = picked.unzip();
            let m = rows.len();
            if m == 0 {
                continue;
            }
            let rows = Tensor::from_vec(rows, m, &Device::Cpu)?;
            let weights = Tensor::from_vec(weights, (m, 1), &Device::Cpu)?;
            let out = self.mlp(&format!("{p}.experts.{e}"), &x.index_select(&rows, 0)?)?; // [m, H]
            y = y.index_add(&rows, &out.broadcast_mul(&weights)?, 0)?;
        }
        let logits = logits.concat();
        let (ids, weights) = chosen.into_iter().flatten().unzip();
        Ok((
            y,
            Routed {
                layer,
                ids,
                weights,
                logits,
            },
        ))
    }

    /// down(silu(gate x) * up x).
    fn mlp(&self, p: &str, x: &Tensor) -> Result<Tensor> {
        let gate = self.linear(&format!("{p}.gate_proj"), x)?.silu()?; // [n, inner]
        let up = self.linear(&format!("{p}.up_proj"), x)?; // [n, inner]
        self.linear(&format!("{p}.down_proj"), &(gate * up)?) // [n, H]
    }

    /// x Wᵀ, plus the bias where there is one (`attention_bias`).
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.tensor(&format!("{name}.weight"))?; // [out, in]
        let y = x.matmul(&weight.t()?)?; // [n, in] [in, out] -> [n, out]
        match self.tensors.get(&format!("{name}.bias")) {
            Some(bias) => Ok(y.broadcast_add(bias)?),
            None => Ok(y),
        }
    }

    /// x / sqrt(mean(x²) + eps) * weight, over the last dimension.
    fn norm(&self, name: &str, eps: f32, x: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?; // [n, 1]
        let x = x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?;
        Ok(x.broadcast_mul(self.tensor(&format!("{name}.weight"))?)?)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        let missing = || ModelError::input("tensor", format!("`{name}` was not loaded"));
        self.tensors.get(name).ok_or_else(missing)
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let (longest, vocab) = (self.config.max_position_embeddings, self.config.vocab_size);
        let reason = match tokens.iter().find(|&&t| t as usize >= vocab) {
            _ if tokens.is_empty() => "none; at least one is needed".into(),
            _ if tokens.len() > longest => format!("{}; at most {longest}", tokens.len()),
            Some(t) => format!("id {t} is outside the vocabulary of {vocab}"),
            None => return Ok(()),
        };
        Err(ModelError::input("tokens", reason))
    }
}

/// Rotates pairs of the last dimension of [n, heads, dr] by position times frequency.
fn rotate(config: &Config, x: &Tensor) -> Result<Tensor> {
    let (n, heads, dr) = x.dims3()?;
    let (freqs, factor) = (config.rope_inv_freq(), config.rope_factor());
    let angles = (0..n).flat_map(|p| freqs.iter().map(move |f| p as f32 * f)); // [n, dr / 2]
    let turn = |a: f32| (libm::cosf(a) * factor, libm::sinf(a) * factor);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(turn).unzip();
    // The two halves of a pair lie next to each other, or half the width apart.
    let (pairs, table, halves) = if config.rope.interleave {
        ((n, heads, dr / 2, 2), (n, 1, dr / 2, 1), 3)
    } else {
        ((n, heads, 2, dr / 2), (n, 1, 1, dr / 2), 2)
    };
    let cos = Tensor::from_vec(cos, table, &Device::Cpu)?;
    let sin = Tensor::from_vec(sin, table, &Device::Cpu)?;
    let x = x.reshape(pairs)?;
    let (a, b) = (x.narrow(halves, 0, 1)?, x.narrow(halves, 1, 1)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Ok(Tensor::cat(&[first, second], halves)?.reshape((n, heads, dr))?)
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
    // The bias has a say in the choice only, never in the weight (section 2.1.2).
    let mut choice: Vec<f32> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
        None => scores.clone(),
    };
    let groups = config.routing_groups();
    if groups > 1 {
        let size = choice.len() / groups;
        // With a bias a group counts by the sum of its two best, in V2 by its best.
        let counted = if config.topk_method == TopkMethod::NoauxTc {
            2
        } else {
            1
        };
        let worth = |g: &[f32]| best(g, counted).iter().map(|&i| g[i]).sum();
        let kept = best(
            &choice.chunks(size).map(worth).collect::<Vec<f32>>(),
            config.topk_group,
        );
        for (g, others) in choice.chunks_mut(size).enumerate() {
            if !kept.contains(&g) {
                // Not 0: a kept score may be negative and must still win.
                others.fill(f32::NEG_INFINITY);
            }
        }
    }
    let mut ids = best(&choice, config.num_experts_per_tok);
    ids.sort_unstable();
    let sum: f32 = ids.iter().map(|&i| scores[i]).sum();
    let norm = if config.norm_topk_prob {
        sum + 1e-20
    } else {
        1.0
    };
    let weight = |i: usize| scores[i] / norm * config.routed_scaling_factor;
    ids.iter().map(|&i| (i as u32, weight(i))).collect()
}

/// Indices of the `k` largest values, largest first; equal values by lowest index.
fn best(values: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let key = |i: usize| values[i] + 0.0; // makes the two zeros equal
    order.sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// All elements, row by row.
fn flat(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}
