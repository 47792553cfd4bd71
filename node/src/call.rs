//! What a gRPC call brings beside its message: how long its caller waits, and the name by which another call ends it.
//!
//! Secret: how the header is written, and who knows which calls are under way. It must not know what is asked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

/// Header by which a caller says how long it waits for all of an answer.
const TIMEOUT: &str = "grpc-timeout";
/// Header of an answer by which its caller learns the request's name.
pub const NAME: &str = "x-request-id";
/// Digits of its number at most.
const DIGITS: usize = 8;

/// How long the caller waits, as its `grpc-timeout` says: up to eight digits and a unit (gRPC over HTTP/2, "Requests").
/// None where there is none, or none that can be read.
pub fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = (number && digits.len() <= DIGITS)
        .then(|| digits.parse().ok())
        .flatten()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// The shorter of `timeout_ms` of a request and of what its call says, in milliseconds.
pub fn shorter(timeout_ms: Option<u32>, metadata: &MetadataMap) -> Option<u32> {
    let waits = timeout(metadata).map(|waits| waits.as_millis().try_into().unwrap_or(u32::MAX));
    [timeout_ms, waits].into_iter().flatten().min()
}

/// Tells the caller, before anything else comes, what its request is called: in the `x-request-id` header. A name that
/// no header can have is not told; whoever has given it knows it.
pub fn name(metadata: &mut MetadataMap, id: &str) {
    if let Ok(id) = id.parse() {
        metadata.insert(NAME, id);
    }
}

/// Calls under way, by who has made them and what they are called. Several may have one name. Clones know the same.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Mutex<HashMap<Name, Running>>>);

type Name = (u64, String);

#[derive(Debug)]
struct Running {
    calls: usize,
    end: CancellationToken,
}

impl Calls {
    /// A call begins; it is known until what is returned is dropped.
    pub fn begin(&self, owner: u64, name: &str) -> Call {
        let name = (owner, name.to_owned());
        let mut known = self.lock();
        let running = known.entry(name.clone()).or_insert_with(|| Running {
            calls: 0,
            end: CancellationToken::new(),
        });
        running.calls += 1;
        Call {
            end: running.end.clone(),
            name,
            calls: self.clone(),
        }
    }

    /// Asks all calls of this owner and name to end; how many there were.
    pub fn end(&self, owner: u64, name: &str) -> usize {
        let name = (owner, name.to_owned());
        let mut known = self.lock();
        // Whoever begins under the same name later is another call.
        known.remove(&name).map_or(0, |running| {
            running.end.cancel();
            running.calls
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One call under way.
#[derive(Debug)]
pub struct Call {
    calls: Calls,
    name: Name,
    end: CancellationToken,
}

impl Call {
    /// Completes when somebody has asked it to end; may be dropped and called again.
    pub async fn ended(&self) {
        self.end.cancelled().await;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut known = self.calls.lock();
        // One that was asked to end is not known any more.
        if self.end.is_cancelled() {
            return;
        }
        if let Some(running) = known.get_mut(&self.name) {
            running.calls -= 1;
            if running.calls == 0 {
                known.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn a_timeout_is_read_as_the_protocol_writes_it() {
        for (text, want) in [
            ("2H", Some(Duration::from_secs(7200))),
            ("3M", Some(Duration::from_secs(180))),
            ("10S", Some(Duration::from_secs(10))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("0n", Some(Duration::ZERO)),
            ("100000000n", None),
            ("S", None),
            ("", None),
            ("5", None),
            ("5s", None),
            ("-5S", None),
            ("+5S", None),
        ] {
            let mut metadata = MetadataMap::new();
            metadata.insert(TIMEOUT, text.parse().unwrap());
            assert_eq!(timeout(&metadata), want, "{text:?}");
        }
        let mut metadata = MetadataMap::new();
        assert_eq!(timeout(&metadata), None);
        assert_eq!(shorter(Some(7), &metadata), Some(7));
        metadata.insert(TIMEOUT, "5m".parse().unwrap());
        assert_eq!(shorter(Some(7), &metadata), Some(5));
        assert_eq!(shorter(Some(3), &metadata), Some(3));
        assert_eq!(shorter(None, &metadata), Some(5));
    }

    #[test]
    fn a_call_is_ended_by_its_name_and_only_by_who_made_it() {
        let calls = Calls::default();
        let [a, twin, other, of_another] =
            [(1, "a"), (1, "a"), (1, "b"), (2, "a")].map(|(owner, name)| calls.begin(owner, name));
        let gone = calls.begin(1, "a");
        drop(gone);
        assert_eq!(calls.end(3, "a"), 0);
        assert_eq!(calls.end(1, "a"), 2);
        assert_eq!(calls.end(1, "a"), 0, "that was all");
        for (call, ends) in [
            (&a, true),
            (&twin, true),
            (&other, false),
            (&of_another, false),
        ] {
            assert_eq!(call.ended().now_or_never().is_some(), ends);
        }
        let later = calls.begin(1, "a");
        drop((a, twin));
        assert_eq!(later.ended().now_or_never(), None, "another of that name");
        drop((later, other, of_another));
        assert!(calls.lock().is_empty());
    }
}
