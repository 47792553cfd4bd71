//! Weights as they are stored, widened row by row.
//!
//! Secret: that there are several forms. For whoever looks at a checkpoint (the reference, comparisons), never for
//! whoever computes with one.

use std::ops::Range;

use guild_kernels::pack::{self, Int};
use half::bf16;

use super::{Checkpoint, Dtype, Stored, TensorView, e4m3_to_f32};
use crate::ModelError;
use crate::config::{self, FP8_BLOCK, Role, packed};
use crate::expert;
use crate::weights::{Matrix, odd_packed_scale};

/// A tensor that the configuration calls for: a matrix, or a vector as a matrix of one row.
pub(crate) struct StoredWeight<'a> {
    view: TensorView<'a>,
    rows: usize,
    cols: usize,
    form: Form<'a>,
}

enum Form<'a> {
    Plain,
    /// Laid anew as a node has it in memory.
    Loaded(Matrix),
    Fp8 {
        scales: Vec<f32>,
    },
    Packed {
        int: Int,
        group: usize,
        data: &'a [u8],
        scales: Vec<bf16>,
    },
}

impl<'a> StoredWeight<'a> {
    /// `shape` is that of the weight, whatever it is stored as.
    pub(super) fn find(
        ckpt: &'a Checkpoint,
        name: &str,
        shape: &[usize],
    ) -> Result<StoredWeight<'a>, ModelError> {
        let cfg = ckpt.config();
        if cfg
            .packed
            .is_some_and(|p| p.form == config::Form::CompressedTensors)
            && let (Role::Expert, &[rows, cols]) = (Role::of(name), shape)
        {
            let view = ckpt.tensor(&format!("{name}_packed"))?;
            let form = Form::Loaded(Matrix::of(&view, rows, cols, Dtype::Auto)?);
            return Ok(StoredWeight {
                view,
                rows,
                cols,
                form,
            });
        }
        let role = Role::of(name);
        let packing = cfg
            .packed
            .as_ref()
            .and_then(|p| Some((p.of(role)?, p.group)));
        if let (Some((int, group)), Role::Expert) = (packing, role) {
            let (view, place) = expert::stored_matrix(ckpt, name)?;
            let form = Form::Packed {
                int,
                group,
                data: &view.bytes()[place.data],
                scales: numbers(&view.bytes()[place.scales]),
            };
            return StoredWeight {
                view,
                rows: place.rows,
                cols: place.cols,
                form,
            }
            .checked();
        }
        let view = ckpt.tensor(name)?;
        if let Some((int, group)) = packing {
            let &[rows, cols] = shape else {
                return Err(ModelError::tensor(view.file(), name, "is no matrix"));
            };
            let scales = view.scales()?.map_or(Vec::new(), |s| numbers(s.bytes()));
            let data = view.bytes();
            let form = Form::Packed {
                int,
                group,
                data,
                scales,
            };
            return StoredWeight {
                view,
                rows,
                cols,
                form,
            }
            .checked();
        }
        let (rows, cols) = match *view.shape() {
            [rows, cols] => (rows, cols),
            _ => (1, view.elements()),
        };
        let form = match view.scales()? {
            Some(scales) => Form::Fp8 {
                scales: scales.to_f32()?,
            },
            None => Form::Plain,
        };
        Ok(StoredWeight {
            view,
            rows,
            cols,
            form,
        })
    }

    fn checked(self) -> Result<Self, ModelError> {
        if let Form::Packed { int, scales, .. } = &self.form
            && let Some(at) = odd_packed_scale(*int, scales)
        {
            let reason = format!("scale {at} is no scale; the checkpoint is damaged");
            return Err(ModelError::tensor(
                self.view.file(),
                self.view.name(),
                reason,
            ));
        }
        Ok(self)
    }

    /// Rows and columns.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// How it is stored, in a word.
    pub(crate) fn format(&self) -> String {
        match &self.form {
            Form::Plain => self.view.dtype().name().to_lowercase(),
            Form::Loaded(_) => "compressed-tensors".to_owned(),
            Form::Fp8 { .. } => "fp8".to_owned(),
            Form::Packed { int, group, .. } => format!("{}-g{group}", packed::name(*int)),
        }
    }

    /// Some rows in f32.
    ///
    /// # Errors
    /// A value that is not finite.
    pub(crate) fn widened(&self, rows: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let cols = self.cols;
        let elements = rows.start * cols..rows.end * cols;
        Ok(match &self.form {
            Form::Plain => self.plain(elements)?,
            Form::Loaded(matrix) => {
                let mut values = vec![0.0; rows.len() * cols];
                for (row, values) in rows.zip(values.chunks_exact_mut(cols)) {
                    matrix.widen_row(row, values);
                }
                values
            }
            Form::Fp8 { scales } => {
                let across = cols.div_ceil(FP8_BLOCK);
                let mut values = self.plain(elements)?;
                for (row, values) in rows.zip(values.chunks_exact_mut(cols)) {
                    let scales = &scales[row / FP8_BLOCK * across..][..across];
                    for (values, scale) in values.chunks_mut(FP8_BLOCK).zip(scales) {
                        values.iter_mut().for_each(|v| *v *= scale);
                    }
                }
                values
            }
            Form::Packed {
                int,
                group,
                data,
                scales,
            } => {
                let mut values = vec![0.0; rows.len() * cols];
                for (row, values) in rows.zip(values.chunks_exact_mut(cols)) {
                    pack::widen_row(*int, *group, data, scales, row, values);
                }
                values
            }
        })
    }

    /// Elements as they are stored, without scales.
    fn plain(&self, elements: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let stored = self.view.dtype();
        let size = stored.bytes();
        let bytes = &self.view.bytes()[elements.start * size..elements.end * size];
        if let Some(at) = stored.first_not_finite(bytes) {
            return Err(self.view.not_finite(elements.start + at));
        }
        let (pairs, fours) = (bytes.as_chunks().0, bytes.as_chunks().0);
        Ok(match stored {
            Stored::F32 => fours.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Stored::Bf16 => pairs
                .iter()
                .map(|&b| bf16::from_le_bytes(b).to_f32())
                .collect(),
            Stored::F16 => pairs
                .iter()
                .map(|&b| half::f16::from_le_bytes(b).to_f32())
                .collect(),
            Stored::F8E4M3 => bytes.iter().map(|&b| e4m3_to_f32(b)).collect(),
            Stored::U8 | Stored::I32 => Vec::new(),
        })
    }
}

fn numbers(bytes: &[u8]) -> Vec<bf16> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| bf16::from_le_bytes(b))
        .collect()
}
