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
        }
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
    }

    pub(super) fn usage(&self) -> Usage {
        Usage::from_counts(self.prompt_tokens, self.completion_tokens)
            .with_cached_tokens(self.cached_tokens)
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
