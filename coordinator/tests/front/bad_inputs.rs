//! Bad inputs: each is a clear error that names the field, nothing of it reaches
//! the cluster, and the door serves afterwards as before.

use serde_json::{Value, json};

use crate::fake::door;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const TOKENIZE: &str = "/tokenize";
const DETOKENIZE: &str = "/detokenize";

// Tables: a line is a field, JSON texts that it may not have, with ` | ` between them, and behind
// ` => ` the `param` of the error where that is not the field, or `?` where none is asked for.

const EVERYWHERE: &str = r#"
max_tokens             -1 | 0 | 1.5 | 9223372036854775808 | 18446744073709551616 | 1e400 | 100000000 | 512
max_tokens             "many" | true | [] | {} | [1]
temperature            -0.1 | 2.5 | 1e39 | -1e400 | "many" | true | [] | {} | [1]
top_p                  0 | -1 | 1.01 | 1e30 | "many" | true | [] | {} | [1]
top_k                  -2 | 1.5 | 9223372036854775808 | "many" | true | [] | {} | [1]
seed                   1.5 | 9223372036854775808 | 1e400 | "many" | true | [] | {} | [1]
n                      0 | -1 | 1.5 | 129 | 1000000 | 9223372036854775808 | "many" | true | [] | {} | [1]
min_tokens             -1 | 3 | 1.5 | 9223372036854775808 | "many" | true | [] | {} | [1]
stop                   5 | true | {} | [1] | ["a",5] | "" | [""] | [null]
stop_token_ids         5 | "x" | [-1] | [2048] | [4294967296] | [1.5] | ["a"] | {}
ignore_eos             1 | "yes" | []
skip_special_tokens    1 | "yes"
stream                 1 | "yes" | [] | {}
stream_options         {"include_usage":true} | 5 | [] | "x"
model                  5 | [] | true | {}
logit_bias             {"1":101} | {"1":"x"} | {"x":1} | {"-1":1} | {"4000000000":1} | [] | 5
presence_penalty       2.5 | -3 | "x"
frequency_penalty      2.5 | -3 | "x"
repetition_penalty     -1 | 0 | []
min_p                  -0.1 | 2 | "x"
tools                  5 | "x" | {}
tool_choice            "required" | {"type":"function"} | 5
functions              [{"name":"f"}] | 5
response_format        5 | "text" | []
modalities             ["audio"] | ["text","audio"] | 5
audio                  {"voice":"x"} | 5
use_beam_search        true | 5
guided_json            [] | 5
guided_json_object     5 | "x"
guided_regex           5 | []
guided_grammar         5 | {}
guided_choice          5 | "x" | [5] | ["a",null]
structured_outputs     5 | [] | "x"
user                   5 | []
cache_salt             5 | {}
priority               1.5 | "x" | 3000000000
timeout_ms             0 | -1 | 1.5 | "x"
max_queue_ms           -1 | true
timings                1 | "x"
reasoning_effort       "high" | 5
add_special_tokens     1 | "x"
no_such_parameter      1 | "x" | {}
response_format        {} => response_format.type
response_format        {"type":"grammar"} => response_format.type
response_format        {"type":"json_schema"} => response_format.json_schema
response_format        {"type":"json_schema","json_schema":{}} => response_format.json_schema.name
response_format        {"type":"json_schema","json_schema":{"name":"a b","schema":{}}} => response_format.json_schema.name
response_format        {"type":"json_schema","json_schema":{"name":"a","schema":5}} => response_format.json_schema.schema
response_format        {"type":"json_schema","json_schema":{"name":"a","schema":{},"else":5}} => response_format.json_schema.else
response_format        {"type":"json_object","else":5} => response_format.else
structured_outputs     {"regex":5} => structured_outputs.regex
structured_outputs     {"json":[]} => structured_outputs.json
structured_outputs     {"choice":"x"} => structured_outputs.choice
structured_outputs     {"structural_tag":"x"} => structured_outputs.structural_tag
structured_outputs     {"regex":"a","grammar":"b"} => structured_outputs.grammar
structured_outputs     {"else":5} => structured_outputs.else
"#;

const OF_COMPLETIONS: &str = r#"
prompt                 "" | [] | 5 | true | {} | [[]] | [-1] | [2048] | [4294967296] | [9223372036854775808]
prompt                 [1.5] | ["a",5] | [[1],["a"]] | [1,"a"] | [1,[2]] | [""] | null | [null] | [true]
prompt                 [[[1]]] | [{}] | [[1],[]]
logprobs               -1 | 21 | 1.5 | true | "x" | []
best_of                -1 | 0 | 1000000 | "x"
echo                   5 | "x" | []
suffix                 "end" | 5
"#;

const OF_STREAMS: &str = r#"
stream_options         {"include_usage":5} => stream_options.include_usage
stream_options         {"else":5} => stream_options.else
"#;

const OF_CHAT: &str = r#"
logprobs               1 | "x" | []
top_logprobs           1 | -1 | 21 | 1.5 | "x" | true
max_completion_tokens  -1 | 0 | 1.5 | "x" | 100000000
chat_template          "{{ 1 }}" | 5
chat_template_kwargs   5 | [] | "x"
chat_template_kwargs   {"messages":[]} => messages
continue_final_message true | 5
messages               null
tools                  [5] => tools[0]
tools                  [{}] => tools[0].type
tools                  [{"type":"web_search"}] => tools[0].type
tools                  [{"type":"function"}] => tools[0].function
tools                  [{"type":"function","function":{}}] => tools[0].function.name
tools                  [{"type":"function","function":{"name":"a b"}}] => tools[0].function.name
tools                  [{"type":"function","function":{"name":"a","parameters":5}}] => tools[0].function.parameters
tools                  [{"type":"function","function":{"name":"a","strict":"x"}}] => tools[0].function.strict
tools                  [{"type":"function","function":{"name":"a"}},{"type":"function","function":{"name":"a"}}] => tools[1]
tool_choice            {"type":"function","function":{"name":"f"}} | {"type":"allowed_tools"} | "sometimes"
parallel_tool_calls    5
"#;

/// Where there are messages.
const OF_MESSAGES: &str = r#"
messages               [] | 5 | {} | "hi"
messages               [5] | [[]] => messages[0]
messages               [{}] | [{"content":"hi"}] | [{"role":5,"content":"hi"}] => messages[0].role
messages               [{"role":"wizard","content":"hi"}] => messages[0].role
messages               [{"role":"function","content":"hi","name":"f"}] => messages[0].role
messages               [{"role":"user"}] | [{"role":"user","content":null}] => messages[0].content
messages               [{"role":"user","content":5}] => messages[0].content
messages               [{"role":"user","content":{}}] | [{"role":"user","content":[]}] => messages[0].content
messages               [{"role":"user","content":["hi"]}] => messages[0].content[0].type
messages               [{"role":"user","content":[{"type":"text"}]}] => messages[0].content[0].text
messages               [{"role":"user","content":[{"type":"text","text":5}]}] => messages[0].content[0].text
messages               [{"role":"user","content":[{"type":"nothing"}]}] => messages[0].content[0].type
messages               [{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://127.0.0.1/x"}}]}] => messages[0].content[0].type
messages               [{"role":"user","content":[{"type":"input_audio","input_audio":{}}]}] => messages[0].content[0].type
messages               [{"role":"user","content":"hi"},{"role":"assistant","content":"x","tool_calls":[{}]}] => messages[1].tool_calls[0].function.name
messages               [{"role":"user","content":"hi","tool_calls":[{}]}] => messages[0].tool_calls
messages               [{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{}}}]}] => messages[0].tool_calls[0].function.arguments
messages               [{"role":"tool","content":"hi","tool_call_id":1}] => messages[0].tool_call_id
messages               [{"role":"user","content":"hi","name":5}] => messages[0].name
messages               [{"role":"user","content":"hi","surprise":1}] => messages[0].surprise
"#;

const OF_TOKENIZE: &str = r#"
prompt                 5 | [1] | null | {}
messages               "x"
messages               null => ?
"#;

const OF_DETOKENIZE: &str = r#"
tokens                 "x" | 5 | null | [-1] | [2048] | [1.5] | ["a"] | {}
"#;

const OF_RESPONSES: &str = r#"
input                  null | 5 | []
input                  [5] => input[0]
input                  [{"type":"item_reference"}] => input[0].type
input                  [{"role":"wizard","content":"x"}] => input[0].role
input                  [{"role":"user"}] => input[0].content
input                  [{"role":"user","content":[{"type":"input_image"}]}] => input[0].content[0].type
input                  [{"type":"function_call"}] => input[0].name
input                  [{"type":"function_call_output","output":"x"}] => input[0].call_id
instructions           5
max_output_tokens      0 | 100000000
temperature            -1
store                  true
background             true
previous_response_id   "resp_1"
conversation           "conv_1"
include                ["reasoning.encrypted_content"]
truncation             "auto"
reasoning              {"effort":"high"}
text                   5
text                   {"format":5} => text.format
text                   {"format":{}} => text.format.type
text                   {"format":{"type":"json_schema","name":"a"}} => text.format.schema
text                   {"verbosity":"high"} => text.verbosity
tools                  [{"type":"web_search"}] => tools[0].type
tools                  [{"type":"function"}] => tools[0].function.name
tool_choice            "required"
messages               []
n                      2
"#;

/// Path, body, and the `param` that the error must have, where one is asked for.
type Case = (&'static str, String, Option<String>);

/// A body with one field replaced by JSON text, which need not be valid.
fn with(good: &Value, field: &str, value: &str) -> String {
    let mut body = good.as_object().unwrap().clone();
    body.remove(field);
    let rest = Value::from(body).to_string();
    let open = rest.strip_suffix('}').unwrap();
    let comma = if open == "{" { "" } else { "," };
    format!("{open}{comma}\"{field}\":{value}}}")
}

/// The cases of a table: `good` with one field replaced by each of its texts.
fn of_table(path: &'static str, good: &Value, table: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for line in table.lines().filter(|line| !line.is_empty()) {
        let (field, rest) = line.split_once(' ').unwrap();
        let (values, param) = rest.split_once(" => ").unwrap_or((rest, field));
        for value in values.split(" | ").map(str::trim) {
            // A number that JSON readers refuse has no field yet.
            let refused = value.contains("e400") || value.contains("18446744073709551616");
            let param = (param != "?" && !refused).then(|| param.to_owned());
            cases.push((path, with(good, field, value), param));
        }
    }
    cases
}

fn cases() -> Vec<Case> {
    let completion = json!({"model": "demo", "prompt": "To be", "max_tokens": 2});
    let several = json!({"model": "demo", "prompt": "To be", "n": 2});
    let streamed = json!({"model": "demo", "prompt": "To be", "stream": true});
    let unnamed = json!({"prompt": "a", "stream": true});
    let chat =
        json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let response = json!({"model": "demo", "input": "hi"});
    let nothing = json!({"model": "demo"});
    let tables = [
        (COMPLETIONS, &completion, EVERYWHERE),
        (CHAT, &chat, EVERYWHERE),
        (COMPLETIONS, &completion, OF_COMPLETIONS),
        (COMPLETIONS, &several, "best_of 1"),
        (COMPLETIONS, &streamed, "best_of 2"),
        (COMPLETIONS, &unnamed, OF_STREAMS),
        (CHAT, &chat, OF_CHAT),
        (CHAT, &chat, OF_MESSAGES),
        (TOKENIZE, &nothing, OF_MESSAGES),
        (TOKENIZE, &nothing, OF_TOKENIZE),
        (DETOKENIZE, &nothing, OF_DETOKENIZE),
        (RESPONSES, &response, OF_RESPONSES),
    ];
    let mut cases: Vec<_> = tables
        .into_iter()
        .flat_map(|(path, good, table)| of_table(path, good, table))
        .collect();

    // Costly before it is wrong: refused without the cost.
    let list = |item: &str, n: usize| format!("[{}]", vec![item; n].join(","));
    let message = |text: &str| format!(r#"{{"role":"user","content":"{text}"}}"#);
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = format!("\"{}\"", "thou ".repeat(100_000));
    let costly = [
        (COMPLETIONS, &completion, "prompt", list("5", 1_000_000)),
        (COMPLETIONS, &completion, "prompt", list("5", 512)),
        (COMPLETIONS, &completion, "prompt", list("\"a\"", 100_000)),
        (COMPLETIONS, &completion, "prompt", list("\"a\"", 129)),
        (COMPLETIONS, &completion, "prompt", list("[1]", 60_000)),
        (COMPLETIONS, &completion, "prompt", long),
        (COMPLETIONS, &completion, "prompt", deep),
        (COMPLETIONS, &completion, "stop", list("\"a\"", 17)),
        (
            COMPLETIONS,
            &completion,
            "stop",
            format!("\"{}\"", "s".repeat(300)),
        ),
        (COMPLETIONS, &completion, "stop_token_ids", list("5", 65)),
        (CHAT, &chat, "messages", list(&message("a"), 5000)),
        (
            CHAT,
            &chat,
            "messages",
            list(&message(&"thou ".repeat(50_000)), 1),
        ),
        (DETOKENIZE, &json!({}), "tokens", list("5", 1_000_000)),
    ];
    for (path, good, field, value) in &costly {
        cases.push((path, with(good, field, value), Some((*field).to_owned())));
    }
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
    for path in [COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE] {
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
