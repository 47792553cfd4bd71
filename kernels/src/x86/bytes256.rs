//! Multiplication of bytes in registers of 256 bits: with AVX-VNNI, and without.
//!
//! Secret: the instructions. Knows the contract of [`Dot`], nothing of the algorithms.

use std::arch::x86_64::*;

use super::avx2::{Avx2, F32x16};
use crate::generic::int::{Dot, DotOp};

/// The capability to run AVX2 code with AVX-VNNI: holding one proves that this machine has both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(Avx2);

impl AvxVnni {
    pub(crate) fn new() -> Option<AvxVnni> {
        let avx2 = Avx2::new()?;
        is_x86_feature_detected!("avxvnni").then_some(AvxVnni(avx2))
    }

    /// The capability that this one includes.
    pub(crate) fn avx2(self) -> Avx2 {
        self.0
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run_vnni(op) }
    }
}

impl Avx2 {
    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run_madd(op) }
    }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn run_vnni<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Bytes<true>>() }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_madd<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Bytes<false>>() }
}

/// Rows 0 to 7 and rows 8 to 15.
type Two = [__m256i; 2];

/// With `VNNI`, `vpdpbusd` takes unsigned weights as they are stored. Without, `vpmaddubsw` adds two products in 16 bits,
/// where the magnitudes of weights (at most 127) times x fit.
#[derive(Clone, Copy)]
struct Bytes<const VNNI: bool>;

/// Weights without sign, and what has their signs where those are needed.
#[derive(Clone, Copy)]
struct Weights {
    unsigned: Two,
    sign: Two,
}

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; all loads are the
// unaligned ones.
impl<const VNNI: bool> Dot for Bytes<VNNI> {
    type Float = F32x16;
    type Sum = Two;
    type Weights = Weights;
    type Word = __m256i;

    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const OFFSET8: i32 = if VNNI { 128 } else { 0 };
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> Two {
        // SAFETY: see the top of this impl.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> Weights {
        // SAFETY: see the top of this impl.
        unsafe {
            let stored = load(p);
            if VNNI {
                return positive(stored);
            }
            let [a, b] = stored;
            let turn = _mm256_set1_epi8(-128);
            let sign = [_mm256_xor_si256(a, turn), _mm256_xor_si256(b, turn)];
            let unsigned = [_mm256_abs_epi8(sign[0]), _mm256_abs_epi8(sign[1])];
            Weights { unsigned, sign }
        }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [Weights; 2] {
        // SAFETY: see the top of this impl.
        unsafe {
            let [low, high] = nibbles(load(p));
            [positive(low), positive(high)]
        }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> __m256i {
        // SAFETY: see the top of this impl.
        unsafe { _mm256_set1_epi32(p.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: Two, w: Weights, x: __m256i) -> Two {
        // SAFETY: see the top of this impl.
        unsafe {
            let mut sum = acc;
            for i in 0..2 {
                sum[i] = if VNNI {
                    _mm256_dpbusd_avx_epi32(acc[i], w.unsigned[i], x)
                } else {
                    madd(acc[i], w.unsigned[i], _mm256_sign_epi8(x, w.sign[i]))
                };
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn float(sum: Two) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_cvtepi32_ps(sum[0]), _mm256_cvtepi32_ps(sum[1])) }
    }
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn positive(unsigned: Two) -> Weights {
    // SAFETY: registers only.
    let sign = unsafe { [_mm256_set1_epi8(1); 2] };
    Weights { unsigned, sign }
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn madd(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: registers only.
    unsafe {
        let pairs = _mm256_maddubs_epi16(w, x);
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// # Safety
/// The machine has AVX2, and `p` is valid for 64 bytes.
#[inline(always)]
unsafe fn load(p: *const u8) -> Two {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm256_loadu_si256(p.cast()),
            _mm256_loadu_si256(p.add(32).cast()),
        ]
    }
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn nibbles([a, b]: Two) -> [Two; 2] {
    // SAFETY: registers only.
    unsafe {
        let low = _mm256_set1_epi8(15);
        [
            [_mm256_and_si256(a, low), _mm256_and_si256(b, low)],
            [
                _mm256_and_si256(_mm256_srli_epi16::<4>(a), low),
                _mm256_and_si256(_mm256_srli_epi16::<4>(b), low),
            ],
        ]
    }
}
