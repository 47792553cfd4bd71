//! Experts that are used where they lie in the files.
//!
//! Secret: what a checkpoint must be for that, and how long its files stay mapped.

use std::fmt;
use std::ops::Range;

use super::{Checkpoint, manifest};
use crate::ModelError;
use crate::config::Form;
use crate::weights::ALIGNMENT;

impl Checkpoint {
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
}

/// The bytes of a tensor in a mapped file.
pub(crate) struct Mapped {
    checkpoint: Checkpoint,
    shard: usize,
    range: Range<usize>,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.checkpoint.inner.shards[self.shard].map.as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped")
            .field("range", &self.range)
            .finish()
    }
}
