use std::path::Path;

use super::*;

struct Bench {
    text: Arc<Text>,
    grammars: Grammars,
    eos: u32,
}

fn demo() -> Bench {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let config = Config::from_dir(&dir).unwrap();
    let text = Text::load(&dir, &config).unwrap().unwrap();
    let grammars = Grammars::new(&text, &config).unwrap();
    Bench {
        text,
        grammars,
        eos: config.eos_token_ids[0],
    }
}

impl Bench {
    /// A text of the grammar, drawn from what is allowed by a generator that `seed` starts; None
    /// when it does not end within 300 tokens.
    fn draw(&self, form: &Form, seed: u64) -> Option<String> {
        let mut sentence = self.grammars.compile(form).unwrap().begin();
        let (mut state, mut ids) = (seed.wrapping_mul(2).wrapping_add(1), Vec::new());
        for _ in 0..300 {
            let allowed = sentence.allowed().unwrap();
            let ids_allowed: Vec<u32> = (0..2048).filter(|&id| allowed.contains(id)).collect();
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let token = ids_allowed[(state >> 33) as usize % ids_allowed.len()];
            sentence.push(token).unwrap();
            if token == self.eos {
                return Some(self.text.decode(&ids, false).unwrap());
            }
            ids.push(token);
        }
        None
    }

    fn refusal(&self, form: &Form) -> String {
        self.grammars
            .compile(form)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    }
}

#[test]
fn whatever_is_drawn_is_what_was_asked_for() {
    let bench = demo();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "kind": {"enum": ["king", "fool"]},
            "more": {"type": "array", "items": {"$ref": "#/$defs/yes"}, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "more"],
        "additionalProperties": false,
        "$defs": {"yes": {"type": "boolean"}},
    });
    let choices = ["yes", "no \"and\" no", "über\n/i", "yes, indeed"].map(String::from);
    for seed in 0..20 {
        let text = bench
            .draw(&Form::JsonSchema(schema.to_string()), seed)
            .unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 4, "{text}");
        assert!(
            value["name"].as_str().unwrap().chars().count() <= 8,
            "{text}"
        );
        assert!(
            (0..=130).contains(&value["age"].as_i64().unwrap()),
            "{text}"
        );
        assert!(
            ["king", "fool"].contains(&value["kind"].as_str().unwrap()),
            "{text}"
        );
        assert!(
            value["more"]
                .as_array()
                .unwrap()
                .iter()
                .all(Value::is_boolean),
            "{text}"
        );
        assert!(!text.contains('\n'), "{text}");

        let text = bench
            .draw(&Form::Regex(r"[a-f]{2}-[0-9]{1,3}(é|\.)".into()), seed)
            .unwrap();
        let (head, tail) = text.split_once('-').unwrap();
        assert!(
            head.len() == 2 && head.bytes().all(|b| (b'a'..=b'f').contains(&b)),
            "{text}"
        );
        let digits = tail.strip_suffix('é').or(tail.strip_suffix('.')).unwrap();
        assert!(
            (1..=3).contains(&digits.len()) && digits.parse::<u32>().is_ok(),
            "{text}"
        );

        let text = bench.draw(&Form::Choice(choices.to_vec()), seed).unwrap();
        assert!(choices.contains(&text), "{text}");

        let sum = "start: number (\"+\" number){2}\nnumber: /[0-9]{2}/\n";
        let text = bench.draw(&Form::Lark(sum.into()), seed).unwrap();
        assert_eq!(text.split('+').count(), 3, "{text}");
    }
}

#[test]
fn any_object_is_an_object() {
    let bench = demo();
    let texts: Vec<String> = (0..40)
        .filter_map(|seed| bench.draw(&Form::JsonObject, seed))
        .collect();
    assert!(!texts.is_empty());
    for text in texts {
        assert!(
            serde_json::from_str::<Value>(&text).unwrap().is_object(),
            "{text}"
        );
    }
}

#[test]
fn a_text_that_is_pushed_again_goes_on_the_same_and_what_is_not_allowed_is_refused() {
    let bench = demo();
    let grammar = bench
        .grammars
        .compile(&Form::Regex("(ab|cd){2,4}".into()))
        .unwrap();
    let ids = bench.text.encode_plain("abcd").unwrap();
    let mut first = grammar.begin();
    ids.iter().for_each(|&id| first.push(id).unwrap());
    let mut again = grammar.begin();
    ids.iter().for_each(|&id| again.push(id).unwrap());
    let (first, more) = (first.allowed().unwrap(), again.allowed().unwrap());
    for id in 0..2048 {
        assert_eq!(first.contains(id), more.contains(id));
    }
    assert!(first.contains(bench.eos) && first.contains(bench.text.encode_plain("a").unwrap()[0]));
    assert!(!first.contains(bench.text.encode_plain("b").unwrap()[0]));
    assert!(
        again
            .push(bench.text.encode_plain("x").unwrap()[0])
            .is_err()
    );

    let mut logits = vec![1.0; 2048];
    first.mask(&mut logits);
    for id in 0..2048u32 {
        assert_eq!(logits[id as usize].is_finite(), first.contains(id));
    }
}

#[test]
fn nothing_follows_a_text_that_is_complete_but_its_end() {
    let bench = demo();
    let grammar = bench
        .grammars
        .compile(&Form::Choice(vec!["a".into()]))
        .unwrap();
    let mut text = grammar.begin();
    text.push(bench.text.encode_plain("a").unwrap()[0]).unwrap();
    let allowed = text.allowed().unwrap();
    assert_eq!(
        (0..2048)
            .filter(|&id| allowed.contains(id))
            .collect::<Vec<_>>(),
        [bench.eos]
    );
}

#[test]
fn special_tokens_are_no_text() {
    let bench = demo();
    let any = bench
        .grammars
        .compile(&Form::Regex("(?s:.*)".into()))
        .unwrap();
    let allowed = any.begin().allowed().unwrap();
    for id in 0..8 {
        let special = bench.text.is_special(id) && id != bench.eos;
        assert_eq!(allowed.contains(id), !special, "{id}");
    }
}

#[test]
fn hostile_grammars_are_refused_with_a_reason() {
    let bench = demo();
    let deep = |n: usize| format!("start: {}\"a\"{}", "(".repeat(n), ")".repeat(n));
    let chain: String = (0..4000).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let mut nested = json!({"type": "string"});
    for _ in 0..100 {
        nested = json!({"type": "array", "items": nested});
    }
    let forms = [
        Form::JsonSchema("{".into()),
        Form::JsonSchema("5".into()),
        Form::JsonSchema(r#"{"type": "wizard"}"#.into()),
        Form::JsonSchema(r##"{"$ref": "#/$defs/nowhere"}"##.into()),
        Form::JsonSchema(r#"{"$ref": "http://127.0.0.1/x.json"}"#.into()),
        Form::JsonSchema(r#"{"type": "string", "pattern": "("}"#.into()),
        Form::JsonSchema(format!(
            "{{\"title\": \"{}\"}}",
            "a".repeat(MAX_GRAMMAR_BYTES)
        )),
        Form::Regex("(".into()),
        Form::Regex(String::new()),
        Form::Regex(deep(5000)),
        Form::Regex("a".repeat(MAX_GRAMMAR_BYTES + 1)),
        Form::Lark("start: nowhere".into()),
        Form::Lark("no grammar at all".into()),
        Form::Lark(deep(60_000)),
        Form::Choice(vec![]),
        Form::Choice(vec![String::new()]),
        Form::Choice(vec!["a".into(); MAX_CHOICES + 1]),
    ];
    for form in forms {
        let reason = bench.refusal(&form);
        let shown = format!("{form:?}");
        let shown = &shown[..shown.len().min(80)];
        assert!(
            !reason.is_empty() && reason.len() < 4 * MAX_REASON,
            "{shown}: {reason}"
        );
        assert!(!reason.contains("backtrace"), "{shown}: {reason}");
    }
    // What is only large is work, and no trouble.
    let large = [
        Form::Lark(format!("start: r0\n{chain}r4000: \"a\"\n")),
        Form::JsonSchema(nested.to_string()),
        Form::Regex("(a|b|c|d)".repeat(10_000)),
        Form::Regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}".into()),
        Form::Regex("(a?){5000}a{5000}".into()),
        Form::Choice((0..1000).map(|i| format!("{i}").repeat(20)).collect()),
    ];
    for form in large {
        if let Ok(grammar) = bench.grammars.compile(&form) {
            let mut sentence = grammar.begin();
            let a = bench.text.encode_plain("a").unwrap()[0];
            let _ = sentence
                .allowed()
                .and_then(|_| sentence.push(a))
                .and_then(|()| sentence.allowed());
        }
    }
}
