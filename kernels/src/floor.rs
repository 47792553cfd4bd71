//! What this machine allows at this moment: the floors that times are held against.
//!
//! Secret: the loops. They do nothing but read, or nothing but multiply from registers, so nothing that does more than that
//! can be faster on the same threads.

#![allow(
    clippy::needless_range_loop,
    reason = "tiles are small arrays indexed alike"
)]

use std::{hint::black_box, time::Instant};

#[cfg(target_arch = "x86_64")]
use crate::{Arithmetic, arithmetic::Pairs};
use crate::{
    Cpu,
    generic::{LANES, Lanes, Op},
};

/// What a processor multiplies with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unit {
    /// f32 fused multiply-add, of the instruction set in use.
    Fma,
    /// Dot products of bf16: AMX where the machine has it, else AVX-512 BF16.
    Bf16,
    /// Dot products of bytes: AMX where it is used, else AVX-512 VNNI.
    Int8,
}

/// Bytes a thread takes at a time.
const PIECE: usize = 1 << 20;
/// Chains of dependent operations that keep the multipliers busy.
const CHAINS: usize = 12;
/// Operations of one chain in one piece of work: a millisecond or so.
const LINKS: usize = 500_000;
/// Operations of one product of tiles of bf16; of bytes they are twice as many.
#[cfg(target_arch = "x86_64")]
const TILE_OPS: usize = 2 * 16 * 16 * 32;
/// Four products each, in one piece of work.
#[cfg(target_arch = "x86_64")]
const TILE_LINKS: usize = 50_000;
/// Pieces of work for a thread in one measure.
const PIECES: usize = 4;

/// Bytes per second that `cpu` reads from `memory`; beyond the caches when that is large.
pub fn read(cpu: &Cpu, memory: &[u8]) -> f64 {
    let start = Instant::now();
    cpu.par_for(memory.len() / PIECE, |i| {
        let piece = &memory[i * PIECE..][..PIECE];
        // SAFETY: asks for nothing besides the instruction set.
        let sum = unsafe { cpu.choice().run(Read(piece)) };
        black_box(sum);
    });
    (memory.len() / PIECE * PIECE) as f64 / start.elapsed().as_secs_f64()
}

/// Operations (two of each multiplication that is added) per second of all threads of `cpu`; None where it has no such unit.
pub fn peak(cpu: &Cpu, unit: Unit) -> Option<f64> {
    match unit {
        Unit::Fma => {
            // SAFETY: asks for nothing besides the instruction set.
            let chains = || unsafe { cpu.choice().run(Chains) };
            Some(rate(cpu, 2 * LANES * CHAINS * LINKS, chains))
        }
        #[cfg(target_arch = "x86_64")]
        Unit::Bf16 => match Pairs::new(cpu.isa(), Arithmetic::fastest_dot(cpu.isa()).ok()?)? {
            Pairs::Amx(amx) => Some(rate(cpu, 4 * TILE_OPS * TILE_LINKS, || {
                amx.chains(TILE_LINKS)
            })),
            // SAFETY: the value proves the instruction.
            Pairs::Bf16(_) => Some(rate(cpu, 64 * CHAINS * LINKS, || unsafe { x86::bf16() })),
            Pairs::Plain(_) => None,
        },
        #[cfg(target_arch = "x86_64")]
        Unit::Int8 => match cpu.choice().amx() {
            Some(amx) => Some(rate(cpu, 8 * TILE_OPS * TILE_LINKS, || {
                amx.chains(TILE_LINKS)
            })),
            None => is_x86_feature_detected!("avx512vnni").then(|| {
                // SAFETY: the feature was just seen.
                rate(cpu, 128 * CHAINS * LINKS, || unsafe { x86::int8() })
            }),
        },
        #[cfg(not(target_arch = "x86_64"))]
        Unit::Bf16 | Unit::Int8 => None,
    }
}

/// Operations per second of all threads, each piece of work doing `ops`.
fn rate(cpu: &Cpu, ops: usize, work: impl Fn() + Sync) -> f64 {
    let pieces = PIECES * cpu.threads();
    let start = Instant::now();
    cpu.par_for(pieces, |_| work());
    (ops * pieces) as f64 / start.elapsed().as_secs_f64()
}

struct Read<'a>(&'a [u8]);

impl Op for Read<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) -> f32 {
        const AT_ONCE: usize = 8;
        // Asked for ahead of time, as kernels do: a page ends what the processor foresees by itself.
        const AHEAD: usize = 4096;
        let from = self.0.as_ptr().cast::<f32>();
        let step = AT_ONCE * LANES;
        // SAFETY: all loads end inside the slice, and pointers need no alignment.
        unsafe {
            let mut acc = [V::splat(0.0); AT_ONCE];
            for at in (0..self.0.len() / 4 / step * step).step_by(step) {
                for i in 0..AT_ONCE {
                    let line = from.add(at + i * LANES);
                    V::prefetch(line.cast::<u8>().wrapping_add(AHEAD));
                    acc[i] = V::load(line).max(acc[i]);
                }
            }
            let mut all = V::splat(0.0);
            for i in 0..AT_ONCE {
                all = all.add(acc[i]);
            }
            all.sum()
        }
    }
}

struct Chains;

impl Op for Chains {
    type Out = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        // SAFETY: registers only.
        unsafe {
            let (a, b) = (V::splat(black_box(0.5)), V::splat(black_box(0.25)));
            // All the chains that the register file holds beside the operands, as often as it takes.
            const FEW: usize = 6;
            if V::REGISTERS >= 32 {
                let mut acc = [V::splat(1.0); CHAINS];
                for _ in 0..LINKS {
                    for i in 0..CHAINS {
                        acc[i] = acc[i].fma(a, b);
                    }
                }
                for i in 0..CHAINS {
                    black_box(acc[i].sum());
                }
            } else {
                let mut acc = [V::splat(1.0); FEW];
                for _ in 0..LINKS * CHAINS / FEW {
                    for i in 0..FEW {
                        acc[i] = acc[i].fma(a, b);
                    }
                }
                for i in 0..FEW {
                    black_box(acc[i].sum());
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    use super::{CHAINS, LINKS};

    /// # Safety
    /// The machine has AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn bf16() {
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        let ones = _mm512_set1_epi16(black_box(0x3f80));
        // SAFETY: as many bits, and every pattern is a value.
        let ones: __m512bh = unsafe { std::mem::transmute(ones) };
        for _ in 0..LINKS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, ones, ones);
            }
        }
        black_box(acc);
    }

    /// # Safety
    /// The machine has AVX-512 VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) unsafe fn int8() {
        let mut acc = [_mm512_set1_epi32(1); CHAINS];
        let ones = _mm512_set1_epi8(black_box(1));
        for _ in 0..LINKS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, ones, ones);
            }
        }
        black_box(acc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_are_rates() {
        let cpu = Cpu::new(1);
        assert!(read(&cpu, &vec![1; 4 * PIECE]) > 0.0);
        for unit in [Unit::Fma, Unit::Bf16, Unit::Int8] {
            assert!(peak(&cpu, unit).is_none_or(|rate| rate.is_finite() && rate > 0.0));
        }
    }
}
