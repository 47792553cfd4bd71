//! A conversation: what comes as `messages`, and the text that the chat template makes of it.
//!
//! Secret: what templates differ in. Tool calls, their results and the tools themselves are given to
//! a template that knows them; for one that does not they are written out as its model would.

use std::sync::Arc;

use guild_model::text::{MAX_MESSAGES, Text};
use serde_json::{Map, Value, json};

use super::{
    FrontDoor,
    constrain::Bound,
    dialect::{Dialect, THINK, THINK_END},
    fault::Fault,
    fields::{Fields, kind},
    reader::{Listening, Thoughts},
    request::{Names, Params, Prompt},
    tools::Tools,
};

/// A conversation as it was sent, checked.
#[derive(Debug)]
pub(super) struct Conversation {
    messages: Vec<Value>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
}

impl Conversation {
    /// Reads `messages` and what shapes their rendering.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, Fault> {
        let messages = match fields.take("messages") {
            Some(Value::Array(items)) => messages("messages", items)?,
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

    /// A conversation of these messages, which are as [`messages`] gives them.
    pub(super) fn of(messages: Vec<Value>, variables: Map<String, Value>) -> Self {
        Self {
            messages,
            add_generation_prompt: true,
            variables,
        }
    }

    /// Renders with the checkpoint's template, beside the async threads. `field` is where the
    /// client has put the messages.
    pub(super) async fn render(
        self,
        door: &FrontDoor,
        tools: &[Value],
        field: &'static str,
    ) -> Result<String, Fault> {
        let text: Arc<Text> = door.text(field)?.clone();
        if !text.has_template() {
            let message =
                "the checkpoint has no chat template; use /v1/completions with a plain prompt";
            return Err(Fault::precondition(field, message));
        }
        let tools = tools.to_vec();
        let render = move || {
            let messages = for_template(&text, self.messages, &tools);
            text.chat(
                &messages,
                &tools,
                self.add_generation_prompt,
                &self.variables,
            )
        };
        let rendered = tokio::task::spawn_blocking(render)
            .await
            .map_err(|e| Fault::internal(format!("rendering failed: {e}")))?;
        rendered.map_err(|e| Fault::invalid(field, e.to_string()))
    }
}

/// One answer to a conversation, as it was asked for.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) conversation: Conversation,
    pub(super) tools: Tools,
    pub(super) bound: Option<Bound>,
    /// The rendered text gets the special tokens of a prompt besides.
    pub(super) special: bool,
    pub(super) params: Params,
    pub(super) names: Names,
}

/// What is to be run, and how its output is read.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) ids: Vec<u32>,
    pub(super) params: Params,
    pub(super) names: Names,
    pub(super) listening: Listening,
}

impl Turn {
    /// Renders and tokenizes; what the output has to be depends on where the prompt ends.
    pub(super) async fn prepare(self, door: &FrontDoor) -> Result<Ready, Fault> {
        let Turn {
            conversation,
            tools,
            bound,
            special,
            mut params,
            mut names,
        } = self;
        let rendered = conversation
            .render(door, tools.offered(), names.prompt)
            .await?;
        let text = door.text(names.prompt)?;
        let mut thoughts = thoughts(text, &rendered);
        if let Some(bound) = tools.bind(text, bound, thoughts)? {
            if thoughts == Thoughts::Begun && bound.constraint.after_token.is_none() {
                thoughts = Thoughts::None;
            }
            (params.constraint, names.constraint) = (Some(bound.constraint), bound.field);
        }
        let dialect = Dialect::of(text);
        let listening = Listening {
            calls: tools.listens().then_some(dialect),
            one_call: tools.one_call(),
            thoughts,
        };
        if tools.listens() || thoughts != Thoughts::None {
            params.kept_tokens = dialect.mark_tokens(text);
        }
        let prompt = match special {
            true => Prompt::Text(rendered),
            false => Prompt::Plain(rendered),
        };
        let ids = door.tokenize(vec![prompt], &params, &names).await?;
        Ok(Ready {
            ids: ids.into_iter().flatten().collect(),
            params,
            names,
            listening,
        })
    }
}

/// Where a prompt leaves a model off: some templates begin its thoughts, some say that it has had them.
fn thoughts(text: &Text, rendered: &str) -> Thoughts {
    let rendered = rendered.trim_end();
    if rendered.ends_with(THINK_END) {
        Thoughts::None
    } else if rendered.ends_with(THINK) {
        Thoughts::Begun
    } else if text.token_id(THINK_END).is_some() || text.template_mentions(THINK_END) {
        Thoughts::Possible
    } else {
        Thoughts::None
    }
}

/// Checked messages of a list that is called `field`.
pub(super) fn messages(field: &str, items: Vec<Value>) -> Result<Vec<Value>, Fault> {
    if items.is_empty() {
        let message = "the list is empty; at least one message is needed";
        return Err(Fault::invalid(field, message));
    }
    if items.len() > MAX_MESSAGES {
        let message = format!("{} messages; at most {MAX_MESSAGES} are taken", items.len());
        return Err(Fault::invalid(field, message));
    }
    let items = items.into_iter().enumerate();
    items
        .map(|(i, m)| message(format!("{field}[{i}]"), m))
        .collect()
}

/// One message: role and text, calls of tools, or what came of one.
fn message(at: String, value: Value) -> Result<Value, Fault> {
    let within = |f: Fault| f.rename(|field| format!("{at}.{field}"));
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
    let roles = "system, user, assistant, tool or developer";
    let role = fields
        .string("role")
        .map_err(within)?
        .ok_or_else(|| Fault::missing(format!("{at}.role"), roles))?;
    let role = match role.as_str() {
        "system" | "user" | "assistant" | "tool" => role,
        // The newer name of the same thing; templates know the older one.
        "developer" => "system".to_owned(),
        _ => {
            return Err(Fault::invalid(
                format!("{at}.role"),
                format!("expected {roles}"),
            ));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), role.as_str().into());
    let calls = match fields.take("tool_calls") {
        Some(Value::Array(calls)) if role == "assistant" => {
            let calls = calls.into_iter().enumerate();
            let calls = calls.map(|(i, call)| tool_call(format!("{at}.tool_calls[{i}]"), call));
            calls.collect::<Result<Vec<_>, _>>()?
        }
        None => Vec::new(),
        Some(Value::Array(calls)) if calls.is_empty() => Vec::new(),
        Some(other) => {
            let message = format!(
                "expected calls in a message of the assistant, not {}",
                kind(&other)
            );
            return Err(Fault::invalid(format!("{at}.tool_calls"), message));
        }
    };
    let content = match fields.take("content") {
        Some(content) => content_text(&at, content)?.into(),
        None if !calls.is_empty() => Value::Null,
        None => {
            return Err(Fault::missing(
                format!("{at}.content"),
                "a string or a list of text parts",
            ));
        }
    };
    out.insert("content".into(), content);
    if !calls.is_empty() {
        out.insert("tool_calls".into(), calls.into());
    }
    for name in ["name", "reasoning_content", "tool_call_id"] {
        if let Some(value) = fields.string(name).map_err(within)? {
            out.insert(name.into(), value.into());
        }
    }
    // What clients send back of an earlier answer.
    for name in ["annotations", "refusal"] {
        fields
            .refuse_unless(name, |v| v.as_array().is_some_and(Vec::is_empty))
            .map_err(within)?;
    }
    fields.finish().map_err(within)?;
    Ok(Value::Object(out))
}

/// A call of an earlier answer. Its arguments are text.
fn tool_call(at: String, value: Value) -> Result<Value, Fault> {
    let function = value.get("function").cloned().unwrap_or_default();
    let (name, arguments) = (function.get("name"), function.get("arguments"));
    if value.get("type").is_some_and(|kind| kind != "function") {
        return Err(Fault::unsupported(
            &format!("{at}.type"),
            "only functions can be called",
        ));
    }
    let Some(Value::String(name)) = name else {
        return Err(Fault::missing(format!("{at}.function.name"), "a text"));
    };
    let arguments = match arguments {
        None | Some(Value::Null) => "{}",
        Some(Value::String(arguments)) => arguments,
        Some(other) => {
            let message = format!("expected JSON as text, not {}", kind(other));
            return Err(Fault::invalid(format!("{at}.function.arguments"), message));
        }
    };
    let id = value.get("id").cloned().unwrap_or_default();
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// Messages as the checkpoint's template can take them.
fn for_template(text: &Text, mut messages: Vec<Value>, tools: &[Value]) -> Vec<Value> {
    let dialect = Dialect::of(text);
    let knows_calls = text.template_mentions("tool_calls");
    // Some join arguments to other text, some write them as JSON themselves.
    let parsed = [
        "arguments']|tojson",
        "arguments\"]|tojson",
        "arguments|tojson",
    ];
    let parsed = parsed.iter().any(|words| text.template_mentions(words));
    let knows_null = [
        "content']isnone",
        "content\"]isnone",
        "contentisnone",
        "content']isnot",
    ];
    let knows_null = knows_null.iter().any(|words| text.template_mentions(words));
    for message in &mut messages {
        if let Some(Value::Array(calls)) = message.get_mut("tool_calls").map(Value::take) {
            if knows_calls {
                let calls = calls
                    .into_iter()
                    .map(|call| if parsed { with_parsed(call) } else { call });
                message["tool_calls"] = calls.collect();
            } else {
                let said = message["content"].as_str().unwrap_or_default().to_owned();
                message["content"] = (said + &dialect.write(&calls)).into();
                message
                    .as_object_mut()
                    .map(|fields| fields.remove("tool_calls"));
            }
        }
        if message["content"].is_null() && !knows_null {
            message["content"] = "".into();
        }
        if message["role"] == "tool" && !knows_calls {
            message["role"] = "user".into();
        }
    }
    if !tools.is_empty() && !text.template_mentions("tools") {
        let instructions = dialect.instructions(tools);
        match messages.first_mut() {
            Some(first) if first["role"] == "system" => {
                let said = first["content"].as_str().unwrap_or_default();
                first["content"] = format!("{said}\n\n{instructions}").into();
            }
            _ => messages.insert(0, json!({"role": "system", "content": instructions})),
        }
    }
    messages
}

/// A call whose arguments are a value, where they are JSON.
fn with_parsed(mut call: Value) -> Value {
    let arguments = &mut call["function"]["arguments"];
    let parsed = arguments
        .as_str()
        .and_then(|text| serde_json::from_str(text).ok());
    if let Some(parsed) = parsed {
        *arguments = parsed;
    }
    call
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
