//! Safetensors files on their way out.
//!
//! Secret: the form of the header. What tensors hold is the caller's business.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::ModelError;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Out {
    pub(crate) name: String,
    /// As headers spell it.
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: u64,
}

/// Length and header of a file of these tensors in this order, padded with blanks so that the data begin at a multiple
/// of `align` (a power of two from 8 on).
fn header(tensors: &[Out], align: usize) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for t in tensors {
        let end = offset + t.bytes;
        map.insert(
            t.name.clone(),
            json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    text.resize((8 + text.len()).next_multiple_of(align) - 8, b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text);
    out
}

/// One file, tensor after tensor.
pub(crate) struct Shard {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    hashes: Vec<blake3::Hash>,
}

impl Shard {
    /// Makes the file and writes the header.
    pub(crate) fn create(path: &Path, tensors: &[Out], align: usize) -> Result<Shard, ModelError> {
        let file = File::create(path).map_err(|e| fault(path, &e))?;
        let mut shard = Shard {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            hashes: Vec::new(),
        };
        shard.raw(&header(tensors, align))?;
        Ok(shard)
    }

    /// Some bytes of the present tensor.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.hasher.update_rayon(bytes);
        self.raw(bytes)
    }

    /// The present tensor is complete.
    pub(crate) fn end_tensor(&mut self) {
        self.hashes.push(self.hasher.finalize());
        self.hasher.reset();
    }

    /// The file is complete; `durable` waits until it is on the disk. Gives the BLAKE3 of every tensor.
    pub(crate) fn finish(self, durable: bool) -> Result<Vec<blake3::Hash>, ModelError> {
        let written = self.file.into_inner().map_err(io::Error::from);
        written
            .and_then(|file| if durable { file.sync_all() } else { Ok(()) })
            .map_err(|e| fault(&self.path, &e))?;
        Ok(self.hashes)
    }

    fn raw(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.file
            .write_all(bytes)
            .map_err(|e| fault(&self.path, &e))
    }
}

pub(crate) fn fault(path: &Path, error: &io::Error) -> ModelError {
    ModelError::file(path, format!("cannot be written: {error}"))
}
