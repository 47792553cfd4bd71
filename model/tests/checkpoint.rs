//! Checkpoints: what opens, what a digest sees, and more than a hundred damaged ones that must be refused by name.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use guild_model::checkpoint::{Stored, e4m3_to_f32, schema};
use guild_model::{Checkpoint, ModelError};
use serde_json::{Map, Value, json};

const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00003.safetensors";
const SECOND: &str = "model-00002-of-00003.safetensors";
const NORM: &str = "model.norm.weight";
const KV_A: &str = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
const EXPERT: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(case)
}

/// A safetensors file taken apart.
struct Tensors {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Tensors {
    fn read(path: &Path) -> Tensors {
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        Tensors { header, data: bytes[8 + length..].to_vec() }
    }

    fn write(&self, path: &Path) {
        let header = serde_json::to_vec(&self.header).unwrap();
        fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()).unwrap();
    }

    fn entry(&mut self, name: &str) -> &mut Value {
        self.header.get_mut(name).unwrap_or_else(|| panic!("{name}"))
    }

    fn offsets(&self, name: &str) -> (usize, usize) {
        serde_json::from_value(self.header[name]["data_offsets"].clone()).unwrap()
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let (from, to) = self.offsets(name);
        &self.data[from..to]
    }

    /// Takes a tensor out, closing the gap.
    fn remove(&mut self, name: &str) -> (Value, Vec<u8>) {
        let (from, to) = self.offsets(name);
        let entry = self.header.shift_remove(name).unwrap();
        let data = self.data.drain(from..to).collect();
        for (_, other) in self.header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            let [a, b]: [usize; 2] = serde_json::from_value(other["data_offsets"].clone()).unwrap();
            let shift = if a >= to { to - from } else { 0 };
            other["data_offsets"] = json!([a - shift, b - shift]);
        }
        (entry, data)
    }

    /// Puts a tensor at the end.
    fn push(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        let offsets = [self.data.len(), self.data.len() + data.len()];
        self.header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        self.data.extend(data);
    }

    /// Replaces a tensor.
    fn replace(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        self.remove(name);
        self.push(name, dtype, shape, data);
    }
}

type Edit<'a> = Box<dyn Fn(&Path) + 'a>;

/// One damaged checkpoint: where it comes from, what is done to it, and what the refusal must mention.
struct Case<'a> {
    name: String,
    source: &'static str,
    edit: Edit<'a>,
    mentions: Vec<String>,
}

#[derive(Default)]
struct Cases<'a>(Vec<Case<'a>>);

impl<'a> Cases<'a> {
    fn add(&mut self, name: &str, source: &'static str, mentions: &[&str], edit: impl Fn(&Path) + 'a) {
        let mentions = mentions.iter().map(|m| m.to_string()).collect();
        self.0.push(Case { name: name.into(), source, edit: Box::new(edit), mentions });
    }

    /// Edits one safetensors file in its parts; the refusal must name the file and whatever else is said.
    fn tensors(&mut self, name: &str, source: &'static str, file: &'static str, mentions: &[&str], edit: impl Fn(&mut Tensors) + 'a) {
        self.add(name, source, &[&[file], mentions].concat(), move |dir| {
            let mut tensors = Tensors::read(&dir.join(file));
            edit(&mut tensors);
            tensors.write(&dir.join(file));
        });
    }

    /// Edits a JSON file.
    fn json(&mut self, name: &str, source: &'static str, file: &'static str, mentions: &[&str], edit: impl Fn(&mut Value) + 'a) {
        self.add(name, source, mentions, move |dir| {
            let mut value = serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap();
            edit(&mut value);
            fs::write(dir.join(file), value.to_string()).unwrap();
        });
    }

    /// Edits the bytes of a file; the refusal must name it.
    fn bytes(&mut self, name: &str, source: &'static str, file: &'static str, edit: impl Fn(&mut Vec<u8>) + 'a) {
        self.add(name, source, &[file], move |dir| {
            let mut bytes = fs::read(dir.join(file)).unwrap();
            edit(&mut bytes);
            fs::write(dir.join(file), bytes).unwrap();
        });
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with("golden.") {
            fs::copy(entry.path(), to.join(name)).unwrap();
        }
    }
}

/// Opens a checkpoint and looks at every value that would be loaded.
fn load(dir: &Path) -> Result<(), ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint.required().try_for_each(|tensor| tensor.check_finite())
}

fn truncations(cases: &mut Cases<'_>) {
    for length in [0usize, 1, 7, 8, 9, 100, 5000] {
        cases.bytes(&format!("first shard cut to {length}"), "v3-basic", FIRST, move |b| b.truncate(length));
        cases.bytes(&format!("single file cut to {length}"), "v3-fp8", "model.safetensors", move |b| b.truncate(length));
    }
    for missing in [1usize, 2, 8, 4096, 300_000] {
        cases.bytes(&format!("shard without its last {missing}"), "v3-basic", SECOND, move |b| b.truncate(b.len() - missing));
        cases.bytes(&format!("file without its last {missing}"), "v3-fp8", "model.safetensors", move |b| b.truncate(b.len() - missing));
    }
    for extra in [1usize, 1000] {
        cases.bytes(&format!("{extra} bytes too many"), "v3-basic", SECOND, move |b| b.resize(b.len() + extra, 0));
    }
}

fn headers(cases: &mut Cases<'_>) {
    for length in [0u64, 1, 5, 1 << 20, 90_000_000, 100_000_001, 1 << 32, 1 << 62, u64::MAX - 7, u64::MAX] {
        cases.bytes(&format!("header length {length}"), "v3-basic", FIRST, move |b| b[..8].copy_from_slice(&length.to_le_bytes()));
    }
    for (name, byte) in [("not JSON", b'x'), ("a list", b'['), ("not UTF-8", 0xFF), ("cut by a zero", 0)] {
        cases.bytes(&format!("header {name}"), "v3-fp8", "model.safetensors", move |b| b[8] = byte);
    }
    let entries = [
        ("a number", json!(7)),
        ("a list", json!([])),
        ("empty", json!({})),
        ("without shape", json!({"dtype": "F32", "data_offsets": [0, 4]})),
        ("without offsets", json!({"dtype": "F32", "shape": [1]})),
        ("of a negative shape", json!({"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]})),
        ("of a fractional shape", json!({"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]})),
        ("of an unknown dtype", json!({"dtype": "F31", "shape": [64], "data_offsets": [0, 256]})),
        ("of one offset", json!({"dtype": "F32", "shape": [64], "data_offsets": [0]})),
        ("of named offsets", json!({"dtype": "F32", "shape": [64], "data_offsets": {"from": 0}})),
        ("of overflowing shape", json!({"dtype": "F32", "shape": [1u64 << 60, 1u64 << 60], "data_offsets": [0, 256]})),
    ];
    for (name, entry) in entries {
        cases.tensors(&format!("entry {name}"), "v3-basic", FIRST, &[KV_A], move |t| *t.entry(KV_A) = entry.clone());
    }
    let moves: [(&str, fn(i64, i64) -> [i64; 2]); 8] = [
        ("overlap", |a, b| [a - 4, b - 4]),
        ("leave a hole", |a, b| [a + 4, b + 4]),
        ("run backwards", |a, b| [b, a]),
        ("are negative", |a, b| [-a - 4, b]),
        ("are out of range", |a, b| [a + (1 << 40), b + (1 << 40)]),
        ("end at the end of the world", |a, _| [a, i64::MAX]),
        ("are too short", |a, b| [a, b - 4]),
        ("are empty", |a, _| [a, a]),
    ];
    for (name, change) in moves {
        cases.tensors(&format!("offsets {name}"), "v3-basic", FIRST, &["model.layers.0"], move |t| {
            let (a, b) = t.offsets(KV_A);
            t.entry(KV_A)["data_offsets"] = json!(change(a as i64, b as i64));
        });
    }
    cases.tensors("everything overlaps", "v3-fp8", "model.safetensors", &["overlap"], |t| {
        for (_, entry) in t.header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            let [a, b]: [u64; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
            entry["data_offsets"] = json!([0, b - a]);
        }
    });
    cases.bytes("header nested too deep", "v3-basic", FIRST, |b| {
        let header = "[".repeat(200_000);
        *b = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    });
}

fn tensors(cases: &mut Cases<'_>) {
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
        cases.add(&format!("{name} removed, index too"), "v3-basic", &[INDEX, name, "missing"], move |dir| {
            let mut t = Tensors::read(&dir.join(file));
            t.remove(name);
            t.write(&dir.join(file));
            edit_json(&dir.join(INDEX), |v| drop(v["weight_map"].as_object_mut().unwrap().remove(name)));
        });
        cases.tensors(&format!("{name} removed, index not"), "v3-basic", file, &[name], move |t| drop(t.remove(name)));
        cases.tensors(&format!("{name} transposed"), "v3-basic", file, &[name, "shape"], move |t| {
            let mut shape: Vec<usize> = serde_json::from_value(t.entry(name)["shape"].clone()).unwrap();
            shape.reverse();
            shape.push(1);
            t.entry(name)["shape"] = json!(shape);
        });
    }
    for (dtype, width) in [("F64", 8), ("I32", 4), ("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1)] {
        cases.tensors(&format!("norm of {dtype}"), "v3-basic", norm_shard, &[NORM, dtype], move |t| {
            t.replace(NORM, dtype, &[64], &vec![0; 64 * width]);
        });
    }
    cases.tensors("FP8 where the configuration has none", "v3-basic", FIRST, &[KV_A, "quantization_config"], |t| {
        t.replace(KV_A, "F8_E4M3", &[48, 64], &[0; 48 * 64]);
    });
    cases.tensors("renamed", "v3-fp8", "model.safetensors", &[EXPERT], |t| {
        let entry = t.header.shift_remove(EXPERT).unwrap();
        t.header.insert("model.layers.1.mlp.experts.99.up_proj.weight".into(), entry);
    });
    let nan = [("NaN", f32::NAN), ("infinity", f32::INFINITY), ("minus infinity", f32::NEG_INFINITY)];
    for (what, value) in nan {
        cases.tensors(&format!("{what} in a norm"), "v3-basic", norm_shard, &[NORM, "element 5"], move |t| {
            let (from, _) = t.offsets(NORM);
            t.data[from + 20..from + 24].copy_from_slice(&value.to_le_bytes());
        });
        cases.tensors(&format!("{what} in bf16"), "v3-fp8", "model.safetensors", &[NORM, "element 143"], move |t| {
            let (_, to) = t.offsets(NORM);
            t.data[to - 2..to].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
        });
    }
    cases.tensors("NaN in FP8", "v3-fp8", "model.safetensors", &[EXPERT, "element 0"], |t| {
        let (from, _) = t.offsets(EXPERT);
        t.data[from] = 0xFF;
    });
}

fn scales(cases: &mut Cases<'_>) {
    const FILE: &str = "model.safetensors";
    let scale = format!("{EXPERT}_scale_inv");
    let add = |cases: &mut Cases<'_>, name: &str, says: &str, dtype: &'static str, shape: &'static [usize], data: Vec<u8>| {
        let scale = scale.clone();
        cases.tensors(name, "v3-fp8", FILE, &[&scale.clone(), says], move |t| t.replace(&scale, dtype, shape, &data));
    };
    add(cases, "scale of one block", "shape", "F32", &[1, 1], vec![0; 4]);
    add(cases, "scales rounded down", "shape", "F32", &[1, 2], vec![0; 8]);
    add(cases, "scales too many", "shape", "F32", &[3, 2], vec![0; 24]);
    add(cases, "scales in a row", "shape", "F32", &[4], vec![0; 16]);
    add(cases, "scales of bf16", "dtype", "BF16", &[2, 2], vec![0; 8]);
    add(cases, "scales of f64", "dtype", "F64", &[2, 2], vec![0; 32]);
    add(cases, "a scale of NaN", "element 0", "F32", &[2, 2], vec![0xFF; 16]);
    let gone = scale.clone();
    cases.tensors("no scales", "v3-fp8", FILE, &[&scale, "missing"], move |t| drop(t.remove(&gone)));
}

fn indexes(cases: &mut Cases<'_>) {
    cases.add("no weights at all", "v3-basic", &["model.safetensors"], |dir| {
        for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
            if entry.file_name() != "config.json" {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    });
    for file in [FIRST, SECOND, "model-00003-of-00003.safetensors"] {
        cases.add(&format!("{file} missing"), "v3-basic", &[file], move |dir| fs::remove_file(dir.join(file)).unwrap());
    }
    cases.add("a shard is a directory", "v3-basic", &[SECOND], |dir| {
        fs::remove_file(dir.join(SECOND)).unwrap();
        fs::create_dir(dir.join(SECOND)).unwrap();
    });
    for wrong in ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "x\0y"] {
        cases.json(&format!("index names {wrong:?}"), "v3-basic", INDEX, &[INDEX, "plain names"], move |v| v["weight_map"][NORM] = json!(wrong));
    }
    cases.json("index names a file that is not there", "v3-basic", INDEX, &["model-9.safetensors"], |v| v["weight_map"][NORM] = json!("model-9.safetensors"));
    cases.json("index names the wrong shard", "v3-basic", INDEX, &[KV_A, SECOND], |v| v["weight_map"][KV_A] = json!(SECOND));
    cases.json("index names a tensor nobody has", "v3-basic", INDEX, &[FIRST, "model.extra"], |v| v["weight_map"]["model.extra"] = json!(FIRST));
    cases.json("index leaves a tensor out", "v3-basic", INDEX, &[INDEX, KV_A], |v| drop(v["weight_map"].as_object_mut().unwrap().remove(KV_A)));
    for (name, value) in [("empty", json!({})), ("a list", json!([])), ("a number", json!(3)), ("of numbers", json!({"a": 1}))] {
        cases.json(&format!("weight_map {name}"), "v3-basic", INDEX, &[INDEX], move |v| v["weight_map"] = value.clone());
    }
    cases.bytes("index cut", "v3-basic", INDEX, |b| b.truncate(b.len() / 2));
    cases.bytes("index empty", "v3-basic", INDEX, |b| b.clear());
    cases.bytes("index not UTF-8", "v3-basic", INDEX, |b| b[10] = 0xFE);
    cases.add("a tensor in two shards", "v3-basic", &[SECOND, KV_A, "duplicate", FIRST], |dir| {
        let first = Tensors::read(&dir.join(FIRST));
        let mut second = Tensors::read(&dir.join(SECOND));
        second.push(KV_A, "F32", &[48, 64], first.bytes(KV_A));
        second.write(&dir.join(SECOND));
    });
}

fn configs(cases: &mut Cases<'_>) {
    const CONFIG: &str = "config.json";
    cases.add("no configuration", "v3-basic", &[CONFIG], |dir| fs::remove_file(dir.join(CONFIG)).unwrap());
    cases.bytes("configuration cut", "v3-basic", CONFIG, |b| b.truncate(50));
    cases.bytes("configuration of zeros", "v3-basic", CONFIG, |b| b.fill(0));
    cases.bytes("configuration of 5 MB", "v3-basic", CONFIG, |b| b.resize(5 << 20, b' '));
    let fields = [
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group",
    ];
    for field in fields {
        for value in [json!("4"), json!(-1), json!(1e30), json!(true), json!(1u64 << 50)] {
            cases.json(&format!("{field} = {value}"), "v3-basic", CONFIG, &[CONFIG, field], move |v| v[field] = value.clone());
        }
    }
    // A configuration that is sound by itself but not that of these weights.
    let others = [
        ("hidden_size", json!(128), "shape"),
        ("vocab_size", json!(321), "model.embed_tokens.weight"),
        ("num_hidden_layers", json!(5), "model.layers.4."),
        ("n_routed_experts", json!(32), "model.layers.1.mlp.gate.weight"),
        ("n_shared_experts", json!(2), "shared_experts"),
        ("first_k_dense_replace", json!(2), "model.layers.1.mlp.gate_proj.weight"),
        ("q_lora_rank", json!(null), "q_proj"),
        ("kv_lora_rank", json!(64), "kv_a_proj_with_mqa"),
        ("num_nextn_predict_layers", json!(1), "model.layers.4.enorm.weight"),
        ("attention_bias", json!(true), "q_a_proj.bias"),
    ];
    for (field, value, mention) in others {
        cases.json(&format!("{field} of another model"), "v3-basic", CONFIG, &["safetensors", mention], move |v| v[field] = value.clone());
    }
    cases.json("FP8 weights, no quantization", "v3-fp8", CONFIG, &["quantization_config"], |v| v["quantization_config"] = json!(null));
}

/// Which file of a golden checkpoint holds a tensor.
fn shard_of(case: &str, name: &str) -> &'static str {
    let index: Value = serde_json::from_slice(&fs::read(golden(case).join(INDEX)).unwrap()).unwrap();
    index["weight_map"][name].as_str().unwrap_or_else(|| panic!("{name}")).to_owned().leak()
}

fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let mut cases = Cases::default();
    for add in [truncations, headers, tensors, scales, indexes, configs] {
        add(&mut cases);
    }
    assert!(cases.0.len() >= 200, "{} cases", cases.0.len());
    let root = tempfile::tempdir().unwrap();
    let mut faults = Vec::new();
    for (i, case) in cases.0.iter().enumerate() {
        let dir = root.path().join(i.to_string());
        copy(&golden(case.source), &dir);
        (case.edit)(&dir);
        match catch_unwind(|| load(&dir)) {
            Err(_) => faults.push(format!("{}: panicked", case.name)),
            Ok(Ok(())) => faults.push(format!("{}: accepted", case.name)),
            Ok(Err(refusal)) => {
                let text = refusal.to_string(); if std::env::var("SHOW").is_ok() { eprintln!("{i} {} => {}", case.name, text.replace(root.path().to_str().unwrap(), "")); }
                let silent = case.mentions.iter().filter(|m| !text.contains(*m));
                faults.extend(silent.map(|m| format!("{}: `{text}` does not mention `{m}`", case.name)));
            }
        }
        fs::remove_dir_all(&dir).unwrap();
    }
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.0.len(), faults.join("\n"));
}

#[test]
fn golden_checkpoints_open() {
    for case in ["v2-lite", "v3-basic", "v3-fp8", "v3-mtp", "v3-noqlora", "v3-yarn"] {
        load(&golden(case)).unwrap();
    }
    let fp8 = Checkpoint::open(&golden("v3-fp8")).unwrap();
    // gate, up [136, 144] and down [144, 136] in bytes, four f32 scales each.
    assert_eq!(fp8.expert_bytes(1), 3 * (136 * 144 + 4 * 4));
    assert_eq!(fp8.expert_bytes(0), 0);
    assert_eq!(fp8.tensor(EXPERT).unwrap().dtype(), Stored::F8E4M3);
    assert_eq!(fp8.tensor(EXPERT).unwrap().scales().unwrap().unwrap().shape(), [2, 2]);
    let listed: usize = schema(fp8.config()).count();
    assert_eq!(listed, fp8.required().filter(|t| !t.name().ends_with("_scale_inv")).count());
    let missing = fp8.tensor("model.nothing").unwrap_err().to_string();
    assert!(missing.contains("model.nothing"), "{missing}");
}

#[test]
fn what_nobody_asks_for_is_tolerated() {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-fp8"), dir.path());
    let file = dir.path().join("model.safetensors");
    let mut tensors = Tensors::read(&file);
    tensors.push("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[8], &[0; 32]);
    tensors.push("model.layers.3.enorm.weight", "I64", &[1], &[0; 8]);
    // A linear layer of a quantised model may be left as it was.
    tensors.replace(EXPERT, "BF16", &[136, 144], &[0; 2 * 136 * 144]);
    tensors.remove(&format!("{EXPERT}_scale_inv"));
    tensors.replace(KV_A, "F16", &[156, 144], &[0; 2 * 156 * 144]);
    tensors.write(&file);
    load(dir.path()).unwrap();
}

#[test]
fn a_digest_sees_contents_not_files() {
    let dir = tempfile::tempdir().unwrap();
    let digest = |dir: &Path| Checkpoint::open(dir).unwrap().digest().unwrap();
    let original = digest(&golden("v3-basic"));
    assert!(original.starts_with("full:") && original.len() == 5 + 64);

    // The same tensors in one file, in another order, with more beside them and another spelling of the configuration.
    let mut whole = Tensors { header: Map::new(), data: Vec::new() };
    let mut all = BTreeMap::new();
    for file in [FIRST, SECOND, "model-00003-of-00003.safetensors"] {
        let shard = Tensors::read(&golden("v3-basic").join(file));
        for (name, entry) in shard.header.iter().filter(|(name, _)| *name != "__metadata__") {
            let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
            all.insert(name.clone(), (shape, shard.bytes(name).to_vec()));
        }
    }
    whole.push("extra", "U8", &[4], &[0; 4]);
    for (name, (shape, data)) in all.iter().rev() {
        whole.push(name, "F32", shape, data);
    }
    whole.write(&dir.path().join("model.safetensors"));
    fs::copy(golden("v3-basic").join("config.json"), dir.path().join("config.json")).unwrap();
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
    edit_json(&dir.path().join("config.json"), |v| v["routed_scaling_factor"] = json!(2.25));
    assert_ne!(digest(dir.path()), original, "the configuration counts");
}

#[test]
fn stored_formats_widen_exactly() {
    assert_eq!([0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xC0].map(e4m3_to_f32), [0.0, 0.001953125, 0.013671875, 0.015625, 1.0, 448.0, -2.0]);
    assert!(e4m3_to_f32(0x7F).is_nan() && e4m3_to_f32(0xFF).is_nan());
    assert!((0..=255u8).filter(|b| b & 0x7F != 0x7F).all(|b| e4m3_to_f32(b).is_finite()));

    let dir = tempfile::tempdir().unwrap();
    copy(&golden("v3-fp8"), dir.path());
    let file = dir.path().join("model.safetensors");
    let mut tensors = Tensors::read(&file);
    let halves: Vec<u8> = [1.5f32, -0.25].iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    tensors.push("halves", "F16", &[2], &halves);
    tensors.write(&file);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor("halves").unwrap().to_f32().unwrap(), [1.5, -0.25]);

    // The last block of a [136, 144] weight covers rows 128.. and columns 128.. only.
    let name = EXPERT.strip_suffix(".weight").unwrap();
    let (values, shape) = checkpoint.weight_f32(name).unwrap();
    let raw = checkpoint.tensor(EXPERT).unwrap().to_f32().unwrap();
    let scales = checkpoint.tensor(&format!("{EXPERT}_scale_inv")).unwrap().to_f32().unwrap();
    assert_eq!(shape, [136, 144]);
    for (row, col, block) in [(0, 0, 0), (127, 128, 1), (128, 127, 2), (135, 143, 3)] {
        assert_eq!(values[row * 144 + col], raw[row * 144 + col] * scales[block]);
    }
}
