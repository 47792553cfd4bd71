//! Products in pairs of bf16 equal the written rules bit for bit, by the instruction and by plain Rust, whatever shares
//! the call.
#![allow(clippy::unwrap_used)]

mod oracle;

use guild_kernels::{Arithmetic, Cpu, Ffn, HeadLayout, Isa};
use half::bf16;
use oracle::{Data, Format, Matrix, bits, config, values};
use proptest::prelude::*;

const DOTS: [Arithmetic; 2] = [Arithmetic::DotAvx512, Arithmetic::DotAmx];
const FORMATS: [Format; 2] = [Format::Bf16, Format::Fp8];

/// The best leaf of this machine with three threads, and plain Rust with one.
fn cpus(arithmetic: Arithmetic) -> [Cpu; 2] {
    [(3, Isa::available()[0]), (1, Isa::Portable)]
        .map(|(threads, isa)| Cpu::with(threads, isa, arithmetic).unwrap())
}

fn product(cpu: &Cpu, x: &[f32], w: &Matrix) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / w.cols * w.rows];
    cpu.matmul(&mut out, x, w.as_ref());
    out
}

fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}

/// One multiplication that is added: what would be subnormal counts as zero, and a result is judged as if exponents had no
/// end: computed once more where it is far from that end.
fn fma(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flushed(a), flushed(b), flushed(c));
    let result = a.mul_add(b, c);
    if result != 0.0 && result.abs() <= f32::MIN_POSITIVE {
        let far = (a * power(60)).mul_add(b * power(60), c * power(120));
        if far.abs() < power(120 - 126) {
            return 0.0f32.copysign(result);
        }
    }
    flushed(result)
}

/// One row of weights, without scales, times one of x over whole steps of 32 columns: the 16 lanes, or one sum.
fn chain(arithmetic: Arithmetic, w: &[f32], x: &[f32]) -> Vec<f32> {
    let mut sums = match arithmetic {
        Arithmetic::DotAvx512 => vec![0.0; 16],
        _ => vec![0.0],
    };
    for (w, x) in w.chunks(32).zip(x.chunks(32)) {
        if let [sum] = sums.as_mut_slice() {
            let every = |from: usize| {
                let of = |acc, k: usize| fma(w[k], x[k], acc);
                (from..32).step_by(2).fold(0.0, of)
            };
            *sum = flushed(*sum + flushed(every(0) + every(1)));
            continue;
        }
        for (j, lane) in sums.iter_mut().enumerate() {
            *lane = fma(w[2 * j + 1], x[2 * j + 1], *lane);
            *lane = fma(w[2 * j], x[2 * j], *lane);
        }
    }
    sums
}

fn expected(arithmetic: Arithmetic, x: &[f32], w: &Matrix) -> Vec<f32> {
    let whole = match w.data {
        Data::Fp8(..) => 128,
        _ => 32,
    };
    let padded = w.cols.next_multiple_of(whole);
    let row_of = |r: usize| -> Vec<f32> {
        let value = |c: usize| match &w.data {
            Data::Fp8(data, _) => oracle::e4m3(data[r * w.cols + c]),
            _ => w.at(r, c),
        };
        (0..padded)
            .map(|c| if c < w.cols { value(c) } else { 0.0 })
            .collect()
    };
    let rows: Vec<Vec<f32>> = (0..w.rows).map(row_of).collect();
    let mut out = Vec::new();
    for x in x.chunks(w.cols) {
        let mut x: Vec<f32> = x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        x.resize(padded, 0.0);
        for (r, row) in rows.iter().enumerate() {
            let sums = match &w.data {
                Data::Fp8(_, scales) => {
                    let mut sums = vec![0.0; chain(arithmetic, &[], &[]).len()];
                    for block in 0..padded / 128 {
                        let of = block * 128..(block + 1) * 128;
                        let scale = scales[r / 128 * (padded / 128) + block];
                        let parts = chain(arithmetic, &row[of.clone()], &x[of]);
                        for (sum, part) in sums.iter_mut().zip(parts) {
                            *sum = part.mul_add(scale, *sum);
                        }
                    }
                    sums
                }
                _ => chain(arithmetic, row, &x),
            };
            out.push(match <[f32; 16]>::try_from(sums.as_slice()) {
                Ok(lanes) => oracle::tree(lanes),
                Err(_) => sums[0],
            });
        }
    }
    out
}

fn holds(arithmetic: Arithmetic, x: &[f32], w: &Matrix) {
    let expected = bits(&expected(arithmetic, x, w));
    for cpu in cpus(arithmetic) {
        let found = bits(&product(&cpu, x, w));
        assert!(found == expected, "[{}, {}] on {cpu:?}", w.rows, w.cols);
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn odd_shapes_follow_the_rule(
        arithmetic in prop::sample::select(&DOTS),
        format in prop::sample::select(&FORMATS),
        m in 1usize..40, rows in 1usize..70, cols in 1usize..300, seed: u64,
    ) {
        let seed = seed >> 1;
        let w = Matrix::new(format, seed, rows, cols);
        holds(arithmetic, &values(seed ^ 1, m * cols), &w);
    }

    /// Products near the least normal number, where what is flushed and what is not lie side by side.
    #[test]
    fn tiny_products_follow_the_rule(
        arithmetic in prop::sample::select(&DOTS),
        m in 1usize..10, rows in 1usize..20, cols in 1usize..100, low in -130i32..-118, seed: u64,
    ) {
        let seed = seed >> 1;
        let w = Matrix::new(Format::Bf16, seed, rows, cols);
        let times = power(low / 2) * power(low - low / 2);
        let x: Vec<f32> = values(seed ^ 1, m * cols).iter().map(|x| x * times).collect();
        holds(arithmetic, &x, &w);
    }
}

/// Long rows go through several column blocks, many rows through several slabs and tasks.
#[test]
fn long_and_many_rows_follow_the_rule() {
    for arithmetic in DOTS {
        for (format, m, rows, cols) in [
            (Format::Bf16, 70, 37, 3237),
            (Format::Fp8, 66, 140, 1304),
            (Format::Bf16, 1, 199, 2051),
            (Format::Bf16, 3, 120, 1700),
            (Format::Bf16, 7, 35, 2100),
            (Format::Fp8, 1, 30, 700),
            (Format::Fp8, 3, 65, 4200),
            (Format::Fp8, 5, 101, 2517),
            (Format::Bf16, 300, 33, 130),
            (Format::Fp8, 300, 17, 130),
        ] {
            let w = Matrix::new(format, 7, rows, cols);
            holds(arithmetic, &values(8, m * cols), &w);
        }
    }
}

#[test]
fn a_row_knows_nothing_of_its_mates() {
    let (rows, cols, m) = (53, 650, 35);
    for arithmetic in DOTS {
        for format in FORMATS {
            let w = Matrix::new(format, 5, rows, cols);
            let x = values(6, m * cols);
            let [cpu, _] = cpus(arithmetic);
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
            assert_eq!(bits(&back), bits(&all), "{format:?} on {cpu:?}");
        }
    }
}

/// Infinities, NaN, numbers too large for bf16 and both NaNs of FP8, each in a row or column of its own.
#[test]
fn numbers_that_are_not_finite_follow_the_rule() {
    let (m, rows, cols) = (9, 40, 300);
    for arithmetic in DOTS {
        for format in FORMATS {
            let mut x = values(3, m * cols);
            x[cols + 7] = f32::INFINITY;
            x[2 * cols + 8] = f32::NEG_INFINITY;
            x[3 * cols + 299] = f32::NAN;
            x[4 * cols + 31] = f32::MAX;
            x[5 * cols] = f32::from_bits(0xffff_ffff);
            x[6 * cols + 100] = f32::MAX / 2.0;
            let mut w = Matrix::new(format, 4, rows, cols);
            match &mut w.data {
                Data::Bf16(data) => {
                    data[5 * cols + 3] = bf16::INFINITY;
                    data[6 * cols + 4] = bf16::NAN;
                    data[7 * cols + 7] = bf16::from_bits(1);
                    data[8 * cols + 31] = bf16::MAX;
                }
                Data::Fp8(data, _) => {
                    data[5 * cols + 3] = 0x7f;
                    data[6 * cols + 4] = 0xff;
                    for (i, byte) in data[9 * cols..][..256].iter_mut().enumerate() {
                        *byte = i as u8;
                    }
                }
                Data::F32(_) => {}
            }
            holds(arithmetic, &x, &w);
        }
    }
}

/// Gated MLPs and products per head are made of the same products.
#[test]
fn whatever_multiplies_follows_one_rule() {
    let (m, hidden, inner) = (21, 200, 90);
    for arithmetic in DOTS {
        let [cpu, _] = cpus(arithmetic);
        for format in FORMATS {
            let [gate, up] = [1, 2].map(|seed| Matrix::new(format, seed, inner, hidden));
            let down = Matrix::new(format, 3, hidden, inner);
            let x = values(4, m * hidden);
            let mut gated = product(&cpu, &x, &gate);
            cpu.silu_mul(&mut gated, &product(&cpu, &x, &up));
            let expected = product(&cpu, &gated, &down);
            let mut found = vec![0.0; m * hidden];
            let expert = Ffn {
                gate: gate.as_ref(),
                up: up.as_ref(),
                down: down.as_ref(),
                rows: None,
            };
            cpu.ffn(&mut found, &x, &[expert]);
            assert_eq!(bits(&found), bits(&expected), "{format:?} on {cpu:?}");
        }
        let heads: Vec<Matrix> = (0..3)
            .map(|i| Matrix::new(Format::Bf16, i, 40, 70))
            .collect();
        let w: Vec<_> = heads.iter().map(Matrix::as_ref).collect();
        let x = values(9, m * 210);
        let layout = |head| HeadLayout {
            row: 3 * head,
            head,
            offset: 0,
        };
        let mut found = vec![0.0; m * 120];
        cpu.matmul_heads(&mut found, layout(40), &x, layout(70), m, &w);
        for (r, row) in x.chunks(210).enumerate() {
            for (h, head) in row.chunks(70).enumerate() {
                let expected = bits(&product(&cpu, head, &heads[h]));
                assert_eq!(bits(&found[r * 120 + h * 40..][..40]), expected);
            }
        }
    }
}

/// Each rule has a name of its own, f32 weights have one rule, and a rule that is slow here says so.
#[test]
fn rules_are_told_apart() {
    let w = Matrix::new(Format::F32, 5, 19, 100);
    let x = values(6, 4 * 100);
    let best = Isa::available()[0];
    let plain = bits(&product(
        &Cpu::with(1, best, Arithmetic::Fma).unwrap(),
        &x,
        &w,
    ));
    let mut classes = Vec::new();
    for arithmetic in Arithmetic::ALL {
        assert_eq!(arithmetic.name().parse(), Ok(arithmetic));
        for cpu in cpus(arithmetic) {
            assert_eq!(bits(&product(&cpu, &x, &w)), plain);
            assert_eq!(cpu.numerics_class(), arithmetic.numerics_class());
            let slow = arithmetic.emulated(cpu.isa()).is_some();
            assert_eq!(cpu.describe().contains("by plain Rust"), slow);
            assert!(slow || arithmetic == Arithmetic::Fma || cpu.isa() != Isa::Portable);
        }
        assert!(!classes.contains(&arithmetic.numerics_class()));
        classes.push(arithmetic.numerics_class());
    }
    match Arithmetic::fastest_dot(best) {
        Ok(fastest) => assert_eq!(fastest.emulated(best), None),
        Err(why) => assert!(why.contains("dot-amx: ") && why.contains("dot-avx512: ")),
    }
    assert!(Arithmetic::fastest_dot(Isa::Portable).is_err());
    let odd = "dot".parse::<Arithmetic>().unwrap_err();
    assert!(odd.contains("fma, dot-avx512, dot-amx"), "{odd}");
}

#[test]
fn a_missing_instruction_set_is_refused_with_those_there_are() {
    for (isa, refused) in Isa::survey() {
        let made = Cpu::with(1, isa, Arithmetic::Fma);
        assert_eq!(made.is_ok(), refused.is_none());
        if let Err(error) = made {
            let has = Isa::available()
                .into_iter()
                .all(|isa| error.contains(isa.name()));
            assert!(has && error.starts_with(isa.name()), "{error}");
        }
    }
}
