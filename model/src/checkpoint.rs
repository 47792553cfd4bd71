//! Weights on disk: safetensors files, mapped and checked before use.
//!
//! The secret kept here is the container: shards, index, headers, offsets and
//! the names of tensors. [`schema`] is the one list of what a configuration
//! requires; everything a checkpoint can get wrong is found by
//! [`Checkpoint::open`], with file and tensor named. Values are looked at only
//! where tensors are loaded, and so are their digests where a [`manifest`] lists them.

mod digest;
mod header;
pub mod manifest;
mod open;
mod schema;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use manifest::{Manifest, Verification};
pub use schema::{TensorSpec, schema};

use crate::{Config, ModelError};

/// What weights become in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As stored (f16 is widened to f32).
    #[default]
    Auto,
    /// Widened to f32.
    F32,
    /// Rounded to bf16, nearest even.
    Bf16,
}

impl Dtype {
    /// Names the numerics of a node: those of its arithmetic, and whether its weights were rounded.
    /// Weights as stored and weights widened to f32 are the same numbers, so they are one class.
    pub fn numerics_class(self, cpu: &guild_kernels::Cpu) -> String {
        match self {
            Dtype::Auto | Dtype::F32 => cpu.numerics_class().to_owned(),
            Dtype::Bf16 => format!("{}+bf16-weights", cpu.numerics_class()),
        }
    }
}

impl FromStr for Dtype {
    type Err = ModelError;

    fn from_str(text: &str) -> Result<Self, ModelError> {
        match text {
            "auto" => Ok(Dtype::Auto),
            "f32" => Ok(Dtype::F32),
            "bf16" => Ok(Dtype::Bf16),
            other => Err(ModelError::input(
                "dtype",
                format!("`{other}` is unknown; auto, f32 or bf16"),
            )),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::Auto => "auto",
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// Element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// FP8 e4m3fn: 1 sign, 4 exponent, 3 mantissa bits, no infinities.
    F8E4M3,
}

impl Stored {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::Bf16 | Stored::F16 => 2,
            Stored::F8E4M3 => 1,
        }
    }

    /// The name used in safetensors headers.
    pub fn name(self) -> &'static str {
        match self {
            Stored::F32 => "F32",
            Stored::Bf16 => "BF16",
            Stored::F16 => "F16",
            Stored::F8E4M3 => "F8_E4M3",
        }
    }

    /// Index of the first element that is NaN or infinite.
    pub(crate) fn first_not_finite(self, bytes: &[u8]) -> Option<usize> {
        // A float whose exponent is all ones; e4m3 has NaN alone.
        match self {
            Stored::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .position(|&b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
            Stored::Bf16 => bytes
                .as_chunks()
                .0
                .iter()
                .position(|&b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
            Stored::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .position(|&b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
            Stored::F8E4M3 => bytes.iter().position(|&b| b & 0x7f == 0x7f),
        }
    }
}

/// A checkpoint whose files are mapped and whose headers fit its configuration. Cheap to clone.
#[derive(Clone)]
pub struct Checkpoint {
    inner: Arc<Inner>,
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
    range: std::ops::Range<usize>,
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
        })
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

    /// Identity of configuration and weights, whatever the sharding: `full:` or `sampled:` and 64
    /// hex digits.
    ///
    /// Reads every required byte once (above 64 GiB of weights: the first, middle and last 4 KiB
    /// of every tensor); later calls are free.
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
        schema(self.config())
            .filter_map(|spec| self.tensor(&spec.name).ok())
            .flat_map(|view| {
                let scales = view.scales().ok().flatten();
                std::iter::once(view).chain(scales)
            })
    }

    /// Bytes of one expert of a layer as stored, scales included; 0 for a dense layer.
    pub fn expert_bytes(&self, layer: usize) -> u64 {
        if !self.config().is_moe(layer) {
            return 0;
        }
        schema::expert(self.config(), layer, 0)
            .iter()
            .map(|spec| self.stored_bytes(&spec.name))
            .sum()
    }

    /// Bytes of a tensor as stored, scales included; 0 when it is absent.
    pub fn stored_bytes(&self, name: &str) -> u64 {
        let Ok(view) = self.tensor(name) else {
            return 0;
        };
        let scales = view.scales().ok().flatten().map_or(0, |s| s.bytes().len());
        (view.bytes().len() + scales) as u64
    }

    /// Bytes of everything required, as stored.
    pub fn required_bytes(&self) -> u64 {
        self.required().map(|view| view.bytes().len() as u64).sum()
    }

    /// The weight `{name}.weight` as f32 with its shape, FP8 multiplied by its block scales.
    ///
    /// # Errors
    /// A missing tensor, or a value that is not finite.
    pub fn weight_f32(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        let view = self.tensor(&format!("{name}.weight"))?;
        let mut values = view.to_f32()?;
        if let Some(scales) = view.scales()? {
            let cols = view.shape[1];
            let blocks = scales.shape[1];
            let scales = scales.to_f32()?;
            for (i, row) in values.chunks_exact_mut(cols).enumerate() {
                for (j, w) in row.iter_mut().enumerate() {
                    *w *= scales
                        [i / crate::config::FP8_BLOCK * blocks + j / crate::config::FP8_BLOCK];
                }
            }
        }
        Ok((values, view.shape.to_vec()))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        TensorView {
            checkpoint: self,
            name,
            entry,
            shape: &entry.shape,
        }
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.inner.dir)
            .field("tensors", &self.inner.tensors.len())
            .finish()
    }
}

/// One stored tensor, not copied.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    entry: &'a Entry,
    shape: &'a [usize],
}

impl<'a> TensorView<'a> {
    /// Full name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Element type.
    pub fn dtype(&self) -> Stored {
        self.entry.dtype
    }

    /// Rows first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes().len() / self.dtype().bytes()
    }

    /// The stored bytes: row-major, little endian, of any alignment.
    pub fn bytes(&self) -> &'a [u8] {
        let bytes: &'a [u8] = self.checkpoint.inner.shards[self.entry.shard].map.as_ref();
        &bytes[self.entry.range.clone()]
    }

    /// The file that holds it.
    pub fn file(&self) -> &'a Path {
        &self.checkpoint.inner.shards[self.entry.shard].path
    }

    /// The block scales [ceil(rows/128), ceil(cols/128)] of an FP8 weight; None for other dtypes.
    ///
    /// # Errors
    /// An FP8 tensor without scales.
    pub fn scales(&self) -> Result<Option<TensorView<'a>>, ModelError> {
        if self.dtype() != Stored::F8E4M3 {
            return Ok(None);
        }
        self.checkpoint
            .tensor(&format!("{}_scale_inv", self.name))
            .map(Some)
    }

    /// Every element widened to f32, exactly; FP8 without its scales.
    ///
    /// # Errors
    /// A value that is NaN or infinite, named by its index.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        self.check_finite()?;
        let bytes = self.bytes();
        Ok(match self.dtype() {
            Stored::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect(),
            Stored::Bf16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| half::bf16::from_le_bytes(b).to_f32())
                .collect(),
            Stored::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| half::f16::from_le_bytes(b).to_f32())
                .collect(),
            Stored::F8E4M3 => bytes.iter().map(|&b| e4m3_to_f32(b)).collect(),
        })
    }

    /// Refuses NaN and infinite values without widening anything.
    ///
    /// # Errors
    /// The first such value, named by its index.
    pub fn check_finite(&self) -> Result<(), ModelError> {
        match self.dtype().first_not_finite(self.bytes()) {
            Some(i) => Err(self.not_finite(i)),
            None => Ok(()),
        }
    }

    /// BLAKE3 of its bytes, where a manifest lists it.
    pub(crate) fn listed(&self) -> Option<blake3::Hash> {
        self.entry.blake3
    }

    /// Refuses bytes that do not hash to what the manifest lists.
    pub(crate) fn expect(&self, found: &blake3::Hash) -> Result<(), ModelError> {
        match self.listed() {
            Some(listed) if listed != *found => Err(ModelError::tensor(
                self.file(),
                self.name,
                manifest::differs(found, &listed),
            )),
            _ => Ok(()),
        }
    }

    pub(crate) fn not_finite(&self, index: usize) -> ModelError {
        ModelError::tensor(
            self.file(),
            self.name,
            format!("element {index} is not a finite number; the checkpoint is damaged"),
        )
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorView")
            .field("name", &self.name)
            .field("dtype", &self.dtype())
            .field("shape", &self.shape)
            .finish()
    }
}

/// The value of an e4m3fn byte: bias 7, subnormals, no infinities, NaN at 0x7f and 0xff.
pub fn e4m3_to_f32(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3) & 15, f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * libm::exp2f(f32::from(exponent) - 7.0),
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}
