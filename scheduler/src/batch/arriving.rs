//! Prompts whose pages come from elsewhere.
//!
//! Secret: what a request that waits for pages may and may not have. It is admitted like any other and
//! holds pages for all its tokens, but gets no rows until the last page has come that others can have,
//! or until it is told to wait no more: then it is computed from where the pages end. Pages come in
//! the order of the prompt. One that is preempted waits no more.

use super::Scheduler;
use super::request::Live;

/// What a request that waits for pages needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It waits for admission and has no pages yet.
    NotYet,
    /// The contents of one more page.
    Page {
        /// Its place in the prompt.
        index: usize,
        /// The page to write them to.
        page: u32,
    },
    /// Nothing: it has all, waits no more, or is gone.
    Over,
}

impl Scheduler {
    /// What the request needs next.
    pub fn arrival(&self, id: u64) -> Arrival {
        if let Some(live) = self.waiting.iter().find(|live| live.request.id == id) {
            return match live.expects {
                true => Arrival::NotYet,
                false => Arrival::Over,
            };
        }
        let live = self.running.iter().find(|live| live.request.id == id);
        let next = live.filter(|live| live.expects && !live.leaves);
        let next = next.and_then(|live| live.next_page(self.limits.page_tokens));
        next.map_or(Arrival::Over, |(index, page)| Arrival::Page { index, page })
    }

    /// The page that [`Scheduler::arrival`] has named is written, or will be before the next step
    /// runs. With the last one the request goes on.
    pub fn arrived(&mut self, id: u64) {
        let page_tokens = self.limits.page_tokens;
        let Some(live) = self.running.iter_mut().find(|live| live.request.id == id) else {
            return;
        };
        if live.expects && live.next_page(page_tokens).is_some() {
            live.computed += page_tokens;
            if self.limits.prefix_cache {
                live.publish(&self.limits, &mut self.pages);
            }
            live.expects = live.next_page(page_tokens).is_some();
        }
    }

    /// The request is not to wait for pages any longer.
    pub fn await_no_more(&mut self, id: u64) {
        let mut all = self.running.iter_mut().chain(&mut self.waiting);
        if let Some(live) = all.find(|live| live.request.id == id) {
            live.expects = false;
        }
    }

    /// The page that has the contents of this name, if there is one. It may be read until the next
    /// step is asked for.
    pub fn page_of(&self, key: u128) -> Option<u32> {
        self.pages.find(key)
    }
}

impl Live {
    /// Place and number of the first page that is not computed and that others can have.
    fn next_page(&self, page_tokens: usize) -> Option<(usize, u32)> {
        let index = self.computed / page_tokens;
        let whole = index < (self.known() - 1) / page_tokens;
        let page = self.pages.get(index).filter(|_| whole)?;
        Some((index, *page))
    }
}
