//! Multiplication of bytes on AArch64: with `sdot`, and without.
//!
//! Secret: the instructions. Knows the contract of [`Dot`], nothing of the algorithms.

#![allow(
    unused_unsafe,
    reason = "NEON belongs to the base target, where the compiler takes register-only intrinsics for safe"
)]

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use super::neon::{F32x16, Neon};
use crate::generic::int::{Dot, DotOp};

/// The capability to run NEON code with `sdot`: holding one proves that this machine has both.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NeonDot(Neon);

impl NeonDot {
    pub(crate) fn new() -> Option<NeonDot> {
        let neon = Neon::new()?;
        is_aarch64_feature_detected!("dotprod").then_some(NeonDot(neon))
    }

    /// The capability that this one includes.
    pub(crate) fn neon(self) -> Neon {
        self.0
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen these features on this machine; the rest is the caller's promise.
        unsafe { run_sdot(op) }
    }
}

impl Neon {
    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen the feature on this machine; the rest is the caller's promise.
        unsafe { run_mull(op) }
    }
}

/// # Safety
/// The machine has the features named, and what `O` asks for besides holds.
#[target_feature(enable = "neon,dotprod")]
unsafe fn run_sdot<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Bytes<true>>() }
}

/// # Safety
/// The machine has the feature named, and what `O` asks for besides holds.
#[target_feature(enable = "neon")]
unsafe fn run_mull<O: DotOp>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `DotOp::run` asks for.
    unsafe { op.run::<Bytes<false>>() }
}

/// Signed bytes on both sides, by `sdot` or by long multiplications.
#[derive(Clone, Copy)]
struct Bytes<const SDOT: bool>;

/// Four rows in each.
type Four<T> = [T; 4];

// SAFETY, for every block below: the trait's contract gives the instruction set and valid pointers; NEON loads of bytes
// need no alignment.
impl<const SDOT: bool> Dot for Bytes<SDOT> {
    type Float = F32x16;
    type Sum = Four<int32x4_t>;
    type Weights = Four<int8x16_t>;
    type Word = int8x16_t;

    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 0;
    const OFFSET4: i32 = 8;

    #[inline(always)]
    unsafe fn sum(x: i32) -> Four<int32x4_t> {
        // SAFETY: see the top of this impl.
        unsafe { [vdupq_n_s32(x); 4] }
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> Four<int8x16_t> {
        // SAFETY: see the top of this impl.
        unsafe { load(p).map(|w| vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128)))) }
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [Four<int8x16_t>; 2] {
        // SAFETY: see the top of this impl.
        unsafe {
            let bytes = load(p);
            [
                bytes.map(|w| vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)))),
                bytes.map(|w| vreinterpretq_s8_u8(vshrq_n_u8::<4>(w))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> int8x16_t {
        // SAFETY: see the top of this impl.
        unsafe { vreinterpretq_s8_u32(vdupq_n_u32(p.read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn dot(mut acc: Four<int32x4_t>, w: Four<int8x16_t>, x: int8x16_t) -> Four<int32x4_t> {
        for i in 0..4 {
            // SAFETY: see the top of this impl.
            acc[i] = unsafe {
                if SDOT {
                    sdot(acc[i], w[i], x)
                } else {
                    // Two products of at most 128 * 127 fit 16 bits.
                    let low = vmull_s8(vget_low_s8(w[i]), vget_low_s8(x));
                    let high = vmull_s8(vget_high_s8(w[i]), vget_high_s8(x));
                    vpadalq_s16(acc[i], vpaddq_s16(low, high))
                }
            };
        }
        acc
    }

    #[inline(always)]
    unsafe fn float(s: Four<int32x4_t>) -> F32x16 {
        // SAFETY: see the top of this impl.
        unsafe {
            F32x16(
                vcvtq_f32_s32(s[0]),
                vcvtq_f32_s32(s[1]),
                vcvtq_f32_s32(s[2]),
                vcvtq_f32_s32(s[3]),
            )
        }
    }
}

/// # Safety
/// The machine has NEON, and `p` is valid for 64 bytes.
#[inline(always)]
unsafe fn load(p: *const u8) -> Four<uint8x16_t> {
    // SAFETY: the caller's promise.
    unsafe {
        [
            vld1q_u8(p),
            vld1q_u8(p.add(16)),
            vld1q_u8(p.add(32)),
            vld1q_u8(p.add(48)),
        ]
    }
}

/// # Safety
/// The machine has the instruction `sdot`.
#[inline(always)]
unsafe fn sdot(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the intrinsic is not stable yet.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}
