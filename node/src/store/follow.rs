//! Following a store: hints make it quick, re-listing makes it right.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{ClusterStore, Observation};

/// Looks in a row that must agree on a lower revision before it is believed:
/// one may come from a member that lags, a store that was wiped or restored
/// stays there.
const REWINDS_BELIEVED: u32 = 3;

/// What the store holds, kept fresh for as long as somebody has the receiver:
/// looked at after every hint and at least every `relist`. The last known
/// contents stay while the store is away; None before the first look.
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
    let mut away = false;
    loop {
        match store.observe().await {
            Ok(now) => {
                if away {
                    tracing::info!("the cluster store is back");
                }
                away = false;
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
                if !away {
                    tracing::warn!("{error}");
                }
                away = true;
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
