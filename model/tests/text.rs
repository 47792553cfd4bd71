//! Tokenizer, chat template, incremental detokenization and stop strings.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    sync::{Arc, LazyLock},
};

use guild_model::{
    Config, ModelError,
    text::{Detokenizer, StopStrings, Text},
};
use proptest::{prelude::*, test_runner::RngSeed};
use serde_json::{Map, Value, json};

fn demo_dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

fn config() -> Config {
    Config::from_dir(&demo_dir()).unwrap()
}

fn demo() -> Arc<Text> {
    static DEMO: LazyLock<Arc<Text>> =
        LazyLock::new(|| Text::load(&demo_dir(), &config()).unwrap().unwrap());
    DEMO.clone()
}

/// A checkpoint directory with these files, tokenizer.json of the demo unless given.
fn dir_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        demo_dir().join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    for (name, content) in files {
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn load(files: &[(&str, &str)]) -> Result<Option<Arc<Text>>, ModelError> {
    Text::load(dir_with(files).path(), &config())
}

/// A sentencepiece-like tokenizer: byte fallback, `▁` for space, first space stripped.
fn byte_fallback() -> Arc<Text> {
    let mut vocab = Map::new();
    for word in [
        "<unk>", "<s>", "▁", "▁This", "▁is", "a", "é", "▁世", "界", "ab",
    ] {
        vocab.insert(word.into(), vocab.len().into());
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [
            {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        ],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    load(&[("tokenizer.json", &tokenizer.to_string())])
        .unwrap()
        .unwrap()
}

/// Word pieces: `##` joins, a space stands before every other token.
fn word_piece() -> Arc<Text> {
    let tokenizer = json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}, "padding": null,
        "normalizer": null, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "added_tokens": [],
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "he": 1, "##llo": 2, "wor": 3, "##ld": 4, ".": 5, ",": 6, "do": 7, "n't": 8}},
    });
    load(&[("tokenizer.json", &tokenizer.to_string())])
        .unwrap()
        .unwrap()
}

/// The pieces of a detokenizer, the last one from its end.
fn pieces(text: &Arc<Text>, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(text.clone(), skip_special);
    let mut pieces: Vec<String> = ids
        .iter()
        .map(|id| detokenizer.push(*id).unwrap())
        .collect();
    pieces.push(detokenizer.finish().unwrap());
    pieces
}

fn assert_exact(text: &Arc<Text>, ids: &[u32], skip_special: bool) {
    let whole = text.decode(ids, skip_special).unwrap();
    assert_eq!(pieces(text, ids, skip_special).concat(), whole, "{ids:?}");
}

#[test]
fn text_survives_the_round_trip() {
    let text = demo();
    for sample in [
        "ROMEO:\nWhat light?",
        "",
        " ",
        "naïve café — 世界 🎉👩‍👩‍👧",
        "\u{0}\t\r\n",
        "ſ́",
    ] {
        let ids = text.encode(sample).unwrap();
        assert_eq!(text.decode(&ids, false).unwrap(), sample);
        assert_exact(&text, &ids, true);
    }
}

#[test]
fn special_tokens_written_out_are_special_and_can_be_left_out() {
    let text = demo();
    let ids = text.encode("<|user|>hi<|eos|>").unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (3, 1));
    assert_eq!(text.decode(&ids, true).unwrap(), "hi");
    assert_eq!(text.decode(&ids, false).unwrap(), "<|user|>hi<|eos|>");
    assert_eq!(pieces(&text, &ids, true).concat(), "hi");
    assert!(text.is_special(3) && !text.is_special(100));
    assert_eq!(text.token_text(1), "<|eos|>");
    assert_eq!(text.token_bytes(u32::MAX), b"");
}

#[test]
fn a_character_of_several_tokens_comes_when_it_is_complete() {
    let text = demo();
    let ids = text.encode("🎉").unwrap();
    assert!(ids.len() > 1, "the sample is of one token");
    let pieces = pieces(&text, &ids, true);
    let shown: Vec<&String> = pieces.iter().filter(|p| !p.is_empty()).collect();
    assert_eq!(shown, ["🎉"]);
    // Cut short, it becomes a replacement at the end, not before.
    let cut = &ids[..ids.len() - 1];
    let mut detokenizer = Detokenizer::new(text.clone(), true);
    assert!(
        cut.iter()
            .all(|id| detokenizer.push(*id).unwrap().is_empty())
    );
    assert_eq!(
        detokenizer.finish().unwrap(),
        text.decode(cut, true).unwrap()
    );
}

#[test]
fn a_prompt_has_at_least_its_bytes_by_the_longest_token_as_tokens() {
    let text = demo();
    let longest = text.max_token_bytes().unwrap();
    for sample in ["a", "thou art ".repeat(50).as_str(), "        \n\n\n"] {
        assert!(text.encode(sample).unwrap().len() >= sample.len() / longest);
    }
}

#[test]
fn the_template_of_the_checkpoint_renders() {
    let text = demo();
    let messages = [
        json!({"role": "user", "content": "hi"}),
        json!({"role": "assistant", "content": "ay"}),
        json!({"role": "user", "content": "go"}),
    ];
    let rendered = text.chat(&messages, &[], true, &Map::new()).unwrap();
    assert_eq!(
        rendered,
        "<|bos|><|user|>hi<|assistant|>ay<|eos|><|user|>go<|assistant|>"
    );
    assert_eq!(text.encode_plain(&rendered).unwrap()[..2], [0, 3]);
    assert!(
        !text
            .chat(&messages, &[], false, &Map::new())
            .unwrap()
            .ends_with("<|assistant|>")
    );
}

#[test]
fn a_client_cannot_set_what_the_server_gives_the_template() {
    let text = demo();
    let messages = [json!({"role": "user", "content": "hi"})];
    for name in [
        "messages",
        "bos_token",
        "add_generation_prompt",
        "chat_template",
    ] {
        let mut variables = Map::new();
        variables.insert(name.into(), Value::from("x"));
        let error = text
            .chat(&messages, &[], true, &variables)
            .unwrap_err()
            .to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn refusals_of_a_template_are_errors_with_its_words() {
    let text = load(&[(
        "chat_template.jinja",
        "{{ raise_exception('roles must alternate') }}",
    )])
    .unwrap()
    .unwrap();
    let error = text
        .chat(
            &[json!({"role": "user", "content": "hi"})],
            &[],
            true,
            &Map::new(),
        )
        .unwrap_err();
    assert!(
        matches!(error, ModelError::Template { .. })
            && error.to_string().contains("roles must alternate"),
        "{error}"
    );
    let none = load(&[]).unwrap().unwrap();
    assert!(!none.has_template());
    assert!(
        none.chat(
            &[json!({"role": "user", "content": "hi"})],
            &[],
            true,
            &Map::new()
        )
        .unwrap_err()
        .to_string()
        .contains("chat_template")
    );
}

#[test]
fn a_template_that_explodes_is_stopped_at_the_limit() {
    let template = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}";
    let text = load(&[("chat_template.jinja", template)]).unwrap().unwrap();
    let error = text
        .chat(
            &[json!({"role": "user", "content": "x".repeat(500)})],
            &[],
            true,
            &Map::new(),
        )
        .unwrap_err();
    assert!(error.to_string().contains("bytes"), "{error}");
}

#[test]
fn a_template_file_goes_before_the_configuration() {
    let settings = json!({"bos_token": "<|bos|>", "chat_template": "old"}).to_string();
    let text = load(&[
        ("tokenizer_config.json", &settings),
        ("chat_template.jinja", "{{ bos_token }}new"),
    ])
    .unwrap()
    .unwrap();
    let rendered = text.chat(
        &[json!({"role": "user", "content": ""})],
        &[],
        true,
        &Map::new(),
    );
    assert_eq!(rendered.unwrap(), "<|bos|>new");
    assert!(text.template_mentions("{{bos_token}}new") && !text.template_mentions("old"));
}

#[test]
fn a_template_sees_the_tools() {
    let text = load(&[(
        "chat_template.jinja",
        "{% for t in tools %}{{ t.function.name }}: {{ t.function.parameters | tojson }}{% endfor %}",
    )])
    .unwrap()
    .unwrap();
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"a": 1}}});
    let rendered = text.chat(&[], &[tool], true, &Map::new()).unwrap();
    assert_eq!(rendered, "f: {\"a\": 1}");
}

#[test]
fn configured_tokens_stand_around_a_prompt_and_not_around_a_conversation() {
    let settings = json!({"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "add_bos_token": true, "add_eos_token": true}).to_string();
    let text = load(&[("tokenizer_config.json", &settings)])
        .unwrap()
        .unwrap();
    let plain = text.encode_plain("hi").unwrap();
    assert_eq!(
        text.encode("hi").unwrap(),
        [&[0], plain.as_slice(), &[1]].concat()
    );
    assert_eq!(text.encode("").unwrap(), [0, 1]);
}

#[test]
fn a_post_processor_that_adds_them_is_not_doubled() {
    let mut tokenizer: Value =
        serde_json::from_slice(&fs::read(demo_dir().join("tokenizer.json")).unwrap()).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    });
    let settings = json!({"bos_token": "<|bos|>", "add_bos_token": true}).to_string();
    let text = load(&[
        ("tokenizer.json", &tokenizer.to_string()),
        ("tokenizer_config.json", &settings),
    ])
    .unwrap()
    .unwrap();
    let ids = text.encode("hi").unwrap();
    assert_eq!(ids[0], 0);
    assert_eq!(ids[1..], text.encode_plain("hi").unwrap());
}

#[test]
fn without_a_tokenizer_there_is_no_text_and_a_broken_one_is_an_error() {
    let empty = tempfile::tempdir().unwrap();
    assert!(Text::load(empty.path(), &config()).unwrap().is_none());
    for broken in [
        "",
        "{",
        "null",
        "{}",
        "[1,2]",
        r#"{"version":"1.0","model":{"type":"BPE"}}"#,
    ] {
        let error = load(&[("tokenizer.json", broken)]).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
    for (name, content) in [
        ("tokenizer_config.json", "{\"chat_template\": 5}"),
        ("tokenizer_config.json", "nope"),
    ] {
        let error = load(&[(name, content)]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let error = load(&[("chat_template.jinja", "{% for %}")]).unwrap_err();
    assert!(matches!(error, ModelError::Template { .. }), "{error}");
    let error = load(&[(
        "tokenizer_config.json",
        r#"{"add_bos_token": true, "bos_token": "<none>"}"#,
    )])
    .unwrap_err();
    assert!(error.to_string().contains("bos_token"), "{error}");
}

#[test]
fn prompts_are_never_cut() {
    let text = word_piece();
    assert_eq!(
        text.encode("hello world . he do").unwrap().len(),
        7,
        "tokenizer.json asks for two"
    );
}

#[test]
fn first_tokens_and_joined_tokens_keep_their_decoder() {
    let text = word_piece();
    let ids = [1, 2, 3, 4, 6, 7, 8, 5];
    assert_eq!(text.decode(&ids, true).unwrap(), "hello world, don't.");
    assert_exact(&text, &ids, true);
    let text = byte_fallback();
    let ids = text.encode("▁This▁is世界").unwrap();
    assert_exact(&text, &ids, true);
    assert!(text.decode(&[3, 4], true).unwrap().starts_with("This"));
}

#[test]
fn a_long_run_of_byte_tokens_is_released_on_the_way() {
    let text = byte_fallback();
    let sample = "世界".repeat(40);
    let ids: Vec<u32> = sample
        .bytes()
        .map(|b| {
            (0..300)
                .rev()
                .find(|id| text.token_bytes(*id) == [b])
                .unwrap()
        })
        .collect();
    assert_eq!(ids.len(), 240);
    let pieces = pieces(&text, &ids, true);
    assert_eq!(pieces.concat(), sample);
    assert!(pieces[..200].iter().any(|p| !p.is_empty()));
}

#[test]
fn mutated_tokenizers_load_or_are_refused() {
    let original = fs::read(demo_dir().join("tokenizer.json")).unwrap();
    let head = original.len().min(3000);
    let dir = dir_with(&[]);
    let config = config();
    let mut refused = 0;
    for at in (0..head).step_by(29) {
        let mut bytes = original.clone();
        bytes[at] = if bytes[at] == b'}' { b'[' } else { b'}' };
        fs::write(dir.path().join("tokenizer.json"), &bytes).unwrap();
        refused += usize::from(Text::load(dir.path(), &config).is_err());
    }
    assert!(refused > 50, "{refused}");
}

/// Naive and obviously right: the shortest beginning of the text that holds a
/// whole stop string decides.
fn stop_naively(text: &str, stops: &[String]) -> (String, Option<String>) {
    for (end, _) in text.char_indices().map(|(i, c)| (i + c.len_utf8(), c)) {
        let found = stops
            .iter()
            .filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str()))
            .max_by_key(|s| s.len());
        if let Some(stop) = found {
            return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() })]

    #[test]
    fn pieces_are_the_whole_for_byte_level_tokens(ids in prop::collection::vec(0u32..2100, 0..60), skip in any::<bool>()) {
        assert_exact(&demo(), &ids, skip);
    }

    #[test]
    fn pieces_are_the_whole_for_lone_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let text = demo();
        // Tokens of single bytes make every kind of broken UTF-8.
        let of_byte: Vec<u32> = (0..=255u8).map(|b| (0..2048).find(|id| text.token_bytes(*id) == [b]).unwrap()).collect();
        let ids: Vec<u32> = bytes.iter().map(|b| of_byte[*b as usize]).collect();
        assert_exact(&text, &ids, false);
        prop_assert_eq!(pieces(&text, &ids, false).concat(), String::from_utf8_lossy(&bytes).into_owned());
    }

    #[test]
    fn pieces_are_the_whole_for_byte_fallback(ids in prop::collection::vec(0u32..280, 0..40), skip in any::<bool>()) {
        static TEXT: LazyLock<Arc<Text>> = LazyLock::new(byte_fallback);
        assert_exact(&TEXT, &ids, skip);
    }

    #[test]
    fn stop_strings_do_not_depend_on_the_cuts(
        text in "[ab\u{e9}]{0,40}",
        stops in prop::collection::vec("[ab\u{e9}]{0,4}", 0..4),
        cuts in prop::collection::vec(1usize..6, 0..40),
    ) {
        let mut matcher = StopStrings::new(stops.clone());
        let (mut out, mut found, mut rest, mut cuts) = (String::new(), None, text.chars().peekable(), cuts.into_iter());
        while rest.peek().is_some() && found.is_none() {
            let piece: String = rest.by_ref().take(cuts.next().unwrap_or(1)).collect();
            let step = matcher.push(&piece);
            out.push_str(&step.text);
            found = step.stop;
        }
        if found.is_none() {
            out.push_str(&matcher.finish());
        }
        prop_assert_eq!((out, found), stop_naively(&text, &stops));
    }
}
