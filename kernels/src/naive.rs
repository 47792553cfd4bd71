//! The written rule, element by element.

use crate::{LatentAttention, MatrixRef, WeightsRef};

pub(crate) fn fp8(b: u8) -> f32 {
    let sign = if b & 0x80 != 0 { -1.0 } else { 1.0 };
    let e = i32::from(b >> 3 & 0xf);
    let m = f32::from(b & 7);
    if b & 0x7f == 0x7f {
        return f32::NAN;
    }
    sign * if e == 0 { m * 2f32.powi(-9) } else { (8.0 + m) * 2f32.powi(e - 10) }
}

pub(crate) fn tree(mut l: [f32; 16]) -> f32 {
    for w in [8, 4, 2, 1] {
        for i in 0..w {
            l[i] += l[i + w];
        }
    }
    l[0]
}

pub(crate) fn dot(a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32, n: usize) -> f32 {
    let mut l = [0f32; 16];
    for k in 0..n.next_multiple_of(16) {
        let (x, w) = if k < n { (a(k), b(k)) } else { (0.0, 0.0) };
        l[k % 16] = x.mul_add(w, l[k % 16]);
    }
    tree(l)
}

pub(crate) fn weight(w: &MatrixRef<'_>, r: usize, c: usize) -> f32 {
    match w.data {
        WeightsRef::F32(d) => d[r * w.cols + c],
        WeightsRef::Bf16(d) => d[r * w.cols + c].to_f32(),
        WeightsRef::Fp8 { data, scales } => fp8(data[r * w.cols + c]) * scales[(r / 128) * w.cols.div_ceil(128) + c / 128],
    }
}

pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let x = if x > 89.0 { 89.0 } else if x < -104.0 { -104.0 } else { x };
    let t = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.0 / 5040.0f32;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    let n = (t.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = n >> 1;
    let pow2 = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    p * pow2(half) * pow2(n.wrapping_sub(half))
}

pub(crate) fn max(x: &[f32]) -> f32 {
    x.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

pub(crate) fn sum_exp(x: &mut [f32], max: f32) -> f32 {
    let mut l = [0f32; 16];
    for (i, x) in x.iter_mut().enumerate() {
        *x = exp(*x - max);
        l[i % 16] += *x;
    }
    tree(l)
}

pub(crate) fn softmax(x: &mut [f32]) {
    let m = max(x);
    let inv = 1.0 / sum_exp(x, m);
    for x in x {
        *x *= inv;
    }
}

pub(crate) fn attend(job: LatentAttention<'_>) {
    for (r, row) in job.rows.iter().enumerate() {
        for h in 0..job.heads {
            let at = |t: usize| row.pages[t / job.page_tokens] as usize * job.page_stride + job.offset + t % job.page_tokens * job.width;
            let q = &job.q[(r * job.heads + h) * job.width..][..job.width];
            let mut p: Vec<f32> = (0..row.visible).map(|t| dot(|i| q[i], |i| job.cache[at(t) + i], job.width) * job.scale).collect();
            softmax(&mut p);
            for d in 0..job.value_width {
                job.out[(r * job.heads + h) * job.value_width + d] = p.iter().enumerate().fold(0.0, |acc, (t, &p)| p.mul_add(job.cache[at(t) + d], acc));
            }
        }
    }
}
