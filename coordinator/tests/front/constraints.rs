//! What an output has to be: the same to the cluster, whatever API says it; and how a request is
//! treated among others.

use guild_coordinator::front::FrontLimits;
use guild_proto::inference::v1::{Choice, constraint::Form};
use serde_json::{Value, json};
use tonic_types::{ErrorDetails, StatusExt};

use crate::fake::{Step, door, door_with};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn with(path: &str, more: &Value) -> Value {
    let mut body = match path {
        COMPLETIONS => json!({"prompt": "a"}),
        _ => json!({"messages": [{"role": "user", "content": "a"}]}),
    };
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn every_way_to_say_it_is_the_same_constraint() {
    let door = door();
    door.will_say("x", 1);
    let schema = json!({"type": "object"});
    let text = schema.to_string();
    let choice = Form::Choice(Choice {
        texts: vec!["a".into(), "b".into()],
    });
    let cases = [
        (
            json!({"response_format": {"type": "json_object"}}),
            Form::JsonObject(true),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}}}),
            Form::JsonSchema(text.clone()),
        ),
        (
            json!({"structured_outputs": {"json": schema}}),
            Form::JsonSchema(text.clone()),
        ),
        (
            json!({"structured_outputs": {"json": text}}),
            Form::JsonSchema(text.clone()),
        ),
        (
            json!({"structured_outputs": {"json_object": true}}),
            Form::JsonObject(true),
        ),
        (
            json!({"structured_outputs": {"regex": "a+"}}),
            Form::Regex("a+".into()),
        ),
        (
            json!({"structured_outputs": {"grammar": "start: \"a\""}}),
            Form::Grammar("start: \"a\"".into()),
        ),
        (
            json!({"structured_outputs": {"choice": ["a", "b"]}}),
            choice.clone(),
        ),
        (json!({"guided_json": schema}), Form::JsonSchema(text)),
        (json!({"guided_regex": "a+"}), Form::Regex("a+".into())),
        (
            json!({"guided_grammar": "start: \"a\""}),
            Form::Grammar("start: \"a\"".into()),
        ),
        (json!({"guided_choice": ["a", "b"]}), choice),
    ];
    for (more, form) in cases {
        for path in [COMPLETIONS, CHAT] {
            door.ok(path, with(path, &more)).await;
            let constraint = door.last_request().sampling.unwrap().constraint.unwrap();
            assert_eq!(
                (constraint.form, constraint.after_token),
                (Some(form.clone()), None),
                "{more}"
            );
        }
    }
    for more in [
        json!({}),
        json!({"response_format": {"type": "text"}}),
        json!({"structured_outputs": null}),
    ] {
        door.ok(CHAT, with(CHAT, &more)).await;
        assert!(
            door.last_request().sampling.unwrap().constraint.is_none(),
            "{more}"
        );
    }
}

#[tokio::test]
async fn what_the_cluster_says_of_a_grammar_names_the_clients_field() {
    let door = door();
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation("sampling.constraint.json_schema", "no such type");
    let status =
        tonic::Status::with_error_details(tonic::Code::InvalidArgument, "no such type", details);
    *door.fake.refusal.lock().unwrap() = Some(status);
    let format = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}});
    for (path, more, field) in [
        (CHAT, format, "response_format"),
        (
            COMPLETIONS,
            json!({"guided_json": {"type": "y"}}),
            "guided_json",
        ),
        (
            CHAT,
            json!({"structured_outputs": {"json": {"type": "y"}}}),
            "structured_outputs.json",
        ),
    ] {
        let (status, param, message) = door.refused(path, with(path, &more)).await;
        assert_eq!((status, param.as_deref()), (400, Some(field)), "{message}");
    }
}

#[tokio::test]
async fn the_best_of_several_come_first() {
    let door = door();
    // The fake finds lower ids more probable, and says the same to everybody.
    door.will(&[Step::Tokens(vec![40, 41])]);
    let body = json!({"prompt": "a", "n": 2, "best_of": 5, "max_tokens": 2});
    let whole = door.ok(COMPLETIONS, body).await;
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(
        (&choices[0]["index"], &choices[1]["index"]),
        (&json!(0), &json!(1))
    );
    assert!(choices[0]["logprobs"].is_null(), "nobody asked for them");
    assert_eq!(whole["usage"]["completion_tokens"], 10, "all were made");
    assert_eq!(door.fake.requests.lock().unwrap().len(), 5);
    assert_eq!(door.last_request().sampling.unwrap().logprobs, Some(0));
    let two = json!({"prompt": ["a", "b"], "n": 1, "best_of": 2, "max_tokens": 2, "logprobs": 1});
    let whole = door.ok(COMPLETIONS, two).await;
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert!(
        choices
            .iter()
            .all(|c| c["logprobs"]["tokens"].as_array().unwrap().len() == 2)
    );
}

#[tokio::test]
async fn handling_reaches_the_cluster() {
    let door = door();
    door.will_say("x", 1);
    let more = json!({"priority": -3, "user": "ann", "timeout_ms": 60_000, "max_queue_ms": 500});
    door.ok(CHAT, with(CHAT, &more)).await;
    let asked = door.last_request();
    assert_eq!((asked.priority, asked.max_queue_ms), (-3, Some(500)));
    assert!((50_000..=60_000).contains(&asked.timeout_ms.unwrap()));
    let ann = asked.tenant;
    door.ok(COMPLETIONS, with(COMPLETIONS, &json!({"user": "ann"})))
        .await;
    assert_eq!(door.last_request().tenant, ann);
    door.ok(
        COMPLETIONS,
        with(COMPLETIONS, &json!({"user": "ann", "cache_salt": "s"})),
    )
    .await;
    assert_ne!(door.last_request().tenant, ann);
    door.ok(COMPLETIONS, with(COMPLETIONS, &json!({}))).await;
    let plain = door.last_request();
    assert_eq!(
        (plain.tenant, plain.priority, plain.timeout_ms),
        (0, 0, None)
    );
    assert_ne!(ann, 0);
}

#[tokio::test]
async fn timings_come_when_asked_for() {
    let door = door();
    door.will_say("one two", 1);
    let whole = door
        .ok(COMPLETIONS, json!({"prompt": "a", "timings": true, "n": 2}))
        .await;
    let (first, total) = (
        &whole["timings"]["first_token_ms"],
        &whole["timings"]["total_ms"],
    );
    assert!(
        first.as_f64().unwrap() <= total.as_f64().unwrap(),
        "{whole}"
    );
    let options =
        json!({"stream": true, "stream_options": {"include_usage": true}, "timings": true});
    let chunks = door.post(CHAT, with(CHAT, &options)).await.chunks();
    assert!(chunks.last().unwrap()["timings"]["total_ms"].is_number());
    assert!(chunks[0]["timings"].is_null());
    assert!(door.ok(COMPLETIONS, json!({"prompt": "a"})).await["timings"].is_null());
}

#[tokio::test]
async fn a_request_that_takes_too_long_ends_and_lets_go() {
    let door = door_with(FrontLimits::default(), true);
    door.will(&[Step::Tokens(vec![40]), Step::Hang]);
    let (status, _, message) = door
        .refused(COMPLETIONS, json!({"prompt": "a", "timeout_ms": 50}))
        .await;
    assert_eq!(status, 504, "{message}");
    assert!(message.contains("timeout_ms"), "{message}");
    assert_eq!(door.live(), 0);
    assert_eq!(door.front.in_flight(), 0);
}
