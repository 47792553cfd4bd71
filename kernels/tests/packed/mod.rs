//! Packed matrices, and the written rule of their products, element by element and without any of the crate's code.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use guild_kernels::{
    MatrixRef, WeightsRef,
    pack::{self, Int},
};
use half::bf16;

use crate::oracle::values;

/// An owned packed matrix, and the numbers it was made from.
#[derive(Debug)]
pub struct Packed {
    pub int: Int,
    pub group: usize,
    pub rows: usize,
    pub cols: usize,
    pub from: Vec<f32>,
    pub data: Vec<u8>,
    pub scales: Vec<bf16>,
}

impl Packed {
    pub fn new(int: Int, group: usize, rows: usize, cols: usize, from: Vec<f32>) -> Packed {
        let mut data = vec![0; pack::bytes(int, rows, cols, group)];
        let mut scales = vec![bf16::ZERO; pack::scales(rows, cols, group)];
        pack::quantize(int, group, rows, cols, &from, &mut data, &mut scales);
        Packed {
            int,
            group,
            rows,
            cols,
            from,
            data,
            scales,
        }
    }

    pub fn random(int: Int, group: usize, rows: usize, cols: usize, seed: u64) -> Packed {
        Packed::new(int, group, rows, cols, values(seed, rows * cols))
    }

    pub fn as_ref(&self) -> MatrixRef<'_> {
        let (data, scales, group) = (self.data.as_slice(), self.scales.as_slice(), self.group);
        MatrixRef {
            rows: self.rows,
            cols: self.cols,
            data: match self.int {
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
            },
        }
    }

    pub fn value(&self, row: usize, col: usize) -> f32 {
        pack::value(
            self.int,
            self.group,
            self.cols,
            &self.data,
            &self.scales,
            row,
            col,
        )
    }

    pub fn scale(&self, row: usize, group: usize) -> f32 {
        let groups = self.cols.div_ceil(self.group);
        self.scales[(row / 16 * groups + group) * 16 + row % 16].to_f32()
    }

    /// The integer behind a value.
    fn integer(&self, row: usize, col: usize) -> i64 {
        let scale = self.scale(row, col / self.group);
        if scale == 0.0 {
            return 0;
        }
        let integer = f64::from(self.value(row, col)) / f64::from(scale);
        assert_eq!(integer, integer.round());
        integer as i64
    }

    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let integers: Vec<i64> = (0..self.rows * self.cols)
            .map(|i| self.integer(i / self.cols, i % self.cols))
            .collect();
        let mut out = Vec::new();
        for x in x.chunks(self.cols) {
            let groups: Vec<_> = x.chunks(self.group).map(quantise).collect();
            for row in 0..self.rows {
                let mut acc = 0.0f32;
                for (g, (s, q)) in groups.iter().enumerate() {
                    let w = &integers[row * self.cols + g * self.group..];
                    let dot: i64 = q.iter().zip(w).map(|(q, w)| q * w).sum();
                    acc = (dot as f32).mul_add(self.scale(row, g) * s, acc);
                }
                out.push(acc);
            }
        }
        out
    }
}

/// Scale and integers of a group of x.
fn quantise(x: &[f32]) -> (f32, Vec<i64>) {
    let zeros = vec![0; x.len()];
    if x.iter().any(|x| !x.is_finite()) {
        return (f32::NAN, zeros);
    }
    let scale = x.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
    if !scale.is_normal() {
        return (0.0, zeros);
    }
    let integers = x.iter().map(|x| (x / scale).round_ties_even() as i64);
    (scale, integers.collect())
}
