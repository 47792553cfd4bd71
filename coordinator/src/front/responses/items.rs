//! Items of the responses API: to messages of a conversation on the way in, from what the model has
//! said on the way out.

use serde_json::{Map, Value, json};

use super::super::{chat::Call, fault::Fault, fields::kind};
use super::expected_input;

/// A fresh id with a prefix that tells what it is of.
pub(super) fn id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// `instructions` and `input` as messages, which are checked where those of chat are.
pub(super) fn messages(
    input: Option<Value>,
    instructions: Option<&str>,
) -> Result<Vec<Value>, Fault> {
    let mut messages = Vec::new();
    if let Some(instructions) = instructions {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match input {
        None => return Err(Fault::missing("input", "a text or a list of items")),
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) if items.is_empty() => {
            return Err(Fault::invalid(
                "input",
                "the list is empty; at least one item is needed",
            ));
        }
        Some(Value::Array(items)) => {
            for (i, item) in items.into_iter().enumerate() {
                add(&mut messages, &format!("input[{i}]"), item)?;
            }
        }
        Some(other) => return Err(expected_input(&other)),
    }
    Ok(messages)
}

fn add(messages: &mut Vec<Value>, at: &str, item: Value) -> Result<(), Fault> {
    let Value::Object(mut item) = item else {
        return Err(Fault::invalid(
            at,
            format!("expected an object, not {}", kind(&item)),
        ));
    };
    let text = |item: &Map<String, Value>, field: &str| match item.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(Fault::missing(format!("{at}.{field}"), "a text")),
    };
    match item
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or("message")
    {
        "message" => {
            for name in ["type", "id", "status", "phase"] {
                item.remove(name);
            }
            if let Some(Value::Array(parts)) = item.get_mut("content") {
                parts.iter_mut().for_each(plain_part);
            }
            messages.push(Value::Object(item));
        }
        "function_call" => {
            let function =
                json!({"name": text(&item, "name")?, "arguments": text(&item, "arguments")?});
            let call =
                json!({"id": text(&item, "call_id")?, "type": "function", "function": function});
            // Calls of one turn come one after the other.
            match messages
                .last_mut()
                .and_then(|last| last.get_mut("tool_calls"))
            {
                Some(Value::Array(calls)) => calls.push(call),
                _ => match messages
                    .last_mut()
                    .filter(|last| last["role"] == "assistant")
                {
                    Some(last) => last["tool_calls"] = json!([call]),
                    None => messages
                        .push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
                },
            }
        }
        "function_call_output" => {
            let mut output = item.get("output").cloned().unwrap_or_default();
            if let Value::Array(parts) = &mut output {
                parts.iter_mut().for_each(plain_part);
            }
            let call = text(&item, "call_id")?;
            messages.push(json!({"role": "tool", "content": output, "tool_call_id": call}));
        }
        // What a model thought for an earlier answer is not shown to it again.
        "reasoning" => {}
        _ => {
            return Err(Fault::unsupported(
                &format!("{at}.type"),
                "expected message, function_call, function_call_output or reasoning",
            ));
        }
    }
    Ok(())
}

/// The parts that are text have other names here.
fn plain_part(part: &mut Value) {
    if let Some(kind) = part.get_mut("type")
        && matches!(kind.as_str(), Some("input_text" | "output_text"))
    {
        *kind = "text".into();
    }
}

/// A tool, which has its function inside of it.
pub(super) fn tool(mut tool: Map<String, Value>) -> Result<Map<String, Value>, Fault> {
    let kind = tool.remove("type");
    if kind.as_ref().and_then(Value::as_str) != Some("function") {
        return Err(Fault::unsupported("type", "only functions can be called"));
    }
    let mut outer = Map::new();
    outer.insert("type".into(), "function".into());
    outer.insert("function".into(), tool.into());
    Ok(outer)
}

/// What has been said.
pub(super) fn message(id: &str, text: &str, status: &str) -> Value {
    json!({
        "id": id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [part(text)],
    })
}

/// Text as a part of a message.
pub(super) fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

/// What has been thought.
pub(super) fn reasoning(id: &str, text: &str, status: &str) -> Value {
    json!({
        "id": id,
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    })
}

/// A call.
pub(super) fn call(id: &str, call: &Call, status: &str) -> Value {
    json!({
        "id": id,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    })
}
