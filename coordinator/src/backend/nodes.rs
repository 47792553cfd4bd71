//! Attention nodes as places for requests: who can take one, who has least to
//! do, who had better be left alone for a moment.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::status;
use guild_scheduler::placement::NodeId;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tonic::transport::Channel;

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

/// The attention nodes, and what is out at each from here.
pub(super) struct Nodes {
    state: Arc<ClusterState>,
    dialer: Dialer,
    links: Mutex<HashMap<NodeId, Link>>,
}

/// A connection to an attention node.
struct Link {
    channel: Channel,
    address: String,
    /// Tokens of requests sent there from here that are still to be run.
    outstanding: Arc<AtomicUsize>,
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
            links: Mutex::new(HashMap::new()),
        }
    }

    /// Takes a place for `tokens` on the ready node with the fewest outstanding
    /// ones; the lower id among equals. Nodes in `tried` are left out, nodes
    /// under suspicion come last.
    pub(super) fn choose(&self, tried: &[NodeId], tokens: usize) -> Option<Ticket> {
        let now = Instant::now();
        let mut links = self.lock();
        self.state.with(|membership, _| {
            links.retain(|id, _| membership.node(*id).is_some());
            let mut best: Option<((bool, usize, NodeId), String)> = None;
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
                let Some(link) = links.get(&node.id) else {
                    continue;
                };
                let suspected = link.suspected_until.is_some_and(|until| now < until);
                let outstanding = link.outstanding.load(Ordering::Relaxed);
                let rank = (suspected, outstanding, node.id);
                if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                    best = Some((rank, node.name.clone()));
                }
            }
            let ((.., node), name) = best?;
            let link = links.get(&node)?;
            // Before the request is out, because nothing may move under it.
            membership.mark_served();
            link.outstanding.fetch_add(tokens, Ordering::Relaxed);
            Some(Ticket {
                node,
                name,
                channel: link.channel.clone(),
                outstanding: Arc::clone(&link.outstanding),
                left: tokens,
            })
        })
    }

    /// A stream has lost `node`: others are preferred for a while.
    pub(super) fn suspect(&self, node: NodeId) {
        if let Some(link) = self.lock().get_mut(&node) {
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

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn new(channel: Channel, address: &str) -> Link {
        Link {
            channel,
            address: address.to_owned(),
            outstanding: Arc::default(),
            suspected_until: None,
        }
    }
}
