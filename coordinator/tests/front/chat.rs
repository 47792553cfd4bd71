//! POST /v1/chat/completions, /tokenize, /detokenize.

use serde_json::{Value, json};

use crate::fake::{Step, door, logprobs_of};

const PATH: &str = "/v1/chat/completions";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn streamed_text(chunks: &[Value]) -> String {
    chunks
        .iter()
        .flat_map(|c| c["choices"].as_array().unwrap())
        .filter_map(|c| c["delta"]["content"].as_str())
        .collect()
}

#[tokio::test]
async fn an_answer_comes_whole_and_in_pieces_alike() {
    let door = door();
    let ids = door.will_say("Ay, my lord 🎉", 1);
    let body = json!({"model": "demo", "messages": user("What say you?"), "max_tokens": 40});
    let whole = door.ok(PATH, body.clone()).await;
    let choice = &whole["choices"][0];
    assert_eq!(
        (whole["object"].as_str(), choice["index"].as_u64()),
        (Some("chat.completion"), Some(0))
    );
    assert_eq!(
        (
            choice["message"]["role"].as_str(),
            choice["message"]["content"].as_str()
        ),
        (Some("assistant"), Some("Ay, my lord 🎉"))
    );
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["logprobs"].is_null());
    assert_eq!(whole["usage"]["completion_tokens"], ids.len());
    let rendered = door
        .text
        .as_ref()
        .unwrap()
        .encode_plain("<|bos|><|user|>What say you?<|assistant|>")
        .unwrap();
    assert_eq!(whole["usage"]["prompt_tokens"], rendered.len());

    let mut streaming = body;
    streaming.as_object_mut().unwrap().extend(
        json!({"stream": true, "stream_options": {"include_usage": true}})
            .as_object()
            .unwrap()
            .clone(),
    );
    let mut chunks = door.post(PATH, streaming).await.chunks();
    let last = chunks.pop().unwrap();
    assert_eq!(
        (&last["usage"], &last["choices"]),
        (&whole["usage"], &json!([]))
    );
    assert!(
        chunks
            .iter()
            .all(|c| c["object"] == "chat.completion.chunk" && c["id"] == last["id"])
    );
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""}),
        "the role comes first"
    );
    assert!(
        chunks[1..]
            .iter()
            .all(|c| c["choices"][0]["delta"]["role"].is_null())
    );
    let finish = chunks.last().unwrap();
    assert_eq!(
        (
            &finish["choices"][0]["finish_reason"],
            &finish["choices"][0]["delta"]
        ),
        (&json!("length"), &json!({}))
    );
    assert_eq!(streamed_text(&chunks), "Ay, my lord 🎉");
}

#[tokio::test]
async fn the_rest_of_the_context_is_the_default_output() {
    let door = door();
    door.will_say("x", 1);
    let whole = door.ok(PATH, json!({"messages": user("hi")})).await;
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap() as u32;
    assert_eq!(
        door.last_request().sampling.unwrap().max_tokens,
        Some(512 - prompt)
    );
    door.ok(
        PATH,
        json!({"messages": user("hi"), "max_tokens": 9, "max_completion_tokens": 5}),
    )
    .await;
    assert_eq!(
        door.last_request().sampling.unwrap().max_tokens,
        Some(5),
        "the newer name decides"
    );
}

#[tokio::test]
async fn logprobs_are_one_object_per_token() {
    let door = door();
    let ids = door.will_say("é 🎉", 2);
    let body = json!({"messages": user("hi"), "logprobs": true, "top_logprobs": 2});
    let whole = door.ok(PATH, body.clone()).await;
    let content = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(content.len(), ids.len());
    let mut bytes = Vec::new();
    for (entry, id) in content.iter().zip(&ids) {
        assert_eq!(
            entry["logprob"].as_f64().unwrap() as f32,
            logprobs_of(*id, 2).logprob
        );
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        bytes.extend(
            entry["bytes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|b| b.as_u64().unwrap() as u8),
        );
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), "é 🎉");
    let mut streaming = body;
    streaming["stream"] = true.into();
    let chunks = door.post(PATH, streaming).await.chunks();
    let streamed = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array())
        .flatten();
    assert_eq!(streamed.cloned().collect::<Vec<_>>(), content);
    let bare = door
        .ok(PATH, json!({"messages": user("hi"), "logprobs": true}))
        .await;
    assert_eq!(
        bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );
}

#[tokio::test]
async fn stop_strings_and_eos_end_an_answer() {
    let door = door();
    door.will_say("one two three", 1);
    door.fake.steps.lock().unwrap().push(Step::Hang);
    let whole = door
        .ok(PATH, json!({"messages": user("count"), "stop": ["two"]}))
        .await;
    assert_eq!(
        (
            &whole["choices"][0]["message"]["content"],
            &whole["choices"][0]["finish_reason"]
        ),
        (&json!("one "), &json!("stop"))
    );
    assert_eq!(door.live(), 0);
    door.will(&[Step::Tokens(vec![1])]);
    let whole = door
        .ok(PATH, json!({"messages": user("say nothing")}))
        .await;
    assert_eq!(
        (
            &whole["choices"][0]["message"]["content"],
            &whole["choices"][0]["finish_reason"]
        ),
        (&json!(""), &json!("stop"))
    );
}

#[tokio::test]
async fn messages_take_text_parts_names_and_what_clients_send_back() {
    let door = door();
    door.will_say("x", 1);
    let text = door.text.clone().unwrap();
    for (messages, rendered) in [
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
            "<|bos|><|user|>a\nb<|assistant|>",
        ),
        (
            json!([
                {"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi", "name": "Ann"},
                {"role": "assistant", "content": "ay", "refusal": null, "annotations": [], "tool_calls": null, "audio": null, "reasoning_content": "hm"},
                {"role": "user", "content": ""},
            ]),
            "<|bos|><|user|>be brief<|user|>hi<|assistant|>ay<|eos|><|user|><|assistant|>",
        ),
    ] {
        let answer = door.ok("/tokenize", json!({"messages": messages})).await;
        assert_eq!(
            answer["tokens"],
            json!(text.encode_plain(rendered).unwrap())
        );
        let whole = door.ok(PATH, json!({"messages": messages})).await;
        assert_eq!(
            whole["usage"]["prompt_tokens"], answer["count"],
            "both endpoints render alike"
        );
    }
    let open = door
        .ok(
            "/tokenize",
            json!({"messages": user("hi"), "add_generation_prompt": false}),
        )
        .await;
    let closed = door.ok("/tokenize", json!({"messages": user("hi")})).await;
    assert_eq!(
        closed["count"].as_u64().unwrap(),
        open["count"].as_u64().unwrap() + 1
    );
}

#[tokio::test]
async fn tokenize_and_detokenize_are_each_others_way_back() {
    let door = door();
    for sample in ["What light", "", "naïve 🎉"] {
        let tokens = door
            .ok(
                "/tokenize",
                json!({"model": "demo", "prompt": sample, "return_token_strs": true}),
            )
            .await;
        assert_eq!(tokens["max_model_len"], 512);
        assert_eq!(
            tokens["count"].as_u64().unwrap() as usize,
            tokens["tokens"].as_array().unwrap().len()
        );
        assert_eq!(
            tokens["count"].as_u64().unwrap() as usize,
            tokens["token_strs"].as_array().unwrap().len()
        );
        let text = door
            .ok(
                "/detokenize",
                json!({"model": "demo", "tokens": tokens["tokens"]}),
            )
            .await;
        assert_eq!(text["prompt"], sample);
    }
    assert_eq!(
        door.ok("/detokenize", json!({"tokens": [3, 1]})).await["prompt"],
        "<|user|><|eos|>"
    );
}
