//! How a process ends: one small table of exit codes for every role.
//!
//! Errors of all rooms that can end a process say which kind they are; only the
//! binary turns the kind into a number.

/// Why a process ends. The number is the exit code and part of the contract
/// with scripts and supervisors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// A defect, or an error with no better name.
    Internal = 1,
    /// The command line is wrong.
    Usage = 2,
    /// A configuration file or an environment variable is wrong.
    Config = 3,
    /// The checkpoint is missing, damaged, or not the one the cluster serves.
    Model = 4,
    /// An address cannot be bound or a peer refused this process.
    Network = 5,
    /// The machine lacks memory, threads or file handles.
    Resources = 6,
    /// A comparison found what it was asked to look for.
    Verdict = 7,
}

impl ExitKind {
    /// The exit code.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// An error that knows how the process should end because of it.
pub trait HasExitKind: std::error::Error {
    /// The kind that decides the exit code.
    fn exit_kind(&self) -> ExitKind;
}
