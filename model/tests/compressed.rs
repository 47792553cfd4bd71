//! Routed experts as the `compressed-tensors` library packs them, from an independent program.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::golden;
use guild_model::checkpoint::Dtype;
use guild_model::expert::Expert;
use guild_model::{Checkpoint, Cpu, ModelError, whole};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A golden checkpoint with its experts packed, and what the packed experts' weights are worth.
fn packed(group: usize) -> (TempDir, PathBuf, HashMap<String, Vec<f32>>) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("packed");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/pack_quantized.py");
    let python = std::env::var("GUILD_TEST_PYTHON").unwrap_or("python3".into());
    let ran = Command::new(python)
        .arg(script)
        .args([golden::dir("v3-mtp"), out.clone()])
        .arg(group.to_string())
        .output()
        .unwrap();
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    let bytes = fs::read(out.join("expected.bin")).unwrap();
    let (mut rest, mut values) = (bytes.as_slice(), HashMap::new());
    let plain = Checkpoint::open(&golden::dir("v3-mtp")).unwrap();
    while let Some((length, after)) = rest.split_first_chunk() {
        let (name, after) = after.split_at(u32::from_le_bytes(*length) as usize);
        let name = std::str::from_utf8(name).unwrap();
        let elements = plain.tensor(name).unwrap().elements();
        let (numbers, after) = after.split_at(4 * elements);
        let numbers = numbers.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
        values.insert(name.to_owned(), numbers.collect());
        rest = after;
    }
    (dir, out, values)
}

#[test]
fn experts_have_the_very_integers_and_scales_that_were_packed() {
    let cpu = Cpu::new(1);
    for group in [32, 64] {
        let (_dir, out, values) = packed(group);
        let ckpt = Checkpoint::open(&out).unwrap();
        assert!(values.len() > 100);
        for (name, values) in &values {
            let name = name.strip_suffix(".weight").unwrap();
            assert_eq!(&ckpt.weight_f32(name).unwrap().0, values, "{name}");
        }
        // In memory it is an expert like any other: it can be sent, and computes what it should.
        let expert = Expert::load(&ckpt, 1, 3, Dtype::Auto).unwrap();
        assert_eq!(
            Expert::blob_len(&ckpt, 1, 3, Dtype::Auto).unwrap(),
            expert.blob().len()
        );
        let sent = Expert::from_blob(&ckpt, 1, 3, Dtype::Auto, expert.blob()).unwrap();
        assert_eq!(sent.digest(), expert.digest());
        let x: Vec<f32> = (0..ckpt.config().hidden_size)
            .map(|i| (i as f32).cos())
            .collect();
        golden::assert_same_bits("sent", &sent.forward(&cpu, &x), &expert.forward(&cpu, &x));
        let rows = whole::final_rows(&ckpt, Dtype::Auto, &cpu, &[vec![3, 1, 4]], &|_, _| ());
        assert!(rows.unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn what_is_packed_otherwise_is_refused_by_field_or_tensor() {
    #[track_caller]
    fn refused<T>(result: Result<T, ModelError>, parts: &[&str]) {
        let message = result.err().unwrap().to_string();
        assert!(parts.iter().all(|p| message.contains(p)), "{message}");
    }
    let (_dir, out, _) = packed(32);
    let path = out.join("config.json");
    let right: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let with = |pointer: &str, value: Value| {
        let mut config = right.clone();
        let prefix = "/quantization_config";
        *config.pointer_mut(&format!("{prefix}{pointer}")).unwrap() = value;
        fs::write(&path, config.to_string()).unwrap();
        Checkpoint::open(&out)
    };
    let weights = "/config_groups/group_0/weights";
    for (pointer, value) in [
        ("/format", json!("marlin-24")),
        ("/kv_cache_scheme", json!({"num_bits": 8})),
        (
            "/config_groups/group_0/input_activations",
            json!({"num_bits": 8}),
        ),
        (&format!("{weights}/num_bits"), json!(8)),
        (&format!("{weights}/symmetric"), json!(false)),
        (&format!("{weights}/group_size"), json!(16)),
        (&format!("{weights}/actorder"), json!("group")),
    ] {
        let field = pointer[1..].replace('/', ".");
        refused(
            with(pointer, value),
            &["config.json", &format!("quantization_config.{field}")],
        );
    }
    refused(
        with("/config_groups", json!({})),
        &["config_groups", "one group"],
    );
    refused(
        with(&format!("{weights}/group_size"), json!(64)),
        &["gate_proj.weight_scale", "shape"],
    );
    with("/quant_method", json!("compressed-tensors")).unwrap();
    let mapped = Checkpoint::open(&out).unwrap().with_mapped_experts();
    refused(mapped, &["no packed experts"]);
    let ckpt = Checkpoint::open(&out).unwrap();
    refused(
        Expert::load(&ckpt, 1, 0, Dtype::Bf16),
        &["gate_proj.weight_packed", "--dtype auto"],
    );
}
