//! Matrix products equal the written rule bit for bit, on every leaf and whatever shares the call.
#![allow(clippy::unwrap_used)]

mod oracle;

use guild_kernels::{Cpu, HeadLayout, Isa, MatrixRef, WeightsRef};
use oracle::{Format, Matrix, bits, config, cpus, values};
use proptest::prelude::*;

fn product(cpu: &Cpu, x: &[f32], w: &Matrix) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / w.cols * w.rows];
    cpu.matmul(&mut out, x, w.as_ref());
    out
}

fn format() -> impl Strategy<Value = Format> {
    prop_oneof![Just(Format::F32), Just(Format::Bf16), Just(Format::Fp8)]
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn odd_shapes_follow_the_rule(format in format(), m in 1usize..70, rows in 1usize..150, cols in 1usize..300, seed: u64) {
        let seed = seed >> 1;
        let w = Matrix::new(format, seed, rows, cols);
        let x = values(seed ^ 1, m * cols);
        let expected = bits(&oracle::matmul(&x, &w));
        for cpu in cpus() {
            prop_assert_eq!(&bits(&product(&cpu, &x, &w)), &expected, "{:?}", cpu);
        }
    }
}

/// Long rows go through several column blocks, many rows through several slabs and tasks.
#[test]
fn long_and_many_rows_follow_the_rule() {
    for (format, m, rows, cols) in [
        (Format::Bf16, 67, 37, 4237),
        (Format::Fp8, 66, 140, 2304),
        (Format::F32, 130, 201, 333),
        (Format::Bf16, 1, 999, 2051),
        (Format::Fp8, 5, 1001, 517),
    ] {
        let w = Matrix::new(format, 7, rows, cols);
        let x = values(8, m * cols);
        let expected = bits(&oracle::matmul(&x, &w));
        for cpu in cpus() {
            assert_eq!(
                bits(&product(&cpu, &x, &w)),
                expected,
                "{format:?} [{m}, {rows}, {cols}] on {cpu:?}"
            );
        }
    }
}

/// So many packed rows that they take two passes over the weights.
#[test]
fn rows_past_one_packing_follow_the_rule() {
    let (m, rows, cols) = (1100, 9, 4100);
    let w = Matrix::new(Format::Bf16, 3, rows, cols);
    let x = values(4, m * cols);
    let expected = bits(&oracle::matmul(&x, &w));
    for cpu in cpus().into_iter().filter(|cpu| cpu.isa() != Isa::Portable) {
        assert_eq!(bits(&product(&cpu, &x, &w)), expected, "{cpu:?}");
    }
}

#[test]
fn a_row_knows_nothing_of_its_mates() {
    let (rows, cols, m) = (77, 650, 33);
    for format in [Format::F32, Format::Bf16, Format::Fp8] {
        let w = Matrix::new(format, 5, rows, cols);
        let x = values(6, m * cols);
        for cpu in cpus() {
            let all = product(&cpu, &x, &w);
            for (i, row) in x.chunks(cols).enumerate() {
                assert_eq!(
                    bits(&product(&cpu, row, &w)),
                    bits(&all[i * rows..][..rows]),
                    "row {i} alone, {format:?} on {cpu:?}"
                );
            }
            for n in 1..m {
                assert_eq!(
                    bits(&product(&cpu, &x[..n * cols], &w)),
                    bits(&all[..n * rows]),
                    "the first {n}, {format:?} on {cpu:?}"
                );
            }
            let reversed: Vec<f32> = x.chunks(cols).rev().flatten().copied().collect();
            let back: Vec<f32> = product(&cpu, &reversed, &w)
                .chunks(rows)
                .rev()
                .flatten()
                .copied()
                .collect();
            assert_eq!(bits(&back), bits(&all), "{format:?} on {cpu:?}");
        }
    }
}

/// The matrix [1, 16] of one byte against x = (1, 0, ...) gives the value of the byte times the scale.
#[test]
fn every_fp8_byte_has_its_value() {
    for scale in [1.0, 0.37, -3.0e-5, 2.0f32.powi(121), f32::MIN_POSITIVE] {
        for cpu in cpus() {
            for m in [1, 24] {
                for byte in 0..=255u8 {
                    let data = [byte; 16];
                    let w = MatrixRef {
                        rows: 1,
                        cols: 16,
                        data: WeightsRef::Fp8 {
                            data: &data,
                            scales: &[scale],
                        },
                    };
                    let mut x = vec![0.0; 16 * m];
                    x.iter_mut().step_by(16).for_each(|x| *x = 1.0);
                    let mut out = vec![0.0; m];
                    cpu.matmul(&mut out, &x, w);
                    // Other lanes add a zero, unless the weight is infinite or NaN.
                    let value = oracle::e4m3(byte) * scale;
                    let expected = if value.is_finite() {
                        value + 0.0
                    } else {
                        f32::NAN
                    };
                    assert_eq!(
                        bits(&out),
                        bits(&vec![expected; m]),
                        "byte {byte:#x} scale {scale} m {m} on {cpu:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn special_values_spread_as_ieee_says() {
    let cols = 37;
    let w = Matrix::new(Format::F32, 1, 5, cols);
    for (special, at) in [
        (f32::NAN, 3),
        (f32::INFINITY, 36),
        (f32::NEG_INFINITY, 0),
        (f32::MAX, 20),
    ] {
        let mut x = values(2, 12 * cols);
        x[4 * cols + at] = special;
        let expected = bits(&oracle::matmul(&x, &w));
        for cpu in cpus() {
            assert_eq!(
                bits(&product(&cpu, &x, &w)),
                expected,
                "{special} on {cpu:?}"
            );
        }
    }
}

#[test]
fn heads_are_products_of_their_own() {
    let (heads, rows, cols) = (5, 19, 43);
    let w: Vec<Matrix> = (0..heads)
        .map(|h| Matrix::new(Format::Bf16, h as u64, rows, cols))
        .collect();
    let refs: Vec<_> = w.iter().map(Matrix::as_ref).collect();
    for m in [1, 3, 40] {
        let x_at = HeadLayout {
            row: heads * 50,
            head: 50,
            offset: 7,
        };
        let out_at = HeadLayout {
            row: heads * 30 + 2,
            head: 30,
            offset: 1,
        };
        let x = values(9, m * x_at.row + 10);
        for cpu in cpus() {
            let mut out = vec![0.5; m * out_at.row];
            cpu.matmul_heads(&mut out, out_at, &x, x_at, m, &refs);
            let mut expected = vec![0.5; out.len()];
            for r in 0..m {
                for (h, w) in w.iter().enumerate() {
                    let row = &x[x_at.offset + r * x_at.row + h * x_at.head..][..cols];
                    expected[out_at.offset + r * out_at.row + h * out_at.head..][..rows]
                        .copy_from_slice(&oracle::matmul(row, w));
                }
            }
            assert_eq!(bits(&out), bits(&expected), "m {m} on {cpu:?}");
        }
    }
}

/// Memory is used again; what one call left there is nothing to the next.
#[test]
fn a_call_knows_nothing_of_the_one_before() {
    let (m, rows, cols) = (20, 9, 37);
    for format in [Format::F32, Format::Bf16, Format::Fp8] {
        let w = Matrix::new(format, 1, rows, cols);
        let x = values(2, m * cols);
        let expected = bits(&oracle::matmul(&x, &w));
        for cpu in cpus() {
            product(
                &cpu,
                &vec![f32::NAN; m * 64],
                &Matrix::new(format, 1, rows, 64),
            );
            assert_eq!(
                bits(&product(&cpu, &x, &w)),
                expected,
                "{format:?} on {cpu:?}"
            );
        }
    }
}

#[test]
fn nothing_in_nothing_out() {
    let cpu = Cpu::new(2);
    cpu.matmul(
        &mut [],
        &[],
        MatrixRef {
            rows: 3,
            cols: 2,
            data: WeightsRef::F32(&[0.0; 6]),
        },
    );
    cpu.matmul(
        &mut [],
        &[1.0, 2.0],
        MatrixRef {
            rows: 0,
            cols: 2,
            data: WeightsRef::F32(&[]),
        },
    );
}

#[test]
#[should_panic(expected = "weights must be [2, 3]")]
fn short_weights_are_refused() {
    Cpu::new(1).matmul(
        &mut [0.0; 2],
        &[0.0; 3],
        MatrixRef {
            rows: 2,
            cols: 3,
            data: WeightsRef::F32(&[0.0; 5]),
        },
    );
}

#[test]
#[should_panic(expected = "out must be [1, 2]")]
fn a_wrong_output_is_refused() {
    Cpu::new(1).matmul(
        &mut [0.0; 3],
        &[0.0; 3],
        MatrixRef {
            rows: 2,
            cols: 3,
            data: WeightsRef::F32(&[0.0; 6]),
        },
    );
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_heads_are_refused() {
    let w = MatrixRef {
        rows: 2,
        cols: 1,
        data: WeightsRef::F32(&[0.0; 2]),
    };
    let at = HeadLayout {
        row: 4,
        head: 1,
        offset: 0,
    };
    Cpu::new(1).matmul_heads(&mut [0.0; 8], at, &[0.0; 8], at, 2, &[w, w]);
}
