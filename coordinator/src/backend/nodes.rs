//! Attention nodes as places for requests: who can take one, what each has to
//! do, who had better be left alone for a moment. Which of them it is to be is
//! decided in `scheduler`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::status;
use guild_scheduler::affinity::{Affinity, Candidate, MAX_BLOCKS};
use guild_scheduler::placement::NodeId;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tonic::transport::Channel;

use super::prefix::{BLOCK, Names};
use crate::state::ClusterState;

/// ErrorInfo reason: no request can be served now.
const REASON_NOT_READY: &str = "CLUSTER_NOT_READY";
/// A node that has just been lost to a stream comes last for this long; by then
/// its lease says the same, by default.
const SUSPICION: Duration = Duration::from_secs(5);
/// A node that has said nothing for this long is asked for a sign of life. It
/// gives one at any time: not its engine does, which may be at a long step.
const QUIET: Duration = Duration::from_millis(500);
/// Without one its streams leave it after this long.
const SILENCE: Duration = Duration::from_secs(1);
/// What a node has said of its load counts for this long.
const FRESH: Duration = Duration::from_secs(5);

/// The attention nodes, and what is out at each from here.
pub(super) struct Nodes {
    state: Arc<ClusterState>,
    dialer: Dialer,
    names: Names,
    known: Mutex<Known>,
}

struct Known {
    links: HashMap<NodeId, Link>,
    /// What each has run, as far as it was sent from here.
    affinity: Affinity,
}

/// A connection to an attention node.
struct Link {
    channel: Channel,
    address: String,
    /// Tokens of requests sent there from here that are still to be run.
    outstanding: Arc<AtomicUsize>,
    /// When the node's newest report came, by the state's clock.
    reported: Duration,
    /// Tokens of others' requests by that report: those that other coordinators
    /// have sent there.
    of_others: u64,
    suspected_until: Option<Instant>,
}

/// A place on a node: its tokens count as outstanding there until they are
/// done or the ticket is dropped.
pub(super) struct Ticket {
    pub(super) node: NodeId,
    pub(super) name: String,
    pub(super) channel: Channel,
    outstanding: Arc<AtomicUsize>,
    left: usize,
}

impl Ticket {
    /// Now at most `left` tokens are to be run.
    pub(super) fn settle(&mut self, left: usize) {
        let done = self.left.saturating_sub(left);
        self.left -= done;
        self.outstanding.fetch_sub(done, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.settle(0);
    }
}

impl Nodes {
    pub(super) fn new(state: Arc<ClusterState>, dialer: Dialer) -> Nodes {
        Nodes {
            state,
            dialer,
            names: Names::default(),
            known: Mutex::new(Known {
                links: HashMap::new(),
                affinity: Affinity::new(BLOCK as u64, MAX_BLOCKS),
            }),
        }
    }

    /// The beginning of a prompt, as [`Nodes::choose`] takes it.
    pub(super) fn prefix(&self, tenant: u64, tokens: &[u32]) -> Vec<u64> {
        self.names.of(tenant, tokens)
    }

    /// Takes a place for `tokens` on a ready node: the one that is expected to be
    /// through with them first, by what is out there and what of `prefix` it has
    /// run before. Nodes in `tried` are left out, nodes under suspicion come last.
    pub(super) fn choose(&self, tried: &[NodeId], prefix: &[u64], tokens: usize) -> Option<Ticket> {
        let now = Instant::now();
        let mut known = self.lock();
        let Known { links, affinity } = &mut *known;
        self.state.with(|membership, time| {
            links.retain(|id, _| {
                let stays = membership.node(*id).is_some();
                if !stays {
                    affinity.forget(*id);
                }
                stays
            });
            let (mut trusted, mut suspected) = (Vec::new(), Vec::new());
            for node in membership
                .serving()
                .filter(|node| !tried.contains(&node.id))
            {
                let known = links
                    .get(&node.id)
                    .is_some_and(|link| link.address == node.address);
                if !known {
                    match self.dialer.lazy_alert(&node.address, QUIET, SILENCE) {
                        Ok(channel) => links.insert(node.id, Link::new(channel, &node.address)),
                        Err(error) => {
                            tracing::warn!(node = node.name, "{error}");
                            continue;
                        }
                    };
                }
                let Some(link) = links.get_mut(&node.id) else {
                    continue;
                };
                let told = node.report.serving.outstanding_tokens;
                let candidate = Candidate {
                    node: node.id,
                    outstanding: link.outstanding(told, node.last_seen, time),
                };
                match link.suspected_until.is_some_and(|until| now < until) {
                    true => suspected.push(candidate),
                    false => trusted.push(candidate),
                }
            }
            let candidates = if trusted.is_empty() {
                suspected
            } else {
                trusted
            };
            let choice = affinity.choose(prefix, tokens as u64, &candidates)?;
            let link = links.get(&choice.node)?;
            let name = membership.node(choice.node)?.name.clone();
            tracing::debug!(
                node = name,
                tokens,
                expected_cached = choice.cached,
                turned_away = choice.turned_away,
                "a request has a node"
            );
            // Before the request is out, because nothing may move under it.
            membership.mark_served();
            let left = tokens.saturating_sub(choice.cached as usize);
            link.outstanding.fetch_add(left, Ordering::Relaxed);
            Some(Ticket {
                node: choice.node,
                name,
                channel: link.channel.clone(),
                outstanding: Arc::clone(&link.outstanding),
                left,
            })
        })
    }

    /// `node` has taken a request that begins with `prefix`.
    pub(super) fn runs(&self, prefix: &[u64], node: NodeId) {
        let mut known = self.lock();
        if known.links.contains_key(&node) {
            known.affinity.note(prefix, node);
        }
    }

    /// A stream has lost `node`: others are preferred for a while.
    pub(super) fn suspect(&self, node: NodeId) {
        if let Some(link) = self.lock().links.get_mut(&node) {
            link.suspected_until = Some(Instant::now() + SUSPICION);
        }
    }

    /// Completes when `node` is no longer a member.
    pub(super) fn lost(&self, node: NodeId) -> impl Future<Output = ()> + Send + use<> {
        let state = Arc::clone(&self.state);
        async move { state.lost(node).await }
    }

    /// What the cluster waits for; None: it can serve.
    pub(super) fn waiting_for(&self) -> Option<String> {
        self.state.waiting_for().borrow().clone()
    }

    /// Waits until the readiness of the cluster has changed, but no longer than
    /// `pause`.
    pub(super) async fn news(&self, pause: Duration) {
        // Either way it is time to look again.
        let _ = timeout(pause, self.state.waiting_for().changed()).await;
    }

    /// UNAVAILABLE, with what is being waited for.
    pub(super) fn not_ready(&self) -> Status {
        let reason = self.waiting_for();
        let reason = reason.unwrap_or_else(|| "no attention node is ready".to_owned());
        status::unavailable(
            REASON_NOT_READY,
            format!("the cluster is not ready: {reason}"),
            None,
        )
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn new(channel: Channel, address: &str) -> Link {
        Link {
            channel,
            address: address.to_owned(),
            outstanding: Arc::default(),
            reported: Duration::ZERO,
            of_others: 0,
            suspected_until: None,
        }
    }

    /// Tokens that are out there: from here, and by what the node has `told` at
    /// `when` those of others. `now` is of the same clock.
    fn outstanding(&mut self, told: u64, when: Duration, now: Duration) -> u64 {
        let mine = self.outstanding.load(Ordering::Relaxed) as u64;
        if self.reported != when {
            // What went there after the report was made counts as if it was in it.
            self.reported = when;
            self.of_others = told.saturating_sub(mine);
        }
        match now.saturating_sub(when) <= FRESH {
            true => mine.saturating_add(self.of_others),
            false => mine,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_node_has_told_counts_beside_what_is_known_here_while_it_is_fresh() {
        let channel = guild_node::channel::lazy("127.0.0.1:1").unwrap();
        let mut link = Link::new(channel, "127.0.0.1:1");
        let at = Duration::from_secs;
        link.outstanding.store(100, Ordering::Relaxed);
        assert_eq!(link.outstanding(250, at(1), at(1)), 250);
        // What is sent from here afterwards is on top of it until the next report.
        link.outstanding.store(160, Ordering::Relaxed);
        assert_eq!(link.outstanding(250, at(1), at(2)), 310);
        assert_eq!(link.outstanding(300, at(3), at(3)), 300);
        assert_eq!(link.outstanding(300, at(3), at(30)), 160);
        // It has done more than is known here.
        assert_eq!(link.outstanding(10, at(31), at(31)), 160);
    }
}
