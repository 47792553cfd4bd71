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
    unsafe { op.run::<Dpbusd>() }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_madd<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Madd>() }
}

/// Rows 0 to 7 and rows 8 to 15.
type Two = [__m256i; 2];

/// `vpdpbusd` takes unsigned weights as they are stored.
#[derive(Clone, Copy)]
struct Dpbusd;

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; all loads are the
// unaligned ones.
impl Dot for Dpbusd {
    type Float = F32x16;
    type Sum = Two;
    type Weights = Two;
    type Word = __m256i;

    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 128;
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> Two {
        // SAFETY: see the top of this impl.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> Two {
        // SAFETY: see the top of this impl.
        unsafe { load(p) }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [Two; 2] {
        // SAFETY: see the top of this impl.
        unsafe { nibbles(load(p)) }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> __m256i {
        // SAFETY: see the top of this impl.
        unsafe { _mm256_set1_epi32(p.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: Two, w: Two, x: __m256i) -> Two {
        // SAFETY: see the top of this impl.
        unsafe {
            [
                _mm256_dpbusd_avx_epi32(acc[0], w[0], x),
                _mm256_dpbusd_avx_epi32(acc[1], w[1], x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn float(sum: Two) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe { float(sum) }
    }
}

/// `vpmaddubsw` adds two products in 16 bits, where the magnitudes of weights (at most 127) times x fit.
#[derive(Clone, Copy)]
struct Madd;

/// Magnitudes, and what has their signs.
#[derive(Clone, Copy)]
struct Signed {
    magnitude: Two,
    sign: Two,
}

// SAFETY, for every block below: as for `Dpbusd`.
impl Dot for Madd {
    type Float = F32x16;
    type Sum = Two;
    type Weights = Signed;
    type Word = __m256i;

    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 0;
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> Two {
        // SAFETY: see the top of this impl.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> Signed {
        // SAFETY: see the top of this impl.
        unsafe {
            let turn = _mm256_set1_epi8(-128);
            let [a, b] = load(p);
            let sign = [_mm256_xor_si256(a, turn), _mm256_xor_si256(b, turn)];
            Signed {
                magnitude: [_mm256_abs_epi8(sign[0]), _mm256_abs_epi8(sign[1])],
                sign,
            }
        }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [Signed; 2] {
        // SAFETY: see the top of this impl.
        unsafe {
            // All of them positive.
            let sign = [_mm256_set1_epi8(1); 2];
            nibbles(load(p)).map(|magnitude| Signed { magnitude, sign })
        }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> __m256i {
        // SAFETY: see the top of this impl.
        unsafe { _mm256_set1_epi32(p.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: Two, w: Signed, x: __m256i) -> Two {
        // SAFETY: see the top of this impl.
        unsafe {
            [
                madd(acc[0], w.magnitude[0], _mm256_sign_epi8(x, w.sign[0])),
                madd(acc[1], w.magnitude[1], _mm256_sign_epi8(x, w.sign[1])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn float(sum: Two) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe { float(sum) }
    }
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

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn float(sum: Two) -> F32x16 {
    // SAFETY: registers only.
    unsafe { F32x16(_mm256_cvtepi32_ps(sum[0]), _mm256_cvtepi32_ps(sum[1])) }
}
