//! Log-probabilities in the two forms of the OpenAI API.

use std::sync::Arc;

use guild_model::text::{Detokenizer, Text};
use guild_proto::inference::v1::TokenLogprobs;
use openai_protocol::common::{ChatLogProbs, ChatLogProbsContent, TopLogProb};
use serde::Serialize;
use serde_json::{Map, Value};

/// What stands for minus infinity, which JSON has no word for.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST }
}

/// How a token is written: its text; `bytes:\x..` when it is no UTF-8 of its
/// own; `token_id:` and the id when it has no text at all.
pub(super) fn label(text: Option<&Arc<Text>>, id: u32) -> String {
    let bytes = text.map_or(&[][..], |t| t.token_bytes(id));
    match std::str::from_utf8(bytes) {
        Ok("") => format!("token_id:{id}"),
        Ok(token) => token.to_owned(),
        Err(_) => bytes
            .iter()
            .fold("bytes:".to_owned(), |s, b| s + &format!("\\x{b:02x}")),
    }
}

/// `logprobs` of /v1/completions: parallel lists over tokens.
#[derive(Debug, Default, Serialize)]
pub(super) struct ClassicLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    /// The best alternatives and the token itself.
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters before the token in the choice's text.
    text_offset: Vec<u32>,
}

/// Writes classic log-probabilities along one choice's text.
pub(super) struct ClassicWriter {
    text: Option<Arc<Text>>,
    detokenizer: Option<Detokenizer>,
    offset: u32,
    skip_special_tokens: bool,
}

impl ClassicWriter {
    pub(super) fn new(text: Option<Arc<Text>>, skip_special_tokens: bool) -> Self {
        let detokenizer = text
            .clone()
            .map(|t| Detokenizer::new(t, skip_special_tokens));
        Self {
            text,
            detokenizer,
            offset: 0,
            skip_special_tokens,
        }
    }

    /// The prompt: its first token has no probability.
    pub(super) fn prompt(
        &mut self,
        ids: &[u32],
        logprobs: &[TokenLogprobs],
        shown: &str,
    ) -> ClassicLogprobs {
        let mut out = ClassicLogprobs::default();
        let mut rest = logprobs.iter();
        for (i, id) in ids.iter().enumerate() {
            let logprob = if i == 0 { None } else { rest.next() };
            self.push(&mut out, *id, logprob);
        }
        // The output starts a text of its own after the prompt as it is shown.
        let text = self.text.take();
        *self = Self {
            offset: shown.chars().count() as u32,
            ..Self::new(text, self.skip_special_tokens)
        };
        out
    }

    pub(super) fn output(&mut self, ids: &[u32], logprobs: &[TokenLogprobs]) -> ClassicLogprobs {
        let mut out = ClassicLogprobs::default();
        for (id, logprob) in ids.iter().zip(logprobs) {
            self.push(&mut out, *id, Some(logprob));
        }
        out
    }

    fn push(&mut self, out: &mut ClassicLogprobs, id: u32, logprob: Option<&TokenLogprobs>) {
        let text = self.text.as_ref();
        out.tokens.push(label(text, id));
        out.token_logprobs.push(logprob.map(|l| finite(l.logprob)));
        out.top_logprobs.push(logprob.map(|l| {
            let top = l.top.iter().map(|t| (t.token_id, t.logprob));
            let own = std::iter::once((l.token_id, l.logprob));
            let mut map = Map::new();
            for (id, logprob) in top.chain(own) {
                map.entry(label(text, id))
                    .or_insert_with(|| json_f32(logprob));
            }
            map
        }));
        out.text_offset.push(self.offset);
        let piece = self
            .detokenizer
            .as_mut()
            .and_then(|d| d.push(id).ok())
            .unwrap_or_default();
        self.offset += piece.chars().count() as u32;
    }
}

impl ClassicLogprobs {
    /// Adds what follows.
    pub(super) fn extend(&mut self, more: ClassicLogprobs) {
        self.tokens.extend(more.tokens);
        self.token_logprobs.extend(more.token_logprobs);
        self.top_logprobs.extend(more.top_logprobs);
        self.text_offset.extend(more.text_offset);
    }
}

/// The shortest decimal that is this f32; widening it would print noise.
fn json_f32(value: f32) -> Value {
    let shortest = finite(value).to_string().parse::<f64>().ok();
    shortest
        .and_then(serde_json::Number::from_f64)
        .map_or(Value::Null, Value::Number)
}

/// `logprobs` of /v1/chat/completions: one object per token.
pub(super) fn chat(text: Option<&Arc<Text>>, logprobs: &[TokenLogprobs]) -> ChatLogProbs {
    let bytes = |id| text.map(|t| t.token_bytes(id).to_vec());
    let content = logprobs.iter().map(|l| ChatLogProbsContent {
        token: label(text, l.token_id),
        logprob: finite(l.logprob),
        bytes: bytes(l.token_id),
        top_logprobs: l
            .top
            .iter()
            .map(|t| TopLogProb {
                token: label(text, t.token_id),
                logprob: finite(t.logprob),
                bytes: bytes(t.token_id),
            })
            .collect(),
    });
    ChatLogProbs::Detailed {
        content: Some(content.collect()),
        refusal: None,
    }
}
