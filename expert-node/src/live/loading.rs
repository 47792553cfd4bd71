//! How far an expert node has come with its placements.
//!
//! Secret: what was tried, and when what has failed is tried again. It must not know how experts
//! are made resident.

use std::{collections::HashMap, sync::Arc, time::Duration};

use guild_model::expert::Expert;
use tokio::time::Instant;

use crate::residents::ExpertKey;

/// The active placement that could not be loaded is tried again after this long, and after twice
/// the time whenever that has failed, too.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// But at least so often.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What the placements have come to.
#[derive(Default)]
pub(super) struct Loading {
    /// What has been made resident for a placement that is not complete.
    pub(super) spare: HashMap<ExpertKey, Arc<Expert>>,
    /// The epoch that was last tried, resident or failed.
    pub(super) tried: Option<u64>,
    /// The newest epoch that is resident; 0: none.
    pub(super) epoch: u64,
    /// The newest that could not be loaded, and why.
    pub(super) failed: Option<(u64, String)>,
    /// When that is tried again if it is active: nobody makes another one for it.
    retry: Option<Retry>,
    /// When the connections that experts came by are closed.
    pub(super) part_at: Option<Instant>,
}

struct Retry {
    epoch: u64,
    at: Instant,
    pause: Duration,
}

impl Loading {
    /// An epoch is resident.
    pub(super) fn succeeded(&mut self, epoch: u64) {
        self.epoch = epoch;
        (self.failed, self.retry) = (None, None);
    }

    /// An epoch could not be loaded.
    pub(super) fn cannot(&mut self, epoch: u64, reason: String) {
        self.failed = Some((epoch, reason));
        let before = self.retry.take().filter(|before| before.epoch == epoch);
        let pause = before.map_or(RETRY_MIN, |before| (2 * before.pause).min(RETRY_MAX));
        self.retry = Some(Retry {
            epoch,
            at: Instant::now() + pause,
            pause,
        });
    }

    /// When the active placement is to be tried again.
    pub(super) fn retry_at(&self, active: u64) -> Option<Instant> {
        let retry = self.retry.as_ref().filter(|retry| retry.epoch == active);
        retry.map(|retry| retry.at)
    }
}
