//! A cluster that says what it is told to, and remembers what it was asked.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode},
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use guild_coordinator::front::{
    Backend, EventStream, FrontDoor, FrontLimits, Readiness, ServedModel,
};
use guild_model::{Config, text::Text};
use guild_proto::inference::v1::{
    AbortRequest, Chunk, Complete, FinishReason, GenerateRequest, GenerateResponse, Prompt,
    TokenLogprobs, TopLogprob, Usage, complete::MatchedStop, generate_request::Input,
    generate_response::Event,
};
use serde_json::Value;
use tonic::Status;
use tower::ServiceExt;

/// One thing the cluster does.
#[derive(Clone)]
pub(crate) enum Step {
    /// One chunk of these tokens.
    Tokens(Vec<u32>),
    Fail(Status),
    /// What chunks from here on say of drafts: tokens tried and tokens that held.
    Drafts(u32, u32),
    /// Nothing more, ever.
    Hang,
    /// The stream ends where it should not.
    End,
}

pub(crate) struct Fake {
    pub(crate) readiness: Mutex<Readiness>,
    pub(crate) steps: Mutex<Vec<Step>>,
    pub(crate) refusal: Mutex<Option<Status>>,
    pub(crate) requests: Mutex<Vec<GenerateRequest>>,
    /// What was to be ended elsewhere; one request called so is there.
    pub(crate) aborts: Mutex<Vec<AbortRequest>>,
    /// Streams that have not been dropped.
    pub(crate) live: Arc<AtomicUsize>,
    eos: Vec<u32>,
}

struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The log-probabilities that the fake reports for a token: its own and `top`
/// alternatives, which are the ids from 10 on.
pub(crate) fn logprobs_of(id: u32, top: u32) -> TokenLogprobs {
    let top = (0..top)
        .map(|k| TopLogprob {
            token_id: 10 + k,
            logprob: -0.25 * (k + 1) as f32,
        })
        .collect();
    TokenLogprobs {
        token_id: id,
        logprob: -0.5 - id as f32 / 4096.0,
        top,
    }
}

fn event(event: Event) -> Result<GenerateResponse, Status> {
    Ok(GenerateResponse { event: Some(event) })
}

impl Backend for Fake {
    fn readiness(&self) -> Readiness {
        self.readiness.lock().unwrap().clone()
    }

    fn abort(&self, request: AbortRequest) -> BoxFuture<'static, u32> {
        let there = u32::from(request.request_id == "elsewhere");
        self.aborts.lock().unwrap().push(request);
        std::future::ready(there).boxed()
    }

    fn generate(
        &self,
        request: GenerateRequest,
    ) -> BoxFuture<'static, Result<EventStream, Status>> {
        self.requests.lock().unwrap().push(request.clone());
        if let Some(status) = self.refusal.lock().unwrap().clone() {
            return std::future::ready(Err(status)).boxed();
        }
        let Some(Input::TokenIds(prompt)) = request.input else {
            panic!("text reached the cluster")
        };
        let sampling = request.sampling.unwrap();
        assert!(
            sampling.stop.is_empty() && sampling.max_tokens.unwrap() > 0 && sampling.seed.is_some()
        );
        let logprobs: Vec<_> = match sampling.prompt_logprobs {
            Some(top) => prompt.ids[1..]
                .iter()
                .map(|id| logprobs_of(*id, top))
                .collect(),
            None => Vec::new(),
        };
        let prompt_tokens = prompt.ids.len() as u32;
        let mut events = vec![event(Event::Prompt(Prompt {
            request_id: request.request_id,
            token_ids: prompt.ids,
            logprobs,
        }))];
        let (mut left, mut finish, mut hang, mut cut) =
            (sampling.max_tokens.unwrap(), None, false, false);
        let mut drafts = (Vec::new(), Vec::new());
        for step in self.steps.lock().unwrap().iter().cloned() {
            match step {
                Step::Tokens(ids) => {
                    let mut chunk = Chunk {
                        drafted_tokens: drafts.0.clone(),
                        accepted_tokens: drafts.1.clone(),
                        ..Chunk::default()
                    };
                    for id in ids {
                        chunk.token_ids.push(id);
                        chunk
                            .logprobs
                            .extend(sampling.logprobs.map(|top| logprobs_of(id, top)));
                        left -= 1;
                        let ends = sampling.stop_token_ids.contains(&id)
                            || (!sampling.ignore_eos && self.eos.contains(&id));
                        if ends {
                            finish = Some((FinishReason::Stop, Some(MatchedStop::StopTokenId(id))));
                        } else if left == 0 {
                            finish = Some((FinishReason::Length, None));
                        }
                        if finish.is_some() {
                            break;
                        }
                    }
                    events.push(event(Event::Chunk(chunk)));
                }
                Step::Fail(status) => events.push(Err(status)),
                Step::Drafts(tried, held) => drafts = (vec![tried], vec![held]),
                Step::Hang => hang = true,
                Step::End => cut = true,
            }
            if finish.is_some() || hang || cut {
                break;
            }
        }
        if !hang && !cut {
            let (reason, matched_stop) = finish.unwrap_or((FinishReason::Length, None));
            // The front door counts for itself.
            let usage = Some(Usage {
                prompt_tokens,
                completion_tokens: 999,
                ..Usage::default()
            });
            events.push(event(Event::Complete(Complete {
                finish_reason: reason.into(),
                matched_stop,
                usage,
            })));
        }
        self.live.fetch_add(1, Ordering::SeqCst);
        let live = Live(self.live.clone());
        let rest = if hang {
            stream::pending().left_stream()
        } else {
            stream::empty().right_stream()
        };
        let stream = stream::iter(events).chain(rest).map(move |e| {
            let _ = &live;
            e
        });
        std::future::ready(Ok(stream.boxed())).boxed()
    }
}

pub(crate) struct Door {
    pub(crate) fake: Arc<Fake>,
    pub(crate) front: Arc<FrontDoor>,
    pub(crate) router: Router,
    pub(crate) text: Option<Arc<Text>>,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The payloads of a stream of server-sent events.
    pub(crate) fn events(&self) -> Vec<String> {
        assert!(self.body.ends_with("\n\n"), "{:?}", self.body);
        let data = |block: &str| {
            block
                .strip_prefix("data: ")
                .unwrap_or_else(|| panic!("{block:?}"))
                .to_owned()
        };
        self.body
            .trim_end_matches("\n\n")
            .split("\n\n")
            .map(data)
            .collect()
    }

    /// Those of a stream that ended well, as JSON, without its last word.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().unwrap(), "[DONE]");
        events
            .iter()
            .map(|e| serde_json::from_str(e).unwrap())
            .collect()
    }
}

pub(crate) fn demo_dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// A front door for the demo checkpoint, named `demo`.
pub(crate) fn door_with(limits: FrontLimits, with_text: bool) -> Door {
    let config = Arc::new(Config::from_dir(&demo_dir()).unwrap());
    let text = Text::load(&demo_dir(), &config)
        .unwrap()
        .filter(|_| with_text);
    door_of_all(config, text, limits)
}

/// A front door for the demo checkpoint with another tokenizer or template.
pub(crate) fn door_of(config: Arc<Config>, text: Option<Arc<Text>>) -> Door {
    door_of_all(config, text, FrontLimits::default())
}

fn door_of_all(config: Arc<Config>, text: Option<Arc<Text>>, limits: FrontLimits) -> Door {
    let fake = Arc::new(Fake {
        readiness: Mutex::new(Readiness::Ready),
        steps: Mutex::default(),
        refusal: Mutex::default(),
        requests: Mutex::default(),
        aborts: Mutex::default(),
        live: Arc::default(),
        eos: config.eos_token_ids.clone(),
    });
    let model = ServedModel {
        name: "demo".into(),
        config,
        digest: "d1".into(),
        created: 1_700_000_000,
        max_context: 512,
        text: text.clone(),
    };
    let front = FrontDoor::new(model, fake.clone(), limits);
    let router = front.router();
    Door {
        fake,
        front,
        router,
        text,
    }
}

pub(crate) fn door() -> Door {
    door_with(FrontLimits::default(), true)
}

impl Door {
    /// The cluster will answer with this text, `per_chunk` tokens at a time.
    pub(crate) fn will_say(&self, text: &str, per_chunk: usize) -> Vec<u32> {
        let ids = self.text.as_ref().unwrap().encode_plain(text).unwrap();
        *self.fake.steps.lock().unwrap() = ids
            .chunks(per_chunk)
            .map(|c| Step::Tokens(c.to_vec()))
            .collect();
        ids
    }

    pub(crate) fn will(&self, steps: &[Step]) {
        *self.fake.steps.lock().unwrap() = steps.to_vec();
    }

    pub(crate) fn last_request(&self) -> GenerateRequest {
        self.fake.requests.lock().unwrap().last().unwrap().clone()
    }

    pub(crate) fn live(&self) -> usize {
        self.fake.live.load(Ordering::SeqCst)
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = to_bytes(body, usize::MAX).await.unwrap();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(body.to_vec()).unwrap(),
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    pub(crate) async fn post_bytes(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(
            Request::post(path)
                .header("content-type", "application/json")
                .body(body.into())
                .unwrap(),
        )
        .await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_bytes(path, body.to_string()).await
    }

    /// Posts and expects success.
    pub(crate) async fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// Posts and expects an error of OpenAI's form: status, param, message.
    pub(crate) async fn refused(&self, path: &str, body: Value) -> (u16, Option<String>, String) {
        let answer = self.post(path, body).await;
        let error = &answer.json()["error"];
        assert!(
            error["type"].is_string() && error["code"].is_string(),
            "{}",
            answer.body
        );
        (
            answer.status.as_u16(),
            error["param"].as_str().map(str::to_owned),
            error["message"].as_str().unwrap().to_owned(),
        )
    }
}
