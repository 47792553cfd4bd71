//! What an attention node's gates choose, on its way to the coordinator.
//!
//! Secret: how every row is counted once although reports and their answers get
//! lost. A report stays the same, with its sequence number, until it is answered;
//! what is counted meanwhile waits where it is counted and goes with the next one.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use guild_proto::cluster::v1::ReportLoadRequest;

/// Rows by layer and expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routed {
    /// Layer indices, ascending.
    pub layers: Vec<u32>,
    /// Logical experts of a layer.
    pub experts: u32,
    /// [layers, experts]
    pub rows: Vec<u64>,
}

/// Whoever counts.
pub trait RoutedSource: Debug + Send + Sync {
    /// What has been counted since the last call; never the same row twice.
    fn take(&self) -> Routed;
}

/// Where the source is, once there is one.
pub(super) type Slot = Arc<OnceLock<Arc<dyn RoutedSource>>>;

/// The report that is to be sent.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    sequence: u64,
    waiting: Option<ReportLoadRequest>,
}

impl Outbox {
    /// The report that has not been answered, else a new one; None if there is
    /// nothing to report.
    pub(super) fn next(&mut self, source: &Slot, node_id: u32) -> Option<ReportLoadRequest> {
        if self.waiting.is_none() {
            let routed = source.get()?.take();
            if routed.rows.iter().all(|&rows| rows == 0) {
                return None;
            }
            self.sequence += 1;
            self.waiting = Some(ReportLoadRequest {
                node_id: 0,
                sequence: self.sequence,
                layers: routed.layers,
                experts: routed.experts,
                rows: routed.rows,
            });
        }
        let waiting = self.waiting.clone()?;
        Some(ReportLoadRequest { node_id, ..waiting })
    }

    /// The report has been answered.
    pub(super) fn counted(&mut self) {
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Counter(Mutex<u64>);

    impl RoutedSource for Counter {
        fn take(&self) -> Routed {
            Routed {
                layers: vec![3],
                experts: 1,
                rows: vec![std::mem::take(&mut self.0.lock().unwrap())],
            }
        }
    }

    #[test]
    fn a_report_is_the_same_until_it_is_answered_and_the_rest_goes_with_the_next() {
        let counter = Arc::new(Counter::default());
        let slot = Slot::default();
        let mut outbox = Outbox::default();
        assert_eq!(outbox.next(&slot, 7), None, "nobody counts");
        slot.set(Arc::clone(&counter) as Arc<dyn RoutedSource>)
            .unwrap();
        assert_eq!(outbox.next(&slot, 7), None, "nothing is counted");
        *counter.0.lock().unwrap() = 5;
        let first = outbox.next(&slot, 7).unwrap();
        assert_eq!((first.sequence, &first.rows[..]), (1, &[5][..]));
        *counter.0.lock().unwrap() += 2;
        assert_eq!(outbox.next(&slot, 7), Some(first.clone()));
        *counter.0.lock().unwrap() += 1;
        // Registered anew, it is still the same report.
        let again = outbox.next(&slot, 8).unwrap();
        assert_eq!((again.node_id, again.sequence), (8, 1));
        outbox.counted();
        let second = outbox.next(&slot, 8).unwrap();
        assert_eq!((second.sequence, &second.rows[..]), (2, &[3][..]));
    }
}
