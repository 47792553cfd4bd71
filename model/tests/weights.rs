//! Loading: what is read, what is refused, what is counted.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::sync::Mutex;

use common::golden;
use guild_model::checkpoint::{Checkpoint, Dtype};
use guild_model::expert::Expert;
use guild_model::trunk::Trunk;
use guild_model::{Cpu, ModelError};
use safetensors::SafeTensors;

/// A copy of a golden checkpoint with bytes of one tensor replaced.
fn damaged(case: &str, tensor: &str, at: usize, bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden::dir(case)).unwrap() {
        let path = entry.unwrap().path();
        let copy = dir.path().join(path.file_name().unwrap());
        let mut file = std::fs::read(&path).unwrap();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let start = SafeTensors::deserialize(&file)
                .unwrap()
                .tensor(tensor)
                .map(|t| t.data().as_ptr().addr());
            if let Ok(start) = start {
                let start = start - file.as_ptr().addr() + at;
                file[start..start + bytes.len()].copy_from_slice(bytes);
            }
        }
        std::fs::write(copy, file).unwrap();
    }
    dir
}

fn load(dir: &Path, dtype: Dtype) -> Result<Trunk, ModelError> {
    Trunk::load(&Checkpoint::open(dir)?, dtype, &Cpu::new(2), &|_, _| ())
}

#[track_caller]
fn refused<T>(result: Result<T, ModelError>, parts: &[&str]) {
    let message = result.err().unwrap().to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

#[test]
fn a_number_that_is_not_finite_is_refused_by_name() {
    let nan = f32::NAN.to_le_bytes();
    let infinite = half::bf16::INFINITY.to_le_bytes();
    let cases: [(&str, &str, usize, &[u8], &str); 6] = [
        (
            "v3-basic",
            "model.embed_tokens.weight",
            4 * 77,
            &nan,
            "element 77",
        ),
        (
            "v3-basic",
            "model.layers.2.self_attn.kv_b_proj.weight",
            4 * 5,
            &nan,
            "element 5",
        ),
        (
            "v3-mtp",
            "model.layers.4.eh_proj.weight",
            2 * 9,
            &infinite,
            "element 9",
        ),
        (
            "v3-mtp",
            "model.layers.1.input_layernorm.weight",
            2 * 3,
            &infinite,
            "element 3",
        ),
        (
            "v3-fp8",
            "model.layers.0.mlp.up_proj.weight",
            1234,
            &[0xff],
            "element 1234",
        ),
        (
            "v3-fp8",
            "model.layers.0.mlp.up_proj.weight_scale_inv",
            4,
            &f32::MAX.to_le_bytes(),
            "element 1",
        ),
    ];
    for (case, tensor, at, bytes, element) in cases {
        let dir = damaged(case, tensor, at, bytes);
        for dtype in [Dtype::Auto, Dtype::F32, Dtype::Bf16] {
            refused(
                load(dir.path(), dtype),
                &[".safetensors", &format!("`{tensor}`"), element],
            );
        }
    }
}

#[test]
fn an_attention_node_does_not_look_at_experts_nor_an_expert_node_at_others() {
    let tensor = "model.layers.2.mlp.experts.7.up_proj.weight";
    let dir = damaged("v3-basic", tensor, 0, &f32::NAN.to_le_bytes());
    let ckpt = Checkpoint::open(dir.path()).unwrap();
    load(dir.path(), Dtype::Auto).unwrap();
    Expert::load(&ckpt, 2, 6, Dtype::Auto).unwrap();
    refused(
        Expert::load(&ckpt, 2, 7, Dtype::Auto),
        &[tensor, "element 0"],
    );
}

#[test]
fn a_weight_too_large_for_bf16_is_refused_when_asked_for_bf16() {
    let dir = damaged("v3-basic", "lm_head.weight", 4 * 2, &f32::MAX.to_le_bytes());
    load(dir.path(), Dtype::Auto).unwrap();
    refused(
        load(dir.path(), Dtype::Bf16),
        &["lm_head.weight", "element 2", "bf16"],
    );
}

#[test]
fn there_are_no_experts_where_the_configuration_has_none() {
    let ckpt = Checkpoint::open(&golden::dir("v3-mtp")).unwrap();
    for (layer, expert) in [(0, 0), (5, 0), (usize::MAX, 0), (1, 16), (1, usize::MAX)] {
        refused(
            Expert::load(&ckpt, layer, expert, Dtype::Auto),
            &[&layer.min(expert.max(layer)).to_string()],
        );
    }
    Expert::load(&ckpt, 4, 15, Dtype::Auto).unwrap();
}

#[test]
fn progress_ends_with_all_bytes_and_small_models_tell_nothing_else() {
    for case in golden::CASES {
        let ckpt = Checkpoint::open(&golden::dir(case)).unwrap();
        let heard = Mutex::new(Vec::new());
        Trunk::load(&ckpt, Dtype::Auto, &Cpu::new(2), &|done, total| {
            heard.lock().unwrap().push((done, total))
        })
        .unwrap();
        let heard = heard.into_inner().unwrap();
        let total = Trunk::stored_bytes(&ckpt);
        assert_eq!(heard, [(total, total)]);
        let config = ckpt.config();
        let experts: u64 = config
            .expert_layers()
            .map(|l| ckpt.expert_bytes(l) * config.n_routed_experts as u64)
            .sum();
        assert_eq!(total + experts, ckpt.required_bytes(), "{case}");
    }
}

#[test]
fn resident_bytes_follow_the_dtype() {
    let ckpt = Checkpoint::open(&golden::dir("v3-mtp")).unwrap();
    let expert = |dtype| Expert::load(&ckpt, 1, 0, dtype).unwrap().bytes();
    assert_eq!(expert(Dtype::Auto), ckpt.expert_bytes(1));
    assert_eq!(expert(Dtype::F32), 2 * ckpt.expert_bytes(1));
    let trunk = |dtype| {
        Trunk::load(&ckpt, dtype, &Cpu::new(1), &|_, _| ())
            .unwrap()
            .bytes()
    };
    assert_eq!(trunk(Dtype::Auto), trunk(Dtype::Bf16));
    assert!(trunk(Dtype::F32) > trunk(Dtype::Auto));
    let fp8 = Checkpoint::open(&golden::dir("v3-fp8")).unwrap();
    assert_eq!(
        Expert::load(&fp8, 1, 0, Dtype::Auto).unwrap().bytes(),
        fp8.expert_bytes(1)
    );
}
