//! Whether a leaf multiplies bytes as the rule says, asked before it is used.
//!
//! Secret: the products it is asked for. Integers are exact, so equal bits are the only right answer.

use super::matmul;
use crate::{
    MatrixRef, WeightsRef,
    generic::matmul::{Input, Output},
    isa::Choice,
    pack::{self, Int},
    portable::Portable,
};

/// Holds products of both formats and all groups, with full and partial tiles, against plain Rust.
pub(crate) fn is_right(choice: Choice) -> bool {
    let (m, rows, cols) = (16 + 11, 2 * 16 + 5, 2 * 128 + 40);
    // Numbers of both signs in no order; those of x begin elsewhere.
    let number = |i: usize| (i * 7919 % 2003) as f32 / 1001.0 - 1.0;
    let x: Vec<f32> = (0..m * cols).map(|i| number(i + 17)).collect();
    let weights: Vec<f32> = (0..rows * cols).map(number).collect();
    [Int::Int4, Int::Int8].into_iter().all(|int| {
        pack::GROUPS.into_iter().all(|group| {
            let mut data = vec![0; pack::bytes(int, rows, cols, group)];
            let mut scales = vec![half::bf16::ZERO; pack::scales(rows, cols, group)];
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
            let product = |choice| {
                let mut out = vec![0.0f32; m * rows];
                let to = Output {
                    data: out.as_mut_ptr(),
                    stride: rows,
                };
                let x = Input {
                    data: &x,
                    index: None,
                    stride: cols,
                    m,
                    cols,
                };
                // SAFETY: the output is ours and `[m, rows]`; the weights are packed as their shape says.
                unsafe { matmul(choice, None, to, x, MatrixRef { rows, cols, data }) };
                out
            };
            let bits = |out: Vec<f32>| -> Vec<u32> { out.iter().map(|x| x.to_bits()).collect() };
            bits(product(choice)) == bits(product(Choice::Portable(Portable)))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn every_leaf_is_right() {
        for isa in Isa::available() {
            assert_eq!(Choice::new(isa).map(is_right), Ok(true), "{isa:?}");
        }
    }

    /// Where there are no tiles, at least what is brought to them is where they look for it.
    #[test]
    fn tiles_find_rows_and_weights() {
        assert!(is_right(Choice::Tiled));
        match Isa::Amx.refused() {
            Some(why) => eprintln!("skipped: AMX itself, for {why}"),
            None => assert!(Isa::available().contains(&Isa::Amx)),
        }
    }
}
