//! In which tensors a packed checkpoint keeps what a configuration calls for.
//!
//! Secret: names and shapes of packed tensors, ours and those of the `compressed-tensors` library. A matrix keeps its name and has its bytes as U8, a row per panel of 16
//! outputs, and its scales beside it as BF16; a routed expert is one U8 tensor, which is the expert's blob as it lies
//! in memory.

use guild_kernels::pack;

use super::{Stored, TensorSpec};
use crate::Config;
use crate::config::{Form, Role};
use crate::expert;

/// Integers of 4 bits in an int32.
pub(crate) const IN_WORD: usize = 8;
/// Rows of a panel.
const PANEL: usize = 16;

/// A stored tensor that a packed weight is, or is a part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: Stored,
    pub(crate) shape: Vec<usize>,
}

/// Name of the blob of a routed expert.
pub(crate) fn blob_name(layer: usize, expert: usize) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.blob")
}

/// What keeps a weight; None for one that is stored plainly. Up and down of an expert are in the blob that keeps its
/// gate: for them there is nothing more.
pub(crate) fn parts(c: &Config, spec: &TensorSpec) -> Option<Vec<Part>> {
    let role = Role::of(&spec.name);
    let int = c.packed.as_ref()?.of(role)?;
    let group = c.packed.as_ref()?.group;
    if c.packed.as_ref()?.form == Form::CompressedTensors {
        let [rows, cols] = spec.shape[..] else {
            return None;
        };
        let part = |ending: &str, dtype, across| Part {
            name: format!("{}_{ending}", spec.name),
            dtype,
            shape: vec![rows, across],
        };
        return Some(vec![
            part("packed", Stored::I32, cols.div_ceil(IN_WORD)),
            part("scale", Stored::Bf16, cols.div_ceil(group)),
        ]);
    }
    if role == Role::Expert {
        let blob = |name: &str| Part {
            name: format!("{name}.blob"),
            dtype: Stored::U8,
            shape: vec![expert::packed_len(c)],
        };
        let gate = spec.name.strip_suffix(".gate_proj.weight");
        return Some(gate.map(blob).into_iter().collect());
    }
    let [rows, cols] = spec.shape[..] else {
        return None;
    };
    let panels = rows.div_ceil(PANEL);
    Some(vec![
        Part {
            name: spec.name.clone(),
            dtype: Stored::U8,
            shape: vec![panels, pack::bytes(int, PANEL, cols, group)],
        },
        Part {
            name: scales_name(&spec.name),
            dtype: Stored::Bf16,
            shape: vec![panels, cols.div_ceil(group), PANEL],
        },
    ])
}

/// Name of the scales of a packed matrix.
pub(crate) fn scales_name(weight: &str) -> String {
    format!("{}_scale", weight.strip_suffix("_packed").unwrap_or(weight))
}
