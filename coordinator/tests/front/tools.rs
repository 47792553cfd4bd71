//! Tool calls and thoughts: what clients see of them, whole and streamed.

use std::{collections::BTreeMap, fs, sync::Arc};

use guild_model::{Config, text::Text};
use guild_proto::inference::v1::constraint::Form;
use serde_json::{Value, json};

use crate::fake::{Door, demo_dir, door, door_of};

const PATH: &str = "/v1/chat/completions";

/// A template that begins thoughts when it is asked to.
const THINKING: &str = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>{% if thinking %}<think>\n{% else %}</think>{% endif %}{# <｜tool▁sep｜> tools tool_calls #}";

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        }}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

fn ask(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools()});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// A front door for the demo checkpoint with another template.
fn door_with_template(template: &str) -> Door {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        demo_dir().join("tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let settings = json!({"bos_token": "<|bos|>", "chat_template": template});
    fs::write(
        dir.path().join("tokenizer_config.json"),
        settings.to_string(),
    )
    .unwrap();
    let config = Config::from_dir(&demo_dir()).unwrap();
    let text = Text::load(dir.path(), &config).unwrap();
    door_of(Arc::new(config), text)
}

/// What a stream's deltas come to: content, reasoning, calls by index, finish reason.
fn joined(chunks: &[Value]) -> (String, String, Vec<(String, String, String)>, String) {
    let (mut content, mut reasoning, mut reason) = (String::new(), String::new(), String::new());
    let mut calls: BTreeMap<u64, (String, String, String)> = BTreeMap::new();
    for choice in chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()) {
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let entry = calls.entry(call["index"].as_u64().unwrap()).or_default();
            if let Some(id) = call["id"].as_str() {
                assert!(entry.0.is_empty() && call["type"] == "function");
                entry.0 = id.to_owned();
            }
            entry.1 += call["function"]["name"].as_str().unwrap_or_default();
            entry.2 += call["function"]["arguments"].as_str().unwrap_or_default();
        }
        if let Some(why) = choice["finish_reason"].as_str() {
            reason = why.to_owned();
        }
    }
    (content, reasoning, calls.into_values().collect(), reason)
}

#[tokio::test]
async fn calls_are_told_from_content_whole_and_streamed() {
    let door = door();
    let said = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Rome\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let mut ids = door.will_say(said, 1);
    ids.push(1);
    door.will(
        &ids.iter()
            .map(|id| crate::fake::Step::Tokens(vec![*id]))
            .collect::<Vec<_>>(),
    );
    let whole = door.ok(PATH, ask(json!({}))).await;
    let choice = &whole["choices"][0];
    let message = &choice["message"];
    assert_eq!(
        (
            message["content"].as_str(),
            choice["finish_reason"].as_str()
        ),
        (Some("Wait."), Some("tool_calls"))
    );
    let calls = message["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 2);
    assert_eq!(
        calls[0]["function"],
        json!({"name": "weather", "arguments": "{\"city\": \"Rome\"}"})
    );
    assert_eq!(
        calls[1]["function"],
        json!({"name": "time", "arguments": "{}"})
    );
    assert_ne!(calls[0]["id"], calls[1]["id"]);

    let chunks = door.post(PATH, ask(json!({"stream": true}))).await.chunks();
    let (content, _, streamed, reason) = joined(&chunks);
    assert_eq!((content.as_str(), reason.as_str()), ("Wait.", "tool_calls"));
    assert_eq!(streamed.len(), 2);
    assert_eq!(
        (&*streamed[0].1, &*streamed[0].2),
        ("weather", "{\"city\": \"Rome\"}")
    );
    assert_eq!((&*streamed[1].1, &*streamed[1].2), ("time", "{}"));
    assert!(
        !chunks.iter().any(|c| c.to_string().contains('▁')),
        "a mark was shown"
    );

    let one = door
        .ok(PATH, ask(json!({"parallel_tool_calls": false})))
        .await;
    assert_eq!(
        one["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let none = door.ok(PATH, ask(json!({"tool_choice": "none"}))).await;
    let message = &none["choices"][0]["message"];
    assert!(message["tool_calls"].is_null());
    assert_eq!(message["content"], said);
    assert_eq!(none["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_choice_that_demands_a_call_is_a_grammar() {
    let door = door();
    door.will_say("x", 1);
    let grammar = |door: &Door| match door
        .last_request()
        .sampling
        .unwrap()
        .constraint
        .unwrap()
        .form
    {
        Some(Form::Grammar(lark)) => lark,
        other => panic!("{other:?}"),
    };
    door.ok(PATH, ask(json!({"tool_choice": "required"}))).await;
    let both = grammar(&door);
    assert!(both.contains("weather") && both.contains("time"), "{both}");
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "time"}}});
    door.ok(PATH, ask(named)).await;
    let one = grammar(&door);
    assert!(!one.contains("weather") && one.contains("time"), "{one}");
    door.ok(PATH, ask(json!({}))).await;
    assert!(door.last_request().sampling.unwrap().constraint.is_none());
    // JSON or calls, as the model likes.
    let format = json!({"response_format": {"type": "json_object"}});
    door.ok(PATH, ask(format)).await;
    assert!(grammar(&door).starts_with("start: value | calls"));
    for (more, param) in [
        (
            json!({"response_format": {"type": "json_object"}, "tool_choice": "required"}),
            "tool_choice",
        ),
        (
            json!({"structured_outputs": {"regex": "a"}}),
            "structured_outputs.regex",
        ),
    ] {
        let (status, named, message) = door.refused(PATH, ask(more)).await;
        assert_eq!((status, named.as_deref()), (400, Some(param)), "{message}");
    }
    let mut strict = ask(json!({}));
    strict["tools"][0]["function"]["strict"] = true.into();
    let (status, param, message) = door.refused(PATH, strict).await;
    assert_eq!(
        (status, param.as_deref()),
        (400, Some("tools")),
        "{message}"
    );
}

#[tokio::test]
async fn a_template_without_tools_is_told_of_them_in_words() {
    let door = door();
    door.will_say("x", 1);
    let text = door.text.clone().unwrap();
    let rendered = |body: Value| {
        let (door, text) = (&door, &text);
        async move {
            let answer = door.ok("/tokenize", body).await;
            let ids: Vec<u32> = serde_json::from_value(answer["tokens"].clone()).unwrap();
            text.decode(&ids, false).unwrap()
        }
    };
    let shown =
        rendered(json!({"messages": [{"role": "user", "content": "hi"}], "tools": tools()})).await;
    assert!(
        shown.contains("\"name\":\"weather\"") && shown.contains("<｜tool▁sep｜>"),
        "{shown}"
    );
    assert!(shown.ends_with("<|user|>hi<|assistant|>"), "{shown}");
    let call = json!({"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]);
    let shown = rendered(json!({"messages": messages})).await;
    let call = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_eq!(
        shown,
        format!("<|bos|><|user|>hi<|assistant|>{call}<|eos|><|user|>noon<|assistant|>")
    );
}

#[tokio::test]
async fn thoughts_are_a_field_of_their_own() {
    let door = door_with_template(THINKING);
    door.will_say("Hm, so.</think>\n\nYes.", 1);
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"thinking": true}});
    let whole = door.ok(PATH, body.clone()).await;
    let message = &whole["choices"][0]["message"];
    assert_eq!(
        (&message["reasoning_content"], &message["content"]),
        (&json!("Hm, so."), &json!("Yes."))
    );
    let usage = &whole["usage"];
    let thought = usage["completion_tokens_details"]["reasoning_tokens"]
        .as_u64()
        .unwrap();
    assert!(
        thought > 0 && thought < usage["completion_tokens"].as_u64().unwrap(),
        "{usage}"
    );
    let mut streaming = body.clone();
    streaming["stream"] = true.into();
    let (content, reasoning, ..) = joined(&door.post(PATH, streaming).await.chunks());
    assert_eq!((content.as_str(), reasoning.as_str()), ("Yes.", "Hm, so."));
    // What is asked of the output holds behind the thoughts; without a token for their end there are none.
    let mut bound = body;
    bound["response_format"] = json!({"type": "json_object"});
    door.will_say("{}", 1);
    let whole = door.ok(PATH, bound).await;
    assert_eq!(whole["choices"][0]["message"]["content"], "{}");
    // A prompt that ends behind the thoughts leaves none to come.
    door.will_say("a</think>b", 1);
    let whole = door
        .ok(
            PATH,
            json!({"messages": [{"role": "user", "content": "hi"}]}),
        )
        .await;
    assert_eq!(whole["choices"][0]["message"]["content"], "a</think>b");
}

#[tokio::test]
async fn calls_of_v31_are_read_where_the_template_writes_such() {
    let door = door_with_template(THINKING);
    door.will_say("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", 3);
    let whole = door.ok(PATH, ask(json!({}))).await;
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].is_null(), "{message}");
    assert_eq!(
        message["tool_calls"][0]["function"],
        json!({"name": "time", "arguments": "{}"})
    );
}
