//! gRPC errors that a program can act on: a code, a sentence for people, and
//! google.rpc details (ErrorInfo, RetryInfo, BadRequest) for machines.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// ErrorInfo.domain of everything this project reports.
pub const DOMAIN: &str = "guild";

/// An error with an ErrorInfo `reason` (UPPER_SNAKE_CASE, stable) and metadata.
pub fn with_reason<'a>(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
) -> Status {
    build(code, reason, message.into(), metadata, None)
}

/// INVALID_ARGUMENT: `field` of the request is wrong in the way `description` says.
pub fn invalid(field: &str, description: impl Into<String>) -> Status {
    let description = description.into();
    let mut details = ErrorDetails::with_bad_request_violation(field, description.as_str());
    details.set_error_info("INVALID_ARGUMENT", DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(
        Code::InvalidArgument,
        format!("{field}: {description}"),
        details,
    )
}

/// UNAVAILABLE: not now; `retry_after` when waiting is known to help.
pub fn unavailable(
    reason: &str,
    message: impl Into<String>,
    retry_after: Option<Duration>,
) -> Status {
    build(Code::Unavailable, reason, message.into(), [], retry_after)
}

/// RESOURCE_EXHAUSTED: a named limit is reached; retry after the given time.
pub fn exhausted(reason: &str, message: impl Into<String>, retry_after: Duration) -> Status {
    build(
        Code::ResourceExhausted,
        reason,
        message.into(),
        [],
        Some(retry_after),
    )
}

/// NOT_FOUND with a reason.
pub fn not_found(reason: &str, message: impl Into<String>) -> Status {
    build(Code::NotFound, reason, message.into(), [], None)
}

/// FAILED_PRECONDITION: will not work until somebody changes something.
pub fn precondition<'a>(
    reason: &str,
    message: impl Into<String>,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
) -> Status {
    build(
        Code::FailedPrecondition,
        reason,
        message.into(),
        metadata,
        None,
    )
}

/// INTERNAL: a defect of ours.
pub fn internal(message: impl Into<String>) -> Status {
    build(Code::Internal, "INTERNAL", message.into(), [], None)
}

/// The ErrorInfo reason that a status carries, if it carries one of ours.
pub fn reason_of(status: &Status) -> Option<String> {
    status
        .get_details_error_info()
        .filter(|info| info.domain == DOMAIN)
        .map(|info| info.reason)
}

/// How long a status asks to wait before the next try, if it says.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status
        .get_details_retry_info()
        .and_then(|info| info.retry_delay)
}

fn build<'a>(
    code: Code,
    reason: &str,
    message: String,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
    retry_after: Option<Duration>,
) -> Status {
    let metadata: HashMap<String, String> = metadata
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    if retry_after.is_some() {
        details.set_retry_info(retry_after);
    }
    Status::with_error_details(code, message, details)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn details_survive_the_trip_through_the_status() {
        let status = exhausted("QUEUE_FULL", "64 requests wait", Duration::from_secs(2));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(reason_of(&status).as_deref(), Some("QUEUE_FULL"));
        assert_eq!(retry_after(&status), Some(Duration::from_secs(2)));

        let status = invalid("sampling.top_p", "1.5 is not in (0, 1]");
        let bad = status.get_details_bad_request().unwrap();
        assert_eq!(bad.field_violations[0].field, "sampling.top_p");
        assert!(status.message().contains("sampling.top_p"));
        assert_eq!(retry_after(&status), None);

        let foreign = Status::unavailable("connection refused");
        assert_eq!(reason_of(&foreign), None);
    }
}
