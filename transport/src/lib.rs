//! Moves rows between nodes.
//!
//! Secret of this room: bytes in flight. A [`Fabric`] takes a batch of rows and
//! the `(node, slot)` each of them goes to, and gives back one row for each such
//! assignment, in the order of the assignments, or an error that names its
//! origin; never anything in between. It may use `proto` for what a frame is.
//! It must not know what an expert, a layer or a model is: a slot is a number,
//! and what a node does with rows stands behind [`SlotHost`].
//!
//! Leaves: `local` (a node of the same process, no serialisation) and `grpc`
//! (one long-lived stream per pair of nodes). [`Links`] mixes them, and both
//! make the same checks. What a slot holds can be fetched as well ([`Links::fetch`]),
//! as bytes that mean nothing here.

mod batch;
mod blob;
mod error;
mod grpc;
mod links;
mod local;
mod rows;
mod service;

use std::{
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

pub use batch::{Assignment, Batch, Handle, Returned};
pub use blob::{CHUNK_BYTES, DIGEST_BYTES, Fetch, FetchRequest, SlotBlob};
pub use error::{ExchangeCode, ExchangeError};
pub use links::{Dial, LinkLimits, Links};
pub use local::Switchboard;
pub use rows::Rows;
pub use service::{ServiceLimits, service};

/// A node, as the coordinator numbers it.
pub type NodeId = u32;

/// The exchange of rows between nodes, in two halves so that the caller can
/// compute while the rows are away.
pub trait Fabric: Send + Sync {
    /// Sends every row to the nodes it is assigned to: once to each of them,
    /// whatever the number of its slots there, in one message per node.
    ///
    /// # Errors
    /// Nothing has been computed when this fails: the batch is malformed or too
    /// large, a node is unknown or cannot be reached, or too much is in flight.
    fn dispatch(&self, batch: Batch<'_>) -> Result<Handle, ExchangeError>;

    /// Whether rows for `node` are computed while they are dispatched: rows for
    /// others had better be sent first.
    fn is_here(&self, node: NodeId) -> bool;

    /// Waits for all rows of a dispatch.
    ///
    /// # Errors
    /// Some row did not come back whole and in time. There is no partial result.
    fn combine(
        &self,
        handle: Handle,
    ) -> impl Future<Output = Result<Returned, ExchangeError>> + Send;
}

/// What a node does with the rows that arrive for its slots.
pub trait SlotHost: Send + Sync + 'static {
    /// Runs `work` and returns `[work.pairs(), width]`: for each slot in the
    /// order given, one row for each of its indices in the order given.
    ///
    /// Called on a thread that may block. A row of the result must depend on
    /// its slot and its input row alone.
    ///
    /// # Errors
    /// The epoch or a slot is unknown, or the node cannot compute.
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError>;

    /// What a slot holds, for a node that is to have a copy of it. Called on a
    /// thread that may block. A host has nothing to give away unless it says so.
    ///
    /// # Errors
    /// The epoch or the slot is unknown.
    fn blob(&self, epoch: u64, slot: u32) -> Result<SlotBlob, ExchangeError> {
        Err(ExchangeError::new(
            ExchangeCode::UnknownSlot,
            "",
            format!("epoch {epoch}, slot {slot}: nothing is given away here"),
        ))
    }
}

/// Rows that have arrived at a node, checked: every index is within `rows`.
#[derive(Debug)]
pub struct Work {
    /// The placement that the slots belong to.
    pub epoch: u64,
    /// Elements in a row.
    pub width: usize,
    /// `[n, width]`.
    pub rows: Rows,
    /// Slots, each with the indices of its rows.
    pub slots: Vec<(u32, Vec<u32>)>,
    /// After this the caller no longer waits.
    pub deadline: Option<Instant>,
    /// Who sent it: a fabric of this process, or a stream. Another number is
    /// another sender, until a stream is opened again.
    pub source: u64,
}

/// A number for [`Work::source`] that nobody else in this process has.
fn new_source() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Work {
    /// Rows that the answer must hold.
    pub fn pairs(&self) -> usize {
        self.slots.iter().map(|(_, rows)| rows.len()).sum()
    }
}
