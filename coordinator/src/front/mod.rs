//! The front door: text in, text out, over OpenAI-shaped HTTP and gRPC.
//!
//! Secret of this module: how clients talk. It validates, tokenizes, applies
//! the chat template, hands token ids to a [`Backend`], and turns what comes
//! back into text, stop strings, usage and the two wire shapes. It knows
//! neither nodes nor placement; the cluster is whatever implements
//! [`Backend`].
//!
//! Rules that hold for both wire forms:
//! - What would change an answer is done or refused by its name, never
//!   ignored. What cannot change one (`metadata`, `service_tier`, …) is ignored.
//! - Of `generation_config.json` only the end-of-sequence ids apply. Unset
//!   sampling parameters take the defaults of the API that was called:
//!   temperature 1 over OpenAI HTTP, greedy over gRPC. An unset seed is drawn
//!   for each request; choice `i` of `n` draws by `seed + i`.
//! - A stop string is no part of the text; the tokens up to the one that
//!   completed it count as generated. Tokens that end a request are returned
//!   as ids and have no text.
//! - A constraint is compiled and kept to by the attention nodes; here it is read
//!   out of the words of three APIs, and tools that must be called become one.
//!   It ends by EOS when it is complete, whatever `min_tokens` says.
//! - Tool calls and thoughts are read out of the text in the way that the chat
//!   template writes them; a template that knows no tools is told of them in a
//!   system message.
//! - `user`, `cache_salt` and the API key make a tenant of who asks; `priority`
//!   (lower is first), `timeout_ms` and `max_queue_ms` are handed down.
//! - `text_offset` counts characters of the choice's own text.
//! - Prompt and `max_tokens` must fit the context together; a default is cut
//!   to fit, what a client wrote is not.

use std::sync::Arc;

use futures::{
    future::{BoxFuture, try_join_all},
    stream::BoxStream,
};
use guild_model::{Config, text::Text};
use guild_node::{call::Calls, metrics::Page};
use guild_proto::inference::v1::{
    AbortRequest, GenerateRequest, GenerateResponse, inference_server::InferenceServer,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};

mod answer;
mod auth;
mod chat;
mod completions;
mod constrain;
mod conversation;
mod dialect;
mod events;
mod fault;
mod fields;
mod grpc;
mod http;
mod logprobs;
mod metrics;
mod params;
mod reader;
mod request;
mod responses;
mod sse;
mod tenant;
mod tools;

pub use auth::{OPEN, guard};
pub use fault::{ERROR_DOMAIN, ErrorRow, RETRY_NOT_READY, RETRY_OVERLOADED, TABLE, error_row};
pub use grpc::{InferenceService, MAX_REQUEST_ID_BYTES};
pub use http::paths;
pub use request::{
    GREEDY_BELOW, MAX_LOGPROBS, MAX_STOP_BYTES, MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_TEMPERATURE,
};

use events::{Outcome, TextRules};
use fault::Fault;
use metrics::Metrics;
use request::{Names, Params};

/// Whether the cluster can take a request now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Every expert has a home and an attention node serves.
    Ready,
    /// Not yet, or no longer.
    NotReady {
        /// What is being waited for, in words for an operator.
        reason: String,
    },
}

/// Events of one request, in the order of `guild.inference.v1`: one Prompt,
/// any number of Chunks, one Complete. Dropping the stream cancels the request.
pub type EventStream = BoxStream<'static, Result<GenerateResponse, Status>>;

/// Where a request's tokens come from: the cluster behind the front door.
pub trait Backend: Send + Sync + 'static {
    /// Whether [`Backend::generate`] may be called, and why not.
    fn readiness(&self) -> Readiness;

    /// Runs one request. Its input is always `token_ids`; `sampling.stop` is
    /// always empty and `sampling.max_tokens` and `sampling.seed` always set.
    /// Errors carry google.rpc details where there are any.
    fn generate(&self, request: GenerateRequest)
    -> BoxFuture<'static, Result<EventStream, Status>>;

    /// Ends requests by what they are [ended by](GenerateRequest::ended_by), whichever front door they have come in
    /// by; how many there were. Takes no longer than a moment, and what does not answer by then is not counted.
    fn abort(&self, request: AbortRequest) -> BoxFuture<'static, u32>;
}

/// What the front door serves.
#[derive(Clone)]
pub struct ServedModel {
    /// The name that clients send and see.
    pub name: String,
    /// Model type, vocabulary, special tokens.
    pub config: Arc<Config>,
    /// Digest of configuration and weights.
    pub digest: String,
    /// Unix time at which serving began, in seconds.
    pub created: u64,
    /// Tokens of prompt and output together, at most.
    pub max_context: u32,
    /// Tokenizer and chat template; None: only token ids are served.
    pub text: Option<Arc<Text>>,
}

/// What clients may ask for at most.
#[derive(Clone, Debug)]
pub struct FrontLimits {
    /// Bytes of an HTTP body or a gRPC message.
    pub max_body_bytes: usize,
    /// Requests in flight; a request for `n` choices counts `n` times. Beyond it: 503, RESOURCE_EXHAUSTED.
    pub max_in_flight: usize,
    /// Choices of one HTTP request: prompts times `n`.
    pub max_choices: usize,
}

impl Default for FrontLimits {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            max_in_flight: 1024,
            max_choices: 128,
        }
    }
}

/// JSON values of one request that are always allowed; a long context allows more.
const MIN_JSON_VALUES: usize = 1 << 16;

/// The front door of one served model.
pub struct FrontDoor {
    model: ServedModel,
    backend: Arc<dyn Backend>,
    limits: FrontLimits,
    in_flight: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    /// Requests under way, by their ids.
    calls: Calls,
}

impl FrontDoor {
    /// A front door before a cluster.
    pub fn new(model: ServedModel, backend: Arc<dyn Backend>, limits: FrontLimits) -> Arc<Self> {
        let in_flight = Arc::new(Semaphore::new(
            limits.max_in_flight.min(Semaphore::MAX_PERMITS),
        ));
        Arc::new(Self {
            model,
            backend,
            limits,
            in_flight,
            metrics: Arc::default(),
            calls: Calls::default(),
        })
    }

    /// Everything for one port: the OpenAI-shaped HTTP API and
    /// `guild.inference.v1`, over HTTP/1.1 and cleartext HTTP/2. Further gRPC
    /// services (health, reflection) join by [`with_grpc`].
    pub fn router(self: &Arc<Self>) -> axum::Router {
        http::guarded(with_grpc(
            http::router(self.clone()),
            self.inference_service(),
        ))
    }

    /// `guild.inference.v1` alone, for a tonic server.
    pub fn inference_service(self: &Arc<Self>) -> InferenceServer<InferenceService> {
        InferenceServer::new(InferenceService(self.clone()))
            .max_decoding_message_size(self.limits.max_body_bytes)
    }

    /// Requests in flight; a server that drains waits for zero.
    pub fn in_flight(&self) -> usize {
        self.limits.max_in_flight.min(Semaphore::MAX_PERMITS) - self.in_flight.available_permits()
    }

    /// What it has served, for Prometheus.
    pub fn page(&self) -> Page {
        self.metrics.page(&self.model.name, self.in_flight())
    }

    fn max_choices(&self) -> usize {
        self.limits.max_choices.min(self.limits.max_in_flight)
    }

    fn max_values(&self) -> usize {
        MIN_JSON_VALUES.max(2 * self.model.max_context as usize)
    }

    /// Lets `count` requests in, or says why not.
    fn admit(&self, count: usize) -> Result<Vec<OwnedSemaphorePermit>, Fault> {
        if let Readiness::NotReady { reason } = self.backend.readiness() {
            self.metrics.fail(Code::Unavailable);
            return Err(Fault::not_ready(&reason));
        }
        let permit = || self.in_flight.clone().try_acquire_owned();
        let permits: Result<Vec<_>, _> = (0..count).map(|_| permit()).collect();
        permits.map_err(|_| {
            self.metrics.fail(Code::ResourceExhausted);
            Fault::overloaded(self.limits.max_in_flight)
        })
    }

    /// Starts every choice of every prompt, one stream each, prompt by prompt.
    async fn open(
        &self,
        prompts: Vec<Vec<u32>>,
        n: u32,
        params: &Params,
        names: &Names,
        request_id: &str,
        permits: Vec<OwnedSemaphorePermit>,
    ) -> Result<Vec<EventStream>, Fault> {
        let many = permits.len() > 1;
        let choices = prompts
            .into_iter()
            .flat_map(|ids| (0..n).map(move |index| (ids.clone(), index)));
        let starting = choices
            .zip(permits)
            .enumerate()
            .map(|(i, ((ids, index), permit))| {
                let id = if many {
                    format!("{request_id}-{i}")
                } else {
                    request_id.to_owned()
                };
                let mut request =
                    params.to_request(id.clone(), ids, self.model.max_context, index.into());
                request.ended_by = Some(AbortRequest {
                    request_id: request_id.to_owned(),
                    owner: params.handling.owner,
                });
                let rules = TextRules::new(&self.model, params);
                let starting = self.backend.generate(request);
                let metrics = Arc::clone(&self.metrics);
                let hold = (permit, self.calls.begin(params.handling.owner, request_id));
                async move {
                    let stream = starting.await?;
                    Ok::<_, Status>(events::with_text(stream, rules, id, metrics, hold))
                }
            });
        try_join_all(starting).await.map_err(|status| {
            self.metrics.fail(status.code());
            Fault::from(status).rename(|f| names.of(f))
        })
    }

    /// Reads all streams to their end; the first error ends all of them.
    async fn collect(
        &self,
        streams: Vec<EventStream>,
        names: &Names,
    ) -> Result<Vec<Outcome>, Fault> {
        let all = try_join_all(streams.into_iter().map(events::collect)).await;
        all.map_err(|status| Fault::from(status).rename(|f| names.of(f)))
    }
}

/// Adds one gRPC service to a router, at the path its name gives it.
pub fn with_grpc<S>(router: axum::Router, service: S) -> axum::Router
where
    S: tower::Service<
            axum::extract::Request,
            Response: axum::response::IntoResponse,
            Error = std::convert::Infallible,
            Future: Send + 'static,
        > + tonic::server::NamedService
        + Clone
        + Send
        + Sync
        + 'static,
{
    router.route_service(&format!("/{}/{{*method}}", S::NAME), service)
}
