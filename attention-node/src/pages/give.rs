//! The node that runs a prompt for another: its pages as messages.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, stream};
use guild_proto::pages::v1::{PageForm, PageFrame};
use tokio::time::sleep;
use tonic::Status;

use super::{PIECE_BYTES, digest};
use crate::desk::EngineHandle;
use crate::moving::{Leaving, Page};
use crate::sequence::{Event, Events, Failure};

/// How often it is looked whether rows have been run, while no page is ready.
const BEAT: Duration = Duration::from_millis(250);

/// A page of which a part is still to be sent.
struct Open {
    index: usize,
    bytes: Bytes,
    sent: usize,
    digest: [u8; 32],
}

struct Giving {
    form: PageForm,
    engine: EngineHandle,
    /// Rows that the engine had run when it was last looked at.
    run: u64,
    leaving: Leaving,
    /// Dropped with the stream, which cancels the request.
    events: Events,
    open: Option<Open>,
}

/// The pages of a request that was handed in to `engine` for them, until the last one, or until there are no more.
/// While none is ready, frames without data say that the engine runs.
/// `why` says what becomes of a request that has failed.
pub(crate) fn give(
    form: PageForm,
    engine: EngineHandle,
    leaving: Leaving,
    events: Events,
    why: fn(&Failure) -> Status,
) -> impl Stream<Item = Result<PageFrame, Status>> + Send {
    let giving = Giving {
        form,
        run: engine.counts().run,
        engine,
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
            None => match self.page().await? {
                Some(page) => self.open(page),
                None => return Some(PageFrame::default()),
            },
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

    /// The next page, or None where the engine has run rows before one was ready. Outer None: there are no more.
    async fn page(&mut self) -> Option<Option<Page>> {
        loop {
            tokio::select! {
                biased;
                page = self.leaving.next() => return page.map(Some),
                () = sleep(BEAT) => {
                    let run = self.engine.counts().run;
                    if std::mem::replace(&mut self.run, run) != run {
                        return Some(None);
                    }
                }
            }
        }
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
