//! A hundred mutated checkpoints given to `guild up`: each ends before
//! readiness with a clear error and the documented exit code, never a panic.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use guild_tests::process::{golden_dir, guild};
use serde_json::{Value, json};

const CONFIG_OR_MODEL: [i32; 2] = [3, 4];

/// What a mutation did and a word its error must name.
struct Mutation {
    what: String,
    names: Vec<String>,
    apply: Box<dyn Fn(&Path)>,
}

fn mutation(what: impl Into<String>, names: &[&str], apply: impl Fn(&Path) + 'static) -> Mutation {
    Mutation {
        what: what.into(),
        names: names.iter().map(|s| s.to_string()).collect(),
        apply: Box::new(apply),
    }
}

fn config_field(field: &'static str, value: Value) -> Mutation {
    mutation(format!("config {field} = {value}"), &[field], move |dir| {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[field] = value.clone();
        fs::write(path, config.to_string()).unwrap();
    })
}

fn without_field(field: &'static str) -> Mutation {
    mutation(format!("config without {field}"), &[field], move |dir| {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove(field);
        fs::write(path, config.to_string()).unwrap();
    })
}

const FILE: &str = "model.safetensors";

/// Rewrites the header of the single-file checkpoint; the data stays.
fn header(
    what: impl Into<String>,
    names: &[&str],
    change: impl Fn(&mut serde_json::Map<String, Value>) + 'static,
) -> Mutation {
    mutation(what, names, move |dir| {
        let bytes = fs::read(dir.join(FILE)).unwrap();
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut map: serde_json::Map<String, Value> =
            serde_json::from_slice(&bytes[8..8 + n]).unwrap();
        change(&mut map);
        let mut head = serde_json::to_vec(&map).unwrap();
        head.resize(head.len().next_multiple_of(8), b' ');
        let mut out = (head.len() as u64).to_le_bytes().to_vec();
        out.extend(head);
        out.extend(&bytes[8 + n..]);
        fs::write(dir.join(FILE), out).unwrap();
    })
}

fn truncated(to: impl Fn(usize) -> usize + 'static, what: &str) -> Mutation {
    mutation(format!("file {what}"), &[FILE], move |dir| {
        let bytes = fs::read(dir.join(FILE)).unwrap();
        fs::write(dir.join(FILE), &bytes[..to(bytes.len())]).unwrap();
    })
}

/// Overwrites elements of a tensor with a bit pattern.
fn poisoned(tensor: &'static str, pattern: &'static [u8]) -> Mutation {
    mutation(
        format!("{tensor} holds {pattern:02x?}"),
        &[tensor],
        move |dir| {
            let mut bytes = fs::read(dir.join(FILE)).unwrap();
            let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let map: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
            let at = 8 + n + map[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
            bytes[at..at + pattern.len()].copy_from_slice(pattern);
            fs::write(dir.join(FILE), bytes).unwrap();
        },
    )
}

fn mutations() -> Vec<Mutation> {
    let mut all = Vec::new();
    // Configuration.
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "intermediate_size",
    ] {
        all.push(config_field(field, json!(0)));
        all.push(config_field(field, json!(-4)));
        all.push(config_field(field, json!("many")));
        all.push(config_field(field, json!(4_000_000_000_000u64)));
    }
    for field in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "kv_lora_rank",
        "n_routed_experts",
        "model_type",
    ] {
        all.push(without_field(field));
    }
    all.extend([
        config_field("model_type", json!("llama")),
        config_field("scoring_func", json!("dice")),
        config_field("topk_method", json!("random")),
        config_field("hidden_act", json!("gelu")),
        config_field("qk_rope_head_dim", json!(15)),
        config_field("num_experts_per_tok", json!(1000)),
        config_field("n_group", json!(3)),
        config_field("topk_group", json!(99)),
        config_field("rms_norm_eps", json!(-1.0)),
        config_field("rope_theta", json!(0)),
        config_field("rope_scaling", json!({"type": "wavy", "factor": 2})),
        config_field("rope_scaling", json!({"type": "yarn"})),
        config_field("routed_scaling_factor", json!("big")),
        config_field("first_k_dense_replace", json!(1_000_000)),
        config_field(
            "quantization_config",
            json!({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}),
        ),
        config_field(
            "quantization_config",
            json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [7, 7]}),
        ),
        config_field(
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
        ),
        mutation("config is missing", &["config.json"], |d| {
            fs::remove_file(d.join("config.json")).unwrap()
        }),
        mutation("config is empty", &["config.json"], |d| {
            fs::write(d.join("config.json"), "").unwrap()
        }),
        mutation("config is half a file", &["config.json"], |d| {
            let bytes = fs::read(d.join("config.json")).unwrap();
            fs::write(d.join("config.json"), &bytes[..bytes.len() / 2]).unwrap();
        }),
        mutation("config is binary", &["config.json"], |d| {
            fs::write(d.join("config.json"), [0u8, 255, 1, 254]).unwrap()
        }),
        mutation("config is a list", &["config.json"], |d| {
            fs::write(d.join("config.json"), "[]").unwrap()
        }),
    ]);
    // The file.
    all.extend([
        truncated(|_| 0, "is empty"),
        truncated(|_| 4, "is 4 bytes"),
        truncated(|_| 8, "is 8 bytes"),
        truncated(|_| 100, "ends in its header"),
        truncated(|n| n / 2, "is cut in half"),
        truncated(|n| n - 1, "lacks its last byte"),
        mutation("weights are missing", &["safetensors"], |d| fs::remove_file(d.join(FILE)).unwrap()),
        mutation("header length is absurd", &[FILE], |d| {
            let mut bytes = fs::read(d.join(FILE)).unwrap();
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            fs::write(d.join(FILE), bytes).unwrap();
        }),
        mutation("header length is 4 GiB", &[FILE], |d| {
            let mut bytes = fs::read(d.join(FILE)).unwrap();
            bytes[..8].copy_from_slice(&(1u64 << 32).to_le_bytes());
            fs::write(d.join(FILE), bytes).unwrap();
        }),
        mutation("header is not JSON", &[FILE], |d| {
            let mut bytes = fs::read(d.join(FILE)).unwrap();
            bytes[8] = b'!';
            fs::write(d.join(FILE), bytes).unwrap();
        }),
        mutation("trailing bytes", &[FILE], |d| {
            let mut bytes = fs::read(d.join(FILE)).unwrap();
            bytes.extend([0u8; 64]);
            fs::write(d.join(FILE), bytes).unwrap();
        }),
        mutation("index names a missing shard", &["model-00009-of-00009.safetensors"], |d| {
            fs::write(
                d.join("model.safetensors.index.json"),
                json!({"metadata": {}, "weight_map": {"model.norm.weight": "model-00009-of-00009.safetensors"}}).to_string(),
            )
            .unwrap();
            fs::remove_file(d.join(FILE)).unwrap();
        }),
        mutation("index leaves the folder", &["index.json"], |d| {
            fs::write(d.join("model.safetensors.index.json"), json!({"weight_map": {"model.norm.weight": "../../etc/passwd"}}).to_string()).unwrap();
            fs::remove_file(d.join(FILE)).unwrap();
        }),
    ]);
    // The header.
    for name in [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv",
    ] {
        all.push(header(format!("{name} is missing"), &[name], move |map| {
            let moved = map.remove(name).unwrap();
            map.insert("nobody.asked.for.this".into(), moved);
        }));
        all.push(header(
            format!("a hole where {name} was"),
            &[FILE],
            move |map| {
                map.remove(name);
            },
        ));
        all.push(header(
            format!("{name} has another shape"),
            &[name],
            move |map| {
                let shape = map[name]["shape"].as_array_mut().unwrap();
                let total: u64 = shape.iter().map(|v| v.as_u64().unwrap()).product();
                *shape = vec![json!(1), json!(total)];
            },
        ));
        all.push(header(
            format!("{name} reaches past the end"),
            &[FILE],
            move |map| map[name]["data_offsets"][1] = json!(u64::MAX / 2),
        ));
    }
    all.extend([
        header("an unknown dtype", &[FILE], |map| {
            map["model.norm.weight"]["dtype"] = json!("Q4")
        }),
        header("an integer norm", &["model.norm.weight"], |map| {
            let size = map["model.norm.weight"]["shape"][0].as_u64().unwrap();
            let bytes = map["model.norm.weight"]["data_offsets"][1]
                .as_u64()
                .unwrap()
                - map["model.norm.weight"]["data_offsets"][0]
                    .as_u64()
                    .unwrap();
            map["model.norm.weight"]["dtype"] =
                json!(if bytes / size == 2 { "I16" } else { "I32" });
        }),
        header("negative offsets", &[FILE], |map| {
            map["model.norm.weight"]["data_offsets"] = json!([-8, 8])
        }),
        header("overlapping tensors", &[FILE], |map| {
            let other = map["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
            map["model.norm.weight"]["data_offsets"] = other;
        }),
        header("a huge shape", &[FILE], |map| {
            map["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX])
        }),
        poisoned("model.norm.weight", &[0xff, 0xff, 0xff, 0xff]),
        poisoned("lm_head.weight", &[0x80, 0x7f, 0x80, 0x7f]),
        poisoned("model.layers.1.mlp.experts.3.up_proj.weight", &[0x7f]),
        poisoned(
            "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv",
            &[0, 0, 0xc0, 0x7f],
        ),
    ]);
    all
}

#[test]
fn a_hundred_mutated_checkpoints_are_refused_before_readiness() {
    let mutations = mutations();
    assert!(mutations.len() >= 100, "{} mutations", mutations.len());
    let mut wrong = Vec::new();
    for mutation in &mutations {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", FILE] {
            fs::copy(golden_dir("v3-fp8").join(file), dir.path().join(file)).unwrap();
        }
        (mutation.apply)(dir.path());
        let (code, stdout, stderr) = guild(&[
            "up",
            "--model",
            dir.path().to_str().unwrap(),
            "--http",
            "127.0.0.1:0",
            "--grpc",
            "127.0.0.1:0",
        ]);
        let mut complain = |why: &str| {
            wrong.push(format!(
                "{}: {why}: code {code}: {}",
                mutation.what,
                stderr.lines().last().unwrap_or("")
            ))
        };
        if !CONFIG_OR_MODEL.contains(&code) {
            complain("wrong exit code");
        }
        if stderr.contains("panicked") {
            complain("panicked");
        }
        if stdout.contains("guild: serving") {
            complain("was ready");
        }
        if !mutation.names.iter().any(|n| stderr.contains(n.as_str())) {
            complain(&format!("names none of {:?}", mutation.names));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        mutations.len(),
        wrong.join("\n")
    );
}
