//! Whether drafting pays: tokens per second with drafts against those without.
//!
//! Secret: what is compared. Steps in which everybody decodes are counted by how many do, for what a row
//! costs depends on how many there are; what is usual of late decides for all, lest the verdict change with
//! every request that comes or goes. Where drafts were tried, all that the step took counts, the making of
//! the next drafts included; where none were, the latter is left out. Now and then a step goes without
//! drafts, so that both sides stay measured. Where drafting loses, it rests, each time for longer.

use std::time::Duration;

/// Of so many steps with drafts one goes without, to be measured.
pub const PLAIN_EVERY: u64 = 32;
/// Steps of either kind before they are compared.
pub const SAMPLES: u64 = 8;
/// Steps without drafting after it has lost for the first time.
pub const REST_FIRST: u64 = 512;
/// The longest rest, in steps.
pub const REST_MAX: u64 = 1 << 16;
/// Gain below which drafting is not worth its trouble.
const LEAST_GAIN: f64 = 1.02;
/// Weight of the newest step in the moving means.
const NEWEST: f64 = 0.1;
/// Weight of the newest step in what number of requests is usual.
const NEWEST_USUAL: f64 = 1.0 / 64.0;
/// Classes of the number of requests that decode: 1, 2, 3-4, 5-8 and so on.
const CLASSES: usize = 16;

/// A step in which everybody decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// Requests.
    pub requests: usize,
    /// Tokens that they got.
    pub tokens: usize,
    /// Drafts that were tried.
    pub drafts: usize,
    /// What the step took.
    pub took: Duration,
    /// What the making of drafts took of it.
    pub drafting: Duration,
}

/// Moving mean of seconds per token.
#[derive(Debug, Default, Clone, Copy)]
struct Mean {
    value: f64,
    samples: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        let weight = NEWEST.max(1.0 / (self.samples + 1) as f64);
        self.value += weight * (value - self.value);
        self.samples += 1;
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Class {
    plain: Mean,
    drafted: Mean,
    rests_until: u64,
    rest: u64,
}

/// Decides, from what steps have taken, whether the next drafts are made.
#[derive(Debug, Default)]
pub struct Payoff {
    classes: [Class; CLASSES],
    steps: u64,
    /// Requests that decode at a time, of late.
    usual: f64,
}

impl Payoff {
    /// Nothing is known yet: drafting is tried.
    pub fn new() -> Payoff {
        Payoff::default()
    }

    /// Whether drafting is worth preparing for with as many requests as usually decode.
    pub fn pays(&self) -> bool {
        self.classes[self.usual()].rests_until <= self.steps
    }

    /// Whether the next step is to go without drafts though drafting pays: to be measured.
    pub fn measures_plain(&self) -> bool {
        let known = self.classes[self.usual()].plain.samples;
        self.steps
            .is_multiple_of(if known < SAMPLES { 3 } else { PLAIN_EVERY })
    }

    fn usual(&self) -> usize {
        class(self.usual.round() as usize)
    }

    /// Learns from a step.
    pub fn observe(&mut self, step: Decoded) {
        self.steps += 1;
        if step.requests == 0 || step.tokens == 0 {
            return;
        }
        let requests = step.requests as f64;
        self.usual += match self.usual {
            0.0 => requests,
            usual => NEWEST_USUAL * (requests - usual),
        };
        if class(step.requests) != self.usual() {
            return;
        }
        let steps = self.steps;
        let class = &mut self.classes[class(step.requests)];
        match step.drafts {
            0 => {
                let took = step.took.saturating_sub(step.drafting);
                class.plain.add(took.as_secs_f64() / step.tokens as f64);
            }
            _ => class
                .drafted
                .add(step.took.as_secs_f64() / step.tokens as f64),
        }
        let measured = class.plain.samples >= SAMPLES && class.drafted.samples >= SAMPLES;
        if measured && step.drafts > 0 {
            if class.plain.value < class.drafted.value * LEAST_GAIN {
                class.rest = (class.rest * 2).clamp(REST_FIRST, REST_MAX);
                class.rests_until = steps + class.rest;
                class.drafted = Mean::default();
            } else if class.drafted.samples > REST_FIRST {
                class.rest = 0;
            }
        }
    }
}

fn class(requests: usize) -> usize {
    let bits = usize::BITS - requests.saturating_sub(1).leading_zeros();
    (bits as usize).min(CLASSES - 1)
}
