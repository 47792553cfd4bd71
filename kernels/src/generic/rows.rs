//! Row-wise operations: norm, exp and what is built on it, sums.
//!
//! Secret: the polynomial of exp. Elements are independent or folded by the 16-lane rule.

use super::{LANES, Lanes, Op, load_part, store_part};

/// Adding and subtracting it rounds an f32 below 2²² to an integer, which then sits in the low bits.
const MAGIC: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has few enough bits for `n * LN2_HIGH` to be exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// e^x within 2 ulp: `x = n ln 2 + r`, then the Taylor series of e^r to r⁷ (its remainder is below 6e-9 for
/// |r| <= ln 2 / 2), then the exponent in two steps so that subnormal results round once.
/// Above 88.73 it is +inf, below -103.98 zero; NaN stays NaN.
#[inline(always)]
pub(crate) unsafe fn exp<V: Lanes>(x: V) -> V {
    // SAFETY: registers only.
    unsafe {
        let x = x.clamp(V::splat(-104.0), V::splat(89.0));
        let t = x.fma(V::splat(std::f32::consts::LOG2_E), V::splat(MAGIC));
        let n = t.sub(V::splat(MAGIC));
        let r = n.fma(V::splat(-LN2_HIGH), x);
        let r = n.fma(V::splat(-LN2_LOW), r);
        let mut p = V::splat(1.0 / 5040.0);
        p = p.fma(r, V::splat(1.0 / 720.0));
        p = p.fma(r, V::splat(1.0 / 120.0));
        p = p.fma(r, V::splat(1.0 / 24.0));
        p = p.fma(r, V::splat(1.0 / 6.0));
        p = p.fma(r, V::splat(0.5));
        p = p.fma(r, V::splat(1.0));
        p = p.fma(r, V::splat(1.0));
        p.scale_by_exponent(t, MAGIC)
    }
}

/// `1 + e^-x`
#[inline(always)]
unsafe fn one_plus_exp_neg<V: Lanes>(x: V) -> V {
    // SAFETY: registers only.
    unsafe { V::splat(1.0).add(exp(V::splat(0.0).sub(x))) }
}

/// A function of one element.
///
/// # Safety
/// Of the method: the machine has the instruction set of `V`.
pub(crate) trait Map {
    unsafe fn map<V: Lanes>(&self, x: V) -> V;
}

/// Applies a [`Map`] in place.
pub(crate) struct Each<'a, M>(pub(crate) &'a mut [f32], pub(crate) M);

impl<M: Map> Op for Each<'_, M> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for chunk in self.0.chunks_mut(LANES) {
            // SAFETY: a chunk holds `chunk.len() <= 16` elements, and `whole` is only used on full ones.
            unsafe {
                if chunk.len() == LANES {
                    self.1
                        .map(V::load(chunk.as_ptr()))
                        .store(chunk.as_mut_ptr());
                } else {
                    store_part(
                        self.1.map(load_part::<V>(chunk.as_ptr(), chunk.len())),
                        chunk.as_mut_ptr(),
                        chunk.len(),
                    );
                }
            }
        }
    }
}

/// e^x.
#[derive(Clone, Copy)]
pub(crate) struct Exp;

impl Map for Exp {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, x: V) -> V {
        // SAFETY: registers only.
        unsafe { exp(x) }
    }
}

/// 1 / (1 + e^-x).
#[derive(Clone, Copy)]
pub(crate) struct Sigmoid;

impl Map for Sigmoid {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, x: V) -> V {
        // SAFETY: registers only.
        unsafe { V::splat(1.0).div(one_plus_exp_neg(x)) }
    }
}

/// A function of two elements.
///
/// # Safety
/// Of the method: the machine has the instruction set of `V`.
pub(crate) trait Map2 {
    unsafe fn map<V: Lanes>(&self, a: V, b: V) -> V;
}

/// Applies a [`Map2`], the result replacing the first; both of one length.
pub(crate) struct Both<'a, M>(pub(crate) &'a mut [f32], pub(crate) &'a [f32], pub(crate) M);

impl<M: Map2> Op for Both<'_, M> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        for (a, b) in self.0.chunks_mut(LANES).zip(self.1.chunks(LANES)) {
            let n = a.len().min(b.len());
            // SAFETY: both chunks hold `n` elements, and 16 where full loads are used.
            unsafe {
                if n == LANES {
                    self.2
                        .map(V::load(a.as_ptr()), V::load(b.as_ptr()))
                        .store(a.as_mut_ptr());
                } else {
                    let r = self
                        .2
                        .map(load_part::<V>(a.as_ptr(), n), load_part(b.as_ptr(), n));
                    store_part(r, a.as_mut_ptr(), n);
                }
            }
        }
    }
}

/// `silu(a) * b`, with `silu(a) = a / (1 + e^-a)`.
#[derive(Clone, Copy)]
pub(crate) struct SiluMul;

impl Map2 for SiluMul {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, a: V, b: V) -> V {
        // SAFETY: registers only.
        unsafe { a.div(one_plus_exp_neg(a)).mul(b) }
    }
}

/// `a + b`.
#[derive(Clone, Copy)]
pub(crate) struct Add;

impl Map2 for Add {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, a: V, b: V) -> V {
        // SAFETY: registers only.
        unsafe { a.add(b) }
    }
}

/// `fma(w, b, a)`.
#[derive(Clone, Copy)]
pub(crate) struct Fma(pub(crate) f32);

impl Map2 for Fma {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, a: V, b: V) -> V {
        // SAFETY: registers only.
        unsafe { b.fma(V::splat(self.0), a) }
    }
}

/// The largest element; NaN is passed over, nothing gives -inf.
#[inline(always)]
pub(crate) unsafe fn max<V: Lanes>(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    // SAFETY: a chunk holds 16 elements.
    unsafe {
        let mut acc = V::splat(f32::NEG_INFINITY);
        for chunk in chunks {
            acc = V::load(chunk.as_ptr()).max(acc);
        }
        acc.store(lanes.as_mut_ptr());
    }
    // Which of several equal maxima is kept shows only in the sign of a zero, and `x - max` hides that.
    let mut max = f32::NEG_INFINITY;
    for &x in lanes.iter().chain(rest) {
        if x > max {
            max = x;
        }
    }
    max
}

/// Replaces x by `e^(x - max)` and returns their sum by the 16-lane rule.
#[inline(always)]
unsafe fn exp_and_sum<V: Lanes>(x: &mut [f32], max: f32) -> f32 {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    // SAFETY: a chunk holds 16 elements, the rest fewer.
    unsafe {
        let shift = V::splat(max);
        let mut acc = V::splat(0.0);
        for chunk in chunks {
            let e = exp(V::load(chunk.as_ptr()).sub(shift));
            e.store(chunk.as_mut_ptr());
            acc = acc.add(e);
        }
        if !rest.is_empty() {
            store_part(
                exp(load_part::<V>(rest.as_ptr(), rest.len()).sub(shift)),
                rest.as_mut_ptr(),
                rest.len(),
            );
            acc = acc.add(load_part(rest.as_ptr(), rest.len()));
        }
        acc.sum()
    }
}

/// Softmax of one row: `e^(x - max)`, times the reciprocal of their sum.
#[inline(always)]
unsafe fn softmax<V: Lanes>(x: &mut [f32]) {
    // SAFETY: the instruction set is the caller's promise.
    unsafe {
        let max = max::<V>(x);
        let sum = exp_and_sum::<V>(x, max);
        Each(x, Times(1.0 / sum)).run::<V>();
    }
}

struct Times(f32);

impl Map for Times {
    #[inline(always)]
    unsafe fn map<V: Lanes>(&self, x: V) -> V {
        // SAFETY: registers only.
        unsafe { x.mul(V::splat(self.0)) }
    }
}

/// [`softmax`] as an operation.
pub(crate) struct Softmax<'a>(pub(crate) &'a mut [f32]);

impl Op for Softmax<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: handed through.
        unsafe { softmax::<V>(self.0) }
    }
}

/// The largest element and the sum of `e^(x - max)` by the 16-lane rule.
pub(crate) struct MaxAndSum<'a>(pub(crate) &'a [f32]);

impl Op for MaxAndSum<'_> {
    type Out = (f32, f32);

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> (f32, f32) {
        // SAFETY: as for `exp_and_sum`; the padding of the last chunk is cleared before it is added.
        unsafe {
            let max = max::<V>(self.0);
            let (chunks, rest) = self.0.as_chunks::<LANES>();
            let shift = V::splat(max);
            let mut acc = V::splat(0.0);
            for chunk in chunks {
                acc = acc.add(exp(V::load(chunk.as_ptr()).sub(shift)));
            }
            if !rest.is_empty() {
                let mut last = [0.0f32; LANES];
                store_part(
                    exp(load_part::<V>(rest.as_ptr(), rest.len()).sub(shift)),
                    last.as_mut_ptr(),
                    rest.len(),
                );
                acc = acc.add(V::load(last.as_ptr()));
            }
            (max, acc.sum())
        }
    }
}

/// `x / sqrt(mean(x²) + eps) * weight`, each row of `weight.len()`.
pub(crate) struct RmsNorm<'a> {
    pub(crate) out: &'a mut [f32],
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
}

impl Op for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let n = self.weight.len();
        for (out, x) in self.out.chunks_exact_mut(n).zip(self.x.chunks_exact(n)) {
            let (chunks, rest) = x.as_chunks::<LANES>();
            // SAFETY: a chunk holds 16 elements, the rest fewer; `out`, `x` and `weight` are all `n` long.
            unsafe {
                let mut acc = V::splat(0.0);
                for chunk in chunks {
                    let x = V::load(chunk.as_ptr());
                    acc = x.fma(x, acc);
                }
                if !rest.is_empty() {
                    let x = load_part::<V>(rest.as_ptr(), rest.len());
                    acc = x.fma(x, acc);
                }
                let mean = acc.sum() / n as f32;
                let scale = V::splat(1.0 / (mean + self.eps).sqrt());
                let whole = n / LANES * LANES;
                for at in (0..whole).step_by(LANES) {
                    let y = V::load(x.as_ptr().add(at)).mul(scale);
                    y.mul(V::load(self.weight.as_ptr().add(at)))
                        .store(out.as_mut_ptr().add(at));
                }
                if whole < n {
                    let y = load_part::<V>(x.as_ptr().add(whole), n - whole).mul(scale);
                    let y = y.mul(load_part(self.weight.as_ptr().add(whole), n - whole));
                    store_part(y, out.as_mut_ptr().add(whole), n - whole);
                }
            }
        }
    }
}
