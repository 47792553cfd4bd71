//! Leaf: a node of another process, over one long-lived gRPC stream.
//!
//! A link connects when the first rows go there, and again when rows go there
//! after the connection was lost. Rows in flight at a loss fail at once, with an
//! error that may be retried: what became of them is not known, and computing
//! them again is harmless. While the link waits after a failed connection,
//! dispatches fail at once too, so that a caller can turn to another node.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use guild_proto::{
    experts::v1::{
        CombineFrame, DispatchFrame, RowFormat, SlotRows, experts_client::ExpertsClient,
    },
    frame::Combine,
    limits::{CONNECTION_WINDOW_BYTES, HTTP2_FRAME_BYTES, MAX_FRAME_BYTES, STREAM_WINDOW_BYTES},
};
use tokio::{
    runtime,
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    Batch, ExchangeCode, ExchangeError, Fetch, FetchRequest,
    batch::{Arrived, Part, Place},
    blob,
    links::{Dial, LinkLimits, remaining_ms},
    rows,
};

/// How often a connection looks for overdue answers.
const STALL_CHECK: Duration = Duration::from_millis(500);

type Answer = oneshot::Sender<Arrived<Bytes>>;

/// A link to one node. Dropping it closes the connection once the answers that
/// are on their way have come.
pub(crate) struct Link(Arc<Shared>);

struct Shared {
    peer: String,
    address: String,
    limits: Arc<LinkLimits>,
    runtime: runtime::Handle,
    dial: Dial,
    state: Mutex<State>,
    /// The connection for blobs, once one was wanted.
    blobs: tokio::sync::Mutex<Option<Channel>>,
    retired: CancellationToken,
}

struct State {
    phase: Phase,
    next_id: u64,
    /// Dispatches without an answer, by id.
    pending: HashMap<u64, Pending>,
    /// Sum of `bytes` of `pending`.
    bytes: usize,
    /// The pause after the next failure.
    backoff: Duration,
}

enum Phase {
    Idle,
    /// No new attempt before `until`.
    Waiting {
        until: Instant,
        reason: String,
    },
    /// Frames to send when the stream stands.
    Connecting(Vec<DispatchFrame>),
    Open(mpsc::Sender<DispatchFrame>),
}

struct Pending {
    epoch: u64,
    width: usize,
    pairs: usize,
    bytes: usize,
    deadline: Option<Instant>,
    place: Place,
    answer: Answer,
}

/// Why a connection ended.
struct Loss {
    code: ExchangeCode,
    reason: String,
    /// Whether it had been of use: then the next attempt need not wait.
    served: bool,
}

impl Link {
    pub(crate) fn new(
        peer: String,
        address: String,
        limits: Arc<LinkLimits>,
        runtime: runtime::Handle,
        dial: Dial,
    ) -> Self {
        let state = State {
            phase: Phase::Idle,
            next_id: 1,
            pending: HashMap::new(),
            bytes: 0,
            backoff: limits.min_backoff,
        };
        Self(Arc::new(Shared {
            peer,
            address,
            limits,
            runtime,
            dial,
            state: Mutex::new(state),
            blobs: tokio::sync::Mutex::default(),
            retired: CancellationToken::new(),
        }))
    }

    /// Sends a part of a batch; the answer is checked before it is handed over.
    pub(crate) fn send(
        &self,
        batch: &Batch<'_>,
        part: &Part,
    ) -> Result<oneshot::Receiver<Arrived<Bytes>>, ExchangeError> {
        let shared = &self.0;
        let place = Place::new(batch.epoch, &part.slots);
        let Some(deadline_ms) = remaining_ms(batch.deadline) else {
            return Err(shared.error(
                ExchangeCode::Deadline,
                format!("{place}: passed before the rows were sent"),
            ));
        };
        let (answer, answered) = oneshot::channel();
        let (out, back) = part.bytes(batch.width);
        // The place in the books first, the work of gathering after it.
        let id = shared.admit(Pending {
            epoch: batch.epoch,
            width: batch.width,
            pairs: part.pairs(),
            bytes: out + back,
            deadline: batch.deadline,
            place,
            answer,
        })?;
        let frame = DispatchFrame {
            id,
            epoch: batch.epoch,
            deadline_ms,
            format: RowFormat::F32.into(),
            width: batch.width as u32,
            rows: rows::into_wire(part.gather(batch)),
            slots: part
                .slots
                .iter()
                .map(|(slot, rows)| SlotRows {
                    slot: *slot,
                    row_index: rows.clone(),
                })
                .collect(),
            crc: 0,
        }
        .sealed();
        shared.enqueue(frame);
        Ok(answered)
    }

    /// Begins to fetch a blob.
    pub(crate) async fn fetch(&self, wanted: FetchRequest) -> Result<Fetch, ExchangeError> {
        let shared = &self.0;
        let late = |what: String| blob::error(&shared.peer, &wanted, ExchangeCode::Deadline, what);
        let mut until = Instant::now() + shared.limits.connect_timeout + shared.limits.fetch_stall;
        if let Some(deadline) = wanted.deadline {
            until = until.min(deadline);
        }
        let begun = tokio::time::timeout_at(until.into(), shared.begin(wanted));
        begun
            .await
            .unwrap_or_else(|_| Err(late(format!("{} does not answer", shared.address))))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.0.retired.cancel();
    }
}

impl Shared {
    /// The connection for blobs, made when there is none, and the first piece.
    async fn begin(&self, wanted: FetchRequest) -> Result<Fetch, ExchangeError> {
        let mut known = self.blobs.lock().await;
        let channel = match &*known {
            Some(channel) => channel.clone(),
            None => {
                let dialled = match self.endpoint(blob::WINDOW_BYTES, CONNECTION_WINDOW_BYTES) {
                    Ok(endpoint) => (self.dial)(endpoint).await.map_err(|e| chain(&e)),
                    Err(reason) => Err(reason),
                };
                let channel = dialled.map_err(|reason| {
                    let what = format!("no connection to {}: {reason}", self.address);
                    blob::error(&self.peer, &wanted, ExchangeCode::Unreachable, what)
                })?;
                known.insert(channel).clone()
            }
        };
        drop(known);
        let mut client = ExpertsClient::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
        let request = guild_proto::experts::v1::FetchRequest {
            epoch: wanted.epoch,
            slot: wanted.slot,
        };
        let begun = match client.fetch(request).await {
            Ok(chunks) => {
                let stall = self.limits.fetch_stall;
                Fetch::away(&self.peer, wanted, stall, chunks.into_inner()).await
            }
            Err(status) => Err(blob::refused(&self.peer, &wanted, &status)),
        };
        if let Err(error) = &begun
            && error.code == ExchangeCode::Unreachable
        {
            // The next one dials again.
            *self.blobs.lock().await = None;
        }
        begun
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, code: ExchangeCode, message: String) -> ExchangeError {
        ExchangeError::new(code, self.peer.as_str(), message)
    }

    /// Enters a dispatch in the books, if the link can take it now.
    fn admit(&self, pending: Pending) -> Result<u64, ExchangeError> {
        let mut state = self.state();
        if let Phase::Waiting { until, reason } = &state.phase
            && Instant::now() < *until
        {
            let message = format!("{}: {reason}", pending.place);
            return Err(self.error(ExchangeCode::Unreachable, message));
        }
        let frames = state.pending.len();
        let bytes = state.bytes + pending.bytes;
        if frames >= self.limits.max_frames || (frames > 0 && bytes > self.limits.max_bytes) {
            let message = format!(
                "{}: {frames} dispatches of {} bytes wait for their answer, the limits are {} and {}",
                pending.place, state.bytes, self.limits.max_frames, self.limits.max_bytes
            );
            return Err(self.error(ExchangeCode::Overloaded, message));
        }
        let id = state.next_id;
        state.next_id += 1;
        state.bytes = bytes;
        state.pending.insert(id, pending);
        Ok(id)
    }

    /// Sends an admitted frame, or begins to connect. A frame whose dispatch
    /// failed meanwhile is dropped.
    fn enqueue(self: &Arc<Self>, frame: DispatchFrame) {
        let mut state = self.state();
        if !state.pending.contains_key(&frame.id) {
            return;
        }
        let refused = match &mut state.phase {
            Phase::Connecting(frames) => {
                frames.push(frame);
                None
            }
            // Never full: it has room for every dispatch in the books.
            Phase::Open(frames) => frames.try_send(frame).err(),
            Phase::Idle | Phase::Waiting { .. } => {
                state.phase = Phase::Connecting(vec![frame]);
                self.runtime.spawn(Arc::clone(self).run());
                None
            }
        };
        if let Some(refused) = refused {
            let (mpsc::error::TrySendError::Full(frame) | mpsc::error::TrySendError::Closed(frame)) =
                refused;
            if let Some(pending) = state.remove(frame.id) {
                let message = format!("{}: the connection is being lost", pending.place);
                let error = self.error(ExchangeCode::Unreachable, message);
                // A receiver that has gone needs no answer.
                let _ = pending.answer.send(Arrived::now(Err(error)));
            }
        }
    }

    /// The life of one connection.
    async fn run(self: Arc<Self>) {
        let connecting = tokio::time::timeout(self.limits.connect_timeout, self.connect());
        let loss = match connecting.await {
            Err(_) => Loss {
                code: ExchangeCode::Unreachable,
                reason: format!(
                    "no connection to {} within {:?}",
                    self.address, self.limits.connect_timeout
                ),
                served: false,
            },
            Ok(Err(reason)) => Loss {
                code: ExchangeCode::Unreachable,
                reason: format!("no connection to {}: {reason}", self.address),
                served: false,
            },
            Ok(Ok((_client, frames, answers))) => {
                tracing::info!(peer = %self.peer, address = %self.address, "connected");
                self.open(frames);
                self.read(answers).await
            }
        };
        self.lost(loss);
    }

    /// The client must stay alive as long as its stream.
    async fn connect(
        &self,
    ) -> Result<
        (
            ExpertsClient<Channel>,
            mpsc::Sender<DispatchFrame>,
            Streaming<CombineFrame>,
        ),
        String,
    > {
        let endpoint = self.endpoint(STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES)?;
        let channel = (self.dial)(endpoint).await.map_err(|error| chain(&error))?;
        let mut client = ExpertsClient::new(channel)
            .max_decoding_message_size(MAX_FRAME_BYTES)
            .max_encoding_message_size(MAX_FRAME_BYTES);
        let (frames, outgoing) = mpsc::channel(self.limits.max_frames.max(1));
        let answers = client
            .exchange(ReceiverStream::new(outgoing))
            .await
            .map_err(|status| describe_status(&status))?
            .into_inner();
        Ok((client, frames, answers))
    }

    fn endpoint(&self, stream_window: u32, connection_window: u32) -> Result<Endpoint, String> {
        Ok(Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|error| chain(&error))?
            .tcp_nodelay(true)
            .initial_stream_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_frame_size(HTTP2_FRAME_BYTES)
            .http2_keep_alive_interval(self.limits.keepalive_interval)
            .keep_alive_timeout(self.limits.keepalive_timeout)
            .keep_alive_while_idle(true))
    }

    fn open(&self, frames: mpsc::Sender<DispatchFrame>) {
        let mut state = self.state();
        let queued = std::mem::replace(&mut state.phase, Phase::Open(frames.clone()));
        if let Phase::Connecting(queued) = queued {
            for frame in queued {
                // Room for all of them; a closed stream is noticed by its reader.
                let _ = frames.try_send(frame);
            }
        }
    }

    /// Hands out answers until the connection ends.
    async fn read(&self, mut answers: Streaming<CombineFrame>) -> Loss {
        let mut served = false;
        let mut stall_check = tokio::time::interval(STALL_CHECK);
        let end = |code, reason: String, served| Loss {
            code,
            reason,
            served,
        };
        loop {
            let retired = self.retired.is_cancelled();
            if retired && self.state().pending.is_empty() {
                return end(
                    ExchangeCode::Unreachable,
                    "the node is no longer part of the placement".to_owned(),
                    served,
                );
            }
            tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(frame)) => match self.deliver(frame) {
                        Ok(()) => served = true,
                        Err((code, reason)) => return end(code, reason, served),
                    },
                    Ok(None) => return end(
                        ExchangeCode::Unreachable,
                        format!("{} closed the stream", self.address),
                        served,
                    ),
                    Err(status) => return end(
                        ExchangeCode::Unreachable,
                        format!("lost {}: {}", self.address, describe_status(&status)),
                        served,
                    ),
                },
                _ = stall_check.tick() => {
                    if let Some(place) = self.overdue() {
                        return end(
                            ExchangeCode::Unreachable,
                            format!("{} owes the answer to {place}: gave the connection up", self.address),
                            false,
                        );
                    }
                }
                () = self.retired.cancelled(), if !retired => {}
            }
        }
    }

    /// An answer that is late by more than the grace.
    fn overdue(&self) -> Option<Place> {
        let grace = self.limits.stall_grace;
        let state = self.state();
        let mut pending = state.pending.values();
        pending
            .find(|pending| pending.deadline.is_some_and(|at| at.elapsed() > grace))
            .map(|pending| pending.place)
    }

    /// Gives an answer to its dispatch. An error means that the stream cannot be
    /// trusted any more: with a frame whose id may be wrong, no dispatch knows
    /// whether its answer is still to come.
    fn deliver(&self, frame: CombineFrame) -> Result<(), (ExchangeCode, String)> {
        let id = frame.id;
        let combine = Combine::try_from(frame).map_err(|error| {
            let reason = format!("{} sent a bad frame: {error}", self.address);
            (error.code().into(), reason)
        })?;
        let Some(pending) = self.state().remove(id) else {
            // An id that was damaged on its way there comes back like this: nothing on this
            // connection can be matched any more, and all of it may be asked again.
            let reason = format!("{} answered dispatch {id}, which is not open", self.address);
            return Err((ExchangeCode::Unreachable, reason));
        };
        let answer = match combine.outcome {
            Err(fault) => Err(ExchangeError::from_fault(fault, &self.peer)),
            Ok(rows)
                if combine.epoch != pending.epoch
                    || rows.num_rows != pending.pairs
                    || (rows.num_rows > 0 && rows.width != pending.width) =>
            {
                let message = format!(
                    "{}: answered with {} rows of width {} of epoch {} instead of {} rows of width {}",
                    pending.place,
                    rows.num_rows,
                    rows.width,
                    combine.epoch,
                    pending.pairs,
                    pending.width
                );
                Err(self.error(ExchangeCode::Malformed, message))
            }
            Ok(rows) => Ok(rows.rows),
        };
        // A receiver that has gone needs no answer.
        let _ = pending.answer.send(Arrived::now(answer));
        Ok(())
    }

    /// Fails what is in flight and says when the next attempt may be made.
    fn lost(&self, loss: Loss) {
        let mut state = self.state();
        let pending = std::mem::take(&mut state.pending);
        state.bytes = 0;
        if loss.served {
            state.backoff = self.limits.min_backoff;
            state.phase = Phase::Idle;
        } else {
            state.phase = Phase::Waiting {
                until: Instant::now() + state.backoff,
                reason: loss.reason.clone(),
            };
            state.backoff = (state.backoff * 2).min(self.limits.max_backoff);
        }
        drop(state);
        if !self.retired.is_cancelled() || !pending.is_empty() {
            tracing::warn!(peer = %self.peer, in_flight = pending.len(), reason = %loss.reason, "no connection");
        }
        for pending in pending.into_values() {
            let message = format!("{}: {}", pending.place, loss.reason);
            // A receiver that has gone needs no answer.
            let error = self.error(loss.code, message);
            let _ = pending.answer.send(Arrived::now(Err(error)));
        }
    }
}

impl State {
    fn remove(&mut self, id: u64) -> Option<Pending> {
        let pending = self.pending.remove(&id)?;
        self.bytes -= pending.bytes;
        Some(pending)
    }
}

pub(crate) fn describe_status(status: &tonic::Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    if let Some(source) = status.source() {
        text.push_str(": ");
        text.push_str(&chain(source));
    }
    text
}

/// An error with its causes: transport errors say little at their outside.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
