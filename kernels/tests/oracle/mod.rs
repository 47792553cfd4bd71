//! The written rule, element by element and without any of the crate's code, and helpers around it.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use guild_kernels::{Cpu, Isa, LatentAttention, MatrixRef, WeightsRef};
use half::bf16;
use proptest::test_runner::{Config, RngSeed};

pub fn config(cases: u32) -> Config {
    Config {
        cases,
        rng_seed: RngSeed::Fixed(20),
        failure_persistence: None,
        ..Config::default()
    }
}

/// Every leaf of this machine, with one thread and with three.
pub fn cpus() -> Vec<Cpu> {
    let isas = Isa::available();
    isas.iter()
        .flat_map(|&isa| {
            [1, 3].map(|threads| Cpu::with_isa(threads, isa).expect("it is available"))
        })
        .collect()
}

/// Seeded numbers in about -1..1, with exact zeros and tiny values among them.
pub fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    };
    let value = |bits: u64| match bits % 61 {
        0 => 0.0,
        1 => 1e-41,
        2 => -1e-30,
        _ => (bits as f32 / u32::MAX as f32).mul_add(2.0, -1.0),
    };
    (0..n).map(|_| value(next())).collect()
}

/// Bits, with every NaN alike.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter()
        .map(|x| {
            if x.is_nan() {
                f32::NAN.to_bits()
            } else {
                x.to_bits()
            }
        })
        .collect()
}

#[derive(Clone, Copy, Debug)]
pub enum Format {
    F32,
    Bf16,
    Fp8,
}

/// An owned matrix.
#[derive(Debug)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Data,
}

#[derive(Debug)]
pub enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Fp8(Vec<u8>, Vec<f32>),
}

impl Matrix {
    pub fn new(format: Format, seed: u64, rows: usize, cols: usize) -> Matrix {
        let x = values(seed, rows * cols);
        let data = match format {
            Format::F32 => Data::F32(x),
            Format::Bf16 => Data::Bf16(x.into_iter().map(bf16::from_f32).collect()),
            // Every byte but the two NaNs.
            Format::Fp8 => {
                let byte = |x: f32| (x.to_bits() >> 3) as u8;
                let bytes = x.into_iter().map(|x| {
                    if byte(x) & 0x7f == 0x7f {
                        0x7e
                    } else {
                        byte(x)
                    }
                });
                Data::Fp8(
                    bytes.collect(),
                    values(seed + 1, rows.div_ceil(128) * cols.div_ceil(128)),
                )
            }
        };
        Matrix { rows, cols, data }
    }

    pub fn as_ref(&self) -> MatrixRef<'_> {
        let data = match &self.data {
            Data::F32(data) => WeightsRef::F32(data),
            Data::Bf16(data) => WeightsRef::Bf16(data),
            Data::Fp8(data, scales) => WeightsRef::Fp8 { data, scales },
        };
        MatrixRef {
            rows: self.rows,
            cols: self.cols,
            data,
        }
    }

    pub fn at(&self, r: usize, c: usize) -> f32 {
        match &self.data {
            Data::F32(data) => data[r * self.cols + c],
            Data::Bf16(data) => f32::from_bits(u32::from(data[r * self.cols + c].to_bits()) << 16),
            Data::Fp8(data, scales) => {
                e4m3(data[r * self.cols + c])
                    * scales[(r / 128) * self.cols.div_ceil(128) + c / 128]
            }
        }
    }
}

/// OCP 8-bit floating point specification, table 1.
pub fn e4m3(b: u8) -> f32 {
    if b & 0x7f == 0x7f {
        return f32::NAN;
    }
    let (exponent, mantissa) = (i32::from(b >> 3 & 0xf), f32::from(b & 7));
    let magnitude = if exponent == 0 {
        mantissa * 2f32.powi(-9)
    } else {
        (8.0 + mantissa) * 2f32.powi(exponent - 10)
    };
    if b & 0x80 == 0 { magnitude } else { -magnitude }
}

pub fn tree(mut l: [f32; 16]) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            l[i] += l[i + width];
        }
    }
    l[0]
}

pub fn dot(n: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f32 {
    let mut l = [0f32; 16];
    for k in 0..n.next_multiple_of(16) {
        let (a, b) = if k < n { (a(k), b(k)) } else { (0.0, 0.0) };
        l[k % 16] = a.mul_add(b, l[k % 16]);
    }
    tree(l)
}

pub fn matmul(x: &[f32], w: &Matrix) -> Vec<f32> {
    let rows = x.chunks(w.cols);
    rows.flat_map(|x| (0..w.rows).map(move |r| dot(w.cols, |k| x[k], |k| w.at(r, k))))
        .collect()
}

pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let x = x.clamp(-104.0, 89.0);
    let t = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ]
    .iter()
    .fold(1.0 / 5040.0f32, |p, &c| p.mul_add(r, c));
    let n = (t.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let pow2 = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    p * pow2(n >> 1) * pow2(n.wrapping_sub(n >> 1))
}

pub fn max(x: &[f32]) -> f32 {
    x.iter()
        .fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

pub fn exp_sum(x: &[f32]) -> f32 {
    let (mut l, max) = ([0f32; 16], max(x));
    x.iter()
        .enumerate()
        .for_each(|(i, &x)| l[i % 16] += exp(x - max));
    tree(l)
}

pub fn softmax(x: &[f32]) -> Vec<f32> {
    let (max, times) = (max(x), 1.0 / exp_sum(x));
    x.iter().map(|&x| exp(x - max) * times).collect()
}

pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let n = weight.len();
    let row = |x: &[f32]| {
        let times = 1.0 / (dot(n, |k| x[k], |k| x[k]) / n as f32 + eps).sqrt();
        x.iter()
            .zip(weight)
            .map(|(x, w)| x * times * w)
            .collect::<Vec<_>>()
    };
    x.chunks(n).flat_map(row).collect()
}

/// The output of a job whose cache holds f32 rows `keys` by position for every row; the job is left untouched.
pub fn attend(job: &LatentAttention<'_>, keys: &[f32]) -> Vec<f32> {
    let key = |t: usize| &keys[t * job.width..][..job.width];
    let mut out = Vec::new();
    for (r, row) in job.rows.iter().enumerate() {
        for h in 0..job.heads {
            let q = &job.q[(r * job.heads + h) * job.width..][..job.width];
            let state_of = |from: usize| {
                let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0, vec![0.0; job.value_width]);
                let end = row.visible.min(from + 512);
                for from in (from..end).step_by(64) {
                    let scores: Vec<f32> = (from..end.min(from + 64))
                        .map(|t| dot(job.width, |i| q[i], |i| key(t)[i]) * job.scale)
                        .collect();
                    let next = max(&scores).max(m);
                    let a = exp(m - next);
                    let weights: Vec<f32> = scores.iter().map(|s| exp(s - next)).collect();
                    let mut lanes = [0f32; 16];
                    for (i, w) in weights.iter().enumerate() {
                        lanes[i % 16] += w;
                    }
                    l = f32::mul_add(l, a, tree(lanes));
                    for (d, o) in o.iter_mut().enumerate() {
                        let chain = |acc, (i, w): (usize, &f32)| w.mul_add(key(from + i)[d], acc);
                        *o = weights.iter().enumerate().fold(*o * a, chain);
                    }
                    m = next;
                }
                (m, l, o)
            };
            if row.visible == 0 {
                out.extend(vec![0.0; job.value_width]);
                continue;
            }
            let (mut m, mut l, mut o) = state_of(0);
            for from in (512..row.visible).step_by(512) {
                let (m2, l2, o2) = state_of(from);
                let next = m.max(m2);
                let (a, b) = (exp(m - next), exp(m2 - next));
                for (o, o2) in o.iter_mut().zip(o2) {
                    *o = o2.mul_add(b, *o * a);
                }
                l = l2.mul_add(b, l * a);
                m = next;
            }
            out.extend(o.iter().map(|o| o * (1.0 / l)));
        }
    }
    out
}
