//! Aligned memory.
//!
//! Secret: how bytes come to start at a cache line without unsafe code, and which of them ask for huge pages. It does not know what they mean.

use guild_kernels::Memory;

/// Start of resident weights in memory, in bytes: a cache line, and the widest vector there is.
pub(crate) const ALIGNMENT: usize = 64;

// Weights lie in memory as they lie in files, and blobs travel as they lie in memory.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "weights are little endian, in files and in memory"
);

/// Bytes from which on a blob is memory of its own, which may have huge pages.
const OWN_BYTES: usize = 2 << 20;

/// Owned bytes that start at a multiple of 64.
pub struct Blob {
    bytes: Bytes,
    room: usize,
    len: usize,
}

enum Bytes {
    /// A vector with room to slide the start in.
    Small {
        memory: Vec<u8>,
        start: usize,
    },
    Large(Memory),
}

impl Bytes {
    fn zeroed(len: usize) -> Bytes {
        // Where the system has no such mapping, a vector is as good.
        if len >= OWN_BYTES
            && let Ok(memory) = Memory::new(len)
        {
            return Bytes::Large(memory);
        }
        let memory = vec![0; len + ALIGNMENT];
        let start = memory.as_ptr().addr().next_multiple_of(ALIGNMENT) - memory.as_ptr().addr();
        Bytes::Small { memory, start }
    }

    fn of(&self) -> &[u8] {
        match self {
            Bytes::Small { memory, start } => &memory[*start..],
            Bytes::Large(memory) => memory,
        }
    }

    fn of_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::Small { memory, start } => &mut memory[*start..],
            Bytes::Large(memory) => memory,
        }
    }
}

impl Blob {
    /// `len` zeros.
    pub fn with_len(len: usize) -> Blob {
        Blob {
            bytes: Bytes::zeroed(len),
            room: len,
            len,
        }
    }

    /// Room for `len` bytes, of which none is there yet: physical memory comes as it is filled.
    pub(crate) fn with_room(len: usize) -> Blob {
        let mut blob = Blob::with_len(len);
        blob.len = 0;
        blob
    }

    /// Puts bytes behind those that are there. False: there is no room for them, and nothing has changed.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.room - self.len;
        if fits {
            self.bytes.of_mut()[self.len..][..bytes.len()].copy_from_slice(bytes);
            self.len += bytes.len();
        }
        fits
    }

    pub(crate) fn copy(bytes: &[u8]) -> Blob {
        let mut blob = Blob::with_len(bytes.len());
        blob.as_mut().copy_from_slice(bytes);
        blob
    }

    pub(crate) fn collect<T: bytemuck::Pod>(len: usize, values: impl Iterator<Item = T>) -> Blob {
        let mut blob = Blob::with_len(len * size_of::<T>());
        let to: &mut [T] = bytemuck::cast_slice_mut(blob.as_mut());
        to.iter_mut()
            .zip(values)
            .for_each(|(to, value)| *to = value);
        blob
    }

    pub(crate) fn of<T: bytemuck::Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.as_ref())
    }
}

impl AsRef<[u8]> for Blob {
    fn as_ref(&self) -> &[u8] {
        &self.bytes.of()[..self.len]
    }
}

impl AsMut<[u8]> for Blob {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes.of_mut()[..self.len]
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blob").field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_start_at_a_cache_line() {
        for len in [0, 1, 63, 64, 1000, OWN_BYTES + 1] {
            let blob = Blob::copy(&vec![7; len]);
            assert!(blob.as_ref().as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert_eq!(blob.as_ref(), vec![7; len]);
            let mut filled = Blob::with_room(len);
            assert!(blob.as_ref().chunks(60).all(|piece| filled.push(piece)));
            assert!(filled.as_ref().as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert_eq!(filled.as_ref(), blob.as_ref());
            assert!(!filled.push(&[0; 2 * ALIGNMENT]));
            assert_eq!(filled.as_ref().len(), len);
        }
    }
}
