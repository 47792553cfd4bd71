//! Whether the rows of a step go through the layers in two micro-batches, and where they are cut.
//!
//! Secret: what is compared. In two micro-batches one computes while the rows of the other are away, so there is less
//! waiting for experts; but weights are read twice, and experts get smaller batches. What a step in one piece was left
//! to wait is all that there is to gain: where that is little, nothing is tried. Elsewhere steps of a size are timed
//! both ways, the faster way is taken, and a step now and then goes the other one. Where two micro-batches lose twice,
//! the second time by new steps of either kind, they rest, each time for longer. Time comes in as numbers; what a layer or a network is, is not known here.

use std::time::Duration;

/// Fewer rows are never cut unless somebody insists: they are what one or two requests decode.
pub const MIN_ROWS: usize = 4;
/// Part of a step in one piece that must be waiting before two micro-batches are tried.
pub const LEAST_EXPOSED: f64 = 0.05;
/// Steps of either kind before they are compared, and of the newest ones that count.
pub const SAMPLES: usize = 8;
/// Of so many steps in two micro-batches one goes in one piece, to be measured.
pub const WHOLE_EVERY: u64 = 32;
/// Steps in one piece after two micro-batches have lost for the first time.
pub const REST_FIRST: u64 = 512;
/// The longest rest, in steps.
pub const REST_MAX: u64 = 1 << 12;
/// A step in one piece that is so much faster or slower than known, as a share, says that things have changed: the
/// next ones are measured both ways again.
pub const SURPRISE: f64 = 0.25;
/// Gain below which two micro-batches are not worth their trouble.
const LEAST_GAIN: f64 = 1.02;
/// Classes of the number of rows: 1, 2, 3-4, 5-8 and so on.
const CLASSES: usize = 16;

/// Consecutive rows of one request in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Position of the first one: that many positions are looked back on.
    pub start: usize,
    /// How many.
    pub rows: usize,
}

/// The row that the second of two micro-batches begins with, so that both have about the same work. A row takes 1, and
/// `look_back` more for itself and for each position before it. The rows keep their order, so that a request whose
/// rows are cut has its earlier ones in the first micro-batch. None: there are not two rows.
pub fn cut(runs: impl IntoIterator<Item = Run>, look_back: f64) -> Option<usize> {
    let positions = |run: Run| run.start..run.start + run.rows;
    let ends = runs.into_iter().flat_map(positions).scan(0.0, |sum, at| {
        *sum += 1.0 + look_back * (at + 1) as f64;
        Some(*sum)
    });
    let ends: Vec<f64> = ends.collect();
    let half = ends.last()? / 2.0;
    let over = ends.partition_point(|&end| end < half);
    // The row that passes the half belongs to the side that is nearer to it so.
    let before = if over == 0 { 0.0 } else { ends[over - 1] };
    let cut = over + usize::from(ends[over] - half < half - before);
    (ends.len() >= 2).then(|| cut.clamp(1, ends.len() - 1))
}

/// A step that went through all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran {
    /// Its rows.
    pub rows: usize,
    /// Whether it went in two micro-batches.
    pub split: bool,
    /// What the layers took.
    pub took: Duration,
    /// How much of that there was nothing to do but to wait for experts.
    pub exposed: Duration,
}

/// The newest of a row of numbers.
#[derive(Debug, Default, Clone, Copy)]
struct Newest {
    last: [f64; SAMPLES],
    count: u64,
}

impl Newest {
    fn add(&mut self, value: f64) {
        self.last[(self.count % SAMPLES as u64) as usize] = value;
        self.count += 1;
    }

    /// The upper median; None before there are enough. What a stall does to one step does not show in it.
    fn median(&self) -> Option<f64> {
        let mut sorted = self.last;
        sorted.sort_unstable_by(f64::total_cmp);
        (self.count >= SAMPLES as u64).then(|| sorted[SAMPLES / 2])
    }
}

/// What is known of steps with about as many rows.
#[derive(Debug, Default, Clone, Copy)]
struct Class {
    /// Seconds per row of steps in one piece.
    whole: Newest,
    /// Part of those steps that was waiting.
    exposed: Newest,
    /// Seconds per row of steps in two micro-batches.
    split: Newest,
    steps: u64,
    /// Steps in one piece that are still to be measured before it is believed that nothing has changed.
    doubt: usize,
    /// Two micro-batches have lost, and are measured once more.
    lost: bool,
    rests_until: u64,
    rest: u64,
    pays: Option<bool>,
}

/// Chooses, from what steps have taken, how the next ones go.
#[derive(Debug, Default)]
pub struct Choice {
    classes: [Class; CLASSES],
}

impl Choice {
    /// Whether the next step, of so many rows, goes in two micro-batches.
    pub fn splits(&self, rows: usize) -> bool {
        let class = &self.classes[class(rows)];
        let every = match class.split.count < SAMPLES as u64 || class.doubt > 0 {
            true => 2,
            false => WHOLE_EVERY,
        };
        rows >= MIN_ROWS
            && class.whole.median().is_some()
            && class.exposed.median() >= Some(LEAST_EXPOSED)
            && class.rests_until <= class.steps
            && !class.steps.is_multiple_of(every)
    }

    /// Learns from a step. Whether two micro-batches are faster for so many rows, if that is news.
    pub fn observe(&mut self, ran: Ran) -> Option<bool> {
        let took = ran.took.as_secs_f64();
        if ran.rows == 0 || took <= 0.0 {
            return None;
        }
        let class = &mut self.classes[class(ran.rows)];
        class.steps += 1;
        let row = took / ran.rows as f64;
        if !ran.split {
            let known = class.whole.median();
            class.doubt = match known.is_some_and(|known| (row - known).abs() > SURPRISE * known) {
                true => SAMPLES,
                false => class.doubt.saturating_sub(1),
            };
            class.whole.add(row);
            class.exposed.add(ran.exposed.as_secs_f64() / took);
            return None;
        }
        class.split.add(row);
        let (whole, split) = (class.whole.median()?, class.split.median()?);
        let pays = split * LEAST_GAIN <= whole;
        if !pays {
            class.split = Newest::default();
            // A few slow steps are no reason yet.
            if !std::mem::replace(&mut class.lost, true) {
                return None;
            }
            class.lost = false;
            class.rest = (class.rest * 2).clamp(REST_FIRST, REST_MAX);
            class.rests_until = class.steps + class.rest;
        } else {
            class.lost = false;
            if class.split.count > REST_FIRST {
                class.rest = 0;
            }
        }
        let news = class.pays != Some(pays);
        class.pays = Some(pays);
        news.then_some(pays)
    }
}

fn class(rows: usize) -> usize {
    let bits = usize::BITS - rows.saturating_sub(1).leading_zeros();
    (bits as usize).min(CLASSES - 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn decode(contexts: &[usize]) -> Vec<Run> {
        let run = |&start: &usize| Run { start, rows: 1 };
        contexts.iter().map(run).collect()
    }

    /// Work of the rows before the cut over all work.
    fn first_part(runs: &[Run], look_back: f64) -> f64 {
        let at = cut(runs.iter().copied(), look_back).unwrap();
        let positions = |run: &Run| run.start..run.start + run.rows;
        let work: Vec<f64> = { runs.iter().flat_map(positions) }
            .map(|position| 1.0 + look_back * (position + 1) as f64)
            .collect();
        work[..at].iter().sum::<f64>() / work.iter().sum::<f64>()
    }

    #[test]
    fn both_micro_batches_have_about_the_same_work() {
        assert_eq!(cut(decode(&[7; 32]), 0.001), Some(16));
        assert_eq!(cut(decode(&[7; 5]), 0.0), Some(2));
        // One that looks far back outweighs many that do not.
        assert_eq!(cut(decode(&[100_000, 1, 1, 1, 1]), 0.001), Some(1));
        assert_eq!(cut(decode(&[1, 1, 1, 1, 100_000]), 0.001), Some(4));
        // A prompt among those who decode is cut where it has to be.
        let mut mixed = decode(&[500; 8]);
        mixed.push(Run {
            start: 1000,
            rows: 120,
        });
        let part = first_part(&mixed, 0.0005);
        assert!((part - 0.5).abs() < 0.01, "{part}");
        // The later rows of a long prompt look further back.
        let prompt = [Run {
            start: 0,
            rows: 512,
        }];
        let at = cut(prompt, 0.002).unwrap();
        assert!((257..400).contains(&at), "{at}");
        assert!((first_part(&prompt, 0.002) - 0.5).abs() < 0.01);
    }

    #[test]
    fn two_rows_are_cut_and_one_is_not() {
        assert_eq!(cut([], 1.0), None);
        assert_eq!(cut(decode(&[9]), 1.0), None);
        assert_eq!(cut(decode(&[9, 9]), 1.0), Some(1));
        assert_eq!(cut(decode(&[0, 1 << 30]), 1.0), Some(1));
        assert_eq!(cut(decode(&[1 << 30, 0]), 1.0), Some(1));
        let empty = Run { start: 4, rows: 0 };
        assert_eq!(cut([empty, empty], 1.0), None);
    }

    /// Milliseconds that a step of so many rows takes, and what it waits of that, on a machine where rows are away
    /// for `away` milliseconds and the weights take `weights` to read.
    #[derive(Clone, Copy)]
    struct Machine {
        away: f64,
        weights: f64,
    }

    impl Machine {
        fn run(self, rows: usize, split: bool) -> Ran {
            let work = rows as f64 * 0.5;
            let (took, exposed) = match split {
                false => (self.weights + work + self.away, self.away),
                true => {
                    let half = self.weights + work / 2.0;
                    // From the end of a half until it can go on: the other half computes meanwhile.
                    let exposed = (self.away - half).max(0.0);
                    (2.0 * half + exposed, exposed)
                }
            };
            let ms = |ms: f64| Duration::from_secs_f64(ms / 1e3);
            Ran {
                rows,
                split,
                took: ms(took),
                exposed: ms(exposed),
            }
        }
    }

    /// How many of `steps` steps went in two micro-batches.
    fn split_steps(choice: &mut Choice, machine: Machine, rows: usize, steps: usize) -> usize {
        let mut split = 0;
        for _ in 0..steps {
            let splits = choice.splits(rows);
            choice.observe(machine.run(rows, splits));
            split += usize::from(splits);
        }
        split
    }

    #[test]
    fn a_long_way_to_the_experts_is_hidden_and_looked_at_again_now_and_then() {
        let far = Machine {
            away: 10.0,
            weights: 2.0,
        };
        let mut choice = Choice::default();
        split_steps(&mut choice, far, 32, 100);
        let split = split_steps(&mut choice, far, 32, 3200);
        assert!((3050..3150).contains(&split), "{split}");
        // Of other sizes nothing is known from this.
        assert!(!choice.splits(64) && !choice.splits(8));
    }

    #[test]
    fn where_rows_are_back_at_once_nothing_is_tried() {
        let near = Machine {
            away: 0.5,
            weights: 2.0,
        };
        assert_eq!(split_steps(&mut Choice::default(), near, 32, 10_000), 0);
        let local = Machine {
            away: 0.0,
            weights: 0.0,
        };
        assert_eq!(split_steps(&mut Choice::default(), local, 512, 10_000), 0);
    }

    #[test]
    fn a_few_rows_stay_together() {
        let far = Machine {
            away: 50.0,
            weights: 0.0,
        };
        for rows in 0..MIN_ROWS {
            assert_eq!(split_steps(&mut Choice::default(), far, rows, 1000), 0);
        }
    }

    #[test]
    fn what_loses_is_tried_ever_more_rarely() {
        // What is hidden is less than what reading the weights twice costs.
        let heavy = Machine {
            away: 5.0,
            weights: 20.0,
        };
        let mut choice = Choice::default();
        let early = split_steps(&mut choice, heavy, 32, 4_000);
        assert!((SAMPLES..10 * SAMPLES).contains(&early), "{early}");
        let late = split_steps(&mut choice, heavy, 32, 100_000);
        assert!(late < 60 * SAMPLES, "{late} of 100,000");
    }

    #[test]
    fn a_spell_of_slow_steps_does_not_send_it_to_rest() {
        let far = Machine {
            away: 10.0,
            weights: 2.0,
        };
        let mut choice = Choice::default();
        split_steps(&mut choice, far, 32, 200);
        // Something else has the machine for more than a half of the steps that are compared.
        for _ in 0..SAMPLES - 2 {
            let slow = Ran {
                took: Duration::from_secs(1),
                ..far.run(32, true)
            };
            choice.observe(slow);
        }
        let split = split_steps(&mut choice, far, 32, 400);
        assert!(split > 350, "{split}");
    }

    #[test]
    fn it_follows_a_network_that_changes() {
        let far = Machine {
            away: 10.0,
            weights: 2.0,
        };
        let near = Machine { away: 0.1, ..far };
        let mut choice = Choice::default();
        assert_eq!(split_steps(&mut choice, near, 16, 1000), 0);
        split_steps(&mut choice, far, 16, 50);
        assert!(split_steps(&mut choice, far, 16, 1000) > 900);
        split_steps(&mut choice, near, 16, 100);
        assert_eq!(split_steps(&mut choice, near, 16, 400), 0);
        split_steps(&mut choice, far, 16, 50);
        assert!(split_steps(&mut choice, far, 16, 1000) > 900);
    }

    #[test]
    fn news_comes_once_and_a_stall_is_none() {
        let far = Machine {
            away: 10.0,
            weights: 2.0,
        };
        let mut choice = Choice::default();
        let mut news = Vec::new();
        for step in 0..400 {
            let ran = far.run(32, choice.splits(32));
            // A step in nine is held up, whatever way it goes.
            let stall = Duration::from_millis(if step % 9 == 0 { 500 } else { 0 });
            news.extend(choice.observe(Ran {
                took: ran.took + stall,
                ..ran
            }));
        }
        assert_eq!(news, [true]);
        let nothing = Ran {
            rows: 0,
            ..far.run(32, true)
        };
        assert_eq!(choice.observe(nothing), None);
    }
}
