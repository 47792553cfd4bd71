//! The lease of a node, as the node itself sees it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// How long the coordinator counts on this node. Counted from when a heartbeat
/// was sent that has been acknowledged, so it never ends later here than there.
/// Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Lease(Arc<Mutex<Option<Instant>>>);

impl Lease {
    /// Whether it has not run out. False before the first registration.
    pub fn is_held(&self) -> bool {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    pub(super) fn renew(&self, until: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }

    pub(super) fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
