//! The one choice of an instruction set.
//!
//! Secret: which leaves exist for this architecture and how one is proven to be usable.

use std::{fmt, str::FromStr};

#[cfg(target_arch = "aarch64")]
use crate::arm::{bytes::NeonDot, neon::Neon};
#[cfg(target_arch = "x86_64")]
use crate::plan;
#[cfg(target_arch = "x86_64")]
use crate::x86::{amx::Amx, avx2::Avx2, avx512::Avx512, bytes256::AvxVnni, bytes512::Vnni};
use crate::{
    Arithmetic,
    arithmetic::Pairs,
    generic::{Op, int::DotOp},
    portable::Portable,
};

/// An instruction set the kernels have a leaf for. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AMX INT8 beside AVX-512 with VNNI.
    Amx,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2, FMA, F16C and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AArch64 Advanced SIMD with dot products of bytes.
    NeonDot,
    /// AArch64 Advanced SIMD.
    Neon,
    /// Plain Rust: any machine.
    Portable,
}

/// Best first.
const ALL: [Isa; 8] = [
    Isa::Amx,
    Isa::Avx512Vnni,
    Isa::Avx512,
    Isa::AvxVnni,
    Isa::Avx2,
    Isa::NeonDot,
    Isa::Neon,
    Isa::Portable,
];

impl Isa {
    /// What this machine can run, best first; never empty.
    pub fn available() -> Vec<Isa> {
        ALL.into_iter()
            .filter(|isa| isa.refused().is_none())
            .collect()
    }

    /// Every instruction set there is a leaf for, best first, and why this machine cannot run it.
    pub fn survey() -> Vec<(Isa, Option<String>)> {
        ALL.map(|isa| (isa, isa.refused())).to_vec()
    }

    /// Why this machine, or this build, cannot run it.
    pub fn refused(self) -> Option<String> {
        Leaf::new(self).err()
    }

    /// As it is written on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Amx => "amx",
            Isa::Avx512Vnni => "avx512-vnni",
            Isa::Avx512 => "avx512",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx2 => "avx2",
            Isa::NeonDot => "neon-dot",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// What a processor must have for it.
    fn needs(self) -> &'static str {
        match self {
            Isa::Amx => "amx-tile and amx-int8",
            Isa::Avx512Vnni => "avx512f, avx512bw, avx512dq, avx512vl and avx512vnni",
            Isa::Avx512 => "avx512f, avx512bw, avx512dq and avx512vl",
            Isa::AvxVnni => "avx2, fma, f16c and avxvnni",
            Isa::Avx2 => "avx2, fma and f16c",
            Isa::NeonDot => "neon and dotprod",
            Isa::Neon => "neon",
            Isa::Portable => "nothing",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Isa, String> {
        ALL.into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| {
                let names = ALL.map(Isa::name).join(", ");
                format!("`{name}` is no instruction set; there are {names}")
            })
    }
}

/// A proven instruction set, and how it multiplies pairs of bf16 where it is to do that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    leaf: Leaf,
    pairs: Option<Pairs>,
}

impl Choice {
    /// # Errors
    /// Why this machine, or this build, lacks it.
    pub(crate) fn new(isa: Isa, arithmetic: Arithmetic) -> Result<Choice, String> {
        let leaf = Leaf::new(isa)?;
        let pairs = Pairs::new(isa, arithmetic);
        Ok(Choice { leaf, pairs })
    }

    #[cfg(target_arch = "x86_64")]
    fn of(leaf: Leaf) -> Choice {
        Choice { leaf, pairs: None }
    }

    /// Plain Rust.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn portable() -> Choice {
        Choice::of(Leaf::Portable(Portable))
    }

    /// Plain Rust as a leaf with tiles.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(crate) fn tiled() -> Choice {
        Choice::of(Leaf::Tiled)
    }

    /// The same with this way to multiply pairs.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn with(self, pairs: Pairs) -> Choice {
        Choice {
            pairs: Some(pairs),
            ..self
        }
    }

    /// AMX, where it multiplies bytes.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn amx(self) -> Option<Amx> {
        match self.leaf {
            Leaf::Amx(amx) => Some(amx),
            _ => None,
        }
    }

    /// How bf16 and FP8 weights are multiplied in pairs; `None` where they are widened to f32.
    #[inline]
    pub(crate) fn pairs(self) -> Option<Pairs> {
        self.pairs
    }

    /// Runs an operation inside the leaf's code.
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    #[inline]
    pub(crate) unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe { self.leaf.run(op) }
    }

    /// The same for operations on bytes.
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    #[inline]
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe { self.leaf.run_dot(op) }
    }
}

/// A proven instruction set.
#[derive(Clone, Copy, Debug)]
enum Leaf {
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    #[cfg(target_arch = "x86_64")]
    Vnni(Vnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(AvxVnni),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    NeonDot(NeonDot),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Portable(Portable),
    /// Plain Rust as a leaf with tiles.
    #[cfg(test)]
    Tiled,
}

impl Leaf {
    /// # Errors
    /// Why this machine, or this build, lacks it.
    fn new(isa: Isa) -> Result<Leaf, String> {
        let choice = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                let right = |amx| plan::is_right(Choice::of(Leaf::Amx(amx)));
                return Amx::new(right).map(Leaf::Amx);
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Vnni::new().map(Leaf::Vnni),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::new().map(Leaf::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => AvxVnni::new().map(Leaf::AvxVnni),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().map(Leaf::Avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => NeonDot::new().map(Leaf::NeonDot),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::new().map(Leaf::Neon),
            Isa::Portable => Some(Leaf::Portable(Portable)),
            #[allow(unreachable_patterns, reason = "the leaves of other architectures")]
            _ => return Err(format!("not built for {}", std::env::consts::ARCH)),
        };
        choice.ok_or_else(|| format!("the processor must have {}", isa.needs()))
    }

    /// # Safety
    /// As for [`Choice::run`].
    #[inline]
    unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Leaf::Amx(isa) => isa.vnni().avx512().run(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Vnni(isa) => isa.avx512().run(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Avx512(isa) => isa.run(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::AvxVnni(isa) => isa.avx2().run(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Avx2(isa) => isa.run(op),
                #[cfg(target_arch = "aarch64")]
                Leaf::NeonDot(isa) => isa.neon().run(op),
                #[cfg(target_arch = "aarch64")]
                Leaf::Neon(isa) => isa.run(op),
                Leaf::Portable(isa) => isa.run(op),
                #[cfg(test)]
                Leaf::Tiled => Portable.run(op),
            }
        }
    }

    /// # Safety
    /// As for [`Choice::run_dot`].
    #[inline]
    unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Leaf::Amx(isa) => isa.run_dot(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Vnni(isa) => isa.run_dot(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Avx512(isa) => isa.run_dot(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::AvxVnni(isa) => isa.run_dot(op),
                #[cfg(target_arch = "x86_64")]
                Leaf::Avx2(isa) => isa.run_dot(op),
                #[cfg(target_arch = "aarch64")]
                Leaf::NeonDot(isa) => isa.run_dot(op),
                #[cfg(target_arch = "aarch64")]
                Leaf::Neon(isa) => isa.run_dot(op),
                Leaf::Portable(isa) => isa.run_dot(op),
                #[cfg(test)]
                Leaf::Tiled => Portable.run_tiled(op),
            }
        }
    }
}
