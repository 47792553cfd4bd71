//! How long the answers of one node take.
//!
//! Secret: the fit. An answer takes a fixed time, which is the way there and back and what else
//! does not depend on its size, and a time for each of its rows. Both are fitted by least squares
//! to the answers so far, the older the less, and lean on what is known of the node's capacity
//! where the answers were all of one size. It has no clock.

/// What an answer weighs is multiplied by this with every newer one.
const FADE: f64 = 0.9;
/// The same when the newer one took less than half of what was expected: what made the node slow
/// is over.
const FADE_FAST: f64 = 0.5;
/// So many of these one after the other are no chance: what was known before counts no more. A node
/// that nearly nothing is sent to would else need ten probes to be thought of as it is.
const QUICK: u32 = 3;
/// How much the capacity that is known counts: as much as answers whose sizes differ by this
/// share of the mean size (its square).
const LEAN: f64 = 0.25;
/// Share of a usual answer that grows with its rows when neither sizes nor capacity say more.
const ROWS_SHARE: f64 = 0.5;
/// A row takes some time (seconds), however small, so that no node looks boundless.
const ROW_MIN: f64 = 1e-9;
/// Mean deviations within which nearly all answers come (RFC 6298: four).
const DEVIATIONS: f64 = 4.0;

/// Sums over a node's answers, times in seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    weight: f64,
    rows: f64,
    time: f64,
    rows_rows: f64,
    rows_time: f64,
    /// Mean of |time - expected time|.
    deviation: f64,
    /// The last answers that took less than half of what was expected.
    quick: u32,
}

/// What an answer of a node takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fit {
    /// Seconds, whatever its size.
    pub(super) fixed: f64,
    /// Seconds for each of its rows; more than zero.
    pub(super) per_row: f64,
    /// Mean distance of answers from this line, in seconds.
    pub(super) deviation: f64,
}

impl Pace {
    /// An answer of `rows` rows took `time` seconds.
    pub(super) fn add(&mut self, rows: u64, time: f64) {
        let expected = self.fit(None).map(|fit| fit.expected(rows));
        let off = expected.map_or(time, |expected| (time - expected).abs());
        let fast = expected.is_some_and(|expected| time < expected / 2.0);
        let fade = if fast { FADE_FAST } else { FADE };
        self.quick = if fast { self.quick + 1 } else { 0 };
        if self.quick == QUICK {
            *self = Pace::default();
            return self.add(rows, time);
        }
        let rows = rows.max(1) as f64;
        let fades = |sum: &mut f64, new: f64| *sum = *sum * fade + new;
        fades(&mut self.weight, 1.0);
        fades(&mut self.rows, rows);
        fades(&mut self.time, time);
        fades(&mut self.rows_rows, rows * rows);
        fades(&mut self.rows_time, rows * time);
        self.deviation += (1.0 - fade) * (off - self.deviation);
    }

    /// The line through the answers; `per_row` is what the node's capacity says about the time of
    /// a row. None before the first answer.
    pub(super) fn fit(&self, per_row: Option<f64>) -> Option<Fit> {
        if self.weight <= 0.0 {
            return None;
        }
        let (rows, time) = (self.rows / self.weight, self.time / self.weight);
        let spread = (self.rows_rows / self.weight - rows * rows).max(0.0);
        let together = self.rows_time / self.weight - rows * time;
        let whole = time / rows;
        let known = per_row.unwrap_or(whole * ROWS_SHARE).min(whole);
        let lean = LEAN * rows * rows;
        let slope = (together + lean * known) / (spread + lean);
        let per_row = slope.min(whole).max(ROW_MIN);
        Some(Fit {
            fixed: (time - per_row * rows).max(0.0),
            per_row,
            deviation: self.deviation,
        })
    }
}

impl Fit {
    /// Seconds that an answer of `rows` rows takes.
    pub(super) fn expected(&self, rows: u64) -> f64 {
        self.fixed + self.per_row * rows as f64
    }

    /// Seconds within which nearly all answers of `rows` rows come.
    pub(super) fn nearly_all(&self, rows: u64) -> f64 {
        self.expected(rows) + DEVIATIONS * self.deviation
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Fit, Pace, QUICK};

    fn after(answers: impl IntoIterator<Item = (u64, f64)>) -> Pace {
        let mut pace = Pace::default();
        for (rows, time) in answers {
            pace.add(rows, time);
        }
        pace
    }

    fn fit(pace: &Pace) -> Fit {
        pace.fit(None).unwrap()
    }

    #[test]
    fn the_way_and_the_rows_are_told_apart_when_sizes_differ() {
        let sizes = [1, 900, 12, 400, 3, 700, 30, 1000, 5, 600];
        let pace = after(sizes.map(|rows| (rows, 0.002 + 1e-5 * rows as f64)));
        let fit = fit(&pace);
        assert!((fit.expected(500) / 0.007 - 1.0).abs() < 0.2, "{fit:?}");
        assert!(fit.fixed < 0.004, "{fit:?}");
    }

    #[test]
    fn where_all_sizes_are_equal_the_known_capacity_decides() {
        let pace = after([(8, 0.010); 20]);
        let known = pace.fit(Some(1e-4)).unwrap();
        assert!((known.per_row - 1e-4).abs() < 1e-9, "{known:?}");
        assert!((known.fixed - 0.0092).abs() < 1e-9, "{known:?}");
        // A capacity that would take longer than the answers do is not believed.
        let wrong = pace.fit(Some(1.0)).unwrap();
        assert!((wrong.expected(8) - 0.010).abs() < 1e-9, "{wrong:?}");
        assert!((fit(&pace).expected(8) - 0.010).abs() < 1e-9);
    }

    #[test]
    fn a_node_that_has_become_quick_is_believed_after_a_few_answers() {
        let mut pace = after([(8, 0.4); 50]);
        for _ in 0..QUICK {
            pace.add(8, 0.001);
        }
        assert!(fit(&pace).expected(8) < 0.002, "{:?}", fit(&pace));
        // One or two may be chance.
        let mut pace = after([(8, 0.4); 50]);
        for _ in 0..10 {
            pace.add(8, 0.1);
            pace.add(8, 0.1);
            pace.add(8, 0.4);
        }
        assert!(fit(&pace).expected(8) > 0.15, "{:?}", fit(&pace));
    }

    #[test]
    fn one_hiccup_moves_little_and_many_count() {
        let mut pace = after([(8, 0.001); 50]);
        pace.add(8, 0.010);
        assert!(fit(&pace).expected(8) < 0.002);
        for _ in 0..30 {
            pace.add(8, 0.010);
        }
        assert!(fit(&pace).expected(8) > 0.009);
        assert!(fit(&pace).nearly_all(8) >= fit(&pace).expected(8));
    }

    #[test]
    fn no_answer_is_senseless() {
        assert_eq!(Pace::default().fit(None), None);
        for (rows, time) in [(0, 0.0), (1, 0.0), (u64::from(u32::MAX), 1e6)] {
            let fit = fit(&after([(rows, time), (1, 0.0), (rows, time)]));
            assert!(fit.per_row > 0.0 && fit.per_row.is_finite(), "{fit:?}");
            assert!(fit.fixed >= 0.0 && fit.fixed.is_finite(), "{fit:?}");
        }
    }
}
