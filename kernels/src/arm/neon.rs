//! The leaf for AArch64 Advanced SIMD: four registers are the 16 lanes.
//!
//! Secret: the instructions. Knows the contract of [`Lanes`], nothing of the algorithms.

#![allow(
    unused_unsafe,
    reason = "NEON belongs to the base target, where the compiler takes register-only intrinsics for safe"
)]

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};

use crate::generic::{Lanes, Op};

/// The capability to run NEON code: holding one proves that this machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn new() -> Option<Neon> {
        is_aarch64_feature_detected!("neon").then_some(Neon(()))
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: `self` exists, so `new` has seen the feature on this machine; the rest is the caller's promise.
        unsafe { run(op) }
    }
}

/// # Safety
/// The machine has the feature named, and what `O` asks for besides holds.
#[target_feature(enable = "neon")]
unsafe fn run<O: Op>(op: O) -> O::Out {
    // SAFETY: the caller's promise is the one `Op::run` asks for.
    unsafe { op.run::<F32x16>() }
}

#[derive(Clone, Copy)]
pub(super) struct F32x16(
    pub(super) float32x4_t,
    pub(super) float32x4_t,
    pub(super) float32x4_t,
    pub(super) float32x4_t,
);

/// One intrinsic over the four registers of each argument.
macro_rules! lanewise {
    ($f:ident, $a:expr, $b:expr) => {
        F32x16(
            $f($a.0, $b.0),
            $f($a.1, $b.1),
            $f($a.2, $b.2),
            $f($a.3, $b.3),
        )
    };
    ($f:ident, $a:expr, $b:expr, $c:expr) => {
        F32x16(
            $f($a.0, $b.0, $c.0),
            $f($a.1, $b.1, $c.1),
            $f($a.2, $b.2, $c.2),
            $f($a.3, $b.3, $c.3),
        )
    };
}

// SAFETY, for every block below: the trait's contract gives the instruction set and 16 valid elements per pointer; NEON
// loads and stores need the alignment of the element only, and the u8 and u16 forms are used on u8 and u16.
impl Lanes for F32x16 {
    const REGISTERS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let v = vdupq_n_f32(x);
            F32x16(v, v, v, v)
        }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            F32x16(
                vld1q_f32(p),
                vld1q_f32(p.add(4)),
                vld1q_f32(p.add(8)),
                vld1q_f32(p.add(12)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the top of this impl.
        unsafe {
            vst1q_f32(p, self.0);
            vst1q_f32(p.add(4), self.1);
            vst1q_f32(p.add(8), self.2);
            vst1q_f32(p.add(12), self.3);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let (a, b) = (vld1q_u16(p), vld1q_u16(p.add(8)));
            F32x16(
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vget_low_u16(a)))),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vget_high_u16(a)))),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vget_low_u16(b)))),
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vget_high_u16(b)))),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            let bytes = vld1q_u8(p);
            let (a, b) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
            F32x16(
                e4m3(vmovl_u16(vget_low_u16(a))),
                e4m3(vmovl_u16(vget_high_u16(a))),
                e4m3(vmovl_u16(vget_low_u16(b))),
                e4m3(vmovl_u16(vget_high_u16(b))),
            )
        }
    }

    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch hint faults on no address and writes nothing.
        unsafe {
            asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nostack, preserves_flags, readonly))
        }
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // `vfmaq(c, a, b)` is `a * b + c`, rounded once.
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(vfmaq_f32, c, self, b) }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(vaddq_f32, self, b) }
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(vsubq_f32, self, b) }
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(vmulq_f32, self, b) }
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(vdivq_f32, self, b) }
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the top of this impl.
        unsafe { lanewise!(greater, self, b) }
    }

    #[inline(always)]
    unsafe fn clamp(self, lo: Self, hi: Self) -> Self {
        // `vmin` and `vmax` hand NaN on.
        // SAFETY: see the top of this impl.
        unsafe {
            let low = lanewise!(vminq_f32, self, hi);
            lanewise!(vmaxq_f32, low, lo)
        }
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, t: Self, magic: f32) -> Self {
        // SAFETY: see the top of this impl.
        unsafe {
            F32x16(
                scale4(self.0, t.0, magic),
                scale4(self.1, t.1, magic),
                scale4(self.2, t.2, magic),
                scale4(self.3, t.3, magic),
            )
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the top of this impl.
        unsafe {
            let four = vaddq_f32(vaddq_f32(self.0, self.2), vaddq_f32(self.1, self.3));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
}

/// `a` where `a > b`, else `b`. (`vmaxnm` would turn a signalling NaN into a NaN.)
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: registers only.
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

/// Four e4m3 bytes in 32-bit lanes, widened exactly.
///
/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn e4m3(bytes: uint32x4_t) -> float32x4_t {
    // SAFETY: registers only.
    unsafe {
        let magnitude = vandq_u32(bytes, vdupq_n_u32(0x7f));
        let sign = vshlq_n_u32::<24>(vandq_u32(bytes, vdupq_n_u32(0x80)));
        // The difference of the exponent biases is 120; the product renormalises subnormals exactly.
        let value = vmulq_f32(
            vreinterpretq_f32_u32(vshlq_n_u32::<20>(magnitude)),
            vdupq_n_f32(f32::from_bits((127 + 120) << 23)),
        );
        let nan = vceqq_u32(magnitude, vdupq_n_u32(0x7f));
        vreinterpretq_f32_u32(vorrq_u32(
            vorrq_u32(vreinterpretq_u32_f32(value), sign),
            nan,
        ))
    }
}

/// # Safety
/// The machine has NEON.
#[inline(always)]
unsafe fn scale4(x: float32x4_t, t: float32x4_t, magic: f32) -> float32x4_t {
    // SAFETY: registers only.
    unsafe {
        let n = vsubq_s32(
            vreinterpretq_s32_f32(t),
            vdupq_n_s32(magic.to_bits() as i32),
        );
        let half = vshrq_n_s32::<1>(n);
        let bias = vdupq_n_s32(127);
        let a = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(half, bias)));
        let b = vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vsubq_s32(n, half), bias)));
        vmulq_f32(vmulq_f32(x, a), b)
    }
}
