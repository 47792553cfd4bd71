//! Whether a node is slow.
//!
//! Secret: the verdict. Every answer that others had to be asked for in the meantime is a strike
//! and fades with those that come in time; too many strikes make a slow node, and that is what it
//! stays for a while and until probes are answered in time again. One that is slow again soon
//! after is left alone for longer. It has no clock.

use std::time::Duration;

use tokio::time::Instant;

/// Strikes that make a slow node: three in near succession, or a share of one in about fourteen.
const STRIKES: f64 = 2.0;
/// What the strikes so far are multiplied by with every answer that is in time.
const FADE: f64 = 0.95;
/// How long a slow node is left alone at least; doubled each time it is slow again soon.
const HOLD: Duration = Duration::from_secs(1);
/// The longest of these times: what is cured is used again within this and a few probes.
const HOLD_MAX: Duration = Duration::from_secs(8);
/// A node that is slow again within this time was not cured.
const RELAPSE: Duration = Duration::from_secs(10);
/// Answers in time, one after the other, that end it.
const GOOD: u32 = 3;

/// What a node's lateness has come to.
#[derive(Debug, Default)]
pub(super) struct Standing {
    strikes: f64,
    slow: Option<Slow>,
    /// How long it was left alone the last time, and until when.
    last: Option<(Duration, Instant)>,
}

#[derive(Debug)]
struct Slow {
    until: Instant,
    hold: Duration,
    good: u32,
}

impl Standing {
    pub(super) fn is_slow(&self) -> bool {
        self.slow.is_some()
    }

    /// It was late by `weight` strikes. True: it is slow from now on; `may` says whether there is
    /// room for one more slow node.
    pub(super) fn strike(&mut self, now: Instant, weight: f64, may: bool) -> bool {
        if let Some(slow) = &mut self.slow {
            slow.good = 0;
            return false;
        }
        self.strikes += weight;
        if self.strikes < STRIKES || !may {
            // What could not be acted on must not be held against it for long.
            self.strikes = self.strikes.min(STRIKES);
            return false;
        }
        let hold = match self.last {
            Some((hold, end)) if now < end + RELAPSE => (hold * 2).min(HOLD_MAX),
            _ => HOLD,
        };
        self.strikes = 0.0;
        self.slow = Some(Slow {
            until: now + hold,
            hold,
            good: 0,
        });
        true
    }

    /// It has answered in time. True: it was slow and is so no more.
    pub(super) fn in_time(&mut self, now: Instant) -> bool {
        self.strikes *= FADE;
        let Some(slow) = &mut self.slow else {
            return false;
        };
        slow.good += 1;
        if slow.good < GOOD || now < slow.until {
            return false;
        }
        self.last = Some((slow.hold, now));
        self.slow = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_slow(standing: &mut Standing, now: Instant) {
        for _ in 0..3 {
            standing.strike(now, 1.0, true);
        }
        assert!(standing.is_slow());
    }

    #[test]
    fn now_and_then_late_is_not_slow_and_often_late_is() {
        for (every, slow) in [(30, false), (8, true)] {
            let (mut standing, now) = (Standing::default(), Instant::now());
            for answer in 1..=200 {
                if answer % every == 0 {
                    standing.strike(now, 1.0, true);
                } else {
                    standing.in_time(now);
                }
            }
            assert_eq!(standing.is_slow(), slow, "one in {every}");
        }
    }

    #[test]
    fn a_cured_node_is_slow_no_more_in_any_case_within_ten_seconds() {
        let (mut standing, mut now) = (Standing::default(), Instant::now());
        for _ in 0..10 {
            make_slow(&mut standing, now);
            let cured = now;
            while standing.is_slow() {
                now += Duration::from_millis(500);
                standing.in_time(now);
            }
            assert!(now - cured >= HOLD && now - cured <= Duration::from_secs(10));
        }
        // After a good while a first offence is a first offence.
        now += 2 * RELAPSE;
        make_slow(&mut standing, now);
        now += HOLD;
        assert!(!standing.in_time(now) && !standing.in_time(now) && standing.in_time(now));
    }

    #[test]
    fn a_late_probe_begins_the_count_anew() {
        let (mut standing, now) = (Standing::default(), Instant::now());
        make_slow(&mut standing, now);
        let later = now + HOLD;
        standing.in_time(later);
        standing.in_time(later);
        standing.strike(later, 1.0, true);
        assert!(!standing.in_time(later) && !standing.in_time(later));
        assert!(standing.in_time(later) && !standing.is_slow());
    }

    #[test]
    fn where_there_is_no_room_nobody_is_slow() {
        let (mut standing, now) = (Standing::default(), Instant::now());
        for _ in 0..100 {
            assert!(!standing.strike(now, 1.0, false));
        }
        assert!(!standing.is_slow());
    }
}
