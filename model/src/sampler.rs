//! From logits to a token: greedy or seeded sampling, and log-probabilities.
//!
//! Secret: the draw. A token is chosen by a counter-based generator keyed by (seed, position), so a
//! stream resumed elsewhere repeats nothing and skips nothing, whatever its batch mates were.
//! Log-probabilities are the log-softmax of the raw logits, before temperature. It knows no text.

mod shaping;

use std::cell::Cell;
use std::cmp::Ordering;

use guild_kernels::Cpu;

pub use shaping::{Seen, Shaping};

/// Running maxima side by side: as many as the registers of a core take, whatever its instruction set.
const LANES: usize = 32;

thread_local! {
    /// Tokens that may be drawn, and their probabilities.
    static CANDIDATES: Cell<Vec<(u32, f32)>> = const { Cell::new(Vec::new()) };
    static PROBABILITIES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// How one token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 (or anything not above it) means greedy.
    pub temperature: f32,
    /// Only the most probable tokens that reach this mass together may be drawn; 1 (or more) means all.
    /// It applies to the distribution after temperature and `top_k`.
    pub top_p: f32,
    /// Only so many of the most probable tokens may be drawn; 0 means all. Of equal ones the lowest ids.
    pub top_k: u32,
    /// Only tokens at least so probable as this share of the most probable one may be drawn, after
    /// temperature; 0 means all.
    pub min_p: f32,
    /// Key of the generator.
    pub seed: u64,
}

impl Sampling {
    /// The most probable token always.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: 0,
    };
}

/// One chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability in the raw distribution.
    pub logprob: f32,
    /// The most probable tokens with their log-probabilities, falling; of equal ones the lowest id first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the token that follows, from logits `[vocab]`. `position` is the chosen token's own position
/// in its sequence; the same (seed, position) and logits always give the same token.
///
/// Logits that are no distribution (NaN, +inf, all -inf) fall back to the greedy choice.
pub fn sample(
    cpu: &Cpu,
    logits: &[f32],
    sampling: &Sampling,
    position: u64,
    n_top: usize,
) -> Sampled {
    let token = choose(cpu, logits, sampling, position);
    logprobs_of(cpu, logits, token, n_top)
}

/// The token that [`sample`] chooses, for those who want no log-probabilities: these cost an exponential for every token
/// of the vocabulary.
pub fn choose(cpu: &Cpu, logits: &[f32], sampling: &Sampling, position: u64) -> u32 {
    let greedy = argmax(logits);
    match logits.get(greedy as usize) {
        Some(max) if sampling.temperature > 0.0 && max.is_finite() => {
            draw(cpu, logits, *max, sampling, position)
        }
        _ => greedy,
    }
}

/// Log-probability of a given token, and the `n_top` most probable tokens, from raw logits `[vocab]`.
///
/// An impossible token (a logit of -inf or NaN, an id past the end) has log-probability -inf.
pub fn logprobs_of(cpu: &Cpu, logits: &[f32], token: u32, n_top: usize) -> Sampled {
    let norm = cpu.log_sum_exp(logits);
    let logprob = |logit: f32| {
        let l = logit - norm;
        if l.is_nan() { f32::NEG_INFINITY } else { l }
    };
    let mut top = Vec::new();
    best_n(&mut top, logits.iter().map(|&l| logprob(l)), n_top);
    Sampled {
        token,
        logprob: logits
            .get(token as usize)
            .map_or(f32::NEG_INFINITY, |&l| logprob(l)),
        top,
    }
}

/// The lowest id of the greatest logit; NaN never wins.
fn argmax(logits: &[f32]) -> u32 {
    let greater = |max: f32, l: f32| if l > max { l } else { max };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = logits.as_chunks::<LANES>();
    for chunk in whole {
        for (max, &l) in lanes.iter_mut().zip(chunk) {
            *max = greater(*max, l);
        }
    }
    let max = lanes.iter().chain(rest).copied();
    let max = max.fold(f32::NEG_INFINITY, greater);
    let here = |chunk: &[f32]| chunk.iter().fold(false, |here, &l| here | (l == max));
    let chunk = logits.chunks(LANES).position(here).unwrap_or(0) * LANES;
    let first = logits.iter().skip(chunk).position(|&l| l == max);
    first.map_or(0, |first| chunk + first) as u32
}

/// Draws from softmax(logits / temperature), limited by min-p and top-k, then by top-p of what is left (the order
/// vLLM applies them in; min-p and top-k do not depend on each other).
fn draw(cpu: &Cpu, logits: &[f32], max: f32, sampling: &Sampling, position: u64) -> u32 {
    // Subtracting before dividing keeps the tiniest temperature finite: the best is 0, all else falls to -inf.
    let scaled = |l: f32| {
        let x = (l - max) / sampling.temperature;
        if x.is_nan() { f32::NEG_INFINITY } else { x }
    };
    let limited = sampling.top_k > 0 && (sampling.top_k as usize) < logits.len();
    let mut candidates = CANDIDATES.take();
    let logits = logits.iter().map(|&l| scaled(l));
    if limited {
        best_n(&mut candidates, logits, sampling.top_k as usize);
    } else {
        candidates.clear();
        candidates.extend((0..).zip(logits));
    }
    let mut probabilities = PROBABILITIES.take();
    probabilities.clear();
    probabilities.extend(candidates.iter().map(|c| c.1));
    cpu.softmax(&mut probabilities);
    candidates
        .iter_mut()
        .zip(&probabilities)
        .for_each(|(c, &p)| c.1 = p);
    PROBABILITIES.set(probabilities);
    if sampling.min_p > 0.0 {
        let best = candidates.iter().map(|c| c.1).fold(0.0, f32::max);
        // However the product rounds, the best one stays.
        let least = (sampling.min_p * best).min(best);
        candidates.retain(|c| c.1 >= least);
    }
    let mut total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
    if sampling.top_p < 1.0 {
        total = nucleus(&mut candidates, f64::from(sampling.top_p) * total);
    }
    let point = uniform(sampling.seed, position) * total;
    let mut reached = 0.0;
    let mut last = candidates[0].0;
    for &(id, p) in candidates.iter().filter(|c| c.1 > 0.0) {
        reached += f64::from(p);
        last = id;
        if reached > point {
            break;
        }
    }
    CANDIDATES.set(candidates);
    last
}

/// Leaves the most probable candidates that reach `mass` together (at least one), falling. Returns their sum.
///
/// Takes ever larger heads of the order instead of sorting all: a nucleus is small beside a vocabulary.
fn nucleus(candidates: &mut Vec<(u32, f32)>, mass: f64) -> f64 {
    let mut head = 64.min(candidates.len());
    loop {
        if head < candidates.len() {
            candidates.select_nth_unstable_by(head - 1, falling);
        }
        candidates[..head].sort_unstable_by(falling);
        let mut sum = 0.0;
        for (i, &(_, p)) in candidates[..head].iter().enumerate() {
            sum += f64::from(p);
            if sum >= mass || i + 1 == candidates.len() {
                candidates.truncate(i + 1);
                return sum;
            }
        }
        head = (head * 8).min(candidates.len());
    }
}

/// Greater value first, of equal values the lower id; a total order because NaN is kept out.
fn falling(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1)
        .unwrap_or(Ordering::Equal)
        .then(a.0.cmp(&b.0))
}

/// Makes `kept` the `n` greatest values with their indices, in [`falling`] order, in one pass and O(n) memory.
fn best_n(kept: &mut Vec<(u32, f32)>, values: impl ExactSizeIterator<Item = f32>, n: usize) {
    kept.clear();
    let n = n.min(values.len());
    if n == 0 {
        return;
    }
    kept.reserve(2 * n);
    // Once n are kept, only what is greater than the least of them can enter: ids rise, so an equal one loses.
    let mut bar = None;
    for (id, v) in (0u32..).zip(values) {
        if bar.is_some_and(|bar| v <= bar) {
            continue;
        }
        kept.push((id, v));
        if kept.len() == 2 * n {
            kept.select_nth_unstable_by(n - 1, falling);
            kept.truncate(n);
            bar = Some(kept[n - 1].1);
        }
    }
    kept.sort_unstable_by(falling);
    kept.truncate(n);
}

/// A number in [0, 1) with 53 bits that depends on (seed, position) alone.
fn uniform(seed: u64, position: u64) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let [a, b, _, _] = philox4x32([position as u32, (position >> 32) as u32, 0, 0], key);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10: ten rounds of multiply and exchange make a counter and a key into 128 random bits
/// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
fn philox4x32(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let (a, b) = (
            MULTIPLIERS[0] * u64::from(c[0]),
            MULTIPLIERS[1] * u64::from(c[2]),
        );
        c = [
            (b >> 32) as u32 ^ c[1] ^ k[0],
            b as u32,
            (a >> 32) as u32 ^ c[3] ^ k[1],
            a as u32,
        ];
        k = [
            k[0].wrapping_add(KEY_STEPS[0]),
            k[1].wrapping_add(KEY_STEPS[1]),
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123.
    #[test]
    fn philox_gives_the_published_answers() {
        let answers = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, answer) in answers {
            assert_eq!(philox4x32(counter, key), answer);
        }
    }

    #[test]
    fn uniform_fills_the_unit_interval() {
        let draws: Vec<f64> = (0..4096).map(|p| uniform(7, p)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.5).abs() < 0.02, "mean {mean}");
        for tenth in 0..10 {
            let inside = draws
                .iter()
                .filter(|&&u| (u * 10.0) as usize == tenth)
                .count();
            assert!((330..490).contains(&inside), "tenth {tenth}: {inside}");
        }
    }
}
