//! What this node can do, in rows per second.
//!
//! Secret: how it is measured. When its first experts are resident, a few of
//! them are run on few, some and many rows, several times each. The least of the
//! times counts, for whatever else the machine does only adds to it: nodes of a
//! kind measure the same. So long should a product of any number of rows take. Every real product is held against it, so a
//! machine that becomes slower shows; and
//! because like is compared with like, it does not matter whether much prefill
//! or only some decoding came by. Products that are quicker than they should be
//! prove nothing, for experts that are asked for again and again stay in the
//! caches; but they, and quiet, are the occasion to measure again as at first,
//! and so a node that was busy when it started is found out. What a cgroup takes away is known exactly and
//! counts even when no load has met that limit yet (`quota`). Knows nothing of
//! senders and placements.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use guild_model::{
    Cpu,
    expert::{Breathe, Expert},
};

/// Rows of the products whose time is measured, ascending.
const ROWS: [usize; 3] = [1, 8, 64];
/// Rows of the product that the answer speaks of: decoding with some company.
const TYPICAL_ROWS: usize = 8;
/// What measuring may take, but for the least number of products.
const BUDGET: Duration = Duration::from_millis(50);
/// Products of each kind, at most.
const SAMPLES: usize = 16;
/// Products of each kind at least, however long they take: a start in which others had the processor would otherwise be
/// taken for a slow machine for good.
const LEAST_SAMPLES: usize = 5;
/// Experts among which those take turns, so that weights come from where they
/// come from when rows are served.
pub(crate) const EXPERTS: usize = 16;
/// Products of about this long altogether make the present speed, seconds.
const MEMORY: f64 = 2.0;
/// How much of that a measurement is worth, seconds.
const PRIOR: f64 = 0.25;
/// Products that take this much less time than they should are reason to measure again.
const FASTER: f64 = 1.25;
/// A measurement that finds the machine this much quicker was worth its while.
const GAIN: f64 = 1.05;
/// Between two measurements at least; doubled by every one that finds nothing new.
const AGAIN: Duration = Duration::from_secs(30);
/// The most that becomes of it: what a machine can do changes seldom.
const AGAIN_MAX: Duration = Duration::from_secs(960);

/// Measures and remembers.
#[derive(Debug, Default)]
pub(crate) struct Capacity(Mutex<Option<(Measured, Again)>>);

/// When to measure again.
#[derive(Debug)]
struct Again {
    at: Instant,
    pause: Duration,
}

#[derive(Debug)]
struct Measured {
    /// Seconds of a product of [`ROWS`], never less for more rows.
    seconds: [f64; ROWS.len()],
    /// What recent products should have taken, fading.
    expected: f64,
    /// What they took.
    taken: f64,
}

impl Capacity {
    /// Whether it was measured before.
    pub(crate) fn is_known(&self) -> bool {
        self.lock().is_some()
    }

    /// Whether it is time to measure again; true once each time. `quiet`: no rows come.
    pub(crate) fn is_due(&self, now: Instant, quiet: bool) -> bool {
        let mut known = self.lock();
        let due = known.as_mut().is_some_and(|(measured, again)| {
            now >= again.at && (quiet || measured.speed() >= FASTER) && again.begin(now)
        });
        drop(known);
        due
    }

    /// Runs some of `experts` on rows of `width` and breathes after each product.
    /// Takes about 50 ms of work, less where experts are small, more where the processor is not to
    /// be had.
    pub(crate) fn calibrate(
        &self,
        experts: &[Arc<Expert>],
        width: usize,
        cpu: &Cpu,
        breathe: Breathe<'_>,
    ) {
        if experts.is_empty() {
            return;
        }
        let most = ROWS[ROWS.len() - 1];
        // Nothing special: neither zeros nor numbers that overflow.
        let x: Vec<f32> = (0..most * width)
            .map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0)
            .collect();
        let mut turn = experts.iter().cycle();
        let mut run = |rows: usize| {
            let begun = Instant::now();
            if let Some(expert) = turn.next() {
                std::hint::black_box(expert.forward(cpu, &x[..rows * width]));
            }
            let took = begun.elapsed();
            breathe();
            took
        };
        // Threads that sleep, pages nobody has touched.
        run(ROWS[0]);
        let budget = BUDGET / ROWS.len() as u32;
        let seconds = ROWS.map(|rows| {
            let first = run(rows);
            let (mut least, mut all, mut samples) = (first, first, 1);
            while samples < LEAST_SAMPLES || samples < SAMPLES && all < budget {
                let took = run(rows);
                (least, all) = (least.min(took), all + took);
                samples += 1;
            }
            least.as_secs_f64()
        });
        let mut known = self.lock();
        match known.as_mut() {
            None => *known = Some((Measured::new(seconds), Again::after(Instant::now(), AGAIN))),
            Some((measured, again)) => {
                if measured.again(seconds) {
                    *again = Again::after(Instant::now(), AGAIN);
                }
            }
        }
    }

    /// A product of `rows` rows took `time`.
    pub(crate) fn observe(&self, rows: usize, time: Duration) {
        if let Some((measured, _)) = self.lock().as_mut() {
            measured.observe(rows, time.as_secs_f64());
        }
    }

    /// Rows per second of products of [`TYPICAL_ROWS`] on `threads` threads;
    /// `None` before [`Capacity::calibrate`].
    pub(crate) fn rows_per_second(&self, threads: usize) -> Option<f64> {
        let share = crate::quota::cpus().map_or(1.0, |cpus| cpus / threads.max(1) as f64);
        let rate = self.lock().as_ref()?.0.rows_per_second(share);
        rate.is_finite().then_some(rate)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Measured, Again)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Again {
    fn after(now: Instant, pause: Duration) -> Again {
        Again {
            at: now + pause,
            pause,
        }
    }

    /// One begins now, and will have found nothing unless it says otherwise.
    fn begin(&mut self, now: Instant) -> bool {
        *self = Again::after(now, (self.pause * 2).min(AGAIN_MAX));
        true
    }
}

impl Measured {
    fn new(mut seconds: [f64; ROWS.len()]) -> Self {
        // A hiccup must not make more rows look cheaper.
        for i in 1..seconds.len() {
            seconds[i] = seconds[i].max(seconds[i - 1]);
        }
        Self {
            seconds,
            expected: PRIOR,
            taken: PRIOR,
        }
    }

    /// Takes another measurement into account: the least of the times counts, and how long it
    /// takes now is the present speed. True: the machine is quicker than was known.
    fn again(&mut self, seconds: [f64; ROWS.len()]) -> bool {
        let now = Self::new(seconds);
        let was = self.seconds(TYPICAL_ROWS);
        let mut least = now.seconds;
        for (least, known) in least.iter_mut().zip(self.seconds) {
            *least = least.min(known);
        }
        *self = Self::new(least);
        let is = self.seconds(TYPICAL_ROWS);
        self.expected = PRIOR * is / now.seconds(TYPICAL_ROWS);
        was > is * GAIN
    }

    /// Seconds that a product should take: straight lines between what was measured.
    fn seconds(&self, rows: usize) -> f64 {
        let last = ROWS.len() - 1;
        let right = ROWS.partition_point(|&point| point < rows).clamp(1, last);
        let left = right - 1;
        let slope = (self.seconds[right] - self.seconds[left]) / (ROWS[right] - ROWS[left]) as f64;
        self.seconds[left] + slope * (rows.max(ROWS[0]) - ROWS[left]) as f64
    }

    fn observe(&mut self, rows: usize, taken: f64) {
        let fade = (-taken / MEMORY).exp();
        self.expected = self.expected * fade + self.seconds(rows);
        self.taken = self.taken * fade + taken;
    }

    /// What recent products should have taken over what they took.
    fn speed(&self) -> f64 {
        self.expected / self.taken
    }

    /// With `share` of the threads' time allowed. A limit that has been met shows
    /// in the speed already; one that has not, caps it. More than was measured
    /// does not count: it is the caches that give it, as long as few experts are
    /// asked for, and they give no more when the planner sends more of them here.
    fn rows_per_second(&self, share: f64) -> f64 {
        let rate = TYPICAL_ROWS as f64 / self.seconds(TYPICAL_ROWS);
        rate * self.speed().min(share).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Measured {
        Measured::new([1.0e-3, 1.7e-3, 7.3e-3])
    }

    #[test]
    fn a_product_is_expected_to_take_what_its_rows_say() {
        let measured = measured();
        for (rows, ms) in [
            (0, 1.0),
            (1, 1.0),
            (2, 1.1),
            (8, 1.7),
            (36, 4.5),
            (64, 7.3),
            (128, 13.7),
        ] {
            let seconds = measured.seconds(rows);
            assert!((seconds - ms * 1e-3).abs() < 1e-9, "{rows}: {seconds}");
        }
        let hiccup = Measured::new([2.0, 1.0, 1.5]);
        assert_eq!(hiccup.seconds(64), 2.0);
    }

    #[test]
    fn a_machine_that_slows_down_shows_it_whatever_its_batches_are() {
        let rate = 8.0 / 1.7e-3;
        for rows in [1, 5, 64, 500] {
            let mut measured = measured();
            let seconds = measured.seconds(rows);
            let settle = |measured: &mut Measured, times: f64| {
                for _ in 0..(40.0 / seconds) as usize {
                    measured.observe(rows, seconds * times);
                }
                measured.rows_per_second(1.0) / rate
            };
            assert!((settle(&mut measured, 1.0) - 1.0).abs() < 0.02, "{rows}");
            assert!((settle(&mut measured, 4.0) - 0.25).abs() < 0.02, "{rows}");
            // Experts that stay in the caches.
            assert!((settle(&mut measured, 0.5) - 1.0).abs() < 0.02, "{rows}");
        }
    }

    #[test]
    fn a_node_that_was_busy_when_it_was_measured_is_found_out_and_caches_are_not_believed() {
        let quick = [1.0e-3, 1.7e-3, 7.3e-3];
        let rate = |measured: &Measured| measured.rows_per_second(1.0) * 1.7e-3 / 8.0;
        let mut measured = Measured::new(quick.map(|seconds| 3.0 * seconds));
        assert!((rate(&measured) - 1.0 / 3.0).abs() < 1e-9);
        // Quick products alone raise nothing, but they are reason enough to look again.
        for _ in 0..10_000 {
            measured.observe(8, 1.7e-3);
        }
        assert!((rate(&measured) - 1.0 / 3.0).abs() < 1e-9 && measured.speed() > FASTER);
        assert!(measured.again(quick), "three times as quick");
        assert!((rate(&measured) - 1.0).abs() < 1e-9);
        // It was the caches: measured as at first it is what it was.
        for _ in 0..10_000 {
            measured.observe(8, 0.8e-3);
        }
        assert!(!measured.again(quick));
        assert!((rate(&measured) - 1.0).abs() < 1e-9);
        // Noise of a measurement is no news, and a slow one is the present speed, not a new truth.
        assert!(!measured.again(quick.map(|seconds| 0.98 * seconds)));
        assert!(!measured.again(quick.map(|seconds| 4.0 * seconds)));
        assert!((rate(&measured) - 0.25).abs() < 0.01);
        for _ in 0..10_000 {
            measured.observe(8, 1.7e-3);
        }
        assert!((rate(&measured) - 1.0).abs() < 0.03);
    }

    #[test]
    fn it_is_measured_again_when_there_is_reason_to_and_ever_more_seldom() {
        let begun = Instant::now();
        let capacity = Capacity(Mutex::new(Some((measured(), Again::after(begun, AGAIN)))));
        assert!(!capacity.is_due(begun, true));
        let mut now = begun + AGAIN;
        assert!(
            !capacity.is_due(now, false),
            "rows come, and at the usual speed"
        );
        let mut pause = AGAIN;
        for _ in 0..8 {
            assert!(capacity.is_due(now, true));
            assert!(!capacity.is_due(now, true), "once each time");
            pause = (2 * pause).min(AGAIN_MAX);
            now += pause;
            assert!(!capacity.is_due(now - Duration::from_millis(1), true));
        }
        for _ in 0..10_000 {
            capacity.observe(8, Duration::from_micros(800));
        }
        assert!(
            capacity.is_due(now, false),
            "rows come, and quicker than they should"
        );
    }

    #[test]
    fn a_quota_counts_once_whether_the_load_has_met_it_or_not() {
        let rate = 8.0 / 1.7e-3;
        let mut measured = measured();
        assert!((measured.rows_per_second(0.25) / rate - 0.25).abs() < 1e-9);
        // Throttled for three quarters of the time.
        for _ in 0..10_000 {
            measured.observe(8, 4.0 * 1.7e-3);
        }
        assert!((measured.rows_per_second(0.25) / rate - 0.25).abs() < 0.02);
        // More than the threads could use is no gain.
        assert!((measured.rows_per_second(8.0) / rate - 0.25).abs() < 0.02);
    }
}
