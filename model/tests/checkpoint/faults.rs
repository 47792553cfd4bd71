//! More than two hundred ways to damage a checkpoint.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::contents;
use super::parts::{FIRST, INDEX, KV_A, NORM, SECOND, Tensors};

pub(crate) type Edit<'a> = Box<dyn Fn(&Path) + 'a>;

/// One damaged checkpoint: where it comes from, what is done to it, and what the refusal must
/// mention.
pub(crate) struct Case<'a> {
    pub(crate) name: String,
    pub(crate) source: &'static str,
    pub(crate) edit: Edit<'a>,
    pub(crate) mentions: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Cases<'a>(Vec<Case<'a>>);

impl<'a> Cases<'a> {
    pub(crate) fn add(
        &mut self,
        name: &str,
        source: &'static str,
        mentions: &[&str],
        edit: impl Fn(&Path) + 'a,
    ) {
        let mentions = mentions.iter().map(|m| m.to_string()).collect();
        self.0.push(Case {
            name: name.into(),
            source,
            edit: Box::new(edit),
            mentions,
        });
    }

    /// Edits one safetensors file in its parts; the refusal must name the file and whatever else
    /// is said.
    pub(crate) fn tensors(
        &mut self,
        name: &str,
        source: &'static str,
        file: &'static str,
        mentions: &[&str],
        edit: impl Fn(&mut Tensors) + 'a,
    ) {
        self.add(name, source, &[&[file], mentions].concat(), move |dir| {
            let mut tensors = Tensors::read(&dir.join(file));
            edit(&mut tensors);
            tensors.write(&dir.join(file));
        });
    }

    /// Edits a JSON file.
    pub(crate) fn json(
        &mut self,
        name: &str,
        source: &'static str,
        file: &'static str,
        mentions: &[&str],
        edit: impl Fn(&mut Value) + 'a,
    ) {
        self.add(name, source, mentions, move |dir| {
            let mut value = serde_json::from_slice(&fs::read(dir.join(file)).unwrap()).unwrap();
            edit(&mut value);
            fs::write(dir.join(file), value.to_string()).unwrap();
        });
    }

    /// Edits the bytes of a file; the refusal must name it.
    pub(crate) fn bytes(
        &mut self,
        name: &str,
        source: &'static str,
        file: &'static str,
        edit: impl Fn(&mut Vec<u8>) + 'a,
    ) {
        self.add(name, source, &[file], move |dir| {
            let mut bytes = fs::read(dir.join(file)).unwrap();
            edit(&mut bytes);
            fs::write(dir.join(file), bytes).unwrap();
        });
    }
}

fn truncations(cases: &mut Cases<'_>) {
    for length in [0usize, 1, 7, 8, 9, 100, 5000] {
        cases.bytes(
            &format!("first shard cut to {length}"),
            "v3-basic",
            FIRST,
            move |b| b.truncate(length),
        );
        cases.bytes(
            &format!("single file cut to {length}"),
            "v3-fp8",
            "model.safetensors",
            move |b| b.truncate(length),
        );
    }
    for missing in [1usize, 2, 8, 4096, 300_000] {
        cases.bytes(
            &format!("shard without its last {missing}"),
            "v3-basic",
            SECOND,
            move |b| b.truncate(b.len() - missing),
        );
        cases.bytes(
            &format!("file without its last {missing}"),
            "v3-fp8",
            "model.safetensors",
            move |b| b.truncate(b.len() - missing),
        );
    }
    for extra in [1usize, 1000] {
        cases.bytes(
            &format!("{extra} bytes too many"),
            "v3-basic",
            SECOND,
            move |b| b.resize(b.len() + extra, 0),
        );
    }
}

fn headers(cases: &mut Cases<'_>) {
    for length in [
        0u64,
        1,
        5,
        1 << 20,
        90_000_000,
        100_000_001,
        1 << 32,
        1 << 62,
        u64::MAX - 7,
        u64::MAX,
    ] {
        cases.bytes(
            &format!("header length {length}"),
            "v3-basic",
            FIRST,
            move |b| b[..8].copy_from_slice(&length.to_le_bytes()),
        );
    }
    for (name, byte) in [
        ("not JSON", b'x'),
        ("a list", b'['),
        ("not UTF-8", 0xFF),
        ("cut by a zero", 0),
    ] {
        cases.bytes(
            &format!("header {name}"),
            "v3-fp8",
            "model.safetensors",
            move |b| b[8] = byte,
        );
    }
    let entries = [
        ("a number", json!(7)),
        ("a list", json!([])),
        ("empty", json!({})),
        (
            "without shape",
            json!({"dtype": "F32", "data_offsets": [0, 4]}),
        ),
        ("without offsets", json!({"dtype": "F32", "shape": [1]})),
        (
            "of a negative shape",
            json!({"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]}),
        ),
        (
            "of a fractional shape",
            json!({"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}),
        ),
        (
            "of an unknown dtype",
            json!({"dtype": "F31", "shape": [64], "data_offsets": [0, 256]}),
        ),
        (
            "of one offset",
            json!({"dtype": "F32", "shape": [64], "data_offsets": [0]}),
        ),
        (
            "of named offsets",
            json!({"dtype": "F32", "shape": [64], "data_offsets": {"from": 0}}),
        ),
        (
            "of overflowing shape",
            json!({"dtype": "F32", "shape": [1u64 << 60, 1u64 << 60], "data_offsets": [0, 256]}),
        ),
    ];
    for (name, entry) in entries {
        cases.tensors(
            &format!("entry {name}"),
            "v3-basic",
            FIRST,
            &[KV_A],
            move |t| *t.entry(KV_A) = entry.clone(),
        );
    }
    type Move = fn(i64, i64) -> [i64; 2];
    let moves: [(&str, Move); 8] = [
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
        cases.tensors(
            &format!("offsets {name}"),
            "v3-basic",
            FIRST,
            &["model.layers.0"],
            move |t| {
                let (a, b) = t.offsets(KV_A);
                t.entry(KV_A)["data_offsets"] = json!(change(a as i64, b as i64));
            },
        );
    }
    cases.tensors(
        "everything overlaps",
        "v3-fp8",
        "model.safetensors",
        &["overlap"],
        |t| {
            for (_, entry) in t
                .header
                .iter_mut()
                .filter(|(name, _)| *name != "__metadata__")
            {
                let [a, b]: [u64; 2] =
                    serde_json::from_value(entry["data_offsets"].clone()).unwrap();
                entry["data_offsets"] = json!([0, b - a]);
            }
        },
    );
    cases.bytes("header nested too deep", "v3-basic", FIRST, |b| {
        let header = "[".repeat(200_000);
        *b = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    });
}

fn indexes(cases: &mut Cases<'_>) {
    cases.add(
        "no weights at all",
        "v3-basic",
        &["model.safetensors"],
        |dir| {
            for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
                if entry.file_name() != "config.json" {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
        },
    );
    for file in [FIRST, SECOND, "model-00003-of-00003.safetensors"] {
        cases.add(
            &format!("{file} missing"),
            "v3-basic",
            &[file],
            move |dir| fs::remove_file(dir.join(file)).unwrap(),
        );
    }
    cases.add("a shard is a directory", "v3-basic", &[SECOND], |dir| {
        fs::remove_file(dir.join(SECOND)).unwrap();
        fs::create_dir(dir.join(SECOND)).unwrap();
    });
    for wrong in [
        "../other/model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "a\\b",
        "x\0y",
    ] {
        cases.json(
            &format!("index names {wrong:?}"),
            "v3-basic",
            INDEX,
            &[INDEX, "plain names"],
            move |v| v["weight_map"][NORM] = json!(wrong),
        );
    }
    cases.json(
        "index names a file that is not there",
        "v3-basic",
        INDEX,
        &["model-9.safetensors"],
        |v| v["weight_map"][NORM] = json!("model-9.safetensors"),
    );
    cases.json(
        "index names the wrong shard",
        "v3-basic",
        INDEX,
        &[KV_A, SECOND],
        |v| v["weight_map"][KV_A] = json!(SECOND),
    );
    cases.json(
        "index names a tensor nobody has",
        "v3-basic",
        INDEX,
        &[FIRST, "model.extra"],
        |v| v["weight_map"]["model.extra"] = json!(FIRST),
    );
    cases.json(
        "index leaves a tensor out",
        "v3-basic",
        INDEX,
        &[INDEX, KV_A],
        |v| drop(v["weight_map"].as_object_mut().unwrap().remove(KV_A)),
    );
    for (name, value) in [
        ("empty", json!({})),
        ("a list", json!([])),
        ("a number", json!(3)),
        ("of numbers", json!({"a": 1})),
    ] {
        cases.json(
            &format!("weight_map {name}"),
            "v3-basic",
            INDEX,
            &[INDEX],
            move |v| v["weight_map"] = value.clone(),
        );
    }
    cases.bytes("index cut", "v3-basic", INDEX, |b| b.truncate(b.len() / 2));
    cases.bytes("index empty", "v3-basic", INDEX, |b| b.clear());
    cases.bytes("index not UTF-8", "v3-basic", INDEX, |b| b[10] = 0xFE);
    cases.add(
        "a tensor in two shards",
        "v3-basic",
        &[SECOND, KV_A, "duplicate", FIRST],
        |dir| {
            let first = Tensors::read(&dir.join(FIRST));
            let mut second = Tensors::read(&dir.join(SECOND));
            second.push(KV_A, "F32", &[48, 64], first.bytes(KV_A));
            second.write(&dir.join(SECOND));
        },
    );
}

/// All of them.
pub(crate) fn all<'a>() -> Vec<Case<'a>> {
    let mut cases = Cases::default();
    for add in [
        truncations,
        headers,
        indexes,
        contents::tensors,
        contents::scales,
        contents::configs,
    ] {
        add(&mut cases);
    }
    cases.0
}
