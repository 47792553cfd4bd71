//! The router: which experts a token goes to, and with what weight.
//!
//! Secret: the routing rule of the family, all variants as data. Scores are f32; the bias chooses and
//! never weighs; excluded groups are masked with -inf; whatever ties goes to the lowest index; ids
//! come out ascending, which is the order expert rows are summed in. It knows nothing of where experts live.

use std::cell::Cell;

use crate::ModelError;
use crate::config::{Config, Scoring, TopkMethod};
use crate::weights::{Loader, Matrix};
use crate::workspace::{Buffer, Workspace};

/// Added to the sum of the chosen weights before dividing by it.
const NORM_EPS: f32 = 1e-20;

/// Rows that one task scores and chooses for.
const ROWS: usize = 16;

thread_local! {
    /// What is left to choose from while a row's experts are chosen, and what its groups are worth.
    static SCRATCH: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
    /// The groups that a row's experts are of.
    static KEPT: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

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
    pub experts: Buffer<u32>,
    /// Their weights `[n, top_k]`, normalised and scaled as the model says.
    pub weights: Buffer,
    /// Router logits `[n, experts]`, before scoring; for tests and statistics.
    pub logits: Buffer,
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
    pub(crate) fn route(&self, workspace: &Workspace, x: &[f32]) -> Routes {
        let GateConfig { experts, top_k, .. } = self.rule;
        let cpu = workspace.cpu();
        let logits = self.weight.apply(workspace, x);
        let mut scores = workspace.take::<f32>(logits.len());
        scores.copy_from_slice(&logits);
        cpu.par_chunks(&mut scores, ROWS * experts, |_, scores| {
            match self.rule.scoring {
                Scoring::Sigmoid => cpu.sigmoid(scores),
                Scoring::Softmax => scores
                    .chunks_exact_mut(experts)
                    .for_each(|row| cpu.softmax(row)),
            }
        });
        let mut ids = workspace.take::<u32>(logits.len() / experts * top_k);
        cpu.par_chunks(&mut ids, ROWS * top_k, |block, ids| {
            let rows = scores[block * ROWS * experts..].chunks_exact(experts);
            for (row, ids) in rows.zip(ids.chunks_exact_mut(top_k)) {
                choose(row, self.bias.as_deref(), &self.rule, ids);
            }
        });
        let mut weights = workspace.take(ids.len());
        let rows = scores.chunks_exact(experts).zip(ids.chunks_exact(top_k));
        for ((scores, ids), weights) in rows.zip(weights.chunks_exact_mut(top_k)) {
            weigh(scores, ids, &self.rule, weights);
        }
        Routes {
            top_k,
            experts: ids,
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
    let mut ids = vec![0; rule.top_k.min(scores.len())];
    choose(scores, bias, rule, &mut ids);
    let mut weights = vec![0.0; ids.len()];
    weigh(scores, &ids, rule, &mut weights);
    (ids, weights)
}

fn choose(scores: &[f32], bias: Option<&[f32]>, rule: &GateConfig, ids: &mut [u32]) {
    let mut scratch = SCRATCH.take();
    let [choice, worth] = &mut scratch;
    choice.clear();
    choice.extend_from_slice(scores);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
    }
    if rule.groups > 1 {
        let size = rule.experts / rule.groups;
        let groups = choice.chunks_exact(size);
        worth.clear();
        worth.extend(groups.map(|group| group_score(group, rule.method)));
        let mut kept = KEPT.take();
        kept.clear();
        kept.resize(rule.top_groups.min(worth.len()), 0);
        largest(worth, &mut kept);
        for (group, values) in choice.chunks_exact_mut(size).enumerate() {
            if kept.binary_search(&(group as u32)).is_err() {
                values.fill(f32::NEG_INFINITY);
            }
        }
        KEPT.set(kept);
    }
    largest(choice, ids);
    SCRATCH.set(scratch);
}

fn weigh(scores: &[f32], ids: &[u32], rule: &GateConfig, weights: &mut [f32]) {
    for (weight, &id) in weights.iter_mut().zip(ids) {
        *weight = scores[id as usize];
    }
    if rule.normalise {
        let sum = weights.iter().sum::<f32>() + NORM_EPS;
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= rule.scale);
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

/// Indices of the largest values, ascending, as many as there is room for in `taken` (at most all); of equal values the
/// lowest indices.
fn largest(values: &[f32], taken: &mut [u32]) {
    let mut kept = 0;
    for (i, &v) in values.iter().enumerate() {
        // Ids rise, so that of equal values the one that came first stays before.
        let wins = |other: &u32| {
            let other = values[*other as usize];
            v > other || other.is_nan() && !v.is_nan()
        };
        if kept < taken.len() {
            kept += 1;
        } else if !taken.last().is_some_and(wins) {
            continue;
        }
        // Best first; the last place is free, or its owner has lost it.
        let (others, _) = taken.split_at(kept - 1);
        let at = others.partition_point(|other| !wins(other));
        taken[at..kept].rotate_right(1);
        taken[at] = i as u32;
    }
    taken.sort_unstable();
}
