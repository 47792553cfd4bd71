//! Whether a leaf multiplies bytes, or pairs of bf16, as the rule says, asked before it is used.
//!
//! Secret: the products it is asked for. Equal bits are the only right answer.

use half::bf16;

use super::matmul;
use crate::{
    MatrixRef, WeightsRef,
    arithmetic::Pairs,
    generic::matmul::{Input, Output},
    isa::Choice,
    pack::{self, Int},
};

/// Holds products of both formats and all groups, with full and partial tiles, against plain Rust.
pub(crate) fn is_right(choice: Choice) -> bool {
    let (m, rows, cols) = (16 + 11, 2 * 16 + 5, 2 * 128 + 40);
    let x: Vec<f32> = (0..m * cols).map(|i| number(i + 17)).collect();
    let weights: Vec<f32> = (0..rows * cols).map(number).collect();
    [Int::Int4, Int::Int8].into_iter().all(|int| {
        pack::GROUPS.into_iter().all(|group| {
            let mut data = vec![0; pack::bytes(int, rows, cols, group)];
            let mut scales = vec![bf16::ZERO; pack::scales(rows, cols, group)];
            pack::quantize(int, group, rows, cols, &weights, &mut data, &mut scales);
            let (data, scales) = (data.as_slice(), scales.as_slice());
            let data = match int {
                Int::Int4 => WeightsRef::Int4 {
                    data,
                    scales,
                    group,
                },
                Int::Int8 => WeightsRef::Int8 {
                    data,
                    scales,
                    group,
                },
            };
            let w = MatrixRef { rows, cols, data };
            product(choice, &x, w) == product(Choice::portable(), &x, w)
        })
    })
}

/// Holds products of both formats, with full and partial tiles and all kinds of numbers, against plain Rust.
pub(crate) fn multiplies(pairs: Pairs) -> bool {
    let (m, rows, cols) = (16 + 11, 2 * 16 + 5, 4 * 128 + 40);
    // Rows of x reach from products too small to products too large.
    let x: Vec<f32> = (0..m * cols)
        .map(|i| match (i / cols, i % 101) {
            (3, 7) => f32::INFINITY,
            (5, 7) => f32::NAN,
            (_, 0) => 1e-39,
            (row, _) => number(i + 17) * 10f32.powi(-38 + 3 * row as i32),
        })
        .collect();
    let halves: Vec<bf16> = (0..rows * cols)
        .map(|i| match i % 103 {
            0 => bf16::from_bits(0x8001),
            1 => bf16::from_f32(1e-38),
            _ => bf16::from_f32(number(i)),
        })
        .collect();
    // All but the NaN that would hide the others; one row of weights has it.
    let bytes: Vec<u8> = (0..rows * cols)
        .map(|i| match (i * 7 % 251) as u8 {
            0x7f if i / cols != 9 => 0x7e,
            byte => byte,
        })
        .collect();
    let scales: Vec<f32> = (0..rows.div_ceil(128) * cols.div_ceil(128))
        .map(|i| number(i) * 1e3)
        .collect();
    let plain = Choice::portable().with(Pairs::Plain(pairs.rule()));
    let formats = [
        WeightsRef::Bf16(&halves),
        WeightsRef::Fp8 {
            data: &bytes,
            scales: &scales,
        },
    ];
    formats.into_iter().all(|data| {
        let w = MatrixRef { rows, cols, data };
        product(Choice::portable().with(pairs), &x, w) == product(plain, &x, w)
    })
}

/// Numbers of both signs in no order.
fn number(i: usize) -> f32 {
    (i * 7919 % 2003) as f32 / 1001.0 - 1.0
}

/// The bits of `x wᵀ`, every NaN alike.
fn product(choice: Choice, x: &[f32], w: MatrixRef<'_>) -> Vec<u32> {
    let m = x.len() / w.cols;
    let mut out = vec![0.0f32; m * w.rows];
    let to = Output {
        data: out.as_mut_ptr(),
        stride: w.rows,
    };
    let x = Input {
        data: x,
        index: None,
        stride: w.cols,
        m,
        cols: w.cols,
    };
    // SAFETY: the output is ours and `[m, rows]`; the weights are what their shape says.
    unsafe { matmul(choice, None, to, x, w) };
    let bits = |x: &f32| if x.is_nan() { f32::NAN } else { *x }.to_bits();
    out.iter().map(bits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arithmetic, Isa};

    #[test]
    fn every_leaf_is_right() {
        for isa in Isa::available() {
            assert_eq!(
                Choice::new(isa, Arithmetic::Fma).map(is_right),
                Ok(true),
                "{isa:?}"
            );
        }
    }

    /// Where there are no tiles, at least what is brought to them is where they look for it.
    #[test]
    fn tiles_find_rows_and_weights() {
        assert!(is_right(Choice::tiled()));
        match Isa::Amx.refused() {
            Some(why) => eprintln!("skipped: AMX itself, for {why}"),
            None => assert!(Isa::available().contains(&Isa::Amx)),
        }
    }
}
