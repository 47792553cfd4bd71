//! Steps in two micro-batches: how a person asks for them, and what they hide.
//!
//! Secret: what counts as hidden. Rows of an exchange are away from when all have been sent until the last is back;
//! what of that the engine has nothing to do but to wait is exposed, the rest is hidden behind work.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whether the rows of a step go through the layers in two micro-batches, one of which computes while the rows of the
/// other are with their experts. Output is the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MicroBatches {
    /// Never.
    Off,
    /// Where that is measured to be faster.
    #[default]
    Auto,
    /// Always, where a step has two rows.
    On,
}

impl fmt::Display for MicroBatches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MicroBatches::Off => "off",
            MicroBatches::Auto => "auto",
            MicroBatches::On => "on",
        })
    }
}

impl FromStr for MicroBatches {
    type Err = String;

    /// `off`, `auto` or `on`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(MicroBatches::Off),
            "auto" => Ok(MicroBatches::Auto),
            "on" => Ok(MicroBatches::On),
            _ => Err(format!("{text:?} is none of `off`, `auto` and `on`")),
        }
    }
}

/// Says when steps go in two micro-batches, and counts. Clones are the same switch.
#[derive(Clone, Debug, Default)]
pub struct Overlap(Arc<Mutex<Switch>>);

#[derive(Debug, Default)]
struct Switch {
    wanted: MicroBatches,
    so_far: Overlapped,
}

/// What exchanges with experts have come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlapped {
    /// Steps that went through all layers.
    pub steps: u64,
    /// Those of them that went in two micro-batches.
    pub split: u64,
    /// Time that rows were away, summed over all exchanges, those of drafts included.
    pub away: Duration,
    /// Time of it that there was nothing to do but to wait.
    pub exposed: Duration,
}

impl Overlapped {
    /// Share of the time that rows were away which is hidden behind work; 1 where none ever was away.
    pub fn hidden(&self) -> f64 {
        let away = self.away.as_secs_f64();
        match away > 0.0 {
            true => (1.0 - self.exposed.as_secs_f64() / away).max(0.0),
            false => 1.0,
        }
    }

    /// What came after `before`.
    #[must_use]
    pub fn since(&self, before: &Overlapped) -> Overlapped {
        Overlapped {
            steps: self.steps.saturating_sub(before.steps),
            split: self.split.saturating_sub(before.split),
            away: self.away.saturating_sub(before.away),
            exposed: self.exposed.saturating_sub(before.exposed),
        }
    }
}

impl Overlap {
    /// One that begins with `wanted`.
    pub fn new(wanted: MicroBatches) -> Overlap {
        let overlap = Overlap::default();
        overlap.set(wanted);
        overlap
    }

    /// How steps go from the next one on.
    pub fn set(&self, wanted: MicroBatches) {
        self.lock().wanted = wanted;
    }

    /// What all exchanges have come to.
    pub fn so_far(&self) -> Overlapped {
        self.lock().so_far
    }

    pub(crate) fn wanted(&self) -> MicroBatches {
        self.lock().wanted
    }

    /// A step has gone through all layers.
    pub(crate) fn step(&self, split: bool) {
        let so_far = &mut self.lock().so_far;
        so_far.steps += 1;
        so_far.split += u64::from(split);
    }

    /// Rows were away for so long, and waited for.
    pub(crate) fn exchanged(&self, away: Duration, exposed: Duration) {
        let so_far = &mut self.lock().so_far;
        so_far.away += away;
        so_far.exposed += exposed;
    }

    /// Says what it has come to.
    pub(crate) fn log(&self) {
        let so_far = self.so_far();
        tracing::info!(
            steps = so_far.steps,
            in_two = so_far.split,
            exchange_seconds = so_far.away.as_secs_f64(),
            exposed_seconds = so_far.exposed.as_secs_f64(),
            hidden_ratio = so_far.hidden(),
            "micro-batches"
        );
    }

    /// Nothing under the lock can panic.
    fn lock(&self) -> MutexGuard<'_, Switch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for wanted in [MicroBatches::Off, MicroBatches::Auto, MicroBatches::On] {
            assert_eq!(wanted.to_string().parse(), Ok(wanted));
        }
        for bad in ["", "2", "On", "true"] {
            assert!(bad.parse::<MicroBatches>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_exposed_is_hidden() {
        let overlap = Overlap::new(MicroBatches::On);
        assert_eq!(overlap.so_far().hidden(), 1.0);
        overlap.exchanged(Duration::from_millis(8), Duration::from_millis(2));
        let before = overlap.so_far();
        assert_eq!(before.hidden(), 0.75);
        overlap.step(true);
        overlap.exchanged(Duration::from_millis(2), Duration::from_millis(5));
        let since = overlap.so_far().since(&before);
        assert_eq!((since.steps, since.split), (1, 1));
        assert_eq!(since.hidden(), 0.0);
    }
}
