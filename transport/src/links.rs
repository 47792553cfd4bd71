//! The fabric of a process: node number to link, local and remote mixed.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use guild_proto::limits::MAX_PAYLOAD_BYTES;
use tokio::runtime;
use tonic::transport::{Channel, Endpoint};

use crate::{
    Batch, ExchangeCode, ExchangeError, Fabric, Fetch, FetchRequest, Handle, NodeId, Returned,
    Switchboard, Work,
    batch::{Arrived, Awaited, Part, Reply, split},
    grpc, local, new_source,
    rows::Rows,
};

/// Limits of each link of a [`Links`].
#[derive(Debug, Clone)]
pub struct LinkLimits {
    /// Bytes of rows in one message of either direction, at most; never more
    /// than the wire allows ([`MAX_PAYLOAD_BYTES`]).
    pub max_payload_bytes: usize,
    /// Dispatches without an answer on one remote link; one more is refused as
    /// overloaded.
    pub max_frames: usize,
    /// Bytes of rows, out and back, of the dispatches without an answer on one
    /// remote link. A dispatch that has the link to itself is always let through.
    pub max_bytes: usize,
    /// How long a connection may take until its stream stands.
    pub connect_timeout: Duration,
    /// Pause after a failed connection, within which dispatches fail at once;
    /// doubled by every further failure.
    pub min_backoff: Duration,
    /// The longest such pause.
    pub max_backoff: Duration,
    /// A silent connection is pinged after this long.
    pub keepalive_interval: Duration,
    /// A ping without an answer for this long ends the connection. Both together are a part of what
    /// an exchange waits: on a connection that has lost bytes both ends may wait for ever, and the
    /// rows have to be asked for again in time.
    pub keepalive_timeout: Duration,
    /// A connection is given up when an answer is overdue by this much: pings
    /// may still be answered by a peer that no longer answers frames.
    pub stall_grace: Duration,
    /// A blob is given up when nothing of it has come for this long.
    pub fetch_stall: Duration,
}

impl Default for LinkLimits {
    fn default() -> Self {
        Self {
            max_payload_bytes: MAX_PAYLOAD_BYTES,
            max_frames: 64,
            max_bytes: 1 << 30,
            connect_timeout: Duration::from_secs(3),
            min_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(2),
            keepalive_interval: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(2),
            stall_grace: Duration::from_secs(5),
            fetch_stall: Duration::from_secs(5),
        }
    }
}

/// The [`Fabric`] of a process.
pub struct Links {
    name: String,
    /// Of the work that nodes of this process get from here.
    source: u64,
    limits: Arc<LinkLimits>,
    runtime: runtime::Handle,
    dial: Dial,
    peers: RwLock<HashMap<NodeId, Arc<Peer>>>,
}

/// Makes the connections of remote links, with the settings that the endpoint has already. How a
/// peer is authenticated is known to whoever gives it.
pub type Dial = Arc<
    dyn Fn(
            Endpoint,
        )
            -> Pin<Box<dyn Future<Output = Result<Channel, tonic::transport::Error>> + Send>>
        + Send
        + Sync,
>;

struct Peer {
    name: String,
    address: String,
    link: Link,
}

enum Link {
    Local(local::Link),
    Grpc(grpc::Link),
}

impl Links {
    /// A fabric without nodes. `name` is this node's own, for the errors that
    /// arise here; connections live on `runtime`.
    pub fn new(name: impl Into<String>, limits: LinkLimits, runtime: runtime::Handle) -> Self {
        Self {
            name: name.into(),
            source: new_source(),
            limits: Arc::new(limits),
            runtime,
            dial: Arc::new(|endpoint| Box::pin(async move { endpoint.connect().await })),
            peers: RwLock::new(HashMap::new()),
        }
    }

    /// The same with connections made by `dial`; without it they are not encrypted.
    #[must_use]
    pub fn dialling(mut self, dial: Dial) -> Self {
        self.dial = dial;
        self
    }

    /// Makes `nodes` (number, name, `host:port`) the nodes of this fabric. A
    /// node that `local` has is reached in this process, any other by gRPC,
    /// connected when the first rows go there. Links to nodes that stay as they
    /// are stay open; the others are closed once their answers are in.
    pub fn set_nodes(&self, nodes: &[(NodeId, String, String)], local: Option<&Switchboard>) {
        self.set_nodes_where(nodes, |_| local);
    }

    /// The same where only some nodes may be reached in this process: those that
    /// `local` has a switchboard for. A node of another process may have the name
    /// of one that is on the switchboard of this one.
    pub fn set_nodes_where<'a>(
        &self,
        nodes: &[(NodeId, String, String)],
        local: impl Fn(NodeId) -> Option<&'a Switchboard>,
    ) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let mut old = std::mem::take(&mut *peers);
        for (node, name, address) in nodes {
            let board = local(*node).filter(|board| board.get(name).is_some());
            let kept = old.remove(node).filter(|peer| {
                peer.name == *name
                    && peer.address == *address
                    && matches!(peer.link, Link::Local(_)) == board.is_some()
            });
            let peer = kept.unwrap_or_else(|| {
                let link = match board {
                    Some(board) => Link::Local(local::Link::new(board.clone(), name.clone())),
                    None => Link::Grpc(grpc::Link::new(
                        name.clone(),
                        address.clone(),
                        self.limits.clone(),
                        self.runtime.clone(),
                        self.dial.clone(),
                    )),
                };
                Arc::new(Peer {
                    name: name.clone(),
                    address: address.clone(),
                    link,
                })
            });
            peers.insert(*node, peer);
        }
    }

    /// Begins to fetch what a slot of `node` holds, over a connection that is not
    /// that of the rows.
    ///
    /// # Errors
    /// The node is unknown, cannot be reached or refuses, or the blob has not the
    /// length that was asked for; nothing has been allocated for it then.
    pub async fn fetch(&self, node: NodeId, wanted: FetchRequest) -> Result<Fetch, ExchangeError> {
        let peer = self.peer(node, wanted.epoch)?;
        match &peer.link {
            Link::Local(link) => link.fetch(wanted).await,
            Link::Grpc(link) => link.fetch(wanted).await,
        }
    }

    fn peer(&self, node: NodeId, epoch: u64) -> Result<Arc<Peer>, ExchangeError> {
        self.peers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&node)
            .cloned()
            .ok_or_else(|| {
                self.refuse(
                    ExchangeCode::UnknownNode,
                    format!("epoch {epoch}: there is no link to node {node}"),
                )
            })
    }

    fn refuse(&self, code: ExchangeCode, message: String) -> ExchangeError {
        ExchangeError::new(code, self.name.as_str(), message)
    }
}

impl Fabric for Links {
    fn dispatch(&self, batch: Batch<'_>) -> Result<Handle, ExchangeError> {
        let epoch = batch.epoch;
        let parts = split(&batch).map_err(|what| {
            self.refuse(ExchangeCode::Malformed, format!("epoch {epoch}: {what}"))
        })?;
        let mut peers = Vec::with_capacity(parts.len());
        for part in &parts {
            let peer = self.peer(part.node, epoch)?;
            part.check(batch.width, self.limits.max_payload_bytes)
                .map_err(|(code, what)| {
                    self.refuse(code, format!("epoch {epoch}, to {}: {what}", peer.name))
                })?;
            peers.push(peer);
        }
        // Remote nodes first: they work while the local ones do.
        let mut awaited = Vec::with_capacity(parts.len());
        let mut here: Vec<(Arc<Peer>, Part)> = Vec::new();
        for (peer, part) in peers.into_iter().zip(parts) {
            match &peer.link {
                Link::Grpc(link) => awaited.push(Awaited {
                    reply: Reply::Away(link.send(&batch, &part)?),
                    peer: peer.name.clone(),
                    part,
                }),
                Link::Local(_) => here.push((peer, part)),
            }
        }
        for (peer, part) in here {
            let Link::Local(link) = &peer.link else {
                continue;
            };
            let reply = Reply::Here(Arrived::now(link.execute(Work {
                epoch,
                width: batch.width,
                rows: Rows::from(part.gather(&batch)),
                slots: part.slots.clone(),
                deadline: batch.deadline,
                source: self.source,
            })));
            awaited.push(Awaited {
                peer: peer.name.clone(),
                part,
                reply,
            });
        }
        Ok(Handle {
            epoch,
            width: batch.width,
            assignments: batch.assignments.len(),
            deadline: batch.deadline,
            parts: awaited,
        })
    }

    fn is_here(&self, node: NodeId) -> bool {
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let peer = peers.get(&node);
        peer.is_some_and(|peer| matches!(peer.link, Link::Local(_)))
    }

    async fn combine(&self, handle: Handle) -> Result<Returned, ExchangeError> {
        handle.combined().await
    }
}

/// What is left until `deadline`, in the milliseconds of a frame: at least 1,
/// 0 for "no deadline", `None` when it has passed.
pub(crate) fn remaining_ms(deadline: Option<Instant>) -> Option<u32> {
    let Some(deadline) = deadline else {
        return Some(0);
    };
    let left = deadline.checked_duration_since(Instant::now())?;
    let ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
    (!left.is_zero()).then_some(ms.max(1))
}
