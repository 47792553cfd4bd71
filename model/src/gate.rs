//! The router: which experts a token goes to, and with what weight.
//!
//! Secret: the routing rule of the family, all variants as data. Scores are f32; the bias chooses and
//! never weighs; excluded groups are masked with -inf; whatever ties goes to the lowest index; ids
//! come out ascending, which is the order expert rows are summed in. It knows nothing of where experts live.

use guild_kernels::Cpu;

use crate::ModelError;
use crate::config::{Config, Scoring, TopkMethod};
use crate::weights::{Loader, Matrix};

/// Added to the sum of the chosen weights before dividing by it.
const NORM_EPS: f32 = 1e-20;

/// Rows that one task scores and chooses for.
const ROWS: usize = 16;

/// The routing rule, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How logits become scores.
    pub scoring: Scoring,
    /// How a group is judged.
    pub method: TopkMethod,
    /// Groups of consecutive experts; 1 when the method ignores groups.
    pub groups: usize,
    /// Groups a token may choose from.
    pub top_groups: usize,
    /// Whether the chosen weights are divided by their sum.
    pub normalise: bool,
    /// What they are multiplied by at last.
    pub scale: f32,
}

impl GateConfig {
    /// The rule a model's configuration describes.
    pub fn new(cfg: &Config) -> GateConfig {
        let groups = cfg.routing_groups();
        GateConfig {
            experts: cfg.n_routed_experts,
            top_k: cfg.num_experts_per_tok,
            scoring: cfg.scoring_func,
            method: cfg.topk_method,
            groups,
            top_groups: if groups == 1 { 1 } else { cfg.topk_group },
            normalise: cfg.norm_topk_prob,
            scale: cfg.routed_scaling_factor,
        }
    }
}

/// Where the rows of a batch go.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Experts per row.
    pub top_k: usize,
    /// Logical experts `[n, top_k]`, ascending in each row.
    pub experts: Vec<u32>,
    /// Their weights `[n, top_k]`, normalised and scaled as the model says.
    pub weights: Vec<f32>,
    /// Router logits `[n, experts]`, before scoring; for tests and statistics.
    pub logits: Vec<f32>,
}

impl Routes {
    /// Rows routed.
    pub fn rows(&self) -> usize {
        self.experts.len() / self.top_k.max(1)
    }
}

/// The router of one layer.
#[derive(Debug)]
pub struct Gate {
    weight: Matrix,
    bias: Option<Vec<f32>>,
    rule: GateConfig,
}

impl Gate {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str) -> Result<Gate, ModelError> {
        let cfg = loader.config();
        let rule = GateConfig::new(cfg);
        let weight = loader.matrix_f32(&format!("{prefix}.gate"), rule.experts, cfg.hidden_size)?;
        let bias = match cfg.has_router_bias() {
            true => Some(loader.vector(
                &format!("{prefix}.gate.e_score_correction_bias"),
                rule.experts,
            )?),
            false => None,
        };
        Ok(Gate { weight, bias, rule })
    }

    /// Routes rows `x` `[n, hidden]` (after the layer's norm).
    pub fn route(&self, cpu: &Cpu, x: &[f32]) -> Routes {
        let GateConfig { experts, top_k, .. } = self.rule;
        let logits = self.weight.apply(cpu, x);
        let mut scores = logits.clone();
        let mut choices = vec![(0, 0.0); logits.len() / experts * top_k];
        cpu.par_chunks(&mut scores, ROWS * experts, |_, scores| {
            match self.rule.scoring {
                Scoring::Sigmoid => cpu.sigmoid(scores),
                Scoring::Softmax => scores
                    .chunks_exact_mut(experts)
                    .for_each(|row| cpu.softmax(row)),
            }
        });
        cpu.par_chunks(&mut choices, ROWS * top_k, |block, choices| {
            let rows = scores[block * ROWS * experts..].chunks_exact(experts);
            for (row, out) in rows.zip(choices.chunks_exact_mut(top_k)) {
                let (ids, weights) = select(row, self.bias.as_deref(), &self.rule);
                out.iter_mut()
                    .zip(ids.into_iter().zip(weights))
                    .for_each(|(to, choice)| *to = choice);
            }
        });
        let (experts, weights) = choices.into_iter().unzip();
        Routes {
            top_k,
            experts,
            weights,
            logits,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.weight.bytes()
            + self
                .bias
                .as_ref()
                .map_or(0, |b| size_of_val(b.as_slice()) as u64)
    }
}

/// Chooses `top_k` experts of one row by its scores `[experts]` and gives their weights, ids ascending
/// (DeepSeek-V3 report, eq. 13 to 16; group limit as in DeepSeek-V2 report, section 2.1.2).
///
/// Comparisons only ever ask "greater", so equal scores go to the lowest index and a NaN, which a
/// sound model never yields, loses without a panic.
pub fn select(scores: &[f32], bias: Option<&[f32]>, rule: &GateConfig) -> (Vec<u32>, Vec<f32>) {
    let mut choice: Vec<f32> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
        None => scores.to_vec(),
    };
    if rule.groups > 1 {
        let size = rule.experts / rule.groups;
        let worth: Vec<f32> = choice
            .chunks_exact(size)
            .map(|group| group_score(group, rule.method))
            .collect();
        let kept = largest(&worth, rule.top_groups);
        for (group, values) in choice.chunks_exact_mut(size).enumerate() {
            if kept.binary_search(&(group as u32)).is_err() {
                values.fill(f32::NEG_INFINITY);
            }
        }
    }
    let ids = largest(&choice, rule.top_k);
    let mut weights: Vec<f32> = ids.iter().map(|&e| scores[e as usize]).collect();
    if rule.normalise {
        let sum = weights.iter().sum::<f32>() + NORM_EPS;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= rule.scale);
    (ids, weights)
}

/// What a group of choice scores is worth: the sum of its two best (V3), or its best (V2).
fn group_score(group: &[f32], method: TopkMethod) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &c in group {
        if c > first {
            (first, second) = (c, first);
        } else if c > second {
            second = c;
        }
    }
    match method {
        TopkMethod::NoauxTc if group.len() > 1 => first + second,
        _ => first,
    }
}

/// Indices of the `k` largest values, ascending; of equal values the lowest indices.
fn largest(values: &[f32], k: usize) -> Vec<u32> {
    let mut taken: Vec<u32> = Vec::with_capacity(k);
    for _ in 0..k.min(values.len()) {
        let mut best: Option<usize> = None;
        for (i, &v) in values.iter().enumerate() {
            if best.is_none_or(|b| v > values[b] || values[b].is_nan() && !v.is_nan())
                && taken.binary_search(&(i as u32)).is_err()
            {
                best = Some(i);
            }
        }
        let Some(best) = best else { break };
        let at = taken.partition_point(|&t| (t as usize) < best);
        taken.insert(at, best as u32);
    }
    taken
}
