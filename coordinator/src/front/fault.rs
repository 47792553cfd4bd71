//! What can go wrong at the door, in one value, with its two wire forms.
//!
//! [`TABLE`] is the only place that relates gRPC codes to HTTP statuses and
//! OpenAI error types.

use std::{borrow::Cow, time::Duration};

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Domain of the ErrorInfo details.
pub const ERROR_DOMAIN: &str = "guild.inference.v1";
/// When to come back while the cluster is not ready.
pub const RETRY_NOT_READY: Duration = Duration::from_secs(5);
/// When to come back while the front door is full.
pub const RETRY_OVERLOADED: Duration = Duration::from_secs(1);

/// One row of the error table.
#[derive(Clone, Copy, Debug)]
pub struct ErrorRow {
    /// gRPC status code.
    pub code: Code,
    /// HTTP status that stands for it.
    pub http: u16,
    /// `type` of the OpenAI error object.
    pub kind: &'static str,
    /// `code` of the OpenAI error object when nothing more exact is known.
    pub reason: &'static str,
}

/// gRPC code, HTTP status, OpenAI `type`, OpenAI `code`.
pub const TABLE: [ErrorRow; 16] = [
    row(
        Code::InvalidArgument,
        400,
        "invalid_request_error",
        "invalid_value",
    ),
    row(
        Code::FailedPrecondition,
        400,
        "invalid_request_error",
        "failed_precondition",
    ),
    row(
        Code::OutOfRange,
        400,
        "invalid_request_error",
        "out_of_range",
    ),
    row(
        Code::Unauthenticated,
        401,
        "authentication_error",
        "unauthenticated",
    ),
    row(
        Code::PermissionDenied,
        403,
        "permission_error",
        "permission_denied",
    ),
    row(Code::NotFound, 404, "invalid_request_error", "not_found"),
    row(
        Code::AlreadyExists,
        409,
        "invalid_request_error",
        "already_exists",
    ),
    row(Code::Cancelled, 499, "invalid_request_error", "cancelled"),
    row(
        Code::Unimplemented,
        501,
        "invalid_request_error",
        "not_implemented",
    ),
    row(Code::Unavailable, 503, "service_unavailable", "unavailable"),
    row(
        Code::ResourceExhausted,
        503,
        "service_unavailable",
        "overloaded",
    ),
    row(Code::Aborted, 503, "service_unavailable", "aborted"),
    row(
        Code::DeadlineExceeded,
        504,
        "timeout_error",
        "deadline_exceeded",
    ),
    row(Code::Internal, 500, "server_error", "internal_error"),
    row(Code::DataLoss, 500, "server_error", "data_loss"),
    row(Code::Unknown, 500, "server_error", "unknown"),
];

const fn row(code: Code, http: u16, kind: &'static str, reason: &'static str) -> ErrorRow {
    ErrorRow {
        code,
        http,
        kind,
        reason,
    }
}

/// The row of a code; that of `Unknown` for anything else.
pub fn error_row(code: Code) -> ErrorRow {
    TABLE
        .into_iter()
        .find(|r| r.code == code)
        .unwrap_or(TABLE[TABLE.len() - 1])
}

/// Why a request is refused or has failed.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    code: Code,
    /// HTTP statuses that gRPC has no word for (405, 413, 415).
    http: Option<StatusCode>,
    reason: Cow<'static, str>,
    message: String,
    /// Field and what is wrong with it; the first is OpenAI's `param`.
    violations: Vec<(String, String)>,
    retry_after: Option<Duration>,
}

impl Fault {
    fn new(code: Code, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            code,
            http: None,
            reason: reason.into(),
            message: message.into(),
            violations: Vec::new(),
            retry_after: None,
        }
    }

    /// A field has a value that it cannot have.
    pub(super) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        let (field, message) = (field.into(), message.into());
        let mut fault = Self::new(
            Code::InvalidArgument,
            "invalid_value",
            format!("`{field}`: {message}"),
        );
        fault.violations.push((field, message));
        fault
    }

    /// A field that must be there is not.
    pub(super) fn missing(field: impl Into<String>, expected: &str) -> Self {
        Self {
            reason: "missing".into(),
            ..Self::invalid(field, format!("required: {expected}"))
        }
    }

    /// Several fields have; the first one leads.
    pub(super) fn invalid_fields(violations: Vec<(String, String)>) -> Result<(), Self> {
        let Some((field, message)) = violations.first() else {
            return Ok(());
        };
        let fault = Self::invalid(field, message);
        Err(Self {
            violations,
            ..fault
        })
    }

    /// A field asks for something this server does not do.
    pub(super) fn unsupported(field: &str, message: &str) -> Self {
        Self {
            reason: "unsupported_parameter".into(),
            ..Self::invalid(field, message)
        }
    }

    /// Prompt, or prompt and output, do not fit the context.
    pub(super) fn too_long(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: "context_length_exceeded".into(),
            ..Self::invalid(field, message)
        }
    }

    /// The body as a whole is no request.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, "invalid_json", message)
    }

    /// The checkpoint cannot do what this field asks for.
    pub(super) fn precondition(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: Code::FailedPrecondition,
            reason: "failed_precondition".into(),
            ..Self::invalid(field, message)
        }
    }

    /// Nobody knows who asks.
    pub(super) fn unauthenticated(message: &str) -> Self {
        Self::new(Code::Unauthenticated, "invalid_api_key", message)
    }

    pub(super) fn unknown_model(asked: &str, served: &str) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("the model `{asked}` does not exist; this server has `{served}`");
        let mut fault = Self::new(Code::NotFound, "model_not_found", &message);
        fault.violations.push(("model".into(), message));
        fault
    }

    pub(super) fn not_ready(reason: &str) -> Self {
        let fault = Self::new(
            Code::Unavailable,
            "not_ready",
            format!("not ready: {reason}"),
        );
        Self {
            retry_after: Some(RETRY_NOT_READY),
            ..fault
        }
    }

    pub(super) fn overloaded(limit: usize) -> Self {
        let fault = Self::new(
            Code::ResourceExhausted,
            "overloaded",
            format!("{limit} requests are in flight already; try again"),
        );
        Self {
            retry_after: Some(RETRY_OVERLOADED),
            ..fault
        }
    }

    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "internal_error", message)
    }

    pub(super) fn unknown_route(path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        Self::new(
            Code::NotFound,
            "unknown_url",
            format!("no such path: {path}"),
        )
    }

    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        Self::http_only(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            format!("{method} is not allowed for {path}"),
        )
    }

    pub(super) fn too_large(limit: usize) -> Self {
        Self::http_only(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body_too_large",
            format!("the body has more than {limit} bytes"),
        )
    }

    pub(super) fn not_json() -> Self {
        Self::http_only(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "send JSON with the header `Content-Type: application/json`",
        )
    }

    fn http_only(http: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            http: Some(http),
            ..Self::new(Code::InvalidArgument, reason, message)
        }
    }

    /// Gives fields the names they have in the client's own request.
    pub(super) fn rename(mut self, name: impl Fn(&str) -> String) -> Self {
        for (field, _) in &mut self.violations {
            let named = name(field);
            if named != *field {
                self.message = self.message.replacen(field.as_str(), &named, 1);
            }
            *field = named;
        }
        self
    }

    pub(super) fn status(&self) -> StatusCode {
        let row = error_row(self.code);
        self.http
            .or_else(|| StatusCode::from_u16(row.http).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The OpenAI error object, `{"error": {…}}`.
    pub(super) fn body(&self) -> Value {
        json!({"error": self.error()})
    }

    /// What stands in it.
    pub(super) fn error(&self) -> Value {
        json!({
            "message": self.message,
            "type": error_row(self.code).kind,
            "param": self.violations.first().map(|(field, _)| field),
            "code": self.reason,
        })
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let retry = self
            .retry_after
            .or((self.status() == StatusCode::SERVICE_UNAVAILABLE).then_some(RETRY_OVERLOADED));
        if let Some(after) = retry {
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let mut details = ErrorDetails::new();
        details.set_error_info(
            fault.reason.to_uppercase(),
            ERROR_DOMAIN,
            std::collections::HashMap::new(),
        );
        if !fault.violations.is_empty() {
            details.set_bad_request(
                fault
                    .violations
                    .iter()
                    .map(|(f, m)| FieldViolation::new(f, m))
                    .collect::<Vec<_>>(),
            );
        }
        if fault.retry_after.is_some() {
            details.set_retry_info(fault.retry_after);
        }
        Status::with_error_details(fault.code, fault.message, details)
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let reason = match details.error_info() {
            Some(info) if !info.reason.is_empty() => Cow::Owned(info.reason.to_lowercase()),
            _ => Cow::Borrowed(error_row(status.code()).reason),
        };
        let message = if status.message().is_empty() {
            status.code().description()
        } else {
            status.message()
        };
        let violations = details.bad_request().map(|b| {
            b.field_violations
                .iter()
                .map(|v| (v.field.clone(), v.description.clone()))
                .collect()
        });
        Self {
            code: status.code(),
            http: None,
            reason,
            message: message.to_owned(),
            violations: violations.unwrap_or_default(),
            retry_after: details.retry_info().and_then(|r| r.retry_delay),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_code_but_ok_has_one_row() {
        for number in 1..=16 {
            let code = Code::from_i32(number);
            assert_eq!(
                TABLE.iter().filter(|r| r.code == code).count(),
                1,
                "{code:?}"
            );
        }
    }

    #[test]
    fn a_status_becomes_the_http_error_of_its_row() {
        for row in TABLE {
            let fault = Fault::from(Status::new(row.code, "why"));
            assert_eq!(fault.status().as_u16(), row.http, "{:?}", row.code);
            let body = fault.body();
            assert_eq!(body["error"]["message"], "why");
            assert_eq!(
                (
                    body["error"]["type"].as_str(),
                    body["error"]["code"].as_str()
                ),
                (Some(row.kind), Some(row.reason))
            );
            assert!(body["error"]["param"].is_null());
            let retries = fault
                .into_response()
                .headers()
                .contains_key(header::RETRY_AFTER);
            assert_eq!(retries, row.http == 503, "{:?}", row.code);
        }
    }

    #[test]
    fn details_survive_the_way_there_and_back() {
        let faults = [
            Fault::invalid("top_p", "too small"),
            Fault::too_long("prompt", "too long"),
            Fault::unsupported("tools", "no"),
            Fault::precondition("prompt", "no tokenizer"),
            Fault::unknown_model("a", "b"),
            Fault::not_ready("no expert nodes"),
            Fault::overloaded(3),
            Fault::internal("bug"),
        ];
        for fault in faults {
            let back = Fault::from(Status::from(fault.clone()));
            assert_eq!(back.body(), fault.body());
            assert_eq!(
                (back.status(), back.retry_after),
                (fault.status(), fault.retry_after)
            );
        }
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up() {
        let mut details = ErrorDetails::new();
        details.set_retry_info(Some(Duration::from_millis(1500)));
        let fault = Fault::from(Status::with_error_details(Code::Unavailable, "x", details));
        assert_eq!(fault.into_response().headers()[header::RETRY_AFTER], "2");
    }
}
