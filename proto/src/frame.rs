//! Checked conversions of the frames of `guild.experts.v1`.
//!
//! [`Dispatch`] and [`Combine`] are frames that have been verified: checksum,
//! format, width, counts, indices and limits. What depends on a placement
//! (does this epoch, does this slot exist?) is the receiver's to check.

use bytes::Bytes;

use crate::{
    experts::v1::{CombineFrame, DispatchFrame, ExchangeFault, FaultCode, RowFormat, SlotRows},
    limits::{
        F32_BYTES, MAX_FAULT_TEXT_BYTES, MAX_PAIRS, MAX_PAYLOAD_BYTES, MAX_ROWS, MAX_SLOTS,
        MAX_WIDTH,
    },
};

/// What is wrong with a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes were changed on the way.
    #[error("crc: the frame says {stated:#010x}, its fields give {computed:#010x}")]
    Checksum {
        /// The checksum in the frame.
        stated: u32,
        /// The checksum of its fields.
        computed: u32,
    },
    /// A row format of which this version knows nothing.
    #[error("format: {0} is not a row format of guild.experts.v1 (1 is f32)")]
    Format(i32),
    /// No row has this many elements.
    #[error("width: {0} is outside 1..={MAX_WIDTH}")]
    Width(u32),
    /// The bytes are not a whole number of rows.
    #[error("rows: {bytes} bytes are not a whole number of f32 rows of width {width}")]
    RowBytes {
        /// Length of `rows`.
        bytes: usize,
        /// Elements in a row.
        width: usize,
    },
    /// A count or a size beyond its limit.
    #[error("{what}: {found} is more than the limit of {limit}")]
    Limit {
        /// The field, and its unit where it is not a count.
        what: &'static str,
        /// What the frame holds or asks for.
        found: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A slot asks for a row that the frame does not hold.
    #[error("slots: slot {slot} names row {index}, but the frame holds {rows} rows")]
    RowIndex {
        /// The slot.
        slot: u32,
        /// The index it gave.
        index: u32,
        /// Rows in the frame.
        rows: usize,
    },
    /// A fault that carries rows as well.
    #[error("fault: the frame carries a fault and {0} bytes of rows")]
    FaultWithRows(usize),
}

impl FrameError {
    /// The code by which a receiver answers such a frame.
    pub fn code(&self) -> FaultCode {
        match self {
            Self::Checksum { .. } => FaultCode::Checksum,
            _ => FaultCode::Malformed,
        }
    }
}

/// Fails unless a dispatch of this shape is within the limits of the wire in
/// both directions: `rows` rows of `width` f32 out, `pairs` rows back.
pub fn check_shape(
    width: usize,
    rows: usize,
    slots: usize,
    pairs: usize,
) -> Result<(), FrameError> {
    if width == 0 || width > MAX_WIDTH {
        return Err(FrameError::Width(u32::try_from(width).unwrap_or(u32::MAX)));
    }
    let limit = |what, found, limit| {
        if found > limit {
            return Err(FrameError::Limit { what, found, limit });
        }
        Ok(())
    };
    limit("rows", rows, MAX_ROWS)?;
    limit("slots", slots, MAX_SLOTS)?;
    limit("rows to return", pairs, MAX_PAIRS)?;
    // No overflow: every factor has just been bounded.
    limit("bytes of rows", rows * width * F32_BYTES, MAX_PAYLOAD_BYTES)?;
    limit(
        "bytes of rows to return",
        pairs * width * F32_BYTES,
        MAX_PAYLOAD_BYTES,
    )
}

/// A dispatch frame that holds together.
#[derive(Debug, Clone, PartialEq)]
pub struct Dispatch {
    /// Chosen by the sender, unique on its stream.
    pub id: u64,
    /// The placement that the slots belong to.
    pub epoch: u64,
    /// What is left of the sender's deadline in milliseconds; `None`: no deadline.
    pub deadline_ms: Option<u32>,
    /// Elements in a row.
    pub width: usize,
    /// Rows in `rows`.
    pub num_rows: usize,
    /// `[num_rows, width]` little-endian f32, a slice of the received message.
    pub rows: Bytes,
    /// Which rows go to which slot; every index is below `num_rows`.
    pub slots: Vec<SlotRows>,
}

impl Dispatch {
    /// Rows that the answer must hold.
    pub fn pairs(&self) -> usize {
        self.slots.iter().map(|slot| slot.row_index.len()).sum()
    }
}

impl TryFrom<DispatchFrame> for Dispatch {
    type Error = FrameError;

    fn try_from(frame: DispatchFrame) -> Result<Self, FrameError> {
        verify(frame.crc, frame.checksum())?;
        let (width, num_rows) = row_count(frame.format, frame.width, frame.rows.len())?;
        let pairs = frame.slots.iter().map(|slot| slot.row_index.len()).sum();
        check_shape(width, num_rows, frame.slots.len(), pairs)?;
        for slot in &frame.slots {
            if let Some(&index) = slot.row_index.iter().find(|&&i| i as usize >= num_rows) {
                return Err(FrameError::RowIndex {
                    slot: slot.slot,
                    index,
                    rows: num_rows,
                });
            }
        }
        Ok(Self {
            id: frame.id,
            epoch: frame.epoch,
            deadline_ms: (frame.deadline_ms > 0).then_some(frame.deadline_ms),
            width,
            num_rows,
            rows: frame.rows,
            slots: frame.slots,
        })
    }
}

/// A combine frame that holds together.
#[derive(Debug, Clone, PartialEq)]
pub struct Combine {
    /// The dispatch that this answers.
    pub id: u64,
    /// The placement by which it was run.
    pub epoch: u64,
    /// The rows, or why there are none.
    pub outcome: Result<CombineRows, ExchangeFault>,
}

/// The rows of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct CombineRows {
    /// Elements in a row.
    pub width: usize,
    /// Rows in `rows`.
    pub num_rows: usize,
    /// `[num_rows, width]` little-endian f32, a slice of the received message.
    pub rows: Bytes,
}

impl TryFrom<CombineFrame> for Combine {
    type Error = FrameError;

    fn try_from(frame: CombineFrame) -> Result<Self, FrameError> {
        verify(frame.crc, frame.checksum())?;
        let outcome = match frame.fault {
            Some(_) if !frame.rows.is_empty() => {
                return Err(FrameError::FaultWithRows(frame.rows.len()));
            }
            Some(fault) => Err(fault),
            None => {
                let (width, num_rows) = row_count(frame.format, frame.width, frame.rows.len())?;
                check_shape(width, 0, 0, num_rows)?;
                Ok(CombineRows {
                    width,
                    num_rows,
                    rows: frame.rows,
                })
            }
        };
        Ok(Self {
            id: frame.id,
            epoch: frame.epoch,
            outcome,
        })
    }
}

impl CombineFrame {
    /// A sealed answer that refuses dispatch `id`.
    pub fn refusal(id: u64, epoch: u64, fault: ExchangeFault) -> Self {
        Self {
            id,
            epoch,
            fault: Some(fault),
            ..Self::default()
        }
        .sealed()
    }
}

impl ExchangeFault {
    /// A fault whose texts together fit [`MAX_FAULT_TEXT_BYTES`]: the message
    /// gives way, at a character boundary.
    pub fn bounded(code: FaultCode, node: &str, message: &str) -> Self {
        let cut = |text: &str, limit: usize| {
            let mut end = limit.min(text.len());
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text[..end].to_owned()
        };
        let node = cut(node, MAX_FAULT_TEXT_BYTES / 2);
        let message = cut(message, MAX_FAULT_TEXT_BYTES - node.len());
        Self {
            code: code.into(),
            message,
            node,
        }
    }
}

fn verify(stated: u32, computed: u32) -> Result<(), FrameError> {
    if stated != computed {
        return Err(FrameError::Checksum { stated, computed });
    }
    Ok(())
}

/// `(width, number of rows)` of a payload of `bytes` bytes.
fn row_count(format: i32, width: u32, bytes: usize) -> Result<(usize, usize), FrameError> {
    if format != i32::from(RowFormat::F32) {
        return Err(FrameError::Format(format));
    }
    if width == 0 || width as usize > MAX_WIDTH {
        return Err(FrameError::Width(width));
    }
    let width = width as usize;
    if !bytes.is_multiple_of(width * F32_BYTES) {
        return Err(FrameError::RowBytes { bytes, width });
    }
    Ok((width, bytes / (width * F32_BYTES)))
}
