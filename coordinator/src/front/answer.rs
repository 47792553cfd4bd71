//! What the answers of both OpenAI endpoints have in common.

use guild_proto::inference::v1::{Complete, FinishReason, complete::MatchedStop};
use openai_protocol::common::Usage;
use serde::Serialize;
use serde_json::Value;

use super::{FrontDoor, params::Delivery};

/// The envelope around choices; whole answers and chunks differ in `object`.
#[derive(Serialize)]
pub(super) struct Body<C> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    /// With the usage, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

/// How long an answer took, in milliseconds since the request was read.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Timings {
    /// Until the first token of any choice.
    first_token_ms: f64,
    /// Until the end of the last.
    total_ms: f64,
}

/// Identity of an answer, and its token counts so far.
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    /// Choices per prompt.
    n: u32,
    pub(super) delivery: Delivery,
    prompt_tokens: u32,
    /// Tokens of the prompts that the prefix cache had.
    cached_tokens: u32,
    completion_tokens: u32,
    pub(super) reasoning_tokens: u32,
    drafted_tokens: u32,
    accepted_tokens: u32,
    timings: Option<Timings>,
}

impl Head {
    pub(super) fn new(door: &FrontDoor, id: String, n: u32, delivery: Delivery) -> Self {
        Self {
            id,
            created: super::http::now(),
            model: door.model.name.clone(),
            n,
            delivery,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            timings: None,
        }
    }

    /// The answer's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Unix time of the answer, in seconds.
    pub(super) fn created(&self) -> u64 {
        self.created
    }

    /// The model that answers.
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// How long it took, when asked for.
    pub(super) fn timings(&self) -> Option<Value> {
        self.timings.and_then(|t| serde_json::to_value(t).ok())
    }

    pub(super) fn body<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Usage>,
    ) -> Body<C> {
        Body {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            choices,
            timings: self.timings.filter(|_| usage.is_some()),
            usage,
        }
    }

    /// Counts a finished choice; a prompt once, whatever number of choices it has.
    pub(super) fn count(&mut self, choice: usize, complete: &Complete) {
        let usage = complete.usage.clone().unwrap_or_default();
        if (choice as u32).is_multiple_of(self.n) {
            self.prompt_tokens += usage.prompt_tokens;
            self.cached_tokens += usage.cached_tokens;
        }
        self.completion_tokens += usage.completion_tokens;
        self.drafted_tokens += usage.drafted_tokens.iter().sum::<u32>();
        self.accepted_tokens += usage.accepted_tokens.iter().sum::<u32>();
        if let Some(timing) = usage.timing {
            let so_far = self.timings.unwrap_or(Timings {
                first_token_ms: f64::INFINITY,
                total_ms: 0.0,
            });
            self.timings = Some(Timings {
                first_token_ms: so_far.first_token_ms.min(timing.first_token_ms),
                total_ms: so_far.total_ms.max(timing.total_ms),
            });
        }
    }

    pub(super) fn usage(&self) -> Usage {
        Usage::from_counts(self.prompt_tokens, self.completion_tokens)
            .with_cached_tokens(self.cached_tokens)
            .with_reasoning_tokens(self.reasoning_tokens)
            .with_speculative_tokens(self.accepted_tokens, self.drafted_tokens)
    }
}

/// `finish_reason` of the OpenAI API.
pub(super) fn finish_reason(complete: &Complete) -> String {
    let word = match complete.finish_reason() {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort | FinishReason::Unspecified => "abort",
    };
    word.to_owned()
}

/// Which stop string or token ended the request.
pub(super) fn matched_stop(complete: &Complete) -> Option<Value> {
    match complete.matched_stop.as_ref()? {
        MatchedStop::StopString(s) => Some(Value::from(s.as_str())),
        MatchedStop::StopTokenId(id) => Some(Value::from(*id)),
    }
}
