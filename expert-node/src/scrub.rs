//! Whether experts in memory are still what they were when they came.
//!
//! Secret: how often one looks. Memory fails without a word, and an expert stays in it for
//! months: one after the other is held against its digest, slowly enough that nobody notices.
//! This module must not know what becomes of a node whose memory has changed.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use guild_model::expert::Expert;
use tokio::time::sleep;

use crate::{
    Error,
    residents::{ExpertKey, Residents},
    thread,
};

/// Between two experts, at least.
const PAUSE: Duration = Duration::from_secs(1);
/// And so many times as long as the last one took: about a fiftieth of a core is used.
const REST: u32 = 50;

/// What experts were when they were seen first.
#[derive(Default)]
struct Seen(HashMap<ExpertKey, (Weak<Expert>, blake3::Hash)>);

impl Seen {
    /// Holds an expert against what it was. Blocks.
    ///
    /// # Errors
    /// It has changed.
    fn check(&mut self, key: ExpertKey, expert: &Arc<Expert>) -> Result<(), Error> {
        let now = blake3::hash(expert.blob());
        let was = match self.0.get(&key) {
            Some((known, was)) if known.as_ptr() == Arc::as_ptr(expert) => *was,
            _ => {
                // Whoever copies it from here is told this one, too.
                let was = blake3::Hash::from_bytes(expert.digest());
                self.0.insert(key, (Arc::downgrade(expert), was));
                was
            }
        };
        if now == was {
            return Ok(());
        }
        let (layer, expert) = key;
        Err(Error::Damaged {
            layer,
            expert,
            was: was.to_hex().to_string(),
            now: now.to_hex().to_string(),
        })
    }
}

/// Looks at every expert in memory, again and again.
///
/// # Errors
/// One has changed.
pub(crate) async fn scrub(residents: &Residents) -> Result<Infallible, Error> {
    let mut seen = Seen::default();
    loop {
        sleep(PAUSE).await;
        seen.0.retain(|_, (known, _)| known.strong_count() > 0);
        for key in residents.keys() {
            // It may have gone since.
            let Some(expert) = residents.find(key) else {
                continue;
            };
            let begun = Instant::now();
            let checked = thread::behind_serving("looking at an expert in memory", move || {
                let outcome = seen.check(key, &expert);
                (seen, outcome)
            });
            let outcome;
            (seen, outcome) = checked.await?;
            outcome?;
            sleep(PAUSE.max(begun.elapsed() * REST)).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use guild_model::{Checkpoint, checkpoint::Dtype};

    use super::*;

    #[test]
    fn an_expert_that_has_changed_is_named_and_one_that_came_anew_is_not() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3-basic");
        let residents = Residents::new(Checkpoint::open(&golden).unwrap(), Dtype::Auto, 0);
        let key = (1, 0);
        let mut seen = Seen::default();
        let expert = residents.read(key).unwrap();
        seen.check(key, &expert).unwrap();
        seen.check(key, &expert).unwrap();
        // As if it had been something else when it was seen first.
        let another = blake3::hash(b"another");
        seen.0.get_mut(&key).unwrap().1 = another;
        let error = seen.check(key, &expert).unwrap_err().to_string();
        assert!(error.contains("layer 1, expert 0"), "{error}");
        assert!(error.contains(another.to_hex().as_str()), "{error}");

        let kept = Arc::downgrade(&expert);
        drop(expert);
        assert!(kept.upgrade().is_none());
        let again = residents.read(key).unwrap();
        seen.check(key, &again).unwrap();
    }
}
