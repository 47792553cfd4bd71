//! Products of pairs of bf16 in registers of 512 bits.
//!
//! Secret: the instructions. Knows the contract of [`PairDot`], nothing of the algorithms. A machine is taken for one with
//! them only after its products have been held against plain Rust.

use std::{arch::x86_64::*, mem, sync::OnceLock};

use super::avx512::F32x16;
use crate::generic::pairs::{PairDot, PairOp, e4m3_bits};

/// The capability to run AVX-512 code with BF16 and VBMI: holding one proves that this machine has all of it, and that
/// the products were right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16(());

impl Bf16 {
    /// `right` holds the products of a candidate against the rule; it is asked once per process.
    ///
    /// # Errors
    /// Why this machine is not one.
    pub(crate) fn new(right: impl FnOnce(Bf16) -> bool) -> Result<Bf16, String> {
        static PROVEN: OnceLock<Result<Bf16, String>> = OnceLock::new();
        PROVEN
            .get_or_init(|| {
                let has = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vbmi");
                if !has {
                    return Err("the processor must have avx512bf16 and avx512vbmi".into());
                }
                if !right(Bf16(())) {
                    return Err("its products are not those of the rule".into());
                }
                Ok(Bf16(()))
            })
            .clone()
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_pairs<O: PairOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run(op) }
    }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
unsafe fn run<O: PairOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `PairOp::run` asks for.
    unsafe { op.run::<Dpbf16>() }
}

#[derive(Clone, Copy)]
pub(super) struct Dpbf16;

/// The upper and the lower bytes of the bf16 of every e4m3 byte without its sign.
#[repr(C, align(64))]
struct Tables {
    upper: [[u8; 64]; 2],
    lower: [[u8; 64]; 2],
}

static TABLES: Tables = {
    let mut tables = Tables {
        upper: [[0; 64]; 2],
        lower: [[0; 64]; 2],
    };
    let mut byte = 0;
    while byte < 128 {
        let [lower, upper] = e4m3_bits(byte as u8).to_le_bytes();
        tables.upper[byte / 64][byte % 64] = upper;
        tables.lower[byte / 64][byte % 64] = lower;
        byte += 1;
    }
    tables
};

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; all loads and stores
// are the unaligned ones.
impl PairDot for Dpbf16 {
    type Float = F32x16;
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn load(p: *const u16) -> __m512i {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_some(p: *const u16, n: usize) -> __m512i {
        let some = ((1u64 << n) - 1) as __mmask32;
        // SAFETY: see the top of this impl; a masked load reads the `n <= 32` elements alone.
        unsafe { _mm512_maskz_loadu_epi16(some, p.cast()) }
    }

    #[inline(always)]
    unsafe fn store(pairs: __m512i, p: *mut u16) {
        // SAFETY: see the top of this impl.
        unsafe { _mm512_storeu_si512(p.cast(), pairs) }
    }

    #[inline(always)]
    unsafe fn widen(p: *const u8) -> [__m512i; 2] {
        // SAFETY: see the top of this impl.
        unsafe { widened(_mm512_loadu_si512(p.cast())) }
    }

    #[inline(always)]
    unsafe fn widen_some(p: *const u8, n: usize) -> [__m512i; 2] {
        let some = u64::MAX.unbounded_shr(64 - n as u32);
        // SAFETY: see the top of this impl; a masked load reads the `n <= 64` bytes alone.
        unsafe { widened(_mm512_maskz_loadu_epi8(some, p.cast())) }
    }

    #[inline(always)]
    unsafe fn dot(acc: F32x16, a: __m512i, b: __m512i) -> F32x16 {
        // SAFETY: see the top of this impl; as many bits, and every pattern is a value.
        unsafe {
            let (a, b) = (
                mem::transmute::<__m512i, __m512bh>(a),
                mem::transmute::<__m512i, __m512bh>(b),
            );
            F32x16(_mm512_dpbf16_ps(acc.0, a, b))
        }
    }
}

/// 64 e4m3 bytes as bf16.
///
/// # Safety
/// The machine has AVX-512 BW and VBMI.
#[inline(always)]
unsafe fn widened(bytes: __m512i) -> [__m512i; 2] {
    // SAFETY: registers, and tables of 64 bytes.
    unsafe {
        let table = |half: &[u8; 64]| _mm512_loadu_si512(half.as_ptr().cast());
        // Unpacking works inside quarters: each gets eight bytes of the first half and eight of the second.
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm512_permutexvar_epi64(order, bytes);
        let [first, second] = &TABLES.upper;
        let upper = _mm512_permutex2var_epi8(table(first), bytes, table(second));
        let [first, second] = &TABLES.lower;
        let lower = _mm512_permutex2var_epi8(table(first), bytes, table(second));
        // upper | bytes & sign
        let upper = _mm512_ternarylogic_epi32::<0xf8>(upper, bytes, _mm512_set1_epi8(-128));
        [
            _mm512_unpacklo_epi8(lower, upper),
            _mm512_unpackhi_epi8(lower, upper),
        ]
    }
}
