//! Fields that are sound alone but not together.

use super::fields::Fields;
use super::read::MAX_LAYERS;
use super::{Config, TopkMethod};
use crate::ModelError;

/// Most elements of one tensor.
const MAX_ELEMENTS: u64 = 1 << 40;
/// Most parameters of a model.
const MAX_PARAMETERS: u64 = 1 << 46;
/// Most tensors of a model; the largest released ones have about 100 thousand.
const MAX_TENSORS: u64 = 1 << 21;

/// Whether every token can be given its experts.
pub(super) fn routing(f: &Fields<'_>, c: &Config) -> Result<(), ModelError> {
    if c.n_routed_experts == 0 {
        return Ok(());
    }
    if !c.n_routed_experts.is_multiple_of(c.n_group) {
        let (g, e) = (c.n_group, c.n_routed_experts);
        return Err(f.bad(
            "n_group",
            format!("{g} does not divide n_routed_experts ({e})"),
        ));
    }
    if c.topk_group > c.n_group {
        return Err(f.bad(
            "topk_group",
            format!("{} is more than n_group ({})", c.topk_group, c.n_group),
        ));
    }
    let groups = c.routing_groups();
    let per_group = c.n_routed_experts / groups;
    if c.topk_method == TopkMethod::NoauxTc && groups > 1 && per_group < 2 {
        return Err(f.bad(
            "n_group",
            format!(
                "{groups} groups of one expert; a group counts by its two best, so it needs two"
            ),
        ));
    }
    let reachable = if groups > 1 {
        c.topk_group * per_group
    } else {
        c.n_routed_experts
    };
    if c.num_experts_per_tok > reachable {
        return Err(f.bad(
            "num_experts_per_tok",
            format!(
                "{} is more than the {reachable} experts a token may choose from",
                c.num_experts_per_tok
            ),
        ));
    }
    Ok(())
}

/// Refuses sizes whose products no machine holds, before anybody multiplies them.
pub(super) fn size(f: &Fields<'_>, c: &Config) -> Result<(), ModelError> {
    let heads = c.num_attention_heads as u64;
    let inner = heads.saturating_mul((c.qk_head_dim() + c.v_head_dim) as u64);
    let pairs = [
        ("vocab_size", c.vocab_size as u64, c.hidden_size as u64),
        (
            "intermediate_size",
            c.intermediate_size as u64,
            c.hidden_size as u64,
        ),
        (
            "moe_intermediate_size",
            c.moe_intermediate_size as u64,
            c.hidden_size as u64,
        ),
        (
            "n_shared_experts",
            (c.n_shared_experts as u64).saturating_mul(c.moe_intermediate_size as u64),
            c.hidden_size as u64,
        ),
        (
            "n_routed_experts",
            c.n_routed_experts as u64,
            c.hidden_size as u64,
        ),
        (
            "num_attention_heads",
            inner,
            c.hidden_size.max(c.kv_lora_rank) as u64,
        ),
        (
            "q_lora_rank",
            c.q_lora_rank.unwrap_or(1) as u64,
            inner.max(c.hidden_size as u64),
        ),
        (
            "kv_lora_rank",
            c.latent_width() as u64,
            c.hidden_size as u64,
        ),
    ];
    for (field, a, b) in pairs {
        if a.saturating_mul(b) > MAX_ELEMENTS {
            return Err(f.bad(
                field,
                format!("makes a tensor of {a} x {b} elements, more than any model has"),
            ));
        }
    }
    let layers = (c.num_hidden_layers + c.num_nextn_predict_layers) as u64;
    if layers > MAX_LAYERS as u64 {
        return Err(f.bad(
            "num_nextn_predict_layers",
            format!("{layers} layers in all, more than {MAX_LAYERS}"),
        ));
    }
    let moe = c.expert_layers().count() as u64;
    let tensors = moe * c.n_routed_experts as u64 * 3 + layers * 20;
    if tensors > MAX_TENSORS {
        return Err(f.bad(
            "n_routed_experts",
            format!("makes {tensors} tensors, more than {MAX_TENSORS}"),
        ));
    }
    let parameters = moe
        .saturating_mul(c.n_routed_experts as u64)
        .saturating_mul(c.expert_parameters());
    if parameters > MAX_PARAMETERS {
        return Err(f.bad(
            "n_routed_experts",
            format!("makes {parameters} parameters of experts, more than any model has"),
        ));
    }
    Ok(())
}
