//! POST /v1/responses, without a memory: what an answer follows comes with its request.
//!
//! Secret: how items become messages and parts become items. Everything else, from templates to
//! grammars, is that of chat.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use guild_proto::inference::v1::{Complete, FinishReason};
use serde_json::{Map, Value, json};

use super::{
    FrontDoor,
    answer::Head,
    chat::Said,
    constrain::{self, Bound},
    conversation::{self, Conversation, Turn},
    fault::Fault,
    fields::{Fields, kind},
    params::{self, Delivery},
    reader::Reader,
    request::Names,
    sse,
    tools::Tools,
};

mod items;
mod stream;

const FORMAT: &str = "text.format";

/// Reads, runs and answers one request.
pub(super) async fn serve(
    door: Arc<FrontDoor>,
    mut fields: Fields,
    key: Option<&[u8]>,
) -> Result<Response, Fault> {
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let instructions = fields.string("instructions")?;
    let items = items::messages(fields.take("input"), instructions.as_deref())?;
    let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
    let stream = fields.flag("stream", false)?;
    if let Some(options) = fields.object("stream_options")? {
        let mut options = Fields::from(options);
        let within = |f: Fault| f.rename(|field| format!("stream_options.{field}"));
        options.flag("include_obfuscation", false).map_err(within)?;
        options.finish().map_err(within)?;
    }
    refuse_memory(&mut fields)?;
    let (bound, format) = format(&mut fields)?;
    let given = |name: &str| fields.peek(name).cloned().unwrap_or_default();
    let (shown_tools, shown_choice) = (given("tools"), given("tool_choice"));
    let metadata = given("metadata");
    let named = |choice: &Map<String, Value>| choice.get("name").cloned();
    let tools = Tools::read_with(&mut fields, items::tool, named)?;
    let mut params = params::sampling(&mut fields, key)?;
    params.max_tokens = fields.unsigned("max_output_tokens", 1, u32::MAX)?;
    let names = Names {
        prompt: "input",
        max_tokens: "max_output_tokens",
        logprobs: "top_logprobs",
        constraint: "",
        prefix: "",
    };
    let echo = json!({
        "instructions": instructions,
        "max_output_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "text": {"format": format},
        "tools": if shown_tools.is_null() { json!([]) } else { shown_tools },
        "tool_choice": if shown_choice.is_null() { "auto".into() } else { shown_choice },
        "parallel_tool_calls": !tools.one_call(),
        "metadata": if metadata.is_null() { json!({}) } else { metadata },
    });
    let turn = Turn {
        conversation: Conversation::of(conversation::messages("input", items)?, variables),
        tools,
        bound,
        special: false,
        params,
        names,
    };
    fields.finish()?;
    turn.params.check(&door.model, &names)?;

    let permits = door.admit(1)?;
    let ready = turn.prepare(&door).await?;
    let id = format!("resp_{}", uuid::Uuid::new_v4().simple());
    let (params, names) = (&ready.params, ready.names);
    let streams = door
        .open(vec![ready.ids], 1, params, &names, &id, permits)
        .await?;
    let delivery = Delivery {
        stream,
        include_usage: true,
        token_ids: false,
    };
    let answer = Answer {
        head: Head::new(&door, id, 1, delivery),
        echo,
        reader: Reader::new(ready.listening),
    };
    if stream {
        return Ok(sse::respond_named(
            streams,
            stream::Writer::new(answer),
            names,
        ));
    }
    let outcomes = door.collect(streams, &names).await?;
    let outcome = outcomes.into_iter().next();
    let outcome = outcome.ok_or_else(|| Fault::internal("no stream for the request"))?;
    Ok(answer.whole(&outcome))
}

/// Nothing is kept here, and nothing runs on when nobody reads it.
fn refuse_memory(fields: &mut Fields) -> Result<(), Fault> {
    let off = |v: &Value| *v == Value::Bool(false);
    let empty = |v: &Value| v.as_array().is_some_and(Vec::is_empty);
    fields.refuse_unless("store", off)?;
    fields.refuse_unless("background", off)?;
    fields.refuse_unless("previous_response_id", |_| false)?;
    fields.refuse_unless("conversation", |_| false)?;
    fields.refuse_unless("prompt", |_| false)?;
    fields.refuse_unless("context_management", empty)?;
    fields.refuse_unless("include", empty)?;
    fields.refuse_unless("max_tool_calls", |_| false)?;
    fields.refuse_unless("top_logprobs", |v| v.as_u64() == Some(0))?;
    fields.refuse_unless("truncation", |v| v.as_str() == Some("disabled"))?;
    fields.refuse_unless("reasoning", |v| {
        v.as_object()
            .is_some_and(|fields| fields.values().all(Value::is_null))
    })
}

/// `text`: what the output has to be, and the format as it is shown again.
fn format(fields: &mut Fields) -> Result<(Option<Bound>, Value), Fault> {
    let plain = json!({"type": "text"});
    let Some(text) = fields.object("text")? else {
        return Ok((None, plain));
    };
    let mut text = Fields::from(text);
    let within = |f: Fault| f.rename(|field| format!("text.{field}"));
    text.refuse_unless("verbosity", |v| v.as_str() == Some("medium"))
        .map_err(within)?;
    let format = text.object("format").map_err(within)?;
    text.finish().map_err(within)?;
    let Some(format) = format else {
        return Ok((None, plain));
    };
    let shown = Value::Object(format.clone());
    let mut format = Fields::from(format);
    let within = |f: Fault| f.rename(|field| format!("{FORMAT}.{field}"));
    let kind = format.string("type").map_err(within)?.unwrap_or_default();
    let bound = constrain::of_kind(&kind, FORMAT, || {
        constrain::json_schema(&mut format, FORMAT)
    })
    .map_err(within)?;
    format.finish().map_err(within)?;
    Ok((bound, shown))
}

/// An answer in the making.
struct Answer {
    head: Head,
    /// What is shown again of the request.
    echo: Value,
    reader: Reader,
}

/// `status`, and why it is not complete.
fn status(complete: &Complete) -> (&'static str, Value) {
    match complete.finish_reason() {
        FinishReason::Length => ("incomplete", json!({"reason": "max_output_tokens"})),
        _ => ("completed", Value::Null),
    }
}

impl Answer {
    /// The response object.
    fn body(&self, status: &str, incomplete: Value, output: Vec<Value>, usage: Value) -> Value {
        let done = matches!(status, "completed" | "incomplete");
        let mut body = json!({
            "id": self.head.id(),
            "object": "response",
            "created_at": self.head.created(),
            "completed_at": done.then(super::http::now),
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": incomplete,
            "model": self.head.model(),
            "output": output,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "truncation": "disabled",
            "usage": usage,
        });
        if let (Some(body), Some(echo)) = (body.as_object_mut(), self.echo.as_object()) {
            body.extend(echo.clone());
        }
        body
    }

    fn usage(&self) -> Value {
        let usage = self.head.usage();
        let cached = usage.prompt_tokens_details.map_or(0, |d| d.cached_tokens);
        json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.head.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        })
    }

    fn whole(mut self, outcome: &super::events::Outcome) -> Response {
        self.head.count(0, &outcome.complete);
        let said = Said::read(&mut self.reader, outcome);
        self.head.reasoning_tokens = said.reasoning_tokens;
        let (status, incomplete) = status(&outcome.complete);
        let mut output = Vec::new();
        if let Some(reasoning) = &said.reasoning {
            output.push(items::reasoning(&items::id("rs"), reasoning, status));
        }
        if said.calls.is_empty() || !said.content.is_empty() {
            output.push(items::message(&items::id("msg"), &said.content, status));
        }
        for call in &said.calls {
            output.push(items::call(&items::id("fc"), call, status));
        }
        let usage = self.usage();
        let mut body = self.body(status, incomplete, output, usage);
        if let Some(timings) = self.head.timings() {
            body["timings"] = timings;
        }
        Json(body).into_response()
    }
}

/// What a request has to have, in words.
fn expected_input(found: &Value) -> Fault {
    let message = format!("expected a text or a list of items, not {}", kind(found));
    Fault::invalid("input", message)
}
