//! Weights of 8 and 4 bits: how they are chosen, and how they lie in memory.
//!
//! Secret: the packed layout. Rows come in panels of 16; in a panel, four columns of the 16 rows are 64 consecutive bytes
//! (row by row), which is what one multiplication of bytes takes. Elements are stored without sign, 128 or 8 above their
//! value; two such lines of 4-bit elements share their bytes, the first in the low nibbles. Scales lie as
//! `[panel][group][16]`. Rows are padded to whole panels and columns to whole groups, with zeros of scale zero. Nothing of
//! it depends on the machine. It must not know what a product does with it.

use half::bf16;

use crate::generic::LANES;

/// Columns that may share a scale. Fewer cost more scales and more time, and err less.
pub const GROUPS: [usize; 3] = [32, 64, 128];
/// The group to take where nothing says otherwise.
///
/// Of normally distributed weights, 4 bits lose 8.3, 9.2 or 9.8 % (root of the mean square) in groups of 32, 64 or 128,
/// and take 4.5, 4.25 or 4.125 bits with their scales; 8 bits lose 0.54, 0.60 or 0.65 %. With eight rows of x and 1024 of
/// weights in cache, 4 bits are multiplied at 53, 71 or 80 % of what VNNI can do, quantising x included. 64 stands between:
/// a tenth more error than 32 for a quarter less time.
pub const GROUP: usize = 64;

/// Columns of one line.
const QUAD: usize = 4;
/// Bytes of one line.
pub(crate) const LINE: usize = LANES * QUAD;

/// Bits of a packed weight: symmetric integers with one bf16 scale per row and group of columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Int {
    /// -8 to 7.
    Int4,
    /// -127 to 127.
    Int8,
}

impl Int {
    /// What is added to a value to store it.
    pub(crate) fn offset(self) -> i32 {
        match self {
            Int::Int4 => 8,
            Int::Int8 => 128,
        }
    }

    fn bits(self) -> usize {
        match self {
            Int::Int4 => 4,
            Int::Int8 => 8,
        }
    }

    fn range(self) -> (f32, f32) {
        match self {
            Int::Int4 => (-8.0, 7.0),
            Int::Int8 => (-127.0, 127.0),
        }
    }
}

/// Bytes of a packed matrix `[rows, cols]`, its scales apart.
///
/// # Panics
/// When `group` is not one of [`GROUPS`].
pub fn bytes(int: Int, rows: usize, cols: usize, group: usize) -> usize {
    check(group);
    let rows = rows.div_ceil(LANES).saturating_mul(LANES);
    let cols = cols.div_ceil(group).saturating_mul(group);
    rows.saturating_mul(cols / 8 * int.bits())
}

/// Scales of a packed matrix `[rows, cols]`.
///
/// # Panics
/// When `group` is not one of [`GROUPS`].
pub fn scales(rows: usize, cols: usize, group: usize) -> usize {
    check(group);
    (rows.div_ceil(LANES).saturating_mul(LANES)).saturating_mul(cols.div_ceil(group))
}

/// Quantises and packs `weights` `[rows, cols]` into `data` and `scales`. The same weights give the same bytes on every
/// machine, and panels are independent: 16 rows at a time, each call with its part of `data` and `scales`, give what one
/// call gives.
///
/// A scale is rounded to bf16 first and the values are chosen against the rounded one. Where a group holds a number that
/// is not finite its scale is NaN. A group too small for a normal scale becomes zero.
///
/// # Panics
/// When `group` is not one of [`GROUPS`], or a slice does not have the length that the shape asks for.
pub fn quantize(
    int: Int,
    group: usize,
    rows: usize,
    cols: usize,
    weights: &[f32],
    data: &mut [u8],
    scales: &mut [bf16],
) {
    assert_eq!(
        Some(weights.len()),
        rows.checked_mul(cols),
        "quantize: weights must be [{rows}, {cols}]"
    );
    assert_eq!(
        data.len(),
        bytes(int, rows, cols, group),
        "quantize: data must be as `bytes` says"
    );
    assert_eq!(
        scales.len(),
        self::scales(rows, cols, group),
        "quantize: scales must be as `scales` says"
    );
    if weights.is_empty() {
        return;
    }
    data.fill(match int {
        Int::Int4 => 0x88,
        Int::Int8 => 0x80,
    });
    scales.fill(bf16::ZERO);
    let groups = cols.div_ceil(group);
    for (row, weights) in weights.chunks_exact(cols).enumerate() {
        for (g, weights) in weights.chunks(group).enumerate() {
            let scale = scale(int, weights);
            scales[scale_at(groups, row, g)] = scale;
            let scale = scale.to_f32();
            if scale == 0.0 || scale.is_nan() {
                continue;
            }
            let mut stored = [int.offset() as u8; 128];
            for (stored, &weight) in stored.iter_mut().zip(weights) {
                // The low byte of the rounded number's bits is the integer.
                *stored = stored.wrapping_add(moved(int, weight / scale).to_bits() as u8);
            }
            let line = row / LANES * (groups * group) + g * group;
            for (i, bytes) in stored[..group].chunks_exact(32 / int.bits()).enumerate() {
                let at = match int {
                    Int::Int8 => (line / QUAD + i) * LINE,
                    Int::Int4 => (line / QUAD / 2 + i) * LINE,
                };
                let to = &mut data[at + row % LANES * QUAD..][..QUAD];
                match int {
                    Int::Int8 => to.copy_from_slice(bytes),
                    Int::Int4 => {
                        for (j, to) in to.iter_mut().enumerate() {
                            *to = bytes[j] | bytes[QUAD + j] << 4;
                        }
                    }
                }
            }
        }
    }
}

/// Packs elements that somebody else has chosen: `value(row, column)`, to be multiplied by `scale(row, group)`. What is
/// beyond the range of `int` becomes its end.
///
/// # Panics
/// As [`quantize`].
pub fn lay(
    int: Int,
    group: usize,
    (rows, cols): (usize, usize),
    value: impl Fn(usize, usize) -> i8,
    scale: impl Fn(usize, usize) -> bf16,
    data: &mut [u8],
    scales: &mut [bf16],
) {
    let right = (
        bytes(int, rows, cols, group),
        self::scales(rows, cols, group),
    );
    assert_eq!(
        (data.len(), scales.len()),
        right,
        "lay: as `bytes` and `scales` say"
    );
    data.fill(match int {
        Int::Int4 => 0x88,
        Int::Int8 => 0x80,
    });
    scales.fill(bf16::ZERO);
    let groups = cols.div_ceil(group);
    let (low, high) = int.range();
    for row in 0..rows {
        for g in 0..groups {
            scales[scale_at(groups, row, g)] = scale(row, g);
        }
        for col in 0..cols {
            let value = i32::from(value(row, col)).clamp(low as i32, high as i32);
            let (at, shift) = place(int, groups * group, row, col);
            let mask = (u8::MAX >> (8 - int.bits())) << shift;
            data[at] = data[at] & !mask | ((value + int.offset()) as u8) << shift;
        }
    }
}

/// One element of a packed matrix of `cols` columns, widened.
///
/// # Panics
/// When `group` is not one of [`GROUPS`], or the element lies outside `data`.
pub fn value(
    int: Int,
    group: usize,
    cols: usize,
    data: &[u8],
    scales: &[bf16],
    row: usize,
    col: usize,
) -> f32 {
    check(group);
    assert!(col < cols, "value: column {col} of {cols}");
    let groups = cols.div_ceil(group);
    let (at, shift) = place(int, groups * group, row, col);
    let stored = data[at] >> shift & (u8::MAX >> (8 - int.bits()));
    let scale = scales[scale_at(groups, row, col / group)].to_f32();
    (i32::from(stored) - int.offset()) as f32 * scale
}

/// One row of a packed matrix, widened into `out` `[cols]`: what [`value`] gives, all at once.
///
/// # Panics
/// When `group` is not one of [`GROUPS`], or the row lies outside `data`.
pub fn widen_row(
    int: Int,
    group: usize,
    data: &[u8],
    scales: &[bf16],
    row: usize,
    out: &mut [f32],
) {
    check(group);
    let groups = out.len().div_ceil(group);
    for (g, out) in out.chunks_mut(group).enumerate() {
        let scale = scales[scale_at(groups, row, g)].to_f32();
        for (i, out) in out.iter_mut().enumerate() {
            let (at, shift) = place(int, groups * group, row, g * group + i);
            let stored = data[at] >> shift & (u8::MAX >> (8 - int.bits()));
            *out = (i32::from(stored) - int.offset()) as f32 * scale;
        }
    }
}

pub(crate) fn check(group: usize) {
    assert!(
        GROUPS.contains(&group),
        "a group has 32, 64 or 128 columns, not {group}"
    );
}

/// The byte of an element, and the bit in it where the element begins.
fn place(int: Int, padded: usize, row: usize, col: usize) -> (usize, usize) {
    let (panel, row) = (row / LANES, row % LANES);
    let (quad, i) = (col / QUAD, col % QUAD);
    let in_line = row * QUAD + i;
    match int {
        Int::Int8 => ((panel * padded / QUAD + quad) * LINE + in_line, 0),
        Int::Int4 => (
            (panel * padded / QUAD / 2 + quad / 2) * LINE + in_line,
            quad % 2 * 4,
        ),
    }
}

fn scale_at(groups: usize, row: usize, group: usize) -> usize {
    (row / LANES * groups + group) * LANES + row % LANES
}

/// Adding it rounds an f32 below 2²² to an integer, halves to even, which then sits in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// The nearest integer in range, with [`MAGIC`] added.
fn moved(int: Int, x: f32) -> f32 {
    let (low, high) = int.range();
    x.clamp(low, high) + MAGIC
}

/// The scale of one group.
fn scale(int: Int, weights: &[f32]) -> bf16 {
    if weights.iter().any(|w| !w.is_finite()) {
        return bf16::NAN;
    }
    let extreme = weights
        .iter()
        .fold(0.0f32, |e, &w| if w.abs() > e.abs() { w } else { e });
    // The range of 4 bits reaches further below zero: the extreme may lie there, under a scale of its own sign. Cutting it
    // off a little often serves the others.
    let candidates: &[f32] = match int {
        Int::Int4 => &[extreme / -8.0, extreme.abs() / 7.0, extreme / -8.75],
        Int::Int8 => &[extreme.abs() / 127.0],
    };
    let mut best = (f32::INFINITY, bf16::ZERO);
    for &candidate in candidates {
        let scale = bf16::from_f32(candidate);
        if !scale.is_normal() {
            continue;
        }
        let error = error(int, weights, scale.to_f32());
        if error < best.0 || best.1 == bf16::ZERO {
            best = (error, scale);
        }
    }
    best.1
}

/// Sum of squared errors under a scale.
fn error(int: Int, weights: &[f32], scale: f32) -> f32 {
    // Several sums at once, in a fixed order.
    let mut sums = [0.0f32; 8];
    for weights in weights.chunks(sums.len()) {
        for (sum, &weight) in sums.iter_mut().zip(weights) {
            let e = weight - (moved(int, weight / scale) - MAGIC) * scale;
            *sum += e * e;
        }
    }
    sums.iter().sum()
}
