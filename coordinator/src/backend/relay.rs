//! One stream on its way to the client, whichever node it comes from.
//!
//! What moves a stream: a broken connection, one whose other end gives no sign of
//! life any more, a node that is no longer a member (its lease ran out), a node
//! that drains or whose engine has stopped. What does not: EXPERT_LOST.
//! The node has tried by the newest placement until the exchange's deadline,
//! and another one would wait for the same experts by the same placement; and
//! whatever a node says of the request itself.
//!
//! Leaving a node drops its stream, so nothing it still says can be heard.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use guild_node::serve::chain;
use guild_node::status::{self, reason_of};
use guild_proto::inference::v1::GenerateResponse;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_client::InferenceClient;
use guild_scheduler::placement::NodeId;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, Streaming};

use super::nodes::{Helper, Nodes, Ticket};
use super::record::Record;
use crate::front::EventStream;

/// ErrorInfo reason: the attention node of a request is gone, and no other has
/// taken its place.
const REASON_NODE_LOST: &str = "ATTENTION_NODE_LOST";
/// ErrorInfo reasons by which a node says that it takes or keeps no request.
const REASONS_TO_LEAVE: [&str; 3] = ["NOT_READY", "DRAINING", "ENGINE_STOPPED"];
/// Attention nodes that a new request is offered to before it is refused.
const MAX_OFFERS: usize = 3;
/// Times that one stream is taken up again.
const MAX_RESUMES: usize = 16;
/// The same, in a row, without a single token in between: a request that brings
/// nodes down must not go through all of them.
const MAX_FRUITLESS_RESUMES: usize = 3;
/// How long a node may take to accept a request.
const ACCEPT_LIMIT: Duration = Duration::from_secs(3);
/// Pause before nodes are asked again that have just refused or been lost.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of one event: prompt logprobs of a long prompt come in one.
const MAX_EVENT_BYTES: usize = 256 << 20;

/// A stream, and the node it comes from at present.
pub(super) struct Relay {
    nodes: Arc<Nodes>,
    record: Record,
    patience: Duration,
    home: Option<Home>,
    resumes: usize,
    fruitless: usize,
    over: bool,
}

/// A node that has accepted the stream.
struct Home {
    ticket: Ticket,
    events: Streaming<GenerateResponse>,
    gone: BoxFuture<'static, ()>,
    /// A place on the node that runs the prompt for it, until that is through.
    helper: Option<Helper>,
}

/// Why a node does not give what it was asked for.
enum Fault {
    /// It could not even be asked, or does not say a word.
    Unreached(Status),
    /// It is gone, or as good as gone, and may have gone for this very request.
    Lost(Status),
    /// It is there and has no place for the request.
    Refused(Status),
    /// Another node would say the same.
    Final(Status),
}

impl Relay {
    /// Sends the request and waits for its first event.
    ///
    /// # Errors
    /// No node takes the request, or one has refused it for good.
    pub(super) async fn open(
        nodes: Arc<Nodes>,
        record: Record,
        patience: Duration,
    ) -> Result<EventStream, Status> {
        let mut relay = Relay {
            nodes,
            record,
            patience,
            home: None,
            resumes: 0,
            fruitless: 0,
            over: false,
        };
        relay.home = relay.find_home(None).await?;
        let first = relay.next().await.transpose()?;
        let rest = stream::unfold(relay, |mut relay| async move {
            let event = relay.next().await?;
            Some((event, relay))
        });
        Ok(stream::iter(first.map(Ok)).chain(rest).boxed())
    }

    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        if self.over {
            return None;
        }
        let event = self.event().await;
        let is_last =
            |response: &GenerateResponse| matches!(response.event, Some(Event::Complete(_)));
        if event.as_ref().map_or(true, is_last) {
            (self.over, self.home) = (true, None);
        }
        Some(event)
    }

    async fn event(&mut self) -> Result<GenerateResponse, Status> {
        loop {
            let Some(home) = &mut self.home else {
                return Ok(self.record.cut_short());
            };
            match home.next().await {
                Ok(response) => {
                    let emitted = self.record.emitted();
                    let Some(response) = self.record.take(response) else {
                        continue;
                    };
                    if self.record.emitted() > emitted {
                        self.fruitless = 0;
                        home.ticket.settle(self.record.to_come());
                        home.helper = None;
                    }
                    return Ok(response);
                }
                Err(Fault::Final(status)) => return Err(status),
                Err(Fault::Lost(status) | Fault::Unreached(status) | Fault::Refused(status)) => {
                    self.nodes.suspect(home.ticket.node);
                    self.home = None;
                    if let Some(end) = self.record.end() {
                        return Ok(end);
                    }
                    self.count_resume(&status)?;
                    self.home = self.find_home(Some(status)).await?;
                }
            }
        }
    }

    /// One more node has been lost, as `why` says.
    ///
    /// # Errors
    /// One too many.
    fn count_resume(&mut self, why: &Status) -> Result<(), Status> {
        (self.resumes, self.fruitless) = (self.resumes + 1, self.fruitless + 1);
        let given_up = self.resumes > MAX_RESUMES || self.fruitless > MAX_FRUITLESS_RESUMES;
        tracing::warn!(
            request = self.record.id(),
            emitted = self.record.emitted(),
            resumes = self.resumes,
            given_up,
            "a stream has lost its attention node: {}",
            why.message()
        );
        match given_up {
            true => Err(without_successor(why, "it has had too many nodes already")),
            false => Ok(()),
        }
    }

    /// Finds a node for what is still to come. A new request is refused when
    /// the nodes refuse it; one that has been taken already (`lost` says how it
    /// lost its node) waits for a place. None: there are nodes, but the
    /// sequence has outgrown the KV memory of each.
    async fn find_home(&mut self, mut lost: Option<Status>) -> Result<Option<Home>, Status> {
        let deadline = Instant::now() + self.patience;
        let mut tried: Vec<NodeId> = Vec::new();
        let mut refusal = None;
        let mut outgrown = 0;
        let prefix = self
            .nodes
            .prefix(self.record.tenant(), self.record.tokens());
        loop {
            let offers_left = lost.is_some() || tried.len() < MAX_OFFERS;
            let ticket =
                offers_left.then(|| self.nodes.choose(&tried, &prefix, self.record.to_run()));
            let Some(ticket) = ticket.flatten() else {
                if outgrown > 0 && outgrown == tried.len() {
                    return Ok(None);
                }
                let Some(lost) = &lost else {
                    return Err(refusal.unwrap_or_else(|| self.nodes.not_ready()));
                };
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let limit = format!("no other has taken over within {:?}", self.patience);
                    return Err(without_successor(lost, &limit));
                }
                self.nodes.news(RETRY_PAUSE.min(left)).await;
                tried.clear();
                outgrown = 0;
                continue;
            };
            let (node, name) = (ticket.node, ticket.name.clone());
            tried.push(node);
            let fault = match self.offer(ticket, &prefix, deadline).await {
                Ok(home) => {
                    self.nodes.runs(&prefix, node);
                    if let Some(helper) = &home.helper {
                        self.nodes.runs(&prefix, helper.ticket.node);
                    }
                    if lost.is_some() {
                        let (request, emitted) = (self.record.id(), self.record.emitted());
                        tracing::info!(request, emitted, node = name, "a stream goes on elsewhere");
                    }
                    return Ok(Some(home));
                }
                Err(fault) => fault,
            };
            match fault {
                // Only the length of a request that was valid once can be wrong.
                Fault::Final(status)
                    if status.code() == Code::InvalidArgument && self.record.emitted() > 0 =>
                {
                    outgrown += 1;
                }
                Fault::Final(status) => return Err(status),
                Fault::Refused(status) => {
                    tracing::debug!(node = name, "a request was refused: {}", status.message());
                    refusal = Some(status);
                }
                Fault::Unreached(status) => {
                    self.nodes.suspect(node);
                    tracing::debug!(node = name, "{}", status.message());
                    lost = Some(status);
                }
                Fault::Lost(status) => {
                    self.nodes.suspect(node);
                    self.count_resume(&status)?;
                    lost = Some(status);
                }
            }
        }
    }

    /// Offers what is still to come to a node, with another one to run the prompt
    /// for it where that is worth it. When that one goes, the node runs it itself.
    async fn offer(
        &mut self,
        mut ticket: Ticket,
        prefix: &[u64],
        deadline: Instant,
    ) -> Result<Home, Fault> {
        let mut request = self.record.request();
        let prompt = self.record.tokens().len();
        let may = self.record.may_be_paired();
        let helper = may.then(|| self.nodes.pair(&mut ticket, prefix, prompt));
        let helper = helper.flatten();
        if let Some(helper) = &helper {
            request.prefill_from.clone_from(&helper.address);
        }
        let mut client =
            InferenceClient::new(ticket.channel.clone()).max_decoding_message_size(MAX_EVENT_BYTES);
        let mut gone = self.nodes.lost(ticket.node).boxed();
        let limit = deadline.min(Instant::now() + ACCEPT_LIMIT);
        let answer = tokio::select! {
            answer = timeout_at(limit, client.generate(request)) => answer,
            () = &mut gone => return Err(Fault::Lost(lost(&ticket, "its lease ran out"))),
        };
        match answer {
            Ok(Ok(response)) => Ok(Home {
                ticket,
                events: response.into_inner(),
                gone,
                helper,
            }),
            Ok(Err(status)) => Err(judge(&ticket, status)),
            Err(_) => Err(Fault::Unreached(lost(&ticket, "it does not answer"))),
        }
    }
}

impl Home {
    async fn next(&mut self) -> Result<GenerateResponse, Fault> {
        tokio::select! {
            // What has arrived is passed on even from a node that is gone.
            biased;
            event = self.events.message() => match event {
                Ok(Some(event)) => Ok(event),
                Ok(None) => Err(Fault::Lost(lost(&self.ticket, "it ended the stream early"))),
                Err(status) => Err(judge(&self.ticket, status)),
            },
            () = &mut self.gone => Err(Fault::Lost(lost(&self.ticket, "it is no longer a member"))),
        }
    }
}

/// What a status means for the stream. What a node has said itself has a
/// reason; without one it is the connection that speaks.
fn judge(ticket: &Ticket, status: Status) -> Fault {
    let source = std::error::Error::source(&status).map(chain);
    match (source, reason_of(&status), status.code()) {
        // A connection that did not come about, or was given up because nothing came by it.
        (Some(source), _, Code::Unavailable) => Fault::Unreached(lost(ticket, &source)),
        (_, None, Code::Unavailable) => Fault::Unreached(lost(ticket, status.message())),
        (Some(source), ..) => Fault::Lost(lost(ticket, &source)),
        (_, _, Code::ResourceExhausted) => Fault::Refused(status),
        (_, Some(reason), _) if REASONS_TO_LEAVE.contains(&reason.as_str()) => {
            Fault::Refused(status)
        }
        (_, None, Code::Unknown | Code::Internal | Code::Cancelled) => {
            Fault::Lost(lost(ticket, status.message()))
        }
        _ => Fault::Final(status),
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

/// The last word of a stream whose node was lost as `lost` says.
fn without_successor(lost: &Status, why: &str) -> Status {
    status::with_reason(
        Code::Unavailable,
        REASON_NODE_LOST,
        format!("{}; {why}", lost.message()),
        [],
    )
}
