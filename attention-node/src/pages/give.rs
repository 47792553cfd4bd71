//! The node that runs a prompt for another: its pages as messages.

use bytes::Bytes;
use futures::{Stream, stream};
use guild_proto::pages::v1::{PageForm, PageFrame};
use tonic::Status;

use super::{PIECE_BYTES, digest};
use crate::moving::{Leaving, Page};
use crate::sequence::{Event, Events, Failure};

/// A page of which a part is still to be sent.
struct Open {
    index: usize,
    bytes: Bytes,
    sent: usize,
    digest: [u8; 32],
}

struct Giving {
    form: PageForm,
    leaving: Leaving,
    /// Dropped with the stream, which cancels the request.
    events: Events,
    open: Option<Open>,
}

/// The pages of a request that was handed in for them, until the last one, or until there are no more.
/// `why` says what becomes of a request that has failed.
pub(crate) fn give(
    form: PageForm,
    leaving: Leaving,
    events: Events,
    why: fn(&Failure) -> Status,
) -> impl Stream<Item = Result<PageFrame, Status>> + Send {
    let giving = Giving {
        form,
        leaving,
        events,
        open: None,
    };
    stream::unfold(Some(giving), move |giving| async move {
        let mut giving = giving?;
        match giving.next().await {
            Some(frame) => Some((Ok(frame), Some(giving))),
            None => {
                let failure = giving.failure()?;
                Some((Err(why(&failure)), None))
            }
        }
    })
}

impl Giving {
    async fn next(&mut self) -> Option<PageFrame> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => {
                let page = self.leaving.next().await?;
                self.open(page)
            }
        };
        let end = (open.sent + PIECE_BYTES).min(open.bytes.len());
        let last = end == open.bytes.len();
        let frame = PageFrame {
            page: open.index as u32,
            offset: open.sent as u32,
            data: open.bytes.slice(open.sent..end),
            digest: match last {
                true => Bytes::copy_from_slice(&open.digest),
                false => Bytes::new(),
            },
        };
        open.sent = end;
        self.open = (!last).then_some(open);
        Some(frame)
    }

    fn open(&self, (index, bytes): Page) -> Open {
        let key = self.leaving.keys.get(index).copied().unwrap_or_default();
        Open {
            index,
            digest: digest(&self.form, key, &bytes),
            bytes: bytes.into(),
            sent: 0,
        }
    }

    /// Why there are no more pages, if the request has failed.
    fn failure(&mut self) -> Option<Failure> {
        while let Some(event) = self.events.try_recv() {
            if let Event::Failed(failure) = event {
                return Some(failure);
            }
        }
        None
    }
}
