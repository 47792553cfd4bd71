//! Bad inputs: each is a clear error that names the field, nothing of it reaches
//! the cluster, and the door serves afterwards as before.

use serde_json::{Value, json};

use crate::fake::door;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Values that no number is.
const NOT_NUMBERS: [&str; 5] = ["\"many\"", "true", "[]", "{}", "[1]"];

/// Field and the JSON texts it may not have, at both endpoints.
const COMMON: [(&str, &[&str]); 41] = [
    (
        "max_tokens",
        &[
            "-1",
            "0",
            "1.5",
            "9223372036854775808",
            "18446744073709551616",
            "1e400",
            "100000000",
            "512",
        ],
    ),
    ("temperature", &["-0.1", "2.5", "1e39", "-1e400"]),
    ("top_p", &["0", "-1", "1.01", "1e30"]),
    ("top_k", &["-2", "1.5", "9223372036854775808"]),
    ("seed", &["1.5", "9223372036854775808", "1e400"]),
    (
        "n",
        &["0", "-1", "1.5", "129", "1000000", "9223372036854775808"],
    ),
    ("min_tokens", &["-1", "3", "1.5", "9223372036854775808"]),
    (
        "stop",
        &[
            "5",
            "true",
            "{}",
            "[1]",
            "[\"a\",5]",
            "\"\"",
            "[\"\"]",
            "[null]",
        ],
    ),
    (
        "stop_token_ids",
        &[
            "5",
            "\"x\"",
            "[-1]",
            "[2048]",
            "[4294967296]",
            "[1.5]",
            "[\"a\"]",
            "{}",
        ],
    ),
    ("ignore_eos", &["1", "\"yes\"", "[]"]),
    ("skip_special_tokens", &["1", "\"yes\""]),
    ("stream", &["1", "\"yes\"", "[]", "{}"]),
    (
        "stream_options",
        &["{\"include_usage\":true}", "5", "[]", "\"x\""],
    ),
    ("model", &["5", "[]", "true", "{}"]),
    (
        "logit_bias",
        &[
            "{\"1\":101}",
            "{\"1\":\"x\"}",
            "{\"x\":1}",
            "{\"-1\":1}",
            "{\"4000000000\":1}",
            "[]",
            "5",
        ],
    ),
    ("presence_penalty", &["2.5", "-3", "\"x\""]),
    ("frequency_penalty", &["2.5", "-3", "\"x\""]),
    ("repetition_penalty", &["-1", "0", "[]"]),
    ("min_p", &["-0.1", "2", "\"x\""]),
    ("tools", &["5", "\"x\"", "{}"]),
    (
        "tool_choice",
        &["\"required\"", "{\"type\":\"function\"}", "5"],
    ),
    ("functions", &["[{\"name\":\"f\"}]", "5"]),
    ("response_format", &["5", "\"text\"", "[]"]),
    ("modalities", &["[\"audio\"]", "[\"text\",\"audio\"]", "5"]),
    ("audio", &["{\"voice\":\"x\"}", "5"]),
    ("use_beam_search", &["true", "5"]),
    ("guided_json", &["[]", "5"]),
    ("guided_json_object", &["5", "\"x\""]),
    ("guided_regex", &["5", "[]"]),
    ("guided_grammar", &["5", "{}"]),
    ("guided_choice", &["5", "\"x\"", "[5]", "[\"a\",null]"]),
    ("structured_outputs", &["5", "[]", "\"x\""]),
    ("user", &["5", "[]"]),
    ("cache_salt", &["5", "{}"]),
    ("priority", &["1.5", "\"x\"", "3000000000"]),
    ("timeout_ms", &["0", "-1", "1.5", "\"x\""]),
    ("max_queue_ms", &["-1", "true"]),
    ("timings", &["1", "\"x\""]),
    ("reasoning_effort", &["\"high\"", "5"]),
    ("add_special_tokens", &["1", "\"x\""]),
    ("no_such_parameter", &["1", "\"x\"", "{}"]),
];

const PROMPTS: &[&str] = &[
    "\"\"",
    "[]",
    "5",
    "true",
    "{}",
    "[[]]",
    "[-1]",
    "[2048]",
    "[4294967296]",
    "[9223372036854775808]",
    "[1.5]",
    "[\"a\",5]",
    "[[1],[\"a\"]]",
    "[1,\"a\"]",
    "[1,[2]]",
    "[\"\"]",
    "null",
    "[null]",
    "[true]",
    "[[[1]]]",
    "[{}]",
    "[[1],[]]",
];

const MESSAGES: &[(&str, &str)] = &[
    ("null", "messages"),
    ("[]", "messages"),
    ("5", "messages"),
    ("{}", "messages"),
    ("\"hi\"", "messages"),
    ("[5]", "messages[0]"),
    ("[[]]", "messages[0]"),
    ("[{}]", "messages[0].role"),
    ("[{\"content\":\"hi\"}]", "messages[0].role"),
    ("[{\"role\":5,\"content\":\"hi\"}]", "messages[0].role"),
    (
        "[{\"role\":\"wizard\",\"content\":\"hi\"}]",
        "messages[0].role",
    ),
    (
        "[{\"role\":\"function\",\"content\":\"hi\",\"name\":\"f\"}]",
        "messages[0].role",
    ),
    ("[{\"role\":\"user\"}]", "messages[0].content"),
    (
        "[{\"role\":\"user\",\"content\":null}]",
        "messages[0].content",
    ),
    ("[{\"role\":\"user\",\"content\":5}]", "messages[0].content"),
    (
        "[{\"role\":\"user\",\"content\":{}}]",
        "messages[0].content",
    ),
    (
        "[{\"role\":\"user\",\"content\":[]}]",
        "messages[0].content",
    ),
    (
        "[{\"role\":\"user\",\"content\":[\"hi\"]}]",
        "messages[0].content[0].type",
    ),
    (
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]",
        "messages[0].content[0].text",
    ),
    (
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":5}]}]",
        "messages[0].content[0].text",
    ),
    (
        "[{\"role\":\"user\",\"content\":[{\"type\":\"nothing\"}]}]",
        "messages[0].content[0].type",
    ),
    (
        "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"http://127.0.0.1/x\"}}]}]",
        "messages[0].content[0].type",
    ),
    (
        "[{\"role\":\"user\",\"content\":[{\"type\":\"input_audio\",\"input_audio\":{}}]}]",
        "messages[0].content[0].type",
    ),
    (
        "[{\"role\":\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":\"x\",\"tool_calls\":[{}]}]",
        "messages[1].tool_calls[0].function.name",
    ),
    (
        "[{\"role\":\"user\",\"content\":\"hi\",\"tool_calls\":[{}]}]",
        "messages[0].tool_calls",
    ),
    (
        "[{\"role\":\"assistant\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{}}}]}]",
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        "[{\"role\":\"tool\",\"content\":\"hi\",\"tool_call_id\":1}]",
        "messages[0].tool_call_id",
    ),
    (
        "[{\"role\":\"user\",\"content\":\"hi\",\"name\":5}]",
        "messages[0].name",
    ),
    (
        "[{\"role\":\"user\",\"content\":\"hi\",\"surprise\":1}]",
        "messages[0].surprise",
    ),
];

/// Field, value, and the `param` of the error.
const CONSTRAINTS: &[(&str, &str, &str)] = &[
    ("response_format", "{}", "response_format.type"),
    (
        "response_format",
        "{\"type\":\"grammar\"}",
        "response_format.type",
    ),
    (
        "response_format",
        "{\"type\":\"json_schema\"}",
        "response_format.json_schema",
    ),
    (
        "response_format",
        "{\"type\":\"json_schema\",\"json_schema\":{}}",
        "response_format.json_schema.name",
    ),
    (
        "response_format",
        "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a b\",\"schema\":{}}}",
        "response_format.json_schema.name",
    ),
    (
        "response_format",
        "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\",\"schema\":5}}",
        "response_format.json_schema.schema",
    ),
    (
        "response_format",
        "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\",\"schema\":{},\"else\":5}}",
        "response_format.json_schema.else",
    ),
    (
        "response_format",
        "{\"type\":\"json_object\",\"else\":5}",
        "response_format.else",
    ),
    (
        "structured_outputs",
        "{\"regex\":5}",
        "structured_outputs.regex",
    ),
    (
        "structured_outputs",
        "{\"json\":[]}",
        "structured_outputs.json",
    ),
    (
        "structured_outputs",
        "{\"choice\":\"x\"}",
        "structured_outputs.choice",
    ),
    (
        "structured_outputs",
        "{\"structural_tag\":\"x\"}",
        "structured_outputs.structural_tag",
    ),
    (
        "structured_outputs",
        "{\"regex\":\"a\",\"grammar\":\"b\"}",
        "structured_outputs.grammar",
    ),
    (
        "structured_outputs",
        "{\"else\":5}",
        "structured_outputs.else",
    ),
];

/// The same of chat alone.
const TOOLS: &[(&str, &str, &str)] = &[
    ("tools", "[5]", "tools[0]"),
    ("tools", "[{}]", "tools[0].type"),
    ("tools", "[{\"type\":\"web_search\"}]", "tools[0].type"),
    ("tools", "[{\"type\":\"function\"}]", "tools[0].function"),
    (
        "tools",
        "[{\"type\":\"function\",\"function\":{}}]",
        "tools[0].function.name",
    ),
    (
        "tools",
        "[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]",
        "tools[0].function.name",
    ),
    (
        "tools",
        "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"parameters\":5}}]",
        "tools[0].function.parameters",
    ),
    (
        "tools",
        "[{\"type\":\"function\",\"function\":{\"name\":\"a\",\"strict\":\"x\"}}]",
        "tools[0].function.strict",
    ),
    (
        "tools",
        "[{\"type\":\"function\",\"function\":{\"name\":\"a\"}},{\"type\":\"function\",\"function\":{\"name\":\"a\"}}]",
        "tools[1]",
    ),
    (
        "tool_choice",
        "{\"type\":\"function\",\"function\":{\"name\":\"f\"}}",
        "tool_choice",
    ),
    ("tool_choice", "{\"type\":\"allowed_tools\"}", "tool_choice"),
    ("tool_choice", "\"sometimes\"", "tool_choice"),
    ("parallel_tool_calls", "5", "parallel_tool_calls"),
];

/// The same of responses.
const RESPONSES: &[(&str, &str, &str)] = &[
    ("input", "null", "input"),
    ("input", "5", "input"),
    ("input", "[]", "input"),
    ("input", "[5]", "input[0]"),
    ("input", "[{\"type\":\"item_reference\"}]", "input[0].type"),
    (
        "input",
        "[{\"role\":\"wizard\",\"content\":\"x\"}]",
        "input[0].role",
    ),
    ("input", "[{\"role\":\"user\"}]", "input[0].content"),
    (
        "input",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"input_image\"}]}]",
        "input[0].content[0].type",
    ),
    ("input", "[{\"type\":\"function_call\"}]", "input[0].name"),
    (
        "input",
        "[{\"type\":\"function_call_output\",\"output\":\"x\"}]",
        "input[0].call_id",
    ),
    ("instructions", "5", "instructions"),
    ("max_output_tokens", "0", "max_output_tokens"),
    ("max_output_tokens", "100000000", "max_output_tokens"),
    ("temperature", "-1", "temperature"),
    ("store", "true", "store"),
    ("background", "true", "background"),
    ("previous_response_id", "\"resp_1\"", "previous_response_id"),
    ("conversation", "\"conv_1\"", "conversation"),
    ("include", "[\"reasoning.encrypted_content\"]", "include"),
    ("truncation", "\"auto\"", "truncation"),
    ("reasoning", "{\"effort\":\"high\"}", "reasoning"),
    ("text", "5", "text"),
    ("text", "{\"format\":5}", "text.format"),
    ("text", "{\"format\":{}}", "text.format.type"),
    (
        "text",
        "{\"format\":{\"type\":\"json_schema\",\"name\":\"a\"}}",
        "text.format.schema",
    ),
    ("text", "{\"verbosity\":\"high\"}", "text.verbosity"),
    ("tools", "[{\"type\":\"web_search\"}]", "tools[0].type"),
    (
        "tools",
        "[{\"type\":\"function\"}]",
        "tools[0].function.name",
    ),
    ("tool_choice", "\"required\"", "tool_choice"),
    ("messages", "[]", "messages"),
    ("n", "2", "n"),
];

/// A body with one field replaced by JSON text, which need not be valid.
fn with(good: &Value, field: &str, value: &str) -> String {
    let mut body = good.as_object().unwrap().clone();
    body.remove(field);
    let rest = Value::from(body).to_string();
    format!("{},\"{field}\":{value}}}", rest.strip_suffix('}').unwrap())
}

/// Path, body, and the `param` that the error must have, where there is one.
fn cases() -> Vec<(&'static str, String, Option<String>)> {
    let mut cases = Vec::new();
    let completion = json!({"model": "demo", "prompt": "To be", "max_tokens": 2});
    let chat =
        json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    for (path, good) in [(COMPLETIONS, &completion), (CHAT, &chat)] {
        let mut add = |field: &str, value: &str| {
            // A number that JSON readers refuse has no field yet.
            let param = (!value.contains("e400") && !value.contains("18446744073709551616"))
                .then(|| field.to_owned());
            cases.push((path, with(good, field, value), param));
        };
        for (field, values) in COMMON {
            values.iter().for_each(|v| add(field, v));
        }
        for field in [
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "n",
            "min_tokens",
        ] {
            NOT_NUMBERS.iter().for_each(|v| add(field, v));
        }
    }
    let mut add = |path: &'static str, good: &Value, field: &str, values: &[&str]| {
        values
            .iter()
            .for_each(|v| cases.push((path, with(good, field, v), Some(field.to_owned()))));
    };
    add(COMPLETIONS, &completion, "prompt", PROMPTS);
    add(
        COMPLETIONS,
        &completion,
        "logprobs",
        &["-1", "21", "1.5", "true", "\"x\"", "[]"],
    );
    add(
        COMPLETIONS,
        &completion,
        "best_of",
        &["-1", "0", "1000000", "\"x\""],
    );
    let several = json!({"model": "demo", "prompt": "To be", "n": 2});
    add(COMPLETIONS, &several, "best_of", &["1"]);
    let streamed = json!({"model": "demo", "prompt": "To be", "stream": true});
    add(COMPLETIONS, &streamed, "best_of", &["2"]);
    add(COMPLETIONS, &completion, "echo", &["5", "\"x\"", "[]"]);
    add(COMPLETIONS, &completion, "suffix", &["\"end\"", "5"]);
    add(CHAT, &chat, "logprobs", &["1", "\"x\"", "[]"]);
    add(
        CHAT,
        &chat,
        "top_logprobs",
        &["1", "-1", "21", "1.5", "\"x\"", "true"],
    );
    add(
        CHAT,
        &chat,
        "max_completion_tokens",
        &["-1", "0", "1.5", "\"x\"", "100000000"],
    );
    add(CHAT, &chat, "chat_template", &["\"{{ 1 }}\"", "5"]);
    add(CHAT, &chat, "chat_template_kwargs", &["5", "[]", "\"x\""]);
    add(CHAT, &chat, "continue_final_message", &["true", "5"]);
    add(
        "/tokenize",
        &json!({"model": "demo"}),
        "prompt",
        &["5", "[1]", "null", "{}"],
    );
    add(
        "/tokenize",
        &json!({"model": "demo"}),
        "messages",
        &["5", "[]", "\"x\""],
    );
    add(
        "/detokenize",
        &json!({"model": "demo"}),
        "tokens",
        &[
            "\"x\"", "5", "null", "[-1]", "[2048]", "[1.5]", "[\"a\"]", "{}",
        ],
    );
    for (field, value, param) in CONSTRAINTS {
        for (path, good) in [(COMPLETIONS, &completion), (CHAT, &chat)] {
            cases.push((path, with(good, field, value), Some((*param).to_owned())));
        }
    }
    for (field, value, param) in TOOLS {
        cases.push((CHAT, with(&chat, field, value), Some((*param).to_owned())));
    }
    let response = json!({"model": "demo", "input": "hi"});
    for (field, value, param) in RESPONSES {
        cases.push((
            "/v1/responses",
            with(&response, field, value),
            Some((*param).to_owned()),
        ));
    }
    for (messages, param) in MESSAGES {
        cases.push((
            CHAT,
            with(&chat, "messages", messages),
            Some((*param).to_owned()),
        ));
        cases.push((
            "/tokenize",
            with(&json!({"model": "demo"}), "messages", messages),
            (*messages != "null").then(|| (*param).to_owned()),
        ));
    }
    cases.push((
        COMPLETIONS,
        with(
            &json!({"prompt": "a", "stream": true}),
            "stream_options",
            "{\"include_usage\":5}",
        ),
        Some("stream_options.include_usage".into()),
    ));
    cases.push((
        COMPLETIONS,
        with(
            &json!({"prompt": "a", "stream": true}),
            "stream_options",
            "{\"else\":5}",
        ),
        Some("stream_options.else".into()),
    ));
    cases.push((
        CHAT,
        with(&chat, "chat_template_kwargs", "{\"messages\":[]}"),
        Some("messages".into()),
    ));

    // Costly before it is wrong: refused without the cost.
    let list = |item: &str, n: usize| format!("[{}]", vec![item; n].join(","));
    let costly = [
        (
            COMPLETIONS,
            with(&completion, "prompt", &list("5", 1_000_000)),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(&completion, "prompt", &list("5", 512)),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(&completion, "prompt", &list("\"a\"", 100_000)),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(&completion, "prompt", &list("\"a\"", 129)),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(&completion, "prompt", &list("[1]", 60_000)),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(
                &completion,
                "prompt",
                &format!("\"{}\"", "thou ".repeat(100_000)),
            ),
            "prompt",
        ),
        (
            COMPLETIONS,
            with(&completion, "stop", &list("\"a\"", 17)),
            "stop",
        ),
        (
            COMPLETIONS,
            with(&completion, "stop", &format!("\"{}\"", "s".repeat(300))),
            "stop",
        ),
        (
            COMPLETIONS,
            with(&completion, "stop_token_ids", &list("5", 65)),
            "stop_token_ids",
        ),
        (
            COMPLETIONS,
            with(
                &completion,
                "prompt",
                &format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000)),
            ),
            "prompt",
        ),
        (
            CHAT,
            with(
                &chat,
                "messages",
                &list(r#"{"role":"user","content":"a"}"#, 5000),
            ),
            "messages",
        ),
        (
            CHAT,
            with(
                &chat,
                "messages",
                &format!(
                    r#"[{{"role":"user","content":"{}"}}]"#,
                    "thou ".repeat(50_000)
                ),
            ),
            "messages",
        ),
        (
            "/detokenize",
            with(&json!({}), "tokens", &list("5", 1_000_000)).replace("{,", "{"),
            "tokens",
        ),
    ];
    cases.extend(costly.map(|(path, body, param)| (path, body, Some(param.to_owned()))));
    cases
}

#[tokio::test]
async fn every_bad_value_is_refused_by_its_name() {
    let door = door();
    door.will_say("x", 1);
    let good = door
        .ok(COMPLETIONS, json!({"prompt": "To be", "temperature": 0}))
        .await["choices"]
        .clone();
    door.fake.requests.lock().unwrap().clear();
    let cases = cases();
    assert!(cases.len() >= 300, "{}", cases.len());
    let mut wrong = Vec::new();
    for (path, body, param) in cases {
        let answer = door.post_bytes(path, body.clone()).await;
        let json = serde_json::from_str::<Value>(&answer.body).unwrap_or_default();
        let error = &json["error"];
        let clear = error["message"].as_str().is_some_and(|m| !m.is_empty())
            && error["type"] == "invalid_request_error"
            && error["code"].is_string();
        let named = param.as_deref().is_none_or(|p| error["param"] == p);
        if answer.status != 400 || !clear || !named {
            let body: String = body
                .chars()
                .rev()
                .take(120)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect();
            wrong.push(format!(
                "{path} …{body}: {} {} (expected {param:?})",
                answer.status, answer.body
            ));
        }
    }
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(
        door.fake.requests.lock().unwrap().is_empty(),
        "nothing of it reached the cluster"
    );
    assert_eq!(door.front.in_flight(), 0);
    assert_eq!(
        door.ok(COMPLETIONS, json!({"prompt": "To be", "temperature": 0}))
            .await["choices"],
        good,
        "it serves as before"
    );
}

#[tokio::test]
async fn bodies_that_are_no_json_object_are_refused() {
    let door = door();
    let deep = "[".repeat(100_000);
    let nested = format!("{{\"a\":{}", "{\"a\":".repeat(100_000));
    let bodies: [&[u8]; 24] = [
        b"",
        b"{",
        b"}",
        b"null",
        b"[]",
        b"5",
        b"\"x\"",
        b"true",
        b"{\"model\":",
        b"{\"model\":\"demo\"",
        b"\xff\xfe{}",
        b"{\"model\":\"\xc3\x28\"}",
        b"{\"model\":\"\xed\xa0\x80\"}",
        b"{'model':'demo'}",
        b"{\"model\":\"demo\",}",
        b"{}{}",
        b"NaN",
        b"{\"temperature\":NaN}",
        b"{\"temperature\":Infinity}",
        b"\x00\x01\x02",
        b"model=demo&prompt=x",
        b"{\"a\":\"\\ud800\"}",
        deep.as_bytes(),
        nested.as_bytes(),
    ];
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        for body in bodies {
            let answer = door.post_bytes(path, body.to_vec()).await;
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
            assert_eq!(answer.status, 400, "{path} {shown}: {}", answer.body);
            assert!(
                !answer.json()["error"]["message"]
                    .as_str()
                    .unwrap()
                    .is_empty(),
                "{path} {shown}"
            );
        }
    }
}
