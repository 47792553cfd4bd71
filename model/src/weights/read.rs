//! Stored tensors on their way into memory.
//!
//! Secret: how bytes leave the mapped file. They are copied piece by piece, and what is checked (every value a
//! finite number, the digest that of the manifest) and what is widened is the copy, so that a file that changes
//! meanwhile cannot slip past a check. No tensor is ever in memory twice.

use guild_kernels::pack::{self, Int};
use half::{bf16, f16};

use super::{Format, PANEL, fp8};
use crate::ModelError;
use crate::checkpoint::{IN_WORD, Stored, TensorView, e4m3_to_f32};
use crate::config::FP8_BLOCK;

/// Bytes that are copied and looked at at a time; they stay in a core's cache. A multiple of every element's size.
pub(crate) const PIECE: usize = 256 << 10;
/// What a long read calls after every piece of work: whoever reads may rest there.
pub type Breathe<'a> = &'a dyn Fn();

/// The largest e4m3 value: a scale that overflows with it could make a weight infinite.
const E4M3_MAX: f32 = 448.0;

/// Reads a weight `[rows, cols]` into `data` and `scales`, which are as long as [`Format::bytes`] says. Calls `breathe`
/// after every piece of the data.
pub(crate) fn weight(
    view: &TensorView<'_>,
    rows: usize,
    cols: usize,
    format: Format,
    data: &mut [u8],
    scales: &mut [u8],
    breathe: Breathe<'_>,
) -> Result<(), ModelError> {
    match view.dtype() {
        Stored::U8 => return packed(view, rows, cols, format, data, scales, breathe),
        Stored::I32 => return foreign(view, rows, cols, format, data, scales, breathe),
        Stored::F32 | Stored::Bf16 | Stored::F16 | Stored::F8E4M3 => {}
    }
    expect_shape(view, &[rows, cols])?;
    let block_scales = match view.dtype() {
        Stored::F8E4M3 => block_scales(view, rows, cols)?,
        _ => Vec::new(),
    };
    let across = cols.div_ceil(FP8_BLOCK);
    let scaled = |at: usize, [byte]: [u8; 1]| {
        e4m3_to_f32(byte) * block_scales[at / cols / FP8_BLOCK * across + at % cols / FP8_BLOCK]
    };
    let f32_of = |_, b| f32::from_le_bytes(b);
    let bf16_of = |_, b| bf16::from_le_bytes(b).to_f32();
    let f16_of = |_, b| f16::from_le_bytes(b).to_f32();
    match (view.dtype(), format) {
        (Stored::F32, Format::F32) | (Stored::Bf16, Format::Bf16) => copy(view, data, breathe),
        (Stored::F8E4M3, Format::Fp8) => {
            copy(view, data, breathe)?;
            scales.copy_from_slice(bytemuck::cast_slice(&block_scales));
            Ok(())
        }
        (Stored::Bf16, Format::F32) => convert(view, cast(data), breathe, bf16_of),
        (Stored::F16, Format::F32) => convert(view, cast(data), breathe, f16_of),
        (Stored::F8E4M3, Format::F32) => convert(view, cast(data), breathe, scaled),
        (Stored::F32, Format::Bf16) => narrow(view, data, breathe, f32_of),
        (Stored::F16, Format::Bf16) => narrow(view, data, breathe, f16_of),
        (Stored::F8E4M3, Format::Bf16) => narrow(view, data, breathe, scaled),
        (Stored::U8 | Stored::I32, _) => Err(refused(view, "is packed".into())),
        (stored, Format::Fp8 | Format::Packed { .. }) => {
            let mut to = Quantized {
                format,
                cols,
                data,
                scales,
            };
            match stored {
                Stored::F32 => quantize(view, rows, &mut to, breathe, f32_of),
                Stored::Bf16 => quantize(view, rows, &mut to, breathe, bf16_of),
                Stored::F16 => quantize(view, rows, &mut to, breathe, f16_of),
                Stored::F8E4M3 | Stored::U8 | Stored::I32 => {
                    quantize(view, rows, &mut to, breathe, scaled)
                }
            }
        }
    }
}

/// Copies a weight that is packed already.
fn packed(
    view: &TensorView<'_>,
    rows: usize,
    cols: usize,
    format: Format,
    data: &mut [u8],
    scales: &mut [u8],
    breathe: Breathe<'_>,
) -> Result<(), ModelError> {
    let panels = rows.div_ceil(PANEL);
    let (_, groups) = format.scale_shape(rows, cols);
    let shape = [panels, data.len() / panels.max(1)];
    let stored = scales_of(view, &shape, &[panels, groups, PANEL])?;
    copy(view, data, breathe)?;
    copy(&stored, scales, &|| ())?;
    all_scales(&stored, format.odd_scale(scales))
}

/// The scales of a packed weight: both must have these shapes.
fn scales_of<'a>(
    view: &TensorView<'a>,
    shape: &[usize],
    scales: &[usize],
) -> Result<TensorView<'a>, ModelError> {
    expect_shape(view, shape)?;
    let Some(stored) = view.scales()? else {
        return Err(refused(view, "is packed without scales".into()));
    };
    expect_shape(&stored, scales)?;
    Ok(stored)
}

/// Refuses scales of which `odd` is none.
fn all_scales(scales: &TensorView<'_>, odd: Option<usize>) -> Result<(), ModelError> {
    match odd {
        Some(at) => Err(refused(
            scales,
            format!("element {at} is no scale; the checkpoint is damaged"),
        )),
        None => Ok(()),
    }
}

/// Lays a weight anew that another library has packed: the same integers, the same scales.
fn foreign(
    view: &TensorView<'_>,
    rows: usize,
    cols: usize,
    format: Format,
    data: &mut [u8],
    scales: &mut [u8],
    breathe: Breathe<'_>,
) -> Result<(), ModelError> {
    let Format::Packed { int, group } = format else {
        return Err(refused(view, "is packed".into()));
    };
    let (across, groups) = (cols.div_ceil(IN_WORD), cols.div_ceil(group));
    let their_scales = scales_of(view, &[rows, across], &[rows, groups])?;
    let (words, theirs) = (stored(view)?, stored(&their_scales)?);
    breathe();
    let theirs: Vec<bf16> = { theirs.as_chunks().0.iter() }
        .map(|&b| bf16::from_le_bytes(b))
        .collect();
    all_scales(&their_scales, odd_packed_scale(int, &theirs))?;
    // Little endian: two integers a byte, the first in the low half.
    let value = |row: usize, col: usize| {
        let byte = words[row * across * size_of::<i32>() + col / 2];
        (byte >> (4 * (col % 2)) & 15) as i8 - 8
    };
    let scale = |row: usize, g: usize| theirs[row * groups + g];
    pack::lay(int, group, (rows, cols), value, scale, data, cast(scales));
    breathe();
    Ok(())
}

/// A weight that is quantised on its way into memory.
struct Quantized<'a> {
    format: Format,
    cols: usize,
    data: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Quantized<'_> {
    /// Rows that share scales.
    fn band(&self) -> usize {
        match self.format {
            Format::Fp8 => FP8_BLOCK,
            _ => PANEL,
        }
    }

    /// Quantises band `index` from `values` `[rows of it, cols]`.
    fn put(&mut self, index: usize, values: &[f32]) {
        let (cols, rows) = (self.cols, values.len() / self.cols.max(1));
        let Some((data, scales)) = self.format.bytes(self.band(), cols) else {
            return;
        };
        let (from, scales_from) = (index * data, index * scales);
        // The last band of FP8 is as long as it has rows; panels are always whole.
        let end = self.data.len().min(from + data);
        let to = &mut self.data[from..end];
        let scales = &mut self.scales[scales_from..scales_from + scales];
        match self.format {
            Format::Packed { int, group } => {
                pack::quantize(int, group, rows, cols, values, to, cast(scales));
            }
            _ => fp8::quantize(cols, values, to, cast(scales)),
        }
    }
}

/// Widens the stored elements of `N` bytes, band after band, and quantises them.
fn quantize<const N: usize>(
    view: &TensorView<'_>,
    rows: usize,
    to: &mut Quantized<'_>,
    breathe: Breathe<'_>,
    element: impl Fn(usize, [u8; N]) -> f32,
) -> Result<(), ModelError> {
    let elements = to.band() * to.cols;
    if rows == 0 || elements == 0 {
        return Ok(());
    }
    let mut check = Check::new(*view);
    let mut piece = Vec::new();
    let mut values = Vec::new();
    for (index, from) in view.bytes().chunks(elements * N).enumerate() {
        piece.clear();
        piece.extend_from_slice(from);
        check.piece(&piece)?;
        values.clear();
        let first = index * elements;
        let wide = { piece.as_chunks().0.iter() }.enumerate();
        values.extend(wide.map(|(i, &b)| element(first + i, b)));
        to.put(index, &values);
        breathe();
    }
    check.end()
}

/// The bytes of a tensor that stays what it is.
pub(crate) fn stored(view: &TensorView<'_>) -> Result<Vec<u8>, ModelError> {
    let mut bytes = vec![0; view.bytes().len()];
    copy(view, &mut bytes, &|| ())?;
    Ok(bytes)
}

/// Reads a tensor of the given shape in f32; FP8 without its scales.
pub(crate) fn floats(view: &TensorView<'_>, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
    expect_shape(view, shape)?;
    let mut values = vec![0.0f32; view.elements()];
    let at_once: Breathe<'_> = &|| ();
    match view.dtype() {
        Stored::F32 => copy(view, bytemuck::cast_slice_mut(&mut values), at_once)?,
        Stored::Bf16 => convert(view, &mut values, at_once, |_, b| {
            bf16::from_le_bytes(b).to_f32()
        })?,
        Stored::F16 => convert(view, &mut values, at_once, |_, b| {
            f16::from_le_bytes(b).to_f32()
        })?,
        Stored::F8E4M3 => convert(view, &mut values, at_once, |_, [b]| e4m3_to_f32(b))?,
        Stored::U8 | Stored::I32 => {
            return Err(refused(view, "is packed: its bytes are no numbers".into()));
        }
    }
    Ok(values)
}

/// Block scales of an FP8 weight.
fn block_scales(weight: &TensorView<'_>, rows: usize, cols: usize) -> Result<Vec<f32>, ModelError> {
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

/// The first scale of packed integers that could make a weight infinite, or is no number itself.
pub(crate) fn odd_packed_scale(int: Int, scales: &[bf16]) -> Option<usize> {
    let largest = match int {
        Int::Int4 => 8.0,
        Int::Int8 => 128.0,
    };
    scales
        .iter()
        .position(|s| !(s.to_f32() * largest).is_finite())
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
fn copy(view: &TensorView<'_>, to: &mut [u8], breathe: Breathe<'_>) -> Result<(), ModelError> {
    let mut check = Check::new(*view);
    for (to, from) in to.chunks_mut(PIECE).zip(view.bytes().chunks(PIECE)) {
        to.copy_from_slice(from);
        check.piece(to)?;
        breathe();
    }
    check.end()
}

/// Converts the stored elements of `N` bytes one by one; the rule also gets an element's index.
fn convert<T, const N: usize>(
    view: &TensorView<'_>,
    to: &mut [T],
    breathe: Breathe<'_>,
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
        breathe();
    }
    check.end()
}

/// As [`convert`], rounded to bf16; refuses finite values that rounding makes infinite.
fn narrow<const N: usize>(
    view: &TensorView<'_>,
    to: &mut [u8],
    breathe: Breathe<'_>,
    element: impl Fn(usize, [u8; N]) -> f32,
) -> Result<(), ModelError> {
    let to: &mut [bf16] = cast(to);
    convert(view, to, breathe, |at, b| bf16::from_f32(element(at, b)))?;
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
