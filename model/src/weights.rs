//! Weights as a node holds them: owned, aligned, checked, in the format they are computed in.
//!
//! Secret: what lies in memory. A tensor is copied out of the mapped file at load, so that a file
//! changed under a running server can neither crash it nor change an answer, and anything that is not
//! a finite number is refused there. It uses the checkpoint; it does not know what a weight is for.

mod blob;
mod read;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use guild_kernels::{Cpu, MatrixRef, WeightsRef};
use half::bf16;

pub(crate) use blob::ALIGNMENT;
pub use blob::Blob;
pub(crate) use read::{odd_scale, weight as read_weight};

use crate::checkpoint::{Dtype, Stored, e4m3_to_f32};
use crate::config::FP8_BLOCK;
use crate::{Checkpoint, Config, ModelError};

/// How the elements of a weight lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
    /// OCP FP8 e4m3 with a scale per block.
    Fp8,
}

impl Format {
    /// What a stored tensor becomes in a role with this dtype.
    pub(crate) fn of(stored: Stored, dtype: Dtype) -> Format {
        match (dtype, stored) {
            (Dtype::F32, _) | (Dtype::Auto, Stored::F32 | Stored::F16) => Format::F32,
            (Dtype::Bf16, _) | (Dtype::Auto, Stored::Bf16) => Format::Bf16,
            (Dtype::Auto, Stored::F8E4M3) => Format::Fp8,
        }
    }

    /// The stored type with the same bytes.
    pub(crate) fn stored(self) -> Stored {
        match self {
            Format::F32 => Stored::F32,
            Format::Bf16 => Stored::Bf16,
            Format::Fp8 => Stored::F8E4M3,
        }
    }
}

/// A linear layer's weight `[rows = out, cols = in]`, resident.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    F32(Blob),
    Bf16(Blob),
    Fp8 { data: Blob, scales: Vec<f32> },
}

impl Matrix {
    /// Reads `{name}.weight` (and its block scales, if it has any) from a checkpoint.
    ///
    /// # Errors
    /// The tensor is missing, has another shape, or holds a value that is not finite; the message
    /// names the tensor and the element.
    pub fn load(
        ckpt: &Checkpoint,
        name: &str,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<Matrix, ModelError> {
        let view = ckpt.tensor(&format!("{name}.weight"))?;
        let format = Format::of(view.dtype(), dtype);
        let mut data = Blob::with_len(rows * cols * format.stored().bytes());
        let scales = read_weight(&view, rows, cols, format, data.as_mut())?;
        let storage = match format {
            Format::F32 => Storage::F32(data),
            Format::Bf16 => Storage::Bf16(data),
            Format::Fp8 => Storage::Fp8 { data, scales },
        };
        Ok(Matrix {
            rows,
            cols,
            storage,
        })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The weight as the kernels take it.
    pub fn as_ref(&self) -> MatrixRef<'_> {
        let data = match &self.storage {
            Storage::F32(data) => WeightsRef::F32(data.of()),
            Storage::Bf16(data) => WeightsRef::Bf16(data.of()),
            Storage::Fp8 { data, scales } => WeightsRef::Fp8 {
                data: data.of(),
                scales,
            },
        };
        MatrixRef {
            rows: self.rows,
            cols: self.cols,
            data,
        }
    }

    /// Rows `x` `[m, cols]` to rows `x wᵀ` `[m, rows]`, each alone.
    pub fn apply(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        apply(cpu, self.as_ref(), x)
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.storage {
            Storage::F32(data) | Storage::Bf16(data) => data.as_ref().len(),
            Storage::Fp8 { data, scales } => data.as_ref().len() + size_of_val(scales.as_slice()),
        };
        bytes as u64
    }

    /// Widens one row into `out` `[cols]`: what an embedding is.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        out.iter_mut()
            .enumerate()
            .for_each(|(col, o)| *o = self.value(row, col));
    }

    /// Some rows as a matrix of their own. FP8 stays FP8 where the cut falls between two blocks of
    /// scales; elsewhere the rows are dequantised to f32, which is exact but four times as large.
    pub(crate) fn slice(&self, range: Range<usize>) -> Matrix {
        let (start, end) = (range.start * self.cols, range.end * self.cols);
        let span = |data: &Blob, size: usize| Blob::copy(&data.as_ref()[start * size..end * size]);
        let storage = match &self.storage {
            Storage::F32(data) => Storage::F32(span(data, 4)),
            Storage::Bf16(data) => Storage::Bf16(span(data, 2)),
            Storage::Fp8 { data, scales } if range.start.is_multiple_of(FP8_BLOCK) => {
                let across = self.cols.div_ceil(FP8_BLOCK);
                let blocks = range.start / FP8_BLOCK..range.end.div_ceil(FP8_BLOCK);
                let scales = scales[blocks.start * across..blocks.end * across].to_vec();
                Storage::Fp8 {
                    data: span(data, 1),
                    scales,
                }
            }
            Storage::Fp8 { .. } => {
                let values = range
                    .clone()
                    .flat_map(|r| (0..self.cols).map(move |c| self.value(r, c)));
                Storage::F32(Blob::collect(range.len() * self.cols, values))
            }
        };
        Matrix {
            rows: range.len(),
            cols: self.cols,
            storage,
        }
    }

    /// The transpose, in the same format: blocks of scales transpose with what they scale.
    pub(crate) fn transposed(&self) -> Matrix {
        let storage = match &self.storage {
            Storage::F32(data) => Storage::F32(transpose::<f32>(data.of(), self.rows, self.cols)),
            Storage::Bf16(data) => {
                Storage::Bf16(transpose::<bf16>(data.of(), self.rows, self.cols))
            }
            Storage::Fp8 { data, scales } => {
                let (down, across) = (self.rows.div_ceil(FP8_BLOCK), self.cols.div_ceil(FP8_BLOCK));
                let scales = (0..down * across)
                    .map(|i| scales[i % down * across + i / down])
                    .collect();
                Storage::Fp8 {
                    data: transpose::<u8>(data.of(), self.rows, self.cols),
                    scales,
                }
            }
        };
        Matrix {
            rows: self.cols,
            cols: self.rows,
            storage,
        }
    }

    /// One weight, widened to f32 as the kernels do it: exactly, or for FP8 with one rounding.
    fn value(&self, row: usize, col: usize) -> f32 {
        let at = row * self.cols + col;
        match &self.storage {
            Storage::F32(data) => data.of::<f32>()[at],
            Storage::Bf16(data) => data.of::<bf16>()[at].to_f32(),
            Storage::Fp8 { data, scales } => {
                let scale =
                    scales[row / FP8_BLOCK * self.cols.div_ceil(FP8_BLOCK) + col / FP8_BLOCK];
                e4m3_to_f32(data.as_ref()[at]) * scale
            }
        }
    }
}

/// Rows `x` `[m, cols]` to rows `x wᵀ` `[m, rows]`, each alone.
pub(crate) fn apply(cpu: &Cpu, weight: MatrixRef<'_>, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / weight.cols * weight.rows];
    cpu.matmul(&mut out, x, weight);
    out
}

/// Bytes from one word about progress to the next: less is done before anybody has read it.
const TELL_BYTES: u64 = 32 << 20;

fn worth_telling(before: u64, after: u64) -> bool {
    before / TELL_BYTES < after / TELL_BYTES
}

/// Reads the tensors of one role from a checkpoint, and tells how far it is.
pub(crate) struct Loader<'a> {
    ckpt: &'a Checkpoint,
    dtype: Dtype,
    done: AtomicU64,
    total: u64,
    progress: &'a (dyn Fn(u64, u64) + Sync),
}

impl<'a> Loader<'a> {
    /// `total` is the stored bytes that will be read, `progress` hears of those done: every [`TELL_BYTES`], and of
    /// the end.
    pub(crate) fn new(
        ckpt: &'a Checkpoint,
        dtype: Dtype,
        total: u64,
        progress: &'a (dyn Fn(u64, u64) + Sync),
    ) -> Loader<'a> {
        Loader {
            ckpt,
            dtype,
            done: AtomicU64::new(0),
            total,
            progress,
        }
    }

    pub(crate) fn checkpoint(&self) -> &'a Checkpoint {
        self.ckpt
    }

    pub(crate) fn config(&self) -> &'a Config {
        self.ckpt.config()
    }

    /// `{name}.weight` as `[rows, cols]` in the role's format.
    pub(crate) fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, ModelError> {
        self.matrix_as(name, rows, cols, self.dtype)
    }

    /// `{name}.weight` as `[rows, cols]` in f32, whatever the role's format: routers.
    pub(crate) fn matrix_f32(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, ModelError> {
        self.matrix_as(name, rows, cols, Dtype::F32)
    }

    /// The tensor `name` `[len]` in f32: norms and biases.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let values = read::floats(&self.ckpt.tensor(name)?, &[len])?;
        self.count(name);
        Ok(values)
    }

    /// All is read, optional tensors that were shared instead of read included.
    pub(crate) fn finish(&self) {
        (self.progress)(self.total, self.total);
    }

    fn matrix_as(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<Matrix, ModelError> {
        let matrix = Matrix::load(self.ckpt, name, rows, cols, dtype)?;
        self.count(&format!("{name}.weight"));
        Ok(matrix)
    }

    fn count(&self, tensor: &str) {
        let bytes = self.ckpt.stored_bytes(tensor);
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        if worth_telling(before, before + bytes) {
            (self.progress)((before + bytes).min(self.total), self.total);
        }
    }
}

fn transpose<T: bytemuck::Pod>(data: &[T], rows: usize, cols: usize) -> Blob {
    Blob::collect(
        data.len(),
        (0..cols).flat_map(|c| (0..rows).map(move |r| data[r * cols + c])),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 300 x 200 FP8 values: blocks of 3 x 2, ragged at both ends.
    fn fp8() -> Matrix {
        let data = Blob::collect(
            300 * 200,
            (0..300 * 200u32).map(|i| (i * 7 % 126) as u8 | (i as u8 & 0x80)),
        );
        Matrix {
            rows: 300,
            cols: 200,
            storage: Storage::Fp8 {
                data,
                scales: vec![0.5, 3.0, 0.25, 7.0, 1.0, 0.1],
            },
        }
    }

    #[test]
    fn cutting_and_transposing_move_every_value_where_it_belongs() {
        let wide = fp8();
        for matrix in [
            fp8(),
            Matrix {
                storage: Storage::F32(Blob::collect(
                    300 * 200,
                    (0..300 * 200).map(|i| wide.value(i / 200, i % 200)),
                )),
                ..fp8()
            },
        ] {
            for range in [
                0..300,
                0..130,
                128..300,
                256..300,
                128..200,
                130..260,
                299..300,
            ] {
                let cut = matrix.slice(range.clone());
                let turned = cut.transposed();
                assert_eq!(
                    (cut.rows(), cut.cols(), turned.rows(), turned.cols()),
                    (range.len(), 200, 200, range.len())
                );
                for (i, row) in range.enumerate() {
                    for col in 0..200 {
                        assert_eq!(
                            cut.value(i, col).to_bits(),
                            matrix.value(row, col).to_bits()
                        );
                        assert_eq!(
                            turned.value(col, i).to_bits(),
                            matrix.value(row, col).to_bits()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn progress_is_told_in_steps_that_a_person_can_follow() {
        let sizes = [1 << 20; 100];
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        let told = ends.filter(|&end| worth_telling(end - (1 << 20), end));
        assert_eq!(told.collect::<Vec<_>>(), [32 << 20, 64 << 20, 96 << 20]);
        assert!(worth_telling(5, 500 << 20));
    }

    #[test]
    fn fp8_stays_fp8_where_blocks_survive_the_cut() {
        let matrix = fp8();
        assert_eq!(matrix.slice(128..300).bytes(), 172 * 200 + 4 * 4);
        assert_eq!(
            matrix.slice(128..300).transposed().bytes(),
            172 * 200 + 4 * 4
        );
        assert_eq!(matrix.slice(130..300).bytes(), 170 * 200 * 4);
    }
}
