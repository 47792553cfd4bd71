//! Products of pairs of bf16 in plain Rust: what the instructions for them compute, for machines that lack them.
//!
//! Secret: none; it is the definition the others are held to.

use half::bf16;

use super::F32x16;
use crate::{
    generic::{
        LANES,
        matmul::Line,
        pairs::{
            PairDot, PairOp, STEP, e4m3_bits, flushed, fma_flushed,
            tiles::{PairTiles, Panel, ROWS, Sums, TileOp},
        },
    },
    portable::Portable,
};

impl Portable {
    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_pairs<O: PairOp>(self, op: O) -> O::Out {
        // SAFETY: plain Rust needs no instruction set; the rest is the caller's promise.
        unsafe { op.run::<Pairs>() }
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_tiles<O: TileOp>(self, op: O) -> O::Out {
        // SAFETY: as above.
        unsafe { op.run::<Pairs>() }
    }
}

#[derive(Clone, Copy)]
struct Pairs;

fn widened(bits: u16) -> f32 {
    bf16::from_bits(bits).to_f32()
}

impl PairDot for Pairs {
    type Float = F32x16;
    type Pairs = [u16; STEP];

    #[inline(always)]
    unsafe fn load(p: *const u16) -> [u16; STEP] {
        // SAFETY: 64 readable bytes by the trait's contract.
        unsafe { p.cast::<[u16; STEP]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_some(p: *const u16, n: usize) -> [u16; STEP] {
        let mut all = [0; STEP];
        // SAFETY: `n <= 32` readable elements by the trait's contract.
        unsafe { std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n) };
        all
    }

    #[inline(always)]
    unsafe fn store(pairs: [u16; STEP], p: *mut u16) {
        // SAFETY: 64 writable bytes by the trait's contract.
        unsafe { p.cast::<[u16; STEP]>().write_unaligned(pairs) }
    }

    #[inline(always)]
    unsafe fn widen(p: *const u8) -> [[u16; STEP]; 2] {
        // SAFETY: 64 readable bytes by the trait's contract.
        unsafe { p.cast::<[[u8; STEP]; 2]>().read_unaligned() }.map(|half| half.map(e4m3_bits))
    }

    #[inline(always)]
    unsafe fn widen_some(p: *const u8, n: usize) -> [[u16; STEP]; 2] {
        let mut all = [0; 2 * STEP];
        // SAFETY: `n <= 64` readable bytes by the trait's contract, and 64 of ours.
        unsafe {
            std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), n);
            Pairs::widen(all.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn dot(acc: F32x16, a: [u16; STEP], b: [u16; STEP]) -> F32x16 {
        F32x16(std::array::from_fn(|lane| {
            let product = |i: usize, acc| fma_flushed(widened(a[i]), widened(b[i]), acc);
            product(2 * lane, product(2 * lane + 1, acc.0[lane]))
        }))
    }
}

impl PairTiles for Pairs {
    type Dot = Pairs;

    unsafe fn multiply<const P: usize, const T: usize>(
        sums: [[*mut Sums; T]; P],
        w: [Panel; P],
        x: [*const Line; T],
        steps: usize,
    ) {
        for step in 0..steps {
            for p in 0..P {
                for t in 0..T {
                    // SAFETY: all of it is there: the trait's contract.
                    unsafe {
                        let sums = &mut *sums[p][t];
                        let x = x[t].add(step * ROWS).cast::<[[u16; 2]; ROWS]>();
                        for (r, sums) in sums.0.iter_mut().enumerate() {
                            let w = w[p].at.add(step * w[p].step + r * w[p].row).cast::<u16>();
                            let w = Pairs::load(w);
                            let mut chains = [[0.0f32; 2]; LANES];
                            for pair in 0..STEP / 2 {
                                let x = &*x.add(pair);
                                for (chain, x) in chains.iter_mut().zip(x) {
                                    for i in 0..2 {
                                        let (w, x) = (widened(w[2 * pair + i]), widened(x[i]));
                                        chain[i] = fma_flushed(w, x, chain[i]);
                                    }
                                }
                            }
                            for (sum, [even, odd]) in sums.0.iter_mut().zip(chains) {
                                *sum = flushed(*sum + flushed(even + odd));
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Around the least normal number: what rounds to it with 24 bits stays, what does not is flushed.
    #[test]
    fn tiny_results_are_flushed_after_rounding() {
        let least = f32::MIN_POSITIVE;
        let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        for sign in [1.0, -1.0] {
            // Half a step of 24 bits below: a tie that goes to the even one.
            assert_eq!(
                fma_flushed(-power(-75) * sign, power(-76), least * sign),
                least * sign
            );
            // A little more, which only rounding among subnormals brings back.
            let more = fma_flushed(-power(-75) * sign, power(-76) * 1.5, least * sign);
            assert_eq!(more.to_bits(), (0.0 * sign).to_bits());
            let one_less = fma_flushed(-power(-75) * sign, power(-74), least * sign);
            assert_eq!(one_less.to_bits(), (0.0 * sign).to_bits());
        }
        assert_eq!(
            fma_flushed(1e-40, 1e30, 0.0),
            0.0,
            "a subnormal factor counts as zero"
        );
        assert!(fma_flushed(1e-40, f32::INFINITY, 0.0).is_nan());
        assert_eq!(fma_flushed(0.5, 0.5, 1e-40), 0.25);
    }
}
