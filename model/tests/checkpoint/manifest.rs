//! The manifest: what is listed is what is loaded, or nothing is.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use guild_model::checkpoint::Dtype;
use guild_model::checkpoint::manifest::{FILE, Manifest};
use guild_model::expert::Expert;
use guild_model::trunk::Trunk;
use guild_model::{Checkpoint, Cpu, ModelError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::parts::{EXPERT, FIRST, INDEX, KV_A, NORM, SECOND, Tensors, copy, edit_json, golden};

/// A copy of a golden checkpoint with its manifest.
fn listed(case: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden(case), dir.path());
    list(dir.path());
    dir
}

fn list(dir: &Path) {
    let checkpoint = Checkpoint::open_unlisted(dir).unwrap();
    Manifest::of(&checkpoint, &|_, _| ())
        .unwrap()
        .write(dir)
        .unwrap();
}

/// Flips the lowest bit of a byte of a tensor in place; the value stays finite.
fn flip(dir: &Path, tensor: &str, at: u64) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        let tensors = Tensors::read(&path);
        if tensors.header.contains_key(tensor) {
            let at = 8 + length + tensors.offsets(tensor).0 as u64 + at;
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[bytes[at as usize] ^ 1], at).unwrap();
            return;
        }
    }
    panic!("{tensor} is nowhere");
}

fn trunk(checkpoint: &Checkpoint) -> Result<(), ModelError> {
    Trunk::load(checkpoint, Dtype::Auto, &Cpu::new(2), &|_, _| ()).map(|_| ())
}

#[track_caller]
fn refused<T>(result: Result<T, ModelError>, parts: &[&str]) {
    let message = result.err().unwrap().to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

#[test]
fn a_listed_checkpoint_loads_and_is_the_same_model() {
    for case in ["v3-basic", "v3-fp8", "v3-mtp", "v2-lite"] {
        let plain = Checkpoint::open(&golden(case)).unwrap();
        assert!(!plain.has_manifest());
        let dir = listed(case);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.has_manifest());
        assert_eq!(checkpoint.digest().unwrap(), plain.digest().unwrap());
        trunk(&checkpoint).unwrap();
        for dtype in [Dtype::Auto, Dtype::F32, Dtype::Bf16] {
            Expert::load(&checkpoint, 1, 3, dtype).unwrap();
        }
        let heard = AtomicU64::new(0);
        let found = checkpoint.verify(&|done, total| {
            assert!(done <= total);
            heard.fetch_max(done, Ordering::Relaxed);
        });
        assert!(found.faults.is_empty(), "{:?}", found.faults);
        assert_eq!(found.tensors, checkpoint.tensors().count());
        assert_eq!(heard.into_inner(), found.bytes);
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.contains("partial"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn one_flipped_bit_is_refused_by_who_loads_it_by_the_digest_and_by_a_verification() {
    let scales = format!("{EXPERT}_scale_inv");
    // (tensor, whether an attention node loads it)
    let cases = [
        ("v3-fp8", "model.embed_tokens.weight", true),
        ("v3-fp8", "lm_head.weight", true),
        ("v3-fp8", NORM, true),
        ("v3-fp8", KV_A, true),
        ("v3-fp8", "model.layers.1.mlp.gate.weight", true),
        (
            "v3-fp8",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            true,
        ),
        (
            "v3-fp8",
            "model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv",
            true,
        ),
        ("v3-fp8", EXPERT, false),
        ("v3-fp8", &scales, false),
        ("v3-mtp", "model.layers.4.eh_proj.weight", true),
        ("v3-basic", EXPERT, false),
    ];
    for (case, tensor, attention) in cases {
        let dir = listed(case);
        flip(dir.path(), tensor, 4);
        let names = [".safetensors", &format!("`{tensor}`"), FILE];
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for dtype in [Dtype::Auto, Dtype::F32, Dtype::Bf16] {
            let expert = Expert::load(&checkpoint, 1, 3, dtype);
            if attention {
                expert.unwrap();
            } else {
                refused(expert, &names);
            }
        }
        match attention {
            true => refused(trunk(&checkpoint), &names),
            false => trunk(&checkpoint).unwrap(),
        }
        refused(checkpoint.digest(), &names);
        let found = checkpoint.verify(&|_, _| ());
        assert_eq!(found.faults.len(), 1);
        refused(
            found.faults.into_iter().map(Err::<(), _>).next().unwrap(),
            &names,
        );
        // Who looks at no manifest does not notice.
        let unlisted = Checkpoint::open_unlisted(dir.path()).unwrap();
        Expert::load(&unlisted, 1, 3, Dtype::Auto).unwrap();
    }
}

#[test]
fn what_changes_after_opening_is_refused_too() {
    let dir = listed("v3-basic");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.digest().unwrap();
    Expert::load(&checkpoint, 1, 3, Dtype::Auto).unwrap();
    flip(dir.path(), EXPERT, 0);
    refused(
        Expert::load(&checkpoint, 1, 3, Dtype::Auto),
        &[EXPERT, FILE],
    );
}

#[test]
fn an_expert_from_a_peer_must_be_the_listed_one_where_it_is_as_stored() {
    let dir = listed("v3-fp8");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let flipped = |dtype, at: usize| {
        let good = Expert::load(&checkpoint, 1, 3, dtype).unwrap();
        let mut blob = good.blob().to_vec();
        blob[at] ^= 1;
        Expert::from_blob(&checkpoint, 1, 3, dtype, &blob)
    };
    // The first byte of the gate, and of the gate's scales behind 136 x 144 bytes of data.
    let scales = (256 + 136 * 144usize).next_multiple_of(64);
    refused(flipped(Dtype::Auto, 256), &["gate_proj.weight`", FILE]);
    refused(
        flipped(Dtype::Auto, scales),
        &["gate_proj.weight_scale_inv`"],
    );
    flipped(Dtype::F32, 256).unwrap();
}

#[test]
fn headers_must_be_those_that_are_listed() {
    let header = |what: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let dir = listed("v3-fp8");
        let file = dir.path().join("model.safetensors");
        let mut tensors = Tensors::read(&file);
        what(&mut tensors);
        tensors.write(&file);
        refused(Checkpoint::open(dir.path()), parts);
    };
    // The same bytes as other numbers.
    header(
        &|t| t.entry("lm_head.weight")["dtype"] = json!("F16"),
        &["lm_head.weight", "dtype F16", "BF16"],
    );
    header(
        &|t| t.push("one.more", "F32", &[2], &[0; 8]),
        &["`one.more`", "not listed", FILE],
    );
    header(
        &|t| {
            let data = vec![0; 136 * 144 * 2];
            t.replace(EXPERT, "BF16", &[136, 144], &data);
        },
        &[EXPERT, "dtype BF16", "F8_E4M3"],
    );

    let dir = listed("v3-basic");
    edit_json(&dir.path().join(FILE), |m| {
        let gone = m["tensors"]
            .as_object_mut()
            .unwrap()
            .shift_remove(NORM)
            .unwrap();
        m["tensors"]["model.nowhere"] = gone;
    });
    refused(
        Checkpoint::open(dir.path()),
        &[FILE, "`model.nowhere`", "no file"],
    );
    let dir = listed("v3-basic");
    edit_json(&dir.path().join(FILE), |m| {
        m["tensors"][NORM]["shape"] = json!([1, 2]);
    });
    refused(Checkpoint::open(dir.path()), &[NORM, "shape", "[1, 2]"]);
}

#[test]
fn files_beside_the_weights_are_held_against_the_list() {
    let case = |edit: &dyn Fn(&Path), parts: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        copy(&golden("v3-basic"), dir.path());
        fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
        list(dir.path());
        Checkpoint::open(dir.path()).unwrap();
        edit(dir.path());
        refused(Checkpoint::open(dir.path()), parts);
    };
    let touch = |name: &'static str| {
        move |dir: &Path| {
            let text = fs::read_to_string(dir.join(name)).unwrap();
            fs::write(dir.join(name), text + "\n").unwrap();
        }
    };
    case(&touch("config.json"), &["config.json", FILE, "BLAKE3"]);
    case(&touch("tokenizer_config.json"), &["tokenizer_config.json"]);
    case(
        &|dir| fs::remove_file(dir.join("tokenizer_config.json")).unwrap(),
        &["tokenizer_config.json", "missing"],
    );
    case(
        &|dir| fs::write(dir.join("chat_template.jinja"), "{{ x }}").unwrap(),
        &["chat_template.jinja", "not listed"],
    );
}

#[test]
fn a_manifest_that_is_none_is_refused_by_field() {
    let edited = |edit: &dyn Fn(&mut Value), parts: &[&str]| {
        let dir = listed("v3-basic");
        edit_json(&dir.path().join(FILE), edit);
        refused(Checkpoint::open(dir.path()), &[&[FILE], parts].concat());
    };
    let hex = "zz".repeat(32);
    edited(&|m| m["version"] = json!(2), &["`version`", "2"]);
    edited(&|m| m["version"] = json!("1"), &["not a manifest"]);
    edited(&|m| m["tensors"] = json!([]), &["not a manifest"]);
    edited(
        &|m| {
            m.as_object_mut().unwrap().shift_remove("files");
        },
        &["files"],
    );
    edited(
        &|m| m["files"]["config.json"] = json!("12"),
        &["`files.config.json`", "64 hex digits"],
    );
    edited(
        &|m| m["files"]["../secret"] = json!(hex),
        &["`files.../secret`"],
    );
    edited(
        &|m| m["tensors"][NORM]["blake3"] = json!(hex),
        &[&format!("`tensors.{NORM}.blake3`")],
    );
    edited(&|m| m["tensors"][NORM]["shape"] = json!(-1), &["-1"]);

    let written = |bytes: &[u8], parts: &[&str]| {
        let dir = listed("v3-basic");
        fs::write(dir.path().join(FILE), bytes).unwrap();
        refused(Checkpoint::open(dir.path()), &[&[FILE], parts].concat());
    };
    written(b"", &["not a manifest"]);
    written(&[0xff, 0xfe, 0], &[]);
    written(b"{\"version\": 1", &["not a manifest"]);
    written("[".repeat(200_000).as_bytes(), &["not a manifest"]);
    written(&vec![b' '; 32 << 20], &["at most"]);
    let dir = listed("v3-basic");
    fs::remove_file(dir.path().join(FILE)).unwrap();
    fs::create_dir(dir.path().join(FILE)).unwrap();
    refused(Checkpoint::open(dir.path()), &[FILE]);
}

#[test]
fn no_byte_of_a_manifest_makes_it_panic() {
    let dir = listed("v3-basic");
    let path = dir.path().join(FILE);
    let good = fs::read(&path).unwrap();
    for at in (0..good.len()).step_by(good.len() / 250) {
        for byte in [good[at] ^ 1, b'"', 0xff] {
            let mut bytes = good.clone();
            bytes[at] = byte;
            fs::write(&path, bytes).unwrap();
            if let Err(error) = Checkpoint::open(dir.path()) {
                let told = error.to_string();
                assert!(told.contains("tensor") || told.contains(".json"), "{told}");
            }
        }
    }
}

#[test]
fn the_list_does_not_depend_on_the_shards() {
    let dir = listed("v3-basic");
    let [first, second] = [FIRST, SECOND].map(|name| dir.path().join(name));
    let (mut from, mut to) = (Tensors::read(&first), Tensors::read(&second));
    let (entry, data) = from.remove(EXPERT);
    let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
    to.push(EXPERT, entry["dtype"].as_str().unwrap(), &shape, &data);
    from.write(&first);
    to.write(&second);
    edit_json(&dir.path().join(INDEX), |index| {
        index["weight_map"][EXPERT] = json!(SECOND);
    });
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.digest().unwrap();
}
