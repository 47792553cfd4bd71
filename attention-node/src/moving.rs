//! Pages on their way into the cache and out of it.
//!
//! Secret: when a page may be touched. Only the engine's thread reads and writes the cache, between two
//! steps and a bounded number of bytes at a time, so that streams that run here feel little of what is
//! moved. What goes out is not held for whoever wants it: a page that has been reclaimed before it was
//! read ends the row, and who wanted it computes it. What comes in is written to pages that its request
//! holds. This module must not know where pages come from and where they go.

use std::sync::Arc;

use guild_model::cache::{Format, LatentCache};
use guild_scheduler::batch::{Arrival, Scheduler};
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{Notify, mpsc};

/// Bytes that are moved between two steps; one page at least.
const BYTES_A_TURN: usize = 16 << 20;
/// Bytes of one prompt that wait to be written or sent; two pages at least.
const BYTES_READY: usize = 8 << 20;

/// A page's place in its prompt, and its bytes.
pub(crate) type Page = (usize, Vec<u8>);

/// How pages lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageForm {
    pub(crate) format: Format,
    pub(crate) page_tokens: usize,
    /// Of the main model.
    pub(crate) layers: usize,
    /// Whether there is one more, of a draft module.
    pub(crate) drafts: bool,
    layer_bytes: usize,
}

impl PageForm {
    /// Of a cache whose last layer is a draft module's if `drafts`.
    pub(crate) fn of(cache: &LatentCache, drafts: bool) -> PageForm {
        PageForm {
            format: cache.format(),
            page_tokens: cache.page_tokens(),
            layers: cache.layers() - usize::from(drafts),
            drafts,
            layer_bytes: cache.page_stride() / cache.layers().max(1),
        }
    }

    /// Bytes of a page, with those of the draft module's layer or without.
    pub(crate) fn bytes(&self, drafts: bool) -> usize {
        (self.layers + usize::from(drafts)) * self.layer_bytes
    }

    /// Room for pages that wait.
    fn ready(&self) -> usize {
        (BYTES_READY / self.bytes(self.drafts).max(1)).max(2)
    }
}

/// A request whose pages come from elsewhere, as seen by who brings them. When it is dropped, what is
/// missing is computed.
#[derive(Debug)]
pub(crate) struct Arriving {
    pub(crate) form: PageForm,
    /// Whether pages have the draft module's layer.
    pub(crate) drafts: bool,
    /// Names of all pages that it can use.
    pub(crate) keys: Vec<u128>,
    /// Pages that the cache had when it was handed in.
    pub(crate) known: usize,
    pages: Option<mpsc::Sender<Page>>,
    wake: Arc<Notify>,
}

impl Arriving {
    /// Hands over one page; they come in order. False: no more are wanted.
    pub(crate) async fn bring(&self, page: Page) -> bool {
        let Some(pages) = &self.pages else {
            return false;
        };
        let taken = pages.send(page).await.is_ok();
        self.wake.notify_one();
        taken
    }

    /// Completes when no more pages are wanted.
    pub(crate) async fn over(&self) {
        if let Some(pages) = &self.pages {
            pages.closed().await;
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.pages = None;
        self.wake.notify_one();
    }
}

/// The pages of a prompt that is run for somebody else, in their order, until they end.
#[derive(Debug)]
pub(crate) struct Leaving {
    /// Names of all full pages.
    pub(crate) keys: Vec<u128>,
    pages: mpsc::Receiver<Page>,
    wake: Arc<Notify>,
}

impl Leaving {
    /// The next page; None: there will be no more.
    pub(crate) async fn next(&mut self) -> Option<Page> {
        let page = self.pages.recv().await;
        // There is room for one more.
        self.wake.notify_one();
        page
    }
}

#[derive(Debug)]
struct In {
    id: u64,
    pages: mpsc::Receiver<Page>,
}

#[derive(Debug)]
struct Out {
    id: u64,
    keys: Vec<u128>,
    next: usize,
    bytes: usize,
    pages: mpsc::Sender<Page>,
}

/// All pages that are to be moved; those of one prompt after those of another in turn.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    coming: Vec<In>,
    going: Vec<Out>,
}

/// What is to be done to the cache before the next step.
#[derive(Debug, Default)]
pub(crate) struct Due {
    writes: Vec<(u32, Vec<u8>)>,
    reads: Vec<(u32, usize, usize, mpsc::OwnedPermit<Page>)>,
    /// A request waits no more.
    released: bool,
}

impl Due {
    /// Does it. False: there was nothing to do.
    pub(crate) fn settle(self, cache: &mut LatentCache) -> bool {
        let moved = self.released || !self.writes.is_empty() || !self.reads.is_empty();
        for (page, bytes) in self.writes {
            let to = cache.page_mut(page);
            let len = bytes.len().min(to.len());
            to[..len].copy_from_slice(&bytes[..len]);
        }
        for (page, bytes, index, permit) in self.reads {
            permit.send((index, cache.page(page)[..bytes].to_vec()));
        }
        moved
    }
}

impl Moves {
    /// The request `id` has been handed in and waits for the pages of these names, of which `known`
    /// are here.
    pub(crate) fn expect(
        &mut self,
        id: u64,
        form: PageForm,
        drafts: bool,
        (keys, known): (Vec<u128>, usize),
        wake: &Arc<Notify>,
    ) -> Arriving {
        let (sender, pages) = mpsc::channel(form.ready());
        self.coming.push(In { id, pages });
        Arriving {
            form,
            drafts,
            keys,
            known,
            pages: Some(sender),
            wake: Arc::clone(wake),
        }
    }

    /// Pages of these names from `first` on are wanted elsewhere as the request `id` makes them.
    pub(crate) fn give(
        &mut self,
        id: u64,
        form: PageForm,
        drafts: bool,
        (keys, first): (Vec<u128>, usize),
        wake: &Arc<Notify>,
    ) -> Leaving {
        let (sender, pages) = mpsc::channel(form.ready());
        self.going.push(Out {
            id,
            keys: keys.clone(),
            next: first,
            bytes: form.bytes(drafts),
            pages: sender,
        });
        Leaving {
            keys,
            pages,
            wake: Arc::clone(wake),
        }
    }

    /// Nobody moves any more.
    pub(crate) fn end(&mut self) {
        *self = Moves::default();
    }

    /// What is to be done now; `form` is that of the cache.
    pub(crate) fn due(&mut self, scheduler: &mut Scheduler, form: &PageForm) -> Due {
        let mut left = (BYTES_A_TURN / form.bytes(form.drafts).max(1)).max(1);
        let mut due = Due::default();
        self.coming
            .retain_mut(|coming| coming.take(scheduler, &mut left, &mut due));
        self.going
            .retain_mut(|going| going.give(scheduler, &mut left, &mut due));
        // Whoever came last this time is first the next.
        if let Some(last) = self.coming.pop() {
            self.coming.insert(0, last);
        }
        if let Some(last) = self.going.pop() {
            self.going.insert(0, last);
        }
        due
    }
}

impl In {
    /// Takes what has come. False: no more is wanted, or will come.
    fn take(&mut self, scheduler: &mut Scheduler, left: &mut usize, due: &mut Due) -> bool {
        loop {
            let (index, page) = match scheduler.arrival(self.id) {
                Arrival::NotYet if self.pages.is_closed() && self.pages.is_empty() => {
                    return self.give_up(scheduler, due);
                }
                Arrival::NotYet => return true,
                Arrival::Page { index, page } => (index, page),
                Arrival::Over => return false,
            };
            if *left == 0 {
                return true;
            }
            match self.pages.try_recv() {
                Ok((at, bytes)) if at == index => {
                    *left -= 1;
                    due.writes.push((page, bytes));
                    scheduler.arrived(self.id);
                }
                // It was found here meanwhile.
                Ok((at, _)) if at < index => {}
                Err(TryRecvError::Empty) => return true,
                // One is missing, or the rest is.
                Ok(_) | Err(TryRecvError::Disconnected) => return self.give_up(scheduler, due),
            }
        }
    }

    fn give_up(&mut self, scheduler: &mut Scheduler, due: &mut Due) -> bool {
        scheduler.await_no_more(self.id);
        due.released = true;
        false
    }
}

impl Out {
    /// Gives what is there. False: no more will be, or is wanted.
    fn give(&mut self, scheduler: &Scheduler, left: &mut usize, due: &mut Due) -> bool {
        while let Some(&key) = self.keys.get(self.next) {
            let Some(page) = scheduler.page_of(key) else {
                return scheduler.contains(self.id) && !self.pages.is_closed();
            };
            if *left == 0 {
                return true;
            }
            match self.pages.clone().try_reserve_owned() {
                Ok(permit) => {
                    *left -= 1;
                    due.reads.push((page, self.bytes, self.next, permit));
                    self.next += 1;
                }
                Err(TrySendError::Full(_)) => return true,
                Err(TrySendError::Closed(_)) => return false,
            }
        }
        false
    }
}
