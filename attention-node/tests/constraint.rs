//! Constrained output at the node's door: what comes out is what was asked for, a stream that goes
//! on here goes on the same, and what is wrong is named.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Model, Rig};
use futures::StreamExt;
use guild_attention_node::service::{Inference, Phase};
use guild_model::text::Text;
use guild_proto::inference::v1::constraint::Form;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_server::Inference as _;
use guild_proto::inference::v1::{
    Choice, Constraint, FinishReason, GenerateRequest, SamplingParams, TokenIds,
};
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

struct Node {
    service: Inference,
    text: Arc<Text>,
    _phase: watch::Sender<Phase>,
}

/// A node of a tiny model, whose tokens are the first ones of the demo model's tokenizer.
fn node(rig: &Rig, with_text: bool) -> Node {
    let config = Arc::new(Model::v3_basic().trunk.config().clone());
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let text = Text::load(&dir, &config).unwrap().unwrap();
    let (engine, digest) = (rig.engine.clone(), "d1gest".to_owned());
    let (phase, hears) = watch::channel(Phase::Serving { engine, digest });
    let loaded = with_text.then(|| Arc::clone(&text));
    let service =
        Inference::new(config, "tiny", hears).with_text(Arc::new(move || Ok(loaded.clone())));
    Node {
        service,
        text,
        _phase: phase,
    }
}

fn ask(form: Form, seed: u64) -> GenerateRequest {
    GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: vec![5, 6, 7] })),
        sampling: Some(SamplingParams {
            max_tokens: Some(40),
            temperature: Some(1.0),
            seed: Some(seed),
            constraint: Some(Constraint {
                form: Some(form),
                after_token: None,
            }),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    }
}

impl Node {
    /// Tokens of output, and whether it has come to its end.
    async fn tokens(&self, asked: GenerateRequest) -> Result<(Vec<u32>, bool), Status> {
        let mut stream = self
            .service
            .generate(Request::new(asked))
            .await?
            .into_inner();
        let (mut tokens, mut ended) = (Vec::new(), false);
        while let Some(event) = stream.next().await {
            match event?.event.unwrap() {
                Event::Chunk(chunk) => tokens.extend(chunk.token_ids),
                Event::Complete(end) => ended = end.finish_reason() == FinishReason::Stop,
                Event::Prompt(_) => {}
            }
        }
        Ok((tokens, ended))
    }

    async fn refusal(&self, asked: GenerateRequest) -> (Code, String) {
        let status = self.tokens(asked).await.unwrap_err();
        let violations = status.get_details_bad_request().map(|b| b.field_violations);
        let field = violations.and_then(|v| v.first().map(|v| v.field.clone()));
        (status.code(), field.unwrap_or_default())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_output_is_what_it_has_to_be_and_goes_on_the_same_elsewhere() {
    let rig = Rig::new(Model::v3_basic());
    let node = node(&rig, true);
    let forms = [
        Form::Regex("[a-c]{3,12}(x|y)".into()),
        Form::Choice(Choice {
            texts: vec!["yes".into(), "no".into()],
        }),
        Form::JsonSchema(r#"{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}"#.into()),
    ];
    for (form, seed) in forms.into_iter().zip([3, 5, 7]) {
        let (tokens, ended) = node.tokens(ask(form.clone(), seed)).await.unwrap();
        assert!(ended, "{form:?}: {tokens:?}");
        let said = node
            .text
            .decode(&tokens[..tokens.len() - 1], false)
            .unwrap();
        let holds = match &form {
            Form::Regex(_) => said.ends_with(['x', 'y']) && (4..=13).contains(&said.len()),
            Form::Choice(_) => ["yes", "no"].contains(&said.as_str()),
            _ => ["{\"a\": true}", "{\"a\": false}"].contains(&said.as_str()),
        };
        assert!(holds, "{form:?}: {said:?}");

        for out in 0..tokens.len() - 1 {
            let mut rest = ask(form.clone(), seed);
            let ids = [&[5, 6, 7], &tokens[..out]].concat();
            rest.input = Some(Input::TokenIds(TokenIds { ids }));
            rest.output_tokens = out as u32;
            assert_eq!(
                node.tokens(rest).await.unwrap(),
                (tokens[out..].to_vec(), true),
                "{form:?} after {out}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_bound_may_begin_behind_a_token() {
    let rig = Rig::new(Model::v3_basic());
    let node = node(&rig, true);
    let mut asked = ask(
        Form::Choice(Choice {
            texts: vec!["yes".into()],
        }),
        1,
    );
    let sampling = asked.sampling.as_mut().unwrap();
    let free = [
        node.text.encode_plain("a").unwrap()[0],
        node.text.encode_plain("b").unwrap()[0],
    ];
    sampling.constraint.as_mut().unwrap().after_token = Some(free[1]);
    sampling.stop_token_ids = vec![free[0]];
    // Both are so probable that one of them comes at once.
    sampling.logit_bias = free.map(|id| (id, 100.0)).into();
    let (tokens, _) = node.tokens(asked.clone()).await.unwrap();
    assert!(free.contains(&tokens[0]), "{tokens:?}");
    asked.input = Some(Input::TokenIds(TokenIds {
        ids: vec![5, 6, free[1]],
    }));
    asked.output_tokens = 1;
    let (tokens, ended) = node.tokens(asked).await.unwrap();
    let said = node
        .text
        .decode(&tokens[..tokens.len() - 1], false)
        .unwrap();
    assert_eq!((said.as_str(), ended), ("yes", true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_complete_output_ends_though_more_tokens_were_wanted() {
    let rig = Rig::new(Model::v3_basic());
    let node = node(&rig, true);
    let mut asked = ask(Form::Regex("ab".into()), 1);
    asked.sampling.as_mut().unwrap().min_tokens = Some(30);
    let (tokens, ended) = node.tokens(asked).await.unwrap();
    let said = node
        .text
        .decode(&tokens[..tokens.len() - 1], false)
        .unwrap();
    assert_eq!((said.as_str(), ended), ("ab", true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused_by_its_field() {
    let rig = Rig::new(Model::v3_basic());
    let with = node(&rig, true);
    let invalid = |field: &str| (Code::InvalidArgument, format!("sampling.{field}"));
    for (form, field) in [
        (Form::Regex("(".into()), "constraint.regex"),
        (Form::JsonSchema("{".into()), "constraint.json_schema"),
        (
            Form::JsonSchema(r#"{"type": "wizard"}"#.into()),
            "constraint.json_schema",
        ),
        (Form::Grammar("start: nowhere".into()), "constraint.grammar"),
        (Form::Choice(Choice::default()), "constraint.choice"),
        (Form::JsonObject(false), "constraint.json_object"),
    ] {
        assert_eq!(
            with.refusal(ask(form.clone(), 1)).await,
            invalid(field),
            "{form:?}"
        );
    }
    let mut nothing = ask(Form::JsonObject(true), 1);
    nothing.sampling.as_mut().unwrap().constraint = Some(Constraint::default());
    assert_eq!(with.refusal(nothing).await, invalid("constraint"));
    let mut endless = ask(Form::JsonObject(true), 1);
    endless.sampling.as_mut().unwrap().ignore_eos = true;
    assert_eq!(with.refusal(endless).await, invalid("ignore_eos"));
    let mut beyond = ask(Form::JsonObject(true), 1);
    beyond
        .sampling
        .as_mut()
        .unwrap()
        .constraint
        .as_mut()
        .unwrap()
        .after_token = Some(1 << 30);
    assert_eq!(
        with.refusal(beyond).await,
        invalid("constraint.after_token")
    );
    // What has been said already must have been allowed.
    let mut odd = ask(
        Form::Choice(Choice {
            texts: vec!["yes".into()],
        }),
        1,
    );
    odd.output_tokens = 2;
    assert_eq!(with.refusal(odd).await, invalid("constraint.choice"));

    let without = node(&rig, false);
    let (code, _) = without.refusal(ask(Form::JsonObject(true), 1)).await;
    assert_eq!(code, Code::FailedPrecondition);
    let mut free = ask(Form::JsonObject(true), 1);
    free.sampling.as_mut().unwrap().constraint = None;
    assert!(
        without.tokens(free).await.is_ok(),
        "token ids alone need no tokenizer"
    );
}
