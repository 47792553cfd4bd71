//! The files around the weights, byte for byte as Python's `json` writes them.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value, json};

use super::Shape;
use crate::ModelError;

/// Ids of the two special tokens, after 256 bytes and one merge.
const BOS: u32 = 257;
const EOS: u32 = 258;

/// Index, configuration and tokenizer.
pub(super) fn write_all(
    dir: &Path,
    shape: &Shape,
    vocab_size: usize,
    weight_map: Map<String, Value>,
    total: u64,
) -> Result<(), ModelError> {
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    dump(dir, "model.safetensors.index.json", &index)?;
    dump(dir, "config.json", &Value::Object(shape.0.clone()))?;
    dump(
        dir,
        "generation_config.json",
        &json!({"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": false}),
    )?;
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
        "add_bos_token": false
    });
    dump(dir, "tokenizer_config.json", &tokenizer_config)?;
    dump(dir, "tokenizer.json", &tokenizer(vocab_size))
}

/// A byte-level BPE tokenizer with one merge; the rest of the vocabulary is filler.
fn tokenizer(vocab_size: usize) -> Value {
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let mut words = byte_letters();
    words.extend(["\u{120}t", "<|bos|>", "<|eos|>"].map(String::from));
    words.extend((259..vocab_size).map(|i| format!("xtra{i:06}")));
    words.truncate(vocab_size);
    let vocab: Map<String, Value> = words
        .into_iter()
        .enumerate()
        .map(|(i, word)| (word, i.into()))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(BOS, "<|bos|>"), special(EOS, "<|eos|>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
            "merges": [["\u{120}", "t"]]
        }
    })
}

/// The printable letter that stands for each byte in byte-level BPE (GPT-2's table).
fn byte_letters() -> Vec<String> {
    let mut spare = 256u32..;
    (0..=255u32)
        .filter_map(|b| {
            let plain = matches!(b, 33..=126 | 161..=172 | 174..=255);
            char::from_u32(if plain { b } else { spare.next()? })
        })
        .map(String::from)
        .collect()
}

fn dump(dir: &Path, name: &str, value: &Value) -> Result<(), ModelError> {
    let path = dir.join(name);
    let mut out = Vec::new();
    value
        .serialize(&mut serde_json::Serializer::with_formatter(
            &mut out,
            Python(PrettyFormatter::with_indent(b" ")),
        ))
        .map_err(|e| ModelError::file(&path, format!("cannot be written as JSON: {e}")))?;
    fs::write(&path, out).map_err(|e| ModelError::file(&path, format!("cannot be written: {e}")))
}

/// One blank of indentation, and numbers as Python prints them.
struct Python(PrettyFormatter<'static>);

impl Formatter for Python {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

/// Shortest digits that read back the same; an exponent of at least two digits below 1e-4 and from
/// 1e16 on.
fn python_float(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent
        .strip_prefix('-')
        .map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}
