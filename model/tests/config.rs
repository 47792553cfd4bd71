//! Configurations: every spelling that is served, every field that is refused.
#![recursion_limit = "256"]
#![allow(clippy::unwrap_used)]

use guild_model::config::{Scoring, TopkMethod, Yarn};
use guild_model::{Config, ModelError};
use serde_json::{Value, json};

/// DeepSeek-V3 as released.
fn v3() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "auto_map": {"AutoModel": "x"},
        "aux_loss_alpha": 0.001, "seq_aux": true, "pretraining_tp": 1, "use_cache": true,
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "ep_size": 1,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "norm_topk_prob": true,
        "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0
        },
        "attention_bias": false, "attention_dropout": 0.0, "tie_word_embeddings": false, "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0"
        }
    })
}

fn parse(value: &Value) -> Result<Config, ModelError> {
    Config::from_json(&value.to_string())
}

/// V3 with some fields replaced, or removed where the value is `"(absent)"`.
fn v3_with(changes: Value) -> Value {
    let mut value = v3();
    for (key, change) in changes.as_object().unwrap() {
        let map = value.as_object_mut().unwrap();
        if change == "(absent)" {
            map.shift_remove(key);
        } else {
            map.insert(key.clone(), change.clone());
        }
    }
    value
}

#[test]
fn deepseek_v3_as_released() {
    let c = parse(&v3()).unwrap();
    assert_eq!(
        (c.scoring_func, c.topk_method),
        (Scoring::Sigmoid, TopkMethod::NoauxTc)
    );
    assert_eq!(
        (c.latent_width(), c.qk_head_dim(), c.q_lora_rank),
        (576, 192, Some(1536))
    );
    assert_eq!(
        c.moe_layers().collect::<Vec<_>>(),
        (3..61).collect::<Vec<_>>()
    );
    assert_eq!(c.expert_layers().last(), Some(61));
    assert!(c.fp8 && c.norm_topk_prob && c.rope.interleave && !c.tie_word_embeddings);
    assert_eq!((c.bos_token_id, &c.eos_token_ids[..]), (Some(0), &[1][..]));
    assert_eq!(c.kv_elements_per_token(), 62 * 576);
    // 0.1 ln 40 + 1 = 1.36889, squared over sqrt 192.
    assert!((c.softmax_scale() - 0.135_234).abs() < 1e-6);
    assert_eq!(c.rope_factor(), 1.0);
    // Below dimension 10 nothing is stretched, from 23 on everything is, forty times.
    let freqs = c.rope_inv_freq();
    let plain = |i: usize| 10_000f64.powf(-(i as f64) / 32.0) as f32;
    assert_eq!(freqs.len(), 32);
    assert!((freqs[10] - plain(10)).abs() <= 1e-7 * plain(10));
    assert!(freqs[11] < plain(11) * 0.99);
    assert!((freqs[23] * 40.0 - plain(23)).abs() <= 1e-6 * plain(23));
}

#[test]
fn both_spellings_of_rope_mean_the_same() {
    let old = parse(&v3()).unwrap();
    let new = v3_with(json!({
        "rope_theta": "(absent)", "rope_scaling": "(absent)", "rope_interleave": true,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0
        }
    }));
    assert_eq!(parse(&new).unwrap(), old);
    let plain = v3_with(json!({"rope_scaling": null, "rope_theta": 50000.0}));
    let default = v3_with(
        json!({"rope_scaling": null, "rope_theta": "(absent)", "rope_parameters": {"rope_type": "default", "rope_theta": 50000}}),
    );
    assert_eq!(parse(&plain).unwrap(), parse(&default).unwrap());
    assert_eq!(parse(&plain).unwrap().rope.yarn, None);
    let half = parse(&v3_with(json!({"rope_interleave": false}))).unwrap();
    assert!(!half.rope.interleave);
}

#[test]
fn yarn_factors() {
    let yarn = |more: Value| {
        let mut scaling =
            json!({"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096});
        scaling
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        parse(&v3_with(json!({"rope_scaling": scaling}))).unwrap()
    };
    let m = |f: f64| (0.1 * f * 40f64.ln() + 1.0) as f32;
    let base = 192f32.powf(-0.5);
    // No mscale: cos and sin take the whole temperature and the softmax none.
    let bare = yarn(json!({}));
    assert!(
        (bare.rope_factor() - m(1.0)).abs() < 1e-6 && (bare.softmax_scale() - base).abs() < 1e-7
    );
    let both = yarn(json!({"mscale": 0.707, "mscale_all_dim": 1.0}));
    assert!((both.rope_factor() - m(0.707) / m(1.0)).abs() < 1e-6);
    assert!((both.softmax_scale() - base * m(1.0) * m(1.0)).abs() < 1e-6);
    assert_eq!(yarn(json!({"attention_factor": 0.5})).rope_factor(), 0.5);
    let flat = yarn(json!({"beta_fast": 1, "beta_slow": 1, "truncate": false}));
    assert!(
        flat.rope_inv_freq().iter().all(|f| f.is_finite()),
        "equal ends of the ramp"
    );
    assert!(matches!(
        flat.rope.yarn,
        Some(Yarn {
            truncate: false,
            mscale: None,
            ..
        })
    ));
}

#[test]
fn differences_are_data() {
    let v2 = json!({
        "model_type": "deepseek_v2", "scoring_func": "(absent)", "topk_method": "(absent)",
        "norm_topk_prob": "(absent)", "routed_scaling_factor": "(absent)", "q_lora_rank": null,
        "num_nextn_predict_layers": "(absent)", "quantization_config": "(absent)", "n_group": null, "topk_group": null
    });
    let c = parse(&v3_with(v2)).unwrap();
    assert_eq!(
        (c.scoring_func, c.topk_method),
        (Scoring::Softmax, TopkMethod::Greedy)
    );
    assert!(!c.norm_topk_prob && !c.fp8 && !c.has_router_bias());
    assert_eq!(
        (c.routed_scaling_factor, c.q_lora_rank, c.n_group),
        (1.0, None, 1)
    );
    let grouped = parse(&v3_with(
        json!({"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}),
    ))
    .unwrap();
    assert_eq!(
        (grouped.topk_method, grouped.routing_groups()),
        (TopkMethod::GroupLimitedGreedy, 8)
    );
    let k2 = parse(&v3_with(
        json!({"model_type": "kimi_k2", "scoring_func": "(absent)", "eos_token_id": [5, 9]}),
    ))
    .unwrap();
    assert_eq!(
        (k2.scoring_func, k2.eos_token_ids),
        (Scoring::Sigmoid, vec![5, 9])
    );
    let nested =
        json!({"model_type": "kimi_k25", "text_config": v3_with(json!({"model_type": "kimi_k2"}))});
    assert_eq!(parse(&nested).unwrap().model_type, "kimi_k2");
    let plain = parse(&v3_with(
        json!({"n_shared_experts": null, "moe_layer_freq": 2}),
    ))
    .unwrap();
    assert_eq!(
        (
            plain.n_shared_experts,
            plain.is_moe(3),
            plain.is_moe(4),
            plain.is_moe(61)
        ),
        (0, false, true, true)
    );
    let dense = parse(&v3_with(json!({"n_routed_experts": null}))).unwrap();
    assert_eq!((dense.moe_layers().count(), dense.n_shared_experts), (0, 0));
}

#[test]
fn generation_config_adds_ends_of_sequence() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), v3().to_string()).unwrap();
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": [1, 7], "temperature": 0.6}"#,
    )
    .unwrap();
    assert_eq!(Config::from_dir(dir.path()).unwrap().eos_token_ids, [1, 7]);
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": "end"}"#,
    )
    .unwrap();
    let refused = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(
        refused.contains("generation_config.eos_token_id"),
        "{refused}"
    );
}

#[test]
fn faults_are_refused_with_their_field() {
    let scaling = |more: Value| {
        let mut scaling = v3()["rope_scaling"].clone();
        scaling
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        json!({"rope_scaling": scaling})
    };
    let quantized = |more: Value| {
        let mut quantized = v3()["quantization_config"].clone();
        quantized
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        json!({"quantization_config": quantized})
    };
    let mut cases: Vec<(&str, Value)> = vec![
        ("model_type", json!({"model_type": "(absent)"})),
        ("model_type", json!({"model_type": "llama"})),
        ("model_type", json!({"model_type": "deepseek_v32"})),
        ("model_type", json!({"model_type": 3})),
        ("text_config", json!({"text_config": []})),
        ("hidden_act", json!({"hidden_act": "gelu"})),
        ("num_key_value_heads", json!({"num_key_value_heads": 8})),
        ("q_lora_rank", json!({"q_lora_rank": "(absent)"})),
        ("q_lora_rank", json!({"q_lora_rank": 0})),
        ("qk_rope_head_dim", json!({"qk_rope_head_dim": 63})),
        (
            "first_k_dense_replace",
            json!({"first_k_dense_replace": 62}),
        ),
        ("moe_layer_freq", json!({"moe_layer_freq": 0})),
        ("scoring_func", json!({"scoring_func": "sqrtsoftplus"})),
        ("topk_method", json!({"topk_method": "best"})),
        ("n_group", json!({"n_group": 7})),
        ("n_group", json!({"n_group": 0})),
        ("n_group", json!({"n_group": "(absent)"})),
        ("n_group", json!({"n_group": 256})),
        ("topk_group", json!({"topk_group": 9})),
        ("num_experts_per_tok", json!({"num_experts_per_tok": 129})),
        (
            "num_experts_per_tok",
            json!({"num_experts_per_tok": "(absent)"}),
        ),
        (
            "num_experts_per_tok",
            json!({"model_type": "deepseek_v2", "topk_method": "greedy", "num_experts_per_tok": 257}),
        ),
        ("n_routed_experts", json!({"n_routed_experts": 1 << 20})),
        (
            "n_routed_experts",
            json!({"n_routed_experts": 65536, "num_hidden_layers": 4000}),
        ),
        ("num_hidden_layers", json!({"num_hidden_layers": 1_000_000})),
        (
            "num_nextn_predict_layers",
            json!({"num_nextn_predict_layers": 4090}),
        ),
        ("routed_scaling_factor", json!({"routed_scaling_factor": 0})),
        (
            "routed_scaling_factor",
            json!({"routed_scaling_factor": 1e300}),
        ),
        ("rms_norm_eps", json!({"rms_norm_eps": -1e-6})),
        ("rms_norm_eps", json!({"rms_norm_eps": "1e-6"})),
        (
            "vocab_size",
            json!({"vocab_size": 16_000_000, "hidden_size": 16_000_000}),
        ),
        (
            "n_shared_experts",
            json!({"n_shared_experts": 65536, "moe_intermediate_size": 16_000_000}),
        ),
        ("eos_token_id", json!({"eos_token_id": -1})),
        ("eos_token_id", json!({"eos_token_id": [1, "x"]})),
        ("bos_token_id", json!({"bos_token_id": 0.5})),
        ("norm_topk_prob", json!({"norm_topk_prob": "yes"})),
        ("attention_bias", json!({"attention_bias": 1})),
        ("rope_theta", json!({"rope_theta": 1.0})),
        ("rope_theta", json!({"rope_theta": "big"})),
        ("rope_scaling", json!({"rope_scaling": "yarn"})),
        (
            "rope_scaling.rope_type",
            scaling(json!({"type": "longrope"})),
        ),
        (
            "rope_scaling.rope_type",
            scaling(json!({"rope_type": "default"})),
        ),
        ("rope_scaling.rope_type", scaling(json!({"type": null}))),
        ("rope_scaling.factor", scaling(json!({"factor": null}))),
        ("rope_scaling.factor", scaling(json!({"factor": 0.5}))),
        ("rope_scaling.beta_fast", scaling(json!({"beta_fast": 0.5}))),
        ("rope_scaling.mscale", scaling(json!({"mscale": -1}))),
        (
            "rope_scaling.original_max_position_embeddings",
            scaling(json!({"original_max_position_embeddings": 0})),
        ),
        (
            "rope_parameters.rope_type",
            json!({"rope_parameters": {"rope_type": "linear", "factor": 2}}),
        ),
        ("quantization_config", json!({"quantization_config": true})),
        (
            "quantization_config.quant_method",
            quantized(json!({"quant_method": "gptq"})),
        ),
        (
            "quantization_config.format",
            quantized(json!({"quant_method": "compressed-tensors"})),
        ),
        (
            "quantization_config.quant_method",
            quantized(json!({"quant_method": null})),
        ),
        ("quantization_config.fmt", quantized(json!({"fmt": "e5m2"}))),
        (
            "quantization_config.activation_scheme",
            quantized(json!({"activation_scheme": "static"})),
        ),
        (
            "quantization_config.scale_fmt",
            quantized(json!({"scale_fmt": "e3m4"})),
        ),
        (
            "quantization_config.weight_block_size",
            quantized(json!({"weight_block_size": [64, 128]})),
        ),
        (
            "quantization_config.weight_block_size",
            quantized(json!({"weight_block_size": null})),
        ),
    ];
    let counts = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
    ];
    for field in counts {
        for wrong in [
            json!("(absent)"),
            json!(0),
            json!(-4),
            json!(1.5),
            json!("7168"),
            json!(1u64 << 40),
            json!([1]),
        ] {
            cases.push((field, json!({field: wrong})));
        }
    }
    for (field, change) in cases {
        let shown = change.to_string();
        match parse(&v3_with(change)) {
            Err(ModelError::Config { field: named, .. }) => assert_eq!(named, field, "{shown}"),
            other => panic!("{shown}: {other:?}"),
        }
    }
    for text in ["", "{", "[]", "null", "7", "{\"a\": NaN}"] {
        assert!(
            matches!(Config::from_json(text), Err(ModelError::File { .. })),
            "{text}"
        );
    }
}
