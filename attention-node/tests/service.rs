//! The inference service at the node's door: what it refuses, and how results look on the wire.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{DEADLINE, Model, Rig, limits};
use futures::StreamExt;
use guild_attention_node::sequence::MAX_TOP_LOGPROBS;
use guild_attention_node::service::{Inference, MAX_REQUEST_ID, MAX_STOP_TOKENS, Phase};
use guild_node::status::{reason_of, retry_after};
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_server::Inference as _;
use guild_proto::inference::v1::{
    AbortRequest, Complete, FinishReason, GenerateRequest, ModelInfoRequest, SamplingParams,
    TokenIds, complete,
};
use guild_scheduler::batch::Limits;
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

fn call(ids: Vec<u32>, sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids })),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

fn max(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

fn service(phase: Phase) -> (Inference, watch::Sender<Phase>) {
    let config = Arc::new(Model::v3_basic().trunk.config().clone());
    let (says, hears) = watch::channel(phase);
    (Inference::new(config, "tiny", hears), says)
}

fn serving(rig: &Rig) -> Inference {
    let (engine, digest) = (rig.engine.clone(), "d1gest".to_owned());
    service(Phase::Serving { engine, digest }).0
}

async fn generate(service: &Inference, call: GenerateRequest) -> Result<Vec<Event>, Status> {
    let mut stream = service.generate(Request::new(call)).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event?.event.unwrap());
    }
    Ok(events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_answered_with_prompt_chunks_and_complete() {
    let rig = Rig::new(Model::v3_basic());
    let service = serving(&rig);
    let sampling = SamplingParams {
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..max(3)
    };
    let mut asked = call(vec![5, 6, 7], sampling);
    asked.request_id = "mine".to_owned();
    asked.model = "tiny".to_owned();
    let events = generate(&service, asked).await.unwrap();
    let [
        Event::Prompt(prompt),
        Event::Chunk(a),
        Event::Chunk(b),
        Event::Chunk(c),
        Event::Complete(end),
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(
        (prompt.request_id.as_str(), &prompt.token_ids[..]),
        ("mine", &[5, 6, 7][..])
    );
    let scored: Vec<_> = prompt
        .logprobs
        .iter()
        .map(|l| (l.token_id, l.top.len()))
        .collect();
    assert_eq!(scored, [(6, 1), (7, 1)]);
    for chunk in [a, b, c] {
        assert_eq!((chunk.token_ids.len(), chunk.text.as_str()), (1, ""));
        let [logprobs] = &chunk.logprobs[..] else {
            panic!("{chunk:?}")
        };
        assert_eq!(logprobs.token_id, chunk.token_ids[0]);
        // Greedy: the chosen token is the most probable one.
        assert_eq!(
            (logprobs.top[0].token_id, logprobs.top.len()),
            (logprobs.token_id, 2)
        );
        assert_eq!(logprobs.top[0].logprob, logprobs.logprob);
    }
    let usage = end.usage.as_ref().unwrap();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 3));
    assert_eq!(
        (end.finish_reason(), end.matched_stop.is_none()),
        (FinishReason::Length, true)
    );

    // Stopped by a token that is named as one.
    let stop = SamplingParams {
        stop_token_ids: vec![b.token_ids[0]],
        ..max(9)
    };
    let events = generate(&service, call(vec![5, 6, 7], stop)).await.unwrap();
    let Some(Event::Complete(Complete {
        finish_reason,
        matched_stop,
        ..
    })) = events.last()
    else {
        panic!("{events:?}");
    };
    assert_eq!(*finish_reason, FinishReason::Stop as i32);
    let stop = complete::MatchedStop::StopTokenId(b.token_ids[0]);
    assert_eq!(*matched_stop, Some(stop));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_max_tokens_the_context_is_filled_and_eos_counts_unless_ignored() {
    let model = Model::v3_basic();
    let small = Limits {
        max_context: 40,
        ..limits()
    };
    let rig = Rig::with(model, small, model.deal(1, 1, 2, 0), DEADLINE);
    let service = serving(&rig);
    let ignore = SamplingParams {
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let events = generate(&service, call(vec![5, 6, 7], ignore))
        .await
        .unwrap();
    assert_eq!(events.len(), 1 + 37 + 1);

    // A seed whose output holds EOS: with EOS counting it ends there.
    let eos = model.trunk.config().eos_token_ids[0];
    let hot = |seed, ignore_eos| SamplingParams {
        temperature: Some(3.0),
        seed: Some(seed),
        ignore_eos,
        ..SamplingParams::default()
    };
    let ids = |events: &[Event]| -> Vec<u32> {
        let ids = |event: &Event| match event {
            Event::Chunk(chunk) => chunk.token_ids.clone(),
            _ => Vec::new(),
        };
        events.iter().flat_map(ids).collect()
    };
    for seed in 0..1000 {
        let whole = ids(&generate(&service, call(vec![5], hot(seed, true)))
            .await
            .unwrap());
        if let Some(at) = whole.iter().position(|&token| token == eos) {
            let ended = generate(&service, call(vec![5], hot(seed, false)))
                .await
                .unwrap();
            assert_eq!(ids(&ended), whole[..=at]);
            return;
        }
    }
    panic!("EOS never came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_kv_memory_ends_before_the_context_so_does_the_output() {
    let model = Model::v3_basic();
    let small = Limits {
        pages: 2,
        ..limits()
    };
    let rig = Rig::with(model, small, model.deal(1, 1, 2, 0), DEADLINE);
    let service = serving(&rig);
    for asked in [None, Some(100)] {
        let sampling = SamplingParams {
            max_tokens: asked,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let events = generate(&service, call(vec![5, 6, 7], sampling))
            .await
            .unwrap();
        let Some(Event::Complete(end)) = events.last() else {
            panic!("{events:?}")
        };
        assert_eq!(end.finish_reason(), FinishReason::Length);
        assert_eq!(end.usage.as_ref().unwrap().completion_tokens, 29);
    }
    let full = generate(&service, call(vec![1; 32], max(0))).await.unwrap();
    assert!(matches!(full.last(), Some(Event::Complete(_))));
    for (prompt, asked) in [(32, 1), (33, 0)] {
        let status = generate(&service, call(vec![1; prompt], max(asked)))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("KV memory"), "{status:?}");
    }
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_by_the_field() {
    let rig = Rig::new(Model::v3_basic());
    let service = serving(&rig);
    let ok = || vec![1, 2, 3];
    let d = SamplingParams::default;
    let no_input = GenerateRequest {
        input: None,
        ..call(ok(), d())
    };
    let text = GenerateRequest {
        input: Some(Input::Text("hi".into())),
        ..call(ok(), d())
    };
    let long_id = GenerateRequest {
        request_id: "x".repeat(MAX_REQUEST_ID + 1),
        ..call(ok(), d())
    };
    let more_output = GenerateRequest {
        output_tokens: 4,
        ..call(ok(), d())
    };
    let shaped = |change: fn(&mut SamplingParams)| {
        let mut sampling = d();
        change(&mut sampling);
        call(ok(), sampling)
    };
    let many = MAX_TOP_LOGPROBS as u32 + 1;
    let cases = [
        ("token_ids", no_input),
        ("text", text),
        ("request_id", long_id),
        ("token_ids", call(vec![], d())),
        ("token_ids", call(vec![1, 320], d())),
        ("token_ids", call(vec![1, u32::MAX], d())),
        ("token_ids", call(vec![1; 257], d())),
        ("token_ids", call(vec![1; 257], max(0))),
        ("output_tokens", more_output),
        ("sampling.min_p", shaped(|s| s.min_p = Some(1.5))),
        ("sampling.min_p", shaped(|s| s.min_p = Some(f32::NAN))),
        (
            "sampling.repetition_penalty",
            shaped(|s| s.repetition_penalty = Some(0.0)),
        ),
        (
            "sampling.presence_penalty",
            shaped(|s| s.presence_penalty = Some(f32::INFINITY)),
        ),
        (
            "sampling.frequency_penalty",
            shaped(|s| s.frequency_penalty = Some(f32::NAN)),
        ),
        (
            "sampling.logit_bias",
            shaped(|s| s.logit_bias = [(320, 1.0)].into()),
        ),
        (
            "sampling.logit_bias",
            shaped(|s| s.logit_bias = [(3, f32::NAN)].into()),
        ),
        ("sampling.max_tokens", call(vec![1; 256], d())),
        ("sampling.max_tokens", call(ok(), max(254))),
        ("sampling.max_tokens", call(ok(), max(u32::MAX))),
        (
            "sampling.temperature",
            call(
                ok(),
                SamplingParams {
                    temperature: Some(-0.1),
                    ..d()
                },
            ),
        ),
        (
            "sampling.temperature",
            call(
                ok(),
                SamplingParams {
                    temperature: Some(f32::NAN),
                    ..d()
                },
            ),
        ),
        (
            "sampling.temperature",
            call(
                ok(),
                SamplingParams {
                    temperature: Some(f32::INFINITY),
                    ..d()
                },
            ),
        ),
        (
            "sampling.top_p",
            call(
                ok(),
                SamplingParams {
                    top_p: Some(0.0),
                    ..d()
                },
            ),
        ),
        (
            "sampling.top_p",
            call(
                ok(),
                SamplingParams {
                    top_p: Some(1.1),
                    ..d()
                },
            ),
        ),
        (
            "sampling.top_p",
            call(
                ok(),
                SamplingParams {
                    top_p: Some(f32::NAN),
                    ..d()
                },
            ),
        ),
        (
            "sampling.stop",
            call(
                ok(),
                SamplingParams {
                    stop: vec!["x".into()],
                    ..d()
                },
            ),
        ),
        (
            "sampling.stop_token_ids",
            call(
                ok(),
                SamplingParams {
                    stop_token_ids: vec![320],
                    ..d()
                },
            ),
        ),
        (
            "sampling.stop_token_ids",
            call(
                ok(),
                SamplingParams {
                    stop_token_ids: vec![1; MAX_STOP_TOKENS + 1],
                    ..d()
                },
            ),
        ),
        (
            "sampling.min_tokens",
            call(
                ok(),
                SamplingParams {
                    min_tokens: Some(5),
                    ..max(4)
                },
            ),
        ),
        (
            "sampling.logprobs",
            call(
                ok(),
                SamplingParams {
                    logprobs: Some(many),
                    ..d()
                },
            ),
        ),
        (
            "sampling.prompt_logprobs",
            call(
                ok(),
                SamplingParams {
                    prompt_logprobs: Some(many),
                    ..d()
                },
            ),
        ),
    ];
    for (field, bad) in cases {
        let shown = format!("{bad:?}");
        let status = generate(&service, bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{shown}");
        let named = status.get_details_bad_request().unwrap().field_violations[0]
            .field
            .clone();
        assert_eq!(named, field, "{shown}");
    }
    let other = GenerateRequest {
        model: "huge".into(),
        ..call(ok(), d())
    };
    assert_eq!(
        generate(&service, other).await.unwrap_err().code(),
        Code::NotFound
    );
    // The edges are fine, and so is a distribution in which every token may stop.
    let edge = SamplingParams {
        temperature: Some(f32::MIN_POSITIVE),
        top_k: Some(u32::MAX),
        seed: Some(u64::MAX),
        logprobs: Some(MAX_TOP_LOGPROBS as u32),
        stop_token_ids: (0..MAX_STOP_TOKENS as u32).collect(),
        min_tokens: Some(2),
        ..max(2)
    };
    generate(&service, call(vec![319; 254], edge))
        .await
        .unwrap();
    generate(&service, call(vec![1; 256], max(0)))
        .await
        .unwrap();
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_not_now_the_client_is_told_to_come_back() {
    let (service, says) = service(Phase::Waiting("no placement is active yet".to_owned()));
    let status = generate(&service, call(vec![1], max(1))).await.unwrap_err();
    assert_eq!(
        (status.code(), reason_of(&status).as_deref()),
        (Code::Unavailable, Some("NOT_READY"))
    );
    assert!(status.message().contains("no placement is active yet"));
    assert!(retry_after(&status).is_some());
    assert!(
        service
            .model_info(Request::new(ModelInfoRequest {}))
            .await
            .is_err()
    );

    let model = Model::v3_basic();
    let small = Limits {
        max_running: 1,
        max_waiting: 1,
        ..limits()
    };
    let rig = Rig::with(model, small, model.deal(1, 1, 2, 0), DEADLINE);
    let (engine, digest) = (rig.engine.clone(), "d1gest".to_owned());
    says.send_replace(Phase::Serving { engine, digest });
    let info = service
        .model_info(Request::new(ModelInfoRequest {}))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (info.model.as_str(), info.digest.as_str()),
        ("tiny", "d1gest")
    );
    assert_eq!(
        (info.vocab_size, info.max_context, info.has_tokenizer),
        (320, 256, false)
    );

    let mut streams = Vec::new();
    let status = loop {
        match service
            .generate(Request::new(call(vec![1; 9], max(200))))
            .await
        {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
        assert!(streams.len() <= 2);
    };
    let reason = reason_of(&status);
    assert_eq!(
        (status.code(), reason.as_deref()),
        (Code::ResourceExhausted, Some("QUEUE_FULL"))
    );
    assert!(retry_after(&status).is_some());
    drop(streams);
    rig.settle().await;

    says.send_replace(Phase::Draining);
    let status = generate(&service, call(vec![1], max(1))).await.unwrap_err();
    assert_eq!(
        (status.code(), reason_of(&status).as_deref()),
        (Code::Unavailable, Some("DRAINING"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_aborted_by_its_id_and_ends_by_the_timeout_of_its_call() {
    let rig = Rig::new(Model::v3_basic());
    let service = serving(&rig);
    let endless = SamplingParams {
        ignore_eos: true,
        ..max(200)
    };
    let mut asked = call(vec![5, 6, 7], endless.clone());
    asked.request_id = "mine-0".to_owned();
    asked.ended_by = Some(AbortRequest {
        request_id: "mine".to_owned(),
        owner: 7,
    });
    let response = service.generate(Request::new(asked)).await.unwrap();
    assert_eq!(response.metadata().get("x-request-id").unwrap(), "mine-0");
    let mut stream = response.into_inner();
    let prompt = stream.next().await.unwrap().unwrap().event;
    assert!(matches!(prompt, Some(Event::Prompt(_))), "{prompt:?}");
    let abort = async |request_id: &str, owner: u64| {
        let request_id = request_id.to_owned();
        let answer = service.abort(Request::new(AbortRequest { request_id, owner }));
        answer.await.unwrap().into_inner().aborted
    };
    assert_eq!(abort("another", 7).await, 0);
    assert_eq!(abort("mine", 8).await, 0, "it is another's");
    assert_eq!(abort("mine", 7).await, 1);
    let (mut tokens, mut end) = (0, None);
    while let Some(event) = stream.next().await {
        match event.unwrap().event.unwrap() {
            Event::Chunk(chunk) => tokens += chunk.token_ids.len() as u32,
            Event::Complete(complete) => end = Some(complete),
            other => panic!("{other:?}"),
        }
    }
    let end = end.unwrap();
    assert_eq!(end.finish_reason(), FinishReason::Abort);
    assert_eq!(end.usage.unwrap().completion_tokens, tokens);
    rig.settle().await;
    assert_eq!(abort("mine", 7).await, 0);

    let mut asked = call(vec![5, 6, 7], endless.clone());
    asked.request_id = "alone".to_owned();
    let stream = service.generate(Request::new(asked)).await.unwrap();
    assert_eq!(abort("alone", 0).await, 1, "by its own id");
    drop(stream);
    rig.settle().await;

    let mut asked = Request::new(call(vec![5, 6, 7], endless));
    let header = "0m".parse().unwrap();
    asked.metadata_mut().insert("grpc-timeout", header);
    let mut stream = service.generate(asked).await.unwrap().into_inner();
    let status = loop {
        if let Err(status) = stream.next().await.unwrap() {
            break status;
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(reason_of(&status).as_deref(), Some("TIMEOUT"));
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_expert_is_named_in_the_status() {
    let model = Model::v3_basic();
    let deadline = Duration::from_millis(50);
    let rig = Rig::with(model, limits(), model.deal(7, 1, 1, 0), deadline);
    rig.trouble.refuse(-1);
    let status = generate(&serving(&rig), call(vec![1, 2], max(4)))
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), reason_of(&status).as_deref()),
        (Code::Unavailable, Some("EXPERT_LOST"))
    );
    let origin = status.get_details_error_info().unwrap().metadata;
    assert_eq!(
        (origin["node"].as_str(), origin["layer"].as_str()),
        ("expert-1", "1")
    );
    assert_eq!(origin["epoch"], "7");
    assert!(!origin["experts"].is_empty());
    rig.settle().await;
}
