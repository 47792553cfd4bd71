//! How many bytes of a checkpoint something takes: in its files, and in the memory of a node that has it.

use super::schema::{self, TensorSpec};
use super::{Checkpoint, Dtype, Stored, parts};
use crate::ModelError;
use crate::config::Role;
use crate::weights::Format;

impl Checkpoint {
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
}
