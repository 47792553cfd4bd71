//! The sampler: what is chosen, from what, and with what log-probability.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;

use guild_model::compare::log_sum_exp;
use guild_model::sampler::{Sampling, Seen, Shaping, logprobs_of, sample};
use guild_model::{Cpu, Isa};
use proptest::prelude::*;

const PLAIN: Sampling = Sampling {
    temperature: 1.0,
    ..Sampling::GREEDY
};

fn token(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    sample(&Cpu::new(1), logits, &sampling, position, 0).token
}

/// Every token drawn at many positions.
fn drawn(logits: &[f32], sampling: Sampling) -> BTreeSet<u32> {
    let cpu = Cpu::new(1);
    (0..2000)
        .map(|p| sample(&cpu, logits, &sampling, p, 0).token)
        .collect()
}

/// Log-softmax in f64.
fn logprobs(logits: &[f32]) -> Vec<f64> {
    let norm = log_sum_exp(logits);
    logits.iter().map(|&l| f64::from(l) - norm).collect()
}

#[test]
fn greedy_takes_the_lowest_id_of_equals() {
    assert_eq!(token(&[1.0, 3.0, 2.0, 3.0], Sampling::GREEDY, 0), 1);
    assert_eq!(token(&[0.0; 5], Sampling::GREEDY, 9), 0);
    assert_eq!(token(&[-0.0, 0.0], Sampling::GREEDY, 9), 0);
}

#[test]
fn a_temperature_that_is_not_above_zero_is_greedy() {
    for temperature in [0.0, -0.0, -1.0, f32::NAN] {
        assert_eq!(
            token(
                &[1.0, 1.1, 0.9],
                Sampling {
                    temperature,
                    ..PLAIN
                },
                3
            ),
            1
        );
    }
}

#[test]
fn a_tiny_temperature_always_draws_the_best() {
    for temperature in [1e-3, 1e-20, f32::MIN_POSITIVE, 1e-45] {
        assert_eq!(
            drawn(
                &[1.0, 1.1, 0.9],
                Sampling {
                    temperature,
                    ..PLAIN
                }
            ),
            BTreeSet::from([1])
        );
    }
}

#[test]
fn an_endless_temperature_draws_all_that_is_possible() {
    let logits = [5.0, f32::NEG_INFINITY, -5.0, 0.0];
    assert_eq!(
        drawn(
            &logits,
            Sampling {
                temperature: f32::INFINITY,
                ..PLAIN
            }
        ),
        BTreeSet::from([0, 2, 3])
    );
}

#[test]
fn top_k_of_one_is_the_best_and_of_none_or_many_is_all() {
    let logits = [0.1, 0.3, 0.2, 0.3];
    assert_eq!(
        drawn(&logits, Sampling { top_k: 1, ..PLAIN }),
        BTreeSet::from([1])
    );
    assert_eq!(
        drawn(&logits, Sampling { top_k: 2, ..PLAIN }),
        BTreeSet::from([1, 3])
    );
    for top_k in [0, 4, u32::MAX] {
        assert_eq!(
            drawn(&logits, Sampling { top_k, ..PLAIN }),
            BTreeSet::from([0, 1, 2, 3])
        );
    }
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    let logits = [0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
    let with = |top_p| drawn(&logits, Sampling { top_p, ..PLAIN });
    assert_eq!(with(0.0), BTreeSet::from([0]));
    assert_eq!(with(0.45), BTreeSet::from([0]));
    assert_eq!(with(0.7), BTreeSet::from([0, 1]));
    assert_eq!(with(0.8), BTreeSet::from([0, 1, 2]));
    assert_eq!(with(0.95), BTreeSet::from([0, 1, 2, 3]));
    assert_eq!(with(1.0), BTreeSet::from([0, 1, 2, 3]));
    assert_eq!(with(f32::NAN), BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn top_p_counts_after_top_k_and_temperature() {
    let logits = [0.4f32.ln(), 0.3f32.ln(), 0.3f32.ln()];
    // Of the two that top-k leaves, the first has 4/7 of the mass.
    assert_eq!(
        drawn(
            &logits,
            Sampling {
                top_k: 2,
                top_p: 0.55,
                ..PLAIN
            }
        ),
        BTreeSet::from([0])
    );
    // Without top-k it has only 0.4; at a low temperature nearly all.
    assert_eq!(
        drawn(
            &logits,
            Sampling {
                top_p: 0.55,
                ..PLAIN
            }
        ),
        BTreeSet::from([0, 1])
    );
    assert_eq!(
        drawn(
            &logits,
            Sampling {
                temperature: 0.1,
                top_p: 0.55,
                ..PLAIN
            }
        ),
        BTreeSet::from([0])
    );
}

#[test]
fn a_nucleus_wider_than_the_first_look_is_found() {
    let logits: Vec<f32> = (0..5000).map(|i| (i * 7919 % 5000) as f32 * 1e-4).collect();
    let kept = drawn(
        &logits,
        Sampling {
            top_p: 0.5,
            ..PLAIN
        },
    );
    // The upper half by logit holds 56 % of the mass; what is drawn is from the upper half alone.
    assert!(
        kept.iter().all(|&t| logits[t as usize] > 0.2),
        "{:?}",
        kept.len()
    );
    assert!(kept.len() > 1000, "{}", kept.len());
}

#[test]
fn tokens_come_as_often_as_they_are_probable() {
    let logits = [1.0, 0.0, 2.0, -1.0, 0.5];
    for temperature in [0.5, 1.0, 2.0] {
        let cpu = Cpu::new(1);
        let mut count = [0usize; 5];
        let draws = 20_000;
        for position in 0..draws {
            let sampling = Sampling {
                temperature,
                seed: 11,
                ..PLAIN
            };
            count[sample(&cpu, &logits, &sampling, position, 0).token as usize] += 1;
        }
        let expected = logprobs(&logits.map(|l| l / temperature));
        for (id, (n, l)) in count.iter().zip(expected).enumerate() {
            let (got, p) = (*n as f64 / draws as f64, l.exp());
            // Five standard deviations.
            let bound = 5.0 * (p * (1.0 - p) / draws as f64).sqrt();
            assert!(
                (got - p).abs() < bound,
                "temperature {temperature}, token {id}: {got} for {p}"
            );
        }
    }
}

#[test]
fn the_draw_depends_on_seed_and_position_alone() {
    let logits: Vec<f32> = (0..300).map(|i| (i % 17) as f32 * 0.1).collect();
    let stream = |seed, from| -> Vec<u32> {
        (from..100)
            .map(|p| token(&logits, Sampling { seed, ..PLAIN }, p))
            .collect()
    };
    assert_eq!(stream(1, 0)[40..], stream(1, 40));
    assert_ne!(stream(1, 0), stream(2, 0));
    assert_ne!(stream(1, 0), stream(1 << 32, 0));
}

#[test]
fn logits_that_are_no_distribution_do_no_harm() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    assert_eq!(token(&[-inf; 3], PLAIN, 0), 0);
    assert_eq!(token(&[nan; 3], PLAIN, 0), 0);
    assert_eq!(token(&[0.0, inf, 1.0], PLAIN, 0), 1);
    assert_eq!(token(&[nan, -1.0, -2.0], Sampling::GREEDY, 0), 1);
    assert_eq!(token(&[], PLAIN, 0), 0);
    assert_eq!(
        drawn(
            &[nan, -inf, 0.0],
            Sampling {
                top_p: 0.9,
                top_k: 2,
                ..PLAIN
            }
        ),
        BTreeSet::from([2])
    );
    for logits in [[-inf, nan, 0.0], [nan; 3], [-inf; 3], [inf; 3]] {
        let sampled = sample(&Cpu::new(1), &logits, &PLAIN, 0, 5);
        assert!(sampled.top.iter().all(|(_, l)| !l.is_nan()) && !sampled.logprob.is_nan());
    }
}

#[test]
fn logprobs_are_of_the_raw_logits_and_ordered() {
    let logits = [1.0, 3.0, 2.0, 3.0, f32::NEG_INFINITY];
    let cpu = Cpu::new(1);
    let sampled = sample(
        &cpu,
        &logits,
        &Sampling {
            temperature: 0.1,
            top_k: 1,
            ..PLAIN
        },
        0,
        3,
    );
    let expected = logprobs(&logits);
    assert_eq!(sampled.token, 1);
    assert_eq!(
        sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(),
        [1, 3, 2]
    );
    for (id, logprob) in sampled.top.iter().chain([&(1, sampled.logprob)]) {
        assert!((f64::from(*logprob) - expected[*id as usize]).abs() < 1e-6);
    }
    let given = logprobs_of(&cpu, &logits, 4, 99);
    assert_eq!(
        (given.token, given.logprob, given.top.len()),
        (4, f32::NEG_INFINITY, 5)
    );
    assert_eq!(logprobs_of(&cpu, &logits, 77, 0).logprob, f32::NEG_INFINITY);
}

#[test]
fn every_isa_and_thread_count_draws_the_same() {
    let logits: Vec<f32> = (0..4099).map(|i| ((i * 31) % 997) as f32 * 0.01).collect();
    let sampling = Sampling {
        temperature: 0.8,
        top_p: 0.9,
        top_k: 500,
        min_p: 0.001,
        seed: 3,
    };
    let expected: Vec<_> = (0..50)
        .map(|p| sample(&Cpu::new(1), &logits, &sampling, p, 5))
        .collect();
    for isa in Isa::available() {
        for threads in [1, 3] {
            let cpu = Cpu::with_isa(threads, isa).unwrap();
            let got: Vec<_> = (0..50)
                .map(|p| sample(&cpu, &logits, &sampling, p, 5))
                .collect();
            assert_eq!(got, expected, "{isa:?}, {threads} threads");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The best few, found in one pass, against sorting everything; few distinct values, so many ties.
    #[test]
    fn the_top_tokens_are_those_of_a_full_sort(
        logits in prop::collection::vec((-20i8..20).prop_map(|l| f32::from(l) * 0.5), 1..400), n in 0usize..50,
    ) {
        let top = logprobs_of(&Cpu::new(1), &logits, 0, n).top;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].partial_cmp(&logits[*a as usize]).unwrap().then(a.cmp(b)));
        order.truncate(n);
        prop_assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), order);
    }

    /// What is drawn lies in the nucleus of a plain computation.
    #[test]
    fn draws_stay_in_the_nucleus(
        logits in prop::collection::vec(-6f32..6.0, 1..300), top_p in 0.05f32..1.0, top_k in 0u32..40,
        seed in any::<u64>(), position in any::<u64>(),
    ) {
        let mut order: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        order.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        if top_k > 0 {
            order.truncate(top_k as usize);
        }
        let p: Vec<f64> = logprobs(&order.iter().map(|o| o.1).collect::<Vec<_>>()).iter().map(|l| l.exp()).collect();
        let drawn = token(&logits, Sampling { top_p, top_k, seed, ..PLAIN }, position);
        let rank = order.iter().position(|o| o.0 == drawn);
        prop_assert!(rank.is_some());
        // A whisker of slack where f32 and f64 place the edge differently.
        prop_assert!(p[..rank.unwrap()].iter().sum::<f64>() < f64::from(top_p) + 1e-5);
    }
}

#[test]
fn min_p_leaves_out_what_is_too_improbable_beside_the_best() {
    // Probabilities 8 : 4 : 2 : 1.
    let logits = [0.0f32, 1.0, 2.0, 3.0].map(|n| n * std::f32::consts::LN_2);
    for (min_p, left) in [
        (0.0, vec![0, 1, 2, 3]),
        (0.12, vec![0, 1, 2, 3]),
        (0.2, vec![1, 2, 3]),
        (0.4, vec![2, 3]),
        (0.6, vec![3]),
        (1.0, vec![3]),
    ] {
        let found = drawn(&logits, Sampling { min_p, ..PLAIN });
        assert_eq!(found.into_iter().collect::<Vec<_>>(), left, "{min_p}");
    }
    // After temperature: 8 : 1 becomes 64 : 1.
    let cold = Sampling {
        min_p: 0.12,
        temperature: 0.5,
        ..PLAIN
    };
    assert_eq!(drawn(&logits, cold), BTreeSet::from([2, 3]));
    // Top-p is of what min-p has left: of 8 : 4, the best alone reaches 0.6.
    let both = Sampling {
        min_p: 0.4,
        top_p: 0.6,
        ..PLAIN
    };
    assert_eq!(drawn(&logits, both), BTreeSet::from([3]));
}

/// The definitions, token by token over the whole vocabulary.
fn shaped_naively(logits: &[f32], shaping: &Shaping, tokens: &[u32], prompt: usize) -> Vec<f32> {
    let times = |of: &[u32], id: u32| of.iter().filter(|&&token| token == id).count();
    (0u32..)
        .zip(logits)
        .map(|(id, &logit)| {
            let bias: f32 = shaping.bias.iter().filter(|b| b.0 == id).map(|b| b.1).sum();
            let mut logit = logit + bias;
            if times(tokens, id) > 0 && logit > 0.0 {
                logit /= shaping.repetition;
            } else if times(tokens, id) > 0 {
                logit *= shaping.repetition;
            }
            let out = times(&tokens[prompt..], id);
            logit -= shaping.frequency * out as f32;
            if out > 0 {
                logit - shaping.presence
            } else {
                logit
            }
        })
        .collect()
}

proptest! {
    #[test]
    fn shaping_is_as_defined_and_does_not_ask_who_made_the_output(
        logits in prop::collection::vec(-8.0f32..8.0, 40),
        tokens in prop::collection::vec(0u32..40, 1..60),
        split in 0.0f64..1.0,
        bias in prop::collection::btree_map(0u32..40, -5.0f32..5.0, 0..6),
        repetition in 0.5f32..2.0,
        presence in -2.0f32..2.0,
        frequency in -2.0f32..2.0,
    ) {
        let prompt = (split * tokens.len() as f64) as usize;
        let shaping = Shaping { bias: bias.into_iter().collect(), repetition, presence, frequency };
        let want = shaped_naively(&logits, &shaping, &tokens, prompt);
        // All at once, as a node that takes over counts, and one by one, as the first one did.
        let mut grown = Seen::new(&tokens[..prompt], prompt);
        tokens[prompt..].iter().for_each(|&token| grown.push(token));
        for seen in [Seen::new(&tokens, prompt), grown] {
            let mut got = logits.clone();
            shaping.apply(&mut got, &seen);
            prop_assert_eq!(&got, &want);
        }
    }
}

#[test]
fn neutral_shaping_changes_nothing() {
    let mut logits = vec![0.5, -0.0, f32::NEG_INFINITY];
    let neutral = Shaping::default();
    assert!(neutral.is_neutral());
    neutral.apply(&mut logits, &Seen::new(&[0, 1, 1], 1));
    assert_eq!(logits, [0.5, -0.0, f32::NEG_INFINITY]);
    assert!(
        !Shaping {
            presence: 0.1,
            ..Shaping::default()
        }
        .is_neutral()
    );
    assert!(
        !Shaping {
            bias: vec![(0, 1.0)],
            ..Shaping::default()
        }
        .is_neutral()
    );
}
