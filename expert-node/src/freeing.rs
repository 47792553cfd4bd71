//! Memory that goes back to the system.
//!
//! Secret: that this is work. Giving back an expert of some megabytes takes the system a part of a
//! millisecond, and a placement that is left behind gives back dozens; so they go one by one, at the
//! pace of work that can wait, and whoever needs their room waits until they have gone.

use std::sync::Arc;

use guild_model::expert::Expert;
use tokio::sync::watch;

use crate::{pace::Pace, thread};

/// Experts that nobody needs any more, and other memory that is still held.
pub(crate) struct Freeing {
    pace: Arc<Pace>,
    held: watch::Sender<usize>,
}

/// Memory is held until this is dropped.
pub(crate) struct Held(watch::Sender<usize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

impl Freeing {
    pub(crate) fn new(pace: Arc<Pace>) -> Freeing {
        Freeing {
            pace,
            held: watch::Sender::new(0),
        }
    }

    /// [`Freeing::done`] waits for what this is beside.
    pub(crate) fn hold(&self) -> Held {
        self.held.send_modify(|held| *held += 1);
        Held(self.held.clone())
    }

    /// Lets experts go. Those that others have as well stay. Does not wait.
    pub(crate) fn free(&self, experts: Vec<Arc<Expert>>) {
        // Most are in the next table, too.
        let last = |expert| Arc::into_inner(expert);
        let gone: Vec<Expert> = experts.into_iter().filter_map(last).collect();
        if gone.is_empty() {
            return;
        }
        let (pace, held) = (Arc::clone(&self.pace), self.hold());
        let freed = thread::spawn_behind("giving memory back", move || {
            for expert in gone {
                pace.in_pieces(|_| drop(expert));
            }
            drop(held);
        });
        // Without a thread they have gone at once.
        if let Err(error) = freed {
            tracing::warn!("{error}");
        }
    }

    /// Completes when nothing is held that was to go.
    pub(crate) async fn done(&self) {
        // The sender is here.
        let _ = self.held.subscribe().wait_for(|&held| held == 0).await;
    }
}
