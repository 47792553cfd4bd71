//! A checkpoint in another format: read, converted, written, one matrix or expert after another.
//!
//! Secret: which tensors the new checkpoint has, and in which order. What a weight becomes is decided where weights
//! are loaded: here is written what a node with the same `--dtype` would have in memory, so both compute the same bits.
//! A folder appears complete or not at all; what an interrupted run has done is kept next door for the next one.

mod journal;
mod plan;
mod sides;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use self::journal::Journal;
use self::plan::{Plan, Unit};
use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::write::Shard;
use crate::checkpoint::{Dtype, Stored};
use crate::expert::Expert;
use crate::weights::{ALIGNMENT, Matrix, read_stored};
use crate::{Checkpoint, ModelError};

/// Bytes of weights after which a new shard begins, when nobody says otherwise.
pub const DEFAULT_SHARD_BYTES: u64 = 4_000_000_000;
/// Bytes of finished tensors that are in memory at a time, but for a tensor that is larger alone.
const BATCH_BYTES: u64 = 64 << 20;

/// How a run began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun {
    /// There was nothing of an earlier one.
    Anew,
    /// An earlier one has left finished files, which stay.
    Resumed {
        /// Files that are there.
        files: usize,
        /// Files in all.
        of: usize,
    },
    /// What an earlier one has left is of no use, and is gone.
    Discarded {
        /// Why.
        reason: String,
    },
}

/// What has been written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Files of weights.
    pub files: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of the tensors.
    pub bytes: u64,
}

/// A checkpoint to be written from another one.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// What is read.
    pub source: &'a Checkpoint,
    /// What weights become: [`Dtype::Bf16`], [`Dtype::Fp8`] or packed.
    pub dtype: Dtype,
    /// Bytes of weights after which a new file begins.
    pub shard_bytes: u64,
    /// The folder that will hold it; must not exist or be empty.
    pub out: &'a Path,
}

impl Job<'_> {
    /// Writes it. `begun` hears once what is done about an earlier run; `progress` hears bytes done and in all.
    ///
    /// # Errors
    /// A source that is packed already, or is what is asked for; an output folder that is in use or cannot be made;
    /// a file that cannot be written; a tensor that cannot be used.
    pub fn run(
        &self,
        begun: &dyn Fn(Begun),
        progress: &dyn Fn(u64, u64),
    ) -> Result<Written, ModelError> {
        let plan = Plan::new(self.source, self.dtype, self.shard_bytes)?;
        let partial = self.partial()?;
        let mut journal = Journal::open(&partial, self.source, &plan)?;
        begun(journal.begun(plan.shards.len()));
        let written = self.write(&plan, &partial, &mut journal, progress)?;
        sides::write(self.source, self.dtype, &partial, &plan)?;
        let tensors = plan.shards.iter().flat_map(|s| &s.tensors);
        let listed = tensors
            .zip(&written)
            .map(|(t, &hash)| (t.name.as_str(), t.dtype, t.shape.as_slice(), hash));
        Manifest::listing(&partial, listed)?.write(&partial)?;
        // What cannot be read back is no checkpoint.
        Checkpoint::open(&partial)?;
        journal.remove()?;
        fs::rename(&partial, self.out)
            .map_err(|e| ModelError::file(self.out, format!("cannot be moved into place: {e}")))?;
        Ok(Written {
            files: plan.shards.len(),
            tensors: written.len(),
            bytes: plan.bytes,
        })
    }

    /// Where everything is until it is complete: beside the output, so that it is on the same disk.
    fn partial(&self) -> Result<PathBuf, ModelError> {
        let out = self.out;
        let (Some(parent), Some(name)) = (out.parent(), out.file_name()) else {
            return Err(ModelError::file(out, "not a directory that can be made"));
        };
        let same = |a: &Path, b: &Path| {
            let (a, b) = (a.canonicalize(), b.canonicalize());
            a.is_ok_and(|a| b.is_ok_and(|b| a == b))
        };
        if same(out, self.source.dir()) {
            return Err(ModelError::file(
                out,
                "is the checkpoint that is read; give another directory",
            ));
        }
        match fs::read_dir(out).map(|mut entries| entries.next().is_some()) {
            Ok(true) => {
                let reason = "not empty; give a directory that does not exist yet";
                return Err(ModelError::file(out, reason));
            }
            Ok(false) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ModelError::file(out, format!("cannot be used: {e}"))),
        }
        let partial = beside(parent, name);
        fs::create_dir_all(&partial)
            .map_err(|e| ModelError::file(&partial, format!("cannot be made: {e}")))?;
        Ok(partial)
    }

    /// Writes all files that the journal does not know. Gives the BLAKE3 of every tensor, in the plan's order.
    fn write(
        &self,
        plan: &Plan,
        partial: &Path,
        journal: &mut Journal,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Vec<blake3::Hash>, ModelError> {
        let mut done = 0;
        let mut hashes = Vec::new();
        for (index, planned) in plan.shards.iter().enumerate() {
            if let Some(known) = journal.hashes(index) {
                hashes.extend_from_slice(known);
                done += planned.bytes();
                progress(done, plan.bytes);
                continue;
            }
            let path = partial.join(&planned.file);
            let mut shard = Shard::create(&path, &planned.tensors, ALIGNMENT)?;
            let mut units = planned.units.as_slice();
            while !units.is_empty() {
                let (batch, rest) = units.split_at(batch(units));
                units = rest;
                // Made side by side, written in order.
                let made: Vec<_> = batch.par_iter().map(|(unit, _)| self.make(unit)).collect();
                for made in made {
                    for tensor in made?.tensors() {
                        shard.write(tensor)?;
                        shard.end_tensor();
                        done += tensor.len() as u64;
                    }
                    progress(done, plan.bytes);
                }
            }
            let written = shard.finish(true)?;
            journal.add(&planned.file, &written)?;
            hashes.extend(written);
        }
        Ok(hashes)
    }

    fn make(&self, unit: &Unit) -> Result<Made, ModelError> {
        Ok(match unit {
            Unit::Kept { tensor } => Made::Kept(read_stored(&self.source.tensor(tensor)?)?),
            Unit::Matrix { name, rows, cols } => {
                Made::Matrix(Matrix::load(self.source, name, *rows, *cols, self.dtype)?)
            }
            Unit::Expert { layer, expert } => Made::Expert(Box::new(Expert::load(
                self.source,
                *layer,
                *expert,
                self.dtype,
            )?)),
        })
    }
}

/// What an interrupted run that was to write `out` has left, if there is something.
pub fn unfinished(out: &Path) -> Option<PathBuf> {
    let partial = beside(out.parent()?, out.file_name()?);
    partial.exists().then_some(partial)
}

fn beside(parent: &Path, name: &OsStr) -> PathBuf {
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    parent.join(partial)
}

/// How many units are made together.
fn batch(units: &[(Unit, u64)]) -> usize {
    let mut bytes = 0;
    let fits = units.iter().take_while(|(_, size)| {
        bytes += size;
        bytes <= BATCH_BYTES
    });
    fits.count().max(1)
}

/// A unit in memory.
enum Made {
    Kept(Vec<u8>),
    Matrix(Matrix),
    Expert(Box<Expert>),
}

impl Made {
    /// The bytes of its tensors, in the plan's order.
    fn tensors(&self) -> impl Iterator<Item = &[u8]> {
        let (first, scales) = match self {
            Made::Kept(bytes) => (bytes.as_slice(), None),
            Made::Matrix(matrix) => {
                let (data, scales) = matrix.memory();
                (data, (!scales.is_empty()).then_some(scales))
            }
            Made::Expert(expert) => (expert.blob(), None),
        };
        std::iter::once(first).chain(scales)
    }
}

/// Whether a checkpoint holds every matrix in this type already.
fn is_already(source: &Checkpoint, stored: Stored) -> bool {
    let mut matrices = source.required().filter(|view| {
        let role = crate::config::Role::of(view.name());
        role != crate::config::Role::Exact
    });
    matrices.all(|view| view.dtype() == stored)
}
