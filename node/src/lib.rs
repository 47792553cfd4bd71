//! What any Guild process does, whatever its role.
//!
//! Secret of this room: the host. It alone reads configuration files and the
//! environment, talks to the operating system about signals and log output,
//! puts a server on a listener and takes it off again without losing a stream,
//! and keeps this process a member of its cluster. It may use `proto`; it must
//! not know what a model, an expert or a scheduler is: whatever of those has to
//! be told to the coordinator comes in as data.

pub mod call;
pub mod channel;
pub mod config;
pub mod exit;
pub mod failpoint;
pub mod keys;
pub mod member;
pub mod memory;
pub mod metrics;
pub mod serve;
pub mod shutdown;
pub mod size;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod tls;
mod watched;

pub use exit::{ExitKind, HasExitKind};
pub use shutdown::Shutdown;
pub use watched::{FileError, RECHECK};
