//! The leaf for AVX-512 F, BW, DQ and VL: one register is the 16 lanes.
//!
//! Secret: the instructions. Knows the contract of [`Lanes`], nothing of the algorithms.

use std::arch::x86_64::*;

use crate::generic::{LANES, Lanes, Op};

/// The capability to run AVX-512 code: holding one proves that this machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn new() -> Option<Avx512> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Avx512(()))
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn run<O: Op>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `Op::run` asks for.
    unsafe { op.run::<F32x16>() }
}

#[derive(Clone, Copy)]
pub(super) struct F32x16(pub(super) __m512);

// SAFETY, for every block below: the trait's contract gives the instruction set and 16 valid elements per pointer; all
// loads and stores are the unaligned ones.
impl Lanes for F32x16 {
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_set1_ps(x)) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_loadu_ps(p)) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            // As f16 the same bits stand for the value times 2^-8, subnormals included; 0x7f must become a NaN.
            let bytes = _mm_loadu_si128(p.cast());
            let largest = _mm_set1_epi8(0x7f);
            let nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, largest), largest);
            let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
            let half = _mm256_and_si256(wide, _mm256_set1_epi16(0xbf80u16 as i16));
            let value = _mm512_mask_cvtph_ps(_mm512_set1_ps(f32::NAN), !nan, half);
            F32x16(_mm512_mul_ps(value, _mm512_set1_ps(256.0)))
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
        unsafe { F32x16(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_add_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_sub_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_mul_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_div_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // The instruction gives its second operand unless the first is greater: the definition asked for.
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_max_ps(self.0, b.0)) }
    }

    #[inline(always)]
    unsafe fn clamp(self, lo: Self, hi: Self) -> Self {
        // The second operand wins on NaN, so `self` stands there.
        // SAFETY: see the top of this impl.
        unsafe { F32x16(_mm512_max_ps(lo.0, _mm512_min_ps(hi.0, self.0))) }
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, t: Self, magic: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let n = _mm512_sub_epi32(
                _mm512_castps_si512(t.0),
                _mm512_set1_epi32(magic.to_bits() as i32),
            );
            let half = _mm512_srai_epi32::<1>(n);
            let bias = _mm512_set1_epi32(127);
            let a = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
            let b = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_sub_epi32(n, half), bias));
            F32x16(_mm512_mul_ps(
                _mm512_mul_ps(self.0, _mm512_castsi512_ps(a)),
                _mm512_castsi512_ps(b),
            ))
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the top of this impl.
        unsafe {
            let eight = _mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            super::avx2::sum8(eight)
        }
    }

    #[inline(always)]
    unsafe fn sums(x: [Self; LANES]) -> Self {
        // Each step halves the lanes of every sum and packs two registers into one: the tree of `sum`, for all at once.
        // SAFETY: see the top of this impl.
        unsafe {
            let mut eight = [_mm512_setzero_ps(); 8];
            for i in 0..8 {
                // Registers i and i + 8 meet, so that after all steps sum i stands in lane i.
                let (a, b) = (x[i].0, x[i + 8].0);
                let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
                let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b);
                eight[i] = _mm512_add_ps(low, high);
            }
            let mut four = [_mm512_setzero_ps(); 4];
            for i in 0..4 {
                let (a, b) = (eight[i], eight[i + 4]);
                let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                // Quarters now stand for i, i + 8, i + 4, i + 12.
                four[i] = _mm512_add_ps(low, high);
            }
            let mut two = [_mm512_setzero_ps(); 2];
            for i in 0..2 {
                let (a, b) = (four[i], four[i + 2]);
                let low = _mm512_shuffle_ps::<0b01_00_01_00>(a, b);
                let high = _mm512_shuffle_ps::<0b11_10_11_10>(a, b);
                two[i] = _mm512_add_ps(low, high);
            }
            let low = _mm512_shuffle_ps::<0b10_00_10_00>(two[0], two[1]);
            let high = _mm512_shuffle_ps::<0b11_01_11_01>(two[0], two[1]);
            // Lane 4 q + e holds the sum of x[[0, 8, 4, 12][q] + [0, 2, 1, 3][e]].
            let mixed = _mm512_add_ps(low, high);
            let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
            F32x16(_mm512_permutexvar_ps(order, mixed))
        }
    }
}
