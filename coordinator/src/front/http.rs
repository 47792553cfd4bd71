//! The HTTP router and its small endpoints.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Request, State, rejection::BytesRejection},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use guild_node::metrics::Page;
use openai_protocol::models::ModelObject;
use serde::Serialize;
use serde_json::json;
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    FrontDoor, Readiness, auth, chat, completions,
    conversation::Conversation,
    fault::Fault,
    fields::{self, Fields},
    request::{Names, Prompt},
    responses,
    tools::Tools,
};

type Door = State<Arc<FrontDoor>>;

/// Seconds since the epoch.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// Every route of the HTTP API, once.
fn routes() -> [(&'static str, MethodRouter<Arc<FrontDoor>>); 11] {
    [
        ("/v1/completions", post(serve_completions)),
        ("/v1/chat/completions", post(serve_chat)),
        ("/v1/responses", post(serve_responses)),
        ("/v1/models", get(models)),
        ("/v1/models/{*id}", get(model)),
        ("/health", get(health)),
        ("/ping", get(health)),
        ("/metrics", get(metrics)),
        ("/version", get(version)),
        ("/tokenize", post(tokenize)),
        ("/detokenize", post(detokenize)),
    ]
}

/// The paths of the HTTP API, as the router has them.
pub fn paths() -> impl Iterator<Item = &'static str> {
    routes().into_iter().map(|(path, _)| path)
}

pub(super) fn router(door: Arc<FrontDoor>) -> Router {
    let limit = door.limits.max_body_bytes;
    routes()
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| {
            router.route(path, methods)
        })
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(limit))
        .with_state(door)
}

/// The last guard: a panic of one handler is a 500 for its client alone.
pub(super) fn guarded(router: Router) -> Router {
    router.layer(CatchPanicLayer::custom(
        |_: Box<dyn std::any::Any + Send>| {
            Fault::internal("this is a bug of the server; the request was dropped").into_response()
        },
    ))
}

/// gRPC clients get the error of their protocol, others OpenAI's.
async fn unknown_route(uri: Uri, request: Request) -> Response {
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|t| t.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        return tonic::Status::unimplemented(format!("no such method: {}", uri.path())).into_http();
    }
    Fault::unknown_route(uri.path()).into_response()
}

async fn wrong_method(method: Method, uri: Uri) -> Fault {
    Fault::wrong_method(method.as_str(), uri.path())
}

/// Reads the body of a POST as a JSON object.
fn request(
    door: &FrontDoor,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Fields, Fault> {
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let essence = media_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence != "application/json"
        && !(essence.starts_with("application/") && essence.ends_with("+json"))
    {
        return Err(Fault::not_json());
    }
    let body = body.map_err(|e| match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Fault::too_large(door.limits.max_body_bytes),
        _ => Fault::malformed(format!("the body could not be read: {e}")),
    })?;
    if body.is_empty() {
        return Err(Fault::malformed("the body is empty; send a JSON object"));
    }
    fields::parse(&body, door.max_values())
}

type RawBody = Result<Bytes, BytesRejection>;

async fn serve_completions(
    State(door): Door,
    headers: HeaderMap,
    body: RawBody,
) -> Result<Response, Fault> {
    let fields = request(&door, &headers, body)?;
    completions::serve(door, fields, auth::key(&headers)).await
}

async fn serve_chat(
    State(door): Door,
    headers: HeaderMap,
    body: RawBody,
) -> Result<Response, Fault> {
    let fields = request(&door, &headers, body)?;
    chat::serve(door, fields, auth::key(&headers)).await
}

async fn serve_responses(
    State(door): Door,
    headers: HeaderMap,
    body: RawBody,
) -> Result<Response, Fault> {
    let fields = request(&door, &headers, body)?;
    responses::serve(door, fields, auth::key(&headers)).await
}

/// The protocol's model, with the context that clients look for.
#[derive(Serialize)]
struct Model {
    #[serde(flatten)]
    base: ModelObject,
    max_model_len: u32,
}

fn served(door: &FrontDoor) -> Model {
    let base = ModelObject {
        id: door.model.name.clone(),
        object: "model".to_owned(),
        created: i64::try_from(door.model.created).unwrap_or(0),
        owned_by: "guild".to_owned(),
    };
    Model {
        base,
        max_model_len: door.model.max_context,
    }
}

async fn models(State(door): Door) -> Response {
    Json(json!({"object": "list", "data": [served(&door)]})).into_response()
}

async fn model(State(door): Door, Path(id): Path<String>) -> Result<Response, Fault> {
    door.check_model(&id)?;
    Ok(Json(served(&door)).into_response())
}

async fn health(State(door): Door) -> Response {
    match door.backend.readiness() {
        Readiness::Ready => Json(json!({"status": "ready"})).into_response(),
        Readiness::NotReady { reason } => Fault::not_ready(&reason).into_response(),
    }
}

/// Counters for Prometheus.
async fn metrics(State(door): Door) -> Page {
    door.page()
}

async fn version() -> Response {
    Json(json!({"version": env!("CARGO_PKG_VERSION")})).into_response()
}

const PROMPT: Names = Names {
    prompt: "prompt",
    max_tokens: "max_tokens",
    logprobs: "logprobs",
    constraint: "",
    prefix: "",
};

/// Tokens of a prompt or of a rendered conversation. Works before the cluster is ready.
async fn tokenize(State(door): Door, headers: HeaderMap, body: RawBody) -> Result<Response, Fault> {
    let mut fields = request(&door, &headers, body)?;
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let strings = fields.flag("return_token_strs", false)?;
    let (names, prompt) = match fields.string("prompt")? {
        Some(text) => {
            let special = fields.flag("add_special_tokens", true)?;
            (
                PROMPT,
                if special {
                    Prompt::Text(text)
                } else {
                    Prompt::Plain(text)
                },
            )
        }
        None => {
            let conversation = match fields.has("messages") {
                true => Conversation::read(&mut fields)?,
                false => {
                    return Err(Fault::missing(
                        "prompt",
                        "a string, or a conversation as `messages`",
                    ));
                }
            };
            let special = fields.flag("add_special_tokens", false)?;
            let tools = Tools::read(&mut fields)?;
            let text = conversation
                .render(&door, tools.offered(), "messages")
                .await?;
            (
                Names {
                    prompt: "messages",
                    ..PROMPT
                },
                if special {
                    Prompt::Text(text)
                } else {
                    Prompt::Plain(text)
                },
            )
        }
    };
    fields.finish()?;
    let tokens = door.tokenize_one(prompt, &names).await?;
    let text = door.text(names.prompt)?;
    let token_strs = strings.then(|| {
        tokens
            .iter()
            .map(|id| text.token_text(*id))
            .collect::<Vec<_>>()
    });
    Ok(Json(json!({"count": tokens.len(), "max_model_len": door.model.max_context, "tokens": tokens, "token_strs": token_strs})).into_response())
}

/// Text of tokens, special ones included.
async fn detokenize(
    State(door): Door,
    headers: HeaderMap,
    body: RawBody,
) -> Result<Response, Fault> {
    let mut fields = request(&door, &headers, body)?;
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let tokens = fields
        .token_ids("tokens")?
        .ok_or_else(|| Fault::missing("tokens", "a list of token ids"))?;
    let skip_special = fields.flag("skip_special_tokens", false)?;
    fields.finish()?;
    let vocabulary = door.model.config.vocab_size;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
        return Err(Fault::invalid(
            "tokens",
            format!("token id {id} is not in the vocabulary of {vocabulary}"),
        ));
    }
    let text = door.text("tokens")?;
    let prompt = text
        .decode(&tokens, skip_special)
        .map_err(|e| Fault::invalid("tokens", e.to_string()))?;
    Ok(Json(json!({"prompt": prompt})).into_response())
}
