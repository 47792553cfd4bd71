//! How weights that are bf16, or become it exactly, are multiplied.
//!
//! Secret: which instruction stands behind which numerics class, and what stands in for it where it is missing.

use std::{fmt, str::FromStr};

use crate::{
    Isa,
    generic::pairs::{PairOp, Rule, tiles::TileOp},
    portable::Portable,
};
#[cfg(target_arch = "x86_64")]
use crate::{
    plan,
    x86::{amx::pairs::AmxBf16, pairs512::Bf16},
};

/// The rule for products of bf16 and FP8 weights; other formats have one rule.
///
/// Each gives the same bits on every machine: where the instruction that defines it is missing, plain Rust computes the
/// same, many times slower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Widened to f32 and multiplied as f32 weights are: nothing is rounded before the sum.
    #[default]
    Fma,
    /// Rows rounded to bf16, pairs multiplied as `vdpbf16ps` (AVX-512 BF16) does.
    DotAvx512,
    /// Rows rounded to bf16, tiles multiplied as `tdpbf16ps` (AMX BF16) does.
    DotAmx,
}

impl Arithmetic {
    /// All of them.
    pub const ALL: [Arithmetic; 3] = [Arithmetic::Fma, Arithmetic::DotAvx512, Arithmetic::DotAmx];

    /// The faster of the two with bf16 that `isa` has an instruction for on this machine.
    ///
    /// # Errors
    /// Why it has neither.
    pub fn fastest_dot(isa: Isa) -> Result<Arithmetic, String> {
        let mut why = Vec::new();
        for arithmetic in [Arithmetic::DotAmx, Arithmetic::DotAvx512] {
            match arithmetic.emulated(isa) {
                None => return Ok(arithmetic),
                Some(refused) => why.push(format!("{arithmetic}: {refused}")),
            }
        }
        Err(why.join("; "))
    }

    /// Why `isa` computes it by plain Rust on this machine; `None` where it has the instruction.
    pub fn emulated(self, isa: Isa) -> Option<String> {
        Pairs::native(isa, self).err()
    }

    /// As it is written on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Arithmetic::Fma => "fma",
            Arithmetic::DotAvx512 => "dot-avx512",
            Arithmetic::DotAmx => "dot-amx",
        }
    }

    /// Names the rules of all operations. Nodes of one class give the same bits.
    pub fn numerics_class(self) -> &'static str {
        match self {
            Arithmetic::Fma => "f32-fma16-v2",
            Arithmetic::DotAvx512 => "f32-fma16-v2+bf16-dot-avx512-v1",
            Arithmetic::DotAmx => "f32-fma16-v2+bf16-dot-amx-v1",
        }
    }
}

impl fmt::Display for Arithmetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arithmetic {
    type Err = String;

    fn from_str(name: &str) -> Result<Arithmetic, String> {
        Self::ALL
            .into_iter()
            .find(|arithmetic| arithmetic.name() == name)
            .ok_or_else(|| {
                let names = Self::ALL.map(Arithmetic::name).join(", ");
                format!("`{name}` is no arithmetic; there are {names}")
            })
    }
}

/// A proven way to multiply pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pairs {
    #[cfg(target_arch = "x86_64")]
    Bf16(Bf16),
    #[cfg(target_arch = "x86_64")]
    Amx(AmxBf16),
    /// Plain Rust.
    Plain(Rule),
}

impl Pairs {
    /// How `isa` multiplies them, if they are to be multiplied.
    pub(crate) fn new(isa: Isa, arithmetic: Arithmetic) -> Option<Pairs> {
        let plain = match arithmetic {
            Arithmetic::Fma => return None,
            Arithmetic::DotAvx512 => Pairs::Plain(Rule::Lanes),
            Arithmetic::DotAmx => Pairs::Plain(Rule::Tiles),
        };
        Some(
            Pairs::native(isa, arithmetic)
                .ok()
                .flatten()
                .unwrap_or(plain),
        )
    }

    /// The instruction, where one is needed.
    ///
    /// # Errors
    /// Why it cannot be used.
    #[cfg(target_arch = "x86_64")]
    fn native(isa: Isa, arithmetic: Arithmetic) -> Result<Option<Pairs>, String> {
        let bf16 = || Bf16::new(|bf16| plan::multiplies(Pairs::Bf16(bf16)));
        match (arithmetic, isa) {
            (Arithmetic::Fma, _) => Ok(None),
            (Arithmetic::DotAvx512, Isa::Amx | Isa::Avx512Vnni) => {
                bf16().map(Pairs::Bf16).map(Some)
            }
            (Arithmetic::DotAvx512, _) => Err(format!("{isa} has no such instruction")),
            (Arithmetic::DotAmx, Isa::Amx) => {
                AmxBf16::new(bf16(), |amx| plan::multiplies(Pairs::Amx(amx)))
                    .map(Pairs::Amx)
                    .map(Some)
            }
            (Arithmetic::DotAmx, _) => Err(format!("{isa} has no such instruction")),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn native(isa: Isa, arithmetic: Arithmetic) -> Result<Option<Pairs>, String> {
        match arithmetic {
            Arithmetic::Fma => Ok(None),
            _ => Err(format!("{isa} has no such instruction")),
        }
    }

    /// The rule it follows.
    pub(crate) fn rule(self) -> Rule {
        match self {
            #[cfg(target_arch = "x86_64")]
            Pairs::Bf16(_) => Rule::Lanes,
            #[cfg(target_arch = "x86_64")]
            Pairs::Amx(_) => Rule::Tiles,
            Pairs::Plain(rule) => rule,
        }
    }

    /// Runs an operation of [`Rule::Lanes`].
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    pub(crate) unsafe fn run_lanes<O: PairOp>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Pairs::Bf16(isa) => isa.run_pairs(op),
                _ => Portable.run_pairs(op),
            }
        }
    }

    /// Runs an operation of [`Rule::Tiles`].
    ///
    /// # Safety
    /// What `O` asks for besides the instruction set, which this value proves.
    pub(crate) unsafe fn run_tiles<O: TileOp>(self, op: O) -> O::Out {
        // SAFETY: handed through.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Pairs::Amx(isa) => isa.run_tiles(op),
                _ => Portable.run_tiles(op),
            }
        }
    }
}
