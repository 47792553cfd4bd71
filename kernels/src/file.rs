//! Read-only mappings of files: the project's only `mmap`.
//!
//! Secret: that a checkpoint shard is paged in by the kernel and not read. Knows nothing of what the bytes mean.

use std::{fs::File, io};

/// The bytes of a file, mapped read-only for as long as this value lives.
#[derive(Debug)]
pub struct Mapped(memmap2::Mmap);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps the whole of `file` read-only.
///
/// Checkpoint shards must not be truncated or rewritten in place while they are mapped: replace them by renaming a
/// new file over the old name, as every downloader does.
///
/// # Errors
/// Whatever the operating system says of the mapping (no permission, out of address space, not a regular file).
pub fn map(file: &File) -> io::Result<Mapped> {
    // SAFETY: the mapping is private and read-only, so this process cannot write through it, and `Mapped` hands out
    // shared slices tied to its own lifetime, so none outlives the mapping. What Rust cannot rule out is another
    // process changing the file: bytes that change under us are read as plain integers and floats (no type with
    // invalid bit patterns is ever built on them without a check), and a truncation ends in SIGBUS, not in reading
    // foreign memory. The doc comment above makes "do not modify in place" the operator's duty.
    let map = unsafe { memmap2::Mmap::map(file)? };
    Ok(Mapped(map))
}
