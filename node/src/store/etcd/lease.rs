//! A lease that renews itself on its own OS thread, so that neither a long
//! computation nor a blocked worker pool of the process can lose it.

use std::time::{Duration, Instant};

use etcd_client::Error;
use tokio::sync::watch;

use super::super::{StoreError, Validity};
use super::endpoints::Endpoints;

/// Renewals in one time to live.
const RENEWALS_PER_TTL: u32 = 4;
/// Pause after a renewal that failed, at most.
const RETRY: Duration = Duration::from_millis(200);
/// What giving a lease back may take: its end does the same, only later.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Renewed until dropped or lost.
#[derive(Debug)]
pub(super) struct Lease {
    id: i64,
    endpoints: Endpoints,
    lost: watch::Sender<Option<String>>,
    valid_until: watch::Receiver<Instant>,
    /// Dropped with the lease: the thread ends.
    renewing: watch::Sender<()>,
}

impl Lease {
    pub(super) async fn grant(endpoints: &Endpoints, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        let asked = Instant::now();
        let granted = endpoints
            .call(|mut client| async move { client.lease_grant(seconds.max(1), None).await })
            .await?;
        // etcd may have made it longer.
        let ttl = Duration::from_secs(granted.ttl().unsigned_abs());
        let (lost, _) = watch::channel(None);
        let (renewing, released) = watch::channel(());
        let (renewed, valid_until) = watch::channel(asked + ttl);
        let renewal = Renewal {
            id: granted.id(),
            ttl,
            valid_until: renewed,
            endpoints: endpoints.anew(),
            lost: lost.clone(),
        };
        std::thread::Builder::new()
            .name("guild-lease".to_owned())
            .spawn(move || renewal.run(released))
            .map_err(|error| {
                let reason = format_args!("cannot start the lease thread: {error}");
                StoreError::unavailable(endpoints, reason)
            })?;
        Ok(Lease {
            id: granted.id(),
            endpoints: endpoints.anew(),
            lost,
            valid_until,
            renewing,
        })
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// What is known of it here.
    pub(super) fn validity(&self) -> Validity {
        Validity {
            lost: self.lost.subscribe(),
            until: Some(self.valid_until.clone()),
        }
    }

    /// It is known elsewhere that the lease is of no use any more.
    pub(super) fn give_up(&self, reason: &str) {
        self.lost.send_replace(Some(reason.to_owned()));
    }

    /// Gives the lease back: what belongs to it is gone at once.
    pub(super) async fn revoke(self) {
        let Lease {
            id,
            endpoints,
            renewing,
            ..
        } = self;
        drop(renewing);
        let revoke = endpoints.call(|mut client| async move { client.lease_revoke(id).await });
        // Otherwise it runs out.
        let _ = tokio::time::timeout(REVOKE_TIMEOUT, revoke).await;
    }
}

struct Renewal {
    id: i64,
    ttl: Duration,
    /// By this process's clock, counted from before the renewal was asked for:
    /// earlier than etcd's own count.
    valid_until: watch::Sender<Instant>,
    endpoints: Endpoints,
    lost: watch::Sender<Option<String>>,
}

impl Renewal {
    fn run(mut self, mut released: watch::Receiver<()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let reason = match runtime {
            Ok(runtime) => runtime.block_on(async {
                tokio::select! {
                    // Nothing is ever sent: this ends when the lease is dropped.
                    _ = released.changed() => None,
                    reason = self.renew() => Some(reason),
                }
            }),
            Err(error) => Some(format!("the lease thread cannot run: {error}")),
        };
        let Some(reason) = reason else {
            return;
        };
        tracing::warn!("leadership is lost: {reason}");
        self.lost.send_replace(Some(reason));
    }

    async fn renew(&mut self) -> String {
        let mut failure = String::new();
        loop {
            let pause = match failure.is_empty() {
                true => self.ttl / RENEWALS_PER_TTL,
                false => RETRY.min(self.ttl / RENEWALS_PER_TTL),
            };
            let valid_until = *self.valid_until.borrow();
            let wake = (Instant::now() + pause).min(valid_until);
            tokio::time::sleep_until(wake.into()).await;
            let asked = Instant::now();
            let left = valid_until.saturating_duration_since(asked);
            if left.is_zero() {
                return format!("the lease could not be renewed in time; {failure}");
            }
            let id = self.id;
            let renewed = self.endpoints.call(|mut client| async move {
                // The first message renews, and its answer is awaited.
                match client.lease_keep_alive(id).await {
                    Ok(_) => Ok(true),
                    Err(Error::LeaseKeepAliveError(_)) => Ok(false),
                    Err(error) => Err(error),
                }
            });
            match tokio::time::timeout(left, renewed).await {
                Ok(Ok(true)) => {
                    self.valid_until.send_replace(asked + self.ttl);
                    failure.clear();
                }
                Ok(Ok(false)) => return "etcd has ended the lease".to_owned(),
                Ok(Err(error)) => failure = error.to_string(),
                Err(_) => failure = "no answer in time".to_owned(),
            }
        }
    }
}
