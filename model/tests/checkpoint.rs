//! Checkpoints: what opens, what a digest sees, and more than a hundred damaged ones that must be
//! refused by name.
#![allow(clippy::unwrap_used)]

#[path = "checkpoint/contents.rs"]
mod contents;
#[path = "checkpoint/faults.rs"]
mod faults;
#[path = "checkpoint/manifest.rs"]
mod manifest;
#[path = "checkpoint/parts.rs"]
mod parts;

use std::collections::BTreeMap;
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use guild_model::checkpoint::{Stored, e4m3_to_f32, schema};
use guild_model::{Checkpoint, ModelError};
use serde_json::{Map, json};

use parts::{EXPERT, FIRST, KV_A, SECOND, Tensors, copy, edit_json, golden};

/// Opens a checkpoint and looks at every value that would be loaded.
fn load(dir: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint
        .required()
        .try_for_each(|tensor| tensor.check_finite())
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let cases = faults::all();
    assert!(cases.len() >= 200, "{} cases", cases.len());
    let root = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let dir = root.path().join(i.to_string());
        copy(&golden(case.source), &dir);
        (case.edit)(&dir);
        match catch_unwind(|| load(&dir)) {
            Err(_) => wrong.push(format!("{}: panicked", case.name)),
            Ok(Ok(())) => wrong.push(format!("{}: accepted", case.name)),
            Ok(Err(refusal)) => {
                let text = refusal.to_string();
                let silent = case.mentions.iter().filter(|m| !text.contains(*m));
                wrong.extend(
                    silent.map(|m| format!("{}: `{text}` does not mention `{m}`", case.name)),
                );
            }
        }
        fs::remove_dir_all(&dir).unwrap();
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn golden_checkpoints_open() {
    for case in [
        "v2-lite",
        "v3-basic",
        "v3-fp8",
        "v3-mtp",
        "v3-noqlora",
        "v3-yarn",
    ] {
        load(&golden(case)).unwrap();
    }
    let fp8 = Checkpoint::open(&golden("v3-fp8")).unwrap();
    assert_eq!(fp8.name(), "v3-fp8");
    let roundabout = golden("v3-fp8").join("..").join("v3-fp8").join(".");
    assert_eq!(Checkpoint::open(&roundabout).unwrap().name(), "v3-fp8");
    // gate, up [136, 144] and down [144, 136] in bytes, four f32 scales each.
    assert_eq!(fp8.expert_bytes(1), 3 * (136 * 144 + 4 * 4));
    assert_eq!(fp8.expert_bytes(0), 0);
    assert_eq!(fp8.tensor(EXPERT).unwrap().dtype(), Stored::F8E4M3);
    assert_eq!(
        fp8.tensor(EXPERT)
            .unwrap()
            .scales()
            .unwrap()
            .unwrap()
            .shape(),
        [2, 2]
    );
    let listed: usize = schema(fp8.config()).count();
    assert_eq!(
        listed,
        fp8.required()
            .filter(|t| !t.name().ends_with("_scale_inv"))
            .count()
    );
    let missing = fp8.tensor("model.nothing").unwrap_err().to_string();
    assert!(missing.contains("model.nothing"), "{missing}");
}

#[test]
fn what_nobody_asks_for_is_tolerated() {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-fp8"), dir.path());
    let file = dir.path().join("model.safetensors");
    let mut tensors = Tensors::read(&file);
    tensors.push(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "F32",
        &[8],
        &[0; 32],
    );
    tensors.push("model.layers.3.enorm.weight", "I64", &[1], &[0; 8]);
    // A linear layer of a quantised model may be left as it was.
    tensors.replace(EXPERT, "BF16", &[136, 144], &[0; 2 * 136 * 144]);
    tensors.remove(&format!("{EXPERT}_scale_inv"));
    tensors.replace(KV_A, "F16", &[156, 144], &[0; 2 * 156 * 144]);
    tensors.write(&file);
    load(dir.path()).unwrap();
}

#[test]
fn mtp_layers_are_there_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-basic"), dir.path());
    edit_json(&dir.path().join("config.json"), |v| {
        v["num_nextn_predict_layers"] = json!(1)
    });
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config().num_nextn_predict_layers, 0);
    let plain = Checkpoint::open(&golden("v3-basic")).unwrap();
    assert_eq!(checkpoint.digest().unwrap(), plain.digest().unwrap());

    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-mtp"), dir.path());
    let index = dir.path().join("model.safetensors.index.json");
    edit_json(&index, |v| {
        v["weight_map"]
            .as_object_mut()
            .unwrap()
            .remove("model.layers.4.enorm.weight");
    });
    let refusal = load(dir.path()).unwrap_err().to_string();
    assert!(refusal.contains("model.layers.4.enorm.weight"), "{refusal}");
}

#[test]
fn a_digest_sees_contents_not_files() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |dir: &Path| Checkpoint::open(dir).unwrap().digest().unwrap();
    let original = digest(&golden("v3-basic"));
    assert!(original.starts_with("full:") && original.len() == 5 + 64);

    // The same tensors in one file, in another order, with more beside them and another spelling
    // of the configuration.
    let mut whole = Tensors {
        header: Map::new(),
        data: Vec::new(),
    };
    let mut all = BTreeMap::new();
    for file in [FIRST, SECOND, "model-00003-of-00003.safetensors"] {
        let shard = Tensors::read(&golden("v3-basic").join(file));
        for (name, entry) in shard
            .header
            .iter()
            .filter(|(name, _)| *name != "__metadata__")
        {
            let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
            all.insert(name.clone(), (shape, shard.bytes(name).to_vec()));
        }
    }
    whole.push("extra", "U8", &[4], &[0; 4]);
    for (name, (shape, data)) in all.iter().rev() {
        whole.push(name, "F32", shape, data);
    }
    whole.write(&dir.path().join("model.safetensors"));
    fs::copy(
        golden("v3-basic").join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    edit_json(&dir.path().join("config.json"), |v| {
        v["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
        v["use_cache"] = json!(false);
    });
    assert_eq!(digest(dir.path()), original);

    let (from, _) = whole.offsets(EXPERT);
    whole.data[from] ^= 1;
    whole.write(&dir.path().join("model.safetensors"));
    let flipped = digest(dir.path());
    assert_ne!(flipped, original, "one bit of one weight");
    whole.data[from] ^= 1;
    whole.write(&dir.path().join("model.safetensors"));
    edit_json(&dir.path().join("config.json"), |v| {
        v["routed_scaling_factor"] = json!(2.25)
    });
    assert_ne!(digest(dir.path()), original, "the configuration counts");
}

#[test]
fn stored_formats_widen_exactly() {
    assert_eq!(
        [0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xC0].map(e4m3_to_f32),
        [0.0, 0.001953125, 0.013671875, 0.015625, 1.0, 448.0, -2.0]
    );
    assert!(e4m3_to_f32(0x7F).is_nan() && e4m3_to_f32(0xFF).is_nan());
    assert!(
        (0..=255u8)
            .filter(|b| b & 0x7F != 0x7F)
            .all(|b| e4m3_to_f32(b).is_finite())
    );

    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-fp8"), dir.path());
    let file = dir.path().join("model.safetensors");
    let mut tensors = Tensors::read(&file);
    let halves: Vec<u8> = [1.5f32, -0.25]
        .iter()
        .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
        .collect();
    tensors.push("halves", "F16", &[2], &halves);
    tensors.write(&file);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        checkpoint.tensor("halves").unwrap().to_f32().unwrap(),
        [1.5, -0.25]
    );

    // The last block of a [136, 144] weight covers rows 128.. and columns 128.. only.
    let name = EXPERT.strip_suffix(".weight").unwrap();
    let (values, shape) = checkpoint.weight_f32(name).unwrap();
    let raw = checkpoint.tensor(EXPERT).unwrap().to_f32().unwrap();
    let scales = checkpoint
        .tensor(&format!("{EXPERT}_scale_inv"))
        .unwrap()
        .to_f32()
        .unwrap();
    assert_eq!(shape, [136, 144]);
    for (row, col, block) in [(0, 0, 0), (127, 128, 1), (128, 127, 2), (135, 143, 3)] {
        assert_eq!(
            values[row * 144 + col],
            raw[row * 144 + col] * scales[block]
        );
    }
}
