//! The store in etcd, for coordinators on several machines.
//!
//! `PREFIX/leader` belongs to the leader's lease and is created only where it
//! is absent; its create revision is the term, since etcd's revisions only
//! grow. `PREFIX/state` is written in a transaction that compares that revision,
//! the lease and the state's own last revision, so that neither a deposed leader nor
//! a late duplicate of an earlier write can get in. Reads are linearizable.

mod endpoints;
mod lease;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, GetResponse, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions,
};
use tokio::sync::Mutex;

use super::{Candidate, ClusterStore, Hold, Leader, Leadership, Observation, State, StoreError};
use endpoints::Endpoints;
use lease::Lease;

/// Pause between attempts while etcd cannot be reached.
const RETRY: Duration = Duration::from_millis(250);
/// A leader's end is noticed within this time even if no hint comes.
const RELIST: Duration = Duration::from_millis(500);
/// Lost races against own late duplicates before a write is given up.
const WRITE_ATTEMPTS: usize = 3;

/// A store in etcd.
#[derive(Clone, Debug)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoints: Endpoints,
    prefix: String,
}

/// Both keys as one transaction has read them.
struct Keys {
    observation: Observation,
    /// Lease of the leader's key.
    lease: i64,
    /// Last change of the state's key; 0: there is none.
    state_revision: i64,
}

impl EtcdStore {
    /// The store under `prefix` in the etcd whose members are at `endpoints`
    /// (`host:port`). Nothing is connected yet.
    pub fn new(endpoints: Vec<String>, prefix: String) -> EtcdStore {
        EtcdStore {
            shared: Arc::new(Shared {
                endpoints: Endpoints::new(endpoints),
                prefix,
            }),
        }
    }

    /// One attempt to lead; None: somebody else does.
    async fn try_lead(
        &self,
        candidate: &Candidate,
        ttl: Duration,
    ) -> Result<Option<Leadership>, StoreError> {
        let shared = &self.shared;
        if shared.read().await?.observation.leader.is_some() {
            return Ok(None);
        }
        let lease = Lease::grant(&shared.endpoints, ttl).await?;
        let won = self.claim(candidate, &lease).await;
        let (keys, leader) = match won {
            Ok(Some(won)) => won,
            Ok(None) => {
                lease.revoke().await;
                return Ok(None);
            }
            Err(error) => {
                lease.revoke().await;
                return Err(error);
            }
        };
        let validity = lease.validity();
        let hold = EtcdHold {
            shared: Arc::clone(shared),
            leader: leader.clone(),
            lease,
            state_revision: Mutex::new(keys.state_revision),
        };
        let inherited = keys.observation.state;
        Ok(Some(Leadership::new(
            leader,
            inherited,
            validity,
            Box::new(hold),
        )))
    }

    async fn claim(
        &self,
        candidate: &Candidate,
        lease: &Lease,
    ) -> Result<Option<(Keys, Leader)>, StoreError> {
        let shared = &self.shared;
        let value = serde_json::to_vec(candidate)
            .map_err(|e| StoreError::unavailable(&shared.endpoints, e))?;
        let key = shared.leader_key();
        let options = etcd_client::PutOptions::new().with_lease(lease.id());
        let txn = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.as_str(), value, Some(options))]);
        // Whether it worked is read from the store: an answer may be lost on
        // the way and the repetition then finds the key there.
        shared.txn(txn).await?;
        let keys = shared.read().await?;
        let ours = keys.lease == lease.id();
        Ok(match keys.observation.leader.clone() {
            Some(leader) if ours => Some((keys, leader)),
            _ => None,
        })
    }
}

impl Shared {
    fn leader_key(&self) -> String {
        format!("{}/leader", self.prefix)
    }

    fn state_key(&self) -> String {
        format!("{}/state", self.prefix)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, StoreError> {
        self.endpoints
            .call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await
    }

    /// Both keys at one revision, by the quorum.
    async fn read(&self) -> Result<Keys, StoreError> {
        let txn = Txn::new().and_then(self.reads());
        self.keys(&self.txn(txn).await?)
    }

    fn reads(&self) -> [TxnOp; 2] {
        [
            TxnOp::get(self.leader_key(), None),
            TxnOp::get(self.state_key(), None),
        ]
    }

    fn keys(&self, response: &TxnResponse) -> Result<Keys, StoreError> {
        let damaged = |reason: String| StoreError::Damaged {
            store: self.endpoints.to_string(),
            reason,
            remedy: format!(
                "with every coordinator stopped, delete the keys under {}/",
                self.prefix
            ),
        };
        let gets: Vec<GetResponse> = response
            .op_responses()
            .into_iter()
            .filter_map(|op| match op {
                TxnOpResponse::Get(get) => Some(get),
                _ => None,
            })
            .collect();
        let [leader, state] = gets.as_slice() else {
            return Err(damaged("a read has no answer".to_owned()));
        };
        let (leader, state) = (leader.kvs().first(), state.kvs().first());
        let observation = Observation {
            revision: response
                .header()
                .map_or(0, |header| header.revision().unsigned_abs()),
            leader: match leader {
                Some(kv) => Some(Leader {
                    candidate: serde_json::from_slice(kv.value())
                        .map_err(|e| damaged(format!("{}: {e}", self.leader_key())))?,
                    term: kv.create_revision().unsigned_abs(),
                }),
                None => None,
            },
            state: match state {
                Some(kv) => Some(
                    State::decode(kv.value())
                        .map_err(|e| damaged(format!("{}: {e}", self.state_key())))?,
                ),
                None => None,
            },
        };
        Ok(Keys {
            observation,
            lease: leader.map_or(0, etcd_client::KeyValue::lease),
            state_revision: state.map_or(0, etcd_client::KeyValue::mod_revision),
        })
    }
}

#[tonic::async_trait]
impl ClusterStore for EtcdStore {
    async fn campaign(
        &self,
        candidate: &Candidate,
        ttl: Duration,
    ) -> Result<Leadership, StoreError> {
        super::check(candidate)?;
        let mut complained = false;
        loop {
            let revision = match self.try_lead(candidate, ttl).await {
                Ok(Some(leadership)) => return Ok(leadership),
                Ok(None) => Ok(self.observe().await.map_or(0, |seen| seen.revision)),
                Err(error) => Err(error),
            };
            match revision {
                Ok(revision) => {
                    complained = false;
                    tokio::select! {
                        () = self.changed(revision) => {}
                        () = tokio::time::sleep(RELIST) => {}
                    }
                }
                Err(error) if error.is_retryable() => {
                    if !complained {
                        tracing::warn!("waiting to lead: {error}");
                    }
                    complained = true;
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn observe(&self) -> Result<Observation, StoreError> {
        Ok(self.shared.read().await?.observation)
    }

    async fn changed(&self, revision: u64) {
        let options = WatchOptions::new().with_prefix().with_start_revision(
            i64::try_from(revision)
                .unwrap_or(i64::MAX)
                .saturating_add(1),
        );
        let key = format!("{}/", self.shared.prefix);
        let events = self
            .shared
            .endpoints
            .call(|mut client| {
                let (key, options) = (key.clone(), options.clone());
                async move { client.watch(key, Some(options)).await }
            })
            .await;
        if let Ok(mut events) = events {
            while let Ok(Some(message)) = events.message().await {
                if !message.events().is_empty() || message.canceled() {
                    return;
                }
            }
        }
        // No hint will come. Those who wait re-list anyway.
        std::future::pending::<()>().await;
    }
}

#[derive(Debug)]
struct EtcdHold {
    shared: Arc<Shared>,
    leader: Leader,
    lease: Lease,
    /// Of the state as this leader knows it; held during a write.
    state_revision: Mutex<i64>,
}

#[tonic::async_trait]
impl Hold for EtcdHold {
    async fn write(&self, state: &State) -> Result<u64, StoreError> {
        let shared = &self.shared;
        let term = i64::try_from(self.leader.term).unwrap_or(i64::MAX);
        let mut known = self.state_revision.lock().await;
        for _ in 0..WRITE_ATTEMPTS {
            let txn = Txn::new()
                .when([
                    Compare::create_revision(shared.leader_key(), CompareOp::Equal, term),
                    // An etcd that was wiped counts its revisions anew; no two leases have one id.
                    Compare::lease(shared.leader_key(), CompareOp::Equal, self.lease.id()),
                    Compare::mod_revision(shared.state_key(), CompareOp::Equal, *known),
                ])
                .and_then([TxnOp::put(shared.state_key(), state.encode(), None)])
                .or_else(shared.reads());
            let response = shared.txn(txn).await?;
            if response.succeeded() {
                *known = response.header().map_or(0, |header| header.revision());
                return Ok(known.unsigned_abs());
            }
            let keys = shared.keys(&response)?;
            if keys.observation.leader.as_ref() != Some(&self.leader) {
                let reason = match keys.observation.leader {
                    Some(leader) => format!("{} leads", leader.candidate.id),
                    None => "the lease is gone".to_owned(),
                };
                self.lease.give_up(&reason);
                return Err(StoreError::Fenced {
                    term: self.leader.term,
                    reason,
                });
            }
            *known = keys.state_revision;
            if keys.observation.state.as_ref() == Some(state) {
                // An earlier attempt whose answer was lost.
                return Ok(keys.state_revision.unsigned_abs());
            }
        }
        Err(StoreError::unavailable(
            &shared.endpoints,
            "earlier writes keep arriving late",
        ))
    }

    async fn release(self: Box<Self>) {
        let hold = *self;
        hold.lease.revoke().await;
    }
}
