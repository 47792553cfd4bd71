//! Finding, mapping and checking the files of a checkpoint.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Component, Path};

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::storage::Part;
use super::{Entry, Shard, Stored, TensorSpec, header, parts, schema};
use crate::config::FP8_BLOCK;
use crate::{Config, ModelError};

/// Largest safetensors header in bytes, as the format's own reader has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Header bytes allowed per tensor that the configuration calls for, on top of
/// [`SPARE_HEADER_BYTES`].
const HEADER_BYTES_PER_TENSOR: u64 = 1024;
/// Header bytes allowed for whatever else a file carries.
const SPARE_HEADER_BYTES: u64 = 8 << 20;
/// Largest index file in bytes.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Most files of one checkpoint.
const MAX_SHARDS: usize = 65_536;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

type Opened = (Vec<Shard>, HashMap<String, Entry>);

pub(super) fn open(dir: &Path, config: &mut Config) -> Result<Opened, ModelError> {
    // A single file goes before an index, as it does for other readers of this form.
    let single = dir.join(SINGLE).exists() || !dir.join(INDEX).exists();
    let index = if single {
        None
    } else {
        Some(Index::read(dir)?)
    };
    let paths = match &index {
        Some(index) => index.files.iter().map(|name| dir.join(name)).collect(),
        None => vec![dir.join(SINGLE)],
    };
    let wanted = schema(config).count() as u64;
    let header_cap =
        (SPARE_HEADER_BYTES + 2 * wanted * HEADER_BYTES_PER_TENSOR).min(MAX_HEADER_BYTES);
    let mut shards = Vec::with_capacity(paths.len());
    let mut tensors = HashMap::new();
    for path in paths {
        let shard = map(&path, index.is_some())?;
        read_header(&shard, shards.len(), header_cap, &shards, &mut tensors)?;
        shards.push(shard);
    }
    if let Some(index) = &index {
        index.check(&shards, &tensors)?;
        // What a shard holds beside the index is not part of the checkpoint.
        tensors.retain(|name, _| index.map.contains_key(name));
    }
    let fallback = if index.is_some() {
        dir.join(INDEX)
    } else {
        dir.join(SINGLE)
    };
    if !holds_mtp(config, &tensors) {
        config.num_nextn_predict_layers = 0;
    }
    let config = &*config;
    let checker = Checker {
        config,
        shards: &shards,
        tensors: &tensors,
        fallback: &fallback,
    };
    for spec in schema(config) {
        checker.check(&spec)?;
    }
    // A dtype nobody asked for is nobody's business.
    let tensors = tensors
        .into_iter()
        .filter_map(|(name, raw)| Some((name, raw.supported(config.packed.is_some())?)))
        .collect();
    Ok((shards, tensors))
}

/// Whether any tensor of any MTP layer is there; some but not all is for the checker to refuse.
fn holds_mtp(config: &Config, tensors: &HashMap<String, Raw>) -> bool {
    (0..config.num_nextn_predict_layers).any(|i| {
        let prefix = format!("model.layers.{}.", config.num_hidden_layers + i);
        tensors.keys().any(|name| name.starts_with(&prefix))
    })
}

/// `model.safetensors.index.json`: which file holds which tensor.
struct Index {
    map: HashMap<String, usize>,
    files: Vec<String>,
}

impl Index {
    fn read(dir: &Path) -> Result<Index, ModelError> {
        let path = dir.join(INDEX);
        let bad = |reason: String| ModelError::file(&path, reason);
        let size = fs::metadata(&path)
            .map_err(|e| bad(format!("cannot be read: {e}")))?
            .len();
        if size > MAX_INDEX_BYTES {
            return Err(bad(format!(
                "{size} bytes, more than {MAX_INDEX_BYTES}: not an index"
            )));
        }
        #[derive(serde::Deserialize)]
        struct Raw {
            weight_map: HashMap<String, String>,
        }
        let text = fs::read_to_string(&path).map_err(|e| bad(format!("cannot be read: {e}")))?;
        let raw: Raw = serde_json::from_str(&text)
            .map_err(|e| bad(format!("not an index of weights: {e}")))?;
        let mut files: Vec<String> = raw.weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        if files.is_empty() {
            return Err(bad("names no file".into()));
        }
        if files.len() > MAX_SHARDS {
            return Err(bad(format!(
                "names {} files, more than {MAX_SHARDS}",
                files.len()
            )));
        }
        for name in &files {
            let mut parts = Path::new(name).components();
            if !matches!(
                (parts.next(), parts.next()),
                (Some(Component::Normal(_)), None)
            ) || name.contains(['/', '\\', '\0'])
            {
                return Err(bad(format!(
                    "file name {name:?} leads out of the directory; plain names only"
                )));
            }
        }
        let position: HashMap<&str, usize> = files
            .iter()
            .enumerate()
            .map(|(i, f)| (f.as_str(), i))
            .collect();
        let map = raw
            .weight_map
            .iter()
            .map(|(name, file)| (name.clone(), position[file.as_str()]))
            .collect();
        Ok(Index { map, files })
    }

    /// The index and the headers must tell the same story.
    fn check(&self, shards: &[Shard], tensors: &HashMap<String, Raw>) -> Result<(), ModelError> {
        let mut names: Vec<_> = self.map.iter().collect();
        names.sort();
        for (name, &shard) in names {
            match tensors.get(name) {
                Some(raw) if raw.shard == shard => {}
                Some(raw) => {
                    let real = shards[raw.shard].path.display();
                    return Err(ModelError::tensor(
                        &shards[shard].path,
                        name,
                        format!("the index says it is here, but {real} holds it"),
                    ));
                }
                None => {
                    return Err(ModelError::tensor(
                        &shards[shard].path,
                        name,
                        "the index says it is here, but the file does not hold it",
                    ));
                }
            }
        }
        Ok(())
    }
}

fn map(path: &Path, sharded: bool) -> Result<Shard, ModelError> {
    let hint = if sharded {
        "the index names it"
    } else {
        "a checkpoint has model.safetensors or model.safetensors.index.json"
    };
    let cannot =
        |e: std::io::Error| ModelError::file(path, format!("cannot be opened: {e} ({hint})"));
    // Asked before opening: a pipe would wait for a writer.
    let meta = fs::metadata(path).map_err(cannot)?;
    if !meta.is_file() {
        return Err(ModelError::file(path, "not a regular file"));
    }
    let file = File::open(path).map_err(cannot)?;
    if meta.len() < 8 {
        return Err(ModelError::file(
            path,
            format!(
                "truncated: {} bytes, less than the 8 of the header's length",
                meta.len()
            ),
        ));
    }
    let map = guild_kernels::file::map(&file)
        .map_err(|e| ModelError::file(path, format!("cannot be mapped: {e}")))?;
    Ok(Shard {
        path: path.to_path_buf(),
        map,
    })
}

/// A header entry before anybody asked for it.
struct Raw {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

impl Raw {
    fn stored(&self) -> Option<Stored> {
        match self.dtype {
            safetensors::Dtype::F32 => Some(Stored::F32),
            safetensors::Dtype::BF16 => Some(Stored::Bf16),
            safetensors::Dtype::F16 => Some(Stored::F16),
            safetensors::Dtype::F8_E4M3 => Some(Stored::F8E4M3),
            safetensors::Dtype::U8 => Some(Stored::U8),
            safetensors::Dtype::I32 => Some(Stored::I32),
            _ => None,
        }
    }

    fn supported(self, packed: bool) -> Option<Entry> {
        let integers = |dtype| matches!(dtype, Stored::U8 | Stored::I32);
        let dtype = self.stored().filter(|&dtype| packed || !integers(dtype))?;
        Some(Entry {
            shard: self.shard,
            dtype,
            shape: self.shape,
            range: self.range,
            blake3: None,
        })
    }
}

fn read_header(
    shard: &Shard,
    number: usize,
    cap: u64,
    shards: &[Shard],
    tensors: &mut HashMap<String, Raw>,
) -> Result<(), ModelError> {
    let bytes: &[u8] = shard.map.as_ref();
    let bad = |reason: String| ModelError::file(&shard.path, reason);
    let length = bytes.first_chunk().map_or(0, |&b| u64::from_le_bytes(b));
    if length > cap {
        return Err(bad(format!(
            "header of {length} bytes is absurd; this configuration needs at most {cap}"
        )));
    }
    if length > bytes.len() as u64 - 8 {
        return Err(bad(format!(
            "truncated: header of {length} bytes in a file of {}",
            bytes.len()
        )));
    }
    let start = 8 + length as usize;
    let (_, metadata): (usize, Metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        match header::culprit(&bytes[8..start], bytes.len() - start) {
            Some((tensor, reason)) => ModelError::tensor(&shard.path, tensor, reason),
            None => bad(format!("bad safetensors header: {e}")),
        }
    })?;
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        let raw = Raw {
            shard: number,
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: start + from..start + to,
        };
        if let Some(other) = tensors.get(&name) {
            let first = shards.get(other.shard).map_or(&shard.path, |s| &s.path);
            return Err(ModelError::tensor(
                &shard.path,
                name,
                format!("duplicate: {} holds it too", first.display()),
            ));
        }
        tensors.insert(name, raw);
    }
    Ok(())
}

/// Holds what the files have against what the configuration calls for.
struct Checker<'a> {
    config: &'a Config,
    shards: &'a [Shard],
    tensors: &'a HashMap<String, Raw>,
    fallback: &'a Path,
}

impl Checker<'_> {
    fn check(&self, spec: &TensorSpec) -> Result<(), ModelError> {
        match parts(self.config, spec) {
            Some(_) if spec.optional && !self.tensors.contains_key(&spec.name) => Ok(()),
            Some(parts) => parts.iter().try_for_each(|part| self.check_part(part)),
            None => self.check_plain(spec),
        }
    }

    /// A packed weight, or a part of one.
    fn check_part(&self, part: &Part) -> Result<(), ModelError> {
        let Some(raw) = self.tensors.get(&part.name) else {
            let reason = "missing; quantization_config says that these weights are packed";
            return Err(ModelError::tensor(self.fallback, &part.name, reason));
        };
        let file = &self.shards[raw.shard].path;
        let bad = |reason: String| Err(ModelError::tensor(file, &part.name, reason));
        if raw.stored() != Some(part.dtype) {
            return bad(format!(
                "dtype {:?}, but quantization_config makes it {}",
                raw.dtype,
                part.dtype.name()
            ));
        }
        if raw.shape != part.shape {
            return bad(format!(
                "shape {:?}, but configuration and quantization_config make {:?}",
                raw.shape, part.shape
            ));
        }
        Ok(())
    }

    fn check_plain(&self, spec: &TensorSpec) -> Result<(), ModelError> {
        let Some(raw) = self.tensors.get(&spec.name) else {
            if spec.optional {
                return Ok(());
            }
            let reason = format!(
                "missing; the configuration calls for it with shape {:?}",
                spec.shape
            );
            return Err(ModelError::tensor(self.fallback, &spec.name, reason));
        };
        let file = &self.shards[raw.shard].path;
        let bad = |reason: String| Err(ModelError::tensor(file, &spec.name, reason));
        if raw.shape != spec.shape {
            return bad(format!(
                "shape {:?}, but the configuration calls for {:?}",
                raw.shape, spec.shape
            ));
        }
        let Some(dtype) = raw.stored() else {
            return bad(format!(
                "dtype {:?} is not served; F32, BF16, F16 or F8_E4M3",
                raw.dtype
            ));
        };
        if !spec.accepts(dtype) {
            let why = if matches!(dtype, Stored::U8 | Stored::I32) {
                "quantization_config does not say that it is packed"
            } else if self.config.fp8 {
                "only linear layers may be FP8"
            } else {
                "config.json has no quantization_config for FP8"
            };
            return bad(format!("dtype {}, but {why}", dtype.name()));
        }
        if dtype == Stored::F8E4M3 {
            self.check_scales(spec, file)
        } else {
            Ok(())
        }
    }

    fn check_scales(&self, spec: &TensorSpec, file: &Path) -> Result<(), ModelError> {
        let name = format!("{}_scale_inv", spec.name);
        let Some(raw) = self.tensors.get(&name) else {
            return Err(ModelError::tensor(
                file,
                name,
                "missing; FP8 weights need their block scales",
            ));
        };
        let shape: Vec<usize> = spec.shape.iter().map(|d| d.div_ceil(FP8_BLOCK)).collect();
        let file = &self.shards[raw.shard].path;
        if raw.shape != shape {
            return Err(ModelError::tensor(
                file,
                name,
                format!(
                    "shape {:?}, but a scale per 128x128 block makes {shape:?}",
                    raw.shape
                ),
            ));
        }
        if raw.stored() != Some(Stored::F32) {
            return Err(ModelError::tensor(
                file,
                name,
                format!("dtype {:?}, but scales are F32", raw.dtype),
            ));
        }
        Ok(())
    }
}
