//! What weights become in memory, by name.

use std::fmt;
use std::str::FromStr;

use guild_kernels::{Arithmetic, pack};

use crate::ModelError;
use crate::config::Packed;

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
    /// Weights as stored and weights widened to f32 are the same numbers, so they are one class; f32 weights know but one
    /// arithmetic.
    pub fn numerics_class(self, cpu: &guild_kernels::Cpu) -> String {
        match self {
            Dtype::Auto => cpu.numerics_class().to_owned(),
            Dtype::F32 => Arithmetic::Fma.numerics_class().to_owned(),
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

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
