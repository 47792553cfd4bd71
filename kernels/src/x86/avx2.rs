//! The leaf for AVX2 with FMA and F16C: two registers are the 16 lanes.
//!
//! Secret: the instructions. Knows the contract of [`Lanes`], nothing of the algorithms.

use std::arch::x86_64::*;

use crate::generic::{Lanes, Op};

/// The capability to run AVX2 code: holding one proves that this machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn new() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run(op) }
    }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run<O: Op>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `Op::run` asks for.
    unsafe { op.run::<F32x16>() }
}

/// The last three levels of the tree.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn sum8(eight: __m256) -> f32 {
    // SAFETY: registers only, and AVX by the caller's promise.
    unsafe {
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps::<1>(eight),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

#[derive(Clone, Copy)]
pub(super) struct F32x16(pub(super) __m256, pub(super) __m256);

// SAFETY, for every block below: the trait's contract gives the instruction set and 16 valid elements per pointer; all
// loads and stores are the unaligned ones.
impl Lanes for F32x16 {
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the top of this impl.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            F32x16(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            // As f16 the same bits stand for the value times 2^-8, subnormals included; 0x7f must become a NaN.
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            let half = _mm256_and_si256(wide, _mm256_set1_epi16(0xbf80u16 as i16));
            let largest = _mm256_set1_epi16(0x3f80);
            let nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, largest), largest);
            let half = _mm256_or_si256(half, nan);
            let times = _mm256_set1_ps(256.0);
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half));
            F32x16(_mm256_mul_ps(low, times), _mm256_mul_ps(high, times))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            F32x16(
                _mm256_fmadd_ps(self.0, b.0, c.0),
                _mm256_fmadd_ps(self.1, b.1, c.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // The instruction gives its second operand unless the first is greater: the definition asked for.
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn clamp(self, lo: Self, hi: Self) -> Self {
        // The second operand wins on NaN, so `self` stands there.
        // SAFETY: see the top of this impl.
        unsafe {
            F32x16(
                _mm256_max_ps(lo.0, _mm256_min_ps(hi.0, self.0)),
                _mm256_max_ps(lo.1, _mm256_min_ps(hi.1, self.1)),
            )
        }
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, t: Self, magic: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(scale8(self.0, t.0, magic), scale8(self.1, t.1, magic)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the top of this impl.
        unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
    }
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn scale8(x: __m256, t: __m256, magic: f32) -> __m256 {
    // SAFETY: registers only, and AVX2 by the caller's promise.
    unsafe {
        let n = _mm256_sub_epi32(
            _mm256_castps_si256(t),
            _mm256_set1_epi32(magic.to_bits() as i32),
        );
        let half = _mm256_srai_epi32::<1>(n);
        let bias = _mm256_set1_epi32(127);
        let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
        _mm256_mul_ps(
            _mm256_mul_ps(x, _mm256_castsi256_ps(a)),
            _mm256_castsi256_ps(b),
        )
    }
}
