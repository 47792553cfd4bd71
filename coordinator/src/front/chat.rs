//! POST /v1/chat/completions.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use guild_model::text::Text;
use guild_proto::inference::v1::{Complete, TokenLogprobs, generate_response::Event};
use openai_protocol::{
    chat::{ChatChoice, ChatCompletionMessage, ChatMessageDelta, ChatStreamChoice},
    common::{ChatLogProbs, FunctionCallDelta, FunctionCallResponse, ToolCall, ToolCallDelta},
};
use serde::Serialize;

use super::{
    FrontDoor,
    answer::{Head, finish_reason, matched_stop},
    constrain,
    conversation::{Conversation, Turn},
    events::Outcome,
    fault::Fault,
    fields::Fields,
    logprobs,
    params::{self, MAX_HTTP_LOGPROBS},
    reader::{Part, Reader},
    request::Names,
    sse::{self, ChunkWriter, Chunks},
    tools::Tools,
};

/// Reads, runs and answers one request.
pub(super) async fn serve(
    door: Arc<FrontDoor>,
    mut fields: Fields,
    key: Option<&[u8]>,
) -> Result<Response, Fault> {
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let conversation = Conversation::read(&mut fields)?;
    let special = fields.flag("add_special_tokens", false)?;
    let delivery = params::delivery(&mut fields)?;
    let mut params = params::sampling(&mut fields, key)?;
    let wants_logprobs = fields.flag("logprobs", false)?;
    let top = fields.unsigned("top_logprobs", 0, MAX_HTTP_LOGPROBS)?;
    if top.is_some() && !wants_logprobs {
        return Err(Fault::invalid(
            "top_logprobs",
            "only allowed when `logprobs` is true",
        ));
    }
    params.logprobs = wants_logprobs.then(|| top.unwrap_or(0));
    let older = fields.unsigned("max_tokens", 1, u32::MAX)?;
    let newer = fields.unsigned("max_completion_tokens", 1, u32::MAX)?;
    params.max_tokens = newer.or(older);
    let names = Names {
        prompt: "messages",
        max_tokens: if newer.is_some() {
            "max_completion_tokens"
        } else {
            "max_tokens"
        },
        logprobs: "top_logprobs",
        constraint: "",
        prefix: "",
    };
    let n = params::choices(&mut fields, "n", 1, door.max_choices())?.unwrap_or(1);
    let turn = Turn {
        conversation,
        tools: Tools::read(&mut fields)?,
        bound: constrain::read(&mut fields)?,
        special,
        params,
        names,
    };
    fields.finish()?;
    turn.params.check(&door.model, &names)?;

    let permits = door.admit(n as usize)?;
    let ready = turn.prepare(&door).await?;
    let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
    let (params, names) = (&ready.params, ready.names);
    let streams = door
        .open(vec![ready.ids], n, params, &names, &id, permits)
        .await?;

    let answer = Answer {
        head: Head::new(&door, id, n, delivery),
        text: door.model.text.clone(),
        logprobs: wants_logprobs,
        readers: (0..n).map(|_| Reader::new(ready.listening)).collect(),
    };
    if delivery.stream {
        return Ok(sse::respond(streams, answer, names));
    }
    let outcomes = door.collect(streams, &names).await?;
    Ok(answer.whole(outcomes))
}

/// The protocol's choice with token ids.
#[derive(Serialize)]
struct Choice<C> {
    #[serde(flatten)]
    base: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

struct Answer {
    head: Head,
    text: Option<Arc<Text>>,
    logprobs: bool,
    /// One for each choice.
    readers: Vec<Reader>,
}

const OBJECT: &str = "chat.completion";
const CHUNK_OBJECT: &str = "chat.completion.chunk";

/// `finish_reason`, which tells of calls when there are any and the model has come to its end.
fn reason(complete: &Complete, calls: usize) -> String {
    match finish_reason(complete) {
        stop if stop == "stop" && calls > 0 => "tool_calls".to_owned(),
        other => other,
    }
}

impl Answer {
    fn logprobs(&self, logprobs: &[TokenLogprobs]) -> Option<ChatLogProbs> {
        self.logprobs
            .then(|| logprobs::chat(self.text.as_ref(), logprobs))
    }

    fn whole(mut self, outcomes: Vec<Outcome>) -> Response {
        let mut choices = Vec::with_capacity(outcomes.len());
        for (i, outcome) in outcomes.into_iter().enumerate() {
            self.head.count(i, &outcome.complete);
            let said = Said::read(&mut self.readers[i], &outcome);
            self.head.reasoning_tokens += said.reasoning_tokens;
            let calls = said.calls.len();
            let base = ChatChoice {
                index: i as u32,
                message: ChatCompletionMessage {
                    role: "assistant".to_owned(),
                    // A turn that only calls has no content, as in the OpenAI API.
                    content: Some(said.content).filter(|text| calls == 0 || !text.is_empty()),
                    refusal: None,
                    annotations: Vec::new(),
                    tool_calls: (calls > 0)
                        .then(|| said.calls.into_iter().map(tool_call).collect()),
                    reasoning_content: said.reasoning,
                },
                logprobs: self.logprobs(&outcome.logprobs),
                finish_reason: Some(reason(&outcome.complete, calls)),
                matched_stop: matched_stop(&outcome.complete),
                hidden_states: None,
            };
            choices.push(Choice {
                base,
                token_ids: self.head.delivery.token_ids.then_some(outcome.token_ids),
            });
        }
        Json(self.head.body(OBJECT, choices, Some(self.head.usage()))).into_response()
    }
}

/// A call that has come whole, or as far as it came.
#[derive(Debug, Default)]
pub(super) struct Call {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) arguments: String,
}

/// All that a model has said.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) content: String,
    pub(super) reasoning: Option<String>,
    pub(super) calls: Vec<Call>,
    pub(super) reasoning_tokens: u32,
}

impl Said {
    /// Reads an outcome from its first piece to its last.
    pub(super) fn read(reader: &mut Reader, outcome: &Outcome) -> Said {
        let mut said = Said::default();
        let mut start = 0;
        for &(tokens, end) in &outcome.pieces {
            if reader.is_thinking() {
                said.reasoning_tokens += tokens as u32;
            }
            said.add(reader.push(&outcome.text[start..end]));
            start = end;
        }
        said.add(reader.finish());
        said
    }

    fn add(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Content(text) => self.content += &text,
                Part::Reasoning(text) => *self.reasoning.get_or_insert_default() += &text,
                Part::Call { id, name } => self.calls.push(Call {
                    id,
                    name,
                    arguments: String::new(),
                }),
                Part::Arguments(text) => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments += &text;
                    }
                }
            }
        }
    }
}

fn tool_call(call: Call) -> ToolCall {
    ToolCall {
        id: call.id,
        tool_type: "function".to_owned(),
        function: FunctionCallResponse {
            name: call.name,
            arguments: Some(call.arguments),
        },
    }
}

fn delta(index: usize, delta: ChatMessageDelta) -> ChatStreamChoice {
    ChatStreamChoice {
        index: index as u32,
        delta,
        logprobs: None,
        finish_reason: None,
        matched_stop: None,
    }
}

const NOTHING: ChatMessageDelta = ChatMessageDelta {
    role: None,
    content: None,
    tool_calls: None,
    reasoning_content: None,
};

/// One part as a delta; `calls` have begun, this one included.
fn delta_of(part: Part, calls: usize) -> ChatMessageDelta {
    let call = |id, name, arguments: String| ToolCallDelta {
        index: calls.saturating_sub(1) as u32,
        tool_type: Some("function".to_owned()).filter(|_| Option::is_some(&id)),
        id,
        function: Some(FunctionCallDelta {
            name,
            arguments: Some(arguments),
        }),
    };
    match part {
        Part::Content(text) => ChatMessageDelta {
            content: Some(text),
            ..NOTHING
        },
        Part::Reasoning(text) => ChatMessageDelta {
            reasoning_content: Some(text),
            ..NOTHING
        },
        Part::Call { id, name } => ChatMessageDelta {
            tool_calls: Some(vec![call(Some(id), Some(name), String::new())]),
            ..NOTHING
        },
        Part::Arguments(text) => ChatMessageDelta {
            tool_calls: Some(vec![call(None, None, text)]),
            ..NOTHING
        },
    }
}

impl Answer {
    /// Sends the deltas of parts; log-probabilities and token ids go with the first.
    fn send(
        &self,
        choice: usize,
        deltas: Vec<ChatMessageDelta>,
        logprobs: Option<ChatLogProbs>,
        token_ids: Option<Vec<u32>>,
        out: &mut Chunks,
    ) {
        let (mut logprobs, mut token_ids) = (logprobs, token_ids);
        for message in deltas {
            let base = ChatStreamChoice {
                logprobs: logprobs.take(),
                ..delta(choice, message)
            };
            let choice = Choice {
                base,
                token_ids: token_ids.take(),
            };
            out.push(&self.head.body(CHUNK_OBJECT, vec![choice], None));
        }
    }

    /// The deltas of what the reader has made out.
    fn deltas(&mut self, choice: usize, parts: Vec<Part>, before: usize) -> Vec<ChatMessageDelta> {
        let mut calls = before;
        let one = |part: Part| {
            calls += usize::from(matches!(part, Part::Call { .. }));
            delta_of(part, calls)
        };
        let deltas = parts.into_iter().map(one).collect();
        debug_assert_eq!(calls, self.readers[choice].calls());
        deltas
    }
}

impl ChunkWriter for Answer {
    fn start(&mut self, out: &mut Chunks) {
        for choice in 0..self.readers.len() {
            let message = ChatMessageDelta {
                role: Some("assistant".to_owned()),
                content: Some(String::new()),
                ..NOTHING
            };
            out.push(
                &self
                    .head
                    .body(CHUNK_OBJECT, vec![delta(choice, message)], None),
            );
        }
    }

    fn event(&mut self, choice: usize, event: Event, out: &mut Chunks) {
        match event {
            Event::Prompt(_) => {}
            Event::Chunk(chunk) => {
                let reader = &mut self.readers[choice];
                let before = reader.calls();
                if reader.is_thinking() {
                    self.head.reasoning_tokens += chunk.token_ids.len() as u32;
                }
                let parts = reader.push(&chunk.text);
                let mut deltas = self.deltas(choice, parts, before);
                // Text that follows no token of its own brings no log-probabilities.
                let logprobs = self
                    .logprobs(&chunk.logprobs)
                    .filter(|_| !chunk.token_ids.is_empty());
                let token_ids = self.head.delivery.token_ids.then_some(chunk.token_ids);
                if deltas.is_empty() && (self.logprobs || token_ids.is_some()) {
                    deltas.push(ChatMessageDelta {
                        content: Some(String::new()),
                        ..NOTHING
                    });
                }
                self.send(choice, deltas, logprobs, token_ids, out);
            }
            Event::Complete(complete) => {
                let reader = &mut self.readers[choice];
                let before = reader.calls();
                let rest = reader.finish();
                let deltas = self.deltas(choice, rest, before);
                self.send(choice, deltas, None, None, out);
                self.head.count(choice, &complete);
                let base = ChatStreamChoice {
                    finish_reason: Some(reason(&complete, self.readers[choice].calls())),
                    matched_stop: matched_stop(&complete),
                    ..delta(choice, NOTHING)
                };
                out.push(&self.head.body(CHUNK_OBJECT, vec![base], None));
            }
        }
    }

    fn end(&mut self, out: &mut Chunks) {
        if self.head.delivery.include_usage {
            out.push(&self.head.body(
                CHUNK_OBJECT,
                Vec::<ChatStreamChoice>::new(),
                Some(self.head.usage()),
            ));
        }
    }
}
