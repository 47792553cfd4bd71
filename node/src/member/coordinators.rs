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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tonic::Code;

    use super::super::REASON_NOT_LEADER;
    use super::*;
    use crate::status;

    fn not_leader(leader: &str) -> Status {
        let leader = (!leader.is_empty()).then(|| (LEADER_KEY, leader.to_owned()));
        status::with_reason(Code::Unavailable, REASON_NOT_LEADER, "", leader)
    }

    #[tokio::test]
    async fn a_node_turns_to_the_leader_it_is_told_of_and_else_to_the_next() {
        let dialer = Dialer::Plain;
        let list = "http://a:1, b:2,http://c:3/";
        let coordinators = Coordinators::new(list, &dialer).unwrap();
        let at = || coordinators.current().0;
        assert_eq!(at(), 0);
        coordinators.turn_from(0, &not_leader("c:3"));
        assert_eq!(at(), 2);
        // Somebody else has turned away from there already.
        coordinators.turn_from(0, &not_leader(""));
        assert_eq!(at(), 2);
        coordinators.turn_from(2, &Status::unavailable("dead"));
        assert_eq!(at(), 0);
        // One that is not in the list, and itself, are no help.
        coordinators.turn_from(0, &not_leader("d:4"));
        assert_eq!(at(), 1);
        coordinators.turn_from(1, &not_leader("b:2"));
        assert_eq!(at(), 2);

        let waiting = coordinators.turned(2);
        coordinators.turn_from(2, &not_leader("a:1"));
        waiting.await;

        let one = Coordinators::new("a:1", &dialer).unwrap();
        one.turn_from(0, &Status::unavailable("dead"));
        assert_eq!(one.current().0, 0);
    }

    #[test]
    fn every_url_of_a_list_is_judged() {
        let dialer = Dialer::Plain;
        check_coordinators("http://a:1,b:2", &dialer).unwrap();
        for bad in ["", "a:1,", "a:1,,b:2", "a:1,b", "a:1,ftp://b:2"] {
            assert!(check_coordinators(bad, &dialer).is_err(), "{bad}");
        }
        let many = vec!["a:1"; MAX_COORDINATORS + 1].join(",");
        let error = check_coordinators(&many, &dialer).unwrap_err();
        assert!(error.to_string().contains("more than"));
    }
}
