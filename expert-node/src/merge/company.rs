//! Whom to wait for before rows are run, and how long.
//!
//! Secret: what the habits of senders say. A sender that runs a model comes back
//! a usual time after its last answer, with rows for the next layer. One that
//! last asked for the experts that the leader asked for before this work will
//! want those of this work next: the two are at the same layer. How many experts
//! they had in common then is how many products are likely to be saved now.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The longest wait for company.
pub(crate) const HOLD_MAX: Duration = Duration::from_millis(1);
/// A wait may cost up to one of so many parts of what company is likely to save.
const SAVING_PARTS: u32 = 2;
/// Gaps between answer and next work that make a sender's habit.
const GAPS: usize = 8;
/// Senders that are remembered; when there are more, all are forgotten.
const MAX_SOURCES: usize = 512;
/// A product's time is smoothed over about so many products.
const SMOOTH: u32 = 16;

/// A sender that is away and may be back soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    /// By then it is here, as a rule.
    pub(crate) within: Duration,
    /// Experts that it had in common with the leader last time.
    pub(crate) shared: usize,
}

/// What a wait has to keep to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// One expert's time.
    pub(crate) product: Duration,
    /// Products that are waiting here, at most.
    pub(crate) products: usize,
    /// The time already waited.
    pub(crate) held: Duration,
    /// Until the first deadline of those who wait.
    pub(crate) left: Option<Duration>,
}

/// How much longer to wait: until the last of those is here whose coming is
/// likely to save twice the wait; not at all when a deadline is in danger.
pub(crate) fn hold(expected: &[Expected], terms: Terms) -> Duration {
    let time = |products: usize| {
        let products = u32::try_from(products).unwrap_or(u32::MAX);
        terms.product.saturating_mul(products)
    };
    let worth = expected.iter().filter(|company| {
        let most = (time(company.shared) / SAVING_PARTS).min(HOLD_MAX);
        terms.held + company.within <= most
    });
    let longest = worth
        .map(|company| company.within)
        .max()
        .unwrap_or_default();
    let in_time = |left| longest + time(terms.products) < left;
    if terms.left.is_none_or(in_time) {
        longest
    } else {
        Duration::ZERO
    }
}

/// What is known of senders.
#[derive(Debug, Default)]
pub(crate) struct Company {
    sources: HashMap<u64, Source>,
    product: Duration,
}

#[derive(Debug, Default)]
struct Source {
    /// Experts of the newest work, ascending, and of the one before.
    newest: Vec<usize>,
    before: Vec<usize>,
    answered: Option<Instant>,
    /// The last gaps, in a ring.
    gaps: Vec<Duration>,
    next_gap: usize,
}

impl Company {
    /// Work of `source` for `experts` is here.
    pub(crate) fn came(&mut self, source: u64, mut experts: Vec<usize>, now: Instant) {
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            self.sources.clear();
        }
        experts.sort_unstable();
        experts.dedup();
        let source = self.sources.entry(source).or_default();
        source.before = std::mem::replace(&mut source.newest, experts);
        if let Some(answered) = source.answered.take() {
            let gap = now.saturating_duration_since(answered);
            if source.gaps.len() < GAPS {
                source.gaps.push(gap);
            } else {
                source.gaps[source.next_gap] = gap;
            }
            source.next_gap = (source.next_gap + 1) % GAPS;
        }
    }

    /// The newest work of `source` is done.
    pub(crate) fn answered(&mut self, source: u64, now: Instant) {
        if let Some(source) = self.sources.get_mut(&source) {
            source.answered = Some(now);
        }
    }

    /// An expert has taken so long.
    pub(crate) fn product_took(&mut self, time: Duration) {
        self.product = match self.product {
            Duration::ZERO => time,
            product => (product * (SMOOTH - 1) + time) / SMOOTH,
        };
    }

    /// The usual time of an expert.
    pub(crate) fn product(&self) -> Duration {
        self.product
    }

    /// Who is not `here`, goes through the same layers as `leader` and is not overdue.
    pub(crate) fn expected(&self, leader: u64, here: &[u64], now: Instant) -> Vec<Expected> {
        let Some(leader) = self.sources.get(&leader) else {
            return Vec::new();
        };
        let away = self.sources.iter().filter(|(id, _)| !here.contains(id));
        let expected = away.filter_map(|(_, source)| {
            let due = source.answered? + source.usual_gap()?;
            let shared = in_common(&leader.before, &source.newest);
            let within = due.checked_duration_since(now)?;
            (shared > 0).then_some(Expected { within, shared })
        });
        expected.collect()
    }
}

impl Source {
    /// Half as much again as the median: most gaps are shorter, and the odd long
    /// one, between two steps, does not count.
    fn usual_gap(&self) -> Option<Duration> {
        let mut gaps = self.gaps.clone();
        gaps.sort_unstable();
        gaps.get(gaps.len() / 2).map(|median| *median * 3 / 2)
    }
}

/// Numbers that are in both; both ascend.
fn in_common(a: &[usize], b: &[usize]) -> usize {
    a.iter().filter(|x| b.binary_search(x).is_ok()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: fn(u64) -> Duration = Duration::from_micros;

    fn terms() -> Terms {
        Terms {
            product: US(400),
            products: 20,
            held: Duration::ZERO,
            left: None,
        }
    }

    fn company(within: u64, shared: usize) -> Expected {
        Expected {
            within: US(within),
            shared,
        }
    }

    #[test]
    fn a_wait_is_never_longer_than_half_of_what_it_is_likely_to_save() {
        assert_eq!(hold(&[], terms()), Duration::ZERO);
        // Three products of 0.4 ms: worth up to 0.6 ms.
        assert_eq!(hold(&[company(600, 3)], terms()), US(600));
        assert_eq!(hold(&[company(601, 3)], terms()), Duration::ZERO);
        let waited = Terms {
            held: US(300),
            ..terms()
        };
        assert_eq!(hold(&[company(300, 3)], waited), US(300));
        assert_eq!(hold(&[company(301, 3)], waited), Duration::ZERO);
        // Whatever the saving.
        assert_eq!(hold(&[company(1000, 99)], terms()), HOLD_MAX);
        assert_eq!(hold(&[company(1001, 99)], terms()), Duration::ZERO);
        // Small products are not worth a wait.
        let small = Terms {
            product: US(5),
            ..terms()
        };
        assert_eq!(hold(&[company(100, 20)], small), Duration::ZERO);
    }

    #[test]
    fn the_last_of_those_worth_it_is_waited_for() {
        let all = [
            company(100, 4),
            company(700, 4),
            company(900, 4),
            company(300, 1),
        ];
        assert_eq!(hold(&all, terms()), US(700));
    }

    #[test]
    fn a_deadline_comes_before_company() {
        let within = |left| {
            let left = Some(US(left));
            hold(&[company(500, 8)], Terms { left, ..terms() })
        };
        // 20 products take 8 ms.
        assert_eq!(within(8_501), US(500));
        assert_eq!(within(8_500), Duration::ZERO);
        assert_eq!(within(0), Duration::ZERO);
    }

    /// Two senders that step through layers of experts `[10 * layer, ..]`, one
    /// answer and one gap of 200 µs after the other.
    fn in_step(company: &mut Company, start: Instant, layers: usize, behind: usize) -> Instant {
        let mut now = start;
        for layer in behind..behind + layers {
            for source in [1, 2] {
                let first = 10 * (layer - behind * (source as usize - 1));
                company.came(source, vec![first + source as usize, first, first + 5], now);
            }
            for source in [1, 2] {
                company.answered(source, now);
            }
            now += US(200);
        }
        now
    }

    #[test]
    fn those_in_step_are_expected_by_their_habit() {
        let mut senders = Company::default();
        let now = in_step(&mut senders, Instant::now(), 5, 0);
        senders.came(1, vec![50], now);
        // Half as much again as 200 µs after the answer, which was 200 µs ago.
        assert_eq!(senders.expected(1, &[1], now), [company(100, 2)]);
        assert_eq!(senders.expected(1, &[1, 2], now), [], "it is here");
        assert_eq!(senders.expected(1, &[1], now + US(101)), [], "overdue");
        assert_eq!(senders.expected(3, &[], now), [], "nobody knows 3");
    }

    #[test]
    fn those_at_another_layer_and_those_who_never_came_back_are_not_expected() {
        let mut senders = Company::default();
        let now = in_step(&mut senders, Instant::now(), 5, 1);
        senders.came(1, vec![60], now);
        assert_eq!(senders.expected(1, &[1], now), []);

        let mut senders = Company::default();
        let now = in_step(&mut senders, Instant::now(), 1, 0);
        senders.came(1, vec![10], now);
        assert_eq!(senders.expected(1, &[1], now), [], "2 has no habit yet");
    }

    #[test]
    fn one_long_gap_between_steps_does_not_make_a_habit() {
        let mut senders = Company::default();
        let now = in_step(&mut senders, Instant::now(), 4, 0);
        let now = in_step(&mut senders, now + Duration::from_secs(1), 4, 0);
        senders.came(1, vec![], now);
        assert_eq!(senders.expected(1, &[1], now), [company(100, 2)]);
    }

    #[test]
    fn what_is_remembered_is_limited() {
        let mut senders = Company::default();
        for source in 0..5 * MAX_SOURCES as u64 {
            senders.came(source, vec![1], Instant::now());
            assert!(senders.sources.len() <= MAX_SOURCES);
        }
    }
}
