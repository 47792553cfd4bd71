//! Whether experts in memory are still what they were when they came.
//!
//! Secret: how often one looks. Memory fails without a word, and an expert stays in it for
//! months: one after the other is held against its digest, slowly enough that nobody notices.
//! This module must not know what becomes of a node whose memory has changed.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::time::sleep;

use crate::{
    Error,
    pace::Pace,
    residents::{ExpertKey, Residents},
    thread,
};

/// Between two experts.
const PAUSE: Duration = Duration::from_secs(1);

/// Looks at every expert in memory, again and again.
///
/// # Errors
/// One has changed.
pub(crate) async fn scrub(residents: &Residents, pace: &Arc<Pace>) -> Result<Infallible, Error> {
    loop {
        sleep(PAUSE).await;
        for key in residents.keys() {
            // It may have gone since.
            let Some(expert) = residents.find(key) else {
                continue;
            };
            let pace = Arc::clone(pace);
            let looked = thread::behind_serving("looking at an expert in memory", move || {
                let now = pace.in_pieces(|breathe| expert.hash_by(breathe));
                compare(key, expert.digest(), now)
            });
            looked.await??;
            sleep(PAUSE).await;
        }
    }
}

/// Holds what an expert was when it came against what it is.
fn compare((layer, expert): ExpertKey, was: [u8; 32], now: [u8; 32]) -> Result<(), Error> {
    if now == was {
        return Ok(());
    }
    let hex = |digest: [u8; 32]| blake3::Hash::from_bytes(digest).to_hex().to_string();
    Err(Error::Damaged {
        layer,
        expert,
        was: hex(was),
        now: hex(now),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_expert_that_has_changed_is_named_with_what_it_was_and_is() {
        let (was, now) = ([0x11; 32], [0x22; 32]);
        compare((3, 7), was, was).unwrap();
        let error = compare((3, 7), was, now).unwrap_err().to_string();
        for says in ["layer 3, expert 7", "1111 before", "2222 now"] {
            assert!(error.contains(says), "{error}");
        }
    }
}
