//! Damage inside: tensors, scales and configurations that do not fit together.

use std::fs;

use serde_json::{Value, json};

use super::faults::Cases;
use super::parts::{EXPERT, FIRST, INDEX, KV_A, NORM, Tensors, edit_json, golden};

pub(crate) fn tensors(cases: &mut Cases<'_>) {
    let norm_shard = shard_of("v3-basic", NORM);
    for name in [
        "model.embed_tokens.weight",
        NORM,
        "lm_head.weight",
        KV_A,
        EXPERT,
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.shared_experts.gate_proj.weight",
        "model.layers.3.mlp.experts.15.down_proj.weight",
    ] {
        let file = shard_of("v3-basic", name);
        cases.add(
            &format!("{name} removed, index too"),
            "v3-basic",
            &[INDEX, name, "missing"],
            move |dir| {
                let mut t = Tensors::read(&dir.join(file));
                t.remove(name);
                t.write(&dir.join(file));
                edit_json(&dir.join(INDEX), |v| {
                    drop(v["weight_map"].as_object_mut().unwrap().remove(name))
                });
            },
        );
        cases.tensors(
            &format!("{name} removed, index not"),
            "v3-basic",
            file,
            &[name],
            move |t| drop(t.remove(name)),
        );
        cases.tensors(
            &format!("{name} transposed"),
            "v3-basic",
            file,
            &[name, "shape"],
            move |t| {
                let mut shape: Vec<usize> =
                    serde_json::from_value(t.entry(name)["shape"].clone()).unwrap();
                shape.reverse();
                shape.push(1);
                t.entry(name)["shape"] = json!(shape);
            },
        );
    }
    for (dtype, width) in [
        ("F64", 8),
        ("I32", 4),
        ("I8", 1),
        ("BOOL", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
    ] {
        cases.tensors(
            &format!("norm of {dtype}"),
            "v3-basic",
            norm_shard,
            &[NORM, dtype],
            move |t| {
                t.replace(NORM, dtype, &[64], &vec![0; 64 * width]);
            },
        );
    }
    cases.tensors(
        "FP8 where the configuration has none",
        "v3-basic",
        FIRST,
        &[KV_A, "quantization_config"],
        |t| {
            t.replace(KV_A, "F8_E4M3", &[48, 64], &[0; 48 * 64]);
        },
    );
    cases.tensors("renamed", "v3-fp8", "model.safetensors", &[EXPERT], |t| {
        let entry = t.header.shift_remove(EXPERT).unwrap();
        t.header
            .insert("model.layers.1.mlp.experts.99.up_proj.weight".into(), entry);
    });
    let nan = [
        ("NaN", f32::NAN),
        ("infinity", f32::INFINITY),
        ("minus infinity", f32::NEG_INFINITY),
    ];
    for (what, value) in nan {
        cases.tensors(
            &format!("{what} in a norm"),
            "v3-basic",
            norm_shard,
            &[NORM, "element 5"],
            move |t| {
                let (from, _) = t.offsets(NORM);
                t.data[from + 20..from + 24].copy_from_slice(&value.to_le_bytes());
            },
        );
        cases.tensors(
            &format!("{what} in bf16"),
            "v3-fp8",
            "model.safetensors",
            &[NORM, "element 143"],
            move |t| {
                let (_, to) = t.offsets(NORM);
                t.data[to - 2..to].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            },
        );
    }
    cases.tensors(
        "NaN in FP8",
        "v3-fp8",
        "model.safetensors",
        &[EXPERT, "element 0"],
        |t| {
            let (from, _) = t.offsets(EXPERT);
            t.data[from] = 0xFF;
        },
    );
}

pub(crate) fn scales(cases: &mut Cases<'_>) {
    const FILE: &str = "model.safetensors";
    let scale = format!("{EXPERT}_scale_inv");
    let add = |cases: &mut Cases<'_>,
               name: &str,
               says: &str,
               dtype: &'static str,
               shape: &'static [usize],
               data: Vec<u8>| {
        let scale = scale.clone();
        cases.tensors(name, "v3-fp8", FILE, &[&scale.clone(), says], move |t| {
            t.replace(&scale, dtype, shape, &data)
        });
    };
    add(
        cases,
        "scale of one block",
        "shape",
        "F32",
        &[1, 1],
        vec![0; 4],
    );
    add(
        cases,
        "scales rounded down",
        "shape",
        "F32",
        &[1, 2],
        vec![0; 8],
    );
    add(
        cases,
        "scales too many",
        "shape",
        "F32",
        &[3, 2],
        vec![0; 24],
    );
    add(cases, "scales in a row", "shape", "F32", &[4], vec![0; 16]);
    add(
        cases,
        "scales of bf16",
        "dtype",
        "BF16",
        &[2, 2],
        vec![0; 8],
    );
    add(cases, "scales of f64", "dtype", "F64", &[2, 2], vec![0; 32]);
    add(
        cases,
        "a scale of NaN",
        "element 0",
        "F32",
        &[2, 2],
        vec![0xFF; 16],
    );
    let gone = scale.clone();
    cases.tensors(
        "no scales",
        "v3-fp8",
        FILE,
        &[&scale, "missing"],
        move |t| drop(t.remove(&gone)),
    );
}

pub(crate) fn configs(cases: &mut Cases<'_>) {
    const CONFIG: &str = "config.json";
    cases.add("no configuration", "v3-basic", &[CONFIG], |dir| {
        fs::remove_file(dir.join(CONFIG)).unwrap()
    });
    cases.bytes("configuration cut", "v3-basic", CONFIG, |b| b.truncate(50));
    cases.bytes("configuration of zeros", "v3-basic", CONFIG, |b| b.fill(0));
    cases.bytes("configuration of 5 MB", "v3-basic", CONFIG, |b| {
        b.resize(5 << 20, b' ')
    });
    let fields = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "n_routed_experts",
        "num_experts_per_tok",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_group",
        "topk_group",
    ];
    for field in fields {
        for value in [
            json!("4"),
            json!(-1),
            json!(1e30),
            json!(true),
            json!(1u64 << 50),
        ] {
            cases.json(
                &format!("{field} = {value}"),
                "v3-basic",
                CONFIG,
                &[CONFIG, field],
                move |v| v[field] = value.clone(),
            );
        }
    }
    // A configuration that is sound by itself but not that of these weights.
    let others = [
        ("hidden_size", json!(128), "shape"),
        ("vocab_size", json!(321), "model.embed_tokens.weight"),
        ("num_hidden_layers", json!(5), "model.layers.4."),
        (
            "n_routed_experts",
            json!(32),
            "model.layers.1.mlp.gate.weight",
        ),
        ("n_shared_experts", json!(2), "shared_experts"),
        (
            "first_k_dense_replace",
            json!(2),
            "model.layers.1.mlp.gate_proj.weight",
        ),
        ("q_lora_rank", json!(null), "q_proj"),
        ("kv_lora_rank", json!(64), "kv_a_proj_with_mqa"),
        ("attention_bias", json!(true), "q_a_proj.bias"),
    ];
    for (field, value, mention) in others {
        cases.json(
            &format!("{field} of another model"),
            "v3-basic",
            CONFIG,
            &["safetensors", mention],
            move |v| v[field] = value.clone(),
        );
    }
    cases.json(
        "FP8 weights, no quantization",
        "v3-fp8",
        CONFIG,
        &["quantization_config"],
        |v| v["quantization_config"] = json!(null),
    );
}

/// Which file of a golden checkpoint holds a tensor.
fn shard_of(case: &str, name: &str) -> &'static str {
    let index: Value =
        serde_json::from_slice(&fs::read(golden(case).join(INDEX)).unwrap()).unwrap();
    index["weight_map"][name]
        .as_str()
        .unwrap_or_else(|| panic!("{name}"))
        .to_owned()
        .leak()
}
