//! POST /v1/chat/completions.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use guild_model::text::{MAX_MESSAGES, Text};
use guild_proto::inference::v1::{TokenLogprobs, generate_response::Event};
use openai_protocol::{
    chat::{ChatChoice, ChatCompletionMessage, ChatMessageDelta, ChatStreamChoice},
    common::ChatLogProbs,
};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    FrontDoor,
    answer::{Head, finish_reason, matched_stop},
    events::Outcome,
    fault::Fault,
    fields::{Fields, kind},
    logprobs,
    params::{self, MAX_HTTP_LOGPROBS},
    request::{Names, Prompt},
    sse::{self, ChunkWriter, Chunks},
};

/// A conversation as the template gets it.
pub(super) struct Conversation {
    messages: Vec<Value>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
}

impl Conversation {
    /// Reads `messages` and what shapes their rendering.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, Fault> {
        let messages = match fields.take("messages") {
            Some(Value::Array(items)) if items.is_empty() => {
                return Err(Fault::invalid(
                    "messages",
                    "the list is empty; at least one message is needed",
                ));
            }
            Some(Value::Array(items)) if items.len() > MAX_MESSAGES => {
                return Err(Fault::invalid(
                    "messages",
                    format!("{} messages; at most {MAX_MESSAGES} are taken", items.len()),
                ));
            }
            Some(Value::Array(items)) => items
                .into_iter()
                .enumerate()
                .map(|(i, m)| message(i, m))
                .collect::<Result<_, _>>()?,
            Some(other) => {
                return Err(Fault::invalid(
                    "messages",
                    format!("expected a list of messages, not {}", kind(&other)),
                ));
            }
            None => return Err(Fault::missing("messages", "a list of messages")),
        };
        if fields.take("chat_template").is_some() {
            return Err(Fault::unsupported(
                "chat_template",
                "the template of the checkpoint is used; leave it out",
            ));
        }
        Ok(Self {
            messages,
            add_generation_prompt: fields.flag("add_generation_prompt", true)?,
            variables: fields.object("chat_template_kwargs")?.unwrap_or_default(),
        })
    }

    /// Renders with the checkpoint's template, beside the async threads.
    pub(super) async fn render(self, door: &FrontDoor) -> Result<String, Fault> {
        let text: Arc<Text> = door.text("messages")?.clone();
        if !text.has_template() {
            let message =
                "the checkpoint has no chat template; use /v1/completions with a plain prompt";
            return Err(Fault::precondition("messages", message));
        }
        let render = move || text.chat(&self.messages, self.add_generation_prompt, &self.variables);
        let rendered = tokio::task::spawn_blocking(render)
            .await
            .map_err(|e| Fault::internal(format!("rendering failed: {e}")))?;
        rendered.map_err(|e| Fault::invalid("messages", e.to_string()))
    }
}

/// One message: role, text, and a name if there is one.
fn message(index: usize, value: Value) -> Result<Value, Fault> {
    let at = format!("messages[{index}]");
    let within = |f: Fault| f.rename(|field| format!("messages[{index}].{field}"));
    let Value::Object(map) = value else {
        return Err(Fault::invalid(
            at,
            format!(
                "expected an object with `role` and `content`, not {}",
                kind(&value)
            ),
        ));
    };
    let mut fields = Fields::from(map);
    let role = fields
        .string("role")
        .map_err(within)?
        .ok_or_else(|| Fault::missing(format!("{at}.role"), "system, user or assistant"))?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" => role,
        // The newer name of the same thing; templates know the older one.
        "developer" => "system".to_owned(),
        "tool" | "function" => {
            return Err(Fault::unsupported(
                &format!("{at}.role"),
                "tools are not supported by this server",
            ));
        }
        _ => {
            return Err(Fault::invalid(
                format!("{at}.role"),
                "expected system, user, assistant or developer",
            ));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    let content = fields.take("content").ok_or_else(|| {
        Fault::missing(format!("{at}.content"), "a string or a list of text parts")
    })?;
    out.insert("content".into(), content_text(&at, content)?.into());
    for name in ["name", "reasoning_content"] {
        if let Some(value) = fields.string(name).map_err(within)? {
            out.insert(name.into(), value.into());
        }
    }
    // What clients send back of an earlier answer.
    for name in ["tool_calls", "annotations"] {
        fields
            .refuse_unless(name, |v| v.as_array().is_some_and(Vec::is_empty))
            .map_err(within)?;
    }
    fields.finish().map_err(within)?;
    Ok(Value::Object(out))
}

/// Text of a message; parts are joined by line breaks.
fn content_text(at: &str, content: Value) -> Result<String, Fault> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => {
            return Err(Fault::invalid(
                format!("{at}.content"),
                format!(
                    "expected a string or a list of text parts, not {}",
                    kind(&other)
                ),
            ));
        }
    };
    if parts.is_empty() {
        return Err(Fault::invalid(
            format!("{at}.content"),
            "the list of parts is empty",
        ));
    }
    let texts: Vec<String> = parts
        .into_iter()
        .enumerate()
        .map(|(i, mut part)| {
            let field = format!("{at}.content[{i}]");
            let text = part.get_mut("text").map(Value::take);
            match (part.get("type").and_then(Value::as_str), text) {
                (Some("text"), Some(Value::String(text))) => Ok(text),
                (Some("text"), _) => Err(Fault::missing(format!("{field}.text"), "a string")),
                (Some(_), _) => Err(Fault::unsupported(
                    &format!("{field}.type"),
                    "only parts of type `text` are supported by this server",
                )),
                (None, _) => Err(Fault::missing(format!("{field}.type"), "`text`")),
            }
        })
        .collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

/// Reads, runs and answers one request.
pub(super) async fn serve(door: Arc<FrontDoor>, mut fields: Fields) -> Result<Response, Fault> {
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let conversation = Conversation::read(&mut fields)?;
    let special = fields.flag("add_special_tokens", false)?;
    let delivery = params::delivery(&mut fields)?;
    let mut params = params::sampling(&mut fields)?;
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
        prefix: "",
    };
    let n = params::choices(&mut fields, 1, door.max_choices())?;
    fields.finish()?;
    params.check(&door.model, &names)?;

    let permits = door.admit(n as usize)?;
    let rendered = conversation.render(&door).await?;
    let prompt = if special {
        Prompt::Text(rendered)
    } else {
        Prompt::Plain(rendered)
    };
    let ids = door.tokenize(vec![prompt], &params, &names).await?;
    let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
    let streams = door.open(ids, n, &params, &names, &id, permits).await?;

    let answer = Answer {
        head: Head::new(&door, id, n, delivery),
        text: door.model.text.clone(),
        logprobs: wants_logprobs,
        choices: n,
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
    choices: u32,
}

const OBJECT: &str = "chat.completion";
const CHUNK_OBJECT: &str = "chat.completion.chunk";

impl Answer {
    fn logprobs(&self, logprobs: &[TokenLogprobs]) -> Option<ChatLogProbs> {
        self.logprobs
            .then(|| logprobs::chat(self.text.as_ref(), logprobs))
    }

    fn whole(mut self, outcomes: Vec<Outcome>) -> Response {
        let mut choices = Vec::with_capacity(outcomes.len());
        for (i, outcome) in outcomes.into_iter().enumerate() {
            self.head.count(i, &outcome.complete);
            let base = ChatChoice {
                index: i as u32,
                message: ChatCompletionMessage {
                    role: "assistant".to_owned(),
                    content: Some(outcome.text),
                    refusal: None,
                    annotations: Vec::new(),
                    tool_calls: None,
                    reasoning_content: None,
                },
                logprobs: self.logprobs(&outcome.logprobs),
                finish_reason: Some(finish_reason(&outcome.complete)),
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

fn delta(index: usize, role: Option<&str>, content: Option<String>) -> ChatStreamChoice {
    let delta = ChatMessageDelta {
        role: role.map(str::to_owned),
        content,
        tool_calls: None,
        reasoning_content: None,
    };
    ChatStreamChoice {
        index: index as u32,
        delta,
        logprobs: None,
        finish_reason: None,
        matched_stop: None,
    }
}

impl ChunkWriter for Answer {
    fn start(&mut self, out: &mut Chunks) {
        for choice in 0..self.choices as usize {
            let base = delta(choice, Some("assistant"), Some(String::new()));
            out.push(&self.head.body(CHUNK_OBJECT, vec![base], None));
        }
    }

    fn event(&mut self, choice: usize, event: Event, out: &mut Chunks) {
        let token_ids = self.head.delivery.token_ids;
        let chunk = match event {
            Event::Prompt(_) => return,
            Event::Chunk(chunk) if chunk.text.is_empty() && !self.logprobs && !token_ids => return,
            Event::Chunk(chunk) => {
                // Text that follows no token of its own brings no log-probabilities.
                let logprobs = self
                    .logprobs(&chunk.logprobs)
                    .filter(|_| !chunk.token_ids.is_empty());
                let base = ChatStreamChoice {
                    logprobs,
                    ..delta(choice, None, Some(chunk.text))
                };
                Choice {
                    base,
                    token_ids: token_ids.then_some(chunk.token_ids),
                }
            }
            Event::Complete(complete) => {
                self.head.count(choice, &complete);
                let base = ChatStreamChoice {
                    finish_reason: Some(finish_reason(&complete)),
                    matched_stop: matched_stop(&complete),
                    ..delta(choice, None, None)
                };
                Choice {
                    base,
                    token_ids: None,
                }
            }
        };
        out.push(&self.head.body(CHUNK_OBJECT, vec![chunk], None));
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
