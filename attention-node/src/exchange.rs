//! The exchange of one layer: rows out to their experts, expert rows back.
//!
//! Secret: what is done when an expert cannot be reached. Routes are logical; they are resolved
//! by the newest placement at every attempt, and attempts are repeated until the exchange's
//! deadline. Either every row comes back or the exchange fails with its origin named: there is
//! no partial result that anybody could sum. It must not know what a request is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use guild_model::gate::Routes;
use guild_transport::{Assignment, Batch, ExchangeError, Fabric, Handle, NodeId};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::view::View;

/// How long one layer's exchange may take in all, retries included, unless configured.
pub const EXCHANGE_DEADLINE: Duration = Duration::from_secs(10);
/// Pause before the first retry; it doubles up to [`BACKOFF_MAX`]. A new placement ends it early.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// The longest pause between two attempts.
pub const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// How much longer than the deadline a fabric may take to say which node was silent.
const SILENCE_GRACE: Duration = Duration::from_millis(250);
/// Experts named in a failure; more add nothing for the reader.
const EXPERTS_NAMED: usize = 8;

/// The newest ACTIVE placement; `None` before the first.
pub type Views = watch::Receiver<Option<Arc<View>>>;

/// An exchange that did not come to an end in time, or could not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "layer {layer}, experts {experts:?}: {message} (node {node:?}, placement epoch {epoch}, {attempts} attempts)"
)]
pub struct ExchangeFailure {
    /// Decoder layer.
    pub layer: usize,
    /// Logical experts concerned, ascending; the first few when there are many.
    pub experts: Vec<u32>,
    /// Placement epoch of the last attempt; 0 when there was no placement.
    pub epoch: u64,
    /// Name of the node that refused or was silent; empty when no single node is to blame.
    pub node: String,
    /// Attempts made.
    pub attempts: u32,
    /// What went wrong at last.
    pub message: String,
}

/// Sends rows to experts wherever they are.
pub(crate) struct Exchange<F> {
    fabric: Arc<F>,
    views: Views,
    deadline: Duration,
}

/// Rows of one layer that are away.
pub(crate) struct Away<'a, F> {
    exchange: &'a Exchange<F>,
    layer: usize,
    /// `[n, hidden]`, after the layer's norm.
    x: &'a [f32],
    routes: &'a Routes,
    deadline: Instant,
    attempt: Attempt,
}

/// One try: what was sent by which view, or why nothing was.
struct Attempt {
    view: Option<Arc<View>>,
    nodes: BTreeSet<NodeId>,
    sent: Result<(Handle, Arc<View>), Fault>,
}

/// Why an attempt failed.
struct Fault {
    retryable: bool,
    node: String,
    experts: Vec<u32>,
    message: String,
}

impl<F: Fabric> Exchange<F> {
    pub(crate) fn new(fabric: Arc<F>, views: Views, deadline: Duration) -> Self {
        Self {
            fabric,
            views,
            deadline,
        }
    }

    /// Sends every row of `x` to its experts and returns at once; [`Away::combine`] waits.
    pub(crate) fn dispatch<'a>(
        &'a self,
        layer: usize,
        x: &'a [f32],
        routes: &'a Routes,
    ) -> Away<'a, F> {
        let deadline = Instant::now() + self.deadline;
        let attempt = self.attempt(layer, x, routes, deadline);
        Away {
            exchange: self,
            layer,
            x,
            routes,
            deadline,
            attempt,
        }
    }

    fn attempt(&self, layer: usize, x: &[f32], routes: &Routes, deadline: Instant) -> Attempt {
        let view = self.views.borrow().clone();
        let (nodes, sent) = match &view {
            None => (
                BTreeSet::new(),
                Err(Fault::retryable("no placement is active yet")),
            ),
            Some(view) => match resolve(view, layer, routes) {
                Err(fault) => (BTreeSet::new(), Err(fault)),
                Ok(assignments) => {
                    let batch = Batch {
                        epoch: view.epoch(),
                        width: x.len() / routes.rows().max(1),
                        rows: x,
                        assignments: &assignments,
                        deadline: Some(deadline.into_std()),
                    };
                    let sent = self.fabric.dispatch(batch).map_err(Fault::from);
                    let sent = sent.map(|handle| (handle, Arc::clone(view)));
                    (assignments.iter().map(|a| a.node).collect(), sent)
                }
            },
        };
        Attempt { view, nodes, sent }
    }
}

/// One assignment for each (row, expert), in the order of the routes.
fn resolve(view: &View, layer: usize, routes: &Routes) -> Result<Vec<Assignment>, Fault> {
    let assign = |(at, &expert): (usize, &u32)| match view.resolve(layer as u32, expert) {
        Some((node, slot)) => Ok(Assignment {
            row: (at / routes.top_k) as u32,
            node,
            slot,
        }),
        None => Err(Fault {
            experts: vec![expert],
            ..Fault::retryable("the expert has no home in the present placement")
        }),
    };
    routes.experts.iter().enumerate().map(assign).collect()
}

impl<F: Fabric> Away<'_, F> {
    /// Waits for the rows: `[n * top_k, hidden]` in the order of the routes. Faults that may
    /// pass (a lost connection, an unknown epoch, overload) are retried by the newest placement
    /// until the deadline.
    pub(crate) async fn combine(mut self) -> Result<Vec<f32>, ExchangeFailure> {
        let mut backoff = BACKOFF_FIRST;
        let mut attempts = 1;
        loop {
            let Attempt { view, nodes, sent } = self.attempt;
            let fault = match sent {
                Err(fault) => fault,
                Ok((handle, by)) => match self
                    .exchange
                    .receive(handle, &by, &nodes, self.deadline)
                    .await
                {
                    Ok(rows) if rows.len() == self.routes.top_k * self.x.len() => return Ok(rows),
                    Ok(rows) => Fault::fatal(format!("{} elements came back", rows.len())),
                    Err(fault) => fault,
                },
            };
            let epoch = view.as_ref().map_or(0, |view| view.epoch());
            let left = self.deadline.saturating_duration_since(Instant::now());
            if !fault.retryable || left.is_zero() {
                let experts = fault.experts(view.as_deref(), self.layer, self.routes);
                let Fault { node, message, .. } = fault;
                return Err(ExchangeFailure {
                    layer: self.layer,
                    experts,
                    epoch,
                    node,
                    attempts,
                    message,
                });
            }
            tracing::warn!(
                layer = self.layer,
                epoch,
                node = fault.node,
                attempts,
                "expert rows are late, trying again: {}",
                fault.message
            );
            self.exchange.news(epoch, backoff.min(left)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
            attempts += 1;
            self.attempt = self
                .exchange
                .attempt(self.layer, self.x, self.routes, self.deadline);
        }
    }
}

impl<F: Fabric> Exchange<F> {
    /// Waits for an attempt that is out. Given up when the deadline has passed, and when a newer
    /// placement no longer has one of the nodes that it went to: that one will not answer.
    async fn receive(
        &self,
        handle: Handle,
        sent_by: &View,
        nodes: &BTreeSet<NodeId>,
        deadline: Instant,
    ) -> Result<Vec<f32>, Fault> {
        let mut views = self.views.clone();
        let gone = |view: &Option<Arc<View>>| {
            let view = view.as_ref()?;
            nodes.iter().copied().find(|&node| !view.has_node(node))
        };
        let left = async {
            match views.wait_for(|view| gone(view).is_some()).await {
                Ok(view) => gone(&view),
                // Nobody will publish another placement: only the answer or the deadline counts.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = timeout_at(deadline + SILENCE_GRACE, self.fabric.combine(handle)) => match answer {
                Ok(answer) => answer.map(|returned| returned.rows).map_err(Fault::from),
                Err(_) => Err(Fault::retryable("no answer before the deadline")),
            },
            node = left => Err(Fault {
                node: node.and_then(|node| sent_by.name(node)).unwrap_or_default().to_owned(),
                ..Fault::retryable("the node has left the placement")
            }),
        }
    }

    /// Waits for a placement other than `epoch`, but no longer than `pause`.
    async fn news(&self, epoch: u64, pause: Duration) {
        let mut views = self.views.clone();
        let newer = views.wait_for(|view| view.as_ref().is_some_and(|view| view.epoch() != epoch));
        if let Ok(Err(_closed)) = timeout(pause, newer).await {
            sleep(pause).await;
        }
    }
}

impl Fault {
    fn retryable(message: impl Into<String>) -> Fault {
        Fault {
            retryable: true,
            ..Fault::fatal(message)
        }
    }

    fn fatal(message: impl Into<String>) -> Fault {
        Fault {
            retryable: false,
            node: String::new(),
            experts: Vec::new(),
            message: message.into(),
        }
    }

    /// The experts concerned: those known, else those routed to the node that is to blame.
    fn experts(&self, view: Option<&View>, layer: usize, routes: &Routes) -> Vec<u32> {
        if !self.experts.is_empty() {
            return self.experts.clone();
        }
        let Some(view) = view else { return Vec::new() };
        let blamed = |&expert: &u32| {
            let home = view.resolve(layer as u32, expert);
            home.and_then(|(node, _)| view.name(node)) == Some(self.node.as_str())
        };
        let experts: BTreeSet<u32> = routes.experts.iter().copied().filter(blamed).collect();
        experts.into_iter().take(EXPERTS_NAMED).collect()
    }
}

impl From<ExchangeError> for Fault {
    fn from(error: ExchangeError) -> Fault {
        Fault {
            retryable: error.is_retryable(),
            node: error.node,
            experts: Vec::new(),
            message: error.message,
        }
    }
}
