//! Asking the coordinator that leads.

use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::tls::Role;
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::cluster::v1::{ExpertLoadRequest, ExpertLoadResponse};
use guild_scheduler::load::{Shot, Trace};
use tonic::Request;
use tonic::transport::Channel;

use crate::args::Leader;
use crate::failure::Failure;
use crate::security::node_tls;

/// Largest answer that is taken.
const MAX_ANSWER_BYTES: usize = 128 << 20;
/// What an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the coordinator.
pub(super) struct Asking {
    client: ClusterClient<Channel>,
    url: String,
}

impl Asking {
    /// # Errors
    /// The address or the certificate is of no use.
    pub(super) fn at(leader: &Leader) -> Result<Asking, Failure> {
        let tls = node_tls(&leader.tls, Role::Attention);
        let tls =
            tls.or_else(|failure| node_tls(&leader.tls, Role::Expert).map_err(|_| failure))?;
        let channel = Dialer::to(Role::COORDINATING, tls.as_ref()).lazy(&leader.coordinator);
        let channel = channel.map_err(|error| Failure::usage(format!("--coordinator: {error}")))?;
        Ok(Asking {
            client: ClusterClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
            url: leader.coordinator.clone(),
        })
    }

    /// The load as it is now, with the shots after number `shots_after`.
    ///
    /// # Errors
    /// Nobody answers, somebody who does not lead, or something that is no answer.
    pub(super) async fn load(
        &mut self,
        shots_after: Option<u64>,
    ) -> Result<ExpertLoadResponse, Failure> {
        let mut request = Request::new(ExpertLoadRequest { shots_after });
        request.set_timeout(TIMEOUT);
        let answer = self.client.expert_load(request).await.map_err(|status| {
            Failure::from(status).hint(format!(
                "--coordinator {} must be the cluster address of the coordinator that leads",
                self.url
            ))
        })?;
        let answer = answer.into_inner();
        check(&answer).map_err(|problem| {
            Failure::network(format!("{}: not a load of experts: {problem}", self.url))
        })?;
        Ok(answer)
    }
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
