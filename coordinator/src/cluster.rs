//! guild.cluster.v1 over the membership: checks what comes in, words what goes out.

mod operate;
mod rules;

use std::sync::Arc;

use futures::{StreamExt, stream};
use guild_node::member::{
    LEADER_KEY, REASON_DIGEST, REASON_NO_LEADER, REASON_NOT_LEADER, REASON_NUMERICS,
    REASON_UNKNOWN_NODE,
};
use guild_node::tls::{self, Identity};
use guild_node::{Shutdown, serve, status};
use guild_proto::cluster::v1::cluster_server::Cluster;
use guild_proto::cluster::v1::{
    DrainNodeRequest, DrainNodeResponse, Duty, ExpertLoadRequest, ExpertLoadResponse,
    HeartbeatRequest, HeartbeatResponse, LeaveRequest, LeaveResponse, MigrationStatus, NodeStatus,
    Placement, RebalanceRequest, RebalanceResponse, RegisterRequest, RegisterResponse,
    ReportLoadRequest, ReportLoadResponse, Role, StatusRequest, StatusResponse,
    WatchMigrationRequest, WatchPlacementRequest,
};
use guild_scheduler::membership::{
    self, Measured, Refused, Registration, Report, Serving, UnknownNode,
};
use guild_scheduler::placement::NodeId;
use tokio_stream::wrappers::WatchStream;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

use crate::state::{ClusterState, NotLeading, Placements};

pub(crate) use rules::guard;

/// ErrorInfo reason when a name is in use by a node of another role.
const REASON_NAME: &str = "NAME_TAKEN";
/// ErrorInfo reason when the cluster takes no more nodes.
const REASON_FULL: &str = "CLUSTER_FULL";

/// ErrorInfo reason when a node is not what its certificate says.
const REASON_CERTIFICATE: &str = "CERTIFICATE_MISMATCH";

/// The service that nodes talk to.
pub(crate) struct ClusterService {
    state: Arc<ClusterState>,
    end: Shutdown,
}

impl ClusterService {
    /// Streams end when `end` is triggered.
    pub(crate) fn new(state: Arc<ClusterState>, end: Shutdown) -> ClusterService {
        ClusterService { state, end }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let certified = serve::identity_of(&request).cloned();
        let request = request.into_inner();
        if let Some(identity) = certified {
            agree(&identity, &request)?;
        }
        let role = match request.role() {
            Role::Attention => membership::Role::Attention,
            Role::Expert => membership::Role::Expert,
            Role::Unspecified => {
                return Err(status::invalid("role", "must be attention or expert"));
            }
        };
        let duty = match request.duty() {
            Duty::Unspecified | Duty::Both => membership::Duty::Both,
            Duty::Prefill => membership::Duty::Prefill,
            Duty::Decode => membership::Duty::Decode,
        };
        let registration = Registration {
            role,
            name: request.name,
            address: request.address,
            model_digest: request.model_digest,
            numerics_class: request.numerics_class,
            capacity_bytes: request.capacity_bytes,
            newest_epoch: request.newest_epoch,
            incarnation: request.incarnation,
            process: request.process,
            failure_domain: request.failure_domain,
            duty,
        };
        let node_id = self
            .state
            .lead(|membership, now| membership.register(now, registration))
            .map_err(follower)?
            .map_err(|refused| {
                tracing::warn!("refused a node: {refused}");
                refusal(&refused)
            })?;
        Ok(Response::new(RegisterResponse {
            node_id,
            lease_ms: u32::try_from(self.state.lease.as_millis()).unwrap_or(u32::MAX),
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        let beat = request.into_inner();
        let report = Report {
            epoch: beat.epoch,
            ready: beat.ready,
            reason: beat.reason,
            serving: Serving {
                running: beat.running,
                waiting: beat.waiting,
                outstanding_tokens: beat.outstanding_tokens,
                free_pages: beat.free_pages,
                cached_pages: beat.cached_pages,
                tokens_run: beat.tokens_run,
            },
            draining: beat.draining,
            measured: Measured {
                rows_per_second: beat.rows_per_second,
                resident_bytes: beat.resident_bytes,
                free_bytes: beat.free_bytes,
            },
            failed: (beat.failed_epoch > 0).then_some((beat.failed_epoch, beat.failure)),
        };
        self.state
            .lead(|membership, now| {
                // Requests may come to it through other coordinators.
                if report.serving.running > 0 {
                    membership.mark_served();
                }
                membership.heartbeat(now, beat.node_id, beat.incarnation, report)
            })
            .map_err(follower)?
            .map_err(unknown)?;
        Ok(Response::new(HeartbeatResponse {}))
    }

    async fn leave(
        &self,
        request: Request<LeaveRequest>,
    ) -> Result<Response<LeaveResponse>, Status> {
        let leave = request.into_inner();
        self.state
            .lead(|membership, now| membership.leave(now, leave.node_id, leave.incarnation))
            .map_err(follower)?
            .map_err(unknown)?;
        Ok(Response::new(LeaveResponse {}))
    }

    async fn watch_placement(
        &self,
        request: Request<WatchPlacementRequest>,
    ) -> Result<Response<BoxStream<Placement>>, Status> {
        let node = request.into_inner().node_id;
        let watches = self.state.lead(|m, now| m.watches(now, node));
        watches.map_err(follower)?.map_err(unknown)?;
        // A watch keeps the newest value only: a slow reader costs two placements.
        let watching = Watching {
            state: Arc::clone(&self.state),
            node,
            end: self.end.clone(),
        };
        let (state, end) = (Arc::clone(&self.state), self.end.clone());
        let stop = async move {
            tokio::select! {
                () = end.requested() => {}
                () = state.lost(node) => {}
                () = state.follows() => {}
            }
        };
        let mut told = Placements::default();
        let stream = WatchStream::new(self.state.placements())
            .flat_map(move |now| {
                let _until_the_end = &watching;
                stream::iter(now.news(&mut told))
            })
            .map(|placement| Ok(Placement::clone(&placement)))
            .take_until(stop);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn status(
        &self,
        _request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let reason = self.state.waiting_for().borrow().clone();
        let degraded = self.state.with(|membership, _| membership.degraded());
        let (epoch, nodes, (replicas_wanted, replicas)) = self.state.with(|membership, _| {
            let published = membership.published();
            let slots = |id| {
                published
                    .and_then(|p| p.placement.nodes().iter().find(|slots| slots.node == id))
                    .map_or(0, |slots| slots.slots.len() as u32)
            };
            let nodes = membership
                .nodes()
                .map(|node| NodeStatus {
                    node_id: node.id,
                    role: match node.role {
                        membership::Role::Attention => Role::Attention,
                        membership::Role::Expert => Role::Expert,
                    }
                    .into(),
                    name: node.name.clone(),
                    address: node.address.clone(),
                    ready: node.report.ready,
                    reason: node.report.reason.clone(),
                    epoch: node.report.epoch,
                    slots: slots(node.id),
                    numerics_class: node.numerics_class.clone(),
                    process: node.process.clone(),
                    failure_domain: node.failure_domain.clone(),
                    draining: node.report.draining || membership.is_drained(node),
                    rows_per_second: node.report.measured.rows_per_second,
                    resident_bytes: node.report.measured.resident_bytes,
                    free_bytes: node.report.measured.free_bytes,
                    running: node.report.serving.running,
                    waiting: node.report.serving.waiting,
                    outstanding_tokens: node.report.serving.outstanding_tokens,
                    free_pages: node.report.serving.free_pages,
                    cached_pages: node.report.serving.cached_pages,
                    tokens_per_second: node.tokens_per_second,
                    duty: match node.duty {
                        _ if node.role == membership::Role::Expert => Duty::Unspecified,
                        membership::Duty::Both => Duty::Both,
                        membership::Duty::Prefill => Duty::Prefill,
                        membership::Duty::Decode => Duty::Decode,
                    }
                    .into(),
                })
                .collect();
            let epoch = published.map_or(0, |p| p.placement.epoch());
            (epoch, nodes, membership.redundancy())
        });
        Ok(Response::new(StatusResponse {
            ready: reason.is_none(),
            reason: reason.unwrap_or_default(),
            epoch,
            model: self.state.model.clone(),
            model_digest: self.state.digest.clone(),
            nodes,
            replicas_wanted,
            replicas,
            degraded: degraded.unwrap_or_default().to_owned(),
        }))
    }

    async fn report_load(
        &self,
        request: Request<ReportLoadRequest>,
    ) -> Result<Response<ReportLoadResponse>, Status> {
        let report = request.into_inner();
        // Under one lock with the membership: nobody who has left is counted.
        self.state
            .lead(|membership, _| match membership.node(report.node_id) {
                None => Err(unknown(UnknownNode(report.node_id))),
                Some(node) if node.role != membership::Role::Attention => {
                    Err(status::invalid("node_id", "must be an attention node"))
                }
                Some(_) => (self.state.load.count(&report))
                    .map_err(|error| status::invalid("rows", error.to_string())),
            })
            .map_err(follower)??;
        Ok(Response::new(ReportLoadResponse {}))
    }

    async fn expert_load(
        &self,
        request: Request<ExpertLoadRequest>,
    ) -> Result<Response<ExpertLoadResponse>, Status> {
        let shots_after = request.into_inner().shots_after;
        let (active, measured) = self
            .state
            .lead(|membership, _| {
                let speed = |id| membership.node(id).map(|node| node.speed);
                let active = membership.active().cloned();
                let nodes = active.iter().flat_map(|active| active.placement.nodes());
                (
                    active.clone(),
                    nodes.map(|node| speed(node.node)).collect::<Vec<_>>(),
                )
            })
            .map_err(follower)?;
        let active = active.as_ref();
        let answer = self.state.load.answer(active, &measured, shots_after);
        Ok(Response::new(answer))
    }

    async fn rebalance(
        &self,
        request: Request<RebalanceRequest>,
    ) -> Result<Response<RebalanceResponse>, Status> {
        let answer = operate::rebalance(&self.state, request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        let answer = operate::drain_node(&self.state, request.get_ref())?;
        Ok(Response::new(answer))
    }

    async fn watch_migration(
        &self,
        _request: Request<WatchMigrationRequest>,
    ) -> Result<Response<BoxStream<MigrationStatus>>, Status> {
        let stream = operate::watch_migration(&self.state, &self.end)?;
        Ok(Response::new(stream))
    }
}

/// A node is what its certificate says it is.
fn agree(identity: &Identity, request: &RegisterRequest) -> Result<(), Status> {
    let role = match identity.role {
        tls::Role::Attention => Role::Attention,
        tls::Role::Expert => Role::Expert,
        tls::Role::Coordinator | tls::Role::Operator => Role::Unspecified,
    };
    let named = identity
        .name
        .as_ref()
        .is_none_or(|name| *name == request.name);
    if role == request.role() && named {
        return Ok(());
    }
    let message = format!(
        "the certificate is that of {identity}, and the node registers as {:?} `{}`",
        request.role(),
        request.name
    );
    tracing::warn!("refused a node: {message}");
    Err(status::with_reason(
        Code::PermissionDenied,
        REASON_CERTIFICATE,
        message,
        [],
    ))
}

/// What a node hears from a coordinator that does not lead: who does.
fn follower(refused: NotLeading) -> Status {
    let leader = refused.leader.map(|leader| leader.candidate.address);
    let message = match &leader {
        Some(leader) => format!("this coordinator does not lead, the one at {leader} does"),
        None => match refused.deposed {
            Some(why) => format!("no coordinator leads at present: {why}"),
            None => "no coordinator leads at present".to_owned(),
        },
    };
    let leader = leader.map(|leader| (LEADER_KEY, leader));
    status::with_reason(Code::Unavailable, REASON_NOT_LEADER, message, leader)
}

/// What an operator hears who wants something changed: where nobody is known to lead, that has to
/// change first.
fn unchanged(refused: NotLeading) -> Status {
    let led = refused.leader.is_some();
    let status = follower(refused);
    match led {
        true => status,
        false => status::precondition(REASON_NO_LEADER, status.message(), []),
    }
}

/// A node that watches. When its stream ends otherwise than by this coordinator, it has hung up.
struct Watching {
    state: Arc<ClusterState>,
    node: NodeId,
    end: Shutdown,
}

impl Drop for Watching {
    fn drop(&mut self) {
        if !self.end.is_requested() {
            // The connections of one that follows say nothing.
            let _ = self.state.lead(|m, now| m.hung_up(now, self.node));
        }
    }
}

fn unknown(error: UnknownNode) -> Status {
    status::not_found(REASON_UNKNOWN_NODE, error.to_string())
}

fn refusal(refused: &Refused) -> Status {
    let message = refused.to_string();
    match refused {
        Refused::Digest { theirs, ours, .. } => status::precondition(
            REASON_DIGEST,
            message,
            [("node", theirs.clone()), ("cluster", ours.clone())],
        ),
        Refused::Numerics { theirs, ours, .. } => status::precondition(
            REASON_NUMERICS,
            message,
            [("node", theirs.clone()), ("cluster", ours.clone())],
        ),
        Refused::NameTaken { .. } => status::precondition(REASON_NAME, message, []),
        Refused::Field { field, problem } => status::invalid(field, problem.as_str()),
        // Not for good: nodes leave, too.
        Refused::Full => status::with_reason(Code::ResourceExhausted, REASON_FULL, message, []),
    }
}
