//! What a model of the family is, read from `config.json`.
//!
//! The secret kept here is the spelling: three model types, two spellings of
//! RoPE, null against absent, and the defaults each of them has. Everything
//! else sees one [`Config`] in which the differences are data. A file that is
//! unknown or inconsistent is refused with its field named.

use std::path::Path;

use serde::Serialize;

use crate::ModelError;

mod check;
mod fields;
pub(crate) mod packed;
mod read;

pub(crate) use packed::Role;
pub use packed::{Form, Packed};

/// Epsilon of `q_a_layernorm` and `kv_a_layernorm`: the published models use the norm's
/// default here, whatever `rms_norm_eps` says.
pub const LATENT_NORM_EPS: f32 = 1e-6;

/// Edge of the square blocks that share one FP8 scale.
pub const FP8_BLOCK: usize = 128;

/// How router logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Each expert alone (DeepSeek-V3 report, eq. 15).
    Sigmoid,
    /// Over all experts (DeepSeek-V2 report, eq. 22).
    Softmax,
}

/// How the selected experts are chosen from the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TopkMethod {
    /// Score plus bias chooses; a group counts by the sum of its two best; the bias never weighs.
    NoauxTc,
    /// The best scores, no groups.
    Greedy,
    /// A group counts by its best score.
    GroupLimitedGreedy,
}

/// YaRN context extension (Peng et al. 2023), as the family uses it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Yarn {
    /// How many times the original context is stretched.
    pub factor: f64,
    /// Positions the model was trained on first.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a dimension is left alone.
    pub beta_fast: f64,
    /// Rotations below which a dimension is fully interpolated.
    pub beta_slow: f64,
    /// Numerator of the cos/sin factor; None when absent (not the same as 1).
    pub mscale: Option<f64>,
    /// Denominator of the cos/sin factor, and the correction of the softmax scale.
    pub mscale_all_dim: Option<f64>,
    /// The cos/sin factor given outright.
    pub attention_factor: Option<f64>,
    /// Whether the ends of the ramp are rounded outwards to whole dimensions.
    pub truncate: bool,
}

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Pairs are (2i, 2i+1) when set, (i, i + d/2) when not.
    pub interleave: bool,
    /// Context extension, if any.
    pub yarn: Option<Yarn>,
}

/// One model of the family. Widths count elements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// `deepseek_v2`, `deepseek_v3` or `kimi_k2`; for showing only, behaviour is in the other
    /// fields.
    pub model_type: String,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense layer's MLP.
    pub intermediate_size: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Decoder layers of the main model.
    pub num_hidden_layers: usize,
    /// Multi-token-prediction layers after them.
    pub num_nextn_predict_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Rank of the query's down-projection; None when queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Rank of the cached latent c_kv.
    pub kv_lora_rank: usize,
    /// Width per head without position.
    pub qk_nope_head_dim: usize,
    /// Width per head that is rotated; also the width of the shared k_pe.
    pub qk_rope_head_dim: usize,
    /// Width of one head's value.
    pub v_head_dim: usize,
    /// Routed experts of a MoE layer; 0 when every layer is dense.
    pub n_routed_experts: usize,
    /// Shared experts of a MoE layer, fused into one MLP; may be 0.
    pub n_shared_experts: usize,
    /// Routed experts per token.
    pub num_experts_per_tok: usize,
    /// Groups of consecutive experts.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// Layers before this index are dense.
    pub first_k_dense_replace: usize,
    /// Every how many layers there is a MoE layer.
    pub moe_layer_freq: usize,
    /// Router scores.
    pub scoring_func: Scoring,
    /// Router choice.
    pub topk_method: TopkMethod,
    /// Whether the chosen weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// What the chosen weights are multiplied by at last.
    pub routed_scaling_factor: f32,
    /// Epsilon of all norms but the two latent ones ([`LATENT_NORM_EPS`]).
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have a bias.
    pub attention_bias: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether linear weights may be FP8 e4m3 with 128x128 block scales.
    pub fp8: bool,
    /// Which weights are packed integers, if any are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packed: Option<Packed>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Any of these ends a sequence.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// Reads `config.json` of a checkpoint, and the end-of-sequence ids of
    /// `generation_config.json` if there is one.
    pub fn from_dir(dir: &Path) -> Result<Config, ModelError> {
        read::from_dir(dir)
    }

    /// Reads the text of a `config.json`.
    pub fn from_json(text: &str) -> Result<Config, ModelError> {
        read::from_json(text)
    }

    /// Whether a layer routes to experts. The MTP layers (index >= `num_hidden_layers`) do when
    /// the model has experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.n_routed_experts > 0
            && layer >= self.first_k_dense_replace
            && (layer >= self.num_hidden_layers || layer.is_multiple_of(self.moe_layer_freq))
    }

    /// MoE layers of the main model (without MTP), ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.num_hidden_layers).filter(|&l| self.is_moe(l))
    }

    /// MoE layers of the main model and the MTP layers, ascending: all layers whose experts need a
    /// home.
    pub fn expert_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.num_hidden_layers + self.num_nextn_predict_layers).filter(|&l| self.is_moe(l))
    }

    /// Elements cached per token and layer: c_kv and k_pe.
    pub fn latent_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Width of one head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Inner width of the fused shared experts; 0 when there are none.
    pub fn shared_intermediate_size(&self) -> usize {
        self.n_shared_experts * self.moe_intermediate_size
    }

    /// Whether the router has `e_score_correction_bias`.
    pub fn has_router_bias(&self) -> bool {
        self.topk_method == TopkMethod::NoauxTc
    }

    /// Groups the router really limits itself to: `n_group` unless the method ignores groups.
    pub fn routing_groups(&self) -> usize {
        if self.topk_method == TopkMethod::Greedy {
            1
        } else {
            self.n_group
        }
    }

    /// What attention scores are multiplied by: qk_head_dim^-0.5, times mscale² under YaRN.
    pub fn softmax_scale(&self) -> f32 {
        let base = 1.0 / libm::sqrt(self.qk_head_dim() as f64);
        let m = match self.rope.yarn {
            Some(Yarn {
                factor,
                mscale_all_dim: Some(all),
                ..
            }) if all != 0.0 => yarn_mscale(factor, all),
            _ => 1.0,
        };
        (base * m * m) as f32
    }

    /// What cos and sin are multiplied by (1 without YaRN, and for every released model).
    pub fn rope_factor(&self) -> f32 {
        let Some(y) = self.rope.yarn else { return 1.0 };
        let factor = match (y.attention_factor, y.mscale, y.mscale_all_dim) {
            (Some(given), _, _) => given,
            (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                yarn_mscale(y.factor, m) / yarn_mscale(y.factor, all)
            }
            _ => yarn_mscale(y.factor, 1.0),
        };
        factor as f32
    }

    /// Rotation per position of each of the `qk_rope_head_dim / 2` pairs, in radians.
    pub fn rope_inv_freq(&self) -> Vec<f32> {
        let dim = self.qk_rope_head_dim;
        let plain = |i: usize| 1.0 / libm::pow(self.rope.theta, (2 * i) as f64 / dim as f64);
        let Some(y) = self.rope.yarn else {
            return (0..dim / 2).map(|i| plain(i) as f32).collect();
        };
        // The dimension that turns `rotations` times over the original context.
        let turning = |rotations: f64| {
            let period = y.original_max_position_embeddings as f64
                / (rotations * 2.0 * std::f64::consts::PI);
            dim as f64 * libm::log(period) / (2.0 * libm::log(self.rope.theta))
        };
        let (mut low, mut high) = (turning(y.beta_fast), turning(y.beta_slow));
        if y.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min((dim - 1) as f64));
        if low == high {
            high += 0.001;
        }
        (0..dim / 2)
            .map(|i| {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (plain(i) / y.factor * ramp + plain(i) * (1.0 - ramp)) as f32
            })
            .collect()
    }

    /// f32 elements of latent cache per token, over all layers of the main model and the MTP
    /// layers.
    pub fn kv_elements_per_token(&self) -> usize {
        (self.num_hidden_layers + self.num_nextn_predict_layers) * self.latent_width()
    }

    /// Parameters of one routed expert.
    pub fn expert_parameters(&self) -> u64 {
        3 * self.hidden_size as u64 * self.moe_intermediate_size as u64
    }

    /// Parameters of the whole model as the checkpoint must hold it (MTP included, its copies of
    /// embedding and head not).
    pub fn parameters(&self) -> u64 {
        crate::checkpoint::schema(self)
            .filter(|t| !t.optional)
            .map(|t| t.elements())
            .sum()
    }

    /// Parameters that one token touches in the main model: everything but the experts it is not
    /// routed to and the embedding rows of others.
    pub fn active_parameters(&self) -> u64 {
        let idle =
            (self.n_routed_experts - self.num_experts_per_tok) as u64 * self.expert_parameters();
        let main = Config {
            num_nextn_predict_layers: 0,
            ..self.clone()
        };
        let embedding = if self.tie_word_embeddings {
            0
        } else {
            (self.vocab_size - 1) as u64 * self.hidden_size as u64
        };
        main.parameters() - idle * self.moe_layers().count() as u64 - embedding
    }
}

/// Attention temperature of YaRN: 0.1 m ln(factor) + 1.
fn yarn_mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * m * libm::log(factor) + 1.0
    }
}
