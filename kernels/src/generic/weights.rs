//! How a stored weight becomes f32 lanes.
//!
//! Secret: the element formats. Knows the layout of a matrix, not what is done with it.

use half::bf16;

use super::{LANES, Lanes};

/// Rows and columns of one FP8 scale block.
pub(crate) const BLOCK: usize = 128;

/// A row-major weight matrix of one element format.
///
/// # Safety
/// Of the methods: `row` and the columns named lie inside the matrix, and the machine has the instruction set of `V`.
pub(crate) trait Weights: Copy + Sync {
    /// Whether widening takes many instructions.
    const WIDENS: bool = false;

    /// The scale of `row` in column block `block`; formats without one give zero, which nothing reads.
    unsafe fn scale<V: Lanes>(self, row: usize, block: usize) -> V;
    /// Columns `col .. col + 16` of `row`, all in the block that `scale` belongs to.
    unsafe fn chunk<V: Lanes>(self, row: usize, col: usize, scale: V) -> V;
    /// One element, for ragged ends.
    unsafe fn element(self, row: usize, col: usize) -> f32;
    /// Asks for the cache lines of the column block that begins at `col`; they need not exist.
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize);

    /// Columns `col .. col + n` of `row`, zero padded to 16.
    #[inline(always)]
    unsafe fn part<V: Lanes>(self, row: usize, col: usize, n: usize) -> V {
        let mut buffer = [0.0f32; LANES];
        for (i, b) in buffer[..n].iter_mut().enumerate() {
            // SAFETY: the caller promises that the `n` columns lie inside the matrix.
            *b = unsafe { self.element(row, col + i) };
        }
        // SAFETY: the buffer holds 16 values.
        unsafe { V::load(buffer.as_ptr()) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct F32<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) cols: usize,
}

impl Weights for F32<'_> {
    #[inline(always)]
    unsafe fn scale<V: Lanes>(self, _: usize, _: usize) -> V {
        // SAFETY: register only.
        unsafe { V::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn chunk<V: Lanes>(self, row: usize, col: usize, _: V) -> V {
        // SAFETY: the caller promises that the 16 columns lie inside the matrix, and the public surface checked that
        // `data` holds the whole matrix.
        unsafe { V::load(self.data.as_ptr().add(row * self.cols + col)) }
    }

    #[inline(always)]
    unsafe fn element(self, row: usize, col: usize) -> f32 {
        self.data[row * self.cols + col]
    }

    #[inline(always)]
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize) {
        for line in 0..BLOCK * 4 / 64 {
            let at = self
                .data
                .as_ptr()
                .wrapping_add(row * self.cols + col)
                .cast::<u8>();
            // SAFETY: a prefetch faults on no address, and `wrapping_add` makes no claim about it.
            unsafe { V::prefetch(at.wrapping_add(line * 64)) }
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Bf16<'a> {
    pub(crate) data: &'a [bf16],
    pub(crate) cols: usize,
}

impl Weights for Bf16<'_> {
    #[inline(always)]
    unsafe fn scale<V: Lanes>(self, _: usize, _: usize) -> V {
        // SAFETY: register only.
        unsafe { V::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn chunk<V: Lanes>(self, row: usize, col: usize, _: V) -> V {
        // SAFETY: as for `F32`; `bf16` is a transparent u16.
        unsafe { V::load_bf16(self.data.as_ptr().add(row * self.cols + col).cast()) }
    }

    #[inline(always)]
    unsafe fn element(self, row: usize, col: usize) -> f32 {
        self.data[row * self.cols + col].to_f32()
    }

    #[inline(always)]
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize) {
        for line in 0..BLOCK * 2 / 64 {
            let at = self
                .data
                .as_ptr()
                .wrapping_add(row * self.cols + col)
                .cast::<u8>();
            // SAFETY: a prefetch faults on no address, and `wrapping_add` makes no claim about it.
            unsafe { V::prefetch(at.wrapping_add(line * 64)) }
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Fp8<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) scales: &'a [f32],
    pub(crate) cols: usize,
}

impl Weights for Fp8<'_> {
    const WIDENS: bool = true;

    #[inline(always)]
    unsafe fn scale<V: Lanes>(self, row: usize, block: usize) -> V {
        // SAFETY: register only; the index is checked.
        unsafe { V::splat(self.scales[row / BLOCK * self.cols.div_ceil(BLOCK) + block]) }
    }

    #[inline(always)]
    unsafe fn chunk<V: Lanes>(self, row: usize, col: usize, scale: V) -> V {
        // SAFETY: as for `F32`.
        unsafe { V::load_e4m3(self.data.as_ptr().add(row * self.cols + col)).mul(scale) }
    }

    #[inline(always)]
    unsafe fn element(self, row: usize, col: usize) -> f32 {
        let scale = self.scales[row / BLOCK * self.cols.div_ceil(BLOCK) + col / BLOCK];
        e4m3_to_f32(self.data[row * self.cols + col]) * scale
    }

    #[inline(always)]
    unsafe fn prefetch<V: Lanes>(self, row: usize, col: usize) {
        for line in 0..BLOCK / 64 {
            let at = self.data.as_ptr().wrapping_add(row * self.cols + col);
            // SAFETY: a prefetch faults on no address, and `wrapping_add` makes no claim about it.
            unsafe { V::prefetch(at.wrapping_add(line * 64)) }
        }
    }
}

/// The value of an OCP FP8 e4m3 byte: bias 7, no infinities, NaN at 0x7f and 0xff.
#[inline(always)]
pub(crate) const fn e4m3_to_f32(byte: u8) -> f32 {
    let magnitude = (byte & 0x7f) as u32;
    if magnitude == 0x7f {
        return f32::NAN;
    }
    // Exponent and mantissa moved to their places in f32; the difference of the biases is 120, and the multiplication
    // renormalises subnormals exactly.
    let value = f32::from_bits(magnitude << 20) * f32::from_bits((127 + 120) << 23);
    f32::from_bits(value.to_bits() | ((byte & 0x80) as u32) << 24)
}
