//! The cluster store: what outlives a coordinator, and who of several leads.
//!
//! Secret of this module: where that is kept. A [`ClusterStore`] elects one
//! leader among candidates, gives each term of leadership a number that only
//! grows, and keeps one small [`State`] that only the present leader can write.
//! The data plane never needs it: a cluster serves on while its store is away.
//!
//! Three backends, named by a [`StoreUrl`]: [`MemoryStore`] (one process,
//! nothing outlives it), [`EmbeddedStore`] (one durable file; several processes
//! of one machine), [`EtcdStore`] (several machines).

mod embedded;
mod etcd;
mod follow;
mod memory;
mod state;
mod url;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use embedded::EmbeddedStore;
pub use etcd::EtcdStore;
pub use follow::follow;
pub use memory::MemoryStore;
pub use state::{MAX_PLACEMENT_BYTES, State};
pub use url::{StoreUrl, StoreUrlError};

use crate::exit::{ExitKind, HasExitKind};

/// Longest id or address of a candidate.
pub const MAX_NAME_BYTES: usize = 1024;

/// Who wants to lead.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Candidate {
    /// Unique among the candidates.
    pub id: String,
    /// Where nodes and other candidates reach it when it leads.
    pub address: String,
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its id and address.
    pub candidate: Candidate,
    /// The fencing number of its term: larger than that of every earlier one,
    /// for as long as the store keeps its data.
    pub term: u64,
}

/// One consistent look at the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// Grows with everything written to the store.
    pub revision: u64,
    /// Who leads now; None: nobody.
    pub leader: Option<Leader>,
    /// What the last leader to write has written.
    pub state: Option<State>,
}

/// Why the store did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The writer does not lead (any more): nothing was written.
    #[error("this coordinator no longer leads (term {term}): nothing was written; {reason}")]
    Fenced {
        /// The writer's term.
        term: u64,
        /// How it was deposed.
        reason: String,
    },
    /// The store cannot be reached or cannot write; trying again may help.
    #[error("the cluster store {store} is not available: {reason}")]
    Unavailable {
        /// Which store.
        store: String,
        /// Why.
        reason: String,
    },
    /// What the store holds cannot be trusted. Starting without it would bring
    /// old epochs back, so a person has to decide.
    #[error("the cluster store {store} is damaged: {reason}; {remedy}")]
    Damaged {
        /// Which store.
        store: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// What was to be written breaks a rule: nothing was written.
    #[error("{field}: {problem}")]
    Refused {
        /// Which value.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl StoreError {
    /// Whether the same call may work later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. })
    }

    fn unavailable(store: &impl fmt::Display, reason: impl fmt::Display) -> StoreError {
        StoreError::Unavailable {
            store: store.to_string(),
            reason: reason.to_string(),
        }
    }
}

impl HasExitKind for StoreError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            StoreError::Unavailable { .. } => ExitKind::Network,
            StoreError::Damaged { .. } => ExitKind::Resources,
            StoreError::Fenced { .. } | StoreError::Refused { .. } => ExitKind::Internal,
        }
    }
}

/// Elects a leader and keeps its state.
#[tonic::async_trait]
pub trait ClusterStore: fmt::Debug + Send + Sync {
    /// Waits, however long, until this candidate leads. A leader that is silent
    /// for `ttl` is deposed; a backend may round it up. Dropping the future
    /// withdraws the candidate.
    ///
    /// # Errors
    /// The store is damaged or the candidate malformed. A store that cannot be
    /// reached is waited for, with the reason in the log.
    async fn campaign(
        &self,
        candidate: &Candidate,
        ttl: Duration,
    ) -> Result<Leadership, StoreError>;

    /// Looks at the store as it is now, never at an older copy.
    ///
    /// # Errors
    /// The store cannot be reached or is damaged.
    async fn observe(&self) -> Result<Observation, StoreError>;

    /// Completes when something may have changed since `revision`. A hint: it
    /// may come for nothing, late, or never.
    async fn changed(&self, revision: u64);
}

/// Opens the store that `url` names. Nothing is read or connected yet.
pub fn open(url: &StoreUrl) -> Arc<dyn ClusterStore> {
    match url {
        StoreUrl::Memory => Arc::new(MemoryStore::default()),
        StoreUrl::Embedded(path) => Arc::new(EmbeddedStore::new(path)),
        StoreUrl::Etcd { endpoints, prefix } => {
            Arc::new(EtcdStore::new(endpoints.clone(), prefix.clone()))
        }
    }
}

/// How long a leadership may be believed in: what its holder knows of its lease.
#[derive(Clone, Debug)]
pub struct Validity {
    lost: watch::Receiver<Option<String>>,
    /// When the lease runs out by this process's clock unless it is renewed before, which is
    /// earlier than by the store's; None: it does not run out while the process lives.
    until: Option<watch::Receiver<Instant>>,
}

impl Validity {
    /// Whether nobody else can lead now. False at once when a process wakes that was frozen for
    /// longer than its lease, whatever it may have been doing.
    pub fn holds(&self) -> bool {
        self.lost.borrow().is_none() && !self.has_run_out()
    }

    fn has_run_out(&self) -> bool {
        let until = self.until.as_ref();
        until.is_some_and(|until| Instant::now() >= *until.borrow())
    }

    /// Why it does not hold.
    fn reason(&self) -> Option<String> {
        let lost = self.lost.borrow().clone();
        let run_out = || "the lease has run out by this process's clock".to_owned();
        lost.or_else(|| self.has_run_out().then(run_out))
    }
}

/// What a backend does for a leader.
#[tonic::async_trait]
trait Hold: fmt::Debug + Send + Sync {
    /// Writes if, and only if, this leadership still holds. Returns the revision.
    async fn write(&self, state: &State) -> Result<u64, StoreError>;
    /// Lets the next candidate lead at once.
    async fn release(self: Box<Self>);
}

/// One term of leadership. When it is dropped it is no longer renewed, as if
/// the process had died; [`resign`](Leadership::resign) is the polite end.
#[derive(Debug)]
pub struct Leadership {
    leader: Leader,
    inherited: Option<State>,
    validity: Validity,
    /// No epoch below this one is written.
    floor: AtomicU64,
    hold: Box<dyn Hold>,
}

impl Leadership {
    fn new(
        leader: Leader,
        inherited: Option<State>,
        validity: Validity,
        hold: Box<dyn Hold>,
    ) -> Leadership {
        let floor = inherited.as_ref().map_or(0, |state| state.epoch);
        Leadership {
            leader,
            inherited,
            validity,
            floor: AtomicU64::new(floor),
            hold,
        }
    }

    /// The fencing number of this term.
    pub fn term(&self) -> u64 {
        self.leader.term
    }

    /// What the leaders before this one have left.
    pub fn inherited(&self) -> Option<&State> {
        self.inherited.as_ref()
    }

    /// For those who give answers that only a leader may give.
    pub fn validity(&self) -> Validity {
        self.validity.clone()
    }

    /// Whether the lease still holds; see [`Validity::holds`].
    pub fn holds(&self) -> bool {
        self.validity.holds()
    }

    /// Completes when this leader is deposed, with the reason. Comes before
    /// another one can lead, unless this process was frozen.
    pub async fn lost(&self) -> String {
        let mut lost = self.validity.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the lease is no longer renewed".to_owned(),
        }
    }

    /// Writes the state, durably, if this leader still leads. Returns the
    /// revision of the write. After [`StoreError::Unavailable`] it may or may
    /// not have happened; the same state can be written again.
    ///
    /// # Errors
    /// Deposed, not available, or the state is too large or of an older epoch.
    pub async fn save(&self, state: &State) -> Result<u64, StoreError> {
        state.check()?;
        if let Some(reason) = self.validity.reason() {
            return Err(StoreError::Fenced {
                term: self.term(),
                reason,
            });
        }
        let floor = self.floor.fetch_max(state.epoch, Ordering::SeqCst);
        if state.epoch < floor {
            return Err(StoreError::Refused {
                field: "epoch",
                problem: format!("{} after {floor}: epochs only grow", state.epoch),
            });
        }
        self.hold.write(state).await
    }

    /// Ends this term: the next candidate can lead at once.
    pub async fn resign(self) {
        self.hold.release().await;
    }
}

fn check(candidate: &Candidate) -> Result<(), StoreError> {
    for (field, text) in [("id", &candidate.id), ("address", &candidate.address)] {
        if text.is_empty() || text.len() > MAX_NAME_BYTES {
            return Err(StoreError::Refused {
                field,
                problem: format!("must have between 1 and {MAX_NAME_BYTES} bytes"),
            });
        }
    }
    Ok(())
}
