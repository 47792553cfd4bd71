//! Checkpoint files taken apart and put together again.

use std::fs;
use std::path::{Path, PathBuf};

use guild_model::Checkpoint;
use guild_model::checkpoint::manifest::Manifest;
use guild_model::quantize::{DEFAULT_SHARD_BYTES, Job};
use guild_tests::process::{demo, golden_dir};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint that cases start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// FP8 in one file.
    Fp8,
    /// f32 in three shards.
    Shards,
    /// bf16 in two shards, with a multi-token-prediction layer.
    Mtp,
    /// Without query compression, softmax scores, one file.
    V2,
    /// The demo, with a tokenizer.
    Demo,
    /// The demo packed as int4: trunk and experts in a file each.
    Packed,
}

impl Source {
    pub(crate) const ALL: [Source; 6] = [
        Source::Fp8,
        Source::Shards,
        Source::Mtp,
        Source::V2,
        Source::Demo,
        Source::Packed,
    ];

    /// Its weight files.
    pub(crate) fn files(self) -> Vec<String> {
        let shards = match self {
            Source::Shards => 3,
            Source::Mtp | Source::Packed => 2,
            Source::Fp8 | Source::V2 | Source::Demo => return vec![SINGLE.into()],
        };
        (1..=shards)
            .map(|i| format!("model-{i:05}-of-{shards:05}.safetensors"))
            .collect()
    }
}

/// Writes the manifest of what is there.
pub(crate) fn list(dir: &Path) {
    let checkpoint = Checkpoint::open_unlisted(dir).unwrap();
    let made = Manifest::of(&checkpoint, &|_, _| ()).unwrap();
    made.write(dir).unwrap();
}

/// One checkpoint of each kind with its manifest.
pub(crate) struct Templates {
    root: TempDir,
}

impl Templates {
    pub(crate) fn new() -> Templates {
        let root = tempfile::tempdir().unwrap();
        for source in Source::ALL {
            let from = match source {
                Source::Fp8 => golden_dir("v3-fp8"),
                Source::Shards => golden_dir("v3-basic"),
                Source::Mtp => golden_dir("v3-mtp"),
                Source::V2 => golden_dir("v2-lite"),
                Source::Demo | Source::Packed => demo(),
            };
            let dir = root.path().join(format!("{source:?}"));
            if source == Source::Packed {
                Job {
                    source: &Checkpoint::open(&from).unwrap(),
                    dtype: "int4".parse().unwrap(),
                    shard_bytes: DEFAULT_SHARD_BYTES,
                    out: &dir,
                }
                .run(&|_| (), &|_, _| ())
                .unwrap();
            } else {
                copy(&from, &dir);
                list(&dir);
            }
            Checkpoint::open(&dir).unwrap().digest().unwrap();
        }
        Templates { root }
    }

    pub(crate) fn dir(&self, source: Source) -> PathBuf {
        self.root.path().join(format!("{source:?}"))
    }

    pub(crate) fn copy(&self, source: Source) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        copy(&self.dir(source), dir.path());
        dir
    }

    /// Every tensor of a source and its file.
    pub(crate) fn tensors(&self, source: Source) -> Vec<Tensor> {
        let mut all = Vec::new();
        for file in source.files() {
            let weights = Weights::read(&self.dir(source).join(&file));
            for (name, entry) in weights.header.iter().filter(|(n, _)| *n != "__metadata__") {
                all.push(Tensor {
                    file: file.clone(),
                    name: name.clone(),
                    dtype: entry["dtype"].as_str().unwrap().to_owned(),
                    shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
                });
            }
        }
        all
    }
}

/// One entry of a header.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) file: String,
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with("golden.") {
            fs::copy(entry.path(), to.join(name)).unwrap();
        }
    }
}

/// A safetensors file taken apart.
pub(crate) struct Weights {
    pub(crate) header: Map<String, Value>,
    pub(crate) data: Vec<u8>,
}

impl Weights {
    pub(crate) fn read(path: &Path) -> Weights {
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        Weights {
            header: serde_json::from_slice(&bytes[8..8 + length]).unwrap(),
            data: bytes[8 + length..].to_vec(),
        }
    }

    pub(crate) fn write(&self, path: &Path) {
        write_raw(path, &serde_json::to_vec(&self.header).unwrap(), &self.data);
    }

    /// Byte range of a tensor in the data.
    pub(crate) fn range(&self, name: &str) -> std::ops::Range<usize> {
        let [from, to]: [usize; 2] =
            serde_json::from_value(self.header[name]["data_offsets"].clone()).unwrap();
        from..to
    }

    pub(crate) fn bytes(&mut self, name: &str) -> &mut [u8] {
        let range = self.range(name);
        &mut self.data[range]
    }

    pub(crate) fn set(&mut self, name: &str, field: &str, value: Value) {
        self.header[name][field] = value;
    }

    /// Exchanges the places of two tensors.
    pub(crate) fn exchange(&mut self, one: &str, other: &str) {
        let [a, b] = [one, other].map(|n| self.range(n));
        self.set(one, "data_offsets", json!([b.start, b.end]));
        self.set(other, "data_offsets", json!([a.start, a.end]));
    }
}

/// A file with any header text.
pub(crate) fn write_raw(path: &Path, header: &[u8], data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], header, data].concat()).unwrap();
}

pub(crate) fn edit_weights(path: &Path, edit: impl FnOnce(&mut Weights)) {
    let mut weights = Weights::read(path);
    edit(&mut weights);
    weights.write(path);
}

pub(crate) fn edit_bytes(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

pub(crate) fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, serde_json::to_string_pretty(&value).unwrap()).unwrap();
}
