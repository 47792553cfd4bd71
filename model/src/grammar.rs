//! Grammars over tokens: which tokens may follow, so that a text is what was asked for.
//!
//! Secret of this module: the grammar engine (llguidance) and how it sees a vocabulary. It uses the
//! checkpoint's tokenizer as a table of bytes and does not know logits, requests or the network.
//! Everything that comes from a client is bounded here: its size before it is compiled, the work of
//! compiling and of each mask by the engine's own limits.

use std::{sync::Arc, thread};

use llguidance::{
    Matcher, ParserFactory,
    api::{GrammarWithLexer, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::{Config, ModelError, text::Text};

/// Bytes of a schema, a regular expression, a grammar, or of all choices together, at most.
pub const MAX_GRAMMAR_BYTES: usize = 128 << 10;
/// Texts to choose from at most.
pub const MAX_CHOICES: usize = 1024;
/// Brackets inside brackets of a grammar or a regular expression at most.
pub const MAX_NESTING: usize = 64;
/// Bytes of the longest token that takes part; a longer one is never allowed.
const MAX_TOKEN_BYTES: usize = 1024;
/// Stack of the thread that compiles: the engine descends into a grammar as deep as it is nested.
const COMPILE_STACK: usize = 64 << 20;
/// Characters of a reason at most: the engine quotes the grammar.
const MAX_REASON: usize = 400;

/// Regular expressions built for one mask at most; about 14 are built in a microsecond.
const STEP_FUEL: u64 = 200_000;
/// Regular expressions built at compile time at most; 20 ms worth of it.
const COMPILE_FUEL: u64 = 1_000_000;
/// States that a grammar's lexer may come to have, at 1 to 2 KiB each.
const MAX_LEXER_STATES: usize = 10_000;
/// Symbols in the productions of a grammar.
const MAX_SYMBOLS: usize = 200_000;
/// Parser items for one mask.
const MAX_STEP_ITEMS: usize = 50_000;

/// What a text has to be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// A JSON value that this schema (as JSON) describes. Without `x-guidance` in it the value is
    /// written on one line, as `json.dumps` of Python writes it.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    /// A text that the regular expression matches whole.
    Regex(String),
    /// A sentence of a grammar in llguidance's dialect of Lark.
    Lark(String),
    /// One of these.
    Choice(Vec<String>),
}

/// Why there is no such grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl Form {
    /// Checks what can be checked without a tokenizer: sizes, and that JSON is JSON.
    ///
    /// # Errors
    /// What is wrong, in words for the client.
    pub fn check(&self) -> Result<(), GrammarError> {
        let wrong = |text: String| Err(GrammarError(text));
        let bytes = match self {
            Form::JsonSchema(text) | Form::Regex(text) | Form::Lark(text) => text.len(),
            Form::JsonObject => 0,
            Form::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if bytes > MAX_GRAMMAR_BYTES {
            return wrong(format!(
                "{bytes} bytes, at most {MAX_GRAMMAR_BYTES} are taken"
            ));
        }
        match self {
            Form::JsonSchema(text) => match serde_json::from_str(text) {
                Ok(Value::Object(_) | Value::Bool(true)) => {}
                Ok(_) => return wrong("a JSON Schema is an object".into()),
                Err(e) => return wrong(format!("the JSON Schema is not JSON: {e}")),
            },
            Form::Regex(text) | Form::Lark(text) => {
                if text.trim().is_empty() {
                    return wrong("it is empty".into());
                }
                let deepest = nesting(text);
                if deepest > MAX_NESTING {
                    return wrong(format!(
                        "nested {deepest} deep, at most {MAX_NESTING} is taken"
                    ));
                }
            }
            Form::Choice(texts) if texts.is_empty() || texts.iter().any(String::is_empty) => {
                return wrong("at least one choice is needed, and none may be empty".into());
            }
            Form::Choice(texts) if texts.len() > MAX_CHOICES => {
                return wrong(format!(
                    "{} choices, at most {MAX_CHOICES} are taken",
                    texts.len()
                ));
            }
            Form::Choice(_) | Form::JsonObject => {}
        }
        Ok(())
    }

    fn top_level(&self) -> Result<TopLevelGrammar, GrammarError> {
        let schema = |mut schema: Value| {
            if let Some(fields) = schema.as_object_mut() {
                fields
                    .entry("x-guidance")
                    .or_insert_with(|| json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}));
            }
            GrammarWithLexer::from_json_schema(schema)
        };
        let grammar = match self {
            Form::JsonSchema(text) => {
                let value = serde_json::from_str(text).map_err(|e| GrammarError(e.to_string()))?;
                schema(match value {
                    Value::Bool(_) => json!({}),
                    other => other,
                })
            }
            Form::JsonObject => schema(json!({"type": "object"})),
            Form::Regex(text) => GrammarWithLexer::from_regex(text),
            Form::Lark(text) => GrammarWithLexer::from_lark(text.clone()),
            Form::Choice(texts) => {
                let quoted = texts
                    .iter()
                    .map(|text| Value::from(text.as_str()).to_string());
                let choices: Vec<String> = quoted.collect();
                GrammarWithLexer::from_lark(format!("start: {}", choices.join(" | ")))
            }
        };
        Ok(TopLevelGrammar::from_grammar(grammar))
    }
}

/// How deep brackets stand in brackets, whatever they mean.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl Grammars {
    /// A compiler for the tokens of `text`; a text ends by one of the model's EOS tokens. With a
    /// vocabulary of 128k it takes a second or so and some ten MiB.
    ///
    /// # Errors
    /// Tokens of this tokenizer do not stand for bytes, or the model has no EOS token.
    pub fn new(text: &Text, config: &Config) -> Result<Grammars, ModelError> {
        let refuse = |reason: &str| ModelError::Tokenizer {
            path: text.path().to_owned(),
            reason: reason.to_owned(),
        };
        if !text.is_byte_level() {
            return Err(refuse(
                "output can be constrained only where tokens stand for bytes (a byte-level BPE)",
            ));
        }
        let vocab = config.vocab_size;
        let eos: Vec<u32> = config
            .eos_token_ids
            .iter()
            .copied()
            .filter(|&id| (id as usize) < vocab)
            .collect();
        let Some(&first) = eos.first() else {
            return Err(refuse(
                "the model has no EOS token to end a constrained output by",
            ));
        };
        let words: Vec<Vec<u8>> = (0..vocab as u32)
            .map(|id| match text.token_bytes(id) {
                bytes if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
                bytes if text.is_special(id) || eos.contains(&id) => {
                    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
                }
                bytes => bytes.to_vec(),
            })
            .collect();
        let trie =
            TokTrie::from(&TokRxInfo::new(vocab as u32, first), &words).with_eos_tokens(&eos);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let caps = InferenceCapabilities::default();
        let mut factory = ParserFactory::new(&env, caps, &SlicedBiasComputer::general_slices())
            .map_err(|e| refuse(&shorten(&e.to_string())))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: COMPILE_FUEL,
            step_lexer_fuel: STEP_FUEL,
            max_lexer_states: MAX_LEXER_STATES,
            max_grammar_size: MAX_SYMBOLS,
            step_max_items: MAX_STEP_ITEMS,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Grammars { factory })
    }

    /// Compiles a grammar. It blocks, for milliseconds mostly, for a fraction of a second at worst.
    ///
    /// # Errors
    /// What is wrong with the grammar, in words for the client.
    pub fn compile(&self, form: &Form) -> Result<Grammar, GrammarError> {
        form.check()?;
        let compile = || {
            let parser = self.factory.create_parser(form.top_level()?);
            let matcher = Matcher::new(parser);
            match matcher.get_error() {
                Some(reason) => Err(GrammarError(shorten(&reason))),
                None => Ok(Grammar(matcher)),
            }
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("compile-grammar".into())
                .stack_size(COMPILE_STACK)
                .spawn_scoped(scope, compile)
                .map_err(|e| GrammarError(format!("no thread to compile it: {e}")))?;
            let defect = |_| GrammarError("the grammar engine has failed on it".into());
            thread.join().map_err(defect)?
        })
    }
}

/// What the engine says, without its traces and quotations.
fn shorten(reason: &str) -> String {
    let first = reason
        .split("<backtrace>")
        .next()
        .unwrap_or_default()
        .trim();
    match first.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}…", &first[..end]),
        None => first.to_owned(),
    }
}

/// A compiled grammar. Texts begun from it share nothing.
pub struct Grammar(Matcher);

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// The begin of a text.
    pub fn begin(&self) -> Sentence {
        Sentence(self.0.deep_clone())
    }
}

/// A text of a grammar as far as it has come.
pub struct Sentence(Matcher);

impl std::fmt::Debug for Sentence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sentence").finish_non_exhaustive()
    }
}

impl Sentence {
    /// Takes note of the next token. After EOS nothing more may come.
    ///
    /// # Errors
    /// The token is not allowed here, or the grammar has become too much work.
    pub fn push(&mut self, token: u32) -> Result<(), GrammarError> {
        // The engine stops by itself where nothing but EOS may follow.
        if self.0.is_stopped() && self.ends(token) {
            return Ok(());
        }
        let pushed = self.0.consume_token(token);
        pushed.map_err(|e| GrammarError(shorten(&e.to_string())))
    }

    fn ends(&self, token: u32) -> bool {
        let env = self.0.tok_env();
        env.is_ok_and(|env| env.tok_trie().eos_tokens().contains(&token))
    }

    /// The tokens that may be next; EOS alone when the text is complete and cannot go on.
    ///
    /// # Errors
    /// The grammar has become too much work, or no token of the vocabulary may follow.
    pub fn allowed(&mut self) -> Result<Allowed, GrammarError> {
        let mask = self.0.compute_mask_or_eos();
        mask.map(Allowed)
            .map_err(|e| GrammarError(shorten(&e.to_string())))
    }
}

/// A set of tokens.
pub struct Allowed(SimpleVob);

impl std::fmt::Debug for Allowed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Allowed")
            .field("tokens", &self.0.num_set())
            .finish()
    }
}

impl Allowed {
    /// Whether the token is in it.
    pub fn contains(&self, token: u32) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }

    /// Sets the logits `[vocab]` of all other tokens to -inf.
    pub fn mask(&self, logits: &mut [f32]) {
        for (group, &word) in logits.chunks_mut(32).zip(self.0.as_slice()) {
            match word {
                0 => group.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                word => {
                    for (bit, logit) in group.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
