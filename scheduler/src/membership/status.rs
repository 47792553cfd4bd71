//! Migrations as others see them, and why one is not begun.

use crate::migration::Unreachable;
use crate::placement::{NodeId, Shortfall};

/// What a migration is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// There is none: the numbers are those of the last one.
    #[default]
    Idle,
    /// Destinations copy, check digests and run canary rows.
    Copying,
    /// The new epoch is active; attention nodes leave the one before it.
    Draining,
}

/// The migration under way, or the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrationStatus {
    /// Grows by one with every migration; 0: there was none.
    pub migration: u64,
    /// What it is about.
    pub phase: Phase,
    /// The epoch that the present step loads or has made active.
    pub epoch: u64,
    /// Why it was begun.
    pub cause: String,
    /// Copies made, in all steps.
    pub copies_done: u32,
    /// Copies made and to be made.
    pub copies: u32,
    /// Bytes of the copies made.
    pub bytes_done: u64,
    /// Bytes of all copies.
    pub bytes: u64,
    /// Migrations that ended well, since this membership is there.
    pub completed: u64,
    /// Migrations that were rolled back, since this membership is there.
    pub rolled_back: u64,
    /// Why the last one was rolled back; empty: none was.
    pub last_failure: String,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target is active, and what it does not need is free.
    Completed,
    /// What was active goes on; steps made before stay.
    RolledBack(String),
}

/// Why a migration is not begun.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// One at a time.
    #[error("migration {migration} ({cause}) is under way; wait for its end")]
    Busy {
        /// Its number.
        migration: u64,
        /// Why it was begun.
        cause: String,
    },
    /// There is nothing to start from.
    #[error("no placement is active; migrations begin when the cluster is ready")]
    NotActive,
    /// Lost homes come first.
    #[error("epoch {0} is being loaded; wait until it is active")]
    Loading(u64),
    /// The target is what is there.
    #[error("every expert is where it is to be")]
    Nothing,
    /// The target gives something to a node that can take nothing now.
    #[error("node {node} can be given no experts: {problem}")]
    Destination {
        /// The node.
        node: NodeId,
        /// Why.
        problem: &'static str,
    },
    /// The target is no placement, or not all of the model.
    #[error("the target is no placement of this model: {0}")]
    Target(String),
    /// The target cannot be reached.
    #[error(transparent)]
    Unreachable(#[from] Unreachable),
}

/// A node that experts are moved off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Experts it still holds.
    pub slots: u32,
    /// The migration that moves them; 0: none is needed, or there is none yet.
    pub migration: u64,
}

/// Why a node cannot be drained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DrainError {
    /// There is no such node.
    #[error("no expert node is called `{0}`")]
    Unknown(String),
    /// The others have no room.
    #[error("the other nodes cannot hold what is on `{name}`: {short}")]
    NoRoom {
        /// The node.
        name: String,
        /// What is missing.
        short: Shortfall,
    },
    /// The migration cannot be begun.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
}
