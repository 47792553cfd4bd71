//! The names and shapes of every tensor a configuration calls for.

use super::Stored;
use crate::Config;

/// One tensor that a configuration calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name.
    pub name: String,
    /// Rows first; [out, in] for linear weights.
    pub shape: Vec<usize>,
    /// Whether it may be stored as FP8 with block scales (`{name}_scale_inv`).
    pub quantizable: bool,
    /// Whether the checkpoint may leave it out (copies that the MTP layer keeps of the main
    /// model's tensors).
    pub optional: bool,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    /// Whether a dtype is acceptable for it.
    pub fn accepts(&self, dtype: Stored) -> bool {
        match dtype {
            Stored::F32 | Stored::Bf16 | Stored::F16 => true,
            Stored::F8E4M3 => self.quantizable,
            Stored::U8 | Stored::I32 => false,
        }
    }
}

fn plain(name: String, shape: &[usize]) -> TensorSpec {
    TensorSpec {
        name,
        shape: shape.to_vec(),
        quantizable: false,
        optional: false,
    }
}

fn norm(name: String, width: usize) -> TensorSpec {
    plain(format!("{name}.weight"), &[width])
}

fn linear(c: &Config, name: String, out: usize, inp: usize) -> TensorSpec {
    TensorSpec {
        quantizable: c.fp8,
        ..plain(format!("{name}.weight"), &[out, inp])
    }
}

fn mlp(c: &Config, p: &str, inner: usize) -> [TensorSpec; 3] {
    [
        linear(c, format!("{p}.gate_proj"), inner, c.hidden_size),
        linear(c, format!("{p}.up_proj"), inner, c.hidden_size),
        linear(c, format!("{p}.down_proj"), c.hidden_size, inner),
    ]
}

/// The three matrices of one routed expert.
pub(super) fn expert(c: &Config, layer: usize, expert: usize) -> [TensorSpec; 3] {
    mlp(
        c,
        &format!("model.layers.{layer}.mlp.experts.{expert}"),
        c.moe_intermediate_size,
    )
}

/// Everything a checkpoint of this configuration must hold, in model order: embedding, layers,
/// final norm, head, MTP layers.
///
/// Block scales of FP8 weights are not listed: they go with the weight that is stored so.
pub fn schema(c: &Config) -> impl Iterator<Item = TensorSpec> + '_ {
    let head = (!c.tie_word_embeddings)
        .then(|| plain("lm_head.weight".into(), &[c.vocab_size, c.hidden_size]));
    std::iter::once(plain(
        "model.embed_tokens.weight".into(),
        &[c.vocab_size, c.hidden_size],
    ))
    .chain((0..c.num_hidden_layers).flat_map(|l| layer(c, l)))
    .chain(std::iter::once(norm("model.norm".into(), c.hidden_size)))
    .chain(head)
    .chain((0..c.num_nextn_predict_layers).flat_map(|k| mtp(c, c.num_hidden_layers + k)))
}

/// A decoder layer; experts are made lazily, there may be hundreds.
fn layer(c: &Config, index: usize) -> impl Iterator<Item = TensorSpec> + '_ {
    let (h, heads) = (c.hidden_size, c.num_attention_heads);
    let p = format!("model.layers.{index}");
    let (a, m) = (format!("{p}.self_attn"), format!("{p}.mlp"));
    let q_width = heads * c.qk_head_dim();
    let bias = |name: &str, width: usize| {
        c.attention_bias
            .then(|| plain(format!("{a}.{name}.bias"), &[width]))
    };

    let mut list = vec![norm(format!("{p}.input_layernorm"), h)];
    match c.q_lora_rank {
        Some(rank) => {
            list.push(linear(c, format!("{a}.q_a_proj"), rank, h));
            list.extend(bias("q_a_proj", rank));
            list.push(norm(format!("{a}.q_a_layernorm"), rank));
            list.push(linear(c, format!("{a}.q_b_proj"), q_width, rank));
        }
        None => list.push(linear(c, format!("{a}.q_proj"), q_width, h)),
    }
    list.push(linear(
        c,
        format!("{a}.kv_a_proj_with_mqa"),
        c.latent_width(),
        h,
    ));
    list.extend(bias("kv_a_proj_with_mqa", c.latent_width()));
    list.push(norm(format!("{a}.kv_a_layernorm"), c.kv_lora_rank));
    list.push(linear(
        c,
        format!("{a}.kv_b_proj"),
        heads * (c.qk_nope_head_dim + c.v_head_dim),
        c.kv_lora_rank,
    ));
    list.push(linear(c, format!("{a}.o_proj"), h, heads * c.v_head_dim));
    list.extend(bias("o_proj", h));
    list.push(norm(format!("{p}.post_attention_layernorm"), h));

    let moe = c.is_moe(index);
    let mut tail = Vec::new();
    if moe {
        list.push(plain(format!("{m}.gate.weight"), &[c.n_routed_experts, h]));
        if c.has_router_bias() {
            list.push(plain(
                format!("{m}.gate.e_score_correction_bias"),
                &[c.n_routed_experts],
            ));
        }
        if c.n_shared_experts > 0 {
            tail.extend(mlp(
                c,
                &format!("{m}.shared_experts"),
                c.shared_intermediate_size(),
            ));
        }
    } else {
        tail.extend(mlp(c, &m, c.intermediate_size));
    }
    let experts = if moe { c.n_routed_experts } else { 0 };
    list.into_iter()
        .chain((0..experts).flat_map(move |e| expert(c, index, e)))
        .chain(tail)
}

/// A multi-token-prediction layer: a decoder layer between `eh_proj` and its own norm (DeepSeek-V3
/// report, section 2.2).
fn mtp(c: &Config, index: usize) -> impl Iterator<Item = TensorSpec> + '_ {
    let (p, h) = (format!("model.layers.{index}"), c.hidden_size);
    let copy = |name: &str| TensorSpec {
        optional: true,
        ..plain(format!("{p}.{name}.weight"), &[c.vocab_size, h])
    };
    let head = [
        copy("embed_tokens"),
        norm(format!("{p}.enorm"), h),
        norm(format!("{p}.hnorm"), h),
        linear(c, format!("{p}.eh_proj"), h, 2 * h),
    ];
    let tail = [
        norm(format!("{p}.shared_head.norm"), h),
        copy("shared_head.head"),
    ];
    head.into_iter().chain(layer(c, index)).chain(tail)
}
