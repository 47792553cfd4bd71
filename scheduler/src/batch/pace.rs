//! How fast things go here: how long the queue takes, and how much prefill a step bears.
//!
//! Secret: both estimates. Time comes in as numbers; nothing here reads a clock.

use std::time::Duration;

/// Retry hint before anything is known about the pace of admissions.
pub const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The shortest retry hint given to a refused client.
pub const RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest retry hint given to a refused client.
pub const RETRY_MAX: Duration = Duration::from_secs(30);
/// Rows of prefill in a step with decode rows, however long it takes: a prompt always goes on.
pub const PREFILL_FLOOR: usize = 16;
/// Rows of prefill in the first step with decode rows, before anything is known of their cost.
pub const PREFILL_FIRST: usize = 64;
/// Part of the target that is planned for; the rest is for what an estimate misses.
const PLANNED: f64 = 0.85;
/// Weight of the newest step in the moving means, where it was cheaper than thought.
const CHEAPER: f64 = 0.125;
/// The same where it was dearer: being late is worse than being slow.
const DEARER: f64 = 0.5;

/// How fast places in the queue become free: a moving mean of the time between admissions,
/// over the stretches in which somebody waited.
#[derive(Debug, Default)]
pub(super) struct Admissions {
    /// The last admission, if it left somebody waiting.
    last: Option<Duration>,
    gap: Option<Duration>,
}

impl Admissions {
    pub(super) fn admitted(&mut self, now: Duration, still_waiting: bool) {
        if let Some(last) = self.last {
            let gap = now.saturating_sub(last);
            self.gap = Some(self.gap.map_or(gap, |mean| (mean * 7 + gap) / 8));
        }
        self.last = still_waiting.then_some(now);
    }

    /// When a refused client may come again.
    pub(super) fn hint(&self) -> Duration {
        self.gap.unwrap_or(RETRY_FIRST).clamp(RETRY_MIN, RETRY_MAX)
    }

    /// How long a request with so many ahead of it is likely to wait, once that is known.
    pub(super) fn wait(&self, ahead: usize) -> Option<Duration> {
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        self.gap.map(|gap| gap.saturating_mul(ahead))
    }
}

/// What rows cost, learned from the steps themselves: a step without prefill tells what decoding
/// takes, one with prefill what a row of it adds. Prefill rows become dearer as a prompt goes on
/// (attention looks back further), so the newest steps count most.
#[derive(Debug, Default)]
pub(super) struct StepCost {
    /// Seconds of a step without prefill.
    decode: Option<f64>,
    /// Seconds that one row of prefill adds.
    row: Option<f64>,
    /// Rows of prefill in the last mixed step.
    last: usize,
}

impl StepCost {
    /// Learns from a step that went through.
    pub(super) fn observe(&mut self, took: Duration, decode: usize, prefill: usize) {
        let seconds = took.as_secs_f64();
        let learn = |mean: &mut Option<f64>, value: f64| {
            let towards = |mean: f64| {
                let weight = if value > mean { DEARER } else { CHEAPER };
                mean + weight * (value - mean)
            };
            *mean = Some(mean.map_or(value, towards));
        };
        match (decode, prefill) {
            (0, 0) => {}
            (_, 0) => learn(&mut self.decode, seconds),
            (_, rows) => {
                // Without decode rows nothing but prefill was paid for, but for what every step costs.
                let others = if decode > 0 {
                    self.decode.unwrap_or(0.0)
                } else {
                    0.0
                };
                // However wrong the rest is estimated, a row costs something.
                let added = (seconds - others).max(seconds / (8.0 * rows as f64));
                learn(&mut self.row, added / rows as f64);
                if decode > 0 {
                    self.last = rows;
                }
            }
        }
    }

    /// Seconds that one row of prefill adds, once that is known.
    pub(super) fn row(&self) -> Option<f64> {
        self.row
    }

    /// Rows of prefill that a step with decode rows bears: what the target leaves, never less than
    /// [`PREFILL_FLOOR`], and at most twice what the last one had.
    pub(super) fn prefill_rows(&self, target: Duration) -> usize {
        let Some(row) = self.row else {
            return PREFILL_FIRST;
        };
        let left = target.as_secs_f64() * PLANNED - self.decode.unwrap_or(0.0);
        let borne = (left / row.max(1e-12)).max(0.0);
        let rows = if borne < 1e9 {
            borne as usize
        } else {
            usize::MAX
        };
        let ramp = self.last.max(PREFILL_FIRST / 2).saturating_mul(2);
        rows.min(ramp).max(PREFILL_FLOOR)
    }
}
