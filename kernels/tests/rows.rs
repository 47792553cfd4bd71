//! Row-wise operations equal the written rule bit for bit, and the rule is accurate.
#![allow(clippy::unwrap_used)]

mod oracle;

use guild_kernels::Cpu;
use oracle::{bits, config, cpus, values};
use proptest::prelude::*;

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn odd_lengths_follow_the_rule(n in 1usize..200, rows in 1usize..5, seed: u64, stretch in 0.1f32..60.0) {
        let seed = seed >> 1;
        let x: Vec<f32> = values(seed, rows * n).iter().map(|x| x * stretch).collect();
        let y = values(seed + 1, rows * n);
        let weight = values(seed + 2, n);
        for cpu in cpus() {
            let mut out = vec![0.0; x.len()];
            cpu.rms_norm(&mut out, &x, &weight, 1e-6);
            prop_assert_eq!(bits(&out), bits(&oracle::rms_norm(&x, &weight, 1e-6)));

            let mut out = x.clone();
            cpu.softmax(&mut out);
            prop_assert_eq!(bits(&out), bits(&oracle::softmax(&x)));
            let total: f64 = out.iter().map(|&p| f64::from(p)).sum();
            prop_assert!((total - 1.0).abs() < 1e-5, "softmax sums to {}", total);

            let lse = cpu.log_sum_exp(&x);
            prop_assert_eq!(lse.to_bits(), (oracle::max(&x) + libm::log(f64::from(oracle::exp_sum(&x))) as f32).to_bits());

            let mut out = x.clone();
            cpu.sigmoid(&mut out);
            let expected: Vec<f32> = x.iter().map(|&x| 1.0 / (1.0 + oracle::exp(-x))).collect();
            prop_assert_eq!(bits(&out), bits(&expected));

            let mut out = x.clone();
            cpu.silu_mul(&mut out, &y);
            let expected: Vec<f32> = x.iter().zip(&y).map(|(&x, y)| x / (1.0 + oracle::exp(-x)) * y).collect();
            prop_assert_eq!(bits(&out), bits(&expected));

            let mut out = x.clone();
            cpu.add(&mut out, &y);
            prop_assert_eq!(bits(&out), bits(&x.iter().zip(&y).map(|(x, y)| x + y).collect::<Vec<_>>()));

            let mut out = x.clone();
            cpu.fma(&mut out, 0.3, &y);
            prop_assert_eq!(bits(&out), bits(&x.iter().zip(&y).map(|(x, y)| 0.3f32.mul_add(*y, *x)).collect::<Vec<_>>()));
        }
    }
}

/// Large enough for the threads.
#[test]
fn pieces_do_not_show() {
    let n = 700_003;
    let (x, y) = (values(1, n), values(2, n));
    let one = Cpu::new(1);
    let mut expected = x.clone();
    one.silu_mul(&mut expected, &y);
    for cpu in cpus() {
        let mut out = x.clone();
        cpu.silu_mul(&mut out, &y);
        assert_eq!(bits(&out), bits(&expected), "{cpu:?}");
    }
    let width = 129;
    let rows = n / width * width;
    let mut expected = vec![0.0; rows];
    one.rms_norm(&mut expected, &x[..rows], &y[..width], 1e-5);
    for cpu in cpus() {
        let mut out = vec![0.0; rows];
        cpu.rms_norm(&mut out, &x[..rows], &y[..width], 1e-5);
        assert_eq!(bits(&out), bits(&expected), "{cpu:?}");
    }
}

/// Distance in representable values, of a positive result from the exact one.
fn ulps(got: f32, exact: f64) -> f64 {
    let near = exact as f32;
    let ulp = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
    (f64::from(got) - exact).abs() / ulp
}

#[test]
fn exp_is_accurate_and_the_same_everywhere() {
    // Every 4099th value of the range where the result is neither zero nor infinite.
    let all = (0..=u32::MAX).step_by(4099).map(f32::from_bits);
    let x: Vec<f32> = all.filter(|x| *x > -103.9 && *x < 88.72).collect();
    let expected: Vec<f32> = x.iter().map(|&x| oracle::exp(x)).collect();
    let worst = x
        .iter()
        .zip(&expected)
        .map(|(&x, &e)| ulps(e, f64::from(x).exp()))
        .fold(0.0, f64::max);
    assert!(worst <= 2.0, "exp is {worst} ulp off");
    for cpu in cpus() {
        let mut out = x.clone();
        cpu.exp(&mut out);
        assert_eq!(bits(&out), bits(&expected), "{cpu:?}");
    }
}

#[test]
fn special_values() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for cpu in cpus() {
        let mut x = [
            -inf,
            inf,
            nan,
            0.0,
            -0.0,
            1e9,
            -1e9,
            88.8,
            -104.5,
            f32::MIN_POSITIVE,
            1e-45,
        ];
        cpu.exp(&mut x);
        assert_eq!(
            bits(&x),
            bits(&[0.0, inf, nan, 1.0, 1.0, inf, 0.0, inf, 0.0, 1.0, 1.0]),
            "{cpu:?}"
        );
        let mut x = [-inf, inf, nan, 0.0];
        cpu.sigmoid(&mut x);
        assert_eq!(bits(&x), bits(&[0.0, 1.0, nan, 0.5]), "{cpu:?}");
        let mut x = [-inf, 0.0, -inf];
        cpu.softmax(&mut x);
        assert_eq!(bits(&x), bits(&[0.0, 1.0, 0.0]), "{cpu:?}");
        let mut x = [1.0, nan, 2.0];
        cpu.softmax(&mut x);
        assert!(x.iter().all(|x| x.is_nan()), "{cpu:?}");
        cpu.softmax(&mut []);
        assert_eq!(cpu.log_sum_exp(&[-inf, -inf]), -inf);
        assert_eq!(cpu.log_sum_exp(&[]), -inf);
        assert_eq!(cpu.log_sum_exp(&[1.0, inf]), inf);
        assert_eq!(cpu.log_sum_exp(&[3.5]), 3.5);
        assert!(cpu.log_sum_exp(&[1.0, nan]).is_nan() && cpu.log_sum_exp(&[nan]).is_nan());
        let mut x = [1.0, 1e30];
        cpu.silu_mul(&mut x, &[nan, 2.0]);
        assert!(x[0].is_nan() && x[1] == 2e30);
        cpu.rms_norm(&mut [], &[], &[], 1.0);
    }
}

#[test]
#[should_panic(expected = "silu_mul: lengths differ")]
fn different_lengths_are_refused() {
    Cpu::new(1).silu_mul(&mut [1.0], &[1.0, 2.0]);
}
