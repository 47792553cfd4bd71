//! guild.inference.v1 at an attention node: token ids in, token ids out.
//!
//! Secret: the wire form of a request and of what becomes of it. Everything that comes in is
//! checked here, again, whoever sent it; the engine behind sees only requests that can run. Text
//! is the front door's business.

mod pages;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use guild_model::Config;
use guild_model::sampler::{Sampled, Sampling, Shaping};
use guild_node::call::{self, Calls};
use guild_node::channel::Dialer;
use guild_node::status;
use guild_proto::cluster::v1::Duty;
use guild_proto::inference::v1 as wire;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event as WireEvent;
use guild_scheduler::batch::{Limits, Refusal};
use tokio::sync::watch;
use tonic::codegen::BoxStream;
use tonic::{Code, Request as Call, Response, Status};

use crate::constraint::{Constraints, LoadText};
use crate::desk::{EngineHandle, SubmitError};
use crate::exchange::ExchangeFailure;
use crate::meter::{Meter, Timed};
use crate::pages::Helpers;
use crate::sequence::{Event, Events, Failure, Finish, MAX_TOP_LOGPROBS, Request, Spent};

/// Bytes of a request id.
pub const MAX_REQUEST_ID: usize = 256;
/// Stop tokens of one request.
pub const MAX_STOP_TOKENS: usize = 256;
/// Retry hint while the node is not ready.
pub const RETRY_NOT_READY: Duration = Duration::from_secs(1);

/// Whether requests are taken.
#[derive(Clone, Debug)]
pub enum Phase {
    /// Not yet, and what is waited for.
    Waiting(String),
    /// Yes.
    Serving {
        /// Takes them.
        engine: EngineHandle,
        /// Digest of configuration and weights.
        digest: String,
    },
    /// Not any more.
    Draining,
}

/// The service. It answers with what the newest [`Phase`] allows.
#[derive(Debug)]
pub struct Inference {
    config: Arc<Config>,
    model: String,
    phase: watch::Receiver<Phase>,
    next_request: AtomicU64,
    /// Requests under way, by their ids.
    calls: Calls,
    constraints: Constraints,
    /// None: nobody runs prompts for this node.
    helpers: Option<Arc<Helpers>>,
    duty: Duty,
    meter: Arc<Meter>,
}

impl Inference {
    /// A service for the model that `config` describes and that clients call `model`.
    pub fn new(config: Arc<Config>, model: &str, phase: watch::Receiver<Phase>) -> Inference {
        Inference {
            constraints: Constraints::new(Arc::clone(&config), Arc::new(|| Ok(None))),
            config,
            model: model.to_owned(),
            phase,
            next_request: AtomicU64::new(1),
            calls: Calls::default(),
            helpers: None,
            duty: Duty::Both,
            meter: Arc::default(),
        }
    }

    /// The same with a tokenizer to constrain outputs by; `load` is called once, when needed.
    pub fn with_text(self, load: LoadText) -> Inference {
        let constraints = Constraints::new(Arc::clone(&self.config), load);
        Inference {
            constraints,
            ..self
        }
    }

    /// The same among other attention nodes, which it reaches by `dialer`: prompts are run by it for
    /// others as far as `duty` says, and by others for it. Nodes of one `numerics` class compute the
    /// same pages.
    pub fn pairing(self, dialer: Dialer, numerics: &str, duty: Duty) -> Inference {
        Inference {
            helpers: Some(Arc::new(Helpers::new(dialer, numerics))),
            duty,
            ..self
        }
    }

    /// What is said of this node to Prometheus.
    pub(crate) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    fn engine(&self) -> Result<(EngineHandle, String), Status> {
        match &*self.phase.borrow() {
            Phase::Serving { engine, digest } => Ok((engine.clone(), digest.clone())),
            Phase::Waiting(reason) => {
                let message = format!("the attention node is not ready: {reason}");
                Err(status::unavailable(
                    "NOT_READY",
                    message,
                    Some(RETRY_NOT_READY),
                ))
            }
            Phase::Draining => Err(draining()),
        }
    }
}

#[tonic::async_trait]
impl wire::inference_server::Inference for Inference {
    async fn generate(
        &self,
        call: Call<wire::GenerateRequest>,
    ) -> Result<Response<BoxStream<wire::GenerateResponse>>, Status> {
        let (engine, digest) = self.engine()?;
        let timed = Timed::new(Arc::clone(&self.meter));
        let (metadata, _, mut call) = call.into_parts();
        call.timeout_ms = call::shorter(call.timeout_ms, &metadata);
        if !call.model.is_empty() && call.model != self.model {
            let message = format!(
                "model {:?} is not served here, {:?} is",
                call.model, self.model
            );
            return Err(status::not_found("MODEL_NOT_FOUND", message));
        }
        let request = check(&self.config, &engine.limits(), &call)?;
        let request_id = match call.request_id.is_empty() {
            false => call.request_id,
            true => format!(
                "request-{}",
                self.next_request.fetch_add(1, Ordering::Relaxed)
            ),
        };
        let prompt = request.prompt.clone();
        let asked = call.sampling.as_ref().and_then(|s| s.constraint.as_ref());
        let constraint = match asked {
            Some(asked) => {
                let said = prompt.len().saturating_sub(call.output_tokens as usize);
                Some(self.constraints.prepare(asked, &prompt[said..]).await?)
            }
            None => None,
        };
        let from = call.prefill_from;
        let events = self.submit((engine, digest), request, constraint, from);
        let events = events.map_err(refused)?;
        let name = request_id.clone();
        let ended_by = call.ended_by.unwrap_or_else(|| wire::AbortRequest {
            request_id: name.clone(),
            owner: 0,
        });
        let under_way = self.calls.begin(ended_by.owner, &ended_by.request_id);
        let mut response =
            Response::new(replies(events, under_way, timed, request_id, prompt).boxed());
        call::name(response.metadata_mut(), &name);
        Ok(response)
    }

    async fn abort(
        &self,
        call: Call<wire::AbortRequest>,
    ) -> Result<Response<wire::AbortResponse>, Status> {
        let call = call.into_inner();
        let aborted = self.calls.end(call.owner, &call.request_id);
        let aborted = u32::try_from(aborted).unwrap_or(u32::MAX);
        Ok(Response::new(wire::AbortResponse { aborted }))
    }

    async fn model_info(
        &self,
        _: Call<wire::ModelInfoRequest>,
    ) -> Result<Response<wire::ModelInfoResponse>, Status> {
        let (engine, digest) = self.engine()?;
        let config = &self.config;
        Ok(Response::new(wire::ModelInfoResponse {
            model: self.model.clone(),
            model_type: config.model_type.clone(),
            digest,
            vocab_size: config.vocab_size as u32,
            max_context: engine.limits().longest_request() as u32,
            has_tokenizer: false,
            has_chat_template: false,
            eos_token_ids: config.eos_token_ids.clone(),
            bos_token_id: config.bos_token_id,
        }))
    }
}

/// What the engine's events look like on the wire. The engine's channel has room for all events
/// of the request, so a reader that is slow, here or behind HTTP/2's flow control, holds up
/// nobody; when the stream is dropped, the channel closes, and the engine lets go of the request.
fn replies(
    events: Events,
    under_way: call::Call,
    mut timed: Timed,
    request_id: String,
    prompt: Vec<u32>,
) -> impl Stream<Item = Result<wire::GenerateResponse, Status>> + Send {
    let length = prompt.len();
    let mut head = Some((request_id, prompt));
    let (mut said, mut so_far) = (0, Spent::default());
    stream::unfold(Some((events, under_way)), |open| async {
        let (mut events, under_way) = open?;
        let event = tokio::select! {
            event = events.recv() => Ok(event),
            () = under_way.ended() => Err(Aborted),
        };
        let goes_on = matches!(event, Ok(Some(Event::Prompt { .. } | Event::Token { .. })));
        Some((event, goes_on.then_some((events, under_way))))
    })
    .map(move |event| {
        let Ok(event) = event else {
            let usage = usage(length, said, std::mem::take(&mut so_far));
            let event = Some(WireEvent::Complete(wire::Complete {
                finish_reason: wire::FinishReason::Abort.into(),
                matched_stop: None,
                usage: Some(usage),
            }));
            return Ok(wire::GenerateResponse { event });
        };
        if let Some(Event::Token { spent, .. }) = &event {
            said += 1;
            timed.token(length, spent);
            so_far.clone_from(spent);
        }
        let event = match event {
            Some(Event::Prompt { logprobs }) => {
                let (request_id, token_ids) = head.take().unwrap_or_default();
                let logprobs = logprobs.into_iter().map(logprobs_wire).collect();
                WireEvent::Prompt(wire::Prompt {
                    request_id,
                    token_ids,
                    logprobs,
                })
            }
            Some(Event::Token {
                token,
                logprobs,
                spent,
            }) => WireEvent::Chunk(wire::Chunk {
                token_ids: vec![token],
                text: String::new(),
                logprobs: logprobs.into_iter().map(logprobs_wire).collect(),
                cached_tokens: spent.cached as u32,
                drafted_tokens: spent.drafted,
                accepted_tokens: spent.held,
            }),
            Some(Event::Finished {
                reason,
                generated,
                spent,
            }) => WireEvent::Complete(complete(reason, usage(length, generated, spent))),
            Some(Event::Failed(failure)) => return Err(failed(&failure)),
            None => {
                let message = "the engine of the attention node has stopped";
                return Err(status::unavailable("ENGINE_STOPPED", message, None));
            }
        };
        Ok(wire::GenerateResponse { event: Some(event) })
    })
}

fn usage(prompt: usize, generated: usize, spent: Spent) -> wire::Usage {
    wire::Usage {
        prompt_tokens: prompt as u32,
        completion_tokens: generated as u32,
        cached_tokens: spent.cached as u32,
        drafted_tokens: spent.drafted,
        accepted_tokens: spent.held,
        ..wire::Usage::default()
    }
}

/// Somebody has ended the request by its id.
struct Aborted;

fn logprobs_wire(of: Sampled) -> wire::TokenLogprobs {
    let top = of.top.into_iter();
    let top = top.map(|(token_id, logprob)| wire::TopLogprob { token_id, logprob });
    wire::TokenLogprobs {
        token_id: of.token,
        logprob: of.logprob,
        top: top.collect(),
    }
}

fn complete(reason: Finish, usage: wire::Usage) -> wire::Complete {
    let (finish_reason, matched_stop) = match reason {
        Finish::Stop(token) => (
            wire::FinishReason::Stop,
            Some(wire::complete::MatchedStop::StopTokenId(token)),
        ),
        Finish::Length => (wire::FinishReason::Length, None),
    };
    wire::Complete {
        finish_reason: finish_reason.into(),
        matched_stop,
        usage: Some(usage),
    }
}

/// Turns a request into one that can run, or says which field cannot.
fn check(
    config: &Config,
    limits: &Limits,
    call: &wire::GenerateRequest,
) -> Result<Request, Status> {
    let invalid = |field: &str, text: String| Err(status::invalid(field, text));
    if call.request_id.len() > MAX_REQUEST_ID {
        return invalid("request_id", format!("longer than {MAX_REQUEST_ID} bytes"));
    }
    let prompt = match &call.input {
        Some(Input::TokenIds(tokens)) => tokens.ids.clone(),
        Some(Input::Text(_)) => {
            return invalid(
                "text",
                "an attention node takes token_ids only; send text to the front door".to_owned(),
            );
        }
        None => return invalid("token_ids", "the request has no input".to_owned()),
    };
    if prompt.is_empty() {
        return invalid("token_ids", "the prompt is empty".to_owned());
    }
    let default = wire::SamplingParams::default();
    let sampling = call.sampling.as_ref().unwrap_or(&default);
    if !sampling.stop.is_empty() {
        return invalid(
            "sampling.stop",
            "stop strings are matched by the front door; here stop_token_ids only".to_owned(),
        );
    }
    if sampling.stop_token_ids.len() > MAX_STOP_TOKENS {
        return invalid(
            "sampling.stop_token_ids",
            format!("more than {MAX_STOP_TOKENS} tokens"),
        );
    }
    in_vocabulary(config, "token_ids", &prompt)?;
    let stops = &sampling.stop_token_ids;
    in_vocabulary(config, "sampling.stop_token_ids", stops)?;
    let temperature = sampling.temperature.unwrap_or(0.0);
    if !(temperature.is_finite() && temperature >= 0.0) {
        return invalid(
            "sampling.temperature",
            format!("{temperature} is not finite and at least 0"),
        );
    }
    let top_p = sampling.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return invalid("sampling.top_p", format!("{top_p} is not in (0, 1]"));
    }
    let min_p = sampling.min_p.unwrap_or(0.0);
    if !(0.0..=1.0).contains(&min_p) {
        return invalid("sampling.min_p", format!("{min_p} is not in [0, 1]"));
    }
    let shaping = shaping(config, sampling)?;
    if call.output_tokens as usize > prompt.len() {
        let text = format!("more than the {} tokens there are", prompt.len());
        return invalid("output_tokens", text);
    }
    for (field, top) in [
        ("sampling.logprobs", sampling.logprobs),
        ("sampling.prompt_logprobs", sampling.prompt_logprobs),
    ] {
        if top.is_some_and(|top| top as usize > MAX_TOP_LOGPROBS) {
            return invalid(
                field,
                format!("at most {MAX_TOP_LOGPROBS} alternatives are given"),
            );
        }
    }
    if sampling.constraint.is_some() && sampling.ignore_eos {
        let text = "a constrained output ends by EOS; leave one of them out";
        return invalid("sampling.ignore_eos", text.to_owned());
    }
    let max_tokens = output_room(limits, prompt.len(), sampling.max_tokens)?;
    let min_tokens = sampling.min_tokens.unwrap_or(0) as usize;
    if min_tokens > max_tokens {
        let text = format!("{min_tokens} is more than max_tokens {max_tokens}");
        return invalid("sampling.min_tokens", text);
    }
    let mut stop_tokens = sampling.stop_token_ids.clone();
    if !sampling.ignore_eos {
        let eos = config.eos_token_ids.iter().copied();
        stop_tokens.extend(eos.filter(|&token| (token as usize) < config.vocab_size));
    }
    Ok(Request {
        prompt,
        max_tokens,
        sampling: Sampling {
            temperature,
            top_p,
            top_k: sampling.top_k.unwrap_or(0),
            min_p,
            seed: sampling.seed.unwrap_or(0),
        },
        shaping,
        output_before: call.output_tokens as usize,
        stop_tokens,
        min_tokens,
        logprobs: sampling.logprobs.map(|n| n as usize),
        prompt_logprobs: sampling.prompt_logprobs.map(|n| n as usize),
        priority: call.priority,
        tenant: call.tenant,
        timeout: call.timeout_ms.map(milliseconds),
        max_queue: call.max_queue_ms.map(milliseconds),
    })
}

/// Whether all of a field's tokens are some.
fn in_vocabulary(config: &Config, field: &str, tokens: &[u32]) -> Result<(), Status> {
    let vocab = config.vocab_size;
    let beyond = |&(_, &token): &(usize, &u32)| token as usize >= vocab;
    match tokens.iter().enumerate().find(beyond) {
        Some((at, token)) => Err(status::invalid(
            field,
            format!("id {token} at index {at} is not below the vocabulary size {vocab}"),
        )),
        None => Ok(()),
    }
}

fn milliseconds(n: u32) -> Duration {
    Duration::from_millis(n.into())
}

/// Bias and penalties, or which of them makes no sense.
fn shaping(config: &Config, sampling: &wire::SamplingParams) -> Result<Shaping, Status> {
    let repetition = sampling.repetition_penalty.unwrap_or(1.0);
    if !(repetition.is_finite() && repetition > 0.0) {
        let text = format!("{repetition} is not finite and above 0");
        return Err(status::invalid("sampling.repetition_penalty", text));
    }
    let presence = sampling.presence_penalty.unwrap_or(0.0);
    let frequency = sampling.frequency_penalty.unwrap_or(0.0);
    for (field, penalty) in [
        ("sampling.presence_penalty", presence),
        ("sampling.frequency_penalty", frequency),
    ] {
        if !penalty.is_finite() {
            return Err(status::invalid(field, format!("{penalty} is not finite")));
        }
    }
    let biases = sampling.logit_bias.iter();
    let mut bias: Vec<(u32, f32)> = biases.map(|(&token, &bias)| (token, bias)).collect();
    bias.sort_by_key(|&(token, _)| token);
    for &(token, bias) in &bias {
        if !bias.is_finite() || token as usize >= config.vocab_size {
            let vocab = config.vocab_size;
            let text = format!("{token}: {bias} is no bias of a token below {vocab}");
            return Err(status::invalid("sampling.logit_bias", text));
        }
    }
    Ok(Shaping {
        bias,
        repetition,
        presence,
        frequency,
    })
}

/// How many tokens a request may generate. Asking for more than the context is a mistake; where
/// the node's KV memory ends before the context does, so does the output.
fn output_room(limits: &Limits, prompt: usize, asked: Option<u32>) -> Result<usize, Status> {
    let context = limits.max_context;
    let least = asked.map_or(1, |asked| asked as usize);
    if prompt.saturating_add(least) > context {
        let field = if prompt > context {
            "token_ids"
        } else {
            "sampling.max_tokens"
        };
        let text =
            format!("{prompt} prompt tokens and {least} of output exceed the context of {context}");
        return Err(status::invalid(field, text));
    }
    let longest = limits.longest_request();
    let room = longest.saturating_sub(prompt);
    if prompt > longest || room < least.min(1) {
        let text = format!(
            "{prompt} prompt tokens leave no room in the KV memory of this node, which ends at {longest}"
        );
        return Err(status::invalid("token_ids", text));
    }
    Ok(asked.map_or(room, |asked| room.min(asked as usize)))
}

fn refused(error: SubmitError) -> Status {
    match error {
        SubmitError::Refused(Refusal::Overloaded {
            waiting,
            retry_after,
        }) => status::exhausted(
            "QUEUE_FULL",
            format!("{waiting} requests wait already"),
            retry_after,
        ),
        SubmitError::Refused(Refusal::TooLate {
            expected,
            retry_after,
        }) => status::exhausted(
            "QUEUE_TOO_LONG",
            format!("about {expected:?} of waiting are ahead"),
            retry_after,
        ),
        SubmitError::Refused(Refusal::Invalid(invalid)) => {
            status::invalid("token_ids", invalid.to_string())
        }
        SubmitError::TooManyReaders { .. } => {
            status::exhausted("TOO_MANY_STREAMS", error.to_string(), RETRY_NOT_READY)
        }
        SubmitError::Draining => draining(),
    }
}

fn draining() -> Status {
    let message = "the attention node is draining";
    status::unavailable("DRAINING", message, Some(RETRY_NOT_READY))
}

fn failed(failure: &Failure) -> Status {
    match failure {
        Failure::ShuttingDown => draining(),
        Failure::Queue => status::exhausted("QUEUE_TIMEOUT", failure.to_string(), RETRY_NOT_READY),
        Failure::Displaced => status::exhausted("QUEUE_FULL", failure.to_string(), RETRY_NOT_READY),
        Failure::Deadline => {
            status::with_reason(Code::DeadlineExceeded, "TIMEOUT", failure.to_string(), [])
        }
        Failure::Constraint(_) => status::with_reason(
            Code::FailedPrecondition,
            "CONSTRAINT_FAILED",
            failure.to_string(),
            [],
        ),
        Failure::Exchange(ExchangeFailure {
            layer,
            experts,
            epoch,
            node,
            attempts,
            ..
        }) => {
            let experts: Vec<String> = experts.iter().map(u32::to_string).collect();
            let origin = [
                ("node", node.clone()),
                ("layer", layer.to_string()),
                ("experts", experts.join(",")),
                ("epoch", epoch.to_string()),
                ("attempts", attempts.to_string()),
            ];
            status::with_reason(
                Code::Unavailable,
                "EXPERT_LOST",
                failure.to_string(),
                origin,
            )
        }
    }
}
