//! The front door: text in, text out, over OpenAI-shaped HTTP and gRPC.
//!
//! Secret of this module: how clients talk. It validates, tokenizes, applies
//! the chat template, hands token ids to a [`Backend`], and turns what comes
//! back into text, stop strings, usage and the two wire shapes. It knows
//! neither nodes nor placement; the cluster is whatever implements
//! [`Backend`].

use std::sync::Arc;

use futures::{future::BoxFuture, stream::BoxStream};
use guild_model::{Config, text::Text};
use guild_proto::inference::v1::{GenerateRequest, GenerateResponse};
use tonic::Status;

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
        Self { max_body_bytes: 8 << 20, max_in_flight: 1024, max_choices: 128 }
    }
}

/// The front door of one served model. Cheap to share: all state is behind [`Arc`].
pub struct FrontDoor {
    model: ServedModel,
    backend: Arc<dyn Backend>,
    limits: FrontLimits,
}

impl FrontDoor {
    /// A front door before a cluster.
    pub fn new(model: ServedModel, backend: Arc<dyn Backend>, limits: FrontLimits) -> Arc<Self> {
        Arc::new(Self { model, backend, limits })
    }

    /// Everything for one port: the OpenAI-shaped HTTP API and
    /// `guild.inference.v1`, over HTTP/1.1 and cleartext HTTP/2. Further gRPC
    /// services (health, reflection) join by [`with_grpc`].
    pub fn router(self: &Arc<Self>) -> axum::Router {
        let _ = (&self.model, &self.backend, &self.limits);
        axum::Router::new()
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
