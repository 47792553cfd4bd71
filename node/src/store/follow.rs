//! Following a store: hints make it quick, re-listing makes it right.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::{ClusterStore, Observation};

/// Looks in a row that must agree on a lower revision before it is believed:
/// one may come from a member that lags, a store that was wiped or restored
/// stays there.
const REWINDS_BELIEVED: u32 = 3;

/// What the store holds, kept fresh for as long as somebody has the receiver:
/// looked at after every hint and at least every `relist`. The last known
/// contents stay while the store is away, but nobody is said to lead once it
/// has been away for `relist`; None before the first look.
pub fn follow(
    store: Arc<dyn ClusterStore>,
    relist: Duration,
) -> watch::Receiver<Option<Observation>> {
    let (seen, receiver) = watch::channel(None);
    tokio::spawn(async move {
        tokio::select! {
            () = seen.closed() => {}
            () = keep_looking(&*store, relist, &seen) => {}
        }
    });
    receiver
}

async fn keep_looking(
    store: &dyn ClusterStore,
    relist: Duration,
    seen: &watch::Sender<Option<Observation>>,
) {
    let mut revision = 0;
    let mut rewinds = 0;
    let mut away: Option<Instant> = None;
    loop {
        match store.observe().await {
            Ok(now) => {
                if away.take().is_some() {
                    tracing::info!("the cluster store is back");
                }
                rewinds = if now.revision < revision {
                    rewinds + 1
                } else {
                    0
                };
                let believed = rewinds == 0 || rewinds >= REWINDS_BELIEVED;
                if believed {
                    if rewinds > 0 {
                        tracing::error!(
                            from = revision,
                            to = now.revision,
                            "the cluster store has lost writes: following what it holds now"
                        );
                    }
                    rewinds = 0;
                    revision = now.revision;
                    seen.send_if_modified(|known| {
                        // A revision alone is news to nobody.
                        let news = known.as_ref().is_none_or(|known| {
                            known.leader != now.leader || known.state != now.state
                        });
                        *known = Some(now);
                        news
                    });
                }
            }
            Err(error) => {
                let since = *away.get_or_insert_with(|| {
                    tracing::warn!("{error}");
                    Instant::now()
                });
                if since.elapsed() >= relist {
                    seen.send_if_modified(|known| {
                        let known = known.as_mut();
                        known.is_some_and(|known| known.leader.take().is_some())
                    });
                }
                // A hint from a store that is away would only spin.
                tokio::time::sleep(relist).await;
                continue;
            }
        }
        tokio::select! {
            () = store.changed(revision) => {}
            () = tokio::time::sleep(relist) => {}
        }
    }
}
