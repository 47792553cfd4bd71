//! The coordinators a node may turn to, and which of them it believes to lead.

use guild_proto::cluster::v1::cluster_client::ClusterClient;
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use super::{LEADER_KEY, MAX_PLACEMENT_BYTES};
use crate::channel::{AddressError, Dialer};

/// Coordinators that one `--coordinator` may name.
const MAX_COORDINATORS: usize = 16;

/// A client for each, and the one in use. Whoever waits on a coordinator waits
/// on [`turned`](Coordinators::turned) as well.
pub(super) struct Coordinators {
    all: Vec<(String, ClusterClient<Channel>)>,
    at: watch::Sender<usize>,
}

/// Splits `URL[,URL…]`.
pub(super) fn split(urls: &str) -> impl Iterator<Item = &str> {
    urls.split(',').map(str::trim)
}

/// Judges every URL of a `--coordinator`, which may be a list.
///
/// # Errors
/// One is malformed, or there are too many.
pub fn check_coordinators(urls: &str, dialer: &Dialer) -> Result<(), AddressError> {
    if split(urls).count() > MAX_COORDINATORS {
        return Err(AddressError {
            address: urls.to_owned(),
            reason: format!("names more than {MAX_COORDINATORS} coordinators"),
        });
    }
    split(urls).try_for_each(|url| dialer.check(url))
}

impl Coordinators {
    /// Must be made in the runtime that drives it.
    pub(super) fn new(urls: &str, dialer: &Dialer) -> Result<Coordinators, AddressError> {
        let client = |url: &str| {
            let client = ClusterClient::new(dialer.lazy(url)?);
            let client = client.max_decoding_message_size(MAX_PLACEMENT_BYTES);
            Ok((url.to_owned(), client))
        };
        Ok(Coordinators {
            all: split(urls)
                .map(client)
                .collect::<Result<_, AddressError>>()?,
            at: watch::Sender::new(0),
        })
    }

    /// The one in use: its place in the list, its URL, a client.
    pub(super) fn current(&self) -> (usize, &str, ClusterClient<Channel>) {
        let at = *self.at.borrow();
        let (url, client) = &self.all[at];
        (at, url, client.clone())
    }

    /// The one at `at` has failed or does not lead: another is used from now on,
    /// the leader if `status` names one of ours. Does nothing when that has
    /// happened already.
    pub(super) fn turn_from(&self, at: usize, status: &Status) {
        let named = leader_of(status).and_then(|leader| {
            let mut all = self.all.iter();
            all.position(|(url, _)| authority(url) == authority(&leader))
        });
        let next = named
            .filter(|named| *named != at)
            .unwrap_or((at + 1) % self.all.len());
        self.at.send_if_modified(|now| {
            let turns = *now == at && next != at;
            if turns {
                *now = next;
            }
            turns
        });
    }

    /// Completes when another than the one at `at` is in use.
    pub(super) async fn turned(&self, at: usize) {
        let mut now = self.at.subscribe();
        // The sender lives as long as this.
        let _ = now.wait_for(|now| *now != at).await;
    }
}

fn leader_of(status: &Status) -> Option<String> {
    let mut info = status.get_details_error_info()?;
    info.metadata.remove(LEADER_KEY)
}

fn authority(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.trim_end_matches('/')
}
