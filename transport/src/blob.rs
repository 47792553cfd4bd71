//! What a slot holds, from node to node: how a blob is cut up, checked and put together again.
//!
//! Secret: how a blob travels without being in the way. It has a connection of its own with a
//! small window, so that few of its bytes wait anywhere, and the giving end lets rows that are in
//! work go first. Both ends give up on silence: a peer that stands still holds nobody up. This
//! module must not know what is in a blob, nor where it is put.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use bytes::Bytes;
use guild_proto::experts::v1::BlobChunk;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use crate::{ExchangeCode, ExchangeError, SlotHost};

/// Bytes of a blob in one message. What it takes to send and to check one is the longest that rows
/// on a small node wait behind it.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Messages that are ready and wait for the connection to take them.
pub(crate) const CHUNKS_READY: usize = 2;
/// HTTP/2 window of a stream that a blob comes by: what of it may be on its way.
pub(crate) const WINDOW_BYTES: u32 = 512 << 10;
/// A node that had rows so recently will have more at once.
pub(crate) const BUSY: Duration = Duration::from_millis(20);
/// While a node is busy, the next message waits this long and looks again.
const YIELD: Duration = Duration::from_millis(2);
/// But no longer than so many times: a node that always works gives its blobs away as well, each
/// at some 25 MB a second.
const YIELDS: u32 = 5;
/// Bytes of a digest: BLAKE3.
pub const DIGEST_BYTES: usize = 32;

/// What a slot holds.
#[derive(Debug, Clone)]
pub struct SlotBlob {
    /// As it lies in memory; shared, not copied.
    pub bytes: Bytes,
    /// BLAKE3 of `bytes`.
    pub digest: [u8; DIGEST_BYTES],
}

/// Asks a host. Blocks.
pub(crate) fn ask(
    node: &str,
    host: &dyn SlotHost,
    epoch: u64,
    slot: u32,
) -> Result<SlotBlob, ExchangeError> {
    catch_unwind(AssertUnwindSafe(|| host.blob(epoch, slot))).map_err(|_| {
        let message = format!("{}: the node panicked; its log says where", at(epoch, slot));
        ExchangeError::new(ExchangeCode::Internal, node, message)
    })?
}

pub(crate) fn at(epoch: u64, slot: u32) -> String {
    format!("epoch {epoch}, slot {slot}")
}

/// Gives a blob away, piece by piece, until it is through, nobody wants it any more, the peer
/// has taken nothing for `stall`, or the node closes.
pub(crate) async fn give(
    blob: SlotBlob,
    to: mpsc::Sender<Result<BlobChunk, Status>>,
    busy: impl Fn() -> bool,
    stall: Duration,
    closing: CancellationToken,
    _place: OwnedSemaphorePermit,
) {
    let total = blob.bytes.len();
    for offset in (0..total).step_by(CHUNK_BYTES) {
        for _ in 0..YIELDS {
            if !busy() {
                break;
            }
            tokio::time::sleep(YIELD).await;
        }
        let chunk = BlobChunk {
            total: total as u64,
            offset: offset as u64,
            data: blob.bytes.slice(offset..total.min(offset + CHUNK_BYTES)),
            digest: match offset {
                0 => Bytes::copy_from_slice(&blob.digest),
                _ => Bytes::new(),
            },
            ..BlobChunk::default()
        }
        .sealed();
        tokio::select! {
            sent = tokio::time::timeout(stall, to.send(Ok(chunk))) => match sent {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    tracing::info!(offset, total, ?stall, "nobody takes the blob: gave it up");
                    return;
                }
            },
            () = closing.cancelled() => {
                // The peer asks another node.
                let _ = to.try_send(Err(Status::unavailable("the node is going away")));
                return;
            }
        }
    }
}

/// A refusal as it travels beside a stream of chunks.
pub(crate) fn to_status(error: &ExchangeError) -> Status {
    let code = match error.code {
        ExchangeCode::UnknownEpoch => Code::NotFound,
        ExchangeCode::UnknownSlot => Code::OutOfRange,
        ExchangeCode::Overloaded => Code::ResourceExhausted,
        ExchangeCode::Deadline => Code::DeadlineExceeded,
        ExchangeCode::Checksum => Code::DataLoss,
        ExchangeCode::Malformed | ExchangeCode::TooLarge => Code::InvalidArgument,
        ExchangeCode::Draining | ExchangeCode::Unreachable | ExchangeCode::UnknownNode => {
            Code::Unavailable
        }
        ExchangeCode::Internal => Code::Internal,
    };
    Status::new(code, error.message.as_str())
}

fn from_status(status: &Status) -> ExchangeCode {
    match status.code() {
        Code::NotFound => ExchangeCode::UnknownEpoch,
        Code::OutOfRange => ExchangeCode::UnknownSlot,
        Code::ResourceExhausted => ExchangeCode::Overloaded,
        Code::DeadlineExceeded => ExchangeCode::Deadline,
        Code::DataLoss => ExchangeCode::Checksum,
        Code::InvalidArgument => ExchangeCode::Malformed,
        Code::Internal | Code::Unimplemented => ExchangeCode::Internal,
        _ => ExchangeCode::Unreachable,
    }
}

/// What is wanted, and until when.
#[derive(Debug, Clone, Copy)]
pub struct FetchRequest {
    /// The placement that the slot belongs to.
    pub epoch: u64,
    /// The slot, by the numbering of its node at that epoch.
    pub slot: u32,
    /// Bytes that the blob must have.
    pub len: usize,
    /// It is of no use after this.
    pub deadline: Option<Instant>,
}

/// A blob that is coming, in pieces of at most [`CHUNK_BYTES`], in order and without gaps.
/// Dropping it ends the transfer.
#[derive(Debug)]
pub struct Fetch {
    peer: String,
    wanted: FetchRequest,
    stall: Duration,
    /// Bytes that have been given out.
    done: usize,
    digest: [u8; DIGEST_BYTES],
    source: Source,
}

#[derive(Debug)]
enum Source {
    Here(Bytes),
    Away {
        chunks: Box<Streaming<BlobChunk>>,
        /// The first one, which came with the digest.
        first: Option<Bytes>,
    },
}

impl Fetch {
    /// From a node of this process.
    pub(crate) fn here(
        peer: &str,
        wanted: FetchRequest,
        blob: SlotBlob,
    ) -> Result<Fetch, ExchangeError> {
        let fetch = Fetch {
            peer: peer.to_owned(),
            wanted,
            stall: Duration::MAX,
            done: 0,
            digest: blob.digest,
            source: Source::Here(blob.bytes.clone()),
        };
        fetch.check_total(blob.bytes.len() as u64)?;
        Ok(fetch)
    }

    /// From a stream: waits for the first piece, which says how much there is.
    pub(crate) async fn away(
        peer: &str,
        wanted: FetchRequest,
        stall: Duration,
        chunks: Streaming<BlobChunk>,
    ) -> Result<Fetch, ExchangeError> {
        let mut fetch = Fetch {
            peer: peer.to_owned(),
            wanted,
            stall,
            done: 0,
            digest: [0; DIGEST_BYTES],
            source: Source::Away {
                chunks: Box::new(chunks),
                first: None,
            },
        };
        let Some(chunk) = fetch.receive().await? else {
            return Err(fetch.error(ExchangeCode::Malformed, "ended before it began"));
        };
        fetch.digest = chunk.digest.as_ref().try_into().map_err(|_| {
            let found = chunk.digest.len();
            let message = format!("a digest of {found} bytes instead of {DIGEST_BYTES}");
            fetch.error(ExchangeCode::Malformed, message)
        })?;
        let data = fetch.check(chunk)?;
        if let Source::Away { first, .. } = &mut fetch.source {
            *first = Some(data);
        }
        Ok(fetch)
    }

    /// BLAKE3 of the whole, as the other end says it. What has come is to be held against it.
    pub fn digest(&self) -> [u8; DIGEST_BYTES] {
        self.digest
    }

    /// The next piece; `None` when the blob is complete.
    ///
    /// # Errors
    /// The peer is lost, silent or late, or what it sends is not the blob that was asked for.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ExchangeError> {
        let data = match &mut self.source {
            Source::Here(bytes) => bytes.split_to(bytes.len().min(CHUNK_BYTES)),
            Source::Away { first, .. } => match first.take() {
                Some(first) => first,
                None => match self.receive().await? {
                    None => Bytes::new(),
                    Some(chunk) => self.check(chunk)?,
                },
            },
        };
        self.done += data.len();
        if data.is_empty() && self.done < self.wanted.len {
            return Err(self.error(ExchangeCode::Unreachable, "ended before it was complete"));
        }
        Ok((!data.is_empty()).then_some(data))
    }

    async fn receive(&mut self) -> Result<Option<BlobChunk>, ExchangeError> {
        let until = Instant::now().checked_add(self.stall);
        let until = match (until, self.wanted.deadline) {
            (Some(stall), Some(deadline)) => Some(stall.min(deadline)),
            (stall, deadline) => stall.or(deadline),
        };
        let Source::Away { chunks, .. } = &mut self.source else {
            return Ok(None);
        };
        let received = match until {
            None => Ok(chunks.message().await),
            Some(until) => tokio::time::timeout_at(until.into(), chunks.message()).await,
        };
        match received {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(status)) => Err(refused(&self.peer, &self.wanted, &status)),
            Err(_) => {
                let deadline = self.wanted.deadline;
                let what = match deadline.is_some_and(|at| Instant::now() >= at) {
                    true => "not complete in time".to_owned(),
                    false => format!("silent for {:?}", self.stall),
                };
                Err(self.error(ExchangeCode::Deadline, what))
            }
        }
    }

    fn check_total(&self, total: u64) -> Result<(), ExchangeError> {
        if total == self.wanted.len as u64 {
            return Ok(());
        }
        let message = format!("it has {total} bytes instead of {}", self.wanted.len);
        Err(self.error(ExchangeCode::Malformed, message))
    }

    fn check(&self, chunk: BlobChunk) -> Result<Bytes, ExchangeError> {
        let computed = chunk.checksum();
        if chunk.crc != computed {
            let (stated, offset) = (chunk.crc, chunk.offset);
            let message = format!(
                "the piece at byte {offset} says crc {stated:#010x}, its bytes give {computed:#010x}"
            );
            return Err(self.error(ExchangeCode::Checksum, message));
        }
        self.check_total(chunk.total)?;
        if chunk.offset != self.done as u64 {
            let message = format!("byte {} came instead of {}", chunk.offset, self.done);
            return Err(self.error(ExchangeCode::Malformed, message));
        }
        let left = self.wanted.len - self.done;
        let found = chunk.data.len();
        if found == 0 || found > left.min(CHUNK_BYTES) {
            let message = format!("a piece of {found} bytes came where {left} are left");
            return Err(self.error(ExchangeCode::Malformed, message));
        }
        Ok(chunk.data)
    }

    fn error(&self, code: ExchangeCode, what: impl std::fmt::Display) -> ExchangeError {
        error(&self.peer, &self.wanted, code, what)
    }
}

pub(crate) fn error(
    peer: &str,
    wanted: &FetchRequest,
    code: ExchangeCode,
    what: impl std::fmt::Display,
) -> ExchangeError {
    let place = at(wanted.epoch, wanted.slot);
    ExchangeError::new(code, peer, format!("blob of {place}: {what}"))
}

pub(crate) fn refused(peer: &str, wanted: &FetchRequest, status: &Status) -> ExchangeError {
    let what = crate::grpc::describe_status(status);
    error(peer, wanted, from_status(status), what)
}
