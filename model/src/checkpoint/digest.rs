//! One name for a model: configuration and weights, whatever the files.

use rayon::prelude::*;

use super::{Checkpoint, TensorView};
use crate::ModelError;

/// Above this many bytes of weights only parts of every tensor are read.
const FULL_BYTES: u64 = 64 << 30;
/// Bytes of each of the three parts of a sampled tensor: first, middle, last.
const SAMPLE_BYTES: usize = 4096;
/// Tensors from this size on are hashed by all threads together rather than one each.
const LARGE_BYTES: usize = 8 << 20;

pub(super) fn digest(checkpoint: &Checkpoint) -> Result<String, ModelError> {
    let full = checkpoint.required_bytes() <= FULL_BYTES;
    let mut tensors: Vec<TensorView<'_>> = checkpoint.required().collect();
    tensors.sort_by_key(|t| t.name());
    // A hash per tensor, then a hash of the hashes: the order of work does not matter.
    let part = |tensor: &TensorView<'_>| match tensor.listed() {
        // Files that are to be used where they lie are not read before they are used.
        Some(listed) if checkpoint.mapped && read_whole(tensor, full) => listed,
        _ => content(tensor, full),
    };
    let parts: Vec<blake3::Hash> = tensors.par_iter().map(part).collect();
    // What has been read whole has been verified for free.
    for (tensor, part) in tensors.iter().zip(&parts) {
        if read_whole(tensor, full) {
            tensor.expect(part)?;
        }
    }

    let mut hasher = blake3::Hasher::new();
    let config = serde_json::to_vec(checkpoint.config()).map_err(|e| {
        ModelError::file(
            checkpoint.dir(),
            format!("configuration cannot be written as JSON: {e}"),
        )
    })?;
    hasher
        .update(&(config.len() as u64).to_le_bytes())
        .update(&config);
    for (tensor, part) in tensors.iter().zip(&parts) {
        let head = format!(
            "{}\0{}\0{:?}\0",
            tensor.name(),
            tensor.dtype().name(),
            tensor.shape()
        );
        hasher.update(head.as_bytes()).update(part.as_bytes());
    }
    Ok(format!(
        "{}:{}",
        if full { "full" } else { "sampled" },
        hasher.finalize().to_hex()
    ))
}

fn read_whole(tensor: &TensorView<'_>, full: bool) -> bool {
    full || tensor.bytes().len() <= 3 * SAMPLE_BYTES
}

fn content(tensor: &TensorView<'_>, full: bool) -> blake3::Hash {
    let bytes = tensor.bytes();
    if read_whole(tensor, full) {
        return whole(bytes);
    }
    let mut hasher = blake3::Hasher::new();
    let middle = bytes.len() / 2 - SAMPLE_BYTES / 2;
    for start in [0, middle, bytes.len() - SAMPLE_BYTES] {
        hasher.update(&bytes[start..start + SAMPLE_BYTES]);
    }
    hasher.finalize()
}

/// BLAKE3 of bytes, by all threads where that pays.
pub(super) fn whole(bytes: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    if bytes.len() >= LARGE_BYTES {
        hasher.update_rayon(bytes)
    } else {
        hasher.update(bytes)
    };
    hasher.finalize()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_sample_is_three_parts_of_a_large_tensor_and_all_of_a_small_one() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-fp8");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let large = checkpoint.tensor("lm_head.weight").unwrap();
        let (bytes, middle) = (large.bytes(), large.bytes().len() / 2);
        let last = bytes.len() - 4096;
        let parts = [
            &bytes[..4096],
            &bytes[middle - 2048..middle + 2048],
            &bytes[last..],
        ];
        assert_eq!(content(&large, false), blake3::hash(&parts.concat()));
        assert_eq!(content(&large, true), blake3::hash(bytes));
        let small = checkpoint.tensor("model.norm.weight").unwrap();
        assert_eq!(content(&small, false), blake3::hash(small.bytes()));
    }
}
