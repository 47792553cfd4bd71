//! Why an exchange failed, and where.

use std::fmt;

use guild_proto::experts::v1::{ExchangeFault, FaultCode};

/// An exchange that failed, with the node it failed at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{node}: {code}: {message}")]
pub struct ExchangeError {
    /// The kind of failure.
    pub code: ExchangeCode,
    /// Name of the node where it arose: the one that refused, or the one that
    /// could not be reached.
    pub node: String,
    /// What happened, with epoch and slot where they are known.
    pub message: String,
}

/// Kinds of failed exchanges. Those of [`FaultCode`] may come from the far end
/// of a stream, the others arise at this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExchangeCode {
    /// The node does not, or no longer, know this epoch.
    UnknownEpoch,
    /// No such slot at this epoch.
    UnknownSlot,
    /// A frame was changed on the way.
    Checksum,
    /// Width, format, counts or indices disagree.
    Malformed,
    /// The answer did not come in time.
    Deadline,
    /// Too much is in flight.
    Overloaded,
    /// The node is going away.
    Draining,
    /// The node failed.
    Internal,
    /// No connection, or it was lost before the answer came.
    Unreachable,
    /// The fabric has no link to a node of this number.
    UnknownNode,
    /// The batch does not fit the limits of one message.
    TooLarge,
}

impl ExchangeCode {
    /// Whether the same rows may succeed a little later, by a newer placement or
    /// at another node.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::UnknownEpoch
            | Self::Checksum
            | Self::Deadline
            | Self::Overloaded
            | Self::Draining
            | Self::Unreachable
            | Self::UnknownNode => true,
            Self::UnknownSlot | Self::Malformed | Self::Internal | Self::TooLarge => false,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::UnknownEpoch => "unknown epoch",
            Self::UnknownSlot => "unknown slot",
            Self::Checksum => "checksum",
            Self::Malformed => "malformed",
            Self::Deadline => "deadline exceeded",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::Internal => "internal",
            Self::Unreachable => "unreachable",
            Self::UnknownNode => "unknown node",
            Self::TooLarge => "too large",
        }
    }
}

impl fmt::Display for ExchangeCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<FaultCode> for ExchangeCode {
    fn from(code: FaultCode) -> Self {
        match code {
            FaultCode::UnknownEpoch => Self::UnknownEpoch,
            FaultCode::UnknownSlot => Self::UnknownSlot,
            FaultCode::Checksum => Self::Checksum,
            FaultCode::Malformed => Self::Malformed,
            FaultCode::Deadline => Self::Deadline,
            FaultCode::Overloaded => Self::Overloaded,
            FaultCode::Draining => Self::Draining,
            FaultCode::Internal | FaultCode::Unspecified => Self::Internal,
        }
    }
}

impl From<ExchangeCode> for FaultCode {
    fn from(code: ExchangeCode) -> Self {
        match code {
            ExchangeCode::UnknownEpoch => Self::UnknownEpoch,
            ExchangeCode::UnknownSlot => Self::UnknownSlot,
            ExchangeCode::Checksum => Self::Checksum,
            ExchangeCode::Malformed | ExchangeCode::TooLarge => Self::Malformed,
            ExchangeCode::Deadline => Self::Deadline,
            ExchangeCode::Overloaded => Self::Overloaded,
            ExchangeCode::Draining => Self::Draining,
            ExchangeCode::Internal | ExchangeCode::Unreachable | ExchangeCode::UnknownNode => {
                Self::Internal
            }
        }
    }
}

impl ExchangeError {
    /// An error that arose at `node`.
    pub fn new(code: ExchangeCode, node: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code,
            node: node.into(),
            message: message.into(),
        }
    }

    /// See [`ExchangeCode::is_retryable`].
    pub fn is_retryable(&self) -> bool {
        self.code.is_retryable()
    }

    /// The refusal that came back from `peer`.
    pub(crate) fn from_fault(fault: ExchangeFault, peer: &str) -> Self {
        let code = fault.code().into();
        let node = if fault.node.is_empty() {
            peer.to_owned()
        } else {
            fault.node
        };
        Self {
            code,
            node,
            message: fault.message,
        }
    }

    /// This error as it travels.
    pub(crate) fn to_fault(&self) -> ExchangeFault {
        ExchangeFault::bounded(self.code.into(), &self.node, &self.message)
    }
}
