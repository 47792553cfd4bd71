//! When requests arrive. Secret: the process; the same seed gives the same times.

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand_distr::{Distribution as _, Gamma};

/// Seconds from the start at which each of `n` requests arrives, ascending:
/// `rate` in a second on average, with gamma distributed gaps of shape
/// `burstiness` (1 is a Poisson process). An infinite rate is all at once.
///
/// The times are scaled so that the last comes after exactly `n / rate`: runs
/// of one length then offer the same load, whatever the seed.
pub(super) fn times(n: usize, rate: f64, burstiness: f64, seed: u64) -> Vec<f64> {
    let gaps = Gamma::new(burstiness, 1.0 / (rate * burstiness));
    let Some(gaps) = gaps.ok().filter(|_| rate.is_finite()) else {
        return vec![0.0; n];
    };
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut times: Vec<f64> = (0..n)
        .map(|_| {
            at += gaps.sample(&mut rng);
            at
        })
        .collect();
    if at > 0.0 {
        let scale = n as f64 / rate / at;
        times.iter_mut().for_each(|time| *time *= scale);
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(times: &[f64]) -> (f64, f64) {
        let gaps: Vec<f64> = times.windows(2).map(|w| w[1] - w[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    #[test]
    fn gaps_have_the_mean_of_the_rate_and_the_spread_of_the_shape() {
        // The coefficient of variation of a gamma distribution is shape^-1/2.
        for (shape, spread) in [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)] {
            let times = times(20_000, 8.0, shape, 7);
            assert!(times.is_sorted());
            let (mean, cv) = gaps(&times);
            assert!((mean - 0.125).abs() < 0.002, "{shape}: {mean}");
            assert!((cv - spread).abs() < 0.1 * spread, "{shape}: {cv}");
        }
    }

    #[test]
    fn the_last_comes_when_the_load_says() {
        let times = times(100, 4.0, 1.0, 3);
        assert!((times[99] - 25.0).abs() < 1e-9);
        assert_eq!(times, super::times(100, 4.0, 1.0, 3));
        assert_ne!(times, super::times(100, 4.0, 1.0, 4));
    }

    #[test]
    fn an_infinite_rate_is_all_at_once() {
        assert_eq!(times(3, f64::INFINITY, 1.0, 0), [0.0; 3]);
    }
}
