//! The far end of the gRPC leaf: `guild.experts.v1` in front of a [`SlotHost`].
//!
//! A stream goes on whatever its frames are: a frame that is corrupt, malformed,
//! late or one too many gets a fault by its id. Checking, computing and sealing
//! run on blocking threads; answers go out in the order they are ready.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use guild_proto::{
    experts::v1::{
        BlobChunk, CombineFrame, DispatchFrame, FetchRequest, RowFormat,
        experts_server::{Experts, ExpertsServer},
    },
    frame::Dispatch,
    limits::{F32_BYTES, MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    ExchangeCode, ExchangeError, SlotHost, Work, blob, local, new_source, rows, rows::Rows,
};

/// Limits of the serving end.
#[derive(Debug, Clone)]
pub struct ServiceLimits {
    /// Streams at a time: pairs that this node is part of.
    pub max_streams: usize,
    /// Frames without an answer on one stream; one more gets an overload fault.
    pub max_frames: usize,
    /// Bytes of rows, in and out, of all frames without an answer; a frame
    /// beyond them gets an overload fault, unless it is the only one.
    pub max_bytes: usize,
    /// Frames given to the host at a time, a thread each; others wait their turn.
    /// What the host has at once it can compute together.
    pub max_executing: usize,
    /// Blobs given away at a time; one more is refused as overloaded.
    pub max_fetches: usize,
    /// A blob is given up when its peer has taken nothing of it for this long.
    pub fetch_stall: Duration,
}

impl Default for ServiceLimits {
    fn default() -> Self {
        Self {
            max_streams: 256,
            // Twice what a link sends: an answer may reach the peer before its
            // place here is free again.
            max_frames: 128,
            max_bytes: 2 << 30,
            max_executing: 32,
            max_fetches: 8,
            fetch_stall: Duration::from_secs(10),
        }
    }
}

/// `guild.experts.v1.Experts` in front of `host`, with the message limits of the
/// wire. `node` names the origin of faults. When `closing` is cancelled, frames
/// get a draining fault and every stream ends once its open frames are answered.
pub fn service(
    node: impl Into<String>,
    host: Arc<dyn SlotHost>,
    limits: ServiceLimits,
    closing: CancellationToken,
) -> ExpertsServer<impl Experts> {
    let exchange = Exchange(Arc::new(Inner {
        node: node.into(),
        host,
        streams: Arc::new(Semaphore::new(limits.max_streams)),
        executing: Arc::new(Semaphore::new(limits.max_executing.max(1))),
        bytes: Arc::new(Semaphore::new(limits.max_bytes / BYTES_PERMIT)),
        fetches: Arc::new(Semaphore::new(limits.max_fetches)),
        last_rows: Mutex::new(None),
        limits,
        closing,
    }));
    ExpertsServer::new(exchange)
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES)
}

/// Bytes that one permit of the byte budget stands for.
const BYTES_PERMIT: usize = 1 << 10;

struct Exchange(Arc<Inner>);

struct Inner {
    node: String,
    host: Arc<dyn SlotHost>,
    limits: ServiceLimits,
    streams: Arc<Semaphore>,
    executing: Arc<Semaphore>,
    /// In units of [`BYTES_PERMIT`].
    bytes: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
    /// When rows were last given to the host.
    last_rows: Mutex<Option<Instant>>,
    closing: CancellationToken,
}

#[tonic::async_trait]
impl Experts for Exchange {
    async fn exchange(
        &self,
        request: Request<Streaming<DispatchFrame>>,
    ) -> Result<Response<BoxStream<CombineFrame>>, Status> {
        let inner = Arc::clone(&self.0);
        if inner.closing.is_cancelled() {
            return Err(Status::unavailable(format!("{} is draining", inner.node)));
        }
        let permit = Arc::clone(&inner.streams)
            .try_acquire_owned()
            .map_err(|_| {
                Status::resource_exhausted(format!(
                    "{} has {} exchange streams, its limit",
                    inner.node, inner.limits.max_streams
                ))
            })?;
        let (answers, outgoing) = mpsc::channel(inner.limits.max_frames.max(1));
        tokio::spawn(inner.serve(request.into_inner(), answers, permit));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<BoxStream<BlobChunk>>, Status> {
        let FetchRequest { epoch, slot } = request.into_inner();
        let inner = Arc::clone(&self.0);
        if inner.closing.is_cancelled() {
            return Err(Status::unavailable(format!("{} is draining", inner.node)));
        }
        let place = Arc::clone(&inner.fetches)
            .try_acquire_owned()
            .map_err(|_| {
                Status::resource_exhausted(format!(
                    "{} gives away {} blobs already, its limit",
                    inner.node, inner.limits.max_fetches
                ))
            })?;
        let asked = {
            let inner = Arc::clone(&inner);
            // A first call may compute the digest of the whole.
            tokio::task::spawn_blocking(move || {
                blob::ask(&inner.node, inner.host.as_ref(), epoch, slot)
            })
        };
        let blob = asked
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| blob::to_status(&error))?;
        let (chunks, outgoing) = mpsc::channel(blob::CHUNKS_READY);
        let (stall, closing) = (inner.limits.fetch_stall, inner.closing.clone());
        let busy = move || inner.is_busy();
        tokio::spawn(blob::give(blob, chunks, busy, stall, closing, place));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

type Answers = mpsc::Sender<Result<CombineFrame, Status>>;

impl Inner {
    /// The life of one stream.
    async fn serve(
        self: Arc<Self>,
        mut frames: Streaming<DispatchFrame>,
        answers: Answers,
        _permit: OwnedSemaphorePermit,
    ) {
        let mut open = JoinSet::new();
        let source = new_source();
        loop {
            let closing = self.closing.is_cancelled();
            if closing && open.is_empty() {
                break;
            }
            tokio::select! {
                // Finished frames first, so that their places count as free.
                biased;
                Some(_) = open.join_next() => {}
                () = self.closing.cancelled(), if !closing => {}
                frame = frames.message() => match frame {
                    Ok(Some(frame)) => match self.admit(&frame, open.len(), closing) {
                        Ok(bytes) => {
                            let answer = Arc::clone(&self).answer(frame, source, answers.clone(), bytes);
                            open.spawn(answer);
                        }
                        Err(error) => {
                            // With the channel full the peer is not reading its
                            // answers, and this stream need not read its frames.
                            if answers.send(Ok(refusal(&frame, &error))).await.is_err() {
                                break;
                            }
                        }
                    },
                    Ok(None) => break,
                    Err(status) => {
                        tracing::debug!(%status, "exchange stream ended");
                        break;
                    }
                },
            }
        }
        while open.join_next().await.is_some() {}
    }

    fn last_rows(&self) -> MutexGuard<'_, Option<Instant>> {
        self.last_rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether rows are in work, or were a moment ago.
    fn is_busy(&self) -> bool {
        let working = self.executing.available_permits() < self.limits.max_executing;
        working || self.last_rows().is_some_and(|at| at.elapsed() < blob::BUSY)
    }

    fn error(&self, code: ExchangeCode, message: impl Into<String>) -> ExchangeError {
        ExchangeError::new(code, self.node.as_str(), message)
    }

    /// A place for a frame, or why there is none.
    fn admit(
        &self,
        frame: &DispatchFrame,
        open: usize,
        closing: bool,
    ) -> Result<OwnedSemaphorePermit, ExchangeError> {
        if closing {
            return Err(self.error(ExchangeCode::Draining, "the node is going away"));
        }
        if open >= self.limits.max_frames {
            return Err(self.error(
                ExchangeCode::Overloaded,
                format!("{open} frames of this stream wait for their answer, its limit"),
            ));
        }
        let pairs: usize = frame.slots.iter().map(|slot| slot.row_index.len()).sum();
        // Not checked yet: an answer beyond the wire's limit will be refused as
        // malformed, and holds no more than that until then.
        let answer = pairs
            .saturating_mul(frame.width as usize)
            .saturating_mul(F32_BYTES)
            .min(MAX_PAYLOAD_BYTES);
        let bytes = frame.rows.len() + answer;
        // A frame larger than the whole budget may still run alone.
        let most = self.limits.max_bytes / BYTES_PERMIT;
        let permits = u32::try_from(bytes.div_ceil(BYTES_PERMIT).min(most)).unwrap_or(u32::MAX);
        Arc::clone(&self.bytes)
            .try_acquire_many_owned(permits)
            .map_err(|_| {
                self.error(
                    ExchangeCode::Overloaded,
                    format!(
                        "{bytes} bytes of rows on top of those in work pass the limit of {}",
                        self.limits.max_bytes
                    ),
                )
            })
    }

    /// Computes one frame and sends its answer.
    async fn answer(
        self: Arc<Self>,
        frame: DispatchFrame,
        source: u64,
        answers: Answers,
        _bytes: OwnedSemaphorePermit,
    ) {
        let (id, epoch) = (frame.id, frame.epoch);
        let deadline = (frame.deadline_ms > 0)
            .then(|| Instant::now() + Duration::from_millis(u64::from(frame.deadline_ms)));
        let computing = Arc::clone(&self).compute(frame, source, deadline);
        let answer = match deadline {
            None => computing.await,
            Some(at) => tokio::time::timeout_at(at.into(), computing)
                .await
                .unwrap_or_else(|_| {
                    Err(self.error(
                        ExchangeCode::Deadline,
                        format!("epoch {epoch}: passed before the rows were computed"),
                    ))
                }),
        };
        let answer = answer.unwrap_or_else(|error| {
            tracing::debug!(%error, id, "dispatch refused");
            CombineFrame::refusal(id, epoch, error.to_fault())
        });
        // A peer that has gone needs no answer.
        let _ = answers.send(Ok(answer)).await;
    }

    async fn compute(
        self: Arc<Self>,
        frame: DispatchFrame,
        source: u64,
        deadline: Option<Instant>,
    ) -> Result<CombineFrame, ExchangeError> {
        let internal = |what: String| self.error(ExchangeCode::Internal, what);
        let turn = Arc::clone(&self.executing)
            .acquire_owned()
            .await
            .map_err(|error| internal(error.to_string()))?;
        *self.last_rows() = Some(Instant::now());
        let inner = Arc::clone(&self);
        tokio::task::spawn_blocking(move || {
            // Given back when the thread is done, not when a deadline passes.
            let _turn = turn;
            inner.run(frame, source, deadline)
        })
        .await
        .map_err(|error| internal(error.to_string()))?
    }

    fn run(
        &self,
        frame: DispatchFrame,
        source: u64,
        deadline: Option<Instant>,
    ) -> Result<CombineFrame, ExchangeError> {
        let epoch = frame.epoch;
        let dispatch = Dispatch::try_from(frame)
            .map_err(|error| self.error(error.code().into(), format!("epoch {epoch}: {error}")))?;
        let (id, width) = (dispatch.id, dispatch.width);
        let work = Work {
            epoch,
            width,
            rows: Rows::from_wire(dispatch.rows),
            slots: dispatch
                .slots
                .into_iter()
                .map(|slot| (slot.slot, slot.row_index))
                .collect(),
            deadline,
            source,
        };
        let rows = local::run(&self.node, self.host.as_ref(), work)?;
        Ok(CombineFrame {
            id,
            epoch,
            format: RowFormat::F32.into(),
            width: width as u32,
            rows: rows::into_wire(rows),
            ..CombineFrame::default()
        }
        .sealed())
    }
}

fn refusal(frame: &DispatchFrame, error: &ExchangeError) -> CombineFrame {
    CombineFrame::refusal(frame.id, frame.epoch, error.to_fault())
}
