//! Headers, indices and manifests that are made to cost time or memory.

use std::fmt::Write as _;
use std::fs;

use guild_model::checkpoint::manifest::FILE as MANIFEST;

use crate::cases::Case;
use crate::file::{INDEX, SINGLE, Source, write_raw};

/// Entries of the largest headers.
const MANY: usize = 1_000_000;
/// Entries of about the largest header that is read at all for a small model (8 MiB).
const FITTING: usize = 80_000;
/// Levels of brackets.
const DEEP: usize = 200_000;

/// The single file's header becomes this text; the data stays.
fn header(what: &str, text: impl Fn(usize) -> String + Send + Sync + 'static) -> Case {
    Case::new(what, Source::Fp8, &[SINGLE], move |dir| {
        let bytes = fs::read(dir.join(SINGLE)).unwrap();
        let length = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let data = &bytes[8 + length..];
        write_raw(&dir.join(SINGLE), text(data.len()).as_bytes(), data);
    })
}

/// The header's length becomes this number.
fn length(number: u64) -> Case {
    let what = format!("a header of {number} bytes");
    Case::new(what, Source::Fp8, &[SINGLE], move |dir| {
        let path = dir.join(SINGLE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        fs::write(path, bytes).unwrap();
    })
}

/// A header of so many empty tensors.
fn entries(count: usize) -> String {
    let mut text = String::from("{");
    for i in 0..count {
        let comma = if i > 0 { "," } else { "" };
        write!(
            text,
            r#"{comma}"model.layers.{i}.x.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#
        )
        .unwrap();
    }
    text + "}"
}

fn overlapping(count: usize, data: usize) -> String {
    let mut text = String::from("{");
    for i in 0..count {
        let comma = if i > 0 { "," } else { "" };
        write!(
            text,
            r#"{comma}"t{i}":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}"#
        )
        .unwrap();
    }
    text + "}"
}

fn one(entry: &str) -> String {
    format!(r#"{{"model.norm.weight":{entry}}}"#)
}

pub(crate) fn all() -> Vec<Case> {
    let file = |name: &'static str, text: fn() -> String| {
        let source = if name == INDEX {
            Source::Shards
        } else {
            Source::Fp8
        };
        let what = format!("{name} of {} bytes", text().len());
        Case::new(what, source, &[name], move |dir| {
            fs::write(dir.join(name), text()).unwrap()
        })
    };
    vec![
        length(u64::MAX),
        length(u64::MAX - 7),
        length(1 << 32),
        length(99_999_999),
        header("a million entries", |_| entries(MANY)),
        header("as many entries as are read", |_| entries(FITTING)),
        header("as many overlapping entries as are read", |data| {
            overlapping(FITTING, data)
        }),
        header("deep brackets", |_| "[".repeat(DEEP)),
        header("deep objects", |_| r#"{"a":"#.repeat(DEEP)),
        header("a deep shape", |_| {
            one(&format!(r#"{{"dtype":"F32","shape":{}"#, "[".repeat(DEEP)))
        }),
        header("a shape of a million ones", |data| {
            let ones = "1,".repeat(MANY);
            one(&format!(
                r#"{{"dtype":"U8","shape":[{ones}{data}],"data_offsets":[0,{data}]}}"#
            ))
        }),
        header("a shape whose product overflows", |data| {
            one(&format!(
                r#"{{"dtype":"F32","shape":[{0},{0},{0}],"data_offsets":[0,{data}]}}"#,
                u64::MAX
            ))
        }),
        header("offsets near the end of numbers", |_| {
            let end = u64::MAX;
            one(&format!(
                r#"{{"dtype":"U8","shape":[1],"data_offsets":[{},{end}]}}"#,
                end - 1
            ))
        }),
        header("one endless name", |_| {
            format!(r#"{{"{}":1}}"#, "x".repeat(7 << 20))
        }),
        header("one endless number", |_| {
            one(&format!(
                r#"{{"dtype":"F32","shape":[{}],"data_offsets":[0,4]}}"#,
                "9".repeat(7 << 20)
            ))
        }),
        file(INDEX, || {
            let mut text = String::from(r#"{"weight_map":{"#);
            for i in 0..MANY / 10 {
                write!(text, r#""t{i}":"f{i}.safetensors","#).unwrap();
            }
            text + r#""t":"t"}}"#
        }),
        file(INDEX, || "[".repeat(DEEP)),
        file(MANIFEST, || "[".repeat(DEEP)),
        file(MANIFEST, || " ".repeat(64 << 20)),
        file(MANIFEST, || {
            let mut text = String::from(r#"{"version":1,"files":{},"tensors":{"#);
            for i in 0..20_000 {
                write!(text, r#""{i}":{{"dtype":"","shape":[],"blake3":""}},"#).unwrap();
            }
            text + r#""t":{"dtype":"","shape":[],"blake3":""}}}"#
        }),
    ]
}
