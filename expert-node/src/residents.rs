//! Experts in memory: what is there, what is missing, and what it all takes.
//!
//! Secret: the account of memory. Slot tables own the experts; here is known which of them live,
//! so that none is in memory twice and all of them together, those of every epoch, stay within
//! what this node may hold. It must not know placements, nor where an expert comes from: it reads
//! one from the checkpoint or takes one over from elsewhere, as it is told.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use guild_model::{
    Checkpoint, ModelError,
    checkpoint::Dtype,
    expert::{Arriving, Breathe, Expert},
};
use guild_node::memory;

use crate::CopyFrom;

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
        "{missing} more experts of {needed} bytes, with {held} bytes in memory, take more than the {capacity} bytes of --capacity; raise it or add expert nodes"
    )]
    Capacity {
        /// Distinct experts that are not in memory yet.
        missing: usize,
        /// Bytes they would take.
        needed: u64,
        /// Bytes of all experts in memory, those of every epoch.
        held: u64,
        /// Bytes allowed.
        capacity: u64,
    },
    /// What another node gave away as an expert is not that expert.
    #[error("layer {layer}, expert {expert}: the copy from {node} is not to be trusted: {reason}")]
    Copy {
        /// Layer of the expert.
        layer: u32,
        /// Its number in the layer.
        expert: u32,
        /// Name of the node it came from.
        node: String,
        /// How that showed, with both sides of what differs.
        reason: String,
    },
    /// A test wants a failure here.
    #[error(transparent)]
    Fired(#[from] guild_node::failpoint::Fired),
}

/// The experts in this process's memory.
pub struct Residents {
    checkpoint: Checkpoint,
    dtype: Dtype,
    /// Bytes for all of them; 0 is unlimited.
    capacity: u64,
    experts: Mutex<HashMap<ExpertKey, Weak<Expert>>>,
    /// Experts that have come since the start, by where from.
    read: AtomicU64,
    copied: AtomicU64,
}

impl Residents {
    /// No experts yet.
    pub fn new(checkpoint: Checkpoint, dtype: Dtype, capacity: u64) -> Self {
        Self {
            checkpoint,
            dtype,
            capacity,
            experts: Mutex::default(),
            read: AtomicU64::new(0),
            copied: AtomicU64::new(0),
        }
    }

    /// Experts that have come since the start: read from the checkpoint, and copied from other nodes.
    pub fn come(&self) -> [(CopyFrom, u64); 2] {
        let so_far = |of: &AtomicU64| of.load(Ordering::Relaxed);
        [
            (CopyFrom::Checkpoint, so_far(&self.read)),
            (CopyFrom::Peer, so_far(&self.copied)),
        ]
    }

    /// Experts in memory.
    pub fn len(&self) -> usize {
        self.experts().len()
    }

    /// The experts in memory.
    pub fn keys(&self) -> Vec<ExpertKey> {
        self.experts().keys().copied().collect()
    }

    /// Whether none is in memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all experts in memory, those of every epoch.
    pub fn bytes(&self) -> u64 {
        let experts = self.experts();
        let alive = experts.values().filter_map(Weak::upgrade);
        alive.map(|expert| expert.bytes()).sum()
    }

    /// Bytes that further experts may take: what is left of the capacity, or of
    /// the host where there is none; `None` where the host does not say.
    pub fn free_bytes(&self) -> Option<u64> {
        match self.capacity {
            0 => memory::available(),
            capacity => Some(capacity.saturating_sub(self.bytes())),
        }
    }

    /// An expert that is in memory.
    pub fn find(&self, key: ExpertKey) -> Option<Arc<Expert>> {
        self.experts().get(&key).and_then(Weak::upgrade)
    }

    /// Those of `slots` that are not in memory, each once, in that order.
    pub fn missing(&self, slots: &[ExpertKey]) -> Vec<ExpertKey> {
        let experts = self.experts();
        let mut seen = HashSet::new();
        let absent = slots.iter().filter(|key| !experts.contains_key(key));
        absent.filter(|key| seen.insert(**key)).copied().collect()
    }

    /// Whether experts that are not in memory can be beside all that is.
    ///
    /// # Errors
    /// They are too many, or the model has no such expert.
    pub fn check_room(&self, missing: &[ExpertKey]) -> Result<(), LoadError> {
        let held = self.bytes();
        let mut needed: u64 = 0;
        for &key in missing {
            let (layer, expert) = (key.0 as usize, key.1 as usize);
            let bytes = self.checkpoint.expert_memory(layer, expert, self.dtype);
            needed = needed.saturating_add(bytes.map_err(|source| unreadable(key, source))?);
        }
        if self.capacity > 0 && held.saturating_add(needed) > self.capacity {
            return Err(LoadError::Capacity {
                missing: missing.len(),
                needed,
                held,
                capacity: self.capacity,
            });
        }
        Ok(())
    }

    /// The expert, read from the checkpoint unless it is in memory. Blocks.
    ///
    /// # Errors
    /// It cannot be read; nothing is kept of it.
    pub fn read(&self, key: ExpertKey) -> Result<Arc<Expert>, LoadError> {
        self.read_by(key, &|| ())
    }

    /// The same; `breathe` is called after every piece of the work.
    pub(crate) fn read_by(
        &self,
        key: ExpertKey,
        breathe: Breathe<'_>,
    ) -> Result<Arc<Expert>, LoadError> {
        if let Some(resident) = self.find(key) {
            return Ok(resident);
        }
        let (layer, expert) = (key.0 as usize, key.1 as usize);
        let read = Expert::load_by(&self.checkpoint, layer, expert, self.dtype, breathe);
        let read = read.map_err(|source| unreadable(key, source))?;
        Ok(self.keep(key, read, &self.read))
    }

    /// Bytes that the blob of an expert must have.
    ///
    /// # Errors
    /// The model has no such expert.
    pub fn blob_len(&self, key: ExpertKey) -> Result<usize, LoadError> {
        let (layer, expert) = (key.0 as usize, key.1 as usize);
        Expert::blob_len(&self.checkpoint, layer, expert, self.dtype)
            .map_err(|source| unreadable(key, source))
    }

    /// An expert that is to come as a blob.
    ///
    /// # Errors
    /// The model has no such expert.
    pub fn arriving(&self, key: ExpertKey) -> Result<Arriving, LoadError> {
        let (layer, expert) = (key.0 as usize, key.1 as usize);
        Arriving::new(&self.checkpoint, layer, expert, self.dtype)
            .map_err(|source| unreadable(key, source))
    }

    /// Takes over an expert that has come as a blob.
    ///
    /// # Errors
    /// The blob is not complete; nothing is kept of it.
    pub fn adopt(&self, key: ExpertKey, blob: Arriving) -> Result<Arc<Expert>, ModelError> {
        Ok(self.keep(key, blob.finish()?, &self.copied))
    }

    fn keep(&self, key: ExpertKey, expert: Expert, come: &AtomicU64) -> Arc<Expert> {
        come.fetch_add(1, Ordering::Relaxed);
        let expert = Arc::new(expert);
        self.experts().insert(key, Arc::downgrade(&expert));
        expert
    }

    /// Those that live.
    fn experts(&self) -> MutexGuard<'_, HashMap<ExpertKey, Weak<Expert>>> {
        let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        experts.retain(|_, expert| expert.strong_count() > 0);
        experts
    }
}

fn unreadable((layer, expert): ExpertKey, source: ModelError) -> LoadError {
    LoadError::Expert {
        layer,
        expert,
        source,
    }
}
