//! Why an exchange fails, with its origin named.

use std::collections::BTreeSet;

use guild_transport::{ExchangeError, Fabric};

use super::Away;

/// Experts named in a failure; more add nothing for the reader.
const EXPERTS_NAMED: usize = 8;

/// An exchange that did not come to an end in time, or could not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "layer {layer}, experts {experts:?}: {message} (node {node:?}, placement epoch {epoch}, {attempts} attempts)"
)]
pub struct ExchangeFailure {
    /// Decoder layer.
    pub layer: usize,
    /// Logical experts concerned, ascending; the first few when there are many.
    pub experts: Vec<u32>,
    /// Placement epoch of the last attempt; 0 when there was no placement.
    pub epoch: u64,
    /// Name of the node that refused or was silent; empty when no single node is to blame.
    pub node: String,
    /// Attempts made.
    pub attempts: u32,
    /// What went wrong at last.
    pub message: String,
}

/// Why an attempt failed.
pub(super) struct Fault {
    pub(super) retryable: bool,
    pub(super) node: String,
    pub(super) experts: Vec<u32>,
    pub(super) message: String,
}

impl<F: Fabric + 'static> Away<'_, F> {
    pub(super) fn failure(&self) -> ExchangeFailure {
        let mut node = self.fault.node.clone();
        if node.is_empty()
            && let Some(silent) = self.parts.iter().find(|part| part.open)
        {
            node = silent.name().to_owned();
        }
        ExchangeFailure {
            layer: self.layer,
            experts: self.experts(&node),
            epoch: self.epoch,
            node,
            attempts: self.attempts,
            message: self.fault.message.clone(),
        }
    }

    /// The experts concerned: those known, else those at the node that is to blame, else all that
    /// are missing.
    fn experts(&self, blamed: &str) -> Vec<u32> {
        if !self.fault.experts.is_empty() {
            return self.fault.experts.clone();
        }
        let Some(view) = self.view() else {
            return Vec::new();
        };
        let lost = |expert: &u32| {
            let homes = view.resolve(self.layer as u32, *expert);
            homes
                .iter()
                .any(|&(node, _)| view.name(node) == Some(blamed))
        };
        let targets = self.routes.experts.iter().zip(&self.state);
        let missing = targets.filter(|(_, target)| !target.here);
        let missing: BTreeSet<u32> = missing.map(|(&expert, _)| expert).collect();
        let at_fault: Vec<u32> = missing.iter().copied().filter(lost).collect();
        let experts = match at_fault.is_empty() {
            true => missing.into_iter().collect(),
            false => at_fault,
        };
        experts.into_iter().take(EXPERTS_NAMED).collect()
    }
}

impl Fault {
    pub(super) fn retryable(message: impl Into<String>) -> Fault {
        Fault {
            retryable: true,
            ..Fault::fatal(message)
        }
    }

    pub(super) fn fatal(message: impl Into<String>) -> Fault {
        Fault {
            retryable: false,
            node: String::new(),
            experts: Vec::new(),
            message: message.into(),
        }
    }
}

impl From<ExchangeError> for Fault {
    fn from(error: ExchangeError) -> Fault {
        Fault {
            retryable: error.is_retryable(),
            node: error.node,
            experts: Vec::new(),
            message: error.message,
        }
    }
}
