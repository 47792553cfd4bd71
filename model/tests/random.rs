//! Random checkpoints: the same bytes as an independent generator's, whatever the shape.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use guild_model::checkpoint::manifest::{self, Manifest};
use guild_model::random::{self, DEFAULT_SHARD_BYTES};
use guild_model::reference::Reference;
use guild_model::{Checkpoint, ModelError};
use serde_json::{Value, json};

/// blake3 of every file of the tiny shape, seed 1, as a generator written in Python with numpy
/// makes them.
const TINY: [(&str, &str); 6] = [
    (
        "config.json",
        "b8618b18775dfd283482b166da861b31a717529da7ec16d566094562919667aa",
    ),
    (
        "generation_config.json",
        "fce7ad975967b32f9f24e17edda22cadd3091e3d35fc98cdaf0dbaac0e9aee5a",
    ),
    (
        "model-00001-of-00001.safetensors",
        "140bdca327c72cc0728bb48d65ce27a2ac05071892b4a13dcf9d824d1a566884",
    ),
    (
        "model.safetensors.index.json",
        "47ef4feac2afa9343dc885983498944b97e71518713227590015bcbae7725ff9",
    ),
    (
        "tokenizer.json",
        "c7d919c78719f67030cb33887d0a655bb6a41b48ebc508218a5e5ae9e09df81a",
    ),
    (
        "tokenizer_config.json",
        "88356f997270b9de1daf21eecac9ed458eb6d6402b069a5d1291b6303d84b5d3",
    ),
];

/// The same for seed 7, shards of 4 MB and some fields overridden.
const CUT: [(&str, &str); 16] = [
    (
        "config.json",
        "1620e015ed7922652e74fcfec4c6db2fc4d278680468bc555128b4917af71b88",
    ),
    (
        "generation_config.json",
        "fce7ad975967b32f9f24e17edda22cadd3091e3d35fc98cdaf0dbaac0e9aee5a",
    ),
    (
        "model-00001-of-00011.safetensors",
        "b26bf588b5b3493ebaaacc2b0057ed95c39f32949119d7d9fb2c31511f4e7be9",
    ),
    (
        "model-00002-of-00011.safetensors",
        "a8b6e37410a2d0438f6fdd59003f0f9e51c8631a39c5ec0cbf89d148f8a66537",
    ),
    (
        "model-00003-of-00011.safetensors",
        "7a4d1ab87d887c2c9e1b3e3f5ab7b475df3e057b22d1da6c738381a13e68f36b",
    ),
    (
        "model-00004-of-00011.safetensors",
        "298e28c63d36dcae9f66d919703db2404699240641669f0dae52c67c8e8a226a",
    ),
    (
        "model-00005-of-00011.safetensors",
        "99828154327321a1cc6b360cc3c21b93582c8d5bfdef921cb45ef6f7f223f3ed",
    ),
    (
        "model-00006-of-00011.safetensors",
        "d6c6f07dbc1930c7d19b808031b45ce36f1015d0a49339f7864317a6106477ae",
    ),
    (
        "model-00007-of-00011.safetensors",
        "a4cb3bf06f114d5c3869848439f28cba8fdc1870b4c92cb92888179f9b983fb8",
    ),
    (
        "model-00008-of-00011.safetensors",
        "c743cd0ac610657d2b942f9f24927fab2d9c664d625b4ff934b3003eee58b4d3",
    ),
    (
        "model-00009-of-00011.safetensors",
        "58830830d9039a369a0643cf7df5c3fb1103160cd1e27714f7de567d36b85b05",
    ),
    (
        "model-00010-of-00011.safetensors",
        "bd3f63ac08dccbe42c93d8ac7e1c4318afd5cedc52f2dccc6d4dc9caf60325de",
    ),
    (
        "model-00011-of-00011.safetensors",
        "ba3eeed2cdd622457175f3d7d1600b2178f1ad4fe499a0045b4055028676c7c7",
    ),
    (
        "model.safetensors.index.json",
        "b08199707c1ed0fa73d42613b3a72d99f29b12e643aafdefc80f822d3b667785",
    ),
    (
        "tokenizer.json",
        "8c1b355ad11ca481f74f5182c3a2d8c6debbbf2d36caf1d9d7d905e66965c7fc",
    ),
    (
        "tokenizer_config.json",
        "88356f997270b9de1daf21eecac9ed458eb6d6402b069a5d1291b6303d84b5d3",
    ),
];

/// Of every file but the manifest, which the other generator does not write.
fn digests(dir: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries
        .filter(|e| e.file_name() != manifest::FILE)
        .map(|e| {
            let hash = blake3::hash(&fs::read(e.path()).unwrap())
                .to_hex()
                .to_string();
            (e.file_name().into_string().unwrap(), hash)
        })
        .collect()
}

fn expected(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter()
        .map(|(name, hash)| (name.to_string(), hash.to_string()))
        .collect()
}

fn sets(fields: Value) -> Vec<(String, Value)> {
    fields
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

fn write(shape: &str, fields: Value, out: &Path) -> Result<(), ModelError> {
    random::write(
        random::shape(shape).unwrap(),
        &sets(fields),
        1,
        DEFAULT_SHARD_BYTES,
        out,
        &|_, _| (),
    )
}

/// Fields that make any shape small.
fn small() -> Value {
    json!({
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96,
        "moe_intermediate_size": 32, "n_routed_experts": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "first_k_dense_replace": 1, "num_experts_per_tok": 4
    })
}

fn with(mut fields: Value, more: Value) -> Value {
    fields.as_object_mut().unwrap().extend(sets(more));
    fields
}

#[test]
fn tiny_is_byte_identical_to_the_python_generator() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny");
    let done = AtomicU64::new(0);
    let progress = |bytes: u64, total: u64| {
        assert!(bytes <= total && bytes > done.swap(bytes, Ordering::Relaxed));
    };
    random::write(
        random::shape("tiny").unwrap(),
        &[],
        1,
        DEFAULT_SHARD_BYTES,
        &out,
        &progress,
    )
    .unwrap();
    assert_eq!(digests(&out), expected(&TINY));
    assert_eq!(
        done.into_inner(),
        Checkpoint::open(&out).unwrap().required_bytes()
    );
}

#[test]
fn seed_shards_and_overrides_are_byte_identical_too() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cut");
    let fields = json!({"vocab_size": 64, "routed_scaling_factor": 1e-5, "q_lora_rank": null});
    random::write(
        random::shape("tiny").unwrap(),
        &sets(fields),
        7,
        4_000_000,
        &out,
        &|_, _| (),
    )
    .unwrap();
    assert_eq!(digests(&out), expected(&CUT));
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert!(
        checkpoint.config().eos_token_ids.is_empty(),
        "ids beyond the vocabulary mean nothing"
    );
}

#[test]
fn every_shape_opens_and_computes() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("v2-lite", json!({})),
        (
            "v2-lite",
            json!({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": 24}),
        ),
        ("moonlight-4L", json!({})),
        ("moonlight", json!({"n_shared_experts": 0})),
        ("v3", json!({"q_lora_rank": 24})),
        (
            "v3-2L",
            json!({"q_lora_rank": 24, "num_nextn_predict_layers": 1, "tie_word_embeddings": true}),
        ),
        (
            "kimi-k2",
            json!({"q_lora_rank": 24, "attention_bias": true}),
        ),
        (
            "tiny",
            json!({"q_lora_rank": 24, "n_routed_experts": null, "rope_interleave": false}),
        ),
    ];
    for (i, (shape, more)) in cases.into_iter().enumerate() {
        let out = dir.path().join(i.to_string());
        write(shape, with(small(), more), &out).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let c = checkpoint.config();
        let reference = Reference::load(&checkpoint).unwrap();
        let trace = reference.forward(&[1, 2, 299, 4]).unwrap();
        assert!(trace.logits.iter().all(|x| x.is_finite()), "{shape}");
        assert_eq!(trace.routed.len(), c.moe_layers().count());
        let drafts = reference.mtp(&[1, 2, 299, 4], &trace.final_norm);
        assert_eq!(drafts.is_ok(), c.num_nextn_predict_layers > 0, "{shape}");
        assert_eq!(
            checkpoint.contains("lm_head.weight"),
            !c.tie_word_embeddings
        );
        assert_eq!(
            checkpoint.contains("model.layers.1.mlp.gate.e_score_correction_bias"),
            c.has_router_bias() && c.n_routed_experts > 0
        );
        assert!(checkpoint.required().all(|t| t.check_finite().is_ok()));
        assert!(checkpoint.has_manifest());
        let read = Manifest::of(&checkpoint, &|_, _| ()).unwrap();
        assert_eq!(read.tensors(), checkpoint.tensors().count());
        let written = fs::read(out.join(manifest::FILE)).unwrap();
        read.write(&out).unwrap();
        assert_eq!(fs::read(out.join(manifest::FILE)).unwrap(), written);
    }
}

#[test]
fn an_mtp_layer_repeats_embedding_and_head() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("mtp");
    write(
        "tiny",
        with(small(), json!({"num_nextn_predict_layers": 1})),
        &out,
    )
    .unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let bytes = |name: &str| checkpoint.tensor(name).unwrap().bytes();
    assert_eq!(
        bytes("model.layers.3.embed_tokens.weight"),
        bytes("model.embed_tokens.weight")
    );
    assert_eq!(
        bytes("model.layers.3.shared_head.head.weight"),
        bytes("lm_head.weight")
    );
}

#[test]
fn released_sizes() {
    let size = |name: &str| random::shape(name).unwrap().config().unwrap();
    let billions = |n: u64| n as f64 / 1e9;
    let v3 = size("v3");
    assert_eq!(v3.num_nextn_predict_layers, 1);
    let main = guild_model::Config {
        num_nextn_predict_layers: 0,
        ..v3
    };
    assert_eq!(main.parameters(), 671_026_419_200);
    assert!((36.0..38.5).contains(&billions(main.active_parameters())));
    assert!((15.6..15.8).contains(&billions(size("v2-lite").parameters())));
    assert!((15.9..16.1).contains(&billions(size("moonlight").parameters())));
    assert!((1020.0..1035.0).contains(&billions(size("kimi-k2").parameters())));
    for name in random::NAMES {
        assert!(random::shape(name).unwrap().config().is_ok(), "{name}");
    }
    assert!(random::shape("v9").is_none());
}

#[test]
fn what_makes_no_model_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let refused = write("tiny", json!({"n_group": 3}), &out).unwrap_err();
    assert!(refused.to_string().contains("n_group"), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("keep"), "me").unwrap();
    let refused = write("tiny", small(), &out).unwrap_err();
    assert!(refused.to_string().contains("not empty"), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn overrides_are_json() {
    assert_eq!(
        random::parse_override("a=1").unwrap(),
        ("a".into(), json!(1))
    );
    assert_eq!(
        random::parse_override("a=null").unwrap(),
        ("a".into(), Value::Null)
    );
    assert!(random::parse_override("a").is_err());
    assert!(
        random::parse_override("a=greedy")
            .unwrap_err()
            .to_string()
            .contains("quotes")
    );
}
