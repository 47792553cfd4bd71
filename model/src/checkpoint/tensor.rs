//! One stored tensor: its element type, its bytes where they lie, and what they are as numbers.

use std::fmt;
use std::path::Path;

use super::{Checkpoint, Entry, manifest, scales_name};
use crate::ModelError;
use crate::config::Packed;

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

/// One stored tensor, not copied.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) name: &'a str,
    pub(super) entry: &'a Entry,
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
        &self.entry.shape
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

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorView")
            .field("name", &self.name)
            .field("dtype", &self.dtype())
            .field("shape", &self.shape())
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
