//! What the files of a new checkpoint will hold.
//!
//! Secret: the order. Attention nodes read the first files, expert nodes the others; in files of blobs there is
//! nothing else, so that every blob lies at a multiple of 64 and can be used where it lies.

use super::is_already;
use crate::checkpoint::write::Out;
use crate::checkpoint::{Dtype, Stored, blob_name, scales_name, schema};
use crate::config::{FP8_BLOCK, Role, packed};
use crate::expert::Expert;
use crate::weights::Format;
use crate::{Checkpoint, ModelError};

/// What is made in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unit {
    /// A tensor as it is.
    Kept { tensor: String },
    /// `{name}.weight` with its scales, if it gets any.
    Matrix {
        name: String,
        rows: usize,
        cols: usize,
    },
    /// A routed expert as a blob.
    Expert { layer: usize, expert: usize },
}

/// One file.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) file: String,
    /// With their bytes.
    pub(super) units: Vec<(Unit, u64)>,
    /// Of all units, in order.
    pub(super) tensors: Vec<Out>,
}

impl Planned {
    pub(super) fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shards: Vec<Planned>,
    pub(super) bytes: u64,
}

impl Plan {
    pub(super) fn new(
        source: &Checkpoint,
        dtype: Dtype,
        shard_bytes: u64,
    ) -> Result<Plan, ModelError> {
        let refused = |reason: String| Err(ModelError::file(source.dir(), reason));
        if let Some(packed) = source.config().packed {
            let what = packed
                .experts
                .or(packed.linear)
                .map_or("packed", packed::name);
            return refused(format!(
                "is {what} already; give the checkpoint that it was made from"
            ));
        }
        match dtype {
            Dtype::Fp8 if source.config().fp8 => return refused("is fp8 already".into()),
            Dtype::Bf16 if is_already(source, Stored::Bf16) => {
                return refused("is bf16 already".into());
            }
            Dtype::Auto | Dtype::F32 => {
                let reason = format!("`{dtype}` is nothing to write; int4, int8, fp8 or bf16");
                return Err(ModelError::input("--to", reason));
            }
            Dtype::Fp8 | Dtype::Bf16 | Dtype::Int8 { .. } | Dtype::Int4 { .. } => {}
        }
        let (mut blobs, mut others) = (Vec::new(), Vec::new());
        for spec in schema(source.config()) {
            let Ok(view) = source.tensor(&spec.name) else {
                continue;
            };
            if spec.optional && source.repeats_main(&spec.name)? {
                continue;
            }
            let role = Role::of(&spec.name);
            let (Some(name), [rows, cols]) = (spec.name.strip_suffix(".weight"), &spec.shape[..])
            else {
                others.push(kept(view.name(), view.dtype(), view.shape()));
                continue;
            };
            if role == Role::Exact {
                others.push(kept(&spec.name, view.dtype(), view.shape()));
            } else if role == Role::Expert && dtype.packed().is_some() {
                if let Some((layer, expert)) = gate_of(name) {
                    blobs.push(blob(source, layer, expert, dtype)?);
                }
            } else {
                let format = Format::of(&view, dtype)?;
                others.push(matrix(name, *rows, *cols, format));
            }
        }
        let mut shards = cut(others, shard_bytes);
        shards.extend(cut(blobs, shard_bytes));
        let of = shards.len();
        for (i, shard) in shards.iter_mut().enumerate() {
            shard.file = format!("model-{:05}-of-{of:05}.safetensors", i + 1);
        }
        let bytes = shards.iter().map(Planned::bytes).sum();
        Ok(Plan { shards, bytes })
    }
}

/// A unit and its tensors.
type Item = (Unit, Vec<Out>);

fn kept(name: &str, dtype: Stored, shape: &[usize]) -> Item {
    let elements: usize = shape.iter().product();
    let out = Out {
        name: name.to_owned(),
        dtype: dtype.name(),
        shape: shape.to_vec(),
        bytes: (elements * dtype.bytes()) as u64,
    };
    let tensor = name.to_owned();
    (Unit::Kept { tensor }, vec![out])
}

fn matrix(name: &str, rows: usize, cols: usize, format: Format) -> Item {
    let weight = format!("{name}.weight");
    let (data, scales) = format.bytes(rows, cols).unwrap_or_default();
    let mut tensors = vec![Out {
        name: weight.clone(),
        dtype: format.stored().name(),
        shape: match format {
            Format::Packed { .. } => vec![rows.div_ceil(16), data / rows.div_ceil(16).max(1)],
            _ => vec![rows, cols],
        },
        bytes: data as u64,
    }];
    match format {
        Format::Fp8 => tensors.push(Out {
            name: format!("{weight}_scale_inv"),
            dtype: Stored::F32.name(),
            shape: vec![rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)],
            bytes: scales as u64,
        }),
        Format::Packed { group, .. } => tensors.push(Out {
            name: scales_name(&weight),
            dtype: Stored::Bf16.name(),
            shape: vec![rows.div_ceil(16), cols.div_ceil(group), 16],
            bytes: scales as u64,
        }),
        Format::F32 | Format::Bf16 => {}
    }
    let name = name.to_owned();
    (Unit::Matrix { name, rows, cols }, tensors)
}

fn blob(
    source: &Checkpoint,
    layer: usize,
    expert: usize,
    dtype: Dtype,
) -> Result<Item, ModelError> {
    let bytes = Expert::blob_len(source, layer, expert, dtype)?;
    let out = Out {
        name: blob_name(layer, expert),
        dtype: Stored::U8.name(),
        shape: vec![bytes],
        bytes: bytes as u64,
    };
    Ok((Unit::Expert { layer, expert }, vec![out]))
}

/// Layer and expert in `model.layers.L.mlp.experts.E.gate_proj`; None for up and down.
fn gate_of(name: &str) -> Option<(usize, usize)> {
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once(".mlp.experts.")?;
    let expert = rest.strip_suffix(".gate_proj")?;
    Some((layer.parse().ok()?, expert.parse().ok()?))
}

/// Fills files one after another.
fn cut(items: Vec<Item>, shard_bytes: u64) -> Vec<Planned> {
    let mut shards: Vec<Planned> = Vec::new();
    let mut size = 0;
    for (unit, tensors) in items {
        let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
        if shards.is_empty() || size > 0 && size + bytes > shard_bytes {
            size = 0;
            shards.push(Planned {
                file: String::new(),
                units: Vec::new(),
                tensors: Vec::new(),
            });
        }
        size += bytes;
        if let Some(last) = shards.last_mut() {
            last.units.push((unit, bytes));
            last.tensors.extend(tensors);
        }
    }
    shards
}
