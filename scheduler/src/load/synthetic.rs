//! Load that nobody served: for tests and dry runs.

use super::{LoadError, Shot, Trace};

/// A drifting load: popularity by Zipf's law in a random order in every layer,
/// a mean-reverting log-normal drift on top, and now and then a cold expert
/// that changes places with a hot one. The same numbers give the same trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Synthetic {
    /// Seed of all that is drawn.
    pub seed: u64,
    /// Layers, with indices from 0.
    pub layers: u32,
    /// Experts of a layer.
    pub experts: u32,
    /// Shots to draw.
    pub shots: usize,
    /// Rows routed per layer and shot (tokens times experts per token).
    pub rows: u64,
    /// Exponent of Zipf's law; 0 is an even load.
    pub zipf: f64,
    /// Standard deviation, in natural logarithms, of the drift of one shot.
    pub drift: f64,
    /// Chance that a layer sees a cold expert become hot in a shot.
    pub jump: f64,
}

/// What is left of a drift after one shot: it stays within about 3.2 steps.
const REVERSION: f64 = 0.95;

impl Synthetic {
    /// Draws the trace.
    ///
    /// # Errors
    /// A size that cannot be counted.
    pub fn trace(&self) -> Result<Trace, LoadError> {
        let layers: Vec<u32> = (0..self.layers).collect();
        super::check_size(&layers, self.experts)?;
        let mut random = Random(self.seed);
        let mut state: Vec<Popularity> = layers
            .iter()
            .map(|_| self.popularity(&mut random))
            .collect();
        let shots = (0..self.shots)
            .map(|_| Shot {
                rows: state
                    .iter_mut()
                    .map(|p| self.shot(p, &mut random))
                    .collect(),
            })
            .collect();
        Ok(Trace {
            layers,
            experts: self.experts,
            shots,
        })
    }

    fn popularity(&self, random: &mut Random) -> Popularity {
        let experts = self.experts as usize;
        let mut base: Vec<f64> = (1..=experts)
            .map(|r| -self.zipf * (r as f64).ln())
            .collect();
        for i in (1..experts).rev() {
            base.swap(i, random.below(i + 1));
        }
        Popularity {
            base,
            drift: vec![0.0; experts],
        }
    }

    fn shot(&self, p: &mut Popularity, random: &mut Random) -> Vec<u64> {
        if random.unit() < self.jump {
            let cold = random.below(p.base.len());
            let hottest = (0..p.base.len()).max_by(|&a, &b| p.base[a].total_cmp(&p.base[b]));
            let runner = random.below(p.base.len());
            let hot = hottest.filter(|_| random.unit() < 0.5).unwrap_or(runner);
            p.base.swap(cold, hot);
        }
        for drift in &mut p.drift {
            *drift = *drift * REVERSION + self.drift * random.normal();
        }
        let weights: Vec<f64> = p
            .base
            .iter()
            .zip(&p.drift)
            .map(|(b, d)| (b + d).exp())
            .collect();
        let all: f64 = weights.iter().sum();
        let draw = |w: &f64| {
            let mean = self.rows as f64 * w / all;
            (mean + mean.sqrt() * random.normal()).round().max(0.0) as u64
        };
        weights.iter().map(draw).collect()
    }
}

struct Popularity {
    /// [experts], natural logarithms.
    base: Vec<f64>,
    drift: Vec<f64>,
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Close to normal: the sum of twelve uniform draws.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}
