//! Who may come in: one guard before every route of the front door.
//!
//! Everything is refused without a key that [`ApiKeys`] knows, paths that do not exist included,
//! except what [`OPEN`] names: machines that ask for health have no keys. The guard compares
//! whole paths and undoes no encoding, so that no spelling of a path is open by accident.

use std::sync::Arc;

use axum::http::{HeaderMap, Request, Response, header};
use axum::response::IntoResponse;
use guild_node::keys::ApiKeys;
use guild_node::serve::Guard;
use tonic::Status;
use tonic::body::Body;

use super::fault::Fault;

/// Paths that need no key.
pub const OPEN: [&str; 3] = [
    "/health",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];
/// What the server asks for in `WWW-Authenticate`.
const CHALLENGE: &str = "Bearer realm=\"guild\"";

/// The guard of a front door that only those with one of `keys` may use, for
/// [`guild_node::serve::Server::guarded`].
pub fn guard(keys: ApiKeys) -> Guard {
    Arc::new(move |request| refusal(&keys, request))
}

fn refusal(keys: &ApiKeys, request: &Request<Body>) -> Option<Response<Body>> {
    if OPEN.contains(&request.uri().path()) {
        return None;
    }
    let problem = match bearer(request.headers()) {
        Err(problem) => problem,
        Ok(key) => match keys.name_of(key) {
            Some(name) => {
                tracing::debug!(key = name, path = request.uri().path(), "let in");
                return None;
            }
            None => "the API key is not known here",
        },
    };
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|media| media.as_bytes().starts_with(b"application/grpc"));
    let mut response = if grpc {
        Status::unauthenticated(problem).into_http()
    } else {
        Fault::unauthenticated(problem)
            .into_response()
            .map(Body::new)
    };
    let challenge = header::HeaderValue::from_static(CHALLENGE);
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, challenge);
    Some(response)
}

/// The key that a request shows, if it shows one.
pub(super) fn key(headers: &HeaderMap) -> Option<&[u8]> {
    bearer(headers).ok()
}

/// The key that a request shows.
fn bearer(headers: &HeaderMap) -> Result<&[u8], &'static str> {
    let mut shown = headers.get_all(header::AUTHORIZATION).iter();
    let value = shown
        .next()
        .ok_or("an API key is missing; send `Authorization: Bearer KEY`")?;
    if shown.next().is_some() {
        return Err("more than one Authorization header");
    }
    let (scheme, key) = value
        .as_bytes()
        .split_at_checked("Bearer ".len())
        .ok_or("the Authorization header is not `Bearer KEY`")?;
    if !scheme.eq_ignore_ascii_case(b"Bearer ") {
        return Err("the Authorization header is not `Bearer KEY`");
    }
    Ok(key.trim_ascii())
}
