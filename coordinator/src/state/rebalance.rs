//! When experts are moved for balance, and how it is told.
//!
//! Secret: the clock of the planner. Every interval, and when an operator asks,
//! the leader takes a copy of what it knows, plans on it away from all locks,
//! and begins the migration if the plan is still possible by then. What a plan
//! is belongs to `scheduler`.

use std::sync::Arc;

use guild_node::failpoint;
use guild_scheduler::load::Shot;
use guild_scheduler::membership::MigrateError;
use guild_scheduler::rebalance::{self, Policy, Proposal, ProposeError};

use super::{ClusterState, NotLeading};
use crate::Rebalance;

/// What migrations for balance are begun for, in their status and the log.
const CAUSE: &str = "balance";
/// Moves of one plan that the log lists, at most.
const LOGGED_MOVES: usize = 16;

/// Why nothing is planned, or what is planned is not begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RebalanceError {
    /// Another coordinator leads.
    #[error("this coordinator does not lead")]
    NotLeading(NotLeading),
    /// There is no plan.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// The plan cannot be carried out, or not now.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// A test, or a planner that has panicked.
    #[error("the planner has failed: {0}")]
    Failed(String),
}

/// A plan, and the migration by which it is carried out.
pub(crate) struct Planned {
    pub(crate) proposal: Proposal,
    /// None: nothing is worth moving, or only the plan was asked for.
    pub(crate) migration: Option<u64>,
}

impl ClusterState {
    /// Plans every interval while this coordinator leads, for ever.
    pub(crate) async fn keep_balance(self: &Arc<Self>) {
        let Some(interval) = self.rebalance.interval else {
            return std::future::pending().await;
        };
        loop {
            self.leads().await;
            tokio::time::sleep(interval).await;
            match self.rebalance(None, false).await {
                Ok(_) | Err(RebalanceError::NotLeading(_)) => {}
                // Usual while little is going on, or much.
                Err(error @ (RebalanceError::Propose(_) | RebalanceError::Migrate(_))) => {
                    tracing::debug!("no experts are moved: {error}");
                }
                Err(error) => tracing::error!("no experts are moved: {error}"),
            }
        }
    }

    /// Plans by the load of the window and begins what is worth moving, unless
    /// it is a `dry_run`. `budget_bytes`: what may move; None: the usual.
    ///
    /// # Errors
    /// This coordinator does not lead, there is no plan, or a migration is under
    /// way.
    pub(crate) async fn rebalance(
        self: &Arc<Self>,
        budget_bytes: Option<u64>,
        dry_run: bool,
    ) -> Result<Planned, RebalanceError> {
        let _turn = self.planning.lock().await;
        let known = self.lead(|membership, _| membership.clone());
        let known = known.map_err(RebalanceError::NotLeading)?;
        let shots = self.load.shots();
        let policy = policy(self.rebalance, budget_bytes);
        // Hundreds of nodes take a while.
        let planning = tokio::task::spawn_blocking(move || {
            failpoint::at("migrate::plan")
                .map_err(|fired| RebalanceError::Failed(fired.to_string()))?;
            let shots: Vec<&Shot> = shots.iter().collect();
            Ok(rebalance::propose(&known, &shots, &policy)?)
        });
        let proposal = planning
            .await
            .unwrap_or_else(|panic| Err(RebalanceError::Failed(panic.to_string())))?;
        let migration = match dry_run || proposal.moves.is_empty() {
            true => None,
            false => Some(self.begin(&proposal)?),
        };
        Ok(Planned {
            proposal,
            migration,
        })
    }

    fn begin(&self, proposal: &Proposal) -> Result<u64, RebalanceError> {
        // What has changed since the plan was begun is the membership's to judge.
        let target = proposal.target.clone();
        let migration = self
            .lead(|membership, now| membership.migrate(now, target, CAUSE))
            .map_err(RebalanceError::NotLeading)??;
        tracing::info!(
            migration,
            moves = proposal.moves.len(),
            bytes = proposal.bytes,
            "experts are moved: the worst node has {:.2} times its share and is to have {:.2}",
            proposal.before,
            proposal.after
        );
        for line in proposal.moves.iter().take(LOGGED_MOVES) {
            tracing::info!(migration, "{line}");
        }
        let more = proposal.moves.len().saturating_sub(LOGGED_MOVES);
        if more > 0 {
            tracing::info!(migration, "and {more} more moves");
        }
        Ok(migration)
    }
}

fn policy(rebalance: Rebalance, budget_bytes: Option<u64>) -> Policy {
    Policy {
        budget_bytes: budget_bytes.unwrap_or(rebalance.budget_bytes),
        mode: rebalance.planner,
        ..Policy::default()
    }
}
