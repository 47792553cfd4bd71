//! How far two checkpoints of one model are apart: weight by weight, and in what they predict.
//!
//! Secret: what is measured, and that neither model is in memory whole. Whether a difference is too large is for
//! others to say.

use rayon::prelude::*;
use serde::Serialize;

use guild_kernels::Cpu;

use crate::checkpoint::{Dtype, schema};
use crate::trunk::{EMBEDDING, HEAD};
use crate::weights::Matrix;
use crate::workspace::Workspace;
use crate::{Checkpoint, Config, ModelError, whole};

/// Elements of a weight that are widened at a time.
const BAND: usize = 1 << 20;
/// Rows of logits that are in memory at a time.
const ROWS: usize = 32;

/// One weight of two checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightError {
    /// Name of the tensor in a plain checkpoint.
    pub tensor: String,
    /// How A stores it, and B.
    pub formats: [String; 2],
    /// Number of its elements.
    pub elements: u64,
    /// Root of the mean square of the difference, over that of A.
    pub relative_rms: f64,
    /// The largest difference.
    pub max: f64,
    /// Signal to quantisation noise, in dB: 10 log10 of the sum of squares of A over that of the difference. None
    /// where they are equal.
    pub sqnr_db: Option<f64>,
}

/// What two models predict of the same texts, over all positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogitError {
    /// Positions compared.
    pub positions: u64,
    /// Mean of the Kullback-Leibler divergence of B's distribution from A's, in nats.
    pub kl_mean: f64,
    /// Its 99th percentile.
    pub kl_p99: f64,
    /// Its maximum.
    pub kl_max: f64,
    /// Share of positions where both think the same token likeliest.
    pub top1: f64,
    /// exp of the mean negative log-probability that A gives the next token of the text; None where no text has two
    /// tokens.
    pub perplexity_a: Option<f64>,
    /// The same of B.
    pub perplexity_b: Option<f64>,
}

/// Refuses checkpoints of different models: what they may differ in is how weights are stored.
///
/// # Errors
/// They differ in something else.
pub fn comparable(a: &Checkpoint, b: &Checkpoint) -> Result<(), ModelError> {
    let plain = |c: &Config| Config {
        fp8: false,
        packed: None,
        ..c.clone()
    };
    if plain(a.config()) == plain(b.config()) {
        return Ok(());
    }
    Err(ModelError::file(
        b.dir(),
        format!(
            "is another model than {}: only checkpoints of one configuration can be compared",
            a.dir().display()
        ),
    ))
}

/// Compares every weight, the worst first. `progress` hears elements done and in all, from any thread.
///
/// # Errors
/// A tensor that cannot be read.
pub fn weights(
    a: &Checkpoint,
    b: &Checkpoint,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<WeightError>, ModelError> {
    comparable(a, b)?;
    let specs: Vec<_> = schema(a.config()).filter(|s| !s.optional).collect();
    let total = specs.iter().map(|s| s.elements()).sum();
    let done = std::sync::atomic::AtomicU64::new(0);
    let compare = |spec: &crate::checkpoint::TensorSpec| {
        let (rows, cols) = match spec.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, spec.elements() as usize),
        };
        let (a, b) = (
            a.stored_weight(&spec.name, &spec.shape)?,
            b.stored_weight(&spec.name, &spec.shape)?,
        );
        let band = (BAND / cols.max(1)).max(1);
        let (mut signal, mut noise, mut max) = (0.0f64, 0.0f64, 0.0f64);
        for first in (0..rows).step_by(band) {
            let range = first..rows.min(first + band);
            for (x, y) in a.widened(range.clone())?.iter().zip(b.widened(range)?) {
                let (x, y) = (f64::from(*x), f64::from(y));
                signal += x * x;
                noise += (x - y) * (x - y);
                max = max.max((x - y).abs());
            }
        }
        let count = spec.elements();
        let before = done.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
        progress(before + count, total);
        let ratio = if noise == 0.0 { 0.0 } else { noise / signal };
        Ok(WeightError {
            tensor: spec.name.clone(),
            formats: [a.format(), b.format()],
            elements: count,
            relative_rms: ratio.sqrt(),
            max,
            sqnr_db: (noise > 0.0).then(|| -10.0 * ratio.log10()),
        })
    };
    let mut errors: Vec<WeightError> = specs
        .par_iter()
        .map(compare)
        .collect::<Result<_, ModelError>>()?;
    errors.sort_by(|x, y| y.relative_rms.total_cmp(&x.relative_rms));
    Ok(errors)
}

/// Compares what both predict after every token of some texts. `progress` hears layers done and in all.
///
/// # Errors
/// As [`whole::final_rows`].
pub fn logits(
    a: &Checkpoint,
    b: &Checkpoint,
    cpu: &Cpu,
    texts: &[Vec<u32>],
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<LogitError, ModelError> {
    comparable(a, b)?;
    if texts.is_empty() {
        return Err(ModelError::input("prompts", "there are none"));
    }
    let rows_a = whole::final_rows(a, Dtype::Auto, cpu, texts, &|n, of| progress(n, 2 * of))?;
    let rows_b = whole::final_rows(b, Dtype::Auto, cpu, texts, &|n, of| {
        progress(of + n, 2 * of)
    })?;
    let (head_a, head_b) = (head(a)?, head(b)?);
    let workspace = Workspace::new(cpu);
    let (width, vocab) = (a.config().hidden_size, a.config().vocab_size);
    // The token that follows each row, where its text goes on.
    let next: Vec<Option<u32>> = texts
        .iter()
        .flat_map(|t| t[1..].iter().copied().map(Some).chain([None]))
        .collect();
    let mut kl = Vec::with_capacity(next.len());
    let (mut same, mut scored, mut nll) = (0u64, 0u64, [0.0f64; 2]);
    let pieces = rows_a.chunks(ROWS * width).zip(rows_b.chunks(ROWS * width));
    for ((a, b), next) in pieces.zip(next.chunks(ROWS)) {
        let (a, b) = (head_a.apply(&workspace, a), head_b.apply(&workspace, b));
        for ((a, b), next) in a.chunks(vocab).zip(b.chunks(vocab)).zip(next) {
            same += u64::from(best(a) == best(b));
            let (norm_a, norm_b) = (log_sum_exp(a), log_sum_exp(b));
            kl.push(divergence(a, norm_a, b, norm_b));
            if let Some(next) = next {
                scored += 1;
                nll[0] += norm_a - f64::from(a[*next as usize]);
                nll[1] += norm_b - f64::from(b[*next as usize]);
            }
        }
    }
    kl.sort_by(f64::total_cmp);
    let count = kl.len();
    let perplexity = |nll: f64| (scored > 0).then(|| (nll / scored as f64).exp());
    Ok(LogitError {
        positions: count as u64,
        kl_mean: kl.iter().sum::<f64>() / count as f64,
        kl_p99: kl[(count * 99).div_ceil(100).max(1) - 1],
        kl_max: kl[count - 1],
        top1: same as f64 / count as f64,
        perplexity_a: perplexity(nll[0]),
        perplexity_b: perplexity(nll[1]),
    })
}

fn head(ckpt: &Checkpoint) -> Result<Matrix, ModelError> {
    let cfg = ckpt.config();
    let name = if cfg.tie_word_embeddings {
        EMBEDDING
    } else {
        HEAD
    };
    Matrix::load(ckpt, name, cfg.vocab_size, cfg.hidden_size, Dtype::Auto)
}

/// Index of the likeliest token by `logits` `[vocab]`: the first of the largest.
pub fn best(logits: &[f32]) -> usize {
    let better = |best: usize, (i, l): (usize, &f32)| if *l > logits[best] { i } else { best };
    logits.iter().enumerate().fold(0, better)
}

/// ln of the sum of exp of `logits` `[vocab]`, in f64: a logit less this is the log-probability of its token.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    max + sum.ln()
}

/// Kullback-Leibler divergence in nats of the distribution of logits `b` `[vocab]` from that of `a`, whose
/// [`log_sum_exp`] are `norm_b` and `norm_a`: the sum of p ln(p / q), which rounding does not make negative.
pub fn divergence(a: &[f32], norm_a: f64, b: &[f32], norm_b: f64) -> f64 {
    let term = |(&a, &b): (&f32, &f32)| {
        let (a, b) = (f64::from(a) - norm_a, f64::from(b) - norm_b);
        a.exp() * (a - b)
    };
    a.iter().zip(b).map(term).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_two_coins() {
        // ln of odds 3:1 and 1:1.
        let (a, b) = ([3.0f32.ln(), 0.0], [0.5, 0.5]);
        let found = divergence(&a, log_sum_exp(&a), &b, log_sum_exp(&b));
        let right = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((found - right).abs() < 1e-6, "{found} {right}");
        assert_eq!(divergence(&a, log_sum_exp(&a), &a, log_sum_exp(&a)), 0.0);
        assert_eq!(best(&[1.0, 3.0, 3.0, -1.0]), 1);
    }
}
