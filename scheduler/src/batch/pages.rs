//! KV pages: who holds them, and what those that nobody holds still remember.
//!
//! Secret: the life of a page. It is free, held by one or more requests, or cached: held by nobody but
//! known by the key of its contents, until it is reclaimed, the longest unused first. A key is opaque:
//! whoever makes keys sees to it that equal keys mean equal contents. A page that was published is
//! never written again while it has its key.

use std::collections::{BTreeMap, HashMap};

/// All pages of one engine.
#[derive(Debug)]
pub(super) struct Pages {
    /// Holders of each page.
    holders: Vec<u32>,
    /// The key under which a page was published.
    keys: Vec<Option<u128>>,
    by_key: HashMap<u128, u32>,
    /// Neither held nor known; popped from the end.
    free: Vec<u32>,
    /// Cached pages in the order in which they were let go of.
    idle: BTreeMap<u64, u32>,
    /// When an idle page was let go of.
    idle_since: Vec<u64>,
    clock: u64,
}

impl Pages {
    /// So many free pages; low numbers are handed out first.
    pub(super) fn new(pages: usize) -> Pages {
        Pages {
            holders: vec![0; pages],
            keys: vec![None; pages],
            by_key: HashMap::new(),
            free: (0..pages as u32).rev().collect(),
            idle: BTreeMap::new(),
            idle_since: vec![0; pages],
            clock: 0,
        }
    }

    /// Pages that nobody holds: free ones and cached ones.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages that nobody holds and whose contents are known.
    pub(super) fn cached(&self) -> usize {
        self.idle.len()
    }

    /// A page to write to, held once: a free one, else the one that was cached without use for longest.
    pub(super) fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                if let Some(key) = self.keys[page as usize].take() {
                    self.by_key.remove(&key);
                }
                page
            }
        };
        self.holders[page as usize] = 1;
        Some(page)
    }

    /// One more holder for the page with these contents, if there is one.
    pub(super) fn share(&mut self, key: u128) -> Option<u32> {
        let page = *self.by_key.get(&key)?;
        let holders = &mut self.holders[page as usize];
        if *holders == 0 {
            self.idle.remove(&self.idle_since[page as usize]);
        }
        *holders += 1;
        Some(page)
    }

    /// The page with these contents, whoever holds it.
    pub(super) fn find(&self, key: u128) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Lets others share a page, which is full and will not be written again. Where another page
    /// has the same contents already, that one stays the one to share.
    pub(super) fn publish(&mut self, page: u32, key: u128) {
        let known = &mut self.keys[page as usize];
        if known.is_none() && !self.by_key.contains_key(&key) {
            *known = Some(key);
            self.by_key.insert(key, page);
        }
    }

    /// One holder less for each page of a table. The last pages are the first to be reclaimed: without
    /// those before them they are of no use.
    pub(super) fn release(&mut self, table: &[u32]) {
        for &page in table.iter().rev() {
            let at = page as usize;
            self.holders[at] -= 1;
            if self.holders[at] > 0 {
                continue;
            }
            match self.keys[at] {
                None => self.free.push(page),
                Some(_) => {
                    self.clock += 1;
                    self.idle_since[at] = self.clock;
                    self.idle.insert(self.clock, page);
                }
            }
        }
    }

    /// Whether a page may be written by its one holder.
    pub(super) fn is_private(&self, page: u32) -> bool {
        self.holders[page as usize] == 1 && self.keys[page as usize].is_none()
    }

    /// Forgets all contents that nobody holds.
    pub(super) fn forget(&mut self) {
        while let Some((_, page)) = self.idle.pop_last() {
            if let Some(key) = self.keys[page as usize].take() {
                self.by_key.remove(&key);
            }
            self.free.push(page);
        }
    }

    /// Checks the books against the tables of all requests.
    ///
    /// # Errors
    /// The first page whose entry is wrong, and how.
    pub(super) fn audit<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut held = vec![0u32; self.holders.len()];
        for &page in tables.flatten() {
            match held.get_mut(page as usize) {
                Some(count) => *count += 1,
                None => return Err(format!("page {page} does not exist")),
            }
        }
        let mut unheld = vec![0u32; self.holders.len()];
        for &page in self.free.iter().chain(self.idle.values()) {
            unheld[page as usize] += 1;
        }
        for (page, &count) in held.iter().enumerate() {
            if self.holders[page] != count {
                let counted = self.holders[page];
                return Err(format!("page {page}: {count} holders, {counted} counted"));
            }
            if unheld[page] != u32::from(count == 0) {
                let times = unheld[page];
                return Err(format!(
                    "page {page}: {count} holders, listed as unheld {times} times"
                ));
            }
        }
        if let Some(page) = self
            .free
            .iter()
            .find(|&&page| self.keys[page as usize].is_some())
        {
            return Err(format!("page {page} is free and has a key"));
        }
        for (key, &page) in &self.by_key {
            if self.keys[page as usize] != Some(*key) {
                return Err(format!("page {page} does not have the key it is found by"));
            }
        }
        let known = self.keys.iter().flatten().count();
        if known != self.by_key.len() {
            return Err(format!(
                "{known} pages have keys, {} are found",
                self.by_key.len()
            ));
        }
        Ok(())
    }
}
