//! Asking the coordinator that leads.

use std::collections::VecDeque;
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::member::{LEADER_KEY, REASON_NO_LEADER, REASON_NOT_LEADER, check_coordinators};
use guild_node::status::reason_of;
use guild_node::tls::Role;
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{
    ExpertLoadRequest, ExpertLoadResponse, MigrationStatus, StatusRequest, StatusResponse,
    WatchMigrationRequest,
};
use guild_scheduler::load::{Shot, Trace};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::args::Leader;
use crate::failure::Failure;
use crate::security::asking_tls;

/// Largest answer that is taken.
const MAX_ANSWER_BYTES: usize = 128 << 20;
/// What an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What a plan may take, which is thought over first.
const PLANNING: Duration = Duration::from_secs(60);

/// The coordinators that can be asked.
pub(super) struct Asking {
    dialer: Dialer,
    /// The one to ask first comes first.
    urls: VecDeque<String>,
    /// As they were given.
    given: String,
}

impl Asking {
    /// # Errors
    /// An address or the certificate is of no use.
    pub(super) fn at(leader: &Leader) -> Result<Asking, Failure> {
        let urls: Vec<&str> = leader.coordinator.split(',').map(str::trim).collect();
        let tls = asking_tls(leader, &urls)?;
        let dialer = Dialer::to(Role::COORDINATING, tls.as_ref());
        check_coordinators(&leader.coordinator, &dialer)
            .map_err(|error| Failure::usage(format!("--coordinator: {error}")))?;
        Ok(Asking {
            dialer,
            urls: urls.into_iter().map(str::to_owned).collect(),
            given: leader.coordinator.clone(),
        })
    }

    /// What the one that leads answers: every coordinator is asked once at most,
    /// and the one that another names as the leader before all others.
    ///
    /// # Errors
    /// What the last one said.
    pub(super) async fn ask<R>(
        &mut self,
        call: impl AsyncFn(ClusterClient<Channel>) -> Result<Response<R>, Status>,
    ) -> Result<R, Status> {
        let (mut to_ask, mut asked) = (self.urls.clone(), Vec::new());
        let mut last = Status::unavailable("there is no coordinator to ask");
        while let Some(url) = to_ask.pop_front() {
            if asked.contains(&url) {
                continue;
            }
            let channel = self.dialer.lazy(&url);
            let channel = channel.map_err(|error| Status::internal(error.to_string()))?;
            let client = ClusterClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
            match call(client).await {
                Ok(answer) => {
                    // The next question goes there at once.
                    self.urls.retain(|known| *known != url);
                    self.urls.push_front(url);
                    return Ok(answer.into_inner());
                }
                Err(status) if leads_not(&status) => {
                    if let Some(leader) = leader_of(&status) {
                        to_ask.push_front(leader);
                    }
                    asked.push(url);
                    last = status;
                }
                Err(status) => return Err(status),
            }
        }
        Err(last)
    }

    /// An error of [`ask`](Asking::ask) for a person.
    pub(super) fn failure(&self, status: Status) -> Failure {
        let gone = leads_not(&status);
        // What a handshake that was not begun comes to on this side.
        let cut_off = gone || status.code() == Code::Unknown;
        let mut failure = Failure::from(status);
        if cut_off && matches!(self.dialer, Dialer::Plain) {
            failure = failure.hint(
                "only `guild up` and --insecure go without certificates: is --tls-dir missing?",
            );
        }
        if !gone {
            return failure;
        }
        failure.hint(format!(
            "--coordinator {} must be the cluster address of a coordinator; several are separated by commas",
            self.given
        ))
    }

    /// The load as it is now, with the shots after number `shots_after`.
    ///
    /// # Errors
    /// Nobody answers, nobody leads, or what comes is no answer.
    pub(super) async fn load(
        &mut self,
        shots_after: Option<u64>,
    ) -> Result<ExpertLoadResponse, Failure> {
        let request = ExpertLoadRequest { shots_after };
        let answer = self
            .ask(async |mut client| client.expert_load(timed(request)).await)
            .await;
        let answer = answer.map_err(|status| self.failure(status))?;
        check(&answer).map_err(|problem| {
            Failure::network(format!("{}: not a load of experts: {problem}", self.given))
        })?;
        Ok(answer)
    }

    /// Who is there.
    ///
    /// # Errors
    /// Nobody answers.
    pub(super) async fn status(&mut self) -> Result<StatusResponse, Failure> {
        let answer = self
            .ask(async |mut client| client.status(timed(StatusRequest {})).await)
            .await;
        answer.map_err(|status| self.failure(status))
    }

    /// The migration under way and every change of it.
    ///
    /// # Errors
    /// Nobody answers, or nobody leads.
    pub(super) async fn watch(&mut self) -> Result<Streaming<MigrationStatus>, Status> {
        self.ask(async |mut client| client.watch_migration(WatchMigrationRequest {}).await)
            .await
    }
}

/// A request that waits for its answer no longer than an operator would.
pub(super) fn timed<T>(message: T) -> Request<T> {
    within(TIMEOUT, message)
}

/// A request that waits for a plan.
pub(super) fn planned<T>(message: T) -> Request<T> {
    within(PLANNING, message)
}

fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Whether another coordinator is to be asked: this one does not lead, knows of
/// nobody who does, or does not even answer.
fn leads_not(status: &Status) -> bool {
    let reason = reason_of(status);
    match reason.as_deref() {
        None => status.code() == Code::Unavailable,
        Some(reason) => [REASON_NOT_LEADER, REASON_NO_LEADER].contains(&reason),
    }
}

fn leader_of(status: &Status) -> Option<String> {
    let mut info = status.get_details_error_info()?;
    info.metadata.remove(LEADER_KEY)
}

/// Lists of other lengths than they say would be read beyond their end.
fn check(answer: &ExpertLoadResponse) -> Result<(), String> {
    let layers = answer.layers.len();
    let cells = layers.saturating_mul(answer.experts as usize);
    let wrong = [
        ("rows", answer.rows.len() != cells),
        (
            "ewma",
            !answer.ewma.is_empty() && answer.ewma.len() != cells,
        ),
        ("balancedness", answer.balancedness.len() != layers),
        (
            "even_balancedness",
            answer.even_balancedness.len() != layers,
        ),
        ("nodes", answer.nodes.iter().any(|n| n.rows.len() != layers)),
        ("shots", answer.shots.iter().any(|s| s.rows.len() != cells)),
    ];
    match wrong.iter().find(|(_, wrong)| *wrong) {
        Some((field, _)) => Err((*field).to_owned()),
        None => Ok(()),
    }
}

/// The listed shots as a trace.
pub(super) fn trace(answer: &ExpertLoadResponse) -> Trace {
    let experts = answer.experts.max(1) as usize;
    let shot = |rows: &Vec<u64>| Shot {
        rows: rows.chunks(experts).map(<[u64]>::to_vec).collect(),
    };
    Trace {
        layers: answer.layers.clone(),
        experts: answer.experts,
        shots: answer.shots.iter().map(|s| shot(&s.rows)).collect(),
    }
}
