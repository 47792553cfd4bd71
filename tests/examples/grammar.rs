//! What a constrained output costs at a vocabulary of production size: to compile a form, to work out which tokens may
//! come next, and to apply that to the logits. A line of JSON for each form, in microseconds.
//!
//! The vocabulary is the demo model's, and pairs of its tokens up to the size of DeepSeek-V3's: bytes, pieces of words,
//! words and beginnings of two. Sentences are random: of the tokens that may follow any one is taken.
//!
//! `cargo run --release -p guild-tests --example grammar -- [VOCAB]`

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_model::Config;
use guild_model::grammar::{Form, Grammar, Grammars};
use guild_model::text::Text;
use guild_tests::process::demo;
use serde_json::{Value, json};

/// Of DeepSeek-V3.
const VOCAB: usize = 129_280;
/// Masks that are timed of each form.
const MASKS: usize = 2000;
/// Tokens of a sentence at most.
const SENTENCE: usize = 200;

/// Deterministic numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Writes configuration and tokenizer of the demo model with so many tokens.
fn write(dir: &Path, vocab: usize) {
    let read = |name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(demo().join(name)).unwrap()).unwrap()
    };
    let mut config = read("config.json");
    config["vocab_size"] = vocab.into();
    let mut tokenizer = read("tokenizer.json");
    let model = &mut tokenizer["model"];
    let mut words = model["vocab"].as_object().unwrap().clone();
    let mut merges = model["merges"].as_array().unwrap().clone();
    let paired = merges.first().is_some_and(Value::is_array);
    let special = |word: &str| word.starts_with('<');
    let base: Vec<String> = words.keys().filter(|w| !special(w)).cloned().collect();
    let mut known: HashSet<String> = words.keys().cloned().collect();
    let mut random = Random(1);
    let mut next = words.values().filter_map(Value::as_u64).max().unwrap() + 1;
    while (next as usize) < vocab {
        let [a, b] = [(); 2].map(|()| base[random.below(base.len())].clone());
        let word = format!("{a}{b}");
        if known.insert(word.clone()) {
            words.insert(word, next.into());
            merges.push(match paired {
                true => json!([a, b]),
                false => json!(format!("{a} {b}")),
            });
            next += 1;
        }
    }
    model["vocab"] = words.into();
    model["merges"] = merges.into();
    for (name, value) in [("config.json", config), ("tokenizer.json", tokenizer)] {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    }
}

fn forms() -> [(&'static str, Form); 5] {
    let schema = json!({
        "type": "array", "minItems": 1, "maxItems": 20,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 40},
                "kind": {"enum": ["person", "place", "thing"]},
                "score": {"type": "number"},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
            },
            "required": ["name", "kind", "score"],
            "additionalProperties": false,
        },
    });
    let texts = (0..50).map(|i| format!("choice number {i}"));
    [
        ("json_schema", Form::JsonSchema(schema.to_string())),
        ("json_object", Form::JsonObject),
        ("regex", Form::Regex("[A-Z][a-z]{1,20}( [A-Z][a-z]{1,20}){1,4}".into())),
        ("lark", Form::Lark("start: sum\nsum: product (\"+\" product)*\nproduct: atom (\"*\" atom)*\natom: /[0-9]+/ | \"(\" sum \")\"".into())),
        ("choice", Form::Choice(texts.collect())),
    ]
}

/// Times of working out a mask and of applying it, over random sentences.
fn masks(grammar: &Grammar, eos: &[u32], vocab: usize) -> [Vec<Duration>; 2] {
    let mut random = Random(2);
    let mut times = [Vec::new(), Vec::new()];
    while times[0].len() < MASKS {
        let mut sentence = grammar.begin();
        for _ in 0..SENTENCE {
            let begun = Instant::now();
            let allowed = sentence.allowed().unwrap();
            times[0].push(begun.elapsed());
            let mut logits = vec![0.0; vocab];
            let begun = Instant::now();
            allowed.mask(&mut logits);
            times[1].push(begun.elapsed());
            let from = random.below(vocab);
            let all = (from..vocab).chain(0..from).map(|id| id as u32);
            let mut going = all.filter(|&id| allowed.contains(id) && !eos.contains(&id));
            let Some(token) = going.next() else { break };
            if sentence.push(token).is_err() {
                break;
            }
        }
    }
    times
}

fn micros(times: &mut [Duration], q: f64) -> Value {
    times.sort_unstable();
    let at = (times.len() as f64 * q).ceil() as usize;
    let micros = times[at.saturating_sub(1)].as_secs_f64() * 1e6;
    json!((micros * 10.0).round() / 10.0)
}

fn main() {
    let vocab = std::env::args().nth(1);
    let vocab = vocab.map_or(VOCAB, |arg| arg.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), vocab);
    let config = Config::from_dir(dir.path()).unwrap();
    let text: Arc<Text> = Text::load(dir.path(), &config).unwrap().unwrap();
    let begun = Instant::now();
    let grammars = Grammars::new(&text, &config).unwrap();
    let seconds = begun.elapsed().as_secs_f64();
    println!("{}", json!({"vocab": vocab, "prepare_s": seconds}));
    for (name, form) in forms() {
        let begun = Instant::now();
        let grammar = grammars.compile(&form).unwrap();
        let compile = begun.elapsed();
        let [mut work, mut apply] = masks(&grammar, &config.eos_token_ids, vocab);
        let line = json!({
            "form": name, "vocab": vocab, "masks": work.len(),
            "compile_us": micros(&mut [compile], 1.0),
            "mask_p50_us": micros(&mut work, 0.5), "mask_p99_us": micros(&mut work, 0.99),
            "mask_max_us": micros(&mut work, 1.0),
            "apply_p50_us": micros(&mut apply, 0.5), "apply_p99_us": micros(&mut apply, 0.99),
        });
        println!("{line}");
    }
}
