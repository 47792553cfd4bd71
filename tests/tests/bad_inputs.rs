//! Three hundred bad inputs at the doors, HTTP and gRPC: each gets a clear error
//! of the caller's kind, nothing panics, and the server serves afterwards as before.

#![allow(clippy::unwrap_used)]

use guild_proto::inference::v1::constraint::Form;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::{Choice, Constraint, GenerateRequest, SamplingParams, TokenIds};
use guild_tests::client::{generate, greedy, request};
use guild_tests::http;
use guild_tests::process::{Cluster, demo, golden_dir};
use serde_json::{Value, json};
use tonic::Code;

/// Values that no numeric field takes.
fn not_numbers() -> Vec<&'static str> {
    vec!["\"many\"", "true", "[]", "{}", "[1]"]
}

/// JSON bodies for an endpoint: a good one with one field replaced by a bad value.
fn with_fields(good: &Value, table: &[(&str, Vec<&str>)]) -> Vec<String> {
    let mut bodies = Vec::new();
    for (field, values) in table {
        for value in values {
            let mut body = good.as_object().unwrap().clone();
            body.remove(*field);
            let rest = serde_json::to_string(&body).unwrap();
            bodies.push(format!(
                "{},\"{field}\":{value}}}",
                rest.trim_end_matches('}')
            ));
        }
    }
    bodies
}

fn numeric_fields(max_tokens: &'static str) -> Vec<(&'static str, Vec<&'static str>)> {
    let with = |mut extra: Vec<&'static str>| {
        extra.extend(not_numbers());
        extra
    };
    vec![
        (
            max_tokens,
            with(vec![
                "-1",
                "9223372036854775808",
                "1e400",
                "1.5",
                "100000000",
            ]),
        ),
        ("temperature", with(vec!["-0.1", "1e39", "-1e400", "100"])),
        ("top_p", with(vec!["0", "-1", "1.01", "1e400"])),
        ("top_k", with(vec!["-2", "1.5", "9223372036854775808"])),
        ("seed", with(vec!["1.5", "1e400"])),
        ("n", with(vec!["0", "-1", "2147483648", "1000000"])),
        ("stop", vec!["5", "true", "[1,2]", "{}", "[\"a\",5]"]),
        ("presence_penalty", vec!["3", "-3", "\"x\""]),
        ("frequency_penalty", vec!["3", "-3", "\"x\""]),
        ("stream", vec!["\"yes\"", "5", "[]"]),
        ("model", vec!["\"nobody\"", "5", "[]"]),
    ]
}

fn http_cases() -> Vec<(&'static str, Vec<u8>)> {
    let mut cases: Vec<(&'static str, Vec<u8>)> = Vec::new();

    let completion = json!({"model": "demo", "prompt": "To be", "max_tokens": 2});
    let mut fields = numeric_fields("max_tokens");
    fields.push((
        "prompt",
        vec![
            "\"\"",
            "[]",
            "5",
            "true",
            "{}",
            "[[]]",
            "[-1]",
            "[2048]",
            "[4294967296]",
            "[1.5]",
            "[\"a\",5]",
            "[[1],[\"a\"]]",
            "[1,\"a\"]",
            "null",
            "[\"\"]",
        ],
    ));
    fields.push(("logprobs", vec!["-1", "100000", "\"x\"", "1.5", "[]"]));
    fields.push(("best_of", vec!["-1", "1000000", "\"x\""]));
    fields.push(("logit_bias", vec!["5", "{\"1\":1000}", "[]", "{\"x\":1}"]));
    fields.push(("echo", vec!["5", "\"x\""]));
    fields.push(("stream_options", vec!["5", "[]", "\"x\""]));
    cases.extend(
        with_fields(&completion, &fields)
            .into_iter()
            .map(|b| ("/v1/completions", b.into_bytes())),
    );

    let chat =
        json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let mut fields = numeric_fields("max_tokens");
    fields.push((
        "messages",
        vec![
            "[]", "5", "null", "{}", "\"hi\"", "[5]", "[[]]", "[{}]", "[{\"role\":\"user\"}]", "[{\"content\":\"hi\"}]",
            "[{\"role\":\"wizard\",\"content\":\"hi\"}]", "[{\"role\":\"user\",\"content\":5}]", "[{\"role\":5,\"content\":\"hi\"}]",
            "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"http://127.0.0.1/x.png\"}}]}]",
            "[{\"role\":\"user\",\"content\":[{\"type\":\"nothing\"}]}]",
        ],
    ));
    fields.push(("top_logprobs", vec!["-1", "100000", "\"x\"", "1.5"]));
    fields.push((
        "max_completion_tokens",
        vec!["-1", "\"x\"", "1e400", "100000000"],
    ));
    fields.push((
        "tools",
        vec![
            "5",
            "[5]",
            "[{\"type\":\"web_search\"}]",
            "[{\"type\":\"function\",\"function\":{\"name\":\"f g\"}}]",
        ],
    ));
    fields.push(("tool_choice", vec!["5", "\"required\"", "\"else\""]));
    fields.push((
        "response_format",
        vec![
            "5",
            "{}",
            "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\"}}",
            "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\",\"schema\":{\"type\":\"wizard\"}}}",
            "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"x\",\"schema\":{\"$ref\":\"http://127.0.0.1/x\"}}}",
        ],
    ));
    fields.push((
        "structured_outputs",
        vec![
            "5",
            "{\"regex\":\"(\"}",
            "{\"regex\":\"\"}",
            "{\"grammar\":\"start: nowhere\"}",
            "{\"choice\":[]}",
            "{\"choice\":[\"\"]}",
            "{\"json\":\"{\"}",
            "{\"regex\":\"a\",\"choice\":[\"b\"]}",
            "{\"structural_tag\":\"x\"}",
        ],
    ));
    fields.push(("priority", vec!["1.5", "\"x\""]));
    fields.push(("timeout_ms", vec!["0", "-1", "\"x\""]));
    fields.push(("user", vec!["5"]));
    cases.extend(
        with_fields(&chat, &fields)
            .into_iter()
            .map(|b| ("/v1/chat/completions", b.into_bytes())),
    );

    let deep_regex = json!({"model": "demo", "prompt": "a", "guided_regex": format!("{}a{}", "(".repeat(50_000), ")".repeat(50_000))});
    let large_schema =
        json!({"model": "demo", "prompt": "a", "guided_json": {"title": "a".repeat(1 << 20)}});
    let endless = json!({"model": "demo", "prompt": "a", "guided_json": {"type": "object"}, "ignore_eos": true});
    for body in [deep_regex, large_schema, endless] {
        cases.push(("/v1/completions", body.to_string().into_bytes()));
    }
    let response = json!({"model": "demo", "input": "hi", "max_output_tokens": 2});
    let fields = [
        (
            "input",
            vec!["5", "[]", "[5]", "[{\"type\":\"item_reference\"}]"],
        ),
        ("store", vec!["true", "5"]),
        ("previous_response_id", vec!["\"resp_1\""]),
        ("max_output_tokens", vec!["0", "-1", "\"x\""]),
        ("text", vec!["5", "{\"format\":{\"type\":\"x\"}}"]),
    ];
    cases.extend(
        with_fields(&response, &fields)
            .into_iter()
            .map(|b| ("/v1/responses", b.into_bytes())),
    );

    // Bodies that are not what they say.
    let deep = format!(
        "{{\"model\":\"demo\",\"prompt\":{}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let long_prompt =
        json!({"model": "demo", "prompt": "thou ".repeat(20_000), "max_tokens": 1}).to_string();
    let many_prompts =
        json!({"model": "demo", "prompt": vec!["a"; 100_000], "max_tokens": 1}).to_string();
    let many_ids =
        json!({"model": "demo", "prompt": vec![5; 1_000_000], "max_tokens": 1}).to_string();
    let many_messages = json!({"model": "demo", "messages": vec![json!({"role": "user", "content": "thou art"}); 50_000], "max_tokens": 1}).to_string();
    for path in [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ] {
        for body in [
            &b""[..],
            b"{",
            b"}",
            b"null",
            b"[]",
            b"5",
            b"\"x\"",
            b"{\"model\":",
            b"{\"model\":\"demo\"",
            b"\xff\xfe{}",
            b"{\"model\":\"\xc3\x28\"}",
            b"{'model':'demo'}",
            b"{\"model\":\"demo\",}",
            b"{}{}",
            b"NaN",
            b"{\"temperature\":NaN}",
            b"\x00\x01\x02",
            b"model=demo&prompt=x",
        ] {
            cases.push((path, body.to_vec()));
        }
        cases.push((path, deep.clone().into_bytes()));
    }
    cases.push(("/v1/completions", long_prompt.into_bytes()));
    cases.push(("/v1/completions", many_prompts.into_bytes()));
    cases.push(("/v1/completions", many_ids.into_bytes()));
    cases.push(("/v1/chat/completions", many_messages.into_bytes()));

    // The small endpoints.
    for body in [
        "{\"prompt\":5}",
        "{\"prompt\":[1]}",
        "{\"messages\":5}",
        "{\"model\":\"nobody\",\"prompt\":\"x\"}",
    ] {
        cases.push(("/tokenize", body.as_bytes().to_vec()));
    }
    for body in [
        "{\"tokens\":\"x\"}",
        "{\"tokens\":[-1]}",
        "{\"tokens\":[2048]}",
        "{\"tokens\":[1.5]}",
        "{\"tokens\":5}",
        "{\"tokens\":null}",
    ] {
        cases.push(("/detokenize", body.as_bytes().to_vec()));
    }
    for path in [
        "/v1/nothing",
        "/",
        "/v1",
        "/v1/completions/x",
        "/v1/embeddings",
        "/../etc/passwd",
        "/%00",
        "/v1/chat",
    ] {
        cases.push((path, b"{}".to_vec()));
    }
    cases
}

fn constraint(form: Form) -> Constraint {
    Constraint {
        form: Some(form),
        after_token: None,
    }
}

fn grpc_cases() -> Vec<(&'static str, GenerateRequest)> {
    let ok = || greedy(2, 0);
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut sampling = ok();
        change(&mut sampling);
        request(&[5, 6], sampling)
    };
    vec![
        (
            "no input",
            GenerateRequest {
                sampling: Some(ok()),
                ..Default::default()
            },
        ),
        ("empty ids", request(&[], ok())),
        (
            "empty text",
            GenerateRequest {
                input: Some(Input::Text(String::new())),
                sampling: Some(ok()),
                ..Default::default()
            },
        ),
        ("id out of vocabulary", request(&[2048], ok())),
        ("id far out of vocabulary", request(&[u32::MAX], ok())),
        (
            "one bad id among many",
            GenerateRequest {
                input: Some(Input::TokenIds(TokenIds {
                    ids: (0..2049).collect(),
                })),
                ..Default::default()
            },
        ),
        ("prompt beyond the context", request(&vec![5; 513], ok())),
        (
            "prompt far beyond the context",
            request(&vec![5; 900_000], ok()),
        ),
        (
            "negative temperature",
            with(&|s| s.temperature = Some(-1.0)),
        ),
        ("nan temperature", with(&|s| s.temperature = Some(f32::NAN))),
        (
            "infinite temperature",
            with(&|s| s.temperature = Some(f32::INFINITY)),
        ),
        ("zero top_p", with(&|s| s.top_p = Some(0.0))),
        ("top_p over one", with(&|s| s.top_p = Some(1.5))),
        ("nan top_p", with(&|s| s.top_p = Some(f32::NAN))),
        ("negative top_p", with(&|s| s.top_p = Some(-0.5))),
        ("too many logprobs", with(&|s| s.logprobs = Some(1_000_000))),
        (
            "too many prompt logprobs",
            with(&|s| s.prompt_logprobs = Some(u32::MAX)),
        ),
        (
            "stop token out of vocabulary",
            with(&|s| s.stop_token_ids = vec![5000]),
        ),
        ("empty stop string", with(&|s| s.stop = vec![String::new()])),
        (
            "a million stop strings",
            with(&|s| s.stop = vec!["x".into(); 100_000]),
        ),
        ("zero max_tokens", with(&|s| s.max_tokens = Some(0))),
        ("huge max_tokens", with(&|s| s.max_tokens = Some(u32::MAX))),
        ("min above max", with(&|s| s.min_tokens = Some(100))),
        (
            "a constraint of nothing",
            with(&|s| s.constraint = Some(Constraint::default())),
        ),
        (
            "a broken regular expression",
            with(&|s| s.constraint = Some(constraint(Form::Regex("(".into())))),
        ),
        (
            "a broken schema",
            with(&|s| s.constraint = Some(constraint(Form::JsonSchema("{".into())))),
        ),
        (
            "a broken grammar",
            with(&|s| s.constraint = Some(constraint(Form::Grammar("start: x".into())))),
        ),
        (
            "no choice",
            with(&|s| s.constraint = Some(constraint(Form::Choice(Choice::default())))),
        ),
        (
            "a constraint without an end",
            with(&|s| {
                s.constraint = Some(constraint(Form::JsonObject(true)));
                s.ignore_eos = true;
            }),
        ),
        (
            "a constraint behind no token",
            with(&|s| {
                s.constraint = Some(Constraint {
                    after_token: Some(5000),
                    ..constraint(Form::JsonObject(true))
                });
            }),
        ),
        (
            "unknown model",
            GenerateRequest {
                model: "nobody".into(),
                ..request(&[5], ok())
            },
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_bad_inputs_are_refused_and_the_server_keeps_serving() {
    let mut cluster = Cluster::up(&demo());
    let good = request(&[0, 839, 30, 203], greedy(8, 2));
    let before = generate(&cluster.grpc, good.clone()).await.unwrap();

    let (http_cases, grpc_cases) = (http_cases(), grpc_cases());
    let total = http_cases.len() + grpc_cases.len();
    assert!(total >= 300, "{total} cases");
    let mut wrong = Vec::new();
    for (path, body) in &http_cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(160)]).into_owned();
        match http::post(&cluster.http, path, body) {
            Err(e) => wrong.push(format!("{path} {shown}: no answer: {e}")),
            Ok(r) if !(400..500).contains(&r.status) => {
                wrong.push(format!("{path} {shown}: {} {}", r.status, r.text()))
            }
            Ok(r) => match serde_json::from_slice::<Value>(&r.body) {
                Ok(v)
                    if v["error"]["message"]
                        .as_str()
                        .is_some_and(|m| !m.is_empty())
                        && v["error"]["type"].is_string() => {}
                _ => wrong.push(format!(
                    "{path} {shown}: {} is not an OpenAI error: {}",
                    r.status,
                    r.text()
                )),
            },
        }
    }
    for (what, bad) in grpc_cases {
        match generate(&cluster.grpc, bad).await {
            Ok(_) => wrong.push(format!("gRPC, {what}: accepted")),
            Err(s)
                if !matches!(
                    s.code(),
                    Code::InvalidArgument
                        | Code::NotFound
                        | Code::OutOfRange
                        | Code::ResourceExhausted
                ) =>
            {
                wrong.push(format!("gRPC, {what}: {s:?}"));
            }
            Err(s) => assert!(!s.message().is_empty(), "{what}"),
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {total} cases:\n{}",
        wrong.len(),
        wrong.join("\n")
    );

    let output = cluster.processes[0].output();
    assert!(!output.contains("panicked"), "{output}");
    assert!(cluster.processes[0].is_running());
    assert_eq!(
        generate(&cluster.grpc, good).await.unwrap(),
        before,
        "the server serves as before"
    );
}

#[test]
fn broken_http_is_answered_or_closed_and_the_server_keeps_serving() {
    let mut cluster = Cluster::up(&demo());
    let requests: Vec<Vec<u8>> = vec![
        b"\r\n\r\n".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n".to_vec(),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n{}".to_vec(),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 4000000000\r\nConnection: close\r\n\r\n{}".to_vec(),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        [b"GET /health HTTP/1.1\r\nX: ".as_slice(), &vec![b'a'; 1 << 20], b"\r\n\r\n"].concat(),
        [b"GET /".as_slice(), &vec![b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n"].concat(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\ngarbage garbage garbage".to_vec(),
    ];
    for request in &requests {
        use std::io::Write;
        let mut stream = std::net::TcpStream::connect(&cluster.http).unwrap();
        let _ = stream.write_all(request);
    }
    let wrong_method = http::raw(
        &cluster.http,
        format!(
            "DELETE /v1/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            cluster.http
        )
        .as_bytes(),
    )
    .unwrap();
    assert_eq!(wrong_method.status, 405);
    let wrong_type = http::post_as(
        &cluster.http,
        "/v1/completions",
        "text/plain",
        b"{\"prompt\":\"x\"}",
    )
    .unwrap();
    assert!((400..500).contains(&wrong_type.status), "{wrong_type:?}");
    assert_eq!(http::get(&cluster.http, "/health").unwrap().status, 200);
    assert!(cluster.processes[0].is_running());
    assert!(!cluster.processes[0].output().contains("panicked"));
}

#[test]
fn text_without_a_tokenizer_is_refused_with_the_way_out() {
    let cluster = Cluster::up(&golden_dir("v3-basic"));
    for (path, body) in [
        (
            "/v1/completions",
            json!({"model": "v3-basic", "prompt": "To be"}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": "v3-basic", "messages": [{"role": "user", "content": "hi"}]}),
        ),
        ("/tokenize", json!({"prompt": "To be"})),
    ] {
        let answer = http::post(&cluster.http, path, body.to_string().as_bytes()).unwrap();
        assert!((400..500).contains(&answer.status), "{path}: {answer:?}");
        let message = answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(message.contains("tokenizer"), "{path}: {message}");
    }
    let ids = http::post(
        &cluster.http,
        "/v1/completions",
        json!({"model": "v3-basic", "prompt": [1, 2, 3], "max_tokens": 4})
            .to_string()
            .as_bytes(),
    )
    .unwrap();
    assert_eq!(ids.status, 200, "{}", ids.text());
}
