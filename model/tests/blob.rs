//! Experts as blobs: the same bytes everywhere, the same answers, and nothing else is taken for one.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::golden;
use guild_model::checkpoint::Dtype;
use guild_model::expert::{Arriving, Expert};
use guild_model::{Checkpoint, Cpu, ModelError};
use proptest::prelude::*;

const DTYPES: [Dtype; 3] = [Dtype::Auto, Dtype::F32, Dtype::Bf16];
/// Bytes of a blob's header.
const HEADER: usize = 256;

fn open(case: &str) -> Checkpoint {
    Checkpoint::open(&golden::dir(case)).unwrap()
}

/// A few rows of `width` numbers between -1 and 1.
fn rows(width: usize) -> Vec<f32> {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
    (0..3 * width).map(value).collect()
}

#[track_caller]
fn refused(result: Result<Expert, ModelError>, parts: &[&str]) {
    let message = result.err().unwrap().to_string();
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

#[test]
fn an_expert_from_a_blob_computes_the_same_bits_as_one_from_disk() {
    let cpu = Cpu::new(2);
    for case in golden::CASES {
        let ckpt = open(case);
        let layer = ckpt.config().moe_layers().next().unwrap();
        for dtype in DTYPES {
            let read = Expert::load(&ckpt, layer, 5, dtype).unwrap();
            let len = Expert::blob_len(&ckpt, layer, 5, dtype).unwrap();
            assert_eq!(read.blob().len(), len, "{case} {dtype}");
            assert!(read.blob().as_ptr().addr().is_multiple_of(64) && len.is_multiple_of(64));
            let sent = Expert::from_blob(&ckpt, layer, 5, dtype, read.blob()).unwrap();
            assert_eq!(sent.digest(), read.digest());
            assert_eq!(read.digest(), *blake3::hash(read.blob()).as_bytes());
            assert_eq!(sent.bytes(), read.bytes());
            let x = rows(ckpt.config().hidden_size);
            let what = format!("{case} {dtype}");
            golden::assert_same_bits(&what, &sent.forward(&cpu, &x), &read.forward(&cpu, &x));
        }
    }
}

#[test]
fn a_blob_holds_the_stored_bytes_at_aligned_offsets_behind_its_header() {
    let ckpt = open("v3-fp8");
    let expert = Expert::load(&ckpt, 1, 3, Dtype::Auto).unwrap();
    let blob = expert.blob();
    let number = |at: usize| u64::from_le_bytes(*blob[at..].first_chunk().unwrap()) as usize;
    assert_eq!(&blob[..8], b"GUILDEXP");
    assert_eq!(number(16), blob.len());
    for (i, name) in ["gate", "up", "down"].iter().enumerate() {
        let entry = 32 + 72 * i;
        let weight = format!("model.layers.1.mlp.experts.3.{name}_proj.weight");
        for (field, tensor) in [(24, weight.clone()), (56, format!("{weight}_scale_inv"))] {
            let (start, len) = (number(entry + field), number(entry + field + 8));
            assert!(start.is_multiple_of(64));
            let stored = ckpt.tensor(&tensor).unwrap();
            assert_eq!(&blob[start..start + len], stored.bytes(), "{tensor}");
        }
        let shape = ckpt.tensor(&weight).unwrap().shape();
        assert_eq!(
            [number(entry + 8), number(entry + 16)],
            [shape[0], shape[1]]
        );
    }
}

#[test]
fn a_blob_of_another_expert_layer_dtype_or_model_is_refused() {
    let ckpt = open("v3-basic");
    let bytes = Expert::load(&ckpt, 1, 3, Dtype::Auto).unwrap();
    let take = |layer, expert, dtype| Expert::from_blob(&ckpt, layer, expert, dtype, bytes.blob());
    take(1, 3, Dtype::Auto).unwrap();
    take(1, 3, Dtype::F32).unwrap();
    refused(
        take(1, 4, Dtype::Auto),
        &["layer 1, expert 4", "expert is 3"],
    );
    refused(take(2, 3, Dtype::Auto), &["layer is 1"]);
    refused(take(1, 3, Dtype::Bf16), &["gate", "F32", "--dtype"]);
    refused(take(1, 99, Dtype::Auto), &["99"]);
    let other = open("v3-fp8");
    refused(
        Expert::from_blob(&other, 1, 3, Dtype::Auto, bytes.blob()),
        &["gate: rows"],
    );
}

#[test]
fn a_value_that_is_not_finite_is_refused_with_its_matrix() {
    let ckpt = open("v3-fp8");
    let good = Expert::load(&ckpt, 1, 0, Dtype::Auto).unwrap();
    let number = |at: usize| u64::from_le_bytes(*good.blob()[at..].first_chunk().unwrap());
    let spoiled = |at: u64, value: &[u8]| {
        let mut bytes = good.blob().to_vec();
        bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
        Expert::from_blob(&ckpt, 1, 0, Dtype::Auto, &bytes)
    };
    let up = 32 + 72;
    refused(spoiled(number(up + 24) + 7, &[0xff]), &["up: element 7"]);
    for scale in [f32::NAN, f32::MAX] {
        let down = up + 72;
        refused(
            spoiled(number(down + 56) + 4, &scale.to_le_bytes()),
            &["down: scale 1"],
        );
    }
}

#[test]
fn a_length_or_a_header_that_does_not_fit_is_refused_by_field() {
    let ckpt = open("v3-mtp");
    let good = Expert::load(&ckpt, 4, 2, Dtype::Auto).unwrap();
    let take = |bytes: &[u8]| Expert::from_blob(&ckpt, 4, 2, Dtype::Auto, bytes);
    let with = |at: usize, value: u64| {
        let mut bytes = good.blob().to_vec();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        take(&bytes)
    };
    take(good.blob()).unwrap();
    refused(take(&[]), &["0 bytes"]);
    refused(take(&good.blob()[..good.blob().len() - 1]), &["length"]);
    refused(take(&[good.blob(), &[0; 64]].concat()), &["length"]);
    refused(with(0, 1), &["GUILDEXP"]);
    refused(with(8, 2 | (256 << 32)), &["version is 2"]);
    refused(with(32, 9), &["gate: format 9"]);
    for at in (32..HEADER - 8).step_by(8) {
        for value in [3, u64::MAX, u64::MAX / 2, 1 << 32] {
            refused(with(at, value), &["layer 4, expert 2"]);
        }
    }
    refused(with(56, 257), &["gate: offset of the data is 257, not 256"]);
    refused(with(40, u64::MAX), &["shapes"]);
    let padding = HEADER - 8;
    refused(with(padding, 1), &["padding"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_bytes_make_it_panic_and_no_changed_header_or_padding_passes(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
        in_header in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
        piece in 1usize..5000,
    ) {
        let ckpt = open("v3-fp8");
        let good = Expert::load(&ckpt, 1, 1, Dtype::Auto).unwrap();
        let mut bytes = good.blob().to_vec();
        for (at, flip) in edits {
            let at = at.index(if in_header { HEADER } else { bytes.len() });
            bytes[at] ^= flip;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut arriving = Arriving::new(&ckpt, 1, 1, Dtype::Auto).unwrap();
        let mut pieces = bytes.chunks(piece);
        let come = pieces.try_for_each(|piece| arriving.take(piece));
        let digest = arriving.digest();
        let in_pieces = come.and_then(|()| arriving.finish());
        let at_once = Expert::from_blob(&ckpt, 1, 1, Dtype::Auto, &bytes);
        prop_assert_eq!(in_pieces.is_ok(), at_once.is_ok());
        match in_pieces {
            Err(error) => prop_assert!(error.to_string().contains("layer 1, expert 1")),
            Ok(taken) => {
                prop_assert_eq!(&bytes[..HEADER], &good.blob()[..HEADER]);
                prop_assert_eq!(taken.digest() == good.digest(), bytes == good.blob());
                prop_assert_eq!(taken.digest(), digest);
                let whole = at_once.unwrap();
                prop_assert_eq!(taken.blob(), whole.blob());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let ckpt = open("v3-mtp");
        prop_assert!(Expert::from_blob(&ckpt, 1, 1, Dtype::Auto, &bytes).is_err());
        let named = [b"GUILDEXP\x01\0\0\0\0\x01\0\0".as_slice(), &bytes].concat();
        prop_assert!(Expert::from_blob(&ckpt, 1, 1, Dtype::Auto, &named).is_err());
    }
}
