//! guild.inference.v1 through a real connection, on the port that serves HTTP too.

use futures::StreamExt;
use guild_coordinator::front::Readiness;
use guild_proto::inference::v1::{
    AbortRequest, FinishReason, GenerateRequest, GenerateResponse, ModelInfoRequest,
    SamplingParams, TokenIds, complete::MatchedStop, generate_request::Input,
    generate_response::Event, inference_client::InferenceClient,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::fake::{Door, Step, door, door_with};

async fn client(door: &Door) -> InferenceClient<Channel> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = door.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    InferenceClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

fn text(text: &str, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::Text(text.into())),
        sampling: Some(sampling),
        ..Default::default()
    }
}

fn ids(ids: &[u32], sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: ids.to_vec() })),
        sampling: Some(sampling),
        ..Default::default()
    }
}

async fn events(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Vec<Event>, Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(response) = stream.next().await {
        let GenerateResponse { event } = response?;
        events.push(event.unwrap());
    }
    Ok(events)
}

#[tokio::test]
async fn text_goes_in_and_text_and_tokens_come_out() {
    let door = door();
    let said = door.will_say("caf\u{e9} 🎉!", 1);
    let mut client = client(&door).await;
    let sampling = SamplingParams {
        max_tokens: Some(50),
        logprobs: Some(1),
        prompt_logprobs: Some(2),
        ..Default::default()
    };
    let request = GenerateRequest {
        request_id: "mine".into(),
        model: "demo".into(),
        ..text("ROMEO:", sampling)
    };
    let events = events(&mut client, request).await.unwrap();
    let prompt_ids = door.text.as_ref().unwrap().encode("ROMEO:").unwrap();
    let Event::Prompt(prompt) = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!(
        (
            &prompt.token_ids,
            prompt.logprobs.len(),
            prompt.request_id.as_str()
        ),
        (&prompt_ids, prompt_ids.len() - 1, "mine")
    );
    let Event::Complete(complete) = events.last().unwrap() else {
        panic!("{events:?}")
    };
    assert_eq!(
        (
            complete.finish_reason(),
            complete.usage.as_ref().unwrap().completion_tokens
        ),
        (FinishReason::Length, said.len() as u32)
    );
    let chunks = || {
        events.iter().filter_map(|e| {
            if let Event::Chunk(c) = e {
                Some(c)
            } else {
                None
            }
        })
    };
    assert_eq!(
        chunks()
            .flat_map(|c| c.token_ids.clone())
            .collect::<Vec<_>>(),
        said
    );
    assert_eq!(
        chunks().map(|c| c.text.as_str()).collect::<String>(),
        "caf\u{e9} 🎉!"
    );
    assert!(chunks().all(|c| c.logprobs.len() == c.token_ids.len()));
    let sampling = door.last_request().sampling.unwrap();
    assert_eq!(
        (sampling.temperature, sampling.seed),
        (Some(0.0), Some(0)),
        "greedy by default"
    );
}

#[tokio::test]
async fn a_stop_string_completes_with_its_name() {
    let door = door();
    door.will_say("to be or not", 1);
    door.fake.steps.lock().unwrap().push(Step::Hang);
    let mut client = client(&door).await;
    let events = events(
        &mut client,
        text(
            "x",
            SamplingParams {
                stop: vec![" or".into()],
                ..Default::default()
            },
        ),
    )
    .await
    .unwrap();
    let Event::Complete(complete) = events.last().unwrap() else {
        panic!("{events:?}")
    };
    assert_eq!(
        (complete.finish_reason(), &complete.matched_stop),
        (
            FinishReason::Stop,
            &Some(MatchedStop::StopString(" or".into()))
        )
    );
    let shown: String = events
        .iter()
        .filter_map(|e| {
            if let Event::Chunk(c) = e {
                Some(c.text.as_str())
            } else {
                None
            }
        })
        .collect();
    assert_eq!(shown, "to be");
    assert_eq!(door.live(), 0);
}

#[tokio::test]
async fn the_model_is_described() {
    let door = door();
    let info = client(&door)
        .await
        .model_info(ModelInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (
            info.model.as_str(),
            info.model_type.as_str(),
            info.digest.as_str()
        ),
        ("demo", "deepseek_v3", "d1")
    );
    assert_eq!(
        (
            info.vocab_size,
            info.max_context,
            info.eos_token_ids,
            info.bos_token_id
        ),
        (2048, 512, vec![1], Some(0))
    );
    assert!(info.has_tokenizer && info.has_chat_template);
}

#[tokio::test]
async fn bad_requests_name_every_field_that_is_wrong() {
    let door = door();
    door.will_say("x", 1);
    let mut client = client(&door).await;
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut sampling = SamplingParams {
            max_tokens: Some(2),
            ..Default::default()
        };
        change(&mut sampling);
        ids(&[5, 6], sampling)
    };
    let none = SamplingParams::default;
    let cases: Vec<(GenerateRequest, &[&str])> = vec![
        (GenerateRequest::default(), &["input"]),
        (ids(&[], none()), &["token_ids"]),
        (text("", none()), &["text"]),
        (ids(&[2048], none()), &["token_ids"]),
        (ids(&[5, u32::MAX], none()), &["token_ids"]),
        (ids(&vec![5; 512], none()), &["token_ids"]),
        (ids(&vec![5; 900_000], none()), &["token_ids"]),
        (text(&"thou ".repeat(20_000), none()), &["text"]),
        (
            GenerateRequest {
                request_id: "x".repeat(1000),
                ..ids(&[5], none())
            },
            &["request_id"],
        ),
        (with(&|s| s.max_tokens = Some(0)), &["sampling.max_tokens"]),
        (
            with(&|s| s.max_tokens = Some(u32::MAX)),
            &["sampling.max_tokens"],
        ),
        (
            with(&|s| s.max_tokens = Some(511)),
            &["sampling.max_tokens"],
        ),
        (
            with(&|s| s.temperature = Some(-1.0)),
            &["sampling.temperature"],
        ),
        (
            with(&|s| s.temperature = Some(f32::NAN)),
            &["sampling.temperature"],
        ),
        (
            with(&|s| s.temperature = Some(f32::INFINITY)),
            &["sampling.temperature"],
        ),
        (with(&|s| s.top_p = Some(0.0)), &["sampling.top_p"]),
        (with(&|s| s.top_p = Some(1.5)), &["sampling.top_p"]),
        (with(&|s| s.top_p = Some(f32::NAN)), &["sampling.top_p"]),
        (
            with(&|s| s.logprobs = Some(1_000_000)),
            &["sampling.logprobs"],
        ),
        (
            with(&|s| s.prompt_logprobs = Some(u32::MAX)),
            &["sampling.prompt_logprobs"],
        ),
        (
            with(&|s| s.stop_token_ids = vec![5000]),
            &["sampling.stop_token_ids"],
        ),
        (
            with(&|s| s.stop_token_ids = vec![5; 1000]),
            &["sampling.stop_token_ids"],
        ),
        (with(&|s| s.stop = vec![String::new()]), &["sampling.stop"]),
        (
            with(&|s| s.stop = vec!["x".repeat(10_000)]),
            &["sampling.stop"],
        ),
        (
            with(&|s| s.stop = vec!["x".into(); 100_000]),
            &["sampling.stop"],
        ),
        (
            with(&|s| s.min_tokens = Some(100)),
            &["sampling.min_tokens"],
        ),
        (
            with(&|s| {
                s.temperature = Some(-1.0);
                s.top_p = Some(7.0);
            }),
            &["sampling.temperature", "sampling.top_p"],
        ),
    ];
    for (request, fields) in cases {
        let status = events(&mut client, request).await.unwrap_err();
        assert_eq!(
            status.code(),
            Code::InvalidArgument,
            "{fields:?} {status:?}"
        );
        assert!(!status.message().is_empty());
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(
            violations
                .iter()
                .map(|v| v.field.as_str())
                .collect::<Vec<_>>(),
            fields
        );
        assert!(violations.iter().all(|v| !v.description.is_empty()));
    }
    assert!(
        door.fake.requests.lock().unwrap().is_empty(),
        "nothing of it reached the cluster"
    );
    let status = events(
        &mut client,
        GenerateRequest {
            model: "nobody".into(),
            ..ids(&[5], none())
        },
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(
        events(&mut client, with(&|_| {})).await.is_ok(),
        "and it serves as before"
    );
}

#[tokio::test]
async fn not_ready_says_why_and_when_to_come_back() {
    let door = door();
    *door.fake.readiness.lock().unwrap() = Readiness::NotReady {
        reason: "no expert nodes have joined".into(),
    };
    let status = events(
        &mut client(&door).await,
        ids(&[5], SamplingParams::default()),
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("no expert nodes"),
        "{}",
        status.message()
    );
    assert!(
        status
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .is_some()
    );
    assert_eq!(status.get_details_error_info().unwrap().reason, "NOT_READY");
}

#[tokio::test]
async fn text_without_a_tokenizer_is_a_failed_precondition() {
    let door = door_with(Default::default(), false);
    door.will(&[Step::Tokens(vec![4, 5])]);
    let mut client = client(&door).await;
    for request in [
        text("hi", SamplingParams::default()),
        ids(
            &[5],
            SamplingParams {
                stop: vec!["x".into()],
                ..Default::default()
            },
        ),
    ] {
        let status = events(&mut client, request).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(
            status.message().contains("token_ids"),
            "{}",
            status.message()
        );
    }
    let events = events(&mut client, ids(&[5], SamplingParams::default()))
        .await
        .unwrap();
    assert!(matches!(&events[1], Event::Chunk(c) if c.token_ids == [4, 5] && c.text.is_empty()));
}

#[tokio::test]
async fn errors_of_the_cluster_pass_with_their_details() {
    let door = door();
    door.will(&[
        Step::Tokens(vec![70]),
        Step::Fail(Status::unavailable("expert node b is gone")),
    ]);
    let mut client = client(&door).await;
    let status = events(&mut client, ids(&[5], SamplingParams::default()))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "expert node b is gone")
    );
    *door.fake.refusal.lock().unwrap() = Some(Status::resource_exhausted("queue full"));
    let status = events(&mut client, ids(&[5], SamplingParams::default()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_request() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::Hang]);
    let mut client = client(&door).await;
    let mut stream = client
        .generate(ids(&[5], SamplingParams::default()))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    assert_eq!(door.live(), 1);
    drop(stream);
    while door.live() > 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn drafts_up_to_a_cut_are_told_and_counted() {
    let door = door();
    door.will_say("to be or not", 1);
    {
        let mut steps = door.fake.steps.lock().unwrap();
        steps.insert(0, Step::Drafts(4, 3));
        steps.push(Step::Drafts(40, 30));
        steps.push(Step::Hang);
    }
    let sampling = SamplingParams {
        stop: vec![" or".into()],
        ..Default::default()
    };
    let mut client = client(&door).await;
    let events = events(&mut client, text("x", sampling)).await.unwrap();
    let Some(Event::Complete(complete)) = events.last() else {
        panic!("{events:?}")
    };
    let usage = complete.usage.as_ref().unwrap();
    assert_eq!(
        (&usage.drafted_tokens[..], &usage.accepted_tokens[..]),
        (&[4][..], &[3][..])
    );
    let page = door.front.page().text().unwrap();
    for series in [
        "draft_tokens_total{model_name=\"demo\"} 4",
        "accepted_tokens_total{model_name=\"demo\"} 3",
    ] {
        assert!(
            page.contains(&format!("guild_spec_decode_num_{series}\n")),
            "{page}"
        );
    }
}

#[tokio::test]
async fn a_request_is_aborted_by_its_id_and_only_by_its_owner() {
    let door = door();
    let said = door.will_say("to be or not", 1);
    door.fake.steps.lock().unwrap().push(Step::Hang);
    let mut client = client(&door).await;
    let named = GenerateRequest {
        request_id: "mine".into(),
        ..text("x", SamplingParams::default())
    };
    for chosen in [true, false] {
        let asked = GenerateRequest {
            request_id: if chosen { "mine".into() } else { String::new() },
            ..named.clone()
        };
        let response = client.generate(asked).await.unwrap();
        let id = response.metadata().get("x-request-id").unwrap();
        let id = id.to_str().unwrap().to_owned();
        assert_eq!(id == "mine", chosen, "{id}");
        let mut stream = response.into_inner();
        let mut tokens = 0;
        while tokens < said.len() {
            let event = stream.next().await.unwrap().unwrap().event.unwrap();
            if let Event::Chunk(chunk) = event {
                tokens += chunk.token_ids.len();
            }
        }
        let abort = |request_id: &str| AbortRequest {
            request_id: request_id.into(),
            // A client does not say who it is.
            owner: 7,
        };
        let mut stranger = tonic::Request::new(abort(&id));
        let key = "Bearer another".parse().unwrap();
        stranger.metadata_mut().insert("authorization", key);
        for (request, aborted) in [
            (stranger, 0),
            (tonic::Request::new(abort("nobody")), 0),
            (tonic::Request::new(abort("elsewhere")), 1),
            (tonic::Request::new(abort(&id)), 1),
            (tonic::Request::new(abort(&id)), 0),
        ] {
            let answer = client.abort(request).await.unwrap().into_inner();
            assert_eq!(answer.aborted, aborted);
        }
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = event.unwrap().event;
        }
        let Some(Event::Complete(complete)) = last else {
            panic!("{last:?}")
        };
        let usage = complete.usage.as_ref().unwrap();
        assert_eq!(
            (complete.finish_reason(), usage.completion_tokens as usize),
            (FinishReason::Abort, said.len())
        );
        assert_eq!(door.live(), 0, "the cluster was told");
        let elsewhere = std::mem::take(&mut *door.fake.aborts.lock().unwrap());
        let asked: Vec<_> = elsewhere.iter().map(|a| &a.request_id[..]).collect();
        assert_eq!(
            asked,
            [&id[..], "nobody", "elsewhere", &id],
            "what is not here"
        );
        let stranger = elsewhere[0].owner;
        assert!(elsewhere[1..].iter().all(|a| a.owner == 0) && stranger != 0);
        let ended_by = door.fake.requests.lock().unwrap().pop().unwrap().ended_by;
        assert_eq!(
            ended_by,
            Some(AbortRequest {
                request_id: id,
                owner: 0
            })
        );
    }
}

#[tokio::test]
async fn a_request_of_the_other_api_is_aborted_by_its_id_too() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::Hang]);
    let mut client = client(&door).await;
    let body = serde_json::json!({"model": "demo", "prompt": [5, 6], "n": 2, "stream": true});
    let request = axum::http::Request::post("/v1/completions")
        .header("content-type", "application/json")
        .body(axum::body::Body::from(body.to_string()))
        .unwrap();
    let response = tower::ServiceExt::oneshot(door.router.clone(), request);
    let mut body = response.await.unwrap().into_body().into_data_stream();
    let first = String::from_utf8(body.next().await.unwrap().unwrap().to_vec()).unwrap();
    let data = first.lines().find_map(|line| line.strip_prefix("data: "));
    let chunk: serde_json::Value = serde_json::from_str(data.unwrap()).unwrap();
    let request_id = chunk["id"].as_str().unwrap().to_owned();
    let answer = client
        .abort(AbortRequest {
            request_id,
            owner: 0,
        })
        .await
        .unwrap();
    assert_eq!(answer.into_inner().aborted, 2, "both choices");
    let mut rest = String::new();
    while let Some(bytes) = body.next().await {
        rest.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
    }
    assert_eq!(
        rest.matches("\"finish_reason\":\"abort\"").count(),
        2,
        "{rest}"
    );
    assert!(rest.trim_end().ends_with("[DONE]"));
    assert_eq!(door.live(), 0);
}

#[tokio::test]
async fn the_timeout_of_the_call_is_the_deadline_of_the_stream() {
    let door = door();
    door.will(&[Step::Tokens(vec![70]), Step::Hang]);
    let mut client = client(&door).await;
    for (own, call, shorter) in [
        (None, "80m", 80),
        (Some(60_000), "80m", 80),
        (Some(80), "9S", 80),
    ] {
        let mut request = tonic::Request::new(GenerateRequest {
            timeout_ms: own,
            ..ids(&[5], SamplingParams::default())
        });
        // Not by set_timeout: that would end the call at the client.
        let header = call.parse().unwrap();
        request.metadata_mut().insert("grpc-timeout", header);
        let mut stream = client.generate(request).await.unwrap().into_inner();
        let status = loop {
            match stream.next().await.unwrap() {
                Ok(_) => {}
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::DeadlineExceeded, "{own:?} {call}");
        let handed_down = door.last_request().timeout_ms.unwrap();
        assert!(handed_down <= shorter, "{handed_down}");
        while door.live() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented() {
    let door = door();
    let request = axum::http::Request::post("/guild.other.v1.Other/Do")
        .header("content-type", "application/grpc")
        .body(axum::body::Body::empty())
        .unwrap();
    let answer = door.send(request).await;
    assert_eq!(
        (
            answer.status.as_u16(),
            answer.headers["grpc-status"].to_str().unwrap()
        ),
        (200, "12")
    );
}
