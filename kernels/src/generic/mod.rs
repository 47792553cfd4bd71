//! The algorithms, written once over 16 virtual f32 lanes.
//!
//! Secret: the order of every operation. [`Lanes`] is what a leaf has to provide; [`Op`] is what a leaf runs. All of it
//! is `#[inline(always)]`, so that it is compiled inside the leaf's `#[target_feature]` function and nowhere else; no
//! closures in loops for the same reason. It must not know which leaf it runs on, except by [`Lanes::REGISTERS`].

#![allow(
    clippy::needless_range_loop,
    reason = "tiles are small arrays indexed alike"
)]

pub(crate) mod attention;
pub(crate) mod int;
pub(crate) mod matmul;
pub(crate) mod pairs;
pub(crate) mod rows;
pub(crate) mod weights;

/// Lanes of the rule: element `k` of a dot product belongs to lane `k % LANES`.
pub(crate) const LANES: usize = 16;

/// 16 f32 lanes of one instruction set.
///
/// # Safety
/// Of every method: the machine has the instruction set of the leaf, and pointers are valid for the 16 elements read
/// or written (no alignment needed). `prefetch` takes any address.
pub(crate) trait Lanes: Copy {
    /// How many values of this type the register file holds; picks the tile.
    const REGISTERS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// bf16 bits, widened exactly.
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// e4m3 bytes, widened exactly; 0x7f and 0xff give NaN.
    unsafe fn load_e4m3(p: *const u8) -> Self;
    unsafe fn prefetch(p: *const u8);
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self` where `self > b`, else `b`: a NaN in `self` is passed over.
    unsafe fn max(self, b: Self) -> Self;
    /// Into `lo..=hi`; NaN stays NaN.
    unsafe fn clamp(self, lo: Self, hi: Self) -> Self;
    /// `self * 2^(n >> 1) * 2^(n - (n >> 1))` with `n` the integer by which the bits of `t` exceed those of `magic`.
    unsafe fn scale_by_exponent(self, t: Self, magic: f32) -> Self;
    /// The fixed tree: `l[i] + l[i + 8]`, then `+ 4`, `+ 2`, `+ 1`.
    unsafe fn sum(self) -> f32;

    /// [`Lanes::sum`] of 16 values at once, element `i` that of `x[i]`.
    #[inline(always)]
    unsafe fn sums(x: [Self; LANES]) -> Self {
        let mut sums = [0.0f32; LANES];
        // SAFETY: registers, and 16 elements of ours.
        unsafe {
            for i in 0..LANES {
                sums[i] = x[i].sum();
            }
            Self::load(sums.as_ptr())
        }
    }
}

/// An operation that a leaf can run.
pub(crate) trait Op {
    type Out;

    /// # Safety
    /// The machine has the instruction set of `V`.
    unsafe fn run<V: Lanes>(self) -> Self::Out;
}

/// `n <= 16` values from `p`, zero padded.
///
/// # Safety
/// `p` is valid for `n` reads.
#[inline(always)]
pub(crate) unsafe fn load_part<V: Lanes>(p: *const f32, n: usize) -> V {
    let mut buffer = [0.0f32; LANES];
    // SAFETY: `p` is valid for `n <= 16` reads by the caller's promise, the buffer for 16 of anything.
    unsafe {
        std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
        V::load(buffer.as_ptr())
    }
}

/// Stores the first `n <= 16` lanes.
///
/// # Safety
/// `p` is valid for `n` writes.
#[inline(always)]
pub(crate) unsafe fn store_part<V: Lanes>(v: V, p: *mut f32, n: usize) {
    let mut buffer = [0.0f32; LANES];
    // SAFETY: the buffer holds 16 lanes, and `p` is valid for `n <= 16` writes by the caller's promise.
    unsafe {
        v.store(buffer.as_mut_ptr());
        std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
    }
}
