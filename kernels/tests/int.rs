//! Products of packed integers equal the written rule bit for bit, on every leaf and whatever shares the call.
#![allow(clippy::unwrap_used)]

mod oracle;
mod packed;

use guild_kernels::{
    Cpu, Isa, MatrixRef, WeightsRef,
    pack::{self, Int},
};
use half::bf16;
use oracle::{bits, config, cpus, values};
use packed::Packed;
use proptest::prelude::*;

fn product(cpu: &Cpu, x: &[f32], w: &Packed) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / w.cols * w.rows];
    cpu.matmul(&mut out, x, w.as_ref());
    out
}

fn int() -> impl Strategy<Value = Int> {
    prop_oneof![Just(Int::Int4), Just(Int::Int8)]
}

fn group() -> impl Strategy<Value = usize> {
    prop::sample::select(&pack::GROUPS)
}

const INTS: [Int; 2] = [Int::Int4, Int::Int8];

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn odd_shapes_follow_the_rule(int in int(), group in group(), m in 1usize..40, rows in 1usize..90, cols in 1usize..400, seed: u64) {
        let seed = seed >> 1;
        let w = Packed::random(int, group, rows, cols, seed);
        let x = values(seed ^ 1, m * cols);
        let expected = bits(&w.product(&x));
        for cpu in cpus() {
            prop_assert_eq!(&bits(&product(&cpu, &x, &w)), &expected, "{:?}", cpu);
        }
    }

    /// Values are the nearest under their scale, and scales fit the largest value.
    #[test]
    fn values_are_near(int in int(), group in group(), rows in 1usize..40, cols in 1usize..300, seed: u64) {
        let w = Packed::random(int, group, rows, cols, seed >> 1);
        for row in 0..rows {
            for col in 0..cols {
                let (from, to) = (w.from[row * cols + col], w.value(row, col));
                let scale = w.scale(row, col / group).abs();
                // Half a step; at the ends of the range, what rounding the scale or a better one for the others cuts off.
                let integer = if scale == 0.0 { 0.0 } else { (to / w.scale(row, col / group)).round() };
                let bound = match (int, integer) {
                    (Int::Int8, -127.0 | 127.0) => 0.75,
                    (Int::Int4, -8.0 | 7.0) => 1.8,
                    _ => 0.5001,
                } * scale;
                prop_assert!((from - to).abs() <= bound.max(1e-38), "[{}, {}] {} {} {}", row, col, from, to, scale);
            }
        }
    }
}

#[test]
fn a_row_knows_nothing_of_its_mates() {
    let (rows, cols, m) = (77, 650, 33);
    for int in INTS {
        let w = Packed::random(int, 32, rows, cols, 5);
        let x = values(6, m * cols);
        for cpu in cpus() {
            let all = product(&cpu, &x, &w);
            for (i, row) in x.chunks(cols).enumerate() {
                let alone = product(&cpu, row, &w);
                assert_eq!(bits(&alone), bits(&all[i * rows..][..rows]), "row {i}");
            }
            for n in 1..m {
                let first = product(&cpu, &x[..n * cols], &w);
                assert_eq!(bits(&first), bits(&all[..n * rows]), "{n} on {cpu:?}");
            }
            let reversed: Vec<f32> = x.chunks(cols).rev().flatten().copied().collect();
            let back = product(&cpu, &reversed, &w);
            let back: Vec<f32> = back.chunks(rows).rev().flatten().copied().collect();
            assert_eq!(bits(&back), bits(&all), "{int:?} on {cpu:?}");
        }
    }
}

/// Long rows, many rows and many panels, through several passes and tasks.
#[test]
fn large_shapes_follow_the_rule() {
    for (int, group, m, rows, cols) in [
        (Int::Int4, 32, 67, 37, 4237),
        (Int::Int8, 64, 66, 140, 2304),
        (Int::Int4, 128, 130, 201, 333),
        (Int::Int8, 128, 1, 999, 2051),
        (Int::Int4, 64, 5, 1001, 517),
        (Int::Int8, 32, 1100, 9, 20_000),
    ] {
        let w = Packed::random(int, group, rows, cols, 7);
        let x = values(8, m * cols);
        let expected = bits(&w.product(&x));
        for cpu in cpus()
            .into_iter()
            .filter(|cpu| cpu.isa() != Isa::Portable || m < 1000)
        {
            let found = bits(&product(&cpu, &x, &w));
            assert_eq!(found, expected, "{int:?} [{m}, {rows}, {cols}] on {cpu:?}");
        }
    }
}

/// The largest products there are, of one sign, do not overflow anything.
#[test]
fn extremes_follow_the_rule() {
    for int in INTS {
        for group in pack::GROUPS {
            for (sign_w, sign_x) in [(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)] {
                let w = Packed::new(int, group, 17, 256, vec![sign_w; 17 * 256]);
                let x = vec![sign_x; 3 * 256];
                let expected = bits(&w.product(&x));
                for cpu in cpus() {
                    assert_eq!(bits(&product(&cpu, &x, &w)), expected, "{int:?} on {cpu:?}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_makes_its_row_nan() {
    let (rows, cols) = (20, 100);
    for int in INTS {
        let w = Packed::random(int, 32, rows, cols, 1);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 31, 32, 99] {
                let mut x = values(2, 3 * cols);
                x[cols + at] = odd;
                for cpu in cpus() {
                    let out = product(&cpu, &x, &w);
                    assert!(out[..rows].iter().all(|x| x.is_finite()), "{cpu:?}");
                    assert!(out[rows..2 * rows].iter().all(|x| x.is_nan()), "{cpu:?}");
                    assert!(out[2 * rows..].iter().all(|x| x.is_finite()), "{cpu:?}");
                }
            }
        }
        let mut from = values(3, rows * cols);
        from[7 * cols + 5] = f32::INFINITY;
        let w = Packed::new(int, 32, rows, cols, from);
        for cpu in cpus() {
            let out = product(&cpu, &values(4, cols), &w);
            assert!(out.iter().enumerate().all(|(i, x)| x.is_nan() == (i == 7)));
        }
    }
}

#[test]
fn zeros_and_tiny_numbers_are_zero() {
    for int in INTS {
        let w = Packed::random(int, 64, 5, 70, 1);
        for x in [0.0, -0.0, 1e-45, -1e-40, 1e-38] {
            for cpu in cpus() {
                assert_eq!(bits(&product(&cpu, &[x; 70], &w)), [0; 5]);
            }
        }
        let w = Packed::new(int, 64, 5, 70, vec![1e-42; 350]);
        assert_eq!(w.value(3, 3), 0.0);
        for cpu in cpus() {
            assert_eq!(bits(&product(&cpu, &values(1, 70), &w)), [0; 5]);
        }
    }
}

/// Values that are small integers times a bf16 come back as they were, where the largest of a group is at the end of
/// the range: what was quantised so before is not changed.
#[test]
fn quantised_values_are_kept() {
    for group in pack::GROUPS {
        for (int, low, high) in [(Int::Int4, -8, 7), (Int::Int8, -127, 127)] {
            for end in [low, high] {
                let cols = 2 * group;
                let scale = 0.011_352_539;
                assert_eq!(bf16::from_f32(scale).to_f32(), scale);
                let from: Vec<f32> = values(9, 18 * cols)
                    .iter()
                    .enumerate()
                    .map(|(i, v)| {
                        let q = if i % group == 3 {
                            end
                        } else {
                            (v * 7.0) as i32
                        };
                        q as f32 * scale
                    })
                    .collect();
                let w = Packed::new(int, group, 18, cols, from);
                for (i, &from) in w.from.iter().enumerate() {
                    assert_eq!(w.value(i / cols, i % cols), from, "{int:?} {group} {i}");
                }
            }
        }
    }
}

/// Panels packed one at a time are the matrix packed at once.
#[test]
fn panels_stand_alone() {
    let (rows, cols, group) = (53, 200, 64);
    for int in INTS {
        let whole = Packed::random(int, group, rows, cols, 11);
        let (mut data, mut scales) = (Vec::new(), Vec::new());
        for from in whole.from.chunks(16 * cols) {
            let panel = Packed::new(int, group, from.len() / cols, cols, from.to_vec());
            data.extend(panel.data);
            scales.extend(panel.scales);
        }
        assert!(data == whole.data && scales == whole.scales);
    }
}

#[test]
#[should_panic(expected = "packed in groups of 32")]
fn short_weights_are_refused() {
    let w = MatrixRef {
        rows: 2,
        cols: 3,
        data: WeightsRef::Int8 {
            data: &[0; 5],
            scales: &[],
            group: 32,
        },
    };
    Cpu::new(1).matmul(&mut [0.0; 2], &[0.0; 3], w);
}

#[test]
#[should_panic(expected = "a group has 32, 64 or 128 columns, not 48")]
fn other_groups_are_refused() {
    pack::bytes(Int::Int4, 16, 96, 48);
}
