//! The shapes that can be asked for by name.

use serde_json::{Map, Value, json};

use super::Shape;

/// Names that [`shape`] knows.
pub const NAMES: &[&str] = &[
    "tiny",
    "moonlight-4L",
    "v3-2L",
    "v2-lite",
    "moonlight",
    "v3",
    "kimi-k2",
];

/// A shape by name: the released dimensions, cut to a few layers where the name says so.
pub fn shape(name: &str) -> Option<Shape> {
    let own = match name {
        "tiny" => tiny(),
        "moonlight-4L" => {
            moonlight(json!({"num_hidden_layers": 4, "max_position_embeddings": 32768}))
        }
        "moonlight" => moonlight(
            json!({"num_hidden_layers": 27, "max_position_embeddings": 8192, "vocab_size": 163840}),
        ),
        "v3-2L" => v3(json!({"num_hidden_layers": 2, "first_k_dense_replace": 1})),
        "v3" => v3(
            json!({"num_hidden_layers": 61, "first_k_dense_replace": 3, "vocab_size": 129280, "num_nextn_predict_layers": 1}),
        ),
        "v2-lite" => v2_lite(),
        "kimi-k2" => kimi_k2(),
        _ => return None,
    };
    Some(Shape(merged(base(), own)))
}

/// Lays `over` on `under`: known fields keep their place, new ones follow.
fn merged(under: Value, over: Value) -> Map<String, Value> {
    let (mut map, over) = match (under, over) {
        (Value::Object(under), Value::Object(over)) => (under, over),
        _ => return Map::new(),
    };
    for (key, value) in over {
        map.insert(key, value);
    }
    map
}

/// What all shapes share. The order of fields is that of the written file.
fn base() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "hidden_act": "silu", "attention_bias": false, "attention_dropout": 0.0, "tie_word_embeddings": false,
        "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "ep_size": 1, "pretraining_tp": 1,
        "initializer_range": 0.02, "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "use_cache": true, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 32000, "bos_token_id": 257, "eos_token_id": 258
    })
}

/// Small enough to write in a second.
fn tiny() -> Value {
    json!({
        "hidden_size": 512, "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 1024,
        "moe_intermediate_size": 256, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 256, "rope_theta": 10000.0, "rope_scaling": null,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "vocab_size": 1024
    })
}

fn moonlight(over: Value) -> Value {
    let own = json!({
        "hidden_size": 2048, "num_hidden_layers": 0, "first_k_dense_replace": 1, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": null, "rope_theta": 50000.0, "rope_scaling": null,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 0
    });
    Value::Object(merged(own, over))
}

fn v3(over: Value) -> Value {
    let own = json!({
        "hidden_size": 7168, "num_hidden_layers": 0, "first_k_dense_replace": 0, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096
        },
        "rms_norm_eps": 1e-6, "max_position_embeddings": 163840
    });
    Value::Object(merged(own, over))
}

fn v2_lite() -> Value {
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "norm_topk_prob": false,
        "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400,
        "hidden_size": 2048, "num_hidden_layers": 27, "first_k_dense_replace": 1, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": null, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096
        },
        "rms_norm_eps": 1e-6, "max_position_embeddings": 163840
    })
}

fn kimi_k2() -> Value {
    json!({
        "model_type": "kimi_k2", "vocab_size": 163840,
        "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 1, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 384, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_attention_heads": 64,
        "num_key_value_heads": 64, "q_lora_rank": 1536, "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 32.0, "beta_fast": 1, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096
        },
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072
    })
}
