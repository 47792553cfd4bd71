//! Checkpoints of any shape with random weights, the same everywhere.
//!
//! The secret kept here is the rule: every weight is a pure function of the
//! seed, the tensor's name and the flat index, so a program in any language can
//! make the same file and compare. With z the i-th output of splitmix64 started
//! at fnv1a64(name) ^ seed, and s the sum of the four 16-bit lanes of z,
//!
//! ```text
//! w[i] = bf16( f32(mean) + f32(s - 131070) * f32(std / 37837.2) )
//! ```
//!
//! which is close to a normal distribution. Router biases stay f32. A model with tied embeddings
//! has no head, and the copies of embedding and head in an MTP layer are copies in value too.

mod files;
mod shapes;

use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};

pub use shapes::{NAMES, shape};

use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::write::{Out, Shard};
use crate::checkpoint::{TensorSpec, schema};
use crate::{Config, ModelError};

/// Bytes of weights after which a new shard begins, when nobody says otherwise.
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;
/// Elements that are made at a time before they are written.
const BLOCK: usize = 4 << 20;
/// Headers are padded to this many bytes, as other writers of the form do.
const HEADER_ALIGNMENT: usize = 8;
/// Elements that one thread makes at a time.
const CHUNK: usize = 1 << 14;
/// Increment of splitmix64's state.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// Standard deviation of the sum of four 16-bit lanes.
const LANE_STD: f64 = 37837.2;

/// The configuration of a random checkpoint, as it will be written.
#[derive(Debug, Clone)]
pub struct Shape(Map<String, Value>);

impl Shape {
    /// Replaces or adds fields of `config.json`.
    #[must_use]
    pub fn with(mut self, overrides: &[(String, Value)]) -> Shape {
        for (key, value) in overrides {
            self.0.insert(key.clone(), value.clone());
        }
        self
    }

    /// What the written model will be.
    ///
    /// # Errors
    /// An override that makes no model, with the field named.
    pub fn config(&self) -> Result<Config, ModelError> {
        Config::from_json(&Value::Object(self.0.clone()).to_string())
    }
}

/// Splits `key=value` into a field and its JSON value.
///
/// # Errors
/// No `=`, or a value that is not JSON (strings need their quotes).
pub fn parse_override(text: &str) -> Result<(String, Value), ModelError> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(ModelError::input(
            "--set",
            format!("`{text}` is not key=value"),
        ));
    };
    match serde_json::from_str(value) {
        Ok(value) => Ok((key.to_owned(), value)),
        Err(e) => Err(ModelError::input(
            "--set",
            format!("`{value}` of `{key}` is not JSON: {e} (strings need double quotes)"),
        )),
    }
}

/// One tensor to be written.
struct Planned {
    name: String,
    /// Whose stream it takes: its own name but for the MTP layer's copies of embedding and head.
    stream: String,
    shape: Vec<usize>,
    std: f64,
    mean: f32,
    f32: bool,
}

impl Planned {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn dtype(&self) -> &'static str {
        if self.f32 { "F32" } else { "BF16" }
    }

    fn bytes(&self) -> u64 {
        self.elements() as u64 * if self.f32 { 4 } else { 2 }
    }

    fn out(&self) -> Out {
        Out {
            name: self.name.clone(),
            dtype: self.dtype(),
            shape: self.shape.clone(),
            bytes: self.bytes(),
        }
    }
}

fn plan(spec: TensorSpec, config: &Config) -> Planned {
    let bias = spec.name.ends_with(".e_score_correction_bias");
    let embedding = spec.name.ends_with("embed_tokens.weight");
    let (std, mean) = match spec.shape[..] {
        _ if embedding => (1.0, 0.0),
        [_, inputs] => (1.0 / libm::sqrt(inputs as f64), 0.0),
        _ if bias || spec.name.ends_with(".bias") => (0.02, 0.0),
        _ => (0.1, 1.0),
    };
    // The MTP layer's embedding and head repeat the main ones, in value too.
    let stream = if embedding || (spec.optional && config.tie_word_embeddings) {
        "model.embed_tokens.weight".to_owned()
    } else if spec.optional {
        "lm_head.weight".to_owned()
    } else {
        spec.name.clone()
    };
    let std = if stream == "model.embed_tokens.weight" {
        1.0
    } else {
        std
    };
    Planned {
        name: spec.name,
        stream,
        shape: spec.shape,
        std,
        mean,
        f32: bias,
    }
}

/// Writes a checkpoint in Hugging Face form: shards, index, configuration and a byte-level
/// tokenizer; and its manifest.
///
/// `out` must not exist or be empty; it appears complete or not at all. `progress` hears bytes
/// done and bytes in all.
///
/// # Errors
/// An override that makes no model (field named), a directory in use, or a file that cannot be
/// written.
pub fn write(
    shape: Shape,
    overrides: &[(String, Value)],
    seed: u64,
    shard_bytes: u64,
    out: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ModelError> {
    let shape = shape.with(overrides);
    let config = shape.config()?;
    let (parent, name) = match (out.parent(), out.file_name()) {
        (Some(parent), Some(name)) => (parent, name),
        _ => return Err(ModelError::file(out, "not a directory that can be made")),
    };
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ModelError::file(
            out,
            "not empty; give a directory that does not exist yet",
        ));
    }
    // Everything is written next door and moved into place at the end.
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = parent.join(partial);
    let written = fs::create_dir_all(&partial)
        .map_err(|e| ModelError::file(&partial, format!("cannot be made: {e}")))
        .and_then(|()| write_files(&shape, &config, seed, shard_bytes, &partial, progress))
        .and_then(|()| {
            fs::rename(&partial, out)
                .map_err(|e| ModelError::file(out, format!("cannot be moved into place: {e}")))
        });
    if written.is_err() {
        // The first fault is the one to report.
        let _ = fs::remove_dir_all(&partial);
    }
    written
}

fn write_files(
    shape: &Shape,
    config: &Config,
    seed: u64,
    shard_bytes: u64,
    dir: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(), ModelError> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let (mut size, mut total) = (0, 0);
    for tensor in schema(config).map(|spec| plan(spec, config)) {
        let bytes = tensor.bytes();
        if size > 0 && size + bytes > shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        total += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    let mut done = 0;
    let mut hashes = Vec::new();
    let mut weight_map = Map::new();
    let mut buffer = Vec::new();
    for (i, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let listed: Vec<Out> = tensors.iter().map(Planned::out).collect();
        let mut shard = Shard::create(&dir.join(&name), &listed, HEADER_ALIGNMENT)?;
        for tensor in tensors {
            let mut at = 0;
            while at < tensor.elements() {
                let n = BLOCK.min(tensor.elements() - at);
                fill(tensor, seed, at, n, &mut buffer);
                shard.write(&buffer)?;
                at += n;
                done += buffer.len() as u64;
                progress(done, total);
            }
            shard.end_tensor();
            weight_map.insert(tensor.name.clone(), name.clone().into());
        }
        hashes.extend(shard.finish(false)?);
    }
    files::write_all(dir, shape, config.vocab_size, weight_map, total)?;
    let tensors = shards.iter().flatten().zip(hashes);
    let listed = tensors.map(|(t, hash)| (t.name.as_str(), t.dtype(), t.shape.as_slice(), hash));
    Manifest::listing(dir, listed)?.write(dir)?;
    Ok(())
}

/// Makes elements `start .. start + n` of a tensor, as stored.
fn fill(tensor: &Planned, seed: u64, start: usize, n: usize, out: &mut Vec<u8>) {
    let width = if tensor.f32 { 4 } else { 2 };
    let state = fnv1a64(&tensor.stream) ^ seed;
    let scale = (tensor.std / LANE_STD) as f32;
    out.resize(n * width, 0);
    out.par_chunks_mut(CHUNK * width)
        .enumerate()
        .for_each(|(c, chunk)| {
            for (i, slot) in chunk.chunks_exact_mut(width).enumerate() {
                let index = (start + c * CHUNK + i) as u64 + 1;
                let z = splitmix64(state.wrapping_add(index.wrapping_mul(GOLDEN)));
                let lanes = (z & 0xFFFF) + ((z >> 16) & 0xFFFF) + ((z >> 32) & 0xFFFF) + (z >> 48);
                let mut value = (lanes as f32 - 131_070.0) * scale;
                if tensor.mean != 0.0 {
                    value += tensor.mean;
                }
                if tensor.f32 {
                    slot.copy_from_slice(&value.to_le_bytes());
                } else {
                    slot.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
                }
            }
        });
}

/// The output function of splitmix64 (Steele, Lea, Flood 2014).
fn splitmix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The 64-bit Fowler-Noll-Vo hash, variant 1a.
fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3)
    })
}
