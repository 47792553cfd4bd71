//! The checksum of a frame: CRC-32C (Castagnoli) over its fields.
//!
//! It is taken over the meaning of a frame, not over its protobuf bytes, since
//! protobuf has no canonical encoding. All numbers are little-endian; lengths
//! and counts are written before what they count, so that no two frames share
//! an input.
//!
//! Dispatch: `id` u64, `epoch` u64, `deadline_ms` u32, `format` u32, `width`
//! u32, length of `rows` u64, `rows`, number of slots u32, then for each slot
//! `slot` u32, number of indices u32, the indices u32 each.
//!
//! Combine: `id` u64, `epoch` u64, `format` u32, `width` u32, length of `rows`
//! u64, `rows`, then u8 0 without a fault, or u8 1 and `code` u32, length of
//! `message` u32, `message`, length of `node` u32, `node`.
//!
//! A chunk of a blob: `data` alone. The digest of the blob says whether the chunks
//! are put together right.

use crate::experts::v1::{BlobChunk, CombineFrame, DispatchFrame};

/// A CRC-32C that is fed field by field.
struct Crc(u32);

impl Crc {
    fn new() -> Self {
        Self(0)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0 = crc32c::crc32c_append(self.0, bytes);
        self
    }

    fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.u32(text.len() as u32).bytes(text.as_bytes())
    }

    /// The numbers as one run of bytes, in pieces: a checksum call per number
    /// would cost more than the checksum.
    fn u32s(mut self, values: &[u32]) -> Self {
        const PIECE: usize = 64;
        let mut buffer = [0u8; PIECE * 4];
        for piece in values.chunks(PIECE) {
            for (to, value) in buffer.chunks_exact_mut(4).zip(piece) {
                to.copy_from_slice(&value.to_le_bytes());
            }
            self = self.bytes(&buffer[..piece.len() * 4]);
        }
        self
    }
}

impl BlobChunk {
    /// The CRC-32C of `data`.
    pub fn checksum(&self) -> u32 {
        crc32c::crc32c(&self.data)
    }

    /// The same chunk with `crc` set to what its bytes give.
    pub fn sealed(mut self) -> Self {
        self.crc = self.checksum();
        self
    }
}

impl DispatchFrame {
    /// The CRC-32C of all fields but `crc`, in the order of [`crate::crc`].
    pub fn checksum(&self) -> u32 {
        let mut crc = Crc::new()
            .u64(self.id)
            .u64(self.epoch)
            .u32(self.deadline_ms)
            .u32(self.format as u32)
            .u32(self.width)
            .u64(self.rows.len() as u64)
            .bytes(&self.rows)
            .u32(self.slots.len() as u32);
        for slot in &self.slots {
            crc = crc
                .u32(slot.slot)
                .u32(slot.row_index.len() as u32)
                .u32s(&slot.row_index);
        }
        crc.0
    }

    /// This frame with its `crc` set: the last step before sending.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.crc = self.checksum();
        self
    }
}

impl CombineFrame {
    /// The CRC-32C of all fields but `crc`, in the order of [`crate::crc`].
    pub fn checksum(&self) -> u32 {
        let crc = Crc::new()
            .u64(self.id)
            .u64(self.epoch)
            .u32(self.format as u32)
            .u32(self.width)
            .u64(self.rows.len() as u64)
            .bytes(&self.rows);
        match &self.fault {
            None => crc.bytes(&[0]).0,
            Some(fault) => {
                crc.bytes(&[1])
                    .u32(fault.code as u32)
                    .text(&fault.message)
                    .text(&fault.node)
                    .0
            }
        }
    }

    /// This frame with its `crc` set: the last step before sending.
    #[must_use]
    pub fn sealed(mut self) -> Self {
        self.crc = self.checksum();
        self
    }
}
