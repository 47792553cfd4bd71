//! Virtual time and what happens in it. Secret: the order of events at one instant, which is that
//! of their making.

use std::collections::BTreeMap;

/// Microseconds since the start of the run.
pub(super) type Time = u64;
/// A millisecond.
pub(super) const MS: Time = 1_000;
/// A second.
pub(super) const SEC: Time = 1_000_000;

/// A process of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Who {
    /// The cluster store, one linearizable thing however many machines it is.
    Store,
    /// A coordinator with its front door.
    Coordinator(usize),
    /// An expert node.
    Expert(usize),
    /// An attention node.
    Attention(usize),
}

/// Events by time.
#[derive(Debug)]
pub(super) struct Agenda<E> {
    events: BTreeMap<(Time, u64), E>,
    made: u64,
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Agenda {
            events: BTreeMap::new(),
            made: 0,
        }
    }
}

impl<E> Agenda<E> {
    /// `event` happens at `at`.
    pub(super) fn add(&mut self, at: Time, event: E) {
        self.made += 1;
        self.events.insert((at, self.made), event);
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Option<(Time, E)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}
