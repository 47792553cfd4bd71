//! The cluster as the front door sees it: which attention node gets a request,
//! and what becomes of the request when that node goes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use guild_node::serve::chain;
use guild_node::channel::Dialer;
use guild_node::status;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_proto::inference::v1::{GenerateRequest, GenerateResponse};
use guild_scheduler::placement::NodeId;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::front::{Backend, EventStream, Readiness};
use crate::state::ClusterState;

/// ErrorInfo reason: no request can be served now.
const REASON_NOT_READY: &str = "CLUSTER_NOT_READY";
/// ErrorInfo reason: the attention node of a request is gone.
const REASON_NODE_LOST: &str = "ATTENTION_NODE_LOST";
/// Attention nodes one request is offered to before it is given up.
const MAX_ATTEMPTS: usize = 3;
/// Bytes of one event: prompt logprobs of a long prompt come in one.
const MAX_EVENT_BYTES: usize = 256 << 20;

/// The attention nodes behind the front door.
pub(crate) struct AttentionNodes(Arc<Nodes>);

struct Nodes {
    state: Arc<ClusterState>,
    dialer: Dialer,
    links: Mutex<HashMap<NodeId, Link>>,
}

/// A connection to an attention node.
#[derive(Clone)]
struct Link {
    channel: Channel,
    address: String,
    /// Requests sent there from here that have not ended.
    outstanding: Arc<AtomicUsize>,
}

/// A request that is out; counts until dropped.
struct Ticket {
    node: NodeId,
    name: String,
    link: Link,
}

impl Ticket {
    fn new(node: NodeId, name: String, link: Link) -> Ticket {
        link.outstanding.fetch_add(1, Ordering::Relaxed);
        Ticket { node, name, link }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.link.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AttentionNodes {
    pub(crate) fn new(state: Arc<ClusterState>, dialer: Dialer) -> AttentionNodes {
        AttentionNodes(Arc::new(Nodes {
            state,
            dialer,
            links: Mutex::new(HashMap::new()),
        }))
    }
}

impl Nodes {
    /// Takes a place on the ready node with the fewest requests from here,
    /// leaving out those already tried.
    fn choose(&self, tried: &[NodeId]) -> Option<Ticket> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.with(|membership, _| {
            links.retain(|id, _| membership.node(*id).is_some());
            let mut best: Option<((usize, u32, NodeId), String, Link)> = None;
            for node in membership
                .serving()
                .filter(|node| !tried.contains(&node.id))
            {
                let known = links
                    .get(&node.id)
                    .filter(|link| link.address == node.address);
                let link = match known {
                    Some(link) => link.clone(),
                    None => match self.dialer.lazy(&node.address) {
                        Ok(channel) => {
                            let link = Link {
                                channel,
                                address: node.address.clone(),
                                outstanding: Arc::default(),
                            };
                            links.insert(node.id, link.clone());
                            link
                        }
                        Err(error) => {
                            tracing::warn!(node = node.name, "{error}");
                            continue;
                        }
                    },
                };
                let busy = node.report.running.saturating_add(node.report.waiting);
                let rank = (link.outstanding.load(Ordering::Relaxed), busy, node.id);
                if best.as_ref().is_none_or(|(least, ..)| rank < *least) {
                    best = Some((rank, node.name.clone(), link));
                }
            }
            let ((_, _, id), name, link) = best?;
            // Before the request is out, because nothing may move under it.
            membership.mark_served();
            Some(Ticket::new(id, name, link))
        })
    }

    fn not_ready(&self) -> Status {
        let waiting_for = self.state.waiting_for().borrow().clone();
        let reason = waiting_for.unwrap_or_else(|| "no attention node is ready".to_owned());
        status::unavailable(
            REASON_NOT_READY,
            format!("the cluster is not ready: {reason}"),
            None,
        )
    }

    async fn run(self: Arc<Self>, request: GenerateRequest) -> Result<EventStream, Status> {
        if self.state.waiting_for().borrow().is_some() {
            return Err(self.not_ready());
        }
        let mut tried = Vec::new();
        let mut refusal = None;
        while tried.len() < MAX_ATTEMPTS {
            let Some(ticket) = self.choose(&tried) else {
                break;
            };
            tried.push(ticket.node);
            let name = ticket.name.clone();
            match self.attempt(ticket, request.clone()).await {
                Ok(stream) => return Ok(stream),
                Err(status) if elsewhere(&status) => {
                    tracing::warn!(
                        request = request.request_id,
                        node = name,
                        "refused before it began, offering it to another node: {}",
                        status.message()
                    );
                    refusal = Some(status);
                }
                Err(status) => return Err(status),
            }
        }
        Err(refusal.unwrap_or_else(|| self.not_ready()))
    }

    /// Sends the request and waits for its first event.
    async fn attempt(
        &self,
        ticket: Ticket,
        request: GenerateRequest,
    ) -> Result<EventStream, Status> {
        let mut client = InferenceClient::new(ticket.link.channel.clone())
            .max_decoding_message_size(MAX_EVENT_BYTES);
        let begun = async {
            let mut upstream = client.generate(request).await?.into_inner();
            let first = upstream.message().await?;
            Ok((first, upstream))
        };
        let (first, upstream) = tokio::select! {
            begun = begun => begun.map_err(|status| from_node(&ticket, status))?,
            () = self.state.lost(ticket.node) => return Err(lost(&ticket, "its lease ran out")),
        };
        let Some(first) = first else {
            return Err(lost(&ticket, "it ended the stream before it began"));
        };
        let state = Arc::clone(&self.state);
        let node = ticket.node;
        let gone = async move { state.lost(node).await }.boxed();
        let relay = Relay {
            ticket,
            upstream,
            gone,
            next: Some(first),
            over: false,
        };
        Ok(stream::unfold(relay, |mut relay| async move {
            let event = relay.next().await?;
            Some((event, relay))
        })
        .boxed())
    }
}

/// Passes one request's events on.
struct Relay {
    ticket: Ticket,
    upstream: Streaming<GenerateResponse>,
    gone: BoxFuture<'static, ()>,
    next: Option<GenerateResponse>,
    over: bool,
}

impl Relay {
    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        if self.over {
            return None;
        }
        if let Some(event) = self.next.take() {
            self.over = is_last(&event);
            return Some(Ok(event));
        }
        let event = tokio::select! {
            // What has arrived is passed on even from a node that is gone.
            biased;
            event = self.upstream.message() => match event {
                Ok(Some(event)) => Ok(event),
                Ok(None) => Err(lost(&self.ticket, "it ended the stream early")),
                Err(status) => Err(from_node(&self.ticket, status)),
            },
            () = &mut self.gone => Err(lost(&self.ticket, "it is no longer a member")),
        };
        self.over = event.as_ref().map_or(true, is_last);
        Some(event)
    }
}

fn is_last(event: &GenerateResponse) -> bool {
    matches!(event.event, Some(Event::Complete(_)))
}

/// A status as the front door may show it: what the node itself has said stays
/// as it is, a broken connection is named as such.
fn from_node(ticket: &Ticket, status: Status) -> Status {
    match std::error::Error::source(&status) {
        Some(source) => lost(ticket, &chain(source)),
        None => status,
    }
}

fn lost(ticket: &Ticket, how: &str) -> Status {
    status::with_reason(
        Code::Unavailable,
        REASON_NODE_LOST,
        format!("attention node `{}` was lost: {how}", ticket.name),
        [("node", ticket.name.clone())],
    )
}

/// Whether another node may well take what this one refused.
fn elsewhere(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
}

impl Backend for AttentionNodes {
    fn readiness(&self) -> Readiness {
        match self.0.state.waiting_for().borrow().clone() {
            None => Readiness::Ready,
            Some(reason) => Readiness::NotReady { reason },
        }
    }

    fn generate(
        &self,
        request: GenerateRequest,
    ) -> BoxFuture<'static, Result<EventStream, Status>> {
        // Shared, because the request outlives the call.
        Arc::clone(&self.0).run(request).boxed()
    }
}
