//! Checkpoint files taken apart and put together again.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const FIRST: &str = "model-00001-of-00003.safetensors";
pub(crate) const SECOND: &str = "model-00002-of-00003.safetensors";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const KV_A: &str = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight";
pub(crate) const EXPERT: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

pub(crate) fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(case)
}

/// A safetensors file taken apart.
pub(crate) struct Tensors {
    pub(crate) header: Map<String, Value>,
    pub(crate) data: Vec<u8>,
}

impl Tensors {
    pub(crate) fn read(path: &Path) -> Tensors {
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        Tensors {
            header,
            data: bytes[8 + length..].to_vec(),
        }
    }

    pub(crate) fn write(&self, path: &Path) {
        let header = serde_json::to_vec(&self.header).unwrap();
        fs::write(
            path,
            [
                &(header.len() as u64).to_le_bytes()[..],
                &header,
                &self.data,
            ]
            .concat(),
        )
        .unwrap();
    }

    pub(crate) fn entry(&mut self, name: &str) -> &mut Value {
        self.header
            .get_mut(name)
            .unwrap_or_else(|| panic!("{name}"))
    }

    pub(crate) fn offsets(&self, name: &str) -> (usize, usize) {
        serde_json::from_value(self.header[name]["data_offsets"].clone()).unwrap()
    }

    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        let (from, to) = self.offsets(name);
        &self.data[from..to]
    }

    /// Takes a tensor out, closing the gap.
    pub(crate) fn remove(&mut self, name: &str) -> (Value, Vec<u8>) {
        let (from, to) = self.offsets(name);
        let entry = self.header.shift_remove(name).unwrap();
        let data = self.data.drain(from..to).collect();
        for (_, other) in self
            .header
            .iter_mut()
            .filter(|(name, _)| *name != "__metadata__")
        {
            let [a, b]: [usize; 2] = serde_json::from_value(other["data_offsets"].clone()).unwrap();
            let shift = if a >= to { to - from } else { 0 };
            other["data_offsets"] = json!([a - shift, b - shift]);
        }
        (entry, data)
    }

    /// Puts a tensor at the end.
    pub(crate) fn push(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        let offsets = [self.data.len(), self.data.len() + data.len()];
        self.header.insert(
            name.into(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
        self.data.extend(data);
    }

    /// Replaces a tensor.
    pub(crate) fn replace(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        self.remove(name);
        self.push(name, dtype, shape, data);
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with("golden.") {
            fs::copy(entry.path(), to.join(name)).unwrap();
        }
    }
}

pub(crate) fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}
