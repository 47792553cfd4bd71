//! Which kernels compute, of all that give a right result.

use std::str::FromStr as _;

use clap::{Args, ValueEnum};
use guild_kernels::{Arithmetic, Isa};
use guild_model::Cpu;

use crate::failure::Failure;

/// The instruction set.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Instructions {
    /// Instruction set instead of the best that this machine has, by its name in `guild inspect --cpu`; all of them give
    /// the same bits
    #[arg(long, value_parser = Isa::from_str, value_name = "NAME")]
    pub(crate) isa: Option<Isa>,
}

/// Instruction set and numerics.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Kernels {
    #[command(flatten)]
    pub(crate) instructions: Instructions,
    /// How bf16 and fp8 weights are multiplied. fma: widened to f32, nothing is rounded. dot-avx512, dot-amx: activations
    /// rounded to bf16 and multiplied in pairs, as the instructions of AVX-512 BF16 or AMX BF16 do; where these are
    /// missing, the same bits come slowly. dot: the faster one of those this machine has. The nodes of a cluster must agree
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "fma|dot|dot-avx512|dot-amx",
        hide_possible_values = true
    )]
    pub(crate) numerics: Numerics,
}

/// A rule, or the wish for a fast one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Numerics {
    #[default]
    Fma,
    Dot,
    #[value(name = "dot-avx512")]
    DotAvx512,
    #[value(name = "dot-amx")]
    DotAmx,
}

impl Instructions {
    /// This rule on so many threads; 0: one per physical core.
    ///
    /// # Errors
    /// When this machine lacks the instruction set.
    pub(crate) fn cpu(self, threads: u16, arithmetic: Arithmetic) -> Result<Cpu, Failure> {
        Cpu::with(usize::from(threads), self.isa(), arithmetic)
            .map_err(|why| Failure::usage(format!("--isa {why}")))
    }

    fn isa(self) -> Isa {
        self.isa.unwrap_or(Isa::available()[0])
    }
}

impl Kernels {
    /// The arithmetic on so many threads; 0: one per physical core.
    ///
    /// # Errors
    /// When this machine lacks the instruction set, or any instruction for `dot`.
    pub(crate) fn cpu(self, threads: u16) -> Result<Cpu, Failure> {
        let arithmetic = match self.numerics {
            Numerics::Fma => Arithmetic::Fma,
            Numerics::DotAvx512 => Arithmetic::DotAvx512,
            Numerics::DotAmx => Arithmetic::DotAmx,
            Numerics::Dot => Arithmetic::fastest_dot(self.instructions.isa()).map_err(|why| {
                Failure::usage(format!("--numerics dot: no instruction for it: {why}"))
                    .hint("name dot-avx512 or dot-amx to have it computed without, slowly")
            })?,
        };
        self.instructions.cpu(threads, arithmetic)
    }
}
