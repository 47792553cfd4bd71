//! Weights as a node holds them: owned, aligned, checked, in the format they are computed in.
//!
//! Secret: what lies in memory. A tensor is copied out of the mapped file at load, so that a file
//! changed under a running server can neither crash it nor change an answer, and anything that is not
//! a finite number is refused there. It uses the checkpoint; it does not know what a weight is for.

mod blob;
mod fp8;
mod read;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use guild_kernels::pack::{self, Int};
use guild_kernels::{MatrixRef, WeightsRef};
use half::bf16;

pub(crate) use blob::ALIGNMENT;
pub use blob::Blob;
pub use read::Breathe;
pub(crate) use read::{
    PIECE, odd_packed_scale, odd_scale, stored as read_stored, weight as read_weight,
};

use crate::checkpoint::{Dtype, Stored, TensorView, e4m3_to_f32};
use crate::config::{FP8_BLOCK, Role};
use crate::workspace::{Buffer, Workspace};
use crate::{Checkpoint, Config, ModelError};

/// How the elements of a weight lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
    /// OCP FP8 e4m3 with a scale per block.
    Fp8,
    /// Integers with a scale per row and group of columns.
    Packed {
        int: Int,
        group: usize,
    },
}

impl Format {
    /// What a stored tensor becomes with this dtype.
    ///
    /// # Errors
    /// A packed weight, where something else is asked for: what it was packed from is gone.
    pub(crate) fn of(view: &TensorView<'_>, dtype: Dtype) -> Result<Format, ModelError> {
        let role = Role::of(view.name());
        let packed = |packed: &crate::config::Packed| {
            let int = packed.of(role)?;
            Some(Format::Packed {
                int,
                group: packed.group,
            })
        };
        if matches!(view.dtype(), Stored::U8 | Stored::I32) {
            let stored = view.packed().and_then(packed);
            return stored.filter(|_| dtype == Dtype::Auto).ok_or_else(|| {
                let reason = format!("is packed and cannot become {dtype}; use --dtype auto");
                ModelError::tensor(view.file(), view.name(), reason)
            });
        }
        Ok(match (dtype, view.dtype()) {
            (Dtype::F32, _)
            | (Dtype::Auto, Stored::F32 | Stored::F16 | Stored::U8 | Stored::I32) => Format::F32,
            (Dtype::Bf16, _) | (Dtype::Auto, Stored::Bf16) => Format::Bf16,
            (Dtype::Auto, Stored::F8E4M3) => Format::Fp8,
            (Dtype::Fp8, _) => match role {
                Role::Expert | Role::Linear | Role::Absorbed => Format::Fp8,
                Role::Embedding | Role::Head | Role::Exact => Format::Bf16,
            },
            (Dtype::Int8 { .. } | Dtype::Int4 { .. }, _) => {
                let ours = dtype.packed();
                ours.as_ref().and_then(packed).unwrap_or(Format::Bf16)
            }
        })
    }

    /// The stored type with the same bytes.
    pub(crate) fn stored(self) -> Stored {
        match self {
            Format::F32 => Stored::F32,
            Format::Bf16 => Stored::Bf16,
            Format::Fp8 => Stored::F8E4M3,
            Format::Packed { .. } => Stored::U8,
        }
    }

    /// Bytes of the data and of the scales of a matrix; None where a machine cannot count them.
    pub(crate) fn bytes(self, rows: usize, cols: usize) -> Option<(usize, usize)> {
        let (down, across) = self.scale_shape(rows, cols);
        let scales = down.checked_mul(across)?.checked_mul(self.scale_bytes())?;
        let data = match self {
            Format::Packed { int, group } => {
                // Each bound is a little more than what is asked for.
                { rows.checked_add(PANEL)? }.checked_mul(cols.checked_add(group)?)?;
                pack::bytes(int, rows, cols, group)
            }
            _ => rows.checked_mul(cols)?.checked_mul(self.stored().bytes())?,
        };
        Some((data, scales))
    }

    /// Rows and columns of the scales; none for formats without.
    pub(crate) fn scale_shape(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Format::F32 | Format::Bf16 => (0, 0),
            Format::Fp8 => (rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)),
            Format::Packed { group, .. } => (
                rows.div_ceil(PANEL).saturating_mul(PANEL),
                cols.div_ceil(group),
            ),
        }
    }

    fn scale_bytes(self) -> usize {
        match self {
            Format::Packed { .. } => size_of::<bf16>(),
            Format::F32 | Format::Bf16 | Format::Fp8 => size_of::<f32>(),
        }
    }

    /// The first scale that cannot be one.
    pub(crate) fn odd_scale(self, scales: &[u8]) -> Option<usize> {
        match self {
            Format::F32 | Format::Bf16 => None,
            Format::Fp8 => odd_scale(bytemuck::cast_slice(scales)),
            Format::Packed { int, .. } => odd_packed_scale(int, bytemuck::cast_slice(scales)),
        }
    }

    /// A weight `[rows, cols]` as the kernels take it.
    pub(crate) fn matrix<'a>(
        self,
        rows: usize,
        cols: usize,
        data: &'a [u8],
        scales: &'a [u8],
    ) -> MatrixRef<'a> {
        let data = match self {
            Format::F32 => WeightsRef::F32(bytemuck::cast_slice(data)),
            Format::Bf16 => WeightsRef::Bf16(bytemuck::cast_slice(data)),
            Format::Fp8 => WeightsRef::Fp8 {
                data,
                scales: bytemuck::cast_slice(scales),
            },
            Format::Packed { int, group } => {
                let scales = bytemuck::cast_slice(scales);
                match int {
                    Int::Int8 => WeightsRef::Int8 {
                        data,
                        scales,
                        group,
                    },
                    Int::Int4 => WeightsRef::Int4 {
                        data,
                        scales,
                        group,
                    },
                }
            }
        };
        MatrixRef { rows, cols, data }
    }
}

/// Rows of a packed panel.
pub(crate) const PANEL: usize = 16;

/// A linear layer's weight `[rows = out, cols = in]`, resident.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    format: Format,
    data: Blob,
    /// Empty where the format has none.
    scales: Blob,
}

impl Matrix {
    /// Reads `{name}.weight` (and its scales, if it has any) from a checkpoint.
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
        Matrix::of(&ckpt.tensor(&format!("{name}.weight"))?, rows, cols, dtype)
    }

    /// The same of a tensor that was looked up.
    pub(crate) fn of(
        view: &TensorView<'_>,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<Matrix, ModelError> {
        let format = Format::of(view, dtype)?;
        let (data, scales) = format.bytes(rows, cols).ok_or_else(|| {
            let reason = "is larger than any memory";
            ModelError::tensor(view.file(), view.name(), reason)
        })?;
        let (mut data, mut scales) = (Blob::with_len(data), Blob::with_len(scales));
        let (to, to_scales) = (data.as_mut(), scales.as_mut());
        read_weight(view, rows, cols, format, to, to_scales, &|| ())?;
        Ok(Matrix {
            rows,
            cols,
            format,
            data,
            scales,
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
        let (data, scales) = self.memory();
        self.format.matrix(self.rows, self.cols, data, scales)
    }

    /// Data and scales as they lie in memory.
    pub(crate) fn memory(&self) -> (&[u8], &[u8]) {
        (self.data.as_ref(), self.scales.as_ref())
    }

    /// Rows `x` `[m, cols]` to rows `x wᵀ` `[m, rows]`, each alone.
    pub fn apply(&self, workspace: &Workspace, x: &[f32]) -> Buffer {
        let mut out = workspace.take(x.len() / self.cols * self.rows);
        workspace.cpu().matmul(&mut out, x, self.as_ref());
        out
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        let (data, scales) = self.memory();
        (data.len() + scales.len()) as u64
    }

    /// Widens one row into `out` `[cols]`: what an embedding is.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        if let Format::Packed { int, group } = self.format {
            let (data, scales) = (self.data.as_ref(), self.scales.of());
            return pack::widen_row(int, group, data, scales, row, out);
        }
        out.iter_mut()
            .enumerate()
            .for_each(|(col, o)| *o = self.value(row, col));
    }

    /// Some rows as a matrix of their own. FP8 stays FP8 where the cut falls between two blocks of
    /// scales; elsewhere, and where weights are packed, the rows are dequantised to f32, which is exact but
    /// several times as large.
    pub(crate) fn slice(&self, range: Range<usize>) -> Matrix {
        let (start, end) = (range.start * self.cols, range.end * self.cols);
        let span = |size: usize| Blob::copy(&self.data.as_ref()[start * size..end * size]);
        let (format, data, scales) = match self.format {
            Format::F32 => (self.format, span(4), Blob::with_len(0)),
            Format::Bf16 => (self.format, span(2), Blob::with_len(0)),
            Format::Fp8 if range.start.is_multiple_of(FP8_BLOCK) => {
                let across = self.cols.div_ceil(FP8_BLOCK);
                let blocks = range.start / FP8_BLOCK..range.end.div_ceil(FP8_BLOCK);
                let bytes = blocks.start * across * 4..blocks.end * across * 4;
                let scales = Blob::copy(&self.scales.as_ref()[bytes]);
                (self.format, span(1), scales)
            }
            Format::Fp8 | Format::Packed { .. } => {
                let values = range
                    .clone()
                    .flat_map(|r| (0..self.cols).map(move |c| self.value(r, c)));
                let wide = Blob::collect(range.len() * self.cols, values);
                (Format::F32, wide, Blob::with_len(0))
            }
        };
        Matrix {
            rows: range.len(),
            cols: self.cols,
            format,
            data,
            scales,
        }
    }

    /// The transpose, in the same format (blocks of scales transpose with what they scale), or in f32 where weights
    /// are packed.
    pub(crate) fn transposed(&self) -> Matrix {
        let (rows, cols) = (self.rows, self.cols);
        let (format, data, scales) = match self.format {
            Format::F32 => {
                let data = transpose::<f32>(self.data.of(), rows, cols);
                (self.format, data, Blob::with_len(0))
            }
            Format::Bf16 => {
                let data = transpose::<bf16>(self.data.of(), rows, cols);
                (self.format, data, Blob::with_len(0))
            }
            Format::Fp8 => {
                let data = transpose::<u8>(self.data.of(), rows, cols);
                let (down, across) = self.format.scale_shape(rows, cols);
                let scales = transpose::<f32>(self.scales.of(), down, across);
                (self.format, data, scales)
            }
            Format::Packed { .. } => {
                let values = (0..cols).flat_map(|c| (0..rows).map(move |r| self.value(r, c)));
                let wide = Blob::collect(rows * cols, values);
                (Format::F32, wide, Blob::with_len(0))
            }
        };
        Matrix {
            rows: cols,
            cols: rows,
            format,
            data,
            scales,
        }
    }

    /// One weight, widened to f32 as the kernels do it: exactly, or where it has a scale with one rounding.
    fn value(&self, row: usize, col: usize) -> f32 {
        let at = row * self.cols + col;
        match self.format {
            Format::F32 => self.data.of::<f32>()[at],
            Format::Bf16 => self.data.of::<bf16>()[at].to_f32(),
            Format::Fp8 => {
                let scales = self.scales.of::<f32>();
                let scale =
                    scales[row / FP8_BLOCK * self.cols.div_ceil(FP8_BLOCK) + col / FP8_BLOCK];
                e4m3_to_f32(self.data.as_ref()[at]) * scale
            }
            Format::Packed { int, group } => {
                let (data, scales) = (self.data.as_ref(), self.scales.of());
                pack::value(int, group, self.cols, data, scales, row, col)
            }
        }
    }
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
#[allow(clippy::unwrap_used)]
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
            format: Format::Fp8,
            data,
            scales: Blob::collect(6, [0.5f32, 3.0, 0.25, 7.0, 1.0, 0.1].into_iter()),
        }
    }

    /// The same values, or nearly, in 4 bits.
    fn packed(wide: &Matrix) -> Matrix {
        let (int, group) = (Int::Int4, 32);
        let format = Format::Packed { int, group };
        let (data, scales) = format.bytes(300, 200).unwrap();
        let (mut data, mut scales) = (Blob::with_len(data), Blob::with_len(scales));
        let values: Vec<f32> = (0..300 * 200)
            .map(|i| wide.value(i / 200, i % 200))
            .collect();
        let to = bytemuck::cast_slice_mut(scales.as_mut());
        pack::quantize(int, group, 300, 200, &values, data.as_mut(), to);
        Matrix {
            format,
            data,
            scales,
            ..fp8()
        }
    }

    #[test]
    fn cutting_and_transposing_move_every_value_where_it_belongs() {
        let wide = fp8();
        for matrix in [
            fp8(),
            Matrix {
                format: Format::F32,
                data: Blob::collect(
                    300 * 200,
                    (0..300 * 200).map(|i| wide.value(i / 200, i % 200)),
                ),
                scales: Blob::with_len(0),
                ..fp8()
            },
            packed(&wide),
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
                    let mut wide = vec![0.0; 200];
                    matrix.widen_row(row, &mut wide);
                    let same =
                        |(col, w): (usize, &f32)| w.to_bits() == matrix.value(row, col).to_bits();
                    assert!(wide.iter().enumerate().all(same));
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
