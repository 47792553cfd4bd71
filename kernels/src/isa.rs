//! The one choice of an instruction set.
//!
//! Secret: which leaves exist for this architecture and how one is proven to be usable.

#[cfg(target_arch = "aarch64")]
use crate::arm::neon::Neon;
#[cfg(target_arch = "x86_64")]
use crate::x86::{avx2::Avx2, avx512::Avx512};
use crate::{
    generic::{Op, int::DotOp},
    portable::Portable,
};

/// An instruction set the kernels have a leaf for. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AArch64 Advanced SIMD.
    Neon,
    /// Plain Rust: any machine.
    Portable,
}

impl Isa {
    /// What this machine can run, best first; never empty.
    pub fn available() -> Vec<Isa> {
        let all = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];
        all.into_iter()
            .filter(|&isa| Choice::new(isa).is_some())
            .collect()
    }
}

/// A proven instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Portable(Portable),
}

impl Choice {
    /// `None` when this machine, or this build, lacks it.
    pub(crate) fn new(isa: Isa) -> Option<Choice> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::new().map(Choice::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().map(Choice::Avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::new().map(Choice::Neon),
            Isa::Portable => Some(Choice::Portable(Portable)),
            #[allow(unreachable_patterns, reason = "the leaves of other architectures")]
            _ => None,
        }
    }

    /// Runs an operation inside the leaf's code.
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    #[inline]
    pub(crate) unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Choice::Avx512(isa) => isa.run(op),
                #[cfg(target_arch = "x86_64")]
                Choice::Avx2(isa) => isa.run(op),
                #[cfg(target_arch = "aarch64")]
                Choice::Neon(isa) => isa.run(op),
                Choice::Portable(isa) => isa.run(op),
            }
        }
    }

    /// The same for operations on bytes.
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    #[inline]
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: handed through; plain Rust runs everywhere.
        unsafe { Portable.run_dot(op) }
    }
}
