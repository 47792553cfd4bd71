//! Tiny checkpoints of any configuration, filled at random, for the variants no golden has.

use std::path::Path;

use guild_model::Config;
use guild_model::checkpoint::schema;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// A small V3-shaped configuration; a test sets what it needs to differ.
pub fn config() -> Value {
    json!({
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 96, "hidden_size": 48,
        "intermediate_size": 80, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 3, "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 20, "q_lora_rank": 28, "qk_rope_head_dim": 8, "v_head_dim": 20, "qk_nope_head_dim": 12,
        "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": true, "scoring_func": "sigmoid", "num_nextn_predict_layers": 0,
        "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1
    })
}

/// [`config`] with some fields replaced.
pub fn config_with(changes: Value) -> Value {
    let mut config = config();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// Writes a checkpoint of f32 weights of this configuration. Every value is one that f16 can hold.
pub fn write(dir: &Path, config: &Value) {
    write_as(dir, config, Dtype::F32, |_| true);
}

/// The same weights, stored in f16 or f32, without the tensors that `keep` refuses.
pub fn write_as(dir: &Path, config: &Value, dtype: Dtype, keep: impl Fn(&str) -> bool) {
    let text = config.to_string();
    std::fs::write(dir.join("config.json"), &text).unwrap();
    let parsed = Config::from_json(&text).unwrap();
    let mut state = 1;
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for spec in schema(&parsed) {
        let centre = if spec.name.contains("norm") { 1.0 } else { 0.0 };
        let values = random(&mut state, spec.elements() as usize, 0.25);
        let values = values.iter().map(|v| half::f16::from_f32(centre + v));
        let bytes = match dtype {
            Dtype::F16 => values.flat_map(|v| v.to_le_bytes()).collect(),
            _ => values.flat_map(|v| v.to_f32().to_le_bytes()).collect(),
        };
        if keep(&spec.name) {
            tensors.push((spec.name, spec.shape, bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(n, s, b)| (n.as_str(), TensorView::new(dtype, s.clone(), b).unwrap()));
    std::fs::write(
        dir.join("model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
}

/// Numbers in (-scale, scale) from a splitmix64 stream.
pub fn random(state: &mut u64, count: usize, scale: f32) -> Vec<f32> {
    let mut next = || {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    (0..count)
        .map(|_| ((next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale)
        .collect()
}
