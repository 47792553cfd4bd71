//! The routing rule against a plain one, ties and negative scores included.
#![allow(clippy::unwrap_used, missing_docs)]

use guild_model::config::{Scoring, TopkMethod};
use guild_model::gate::{GateConfig, select};
use proptest::prelude::*;

fn rule(experts: usize, top_k: usize) -> GateConfig {
    GateConfig {
        experts,
        top_k,
        scoring: Scoring::Sigmoid,
        method: TopkMethod::NoauxTc,
        groups: 1,
        top_groups: 1,
        normalise: false,
        scale: 1.0,
    }
}

/// The rule by sorting: everything ordered by (value falling, index rising), the first ones taken.
fn by_sorting(scores: &[f32], bias: Option<&[f32]>, rule: &GateConfig) -> (Vec<u32>, Vec<f32>) {
    let first = |values: &[(usize, f32)], k: usize| -> Vec<usize> {
        let mut order = values.to_vec();
        order.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        order[..k].iter().map(|o| o.0).collect()
    };
    let choice: Vec<f32> = scores
        .iter()
        .enumerate()
        .map(|(i, s)| s + bias.map_or(0.0, |b| b[i]))
        .collect();
    let size = rule.experts / rule.groups;
    let worth: Vec<(usize, f32)> = choice
        .chunks(size)
        .map(|group| {
            let mut best = group.to_vec();
            best.sort_by(|a, b| b.partial_cmp(a).unwrap());
            if rule.method == TopkMethod::NoauxTc {
                best.iter().take(2).sum()
            } else {
                best[0]
            }
        })
        .enumerate()
        .collect();
    let kept = first(&worth, rule.top_groups);
    let allowed: Vec<(usize, f32)> = choice
        .into_iter()
        .enumerate()
        .filter(|(i, _)| rule.groups == 1 || kept.contains(&(i / size)))
        .collect();
    let mut ids = first(&allowed, rule.top_k);
    ids.sort_unstable();
    let sum: f32 = ids.iter().map(|&i| scores[i]).sum::<f32>() + 1e-20;
    let weight = |i: usize| if rule.normalise { scores[i] / sum } else { scores[i] } * rule.scale;
    (
        ids.iter().map(|&i| i as u32).collect(),
        ids.iter().map(|&i| weight(i)).collect(),
    )
}

prop_compose! {
    /// Scores and biases from few values, so that ties are the rule and not the exception.
    fn any_case()(
        groups in 1usize..=8,
        size in 1usize..=8,
        method in prop_oneof![Just(TopkMethod::NoauxTc), Just(TopkMethod::GroupLimitedGreedy)],
        normalise in any::<bool>(),
        scale in prop_oneof![Just(1.0f32), Just(2.5), Just(2.446)],
    )(
        scores in prop::collection::vec((0u8..12).prop_map(|s| f32::from(s) / 11.0), groups * size),
        bias in prop::option::of(prop::collection::vec((-8i8..4).prop_map(|b| f32::from(b) / 4.0), groups * size)),
        top_groups in 1..=groups,
        k in any::<prop::sample::Index>(),
        (groups, size, method, normalise, scale) in Just((groups, size, method, normalise, scale)),
    ) -> (Vec<f32>, Option<Vec<f32>>, GateConfig) {
        let top_k = k.index(top_groups * size) + 1;
        (scores, bias, GateConfig { groups, top_groups, method, normalise, scale, ..rule(groups * size, top_k) })
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn select_is_the_rule_by_sorting((scores, bias, rule) in any_case()) {
        prop_assert_eq!(select(&scores, bias.as_deref(), &rule), by_sorting(&scores, bias.as_deref(), &rule));
    }

    #[test]
    fn chosen_ids_are_distinct_and_ascending_whatever_the_scores(
        scores in prop::collection::vec(any::<f32>(), 16), top_k in 1usize..=16, groups in prop_oneof![Just(1usize), Just(4)],
    ) {
        let (ids, weights) = select(&scores, None, &GateConfig { groups, top_groups: groups, ..rule(16, top_k) });
        prop_assert_eq!(ids.len(), top_k);
        prop_assert_eq!(weights.len(), top_k);
        prop_assert!(ids.windows(2).all(|pair| pair[0] < pair[1]) && ids.iter().all(|id| *id < 16));
    }
}

#[test]
fn equal_scores_go_to_the_lowest_indices() {
    assert_eq!(select(&[0.5; 8], None, &rule(8, 3)).0, [0, 1, 2]);
    let grouped = GateConfig {
        groups: 4,
        top_groups: 2,
        ..rule(8, 3)
    };
    assert_eq!(select(&[0.5; 8], None, &grouped).0, [0, 1, 2]);
}

#[test]
fn the_bias_chooses_and_does_not_weigh() {
    let (ids, weights) = select(&[0.9, 0.5, 0.1], Some(&[-1.0, 0.0, 1.0]), &rule(3, 1));
    assert_eq!((ids, weights), (vec![2], vec![0.1]));
}

/// A mask of 0 instead of -inf would let excluded groups beat a kept one whose biased scores are negative.
#[test]
fn an_excluded_group_never_comes_back() {
    let scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6];
    let limited = GateConfig {
        groups: 3,
        top_groups: 1,
        ..rule(6, 2)
    };
    assert_eq!(select(&scores, Some(&[-2.0; 6]), &limited).0, [4, 5]);
}

#[test]
fn a_group_counts_by_its_two_best_or_by_its_best() {
    let scores = [0.9, 0.0, 0.6, 0.6];
    let two = GateConfig {
        groups: 2,
        top_groups: 1,
        ..rule(4, 1)
    };
    assert_eq!(select(&scores, None, &two).0, [2]);
    let one = GateConfig {
        method: TopkMethod::GroupLimitedGreedy,
        ..two
    };
    assert_eq!(select(&scores, None, &one).0, [0]);
}

#[test]
fn weights_are_normalised_then_scaled() {
    let normalised = GateConfig {
        normalise: true,
        scale: 2.5,
        ..rule(4, 2)
    };
    let (_, weights) = select(&[0.25, 0.75, 0.0, 0.0], None, &normalised);
    assert_eq!(weights, [0.625, 1.875]);
    let zero = select(&[0.0; 4], None, &normalised).1;
    assert_eq!(zero, [0.0, 0.0]);
}
