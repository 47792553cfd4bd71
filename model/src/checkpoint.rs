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
mod storage;
mod stored;
pub(crate) mod write;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use guild_kernels::pack;
use manifest::{Manifest, Verification};
pub use schema::{TensorSpec, schema};
pub(crate) use storage::{IN_WORD, blob_name, parts, scales_name};
pub(crate) use stored::StoredWeight;

use crate::config::{Form, Packed, Role};
use crate::weights::{ALIGNMENT, Format};
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
    /// Linear weights FP8 e4m3 with a scale per 128x128 block, embedding and head bf16.
    Fp8,
    /// Packed as [`Packed::int8`].
    Int8 {
        /// Columns that share a scale.
        group: usize,
    },
    /// Packed as [`Packed::int4`].
    Int4 {
        /// Columns that share a scale.
        group: usize,
    },
}

impl Dtype {
    /// Names the numerics of a node: those of its arithmetic, and whether its weights were rounded.
    /// Weights as stored and weights widened to f32 are the same numbers, so they are one class.
    pub fn numerics_class(self, cpu: &guild_kernels::Cpu) -> String {
        match self {
            Dtype::Auto | Dtype::F32 => cpu.numerics_class().to_owned(),
            _ => format!("{}+{self}-weights", cpu.numerics_class()),
        }
    }

    /// Which weights are packed, where some are.
    pub(crate) fn packed(self) -> Option<Packed> {
        match self {
            Dtype::Int8 { group } => Some(Packed::int8(group)),
            Dtype::Int4 { group } => Some(Packed::int4(group)),
            Dtype::Auto | Dtype::F32 | Dtype::Bf16 | Dtype::Fp8 => None,
        }
    }
}

impl FromStr for Dtype {
    type Err = ModelError;

    /// `auto`, `f32`, `bf16`, `fp8`, `int8` or `int4`; packed ones perhaps with a group, as in `int4-g32`.
    fn from_str(text: &str) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::input("dtype", reason);
        let (name, group) = match text.split_once("-g") {
            Some((name @ ("int4" | "int8"), group)) => {
                let known = pack::GROUPS.into_iter().find(|g| g.to_string() == group);
                let group = known.ok_or_else(|| {
                    bad(format!(
                        "a group of `{group}` columns is unknown; 32, 64 or 128"
                    ))
                })?;
                (name, group)
            }
            _ => (text, pack::GROUP),
        };
        match name {
            "auto" => Ok(Dtype::Auto),
            "f32" => Ok(Dtype::F32),
            "bf16" => Ok(Dtype::Bf16),
            "fp8" => Ok(Dtype::Fp8),
            "int8" => Ok(Dtype::Int8 { group }),
            "int4" => Ok(Dtype::Int4 { group }),
            other => Err(bad(format!(
                "`{other}` is unknown; auto, f32, bf16, fp8, int8 or int4"
            ))),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Dtype::Auto => f.write_str("auto"),
            Dtype::F32 => f.write_str("f32"),
            Dtype::Bf16 => f.write_str("bf16"),
            Dtype::Fp8 => f.write_str("fp8"),
            Dtype::Int8 { group } => write!(f, "int8-g{group}"),
            Dtype::Int4 { group } => write!(f, "int4-g{group}"),
        }
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
    /// Bytes of a packed weight.
    U8,
    /// Integers of 4 bits, eight in each.
    I32,
}

impl Stored {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Stored::F32 | Stored::I32 => 4,
            Stored::Bf16 | Stored::F16 => 2,
            Stored::F8E4M3 | Stored::U8 => 1,
        }
    }

    /// The name used in safetensors headers.
    pub fn name(self) -> &'static str {
        match self {
            Stored::F32 => "F32",
            Stored::Bf16 => "BF16",
            Stored::F16 => "F16",
            Stored::F8E4M3 => "F8_E4M3",
            Stored::U8 => "U8",
            Stored::I32 => "I32",
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
            // Integers all; it is their scales that can be no number.
            Stored::U8 | Stored::I32 => None,
        }
    }
}

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
            mapped: false,
        })
    }

    /// The same checkpoint, whose routed experts are used where they lie in the mapped files instead of being copied:
    /// a node starts at once and memory is paged in when an expert is first used.
    ///
    /// The price: bytes are not looked at before they serve. What an expert must be is taken from the manifest, and an
    /// expert node holds every expert in use against it over time. Files must not be written to or cut short while
    /// they are mapped: a file that is cut short ends the process (SIGBUS).
    ///
    /// # Errors
    /// Experts that are not packed, files without a manifest, or blobs that do not lie at multiples of 64.
    pub fn with_mapped_experts(self) -> Result<Checkpoint, ModelError> {
        let refused = |reason: String| Err(ModelError::file(self.dir(), reason));
        let ours = self.config().packed.filter(|p| p.form == Form::Guild);
        if ours.and_then(|p| p.experts).is_none() {
            return refused(
                "has no packed experts to be mapped; `guild quantize` writes them".into(),
            );
        }
        if !self.has_manifest() {
            return refused(format!(
                "has no {}: what is mapped is held against it; `guild manifest --write` makes one",
                manifest::FILE
            ));
        }
        for view in self.tensors().filter(|v| v.name().ends_with(".blob")) {
            if !view.entry.range.start.is_multiple_of(ALIGNMENT) {
                return Err(ModelError::tensor(
                    view.file(),
                    view.name(),
                    format!("does not lie at a multiple of {ALIGNMENT}; it cannot be mapped"),
                ));
            }
        }
        Ok(Checkpoint {
            mapped: true,
            ..self
        })
    }

    /// The bytes of a tensor, for as long as somebody wants them; None where experts are to be copied.
    pub(crate) fn mapped(&self, name: &str) -> Option<Mapped> {
        let entry = self.inner.tensors.get(name).filter(|_| self.mapped)?;
        Some(Mapped {
            checkpoint: self.clone(),
            shard: entry.shard,
            range: entry.range.clone(),
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

    /// Bytes of one expert of a layer as stored, scales included; 0 for a dense layer.
    pub fn expert_bytes(&self, layer: usize) -> u64 {
        if !self.config().is_moe(layer) {
            return 0;
        }
        let bytes = |spec: &TensorSpec| match parts(self.config(), spec) {
            Some(parts) => { parts.first() }.map_or(0, |part| self.stored_bytes(&part.name)),
            None => self.stored_bytes(&spec.name),
        };
        schema::expert(self.config(), layer, 0)
            .iter()
            .map(bytes)
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

    /// Bytes that a tensor which the configuration calls for takes in a node's memory, its scales included; 0 when it is
    /// absent. All of a packed expert counts as its gate's.
    ///
    /// # Errors
    /// A packed weight, where another dtype is asked for.
    pub fn resident_bytes(&self, spec: &TensorSpec, dtype: Dtype) -> Result<u64, ModelError> {
        let stored = parts(self.config(), spec);
        let name = stored.as_ref().map_or(Some(spec.name.as_str()), |parts| {
            parts.first().map(|part| part.name.as_str())
        });
        let Some(view) = name.and_then(|name| self.tensor(name).ok()) else {
            return Ok(0);
        };
        if view.dtype() == Stored::U8 && view.name().ends_with(".blob") {
            Format::of(&view, dtype)?;
            return Ok(view.bytes().len() as u64);
        }
        let format = match Role::of(&spec.name) {
            // Routers are matrices, but in f32 as vectors are.
            Role::Exact => Format::F32,
            _ => Format::of(&view, dtype)?,
        };
        let (rows, cols) = match spec.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, view.elements()),
        };
        let bytes = format.bytes(rows, cols);
        Ok(bytes.map_or(u64::MAX, |(data, scales)| (data + scales) as u64))
    }

    /// Bytes of everything required, as stored.
    pub fn required_bytes(&self) -> u64 {
        self.required().map(|view| view.bytes().len() as u64).sum()
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

    /// The block scales [ceil(rows/128), ceil(cols/128)] of an FP8 weight, or the scales [panels, groups, 16] of a
    /// packed matrix; None for other tensors, and for experts' blobs, which hold their own.
    ///
    /// # Errors
    /// Such a tensor without scales.
    pub fn scales(&self) -> Result<Option<TensorView<'a>>, ModelError> {
        let name = match self.dtype() {
            Stored::F8E4M3 => format!("{}_scale_inv", self.name),
            Stored::U8 if !self.name.ends_with(".blob") => scales_name(self.name),
            Stored::I32 => scales_name(self.name),
            _ => return Ok(None),
        };
        self.checkpoint.tensor(&name).map(Some)
    }

    /// Which weights of its checkpoint are packed, where some are.
    pub(crate) fn packed(&self) -> Option<&'a Packed> {
        self.checkpoint.config().packed.as_ref()
    }

    /// Every element widened to f32, exactly; FP8 without its scales.
    ///
    /// # Errors
    /// A value that is NaN or infinite, named by its index; a packed weight.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        self.check_finite()?;
        let bytes = self.bytes();
        Ok(match self.dtype() {
            Stored::U8 | Stored::I32 => {
                let reason = "is packed: its bytes are no numbers";
                return Err(ModelError::tensor(self.file(), self.name, reason));
            }
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

/// The bytes of a tensor in a mapped file.
pub(crate) struct Mapped {
    checkpoint: Checkpoint,
    shard: usize,
    range: std::ops::Range<usize>,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.checkpoint.inner.shards[self.shard].map.as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapped")
            .field("range", &self.range)
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
