//! The responses API.

use serde_json::{Value, json};

use crate::fake::{Answer, Step, door};

const PATH: &str = "/v1/responses";

/// Names and payloads of a stream's events.
fn events(answer: &Answer) -> Vec<(String, Value)> {
    let blocks = answer.body.trim_end_matches("\n\n").split("\n\n");
    let event = |block: &str| {
        let (name, data) = block.split_once('\n').unwrap();
        let name = name.strip_prefix("event: ").unwrap().to_owned();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name);
        (name, data)
    };
    blocks.map(event).collect()
}

#[tokio::test]
async fn a_text_gets_a_message() {
    let door = door();
    let mut ids = door.will_say("Good morrow.", 2);
    // EOS.
    ids.push(1);
    door.will(&[Step::Tokens(ids)]);
    let body = json!({
        "model": "demo", "input": "hi", "instructions": "be kind", "max_output_tokens": 50,
        "temperature": 0.5, "metadata": {"a": "b"}, "store": false,
    });
    let whole = door.ok(PATH, body).await;
    assert_eq!(
        (&whole["object"], &whole["status"]),
        (&json!("response"), &json!("completed"))
    );
    assert!(whole["id"].as_str().unwrap().starts_with("resp_"));
    let output = whole["output"].as_array().unwrap();
    assert_eq!(output.len(), 1);
    assert_eq!(
        (&output[0]["type"], &output[0]["role"]),
        (&json!("message"), &json!("assistant"))
    );
    assert_eq!(output[0]["content"][0]["text"], "Good morrow.");
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap()
    );
    for (field, value) in [
        ("instructions", json!("be kind")),
        ("max_output_tokens", json!(50)),
        ("temperature", json!(0.5)),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("text", json!({"format": {"type": "text"}})),
        ("error", Value::Null),
    ] {
        assert_eq!(whole[field], value, "{field}");
    }
    assert_eq!(door.last_request().sampling.unwrap().max_tokens, Some(50));
}

#[tokio::test]
async fn an_answer_that_is_cut_is_incomplete() {
    let door = door();
    door.will_say("one two three four", 1);
    let whole = door
        .ok(PATH, json!({"input": "hi", "max_output_tokens": 2}))
        .await;
    assert_eq!(whole["status"], "incomplete");
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(whole["output"][0]["status"], "incomplete");
}

#[tokio::test]
async fn items_are_messages_calls_and_their_results() {
    let door = door();
    door.will_say("x", 1);
    let text = door.text.clone().unwrap();
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "Noon.", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "thanks"},
    ]);
    door.ok(PATH, json!({"input": input})).await;
    let Some(guild_proto::inference::v1::generate_request::Input::TokenIds(ids)) =
        door.last_request().input
    else {
        panic!("no ids");
    };
    let call = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_eq!(
        text.decode(&ids.ids, false).unwrap(),
        format!(
            "<|bos|><|user|>hi<|assistant|>{call}<|eos|><|user|>noon<|assistant|>Noon.<|eos|><|user|>thanks<|assistant|>"
        )
    );
}

#[tokio::test]
async fn a_stream_opens_and_closes_each_item() {
    let door = door();
    let said = "Wait.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    door.will_say(said, 1);
    // EOS.
    let end = Step::Tokens(vec![1]);
    door.fake.steps.lock().unwrap().push(end);
    let tools = json!([{"type": "function", "name": "time", "parameters": {"type": "object"}}]);
    let answer = door
        .post(PATH, json!({"input": "hi", "stream": true, "tools": tools}))
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let events = events(&answer);
    for (i, (_, event)) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let deltas = |name: &str| -> String {
        let of_name = events.iter().filter(|(n, _)| n == name);
        of_name.map(|(_, e)| e["delta"].as_str().unwrap()).collect()
    };
    assert_eq!(deltas("response.output_text.delta"), "Wait.");
    assert_eq!(
        deltas("response.function_call_arguments.delta"),
        "{\"a\": 1}"
    );
    let output = &events.last().unwrap().1["response"]["output"];
    assert_eq!(output[0]["content"][0]["text"], "Wait.");
    assert_eq!(
        (&output[1]["name"], &output[1]["arguments"]),
        (&json!("time"), &json!("{\"a\": 1}"))
    );
    assert_eq!(events.last().unwrap().1["response"]["tools"], tools);
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_its_own_way() {
    let door = door();
    door.will(&[
        Step::Tokens(vec![40]),
        Step::Fail(tonic::Status::internal("broken")),
    ]);
    let answer = door
        .post(PATH, json!({"input": "hi", "stream": true}))
        .await;
    let events = events(&answer);
    let (name, last) = events.last().unwrap();
    assert_eq!(
        (name.as_str(), &last["message"]),
        ("error", &json!("broken"))
    );
}
