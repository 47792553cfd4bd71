//! One answer in the form that `--json` prints: the same object from a served
//! cluster and from the reference, so that the two can be compared by a program.

use std::io::Write as _;

use guild_proto::inference::v1::{Complete, FinishReason, TokenLogprobs};
use serde::Serialize;

use crate::failure::Failure;
use crate::json;

/// The object of `generate --json`. Floats stay f32, so that they are printed
/// with the fewest digits that read back as the same bits.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Answer {
    /// Output tokens.
    pub(crate) token_ids: Vec<u32>,
    /// Their text; null when the model has no tokenizer.
    pub(crate) text: Option<String>,
    /// Of every output token; null when not asked for.
    pub(crate) logprobs: Option<Vec<Logprobs>>,
    /// Of every prompt token from the second on; null when not asked for.
    pub(crate) prompt_logprobs: Option<Vec<Logprobs>>,
    /// `stop`, `length` or `abort`.
    pub(crate) finish_reason: &'static str,
    pub(crate) usage: Usage,
}

/// Log-probability of one token and of the most probable ones at its position.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Logprobs {
    pub(crate) token_id: u32,
    pub(crate) logprob: f32,
    /// (id, logprob), most probable first.
    pub(crate) top: Vec<(u32, f32)>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: u32, completion_tokens: u32) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens,
        }
    }
}

impl Answer {
    /// Takes over how a stream ended.
    pub(crate) fn complete(&mut self, complete: &Complete) {
        self.finish_reason = match complete.finish_reason() {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort | FinishReason::Unspecified => "abort",
        };
        let usage = complete.usage.clone().unwrap_or_default();
        self.usage = Usage::new(usage.prompt_tokens, usage.completion_tokens);
    }

    /// The object on one line.
    pub(crate) fn print_json(&self) -> Result<(), Failure> {
        json::print(self)
    }

    /// Text, or the ids where there is none, and the log-probabilities.
    pub(crate) fn print_words(&self) -> Result<(), Failure> {
        let mut stdout = std::io::stdout();
        match &self.text {
            Some(text) => writeln!(stdout, "{text}")?,
            None => {
                let ids: Vec<String> = self.token_ids.iter().map(u32::to_string).collect();
                writeln!(stdout, "{}", ids.join(" "))?;
            }
        }
        self.print_logprobs()
    }

    /// Log-probabilities, one line a token.
    pub(crate) fn print_logprobs(&self) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        for (name, list) in [
            ("prompt", &self.prompt_logprobs),
            ("output", &self.logprobs),
        ] {
            for one in list.iter().flatten() {
                write!(stdout, "{name} {:>7} {:>9.5} ", one.token_id, one.logprob)?;
                for (id, logprob) in &one.top {
                    write!(stdout, "  {id}:{logprob:.5}")?;
                }
                writeln!(stdout)?;
            }
        }
        Ok(())
    }
}

impl From<TokenLogprobs> for Logprobs {
    fn from(wire: TokenLogprobs) -> Self {
        Self {
            token_id: wire.token_id,
            logprob: wire.logprob,
            top: wire
                .top
                .into_iter()
                .map(|t| (t.token_id, t.logprob))
                .collect(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Answer, Logprobs, Usage};

    #[test]
    fn printed_floats_read_back_as_the_same_bits() {
        let values = [
            -0.1f32,
            -1.0e-7,
            f32::MIN_POSITIVE,
            -12.345_679,
            -0.0,
            -103.278_93,
        ];
        for value in values {
            let one = Logprobs {
                token_id: 1,
                logprob: value,
                top: vec![(2, value)],
            };
            let json: serde_json::Value =
                serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
            for read in [&json["logprob"], &json["top"][0][1]] {
                assert_eq!(
                    (read.as_f64().unwrap() as f32).to_bits(),
                    value.to_bits(),
                    "{json}"
                );
            }
        }
        assert!(
            serde_json::to_string(&-0.1f32).unwrap() == "-0.1",
            "no digits beyond an f32's"
        );
    }

    #[test]
    fn what_was_not_asked_for_is_null() {
        let answer = Answer {
            finish_reason: "length",
            usage: Usage::new(3, 2),
            ..Answer::default()
        };
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            r#"{"token_ids":[],"text":null,"logprobs":null,"prompt_logprobs":null,"finish_reason":"length","usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#
        );
    }
}
