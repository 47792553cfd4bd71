//! The manifest of a checkpoint: what its files must hold.
//!
//! Secret: the form of `guild-manifest.json`, which lies beside `config.json`:
//!
//! ```text
//! {
//!   "version": 1,
//!   "files": { "config.json": "<BLAKE3, 64 hex digits>", ... },
//!   "tensors": { "<name>": {"dtype":"BF16","shape":[32,64],"blake3":"<of the stored bytes>"}, ... }
//! }
//! ```
//!
//! `files` are the small files that are read beside the weights; `tensors` is every tensor of a supported dtype,
//! whatever the shards, so that a checkpoint can be cut anew. Names, dtypes and shapes are held against the
//! headers when a checkpoint is opened; bytes where they are read.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Checkpoint, Entry, Shard, TensorView, digest};
use crate::{Config, ModelError};

/// Name of the manifest.
pub const FILE: &str = "guild-manifest.json";

const VERSION: u64 = 1;
/// The files beside the weights that decide what is served, where they exist.
const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// Largest of these files in bytes.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Bytes of a manifest allowed per tensor that the configuration calls for, block scales counted.
const BYTES_PER_TENSOR: u64 = 512;
/// Bytes allowed on top.
const SPARE_BYTES: u64 = 1 << 20;

/// What a tensor must be.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    dtype: String,
    shape: Vec<usize>,
    blake3: blake3::Hash,
}

/// Digests of a checkpoint's files and tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    files: BTreeMap<String, blake3::Hash>,
    tensors: BTreeMap<String, Listed>,
}

/// The manifest as it is written.
#[derive(Serialize, Deserialize)]
struct Written {
    version: u64,
    files: BTreeMap<String, String>,
    tensors: BTreeMap<String, WrittenTensor>,
}

#[derive(Serialize, Deserialize)]
struct WrittenTensor {
    dtype: String,
    shape: Vec<usize>,
    blake3: String,
}

impl Manifest {
    /// Reads a whole checkpoint and lists what it holds. `progress` hears bytes done and in all, from any thread.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of(
        checkpoint: &Checkpoint,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Manifest, ModelError> {
        let tensors = hashes(checkpoint, progress)
            .into_iter()
            .map(|(view, hash)| (view.name(), view.dtype().name(), view.shape(), hash));
        Manifest::listing(checkpoint.dir(), tensors)
    }

    /// Lists tensors (name, dtype, shape, BLAKE3 of the bytes) and the small files of a folder.
    pub(crate) fn listing<'a>(
        dir: &Path,
        tensors: impl Iterator<Item = (&'a str, &'a str, &'a [usize], blake3::Hash)>,
    ) -> Result<Manifest, ModelError> {
        let mut files = BTreeMap::new();
        for name in FILES {
            if let Some(hash) = hash_file(&dir.join(name))? {
                files.insert(name.to_owned(), hash);
            }
        }
        let tensors = tensors
            .map(|(name, dtype, shape, blake3)| {
                let listed = Listed {
                    dtype: dtype.to_owned(),
                    shape: shape.to_vec(),
                    blake3,
                };
                (name.to_owned(), listed)
            })
            .collect();
        Ok(Manifest { files, tensors })
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Number of files beside the weights.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Writes it into a folder; an older one is replaced in one step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, ModelError> {
        let path = dir.join(FILE);
        let partial = dir.join(format!(".{FILE}.partial-{}", std::process::id()));
        let written = self
            .write_to(&partial)
            .and_then(|()| fs::rename(&partial, &path));
        match written {
            Ok(()) => Ok(path),
            Err(e) => {
                // The first fault is the one to report.
                let _ = fs::remove_file(&partial);
                Err(ModelError::file(&path, format!("cannot be written: {e}")))
            }
        }
    }

    /// One line a tensor, so that two manifests can be compared by eye.
    fn write_to(&self, path: &Path) -> io::Result<()> {
        let mut out = BufWriter::new(File::create(path)?);
        write!(out, "{{\n  \"version\": {VERSION},\n  \"files\": {{")?;
        for (i, (name, hash)) in self.files.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let name = serde_json::to_string(name)?;
            write!(out, "{comma}\n    {name}: \"{}\"", hash.to_hex())?;
        }
        write!(out, "\n  }},\n  \"tensors\": {{")?;
        for (i, (name, listed)) in self.tensors.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let entry = WrittenTensor {
                dtype: listed.dtype.clone(),
                shape: listed.shape.clone(),
                blake3: listed.blake3.to_hex().to_string(),
            };
            let (name, entry) = (serde_json::to_string(name)?, serde_json::to_string(&entry)?);
            write!(out, "{comma}\n    {name}: {entry}")?;
        }
        writeln!(out, "\n  }}\n}}")?;
        out.into_inner()?.sync_all()
    }

    /// The manifest in a folder, if there is one, held against the small files.
    pub(super) fn read(dir: &Path, config: &Config) -> Result<Option<Manifest>, ModelError> {
        let path = dir.join(FILE);
        let bad = |reason: String| ModelError::file(&path, reason);
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(bad(format!("cannot be read: {e}"))),
        };
        // An FP8 weight has its scales beside it.
        let tensors = 2 * super::schema(config).count() as u64;
        let cap = SPARE_BYTES + tensors * BYTES_PER_TENSOR;
        if !meta.is_file() || meta.len() > cap {
            return Err(bad(format!(
                "{} bytes; a manifest of this model is a file of at most {cap}",
                meta.len()
            )));
        }
        let text = fs::read_to_string(&path).map_err(|e| bad(format!("cannot be read: {e}")))?;
        let manifest = Manifest::parse(&text).map_err(bad)?;
        manifest.check_files(dir, &path)?;
        Ok(Some(manifest))
    }

    fn parse(text: &str) -> Result<Manifest, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let bad = |e: serde_json::Error| format!("not a manifest: {e}");
        let Versioned { version } = serde_json::from_str(text).map_err(bad)?;
        if version != VERSION {
            return Err(format!(
                "field `version` is {version}; this program knows {VERSION}"
            ));
        }
        let written: Written = serde_json::from_str(text).map_err(bad)?;
        let hash = |field: String, hex: &str| {
            blake3::Hash::from_hex(hex)
                .map_err(|_| format!("field `{field}`: `{hex}` is not 64 hex digits"))
        };
        let mut files = BTreeMap::new();
        for (name, hex) in written.files {
            if !FILES.contains(&name.as_str()) {
                return Err(format!(
                    "field `files.{name}`: only {} may be listed",
                    FILES.join(", ")
                ));
            }
            let digest = hash(format!("files.{name}"), &hex)?;
            files.insert(name, digest);
        }
        let mut tensors = BTreeMap::new();
        for (
            name,
            WrittenTensor {
                dtype,
                shape,
                blake3,
            },
        ) in written.tensors
        {
            let blake3 = hash(format!("tensors.{name}.blake3"), &blake3)?;
            let listed = Listed {
                dtype,
                shape,
                blake3,
            };
            tensors.insert(name, listed);
        }
        Ok(Manifest { files, tensors })
    }

    fn check_files(&self, dir: &Path, manifest: &Path) -> Result<(), ModelError> {
        for name in FILES {
            let path = dir.join(name);
            match (self.files.get(name), hash_file(&path)?) {
                (None, None) => {}
                (Some(listed), Some(found)) if *listed == found => {}
                (Some(listed), Some(found)) => {
                    return Err(ModelError::file(path, differs(&found, listed)));
                }
                (Some(_), None) => {
                    return Err(ModelError::file(path, format!("missing; {FILE} lists it")));
                }
                (None, Some(_)) => {
                    let reason = format!("field `files`: {name} is there, but not listed");
                    return Err(ModelError::file(manifest, reason));
                }
            }
        }
        Ok(())
    }

    /// Holds the headers against the list and hands every tensor its digest.
    pub(super) fn attach(
        &self,
        dir: &Path,
        shards: &[Shard],
        tensors: &mut HashMap<String, Entry>,
    ) -> Result<(), ModelError> {
        for (name, listed) in &self.tensors {
            let Some(entry) = tensors.get_mut(name) else {
                return Err(ModelError::tensor(
                    dir.join(FILE),
                    name,
                    "listed, but no file of the checkpoint holds it",
                ));
            };
            let refused = |what: &str, found: String, listed: String| {
                ModelError::tensor(
                    &shards[entry.shard].path,
                    name,
                    format!("{what} {found}, but {FILE} lists {listed}"),
                )
            };
            if entry.dtype.name() != listed.dtype {
                let found = entry.dtype.name().to_owned();
                return Err(refused("dtype", found, listed.dtype.clone()));
            }
            if entry.shape != listed.shape {
                let (found, listed) = (&entry.shape, &listed.shape);
                return Err(refused(
                    "shape",
                    format!("{found:?}"),
                    format!("{listed:?}"),
                ));
            }
            entry.blake3 = Some(listed.blake3);
        }
        // Named in an order that does not change from run to run.
        let unlisted = tensors.iter().filter(|(_, entry)| entry.blake3.is_none());
        match unlisted.min_by_key(|(name, _)| *name) {
            None => Ok(()),
            Some((name, entry)) => Err(ModelError::tensor(
                &shards[entry.shard].path,
                name,
                format!("not listed in {FILE}"),
            )),
        }
    }
}

/// What a look at every byte of a checkpoint has found.
#[derive(Debug)]
pub struct Verification {
    /// Tensors that were read.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What differs from the manifest, by tensor name.
    pub faults: Vec<ModelError>,
}

pub(super) fn verify(
    checkpoint: &Checkpoint,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Verification {
    let hashes = hashes(checkpoint, progress);
    Verification {
        tensors: hashes.len(),
        bytes: hashes.iter().map(|(v, _)| v.bytes().len() as u64).sum(),
        faults: hashes
            .iter()
            .filter_map(|(view, hash)| view.expect(hash).err())
            .collect(),
    }
}

/// BLAKE3 of every tensor's bytes, by name.
fn hashes<'a>(
    checkpoint: &'a Checkpoint,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Vec<(TensorView<'a>, blake3::Hash)> {
    let mut tensors: Vec<TensorView<'_>> = checkpoint.tensors().collect();
    tensors.sort_by_key(TensorView::name);
    let total = tensors.iter().map(|t| t.bytes().len() as u64).sum();
    let done = AtomicU64::new(0);
    let hash = |view: TensorView<'a>| {
        let hash = digest::whole(view.bytes());
        let bytes = view.bytes().len() as u64;
        progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        (view, hash)
    };
    tensors.into_par_iter().map(hash).collect()
}

/// How a digest that is not the listed one is told.
pub(super) fn differs(found: &blake3::Hash, listed: &blake3::Hash) -> String {
    let short = |hash: &blake3::Hash| hash.to_hex()[..16].to_owned();
    format!(
        "BLAKE3 {}…, but {FILE} lists {}…: damaged or exchanged; get the file again",
        short(found),
        short(listed)
    )
}

/// BLAKE3 of a small file; None when there is none.
fn hash_file(path: &Path) -> Result<Option<blake3::Hash>, ModelError> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(ModelError::file(path, format!("cannot be read: {e}"))),
    };
    if !meta.is_file() || meta.len() > MAX_FILE_BYTES {
        return Err(ModelError::file(
            path,
            format!(
                "{} bytes; a file of at most {MAX_FILE_BYTES} is expected",
                meta.len()
            ),
        ));
    }
    let mut hasher = blake3::Hasher::new();
    let read = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
    match read {
        Ok(()) => Ok(Some(hasher.finalize())),
        Err(e) => Err(ModelError::file(path, format!("cannot be read: {e}"))),
    }
}
