//! Numbers to FP8, as DeepSeek-V3 is released: e4m3 with one f32 scale per block of 128 x 128.
//!
//! Secret: the rounding. What is read back is `checkpoint::e4m3_to_f32` times the scale.

use crate::config::FP8_BLOCK;

/// The largest e4m3 value.
const MAX: f32 = 448.0;
/// The smallest normal e4m3 value is two to this.
const MIN_EXPONENT: i32 = -6;
/// Bits of the mantissa.
const MANTISSA: i32 = 3;

/// Quantises up to 128 rows `values` `[rows, cols]` into `data`, and a scale per 128 columns into `scales`: the largest
/// magnitude of a block becomes 448.
pub(super) fn quantize(cols: usize, values: &[f32], data: &mut [u8], scales: &mut [f32]) {
    for (block, scale) in scales.iter_mut().enumerate() {
        let span = block * FP8_BLOCK..cols.min((block + 1) * FP8_BLOCK);
        let rows = values.chunks_exact(cols);
        let largest = rows
            .flat_map(|row| &row[span.clone()])
            .fold(0.0f32, |m, v| m.max(v.abs()));
        // A scale that is no normal number would lose bits; so small a block is zero anyhow.
        let exact = largest / MAX;
        *scale = if exact.is_normal() { exact } else { 1.0 };
        let rows = values.chunks_exact(cols).zip(data.chunks_exact_mut(cols));
        for (from, to) in rows {
            let pairs = from[span.clone()].iter().zip(&mut to[span.clone()]);
            pairs.for_each(|(&v, to)| *to = encode(v / *scale));
        }
    }
}

/// The nearest e4m3 byte of a finite number, halves to even; what is too large becomes the largest.
fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(MAX);
    // The distance of neighbouring values around it.
    let exponent = if magnitude == 0.0 {
        MIN_EXPONENT
    } else {
        libm::ilogbf(magnitude)
    };
    let exponent = exponent.max(MIN_EXPONENT);
    let steps = libm::rintf(magnitude * libm::exp2f((MANTISSA - exponent) as f32)) as i32;
    // Below the first normal exponent steps are the byte itself; each exponent has eight steps more. Rounding up to the
    // next power of two carries into the exponent by itself.
    let byte = (exponent - MIN_EXPONENT) * (1 << MANTISSA) + steps;
    sign | byte.min(0x7e) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::e4m3_to_f32;

    #[test]
    fn every_e4m3_value_is_its_own_byte_and_others_go_to_the_nearest() {
        let values: Vec<(u8, f32)> = (0..0x7fu8).map(|b| (b, e4m3_to_f32(b))).collect();
        for &(byte, value) in &values {
            assert_eq!(encode(value), byte);
            assert_eq!(encode(-value), byte | 0x80);
        }
        for pair in values.windows(2) {
            let ((low, a), (high, b)) = (pair[0], pair[1]);
            let middle = (a + b) / 2.0;
            assert_eq!(encode(middle), if low % 2 == 0 { low } else { high });
            assert_eq!(encode(middle - (b - a) / 100.0), low);
            assert_eq!(encode(middle + (b - a) / 100.0), high);
        }
        assert_eq!((encode(1e9), encode(-1e9)), (0x7e, 0xfe));
        assert_eq!(encode(1e-30), 0);
    }
}
