//! Stored tensors on their way into memory.
//!
//! Secret: how bytes leave the mapped file. They are copied piece by piece, and what is checked (every value a
//! finite number, the digest that of the manifest) and what is widened is the copy, so that a file that changes
//! meanwhile cannot slip past a check. No tensor is ever in memory twice.

use half::{bf16, f16};

use super::Format;
use crate::ModelError;
use crate::checkpoint::{Stored, TensorView, e4m3_to_f32};
use crate::config::FP8_BLOCK;

/// Bytes that are copied and looked at at a time; they stay in a core's cache. A multiple of every element's size.
const PIECE: usize = 256 << 10;
/// The largest e4m3 value: a scale that overflows with it could make a weight infinite.
const E4M3_MAX: f32 = 448.0;

/// Reads a weight `[rows, cols]` into `data` in the given format. Returns the block scales
/// `[ceil(rows / 128), ceil(cols / 128)]` of a weight that stays FP8, otherwise nothing.
pub(crate) fn weight(
    view: &TensorView<'_>,
    rows: usize,
    cols: usize,
    format: Format,
    data: &mut [u8],
) -> Result<Vec<f32>, ModelError> {
    expect_shape(view, &[rows, cols])?;
    let scales = match view.dtype() {
        Stored::F8E4M3 => scales(view, rows, cols)?,
        _ => Vec::new(),
    };
    let across = cols.div_ceil(FP8_BLOCK);
    let scaled = |at: usize, [byte]: [u8; 1]| {
        e4m3_to_f32(byte) * scales[at / cols / FP8_BLOCK * across + at % cols / FP8_BLOCK]
    };
    let bf16_of = |b| bf16::from_le_bytes(b).to_f32();
    let f16_of = |b| f16::from_le_bytes(b).to_f32();
    match (view.dtype(), format) {
        (Stored::F32, Format::F32) | (Stored::Bf16, Format::Bf16) => copy(view, data)?,
        (Stored::F8E4M3, Format::Fp8) => {
            copy(view, data)?;
            return Ok(scales);
        }
        (Stored::Bf16, Format::F32) => convert(view, cast(data), |_, b| bf16_of(b))?,
        (Stored::F16, Format::F32) => convert(view, cast(data), |_, b| f16_of(b))?,
        (Stored::F8E4M3, Format::F32) => convert(view, cast(data), scaled)?,
        (Stored::F32, Format::Bf16) => narrow(view, data, |_, b| f32::from_le_bytes(b))?,
        (Stored::F16, Format::Bf16) => narrow(view, data, |_, b| f16_of(b))?,
        (Stored::F8E4M3, Format::Bf16) => narrow(view, data, scaled)?,
        (_, Format::Fp8) => return Err(refused(view, "is not stored as FP8".into())),
    }
    Ok(Vec::new())
}

/// Reads a tensor of the given shape in f32; FP8 without its scales.
pub(crate) fn floats(view: &TensorView<'_>, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
    expect_shape(view, shape)?;
    let mut values = vec![0.0f32; view.elements()];
    match view.dtype() {
        Stored::F32 => copy(view, bytemuck::cast_slice_mut(&mut values))?,
        Stored::Bf16 => convert(view, &mut values, |_, b| bf16::from_le_bytes(b).to_f32())?,
        Stored::F16 => convert(view, &mut values, |_, b| f16::from_le_bytes(b).to_f32())?,
        Stored::F8E4M3 => convert(view, &mut values, |_, [b]| e4m3_to_f32(b))?,
    }
    Ok(values)
}

/// Block scales of an FP8 weight.
fn scales(weight: &TensorView<'_>, rows: usize, cols: usize) -> Result<Vec<f32>, ModelError> {
    let Some(view) = weight.scales()? else {
        return Err(refused(weight, "is FP8 without block scales".into()));
    };
    let scales = floats(&view, &[rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)])?;
    match odd_scale(&scales) {
        Some(at) => Err(refused(
            &view,
            format!("element {at} is too large for a block scale; the checkpoint is damaged"),
        )),
        None => Ok(scales),
    }
}

/// The first block scale that could make a weight infinite, or is no number itself.
pub(crate) fn odd_scale(scales: &[f32]) -> Option<usize> {
    scales.iter().position(|s| !(s * E4M3_MAX).is_finite())
}

fn expect_shape(view: &TensorView<'_>, shape: &[usize]) -> Result<(), ModelError> {
    if view.shape() == shape {
        return Ok(());
    }
    Err(refused(
        view,
        format!(
            "has shape {:?}, the configuration asks for {shape:?}",
            view.shape()
        ),
    ))
}

fn refused(view: &TensorView<'_>, reason: String) -> ModelError {
    ModelError::tensor(view.file(), view.name(), reason)
}

/// Copies the stored bytes as they are.
fn copy(view: &TensorView<'_>, to: &mut [u8]) -> Result<(), ModelError> {
    let mut check = Check::new(*view);
    for (to, from) in to.chunks_mut(PIECE).zip(view.bytes().chunks(PIECE)) {
        to.copy_from_slice(from);
        check.piece(to)?;
    }
    check.end()
}

/// Converts the stored elements of `N` bytes one by one; the rule also gets an element's index.
fn convert<T, const N: usize>(
    view: &TensorView<'_>,
    to: &mut [T],
    element: impl Fn(usize, [u8; N]) -> T,
) -> Result<(), ModelError> {
    let mut check = Check::new(*view);
    let mut piece = vec![0; PIECE.min(view.bytes().len())];
    let pieces = view.bytes().chunks(PIECE).zip(to.chunks_mut(PIECE / N));
    for (number, (from, to)) in pieces.enumerate() {
        let piece = &mut piece[..from.len()];
        piece.copy_from_slice(from);
        check.piece(piece)?;
        let first = number * (PIECE / N);
        for (i, (to, b)) in to.iter_mut().zip(piece.as_chunks().0).enumerate() {
            *to = element(first + i, *b);
        }
    }
    check.end()
}

/// As [`convert`], rounded to bf16; refuses finite values that rounding makes infinite.
fn narrow<const N: usize>(
    view: &TensorView<'_>,
    to: &mut [u8],
    element: impl Fn(usize, [u8; N]) -> f32,
) -> Result<(), ModelError> {
    let to: &mut [bf16] = cast(to);
    convert(view, to, |at, b| bf16::from_f32(element(at, b)))?;
    match to.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(refused(
            view,
            format!("element {at} is too large for bf16; use --dtype auto or f32"),
        )),
        None => Ok(()),
    }
}

fn cast<T: bytemuck::Pod>(bytes: &mut [u8]) -> &mut [T] {
    bytemuck::cast_slice_mut(bytes)
}

/// Looks at the copied bytes of one tensor, in order.
struct Check<'a> {
    view: TensorView<'a>,
    /// Elements seen so far.
    elements: usize,
    /// Of those bytes, where a manifest says what it must be.
    hasher: Option<blake3::Hasher>,
}

impl<'a> Check<'a> {
    fn new(view: TensorView<'a>) -> Check<'a> {
        Check {
            view,
            elements: 0,
            hasher: view.listed().map(|_| blake3::Hasher::new()),
        }
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        let stored = self.view.dtype();
        if let Some(at) = stored.first_not_finite(bytes) {
            return Err(self.view.not_finite(self.elements + at));
        }
        self.elements += bytes.len() / stored.bytes();
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        Ok(())
    }

    fn end(self) -> Result<(), ModelError> {
        match self.hasher {
            Some(hasher) => self.view.expect(&hasher.finalize()),
            None => Ok(()),
        }
    }
}
