//! What operators ask for: plans, drains, and how a migration goes.

use std::sync::Arc;

use futures::StreamExt as _;
use guild_node::{Shutdown, status};
use guild_proto::cluster::v1::{
    DrainNodeRequest, DrainNodeResponse, MigrationPhase, MigrationStatus, RebalanceRequest,
    RebalanceResponse,
};
use guild_scheduler::membership::{self, DrainError, MigrateError, Phase};
use tokio_stream::wrappers::WatchStream;
use tonic::codegen::BoxStream;
use tonic::{Code, Status};

use super::{follower, unchanged};
use crate::state::{ClusterState, RebalanceError};

/// ErrorInfo reason while another migration is under way, or homes are restored.
const REASON_BUSY: &str = "MIGRATION_UNDER_WAY";
/// ErrorInfo reason when nothing is active that could be changed.
const REASON_NOT_ACTIVE: &str = "NO_ACTIVE_PLACEMENT";
/// ErrorInfo reason when there is no node of a name.
const REASON_NO_SUCH_NODE: &str = "NO_SUCH_NODE";
/// ErrorInfo reason when what is asked for does not fit into the cluster.
const REASON_NO_ROOM: &str = "NO_ROOM";
/// ErrorInfo reason when there is nothing to plan by.
const REASON_NO_PLAN: &str = "NO_PLAN";
/// Names of nodes that an answer lists, at most.
const LISTED_NODES: usize = 16;

pub(super) async fn rebalance(
    state: &Arc<ClusterState>,
    request: RebalanceRequest,
) -> Result<RebalanceResponse, Status> {
    let planned = state.rebalance(request.budget_bytes, request.dry_run).await;
    let planned = planned.map_err(|error| match error {
        RebalanceError::NotLeading(refused) => unchanged(refused),
        RebalanceError::Migrate(error) => not_begun(&error),
        RebalanceError::Propose(error) => {
            status::precondition(REASON_NO_PLAN, error.to_string(), [])
        }
        RebalanceError::Failed(_) => status::internal(error.to_string()),
    })?;
    Ok(RebalanceResponse {
        bytes: planned.proposal.bytes,
        before: planned.proposal.before,
        after: planned.proposal.after,
        moves: planned.proposal.moves,
        migration: planned.migration.unwrap_or(0),
    })
}

pub(super) fn drain_node(
    state: &ClusterState,
    request: &DrainNodeRequest,
) -> Result<DrainNodeResponse, Status> {
    let DrainNodeRequest { node, undo } = request;
    if node.is_empty() || node.len() > membership::MAX_TEXT {
        let problem = format!(
            "must be the name of an expert node, at most {} bytes",
            membership::MAX_TEXT
        );
        return Err(status::invalid("node", problem));
    }
    let drained = state
        .lead(|membership, now| {
            let drained = membership.drain_node(now, node, *undo);
            drained.map_err(|error| not_drained(&error, membership))
        })
        .map_err(unchanged)??;
    tracing::info!(
        node,
        undo,
        slots = drained.slots,
        migration = drained.migration,
        "an operator drains a node"
    );
    Ok(DrainNodeResponse {
        slots: drained.slots,
        migration: drained.migration,
    })
}

/// How the migration stands and every change, while this coordinator leads.
pub(super) fn watch_migration(
    state: &Arc<ClusterState>,
    end: &Shutdown,
) -> Result<BoxStream<MigrationStatus>, Status> {
    state.lead(|_, _| ()).map_err(follower)?;
    let (follows, end) = (Arc::clone(state), end.clone());
    let stop = async move {
        tokio::select! {
            () = end.requested() => {}
            () = follows.follows() => {}
        }
    };
    // A watch keeps the newest value only: a slow reader costs one.
    let stream = WatchStream::new(state.migration())
        .map(|status| Ok(to_wire(status)))
        .take_until(stop);
    Ok(Box::pin(stream))
}

fn to_wire(status: membership::MigrationStatus) -> MigrationStatus {
    let phase = match status.phase {
        Phase::Idle => MigrationPhase::Idle,
        Phase::Copying => MigrationPhase::Copying,
        Phase::Draining => MigrationPhase::Draining,
    };
    MigrationStatus {
        migration: status.migration,
        phase: phase.into(),
        epoch: status.epoch,
        cause: status.cause,
        copies_done: status.copies_done,
        copies: status.copies,
        bytes_done: status.bytes_done,
        bytes: status.bytes,
        completed: status.completed,
        rolled_back: status.rolled_back,
        last_failure: status.last_failure,
    }
}

fn not_begun(error: &MigrateError) -> Status {
    let message = error.to_string();
    match error {
        // Asked again later it may be possible.
        MigrateError::Busy { .. } | MigrateError::Loading(_) => {
            status::with_reason(Code::Aborted, REASON_BUSY, message, [])
        }
        MigrateError::NotActive => {
            status::with_reason(Code::Unavailable, REASON_NOT_ACTIVE, message, [])
        }
        MigrateError::Unreachable(_) => status::precondition(REASON_NO_ROOM, message, []),
        MigrateError::Nothing | MigrateError::Destination { .. } | MigrateError::Target(_) => {
            status::precondition(REASON_NO_PLAN, message, [])
        }
    }
}

fn not_drained(error: &DrainError, membership: &membership::Membership) -> Status {
    match error {
        DrainError::Unknown(_) => {
            let experts = membership.nodes();
            let experts = experts.filter(|node| node.role == membership::Role::Expert);
            let mut names: Vec<&str> = experts.map(|node| node.name.as_str()).collect();
            names.sort_unstable();
            let more = names.len().saturating_sub(LISTED_NODES);
            names.truncate(LISTED_NODES);
            let there_are = match (names.as_slice(), more) {
                ([], _) => "there is none".to_owned(),
                (names, 0) => format!("there are {}", names.join(", ")),
                (names, more) => format!("there are {} and {more} more", names.join(", ")),
            };
            status::not_found(REASON_NO_SUCH_NODE, format!("{error}; {there_are}"))
        }
        DrainError::NoRoom { .. } => status::precondition(REASON_NO_ROOM, error.to_string(), []),
        DrainError::Migrate(error) => not_begun(error),
    }
}
