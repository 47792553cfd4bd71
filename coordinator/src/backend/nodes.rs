//! Attention nodes as places for requests: who can take one, what each has to
//! do, who had better be left alone for a moment, and who runs a prompt for
//! whom. Which of them it is to be is decided in `scheduler`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::status;
use guild_scheduler::affinity::{Affinity, Candidate, Choice, Decoder, MAX_BLOCKS};
use guild_scheduler::membership::{Duty, Membership, Node, Role};
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
    /// Whether nodes for prefill have to decode.
    degraded: bool,
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
    /// Tokens of the prompt that are likely to be in its cache.
    cached: usize,
}

/// A place for a prompt on a node that runs it for another.
pub(super) struct Helper {
    pub(super) ticket: Ticket,
    /// `host:port` by which the other node reaches it.
    pub(super) address: String,
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
                degraded: false,
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
    /// Nodes for prefill are taken only while no other is there.
    pub(super) fn choose(&self, tried: &[NodeId], prefix: &[u64], tokens: usize) -> Option<Ticket> {
        let mut known = self.lock();
        self.state.with(|membership, time| {
            known.keep(membership);
            let degraded = membership.degraded();
            if known.degraded != degraded.is_some() {
                known.degraded = degraded.is_some();
                match degraded {
                    Some(how) => tracing::warn!("degraded: {how}"),
                    None => tracing::info!("a node that decodes is there again"),
                }
            }
            let wanted = |duty: Duty| degraded.is_some() || duty.decodes();
            let candidates = self.candidates(&mut known, membership, time, tried, wanted);
            let choice = known.affinity.choose(prefix, tokens as u64, &candidates)?;
            let ticket = known.ticket(membership, &choice, tokens)?;
            tracing::debug!(
                node = ticket.name,
                tokens,
                expected_cached = choice.cached,
                turned_away = choice.turned_away,
                "a request has a node"
            );
            // Before the request is out, because nothing may move under it.
            membership.mark_served();
            Some(ticket)
        })
    }

    /// Takes a place for the prompt of `ticket`, which has `prompt` tokens and
    /// begins with `prefix`, on a node for prefill, if that is worth it.
    pub(super) fn pair(
        &self,
        ticket: &mut Ticket,
        prefix: &[u64],
        prompt: usize,
    ) -> Option<Helper> {
        let mut known = self.lock();
        let helper = self.state.with(|membership, time| {
            let for_prefill = |duty| duty == Duty::Prefill;
            let helpers = self.candidates(&mut known, membership, time, &[], for_prefill);
            let node = membership.node(ticket.node)?;
            let told = node.report.serving.outstanding_tokens;
            let link = known.links.get_mut(&ticket.node)?;
            let outstanding = link.outstanding(told, node.last_seen, time);
            let decoder = Decoder {
                node: ticket.node,
                outstanding: outstanding.saturating_sub(ticket.left as u64),
                cached: ticket.cached as u64,
                runs_prompts: node.duty == Duty::Both,
            };
            let affinity = &known.affinity;
            let choice = affinity.pair(prefix, prompt as u64, &decoder, &helpers)?;
            let address = membership.node(choice.node)?.address.clone();
            let ticket = known.ticket(membership, &choice, prompt)?;
            Some(Helper { ticket, address })
        })?;
        let own = prompt.saturating_sub(ticket.cached);
        ticket.settle(ticket.left.saturating_sub(own));
        tracing::debug!(
            node = helper.ticket.name,
            decodes = ticket.name,
            prompt,
            "a prompt has a node"
        );
        Some(helper)
    }

    /// Ready nodes whose duty is `wanted`, but for those in `tried`: those under
    /// suspicion only if there are no others.
    fn candidates(
        &self,
        known: &mut Known,
        membership: &Membership,
        time: Duration,
        tried: &[NodeId],
        wanted: impl Fn(Duty) -> bool,
    ) -> Vec<Candidate> {
        let now = Instant::now();
        let links = &mut known.links;
        let (mut trusted, mut suspected) = (Vec::new(), Vec::new());
        for node in membership
            .serving()
            .filter(|node| wanted(node.duty) && !tried.contains(&node.id))
        {
            let Some(link) = self.link(links, node) else {
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
        if trusted.is_empty() {
            suspected
        } else {
            trusted
        }
    }

    /// The connection to a node. None: it has no address that can be dialled.
    fn link<'a>(&self, links: &'a mut HashMap<NodeId, Link>, node: &Node) -> Option<&'a mut Link> {
        let known = links.get(&node.id);
        if known.is_none_or(|link| link.address != node.address) {
            match self.dialer.lazy_alert(&node.address, QUIET, SILENCE) {
                Ok(channel) => links.insert(node.id, Link::new(channel, &node.address)),
                Err(error) => {
                    tracing::warn!(node = node.name, "{error}");
                    return None;
                }
            };
        }
        links.get_mut(&node.id)
    }

    /// Channels to all attention nodes, those among them that drain.
    pub(super) fn all(&self) -> Vec<Channel> {
        let mut known = self.lock();
        self.state.with(|membership, _| {
            known.keep(membership);
            let attention = membership.nodes();
            let attention = attention.filter(|node| node.role == Role::Attention);
            attention
                .filter_map(|node| Some(self.link(&mut known.links, node)?.channel.clone()))
                .collect()
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

impl Known {
    /// Forgets who is no longer a member.
    fn keep(&mut self, membership: &Membership) {
        let affinity = &mut self.affinity;
        self.links.retain(|id, _| {
            let stays = membership.node(*id).is_some();
            if !stays {
                affinity.forget(*id);
            }
            stays
        });
    }

    /// A place on the chosen node for `tokens`, less what it has.
    fn ticket(&self, membership: &Membership, choice: &Choice, tokens: usize) -> Option<Ticket> {
        let link = self.links.get(&choice.node)?;
        let name = membership.node(choice.node)?.name.clone();
        let cached = choice.cached as usize;
        let left = tokens.saturating_sub(cached);
        link.outstanding.fetch_add(left, Ordering::Relaxed);
        Some(Ticket {
            node: choice.node,
            name,
            channel: link.channel.clone(),
            outstanding: Arc::clone(&link.outstanding),
            left,
            cached,
        })
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
