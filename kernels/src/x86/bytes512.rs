//! Multiplication of bytes in registers of 512 bits: with VNNI, and without.
//!
//! Secret: the instructions. Knows the contract of [`Dot`], nothing of the algorithms.

use std::arch::x86_64::*;

use super::avx512::{Avx512, F32x16};
use crate::generic::int::{Dot, DotOp};

/// The capability to run AVX-512 code with VNNI: holding one proves that this machine has both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(pub(super) Avx512);

impl Vnni {
    pub(crate) fn new() -> Option<Vnni> {
        let avx512 = Avx512::new()?;
        is_x86_feature_detected!("avx512vnni").then_some(Vnni(avx512))
    }

    /// The capability that this one includes.
    pub(crate) fn avx512(self) -> Avx512 {
        self.0
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run_vnni(op) }
    }
}

impl Avx512 {
    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run_madd(op) }
    }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn run_vnni<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Dpbusd>() }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn run_madd<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Madd>() }
}

/// `vpdpbusd` takes unsigned weights as they are stored.
#[derive(Clone, Copy)]
pub(super) struct Dpbusd;

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; all loads are the
// unaligned ones.
impl Dot for Dpbusd {
    type Float = F32x16;
    type Sum = __m512i;
    type Weights = __m512i;
    type Word = __m512i;

    const ROWS: usize = 12;
    const PANELS: usize = 2;
    const OFFSET8: i32 = 128;
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [__m512i; 2] {
        // SAFETY: see the top of this impl.
        unsafe { nibbles(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_set1_epi32(p.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }

    #[inline(always)]
    unsafe fn float(sum: __m512i) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_cvtepi32_ps(sum)) }
    }
}

/// `vpmaddubsw` adds two products in 16 bits, where the magnitudes of weights (at most 127) times x fit.
#[derive(Clone, Copy)]
struct Madd;

// SAFETY, for every block below: as for `Dpbusd`.
impl Dot for Madd {
    type Float = F32x16;
    type Sum = __m512i;
    /// Magnitudes, and where the sign is to be turned.
    type Weights = (__m512i, __mmask64);
    type Word = __m512i;

    const ROWS: usize = 8;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 0;
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> (__m512i, __mmask64) {
        // SAFETY: see the top of this impl.
        unsafe {
            let signed = _mm512_xor_si512(_mm512_loadu_si512(p.cast()), _mm512_set1_epi8(-128));
            (_mm512_abs_epi8(signed), _mm512_movepi8_mask(signed))
        }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [(__m512i, __mmask64); 2] {
        // SAFETY: see the top of this impl.
        unsafe { nibbles(_mm512_loadu_si512(p.cast())).map(|w| (w, 0)) }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_set1_epi32(p.read_unaligned() as i32) }
    }

    #[inline(always)]
    unsafe fn dot(acc: __m512i, (w, turn): (__m512i, __mmask64), x: __m512i) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe {
            let x = _mm512_mask_sub_epi8(x, turn, _mm512_setzero_si512(), x);
            let pairs = _mm512_maddubs_epi16(w, x);
            let quads = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
            _mm512_add_epi32(acc, quads)
        }
    }

    #[inline(always)]
    unsafe fn float(sum: __m512i) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_cvtepi32_ps(sum)) }
    }
}

/// # Safety
/// The machine has AVX-512 BW.
#[inline(always)]
unsafe fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    // SAFETY: registers only.
    unsafe {
        let low = _mm512_set1_epi8(15);
        [
            _mm512_and_si512(bytes, low),
            _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low),
        ]
    }
}
