//! Models, health, readiness, overload, errors on the way, disconnects, routes.

use std::time::Duration;

use axum::{body::Body, http::Request};
use guild_coordinator::front::{FrontLimits, Readiness, TABLE};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::fake::{Door, Step, door, door_with};

const COMPLETIONS: &str = "/v1/completions";

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

#[tokio::test]
async fn the_model_is_listed_and_found_by_its_name() {
    let door = door();
    let list = door.get("/v1/models").await.json();
    assert_eq!(
        (&list["object"], list["data"].as_array().unwrap().len()),
        (&json!("list"), 1)
    );
    let model = door.get("/v1/models/demo").await.json();
    assert_eq!(model, list["data"][0]);
    assert_eq!(
        (&model["id"], &model["object"], &model["max_model_len"]),
        (&json!("demo"), &json!("model"), &json!(512))
    );
    for id in ["nobody", "org/nobody", "DEMO"] {
        let answer = door.get(&format!("/v1/models/{id}")).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (404, &json!("model_not_found"))
        );
    }
    for (path, mut body) in [
        (COMPLETIONS, json!({"prompt": "a"})),
        ("/v1/chat/completions", chat()),
        ("/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"tokens": [1]})),
    ] {
        body["model"] = "nobody".into();
        let (status, param, message) = door.refused(path, body).await;
        assert_eq!((status, param.as_deref()), (404, Some("model")));
        assert!(
            message.contains("nobody") && message.contains("demo"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn readiness_tells_the_truth() {
    let door = door();
    assert_eq!(door.get("/health").await.status, 200);
    assert_eq!(door.get("/ping").await.status, 200);
    assert!(door.get("/version").await.json()["version"].is_string());
    *door.fake.readiness.lock().unwrap() = Readiness::NotReady {
        reason: "waiting for 2 expert nodes".into(),
    };
    for answer in [
        door.get("/health").await,
        door.post(COMPLETIONS, json!({"prompt": "a"})).await,
        door.post("/v1/chat/completions", chat()).await,
    ] {
        assert_eq!(answer.status, 503);
        assert!(
            answer.headers["retry-after"]
                .to_str()
                .unwrap()
                .parse::<u64>()
                .unwrap()
                > 0
        );
        let error = &answer.json()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("service_unavailable"), &json!("not_ready"))
        );
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .contains("waiting for 2 expert nodes")
        );
    }
    assert_eq!(door.get("/v1/models").await.status, 200);
    assert_eq!(
        door.post("/tokenize", json!({"prompt": "a"})).await.status,
        200,
        "text needs no cluster"
    );
    assert_eq!(
        door.post(COMPLETIONS, json!({"prompt": 5})).await.status,
        400,
        "a bad request is bad in any case"
    );
}

#[tokio::test]
async fn requests_beyond_the_limit_are_refused_at_once_and_room_comes_back() {
    let door = door_with(
        FrontLimits {
            max_in_flight: 2,
            ..FrontLimits::default()
        },
        true,
    );
    door.will(&[Step::Tokens(vec![70]), Step::Hang]);
    let open = |door: &Door| {
        let router = door.router.clone();
        let request = Request::post(COMPLETIONS)
            .header("content-type", "application/json")
            .body(Body::from(
                json!({"prompt": "a", "stream": true}).to_string(),
            ))
            .unwrap();
        async move { tower::ServiceExt::oneshot(router, request).await.unwrap() }
    };
    let (first, second) = (open(&door).await, open(&door).await);
    assert_eq!(
        (
            first.status().as_u16(),
            second.status().as_u16(),
            door.front.in_flight()
        ),
        (200, 200, 2)
    );
    let answer = door.post(COMPLETIONS, json!({"prompt": "a"})).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["error"]["code"]),
        (503, &json!("overloaded"))
    );
    assert!(answer.headers.contains_key("retry-after"));
    drop(first);
    assert_eq!(
        (door.front.in_flight(), door.live()),
        (1, 1),
        "a dropped answer frees its place"
    );
    door.will_say("x", 1);
    door.ok(COMPLETIONS, json!({"prompt": "a"})).await;
    assert_eq!(door.front.in_flight(), 1);
    let (status, param, _) = door
        .refused(COMPLETIONS, json!({"prompt": "a", "n": 3}))
        .await;
    assert_eq!(
        (status, param.as_deref()),
        (400, Some("n")),
        "what can never fit is a bad request"
    );
}

#[tokio::test]
async fn every_status_of_the_cluster_becomes_the_error_of_its_row() {
    let door = door();
    for row in TABLE {
        for (path, body) in [
            (COMPLETIONS, json!({"prompt": "a"})),
            ("/v1/chat/completions", chat()),
        ] {
            *door.fake.refusal.lock().unwrap() = Some(Status::new(row.code, "because"));
            let refused = door.post(path, body.clone()).await;
            *door.fake.refusal.lock().unwrap() = None;
            door.will(&[
                Step::Tokens(vec![70]),
                Step::Fail(Status::new(row.code, "because")),
            ]);
            let failed = door.post(path, body.clone()).await;
            for answer in [refused, failed] {
                assert_eq!(answer.status.as_u16(), row.http, "{:?}", row.code);
                let error = &answer.json()["error"];
                assert_eq!(
                    (&error["message"], &error["type"], &error["code"]),
                    (&json!("because"), &json!(row.kind), &json!(row.reason))
                );
                assert_eq!(answer.headers.contains_key("retry-after"), row.http == 503);
            }
            let mut streaming = body;
            streaming["stream"] = true.into();
            let answer = door.post(path, streaming).await;
            assert_eq!(answer.status, 200);
            let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
            assert_eq!(
                (&last["error"]["message"], &last["error"]["type"]),
                (&json!("because"), &json!(row.kind)),
                "the stream ends with the error"
            );
            assert_eq!(door.live(), 0);
        }
    }
}

#[tokio::test]
async fn fields_that_the_cluster_refuses_have_the_clients_names() {
    let door = door();
    let refusal = |field: &str| {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation(field, "no");
        Some(Status::with_error_details(
            Code::InvalidArgument,
            "no",
            details,
        ))
    };
    for (path, body, field, param) in [
        (COMPLETIONS, json!({"prompt": "a"}), "token_ids", "prompt"),
        (
            COMPLETIONS,
            json!({"prompt": "a"}),
            "sampling.top_p",
            "top_p",
        ),
        ("/v1/chat/completions", chat(), "token_ids", "messages"),
        (
            "/v1/chat/completions",
            chat(),
            "sampling.logprobs",
            "top_logprobs",
        ),
    ] {
        *door.fake.refusal.lock().unwrap() = refusal(field);
        assert_eq!(door.refused(path, body).await.1.as_deref(), Some(param));
    }
}

#[tokio::test]
async fn a_cluster_that_breaks_off_is_an_error_not_a_short_answer() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::End]);
    let (status, _, message) = door.refused(COMPLETIONS, json!({"prompt": "a"})).await;
    assert_eq!(status, 503, "{message}");
    let answer = door
        .post(COMPLETIONS, json!({"prompt": "a", "stream": true}))
        .await;
    let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "service_unavailable");
}

#[tokio::test]
async fn one_failing_choice_ends_all_of_them() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::Fail(Status::internal("bug"))]);
    assert_eq!(
        door.refused(COMPLETIONS, json!({"prompt": ["a", "b", "c"]}))
            .await
            .0,
        500
    );
    let answer = door
        .post(
            COMPLETIONS,
            json!({"prompt": ["a", "b", "c"], "stream": true}),
        )
        .await;
    let errors = answer
        .events()
        .iter()
        .filter(|e| e.contains("\"error\""))
        .count();
    assert_eq!((errors, door.live(), door.front.in_flight()), (1, 0, 0));
}

async fn serve(door: &Door) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = door.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it did not come about");
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_streaming_or_not() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::Hang]);
    let address = serve(&door).await;
    for stream in [true, false] {
        let body = json!({"prompt": ["a", "b"], "stream": stream}).to_string();
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        if stream {
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains("data: ") {
                assert_ne!(socket.read_buf(&mut seen).await.unwrap(), 0);
            }
        }
        wait_until(|| door.live() == 2).await;
        drop(socket);
        wait_until(|| door.live() == 0 && door.front.in_flight() == 0).await;
    }
}

#[tokio::test]
async fn routes_methods_sizes_and_media_types_have_errors_of_their_own() {
    let door = door_with(
        FrontLimits {
            max_body_bytes: 1000,
            ..FrontLimits::default()
        },
        true,
    );
    for path in [
        "/",
        "/v1",
        "/v1/nothing",
        "/v1/completions/x",
        "/v1/embeddings",
        "/%00",
        "/..%2f..%2fetc/passwd",
    ] {
        let answer = door.get(path).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (404, &json!("unknown_url")),
            "{path}"
        );
    }
    for (method, path) in [
        ("DELETE", COMPLETIONS),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("PUT", "/health"),
        ("GET", "/tokenize"),
    ] {
        let answer = door
            .send(
                Request::builder()
                    .method(method)
                    .uri(path)
                    .body(Body::empty())
                    .unwrap(),
            )
            .await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (405, &json!("method_not_allowed")),
            "{method} {path}"
        );
    }
    let large = door
        .post(COMPLETIONS, json!({"prompt": "x".repeat(2000)}))
        .await;
    assert_eq!(
        (large.status.as_u16(), &large.json()["error"]["code"]),
        (413, &json!("body_too_large"))
    );
    for media_type in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("\u{e9}"),
    ] {
        let mut request = Request::post(COMPLETIONS);
        if let Some(t) = media_type {
            request = request.header(
                "content-type",
                axum::http::HeaderValue::from_bytes(t.as_bytes()).unwrap(),
            );
        }
        let answer = door
            .send(request.body(Body::from(r#"{"prompt":"x"}"#)).unwrap())
            .await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (415, &json!("unsupported_media_type"))
        );
    }
    door.will_say("x", 1);
    let request = Request::post(COMPLETIONS)
        .header("content-type", "Application/JSON; charset=utf-8")
        .body(Body::from(r#"{"prompt":"x"}"#))
        .unwrap();
    assert_eq!(door.send(request).await.status, 200);
}
