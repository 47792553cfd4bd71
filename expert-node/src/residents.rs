//! Experts in memory: reading what a placement asks for, keeping what is
//! already there, letting go of what nobody uses.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
};

use guild_model::{Checkpoint, ModelError, checkpoint::Dtype, expert::Expert};

/// A routed expert of the model: (layer, logical expert).
pub type ExpertKey = (u32, u32);

/// Why the experts of a placement are not resident.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// An expert cannot be read.
    #[error("layer {layer}, expert {expert}: {source}")]
    Expert {
        /// Layer of the expert.
        layer: u32,
        /// Its number in the layer.
        expert: u32,
        /// What is wrong.
        source: ModelError,
    },
    /// The placement asks for more than this node said it can hold.
    #[error(
        "{wanted} experts take more than the {capacity} bytes of --capacity; raise it or add expert nodes"
    )]
    Capacity {
        /// Distinct experts asked for.
        wanted: usize,
        /// Bytes allowed.
        capacity: u64,
    },
}

/// The experts that this process has read. Slot tables own them: an expert that
/// no table uses any more is gone.
pub struct Residents {
    checkpoint: Checkpoint,
    dtype: Dtype,
    /// Bytes for the experts of one placement; 0 is unlimited.
    capacity: u64,
    experts: HashMap<ExpertKey, Weak<Expert>>,
    /// What a superseded load has read, for the next one.
    spare: Vec<Arc<Expert>>,
}

/// How far a load has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Experts that are resident.
    pub done: usize,
    /// Experts asked for.
    pub wanted: usize,
    /// Bytes of those that are resident.
    pub bytes: u64,
}

impl Residents {
    /// No experts yet.
    pub fn new(checkpoint: Checkpoint, dtype: Dtype, capacity: u64) -> Self {
        Self {
            checkpoint,
            dtype,
            capacity,
            experts: HashMap::new(),
            spare: Vec::new(),
        }
    }

    /// Experts in memory.
    pub fn len(&self) -> usize {
        let alive = |expert: &&Weak<Expert>| expert.strong_count() > 0;
        self.experts.values().filter(alive).count()
    }

    /// Whether none is in memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The experts of `slots`, in that order; those that are not resident yet
    /// are read, one after the other. `None` when `superseded` said, before an
    /// expert was read, that the result is no longer wanted; what has been read
    /// is kept for the next call.
    ///
    /// # Errors
    /// An expert cannot be read, or they are too many; nothing is kept of them.
    pub fn load(
        &mut self,
        slots: &[ExpertKey],
        superseded: impl Fn() -> bool,
        progress: impl Fn(Progress),
    ) -> Result<Option<Vec<Arc<Expert>>>, LoadError> {
        let wanted = slots.iter().collect::<HashSet<_>>().len();
        let mut seen = HashSet::new();
        let mut bytes = 0;
        let mut found = Vec::with_capacity(slots.len());
        // Until this load has taken its own from them.
        let _spare = std::mem::take(&mut self.spare);
        for &key in slots {
            let resident = match self.experts.get(&key).and_then(Weak::upgrade) {
                Some(resident) => resident,
                None if superseded() => {
                    self.spare = found;
                    return Ok(None);
                }
                None => self.read(key)?,
            };
            if seen.insert(key) {
                bytes += resident.bytes();
                if self.capacity > 0 && bytes > self.capacity {
                    return Err(LoadError::Capacity {
                        wanted,
                        capacity: self.capacity,
                    });
                }
                progress(Progress {
                    done: seen.len(),
                    wanted,
                    bytes,
                });
            }
            found.push(resident);
        }
        self.experts.retain(|_, expert| expert.strong_count() > 0);
        Ok(Some(found))
    }

    fn read(&mut self, key: ExpertKey) -> Result<Arc<Expert>, LoadError> {
        let (layer, expert) = key;
        let (at, of) = (layer as usize, expert as usize);
        let read = Expert::load(&self.checkpoint, at, of, self.dtype).map_err(|source| {
            LoadError::Expert {
                layer,
                expert,
                source,
            }
        })?;
        let read = Arc::new(read);
        self.experts.insert(key, Arc::downgrade(&read));
        Ok(read)
    }
}
