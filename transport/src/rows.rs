//! Rows as numbers and as bytes: little-endian f32 on the wire, no copy where
//! the machine and the alignment allow it.

use std::ops::Deref;

use bytes::Bytes;
use guild_proto::limits::F32_BYTES;

/// Whether f32 in memory and on the wire are the same bytes.
const SAME_BYTES: bool = cfg!(target_endian = "little");

/// Rows at the node they were sent to, seen as `[f32]`: a slice of the received
/// message when that happens to be aligned, a copy otherwise.
#[derive(Debug)]
pub struct Rows(Repr);

#[derive(Debug)]
enum Repr {
    Owned(Vec<f32>),
    /// Checked to cast to `[f32]`.
    Wire(Bytes),
}

impl Rows {
    /// The rows of a frame; `bytes` holds a whole number of f32.
    pub(crate) fn from_wire(bytes: Bytes) -> Self {
        if SAME_BYTES && bytemuck::try_cast_slice::<u8, f32>(&bytes).is_ok() {
            return Self(Repr::Wire(bytes));
        }
        let mut rows = vec![0.0; bytes.len() / F32_BYTES];
        copy_from_wire(&mut rows, &bytes);
        Self(Repr::Owned(rows))
    }
}

impl From<Vec<f32>> for Rows {
    fn from(rows: Vec<f32>) -> Self {
        Self(Repr::Owned(rows))
    }
}

impl Deref for Rows {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Repr::Owned(rows) => rows,
            Repr::Wire(bytes) => bytemuck::try_cast_slice(bytes).unwrap_or(&[]),
        }
    }
}

/// f32 rows that lend their bytes to a message.
struct Lent(Vec<f32>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// `rows` as they travel, without a copy on little-endian machines.
pub(crate) fn into_wire(rows: Vec<f32>) -> Bytes {
    if SAME_BYTES {
        Bytes::from_owner(Lent(rows))
    } else {
        rows.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
}

/// Copies wire bytes into `to`, whatever their alignment. The lengths agree.
pub(crate) fn copy_from_wire(to: &mut [f32], from: &[u8]) {
    if SAME_BYTES {
        bytemuck::cast_slice_mut(to).copy_from_slice(from);
    } else {
        for (to, from) in to.iter_mut().zip(from.chunks_exact(F32_BYTES)) {
            *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_survive_the_wire_at_any_alignment() {
        let rows = vec![0.0, -0.0, f32::NAN, f32::MIN_POSITIVE / 2.0, 1.0e38];
        let wire = into_wire(rows.clone());
        for offset in 0..8 {
            let mut shifted = vec![0xAA; offset];
            shifted.extend_from_slice(&wire);
            let back = Rows::from_wire(Bytes::from(shifted).slice(offset..));
            let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&back), bits(&rows));
        }
    }

    #[test]
    fn aligned_rows_are_not_copied() {
        let wire = into_wire(vec![1.0, 2.0]);
        let rows = Rows::from_wire(wire.clone());
        assert_eq!(rows.as_ptr().cast::<u8>(), wire.as_ptr());
        assert!(Rows::from_wire(Bytes::new()).is_empty());
    }
}
