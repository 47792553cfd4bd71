//! Weights on disk: safetensors files, mapped and checked before use.
//!
//! The secret kept here is the container: shards, index, headers, offsets and
//! the names of tensors. [`schema`] is the one list of what a configuration
//! requires; everything a checkpoint can get wrong is found by
//! [`Checkpoint::open`], with file and tensor named. Values are looked at only
//! where tensors are loaded, and so are their digests where a [`manifest`] lists them.

mod digest;
mod dtype;
mod header;
pub mod manifest;
mod mapped;
mod memory;
mod open;
mod schema;
mod storage;
mod stored;
mod tensor;
pub(crate) mod write;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

pub use dtype::Dtype;
use manifest::{Manifest, Verification};
pub(crate) use mapped::Mapped;
pub use schema::{TensorSpec, schema};
pub(crate) use storage::{IN_WORD, blob_name, parts, scales_name};
pub(crate) use stored::StoredWeight;
pub use tensor::{Stored, TensorView, e4m3_to_f32};

use crate::{Config, ModelError};

/// A checkpoint whose files are mapped and whose headers fit its configuration. Cheap to clone.
#[derive(Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
    /// Whether routed experts are used where they lie in the files.
    mapped: bool,
}

struct Inner {
    dir: PathBuf,
    config: Config,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
    /// Whether a manifest lists the tensors.
    listed: bool,
    digest: OnceLock<String>,
}

struct Shard {
    path: PathBuf,
    map: guild_kernels::file::Mapped,
}

/// Where a tensor lies.
struct Entry {
    shard: usize,
    dtype: Stored,
    shape: Vec<usize>,
    /// Byte range in the shard's file.
    range: Range<usize>,
    /// Of its bytes, by the manifest.
    blake3: Option<blake3::Hash>,
}

impl Checkpoint {
    /// Maps and checks a checkpoint directory.
    ///
    /// A configuration that counts MTP layers over files that hold none of their tensors describes
    /// the model without them: common converters drop the layers and keep the count.
    ///
    /// Where a manifest lies beside the configuration, names, dtypes, shapes and the small files are held against
    /// it here, the bytes of a tensor wherever they are loaded and in [`Checkpoint::digest`].
    ///
    /// # Errors
    /// Anything in the configuration, manifest, index or headers that does not fit, with file and tensor or
    /// field named.
    pub fn open(dir: &Path) -> Result<Checkpoint, ModelError> {
        let config = Config::from_dir(dir)?;
        let manifest = Manifest::read(dir, &config)?;
        if manifest.is_none() {
            tracing::info!(
                "weights are not verified: {} has no {}; `guild manifest --write` makes one",
                dir.display(),
                manifest::FILE
            );
        }
        Checkpoint::with(dir, config, manifest)
    }

    /// As [`Checkpoint::open`], but looks at no manifest: to make one.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_unlisted(dir: &Path) -> Result<Checkpoint, ModelError> {
        Checkpoint::with(dir, Config::from_dir(dir)?, None)
    }

    fn with(
        dir: &Path,
        mut config: Config,
        manifest: Option<Manifest>,
    ) -> Result<Checkpoint, ModelError> {
        let (shards, mut tensors) = open::open(dir, &mut config)?;
        if let Some(manifest) = &manifest {
            manifest.attach(dir, &shards, &mut tensors)?;
        }
        Ok(Checkpoint {
            inner: Arc::new(Inner {
                dir: dir.to_path_buf(),
                config,
                shards,
                tensors,
                listed: manifest.is_some(),
                digest: OnceLock::new(),
            }),
            mapped: false,
        })
    }

    /// The files that hold weights.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.inner.shards.iter().map(|shard| shard.path.as_path())
    }

    /// Whether a manifest lists what the files must hold.
    pub fn has_manifest(&self) -> bool {
        self.inner.listed
    }

    /// Reads every tensor and holds it against the manifest. `progress` hears bytes done and in all, from any
    /// thread. Without a manifest nothing can differ.
    pub fn verify(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Verification {
        manifest::verify(self, progress)
    }

    /// What the model is.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What the model is called where nobody says otherwise: as its directory is.
    pub fn name(&self) -> String {
        let dir = self.dir();
        let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let name = whole.file_name().map(|name| name.to_string_lossy());
        name.map_or_else(|| "model".to_owned(), |name| name.into_owned())
    }

    /// Identity of configuration and weights, whatever the sharding: `full:` or `sampled:` and 64
    /// hex digits.
    ///
    /// Reads every required byte once (above 64 GiB of weights: the first, middle and last 4 KiB
    /// of every tensor; where experts are mapped nothing but the manifest); later calls are free.
    ///
    /// # Errors
    /// A tensor that was read whole and is not what the manifest lists.
    pub fn digest(&self) -> Result<String, ModelError> {
        if let Some(known) = self.inner.digest.get() {
            return Ok(known.clone());
        }
        let digest = digest::digest(self)?;
        Ok(self.inner.digest.get_or_init(|| digest).clone())
    }

    /// Whether the checkpoint holds a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.inner.tensors.contains_key(name)
    }

    /// One tensor, by its full name.
    ///
    /// # Errors
    /// A name that no shard holds.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        match self.inner.tensors.get_key_value(name) {
            Some((name, entry)) => Ok(self.view(name, entry)),
            None => Err(ModelError::tensor(
                &self.inner.dir,
                name,
                "missing from every shard",
            )),
        }
    }

    /// Every tensor of a supported dtype, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.inner
            .tensors
            .iter()
            .map(|(name, entry)| self.view(name, entry))
    }

    /// What the configuration requires of this checkpoint, in model order (optional tensors only
    /// where they exist).
    pub fn required(&self) -> impl Iterator<Item = TensorView<'_>> {
        schema(self.config()).flat_map(|spec| match parts(self.config(), &spec) {
            Some(parts) => parts
                .iter()
                .filter_map(|part| self.tensor(&part.name).ok())
                .collect::<Vec<_>>(),
            None => {
                let view = self.tensor(&spec.name).ok();
                let scales = view.and_then(|view| view.scales().ok().flatten());
                view.into_iter().chain(scales).collect()
            }
        })
    }

    /// The weight `{name}.weight` as f32 with its shape, FP8 multiplied by its block scales, packed integers by theirs.
    ///
    /// # Errors
    /// A missing tensor, or a value that is not finite.
    pub fn weight_f32(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        let name = format!("{name}.weight");
        let shape = match self.config().packed {
            Some(_) => { schema(self.config()).find(|s| s.name == name) }.map(|s| s.shape),
            None => None,
        };
        let weight = self.stored_weight(&name, &shape.unwrap_or_default())?;
        let (rows, cols) = weight.shape();
        Ok((weight.widened(0..rows)?, vec![rows, cols]))
    }

    /// A tensor that the configuration calls for with this shape, in whatever form it is stored, to be widened row by
    /// row.
    ///
    /// # Errors
    /// A missing tensor, or scales that cannot be used.
    pub(crate) fn stored_weight(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<StoredWeight<'_>, ModelError> {
        StoredWeight::find(self, name, shape)
    }

    /// Whether a tensor is what the main model has in its place, bit for bit: copies of embedding and head that MTP
    /// layers come with.
    pub(crate) fn repeats_main(&self, name: &str) -> Result<bool, ModelError> {
        let main = match name {
            _ if name.ends_with(".embed_tokens.weight") => "model.embed_tokens.weight",
            _ if self.config().tie_word_embeddings => "model.embed_tokens.weight",
            _ => "lm_head.weight",
        };
        let same = |a: TensorView<'_>, b: TensorView<'_>| {
            a.dtype() == b.dtype() && a.shape() == b.shape() && a.bytes() == b.bytes()
        };
        let (copy, main) = (self.tensor(name)?, self.tensor(main)?);
        Ok(same(copy, main)
            && match (copy.scales()?, main.scales()?) {
                (Some(copy), Some(main)) => same(copy, main),
                (copy, main) => copy.is_none() && main.is_none(),
            })
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        TensorView {
            checkpoint: self,
            name,
            entry,
        }
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.inner.dir)
            .field("tensors", &self.inner.tensors.len())
            .finish()
    }
}
