//! Where things lie in an expert's blob.
//!
//! Secret: the bytes of the header. All numbers are little endian; offsets count from the blob's start.
//!
//! ```text
//!   0  magic "GUILDEXP"      8  version u32      12  bytes of the header u32      16  bytes of the blob u64
//!  24  layer u32            28  expert u32
//!  32  gate, up, down, 72 bytes each:
//!      0  format u32 (1 f32, 2 bf16, 3 FP8 e4m3 with block scales, 4 int8, 5 int4: packed, with scales)
//!      4  columns that share a scale u32 (packed formats; else zero)
//!      8  rows u64          16  columns u64     24  offset of the data u64         32  bytes of the data u64
//!     40  scale rows u64    48  scale columns u64   56  offset of the scales u64   64  bytes of the scales u64
//! 248  zeros up to 256, then the sections: data and scales of each matrix, each from a multiple of 64 on,
//!      zeros between them and up to a multiple of 64 at the end
//! ```
//!
//! A matrix without scales has zeros for them. How packed data and scales lie is the kernels' business. The places follow from formats and shapes, so two blobs of one
//! expert are the same bytes. A new way to pack a matrix is a new format tag.

use std::ops::Range;

use guild_kernels::pack::{self, Int};

use crate::weights::{ALIGNMENT, Format};

const MAGIC: [u8; 8] = *b"GUILDEXP";
const VERSION: u32 = 1;
/// Bytes before the first section.
pub(super) const HEADER: usize = 256;
/// Bytes before the first matrix's entry, and of an entry.
const PREAMBLE: usize = 32;
const ENTRY: usize = 72;
/// The matrices, in their order.
pub(super) const NAMES: [&str; 3] = ["gate", "up", "down"];

/// One matrix and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Range<usize>,
    /// Rows and columns of scales; zero where there are none.
    scale_shape: (usize, usize),
    pub(crate) scales: Range<usize>,
}

/// The header as a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    layer: u32,
    expert: u32,
    pub(super) matrices: [Placed; 3],
    /// Bytes of the blob.
    pub(super) len: usize,
}

impl Layout {
    /// Places gate, up and down; None when they are too large for this machine to count.
    pub(super) fn new(
        layer: u32,
        expert: u32,
        matrices: [(Format, usize, usize); 3],
    ) -> Option<Layout> {
        let mut end = HEADER;
        let mut section = |bytes: usize| {
            let start = end;
            let past = start.checked_add(bytes)?;
            end = past.checked_next_multiple_of(ALIGNMENT)?;
            Some(start..past)
        };
        let mut place = |(format, rows, cols): (Format, usize, usize)| {
            let (data, scales) = format.bytes(rows, cols)?;
            let data = section(data)?;
            let scales = match format {
                Format::Fp8 | Format::Packed { .. } => section(scales)?,
                Format::F32 | Format::Bf16 => 0..0,
            };
            Some(Placed {
                format,
                rows,
                cols,
                data,
                scale_shape: format.scale_shape(rows, cols),
                scales,
            })
        };
        let [gate, up, down] = matrices;
        let matrices = [place(gate)?, place(up)?, place(down)?];
        Some(Layout {
            layer,
            expert,
            matrices,
            len: end,
        })
    }

    /// Bytes of data and scales: without header and padding.
    pub(super) fn weight_bytes(&self) -> u64 {
        let of = |m: &Placed| m.data.len() + m.scales.len();
        self.matrices.iter().map(of).sum::<usize>() as u64
    }

    /// The header's bytes.
    pub(super) fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            header[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&(HEADER as u32).to_le_bytes());
        put(&(self.len as u64).to_le_bytes());
        put(&self.layer.to_le_bytes());
        put(&self.expert.to_le_bytes());
        for matrix in &self.matrices {
            let (tag, group) = tag(matrix.format);
            put(&tag.to_le_bytes());
            put(&group.to_le_bytes());
            for number in matrix.numbers() {
                put(&(number as u64).to_le_bytes());
            }
        }
        header
    }

    /// Reads the header that a blob begins with, and checks that it agrees with itself.
    pub(super) fn parse(header: &[u8; HEADER]) -> Result<Layout, String> {
        if header[..8] != MAGIC {
            return Err("does not begin with GUILDEXP: no expert blob".into());
        }
        let is = |what: &str, found: u64, expected: u64| match found == expected {
            true => Ok(()),
            false => Err(format!("{what} is {found}, not {expected}")),
        };
        is("version", u32_at(header, 8).into(), VERSION.into())?;
        is("header length", u32_at(header, 12).into(), HEADER as u64)?;

        let matrix = |index: usize| {
            let (name, at) = (NAMES[index], PREAMBLE + index * ENTRY);
            let (found, group) = (u32_at(header, at), u32_at(header, at + 4));
            let format =
                known()
                    .find(|&f| tag(f) == (found, group))
                    .ok_or_else(|| match group {
                        0 => format!("{name}: format {found} is unknown"),
                        _ => format!("{name}: format {found} with groups of {group} is unknown"),
                    })?;
            let size = |what: &str, at| {
                usize::try_from(u64_at(header, at))
                    .map_err(|_| format!("{name}: {what} are more than can be counted"))
            };
            Ok::<_, String>((format, size("rows", at + 8)?, size("columns", at + 16)?))
        };
        let (layer, expert) = (u32_at(header, 24), u32_at(header, 28));
        let layout = Layout::new(layer, expert, [matrix(0)?, matrix(1)?, matrix(2)?])
            .ok_or("its shapes are larger than any memory")?;
        for (index, placed) in layout.matrices.iter().enumerate() {
            let at = PREAMBLE + index * ENTRY;
            for (i, (field, number)) in FIELDS.iter().zip(placed.numbers()).enumerate() {
                let found = u64_at(header, at + 8 + 8 * i);
                is(&format!("{}: {field}", NAMES[index]), found, number as u64)?;
            }
        }
        is("length", u64_at(header, 16), layout.len as u64)?;
        // What is left of the header are zeros.
        if layout.header() != *header {
            return Err("the header's padding is not zero".into());
        }
        Ok(layout)
    }

    /// Checks what is between the sections of a blob of this layout, and behind them.
    pub(super) fn check_padding(&self, blob: &[u8]) -> Result<(), String> {
        let starts = self.sections().map(|section| section.start);
        let ends = self.sections().map(|section| section.end);
        { ends }
            .zip(starts.skip(1).chain([self.len]))
            .all(|(end, start)| blob[end..start].iter().all(|&byte| byte == 0))
            .then_some(())
            .ok_or_else(|| "the padding between sections is not zero".to_owned())
    }

    /// Checks that a whole blob has this layout: its header and its length.
    pub(super) fn found(&self, blob: &[u8]) -> Result<(), String> {
        let Some(header) = blob.first_chunk() else {
            let len = blob.len();
            return Err(format!("{len} bytes, less than the {HEADER} of the header"));
        };
        self.expect(&Layout::parse(header)?)?;
        match blob.len() == self.len {
            true => Ok(()),
            false => Err(format!("its length is {}, not {}", blob.len(), self.len)),
        }
    }

    /// Says where a blob differs from what `self` expects, first difference first.
    pub(super) fn expect(&self, found: &Layout) -> Result<(), String> {
        let is = |what: &str, found: usize, expected: usize| match found == expected {
            true => Ok(()),
            false => Err(format!("{what} is {found}, but {expected} was asked for")),
        };
        is("layer", found.layer as usize, self.layer as usize)?;
        is("expert", found.expert as usize, self.expert as usize)?;
        for ((found, expected), name) in found.matrices.iter().zip(&self.matrices).zip(NAMES) {
            is(&format!("{name}: rows"), found.rows, expected.rows)?;
            is(&format!("{name}: columns"), found.cols, expected.cols)?;
            if found.format != expected.format {
                return Err(format!(
                    "{name}: format {:?}, but here it is {:?}; both nodes need the same --dtype",
                    found.format, expected.format
                ));
            }
        }
        Ok(())
    }

    /// Places of all sections, in order.
    fn sections(&self) -> impl Iterator<Item = Range<usize>> {
        let of = |m: &Placed| {
            [
                Some(m.data.clone()),
                m.has_scales().then(|| m.scales.clone()),
            ]
        };
        self.matrices.iter().flat_map(of).flatten()
    }
}

/// The numbers of an entry after its format, in the header's order.
const FIELDS: [&str; 8] = [
    "rows",
    "columns",
    "offset of the data",
    "bytes of the data",
    "scale rows",
    "scale columns",
    "offset of the scales",
    "bytes of the scales",
];

impl Placed {
    fn has_scales(&self) -> bool {
        matches!(self.format, Format::Fp8 | Format::Packed { .. })
    }

    fn numbers(&self) -> [usize; 8] {
        [
            self.rows,
            self.cols,
            self.data.start,
            self.data.len(),
            self.scale_shape.0,
            self.scale_shape.1,
            self.scales.start,
            self.scales.len(),
        ]
    }
}

/// The formats that a blob may have.
fn known() -> impl Iterator<Item = Format> {
    let packed = |int| { pack::GROUPS.into_iter() }.map(move |group| Format::Packed { int, group });
    [Format::F32, Format::Bf16, Format::Fp8]
        .into_iter()
        .chain(packed(Int::Int8))
        .chain(packed(Int::Int4))
}

/// Format and group as the header has them.
fn tag(format: Format) -> (u32, u32) {
    match format {
        Format::F32 => (1, 0),
        Format::Bf16 => (2, 0),
        Format::Fp8 => (3, 0),
        Format::Packed { int, group } => {
            let tag = match int {
                Int::Int8 => 4,
                Int::Int4 => 5,
            };
            (tag, group as u32)
        }
    }
}

fn u32_at(header: &[u8; HEADER], at: usize) -> u32 {
    header[at..]
        .first_chunk()
        .map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(header: &[u8; HEADER], at: usize) -> u64 {
    header[at..]
        .first_chunk()
        .map_or(0, |b| u64::from_le_bytes(*b))
}
