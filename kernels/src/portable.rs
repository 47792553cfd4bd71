//! The leaf for any machine: plain arrays, `f32::mul_add`.
//!
//! Secret: none; it is the definition the others are held to.

mod pairs;

use half::bf16;

#[cfg(test)]
use crate::generic::int::{FULL, Tile};
use crate::generic::{
    LANES, Lanes, Op,
    int::{Dot, DotOp},
    weights::e4m3_to_f32,
};

/// The capability to run on plain Rust; every machine has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

impl Portable {
    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run<O: Op>(self, op: O) -> O::Out {
        // SAFETY: plain Rust needs no instruction set; the rest is the caller's promise.
        unsafe { op.run::<F32x16>() }
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    pub(crate) unsafe fn run_dot<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: as above.
        unsafe { op.run::<Bytes>() }
    }

    /// # Safety
    /// What `O` asks for besides the instruction set.
    #[cfg(test)]
    pub(crate) unsafe fn run_tiled<O: DotOp>(self, op: O) -> O::Out {
        // SAFETY: as above.
        unsafe { op.run::<Tiled>() }
    }
}

#[derive(Clone, Copy)]
struct F32x16([f32; LANES]);

impl F32x16 {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        F32x16(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

impl Lanes for F32x16 {
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        F32x16([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 16 readable elements by the trait's contract.
        unsafe { F32x16(p.cast::<[f32; LANES]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 16 writable elements by the trait's contract.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: 16 readable elements by the trait's contract.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        F32x16(bits.map(|b| bf16::from_bits(b).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: 16 readable elements by the trait's contract.
        let bytes = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        F32x16(bytes.map(e4m3_to_f32))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        F32x16(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn clamp(self, lo: Self, hi: Self) -> Self {
        let low = self.zip(hi, |a, hi| if a > hi { hi } else { a });
        low.zip(lo, |a, lo| if a < lo { lo } else { a })
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, t: Self, magic: f32) -> Self {
        self.zip(t, |x, t| {
            let n = t.to_bits().wrapping_sub(magic.to_bits()) as i32;
            let half = n >> 1;
            x * pow2(half) * pow2(n.wrapping_sub(half))
        })
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut l = self.0;
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                l[i] += l[i + width];
            }
            width /= 2;
        }
        l[0]
    }
}

#[derive(Clone, Copy)]
struct Bytes;

/// Bytes of a line.
const LINE: usize = 64;

impl Dot for Bytes {
    type Float = F32x16;
    type Sum = [i32; LANES];
    type Weights = [i8; LINE];
    type Word = [i8; 4];

    const ROWS: usize = 4;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 0;
    const OFFSET4: i32 = 0;

    #[inline(always)]
    unsafe fn sum(x: i32) -> [i32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load8(p: *const u8) -> [i8; LINE] {
        // SAFETY: 64 readable bytes by the trait's contract.
        let bytes = unsafe { p.cast::<[u8; LINE]>().read_unaligned() };
        bytes.map(|b| b.wrapping_sub(128) as i8)
    }

    #[inline(always)]
    unsafe fn load4(p: *const u8) -> [[i8; LINE]; 2] {
        // SAFETY: 64 readable bytes by the trait's contract.
        let bytes = unsafe { p.cast::<[u8; LINE]>().read_unaligned() };
        [
            bytes.map(|b| (b & 15) as i8 - 8),
            bytes.map(|b| (b >> 4) as i8 - 8),
        ]
    }

    #[inline(always)]
    unsafe fn word(p: *const u32) -> [i8; 4] {
        // SAFETY: a readable word by the trait's contract.
        let word = unsafe { p.read_unaligned() };
        word.to_le_bytes().map(|b| b as i8)
    }

    #[inline(always)]
    unsafe fn dot(acc: [i32; LANES], w: [i8; LINE], x: [i8; 4]) -> [i32; LANES] {
        std::array::from_fn(|row| {
            (0..4).fold(acc[row], |acc, i| {
                acc + i32::from(w[row * 4 + i]) * i32::from(x[i])
            })
        })
    }

    #[inline(always)]
    unsafe fn float(sum: [i32; LANES]) -> F32x16 {
        F32x16(sum.map(|sum| sum as f32))
    }
}

/// Tiles as a leaf with them has them, to hold their layout against the rule where no machine has tiles.
#[cfg(test)]
#[derive(Clone, Copy)]
struct Tiled;

#[cfg(test)]
impl Dot for Tiled {
    type Float = F32x16;
    type Sum = [i32; LANES];
    type Weights = [i8; LINE];
    type Word = [i8; 4];

    const ROWS: usize = FULL;
    const PANELS: usize = 1;
    const OFFSET8: i32 = 0;
    const OFFSET4: i32 = 0;
    const TILES: bool = true;

    unsafe fn sum(x: i32) -> [i32; LANES] {
        [x; LANES]
    }

    unsafe fn load8(p: *const u8) -> [i8; LINE] {
        // SAFETY: the same contract.
        unsafe { Bytes::load8(p) }
    }

    unsafe fn load4(p: *const u8) -> [[i8; LINE]; 2] {
        // SAFETY: the same contract.
        unsafe { Bytes::load4(p) }
    }

    unsafe fn word(p: *const u32) -> [i8; 4] {
        // SAFETY: the same contract.
        unsafe { Bytes::word(p) }
    }

    unsafe fn dot(acc: [i32; LANES], w: [i8; LINE], x: [i8; 4]) -> [i32; LANES] {
        // SAFETY: the same contract.
        unsafe { Bytes::dot(acc, w, x) }
    }

    unsafe fn float(sum: [i32; LANES]) -> F32x16 {
        // SAFETY: the same contract.
        unsafe { Bytes::float(sum) }
    }

    unsafe fn tile<const BITS: usize>(sums: &mut Tile, x: *const u32, w: *const u8, quads: usize) {
        // Rows of x in the first tile operand have so many words.
        let wide = quads.min(16);
        for quad in 0..quads {
            let (tile, column) = (quad / wide, quad % wide);
            for row in 0..FULL {
                // SAFETY: the words and lines of one group, by the trait's contract.
                unsafe {
                    let x = Bytes::word(x.add(tile * FULL * wide + row * wide + column));
                    let w = match BITS {
                        8 => Bytes::load8(w.add(quad * LINE)),
                        _ => Bytes::load4(w.add(quad / 2 * LINE))[quad % 2],
                    };
                    sums.0[row] = Bytes::dot(sums.0[row], w, x);
                }
            }
        }
    }
}
