//! Cached latents as stored: formats of a row, writing and reading one.
//!
//! Secret: the bytes of a row. A row is `width` values, of which the first `value_width` are c_kv and the rest k_pe.

use half::bf16;

use crate::generic::weights::e4m3_to_f32;

/// Values of c_kv that share one scale in [`LatentFormat::Fp8`].
pub(crate) const SCALED: usize = 128;
/// The largest finite e4m3 value.
const E4M3_MAX: f32 = 448.0;

/// How cached latents are stored. All are widened exactly before they meet a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LatentFormat {
    /// As computed.
    F32,
    /// Rounded to bf16, nearest even.
    Bf16,
    /// c_kv as OCP FP8 e4m3 with one f32 scale per 128 values, k_pe as bf16 (the layout FlashMLA introduced):
    /// the scale is `amax / 448`, a value is `f32(byte) * scale`. 128 values of which one is not finite are all NaN.
    Fp8,
}

impl LatentFormat {
    /// Bytes of one row of `width` values, `value_width` of them c_kv.
    pub fn row_bytes(self, width: usize, value_width: usize) -> usize {
        match self {
            LatentFormat::F32 => width * size_of::<f32>(),
            LatentFormat::Bf16 => width * size_of::<bf16>(),
            LatentFormat::Fp8 => {
                value_width
                    + value_width.div_ceil(SCALED) * size_of::<f32>()
                    + (width - value_width) * size_of::<bf16>()
            }
        }
    }

    /// Writes one row.
    ///
    /// # Panics
    /// `to` is not [`LatentFormat::row_bytes`] of `row.len()`.
    pub fn write(self, row: &[f32], value_width: usize, to: &mut [u8]) {
        assert_eq!(
            to.len(),
            self.row_bytes(row.len(), value_width),
            "a cached row of {} values",
            row.len()
        );
        match self {
            LatentFormat::F32 => {
                for (to, x) in to.as_chunks_mut().0.iter_mut().zip(row) {
                    *to = x.to_le_bytes();
                }
            }
            LatentFormat::Bf16 => write_bf16(row, to),
            LatentFormat::Fp8 => {
                let (c_kv, k_pe) = row.split_at(value_width);
                let (bytes, rest) = to.split_at_mut(value_width);
                let (scales, to_k_pe) = rest.split_at_mut(value_width.div_ceil(SCALED) * 4);
                let groups = c_kv.chunks(SCALED).zip(bytes.chunks_mut(SCALED));
                for ((values, bytes), scale) in groups.zip(scales.as_chunks_mut().0) {
                    *scale = write_e4m3(values, bytes).to_le_bytes();
                }
                write_bf16(k_pe, to_k_pe);
            }
        }
    }

    /// Reads one row, widened exactly.
    ///
    /// # Panics
    /// `from` is not [`LatentFormat::row_bytes`] of `row.len()`.
    pub fn read(self, from: &[u8], value_width: usize, row: &mut [f32]) {
        assert_eq!(
            from.len(),
            self.row_bytes(row.len(), value_width),
            "a cached row of {} values",
            row.len()
        );
        match self {
            LatentFormat::F32 => {
                for (x, from) in row.iter_mut().zip(from.as_chunks().0) {
                    *x = f32::from_le_bytes(*from);
                }
            }
            LatentFormat::Bf16 => read_bf16(from, row),
            LatentFormat::Fp8 => {
                let (c_kv, k_pe) = row.split_at_mut(value_width);
                let (bytes, rest) = from.split_at(value_width);
                let (scales, from_k_pe) = rest.split_at(value_width.div_ceil(SCALED) * 4);
                let groups = c_kv.chunks_mut(SCALED).zip(bytes.chunks(SCALED));
                for ((values, bytes), scale) in groups.zip(scales.as_chunks().0) {
                    let scale = f32::from_le_bytes(*scale);
                    for (x, byte) in values.iter_mut().zip(bytes) {
                        *x = e4m3_to_f32(*byte) * scale;
                    }
                }
                read_bf16(from_k_pe, k_pe);
            }
        }
    }
}

impl std::fmt::Display for LatentFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LatentFormat::F32 => "f32",
            LatentFormat::Bf16 => "bf16",
            LatentFormat::Fp8 => "fp8",
        })
    }
}

fn write_bf16(row: &[f32], to: &mut [u8]) {
    for (to, x) in to.as_chunks_mut().0.iter_mut().zip(row) {
        *to = bf16::from_f32(*x).to_le_bytes();
    }
}

fn read_bf16(from: &[u8], row: &mut [f32]) {
    for (x, from) in row.iter_mut().zip(from.as_chunks().0) {
        *x = bf16::from_le_bytes(*from).to_f32();
    }
}

/// Writes values that share a scale, and gives it.
fn write_e4m3(values: &[f32], to: &mut [u8]) -> f32 {
    let amax = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    if !values.iter().all(|x| x.is_finite()) {
        to.fill(0);
        return f32::NAN;
    }
    let scale = amax / E4M3_MAX;
    if scale == 0.0 {
        to.fill(0);
        return 0.0;
    }
    for (to, x) in to.iter_mut().zip(values) {
        *to = e4m3(x / scale);
    }
    scale
}

/// The nearest e4m3 byte of a finite number, ties to even; beyond the largest, the largest.
fn e4m3(x: f32) -> u8 {
    /// Adding and subtracting it rounds a number below 2²² to an integer, which then sits in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    /// The smallest normal number; below it e4m3 is a fixed point of 2⁻⁹.
    const NORMAL: f32 = 1.0 / 64.0;
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs();
    let code = if magnitude < NORMAL {
        (magnitude * 512.0 + MAGIC).to_bits() - MAGIC.to_bits()
    } else {
        let bits = magnitude.to_bits();
        // Rounds at the third bit of the mantissa, then takes off the difference of the biases.
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)).min(0x7e)
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_is_the_nearest_and_ties_go_to_even() {
        let value = |code: u8| e4m3_to_f32(code);
        for code in 0..0x7e_u8 {
            let (low, high) = (value(code), value(code + 1));
            let middle = (low + high) / 2.0;
            let even = code + (code & 1);
            assert_eq!(e4m3(low), code);
            assert_eq!(e4m3(-low), 0x80 | code);
            assert_eq!(e4m3(middle), even, "between {low} and {high}");
            assert_eq!(e4m3(middle.next_down()), code);
            assert_eq!(e4m3(middle.next_up()), code + 1);
        }
        assert_eq!(e4m3(1e9), 0x7e);
    }

    #[test]
    fn a_row_comes_back_within_the_bound_of_its_format() {
        let (width, value_width) = (300, 270);
        let row: Vec<f32> = (0..width).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        for (format, bound) in [
            (LatentFormat::F32, 0.0),
            (LatentFormat::Bf16, 1.0 / 256.0),
            (LatentFormat::Fp8, 1.0 / 16.0),
        ] {
            let mut bytes = vec![0; format.row_bytes(width, value_width)];
            let mut back = vec![f32::NAN; width];
            format.write(&row, value_width, &mut bytes);
            format.read(&bytes, value_width, &mut back);
            for (x, y) in row.iter().zip(&back) {
                // Below the normal range of e4m3 the error is absolute.
                assert!(
                    (x - y).abs() <= bound * x.abs().max(3.0 / 448.0),
                    "{format}: {x} {y}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_finite_never_comes_back_as_a_number() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![1.0; 140];
            row[3] = bad;
            row[139] = bad;
            let mut bytes = vec![0; LatentFormat::Fp8.row_bytes(140, 130)];
            let mut back = vec![0.0; 140];
            LatentFormat::Fp8.write(&row, 130, &mut bytes);
            LatentFormat::Fp8.read(&bytes, 130, &mut back);
            assert!(back[..128].iter().all(|x| x.is_nan()) && !back[139].is_finite());
            assert!((back[129] - 1.0).abs() < 1e-6);
        }
        let mut bytes = [1; 8];
        LatentFormat::Fp8.write(&[0.0; 4], 4, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }
}
