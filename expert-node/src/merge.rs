//! Work of several senders, run together: an expert's weights are read once for
//! all the rows that wait for it.
//!
//! Secret: who runs what. The thread of the oldest work leads: it goes through
//! the experts of its own work, as many at a time as take a moment together,
//! takes along the rows that others have here for the experts at hand, and hands
//! the lead to the next oldest when its own rows are done. So nobody's answer
//! waits for experts it did not ask for, and what arrives while some experts run
//! can still join the next ones. Before it starts it
//! may wait a moment for company (`company`). Knows neither slots nor epochs,
//! nor what an expert does with rows: merging is right because a row's result
//! depends on that row alone.

mod company;

use std::{
    borrow::Cow,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use guild_node::metrics::{Histogram, Page, ROWS};
use guild_transport::Rows;

use company::Company;

/// Rows of one product, at most, when others join: with so many, reading the
/// weights is a small part of it, and more would only delay whoever came first.
/// Work that brings more by itself runs as it is.
pub const MERGED_ROWS: usize = 256;

/// Experts run in one call as long as they are expected to take no longer than this
/// together: long beside the work of waking threads, short beside a step, for what
/// arrives meanwhile waits for the call to end.
const CALL: Duration = Duration::from_millis(2);

/// Experts from so many bytes on are merged, unless configured. The weights of
/// smaller ones stay in a core's own cache, and running them takes no longer than
/// handing rows over to another thread.
pub const MERGE_FROM_BYTES: u64 = 1 << 20;

/// Says which experts are merged, and counts products. Clones are the same switch.
#[derive(Clone, Debug)]
pub struct Merging(Arc<Switch>);

#[derive(Debug)]
struct Switch {
    from_bytes: AtomicU64,
    products: AtomicU64,
    rows: AtomicU64,
    /// Of which several senders had rows.
    merged: AtomicU64,
    /// Rows of each call, for several experts together.
    calls: Histogram,
    /// From when an order came until rows of it were run.
    waited: Histogram,
}

/// What was run until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Products {
    /// Times that an expert was run.
    pub products: u64,
    /// Rows it was run on, in all.
    pub rows: u64,
}

impl Default for Merging {
    fn default() -> Self {
        Self(Arc::new(Switch {
            from_bytes: AtomicU64::new(MERGE_FROM_BYTES),
            products: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            merged: AtomicU64::new(0),
            calls: Histogram::new(ROWS),
            waited: Histogram::default(),
        }))
    }
}

impl Merging {
    /// From now on experts of at least so many bytes are merged: 0 for all, `u64::MAX` for none,
    /// which measurements compare with.
    pub fn set_from_bytes(&self, bytes: u64) {
        self.0.from_bytes.store(bytes, Ordering::Relaxed);
    }

    /// What was run until now.
    pub fn products(&self) -> Products {
        Products {
            products: self.0.products.load(Ordering::Relaxed),
            rows: self.0.rows.load(Ordering::Relaxed),
        }
    }

    /// Whether an expert of so many bytes is.
    pub(crate) fn merges(&self, bytes: u64) -> bool {
        bytes >= self.0.from_bytes.load(Ordering::Relaxed)
    }

    /// A call begins that runs each of some experts on so many rows, of so many orders; some of these begin with it,
    /// having waited.
    pub(crate) fn count(
        &self,
        experts: impl Iterator<Item = usize>,
        orders: usize,
        waited: impl IntoIterator<Item = Duration>,
    ) {
        let (mut products, mut rows) = (0, 0);
        for of in experts {
            products += 1;
            rows += of as u64;
        }
        let counts = &*self.0;
        counts.products.fetch_add(products, Ordering::Relaxed);
        counts.rows.fetch_add(rows, Ordering::Relaxed);
        counts
            .merged
            .fetch_add(u64::from(orders > 1), Ordering::Relaxed);
        counts.calls.observe(rows);
        for waited in waited {
            counts.waited.observe(waited);
        }
    }

    /// The same for Prometheus.
    pub(crate) fn write(&self, page: &mut Page) {
        let counts = &*self.0;
        page.counter(
            "guild_expert_rows_total",
            "Rows that experts were run on.",
            &counts.rows,
        );
        page.counter(
            "guild_expert_products_total",
            "Times that an expert was run.",
            &counts.products,
        );
        page.counter(
            "guild_expert_merged_calls_total",
            "Calls with rows of several senders.",
            &counts.merged,
        );
        page.histogram(
            "guild_expert_call_rows",
            "Rows of a call, which runs some experts together.",
            &counts.calls,
        );
        page.histogram(
            "guild_expert_wait_seconds",
            "From the arrival of rows until experts were run on them.",
            &counts.waited,
        );
    }
}

/// What one sender wants done, checked.
pub(crate) struct Order<E> {
    pub(crate) source: u64,
    pub(crate) deadline: Option<Instant>,
    /// `[n, width]`.
    pub(crate) rows: Rows,
    /// Elements in a row.
    pub(crate) width: usize,
    pub(crate) pieces: Vec<Piece<E>>,
}

/// Rows of an order for one expert.
pub(crate) struct Piece<E> {
    pub(crate) expert: Arc<E>,
    /// Indices of input rows, not empty.
    pub(crate) rows: Vec<u32>,
    /// The row of the result where theirs begin.
    pub(crate) at: usize,
}

/// Why an order has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// Its deadline passed before all its rows had been begun.
    Late,
    /// The expert panicked.
    Panicked,
}

/// Brings together the orders of all threads that call [`Merger::run`].
pub(crate) struct Merger<E> {
    state: Mutex<State<E>>,
    /// Where a leader waits for company.
    arrived: Condvar,
    merging: Merging,
    /// What the experts of a call may take together.
    call: Duration,
}

struct State<E> {
    /// Oldest first.
    queue: VecDeque<Entry<E>>,
    leader: Option<u64>,
    next: u64,
    company: Company,
}

/// An order that is here. Its thread waits, or leads.
struct Entry<E> {
    id: u64,
    source: u64,
    came: Instant,
    /// Whether rows of it have been run.
    begun: bool,
    deadline: Option<Instant>,
    rows: Arc<Rows>,
    /// Not begun.
    pieces: Vec<Piece<E>>,
    /// Pieces without result.
    open: usize,
    /// Results that the order's thread has not copied yet.
    done: Vec<Done>,
    stopped: Option<Stopped>,
    wake: Arc<Condvar>,
}

/// Rows of a product that belong to one piece.
struct Done {
    product: Arc<Vec<f32>>,
    /// First element in the product.
    from: usize,
    len: usize,
    /// First element in the order's result.
    at: usize,
}

/// Pieces that run in one call.
struct Batch<E> {
    experts: Vec<Together<E>>,
    /// The rows of those who are in it, each order once.
    orders: Vec<(u64, Arc<Rows>)>,
    /// How long those of them have waited that begin with it.
    waited: Vec<Duration>,
}

/// Pieces of one expert, at least one, and whose they are.
struct Together<E> {
    expert: Arc<E>,
    pieces: Vec<(u64, Piece<E>)>,
}

/// An expert in a call, and the rows that go through it.
pub(crate) struct Part<'a, E> {
    pub(crate) expert: &'a E,
    /// Indices of rows of the call, not empty.
    pub(crate) rows: Cow<'a, [u32]>,
}

impl<E> Merger<E> {
    /// Counts its products in `merging`.
    pub(crate) fn new(merging: Merging) -> Self {
        Self {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                leader: None,
                next: 0,
                company: Company::default(),
            }),
            arrived: Condvar::new(),
            merging,
            call: CALL,
        }
    }

    pub(crate) fn merging(&self) -> &Merging {
        &self.merging
    }

    /// Runs an order, perhaps with others, and returns its rows in the order of
    /// its pieces. `forward` has rows `[n, width]` and experts with the rows that go
    /// through each; it gives `[pairs, width]`, those of the first expert first, and
    /// every row alone. Every caller gives the same one, and whose is called is not said.
    ///
    /// # Errors
    /// The deadline has passed, or `forward` panicked on rows of this order's experts.
    pub(crate) fn run(
        &self,
        order: Order<E>,
        forward: impl Fn(&[f32], &[Part<'_, E>]) -> Vec<f32>,
    ) -> Result<Vec<f32>, Stopped> {
        let width = order.width;
        let pairs: usize = order.pieces.iter().map(|piece| piece.rows.len()).sum();
        let mut out = vec![0.0; pairs * width];
        if pairs == 0 {
            return Ok(out);
        }
        let wake = Arc::new(Condvar::new());
        let mut state = self.lock();
        let id = state.enter(order, Arc::clone(&wake));
        self.arrived.notify_one();
        loop {
            let leads = state.leader == Some(id);
            let Some(entry) = state.entry(id) else {
                // Only its own thread takes an entry out.
                return Err(Stopped::Panicked);
            };
            let done = std::mem::take(&mut entry.done);
            if !done.is_empty() {
                drop(state);
                for done in done {
                    done.copy_to(&mut out);
                }
                state = self.lock();
            } else if entry.stopped.is_some() || entry.open == 0 {
                let stopped = entry.stopped;
                state.leave(id);
                return stopped.map_or(Ok(out), Err);
            } else if leads {
                drop(state);
                self.lead(id, width, &forward, &mut out);
                state = self.lock();
            } else {
                state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what the order `id` still needs, with what others have for the same experts.
    fn lead(
        &self,
        id: u64,
        width: usize,
        forward: &impl Fn(&[f32], &[Part<'_, E>]) -> Vec<f32>,
        out: &mut [f32],
    ) {
        self.hold(id);
        loop {
            let Some(batch) = self.lock().take(id, self.call, Instant::now()) else {
                return;
            };
            let (experts, waited) = (batch.experts.iter(), batch.waited.iter().copied());
            let experts = experts.map(Together::rows);
            self.merging.count(experts, batch.orders.len(), waited);
            let begun = Instant::now();
            let product = batch.run(width, forward).map(Arc::new);
            let took = begun.elapsed();
            let mut from = 0;
            let mut state = self.lock();
            let experts = u32::try_from(batch.experts.len()).unwrap_or(u32::MAX);
            state.company.product_took(took / experts.max(1));
            let pieces = batch.experts.into_iter().flat_map(|expert| expert.pieces);
            for (of, piece) in pieces {
                let len = piece.rows.len() * width;
                let done = product.as_ref().map(|product| Done {
                    product: Arc::clone(product),
                    from,
                    len,
                    at: piece.at * width,
                });
                from += len;
                state.give(of, done);
            }
            let mine = state.entry(id).map(|entry| std::mem::take(&mut entry.done));
            drop(state);
            for done in mine.into_iter().flatten() {
                done.copy_to(out);
            }
        }
    }

    /// Waits for those who are about to come with rows for the same experts.
    fn hold(&self, id: u64) {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            let hold = state.hold(id, begun, Instant::now());
            if hold.is_zero() {
                return;
            }
            (state, _) = self
                .arrived
                .wait_timeout(state, hold)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<E> State<E> {
    /// Lets an order in; the first one leads.
    fn enter(&mut self, order: Order<E>, wake: Arc<Condvar>) -> u64 {
        let id = self.next;
        self.next += 1;
        let experts = order.pieces.iter().map(|piece| address(&piece.expert));
        let came = Instant::now();
        self.company.came(order.source, experts.collect(), came);
        self.queue.push_back(Entry {
            id,
            source: order.source,
            came,
            begun: false,
            deadline: order.deadline,
            rows: Arc::new(order.rows),
            open: order.pieces.len(),
            pieces: order.pieces,
            done: Vec::new(),
            stopped: None,
            wake,
        });
        self.leader.get_or_insert(id);
        id
    }

    fn entry(&mut self, id: u64) -> Option<&mut Entry<E>> {
        self.queue.iter_mut().find(|entry| entry.id == id)
    }

    /// Takes an order out; if it led, the oldest that is not done leads next.
    fn leave(&mut self, id: u64) {
        self.queue.retain(|entry| entry.id != id);
        if self.leader == Some(id) {
            let next = self.queue.iter().find(|entry| entry.is_open());
            self.leader = next.map(|next| next.id);
            if let Some(next) = next {
                next.wake.notify_one();
            }
        }
    }

    /// How much longer the leader had better wait.
    fn hold(&self, id: u64, begun: Instant, now: Instant) -> Duration {
        let Some(leader) = self.queue.iter().find(|entry| entry.id == id) else {
            return Duration::ZERO;
        };
        let here: Vec<u64> = self.queue.iter().map(|entry| entry.source).collect();
        let expected = self.company.expected(leader.source, &here, now);
        let products = self.queue.iter().map(|entry| entry.pieces.len()).sum();
        let deadline = self.queue.iter().filter_map(|entry| entry.deadline).min();
        let left = deadline.map(|at| at.saturating_duration_since(now));
        let terms = company::Terms {
            product: self.company.product(),
            products,
            held: now.saturating_duration_since(begun),
            left,
        };
        company::hold(&expected, terms)
    }

    /// The next experts of the order `id`, with everybody's rows for them: at least one, and as
    /// many as usually take `call`. None: it needs no more.
    fn take(&mut self, id: u64, call: Duration, now: Instant) -> Option<Batch<E>> {
        for entry in &mut self.queue {
            if entry.is_open() && entry.deadline.is_some_and(|at| at <= now) {
                entry.stop(Stopped::Late);
            }
        }
        // As long as nobody knows what one takes, it is one.
        let usual = self.company.product().as_nanos();
        let most = call.as_nanos().checked_div(usual).unwrap_or(1).max(1);
        let mut experts: Vec<Together<E>> = Vec::new();
        while (experts.len() as u128) < most {
            let next = self.entry(id).and_then(|entry| entry.pieces.first());
            let Some(expert) = next.map(|piece| Arc::clone(&piece.expert)) else {
                break;
            };
            let pieces = self.take_expert(id, &expert);
            experts.push(Together { expert, pieces });
        }
        let of = |entry: &&mut Entry<E>| {
            let mut pieces = experts.iter().flat_map(|expert| &expert.pieces);
            pieces.any(|&(id, _)| id == entry.id)
        };
        let (mut orders, mut waited) = (Vec::new(), Vec::new());
        for entry in self.queue.iter_mut().filter(of) {
            orders.push((entry.id, Arc::clone(&entry.rows)));
            if !std::mem::replace(&mut entry.begun, true) {
                waited.push(now.saturating_duration_since(entry.came));
            }
        }
        (!experts.is_empty()).then_some(Batch {
            experts,
            orders,
            waited,
        })
    }

    /// Everybody's rows for an expert of the order `id`.
    fn take_expert(&mut self, id: u64, expert: &Arc<E>) -> Vec<(u64, Piece<E>)> {
        let mut rows = 0;
        let mut pieces = Vec::new();
        // The leader's own come first, for they run whatever their number.
        let (mine, others): (Vec<_>, Vec<_>) =
            self.queue.iter_mut().partition(|entry| entry.id == id);
        for (entry, most) in mine
            .into_iter()
            .map(|entry| (entry, usize::MAX))
            .chain(others.into_iter().map(|entry| (entry, MERGED_ROWS)))
        {
            let joins = |piece: &mut Piece<E>| {
                let joins = Arc::ptr_eq(&piece.expert, expert) && rows + piece.rows.len() <= most;
                rows += if joins { piece.rows.len() } else { 0 };
                joins
            };
            let taken = entry.pieces.extract_if(.., joins);
            pieces.extend(taken.map(|piece| (entry.id, piece)));
        }
        pieces
    }

    /// Hands a piece's result, or that it has none, to its order.
    fn give(&mut self, id: u64, done: Option<Done>) {
        let Some(entry) = self.queue.iter_mut().find(|entry| entry.id == id) else {
            return;
        };
        match done {
            Some(done) => {
                entry.done.push(done);
                entry.open -= 1;
            }
            None => entry.stop(Stopped::Panicked),
        }
        if !entry.is_open() {
            entry.wake.notify_one();
            self.company.answered(entry.source, Instant::now());
        }
    }
}

impl<E> Entry<E> {
    fn is_open(&self) -> bool {
        self.open > 0 && self.stopped.is_none()
    }

    fn stop(&mut self, why: Stopped) {
        self.stopped = Some(why);
        self.pieces.clear();
        self.wake.notify_one();
    }
}

impl<E> Batch<E> {
    /// `[pairs, width]` in the order of experts and pieces; None: `forward` panicked.
    fn run(
        &self,
        width: usize,
        forward: &impl Fn(&[f32], &[Part<'_, E>]) -> Vec<f32>,
    ) -> Option<Vec<f32>> {
        // Rows of several orders lie one after another, each order's where it begins.
        let mut begin = Vec::with_capacity(self.orders.len());
        let mut rows = 0;
        for (id, of) in &self.orders {
            begin.push((*id, rows));
            rows += (of.len() / width) as u32;
        }
        let x: Cow<'_, [f32]> = match &self.orders[..] {
            [(_, rows)] => Cow::Borrowed(rows),
            orders => {
                let rows: Vec<&[f32]> = orders.iter().map(|(_, rows)| &***rows).collect();
                Cow::Owned(rows.concat())
            }
        };
        let begin = |id: u64| begin.iter().find(|(of, _)| *of == id).map_or(0, |of| of.1);
        let parts = self.experts.iter().map(|together| {
            let rows = match &together.pieces[..] {
                [(id, piece)] if begin(*id) == 0 => Cow::Borrowed(&piece.rows[..]),
                pieces => Cow::Owned(
                    { pieces.iter() }
                        .flat_map(|(id, piece)| {
                            let first = begin(*id);
                            piece.rows.iter().map(move |row| first + row)
                        })
                        .collect(),
                ),
            };
            Part {
                expert: &*together.expert,
                rows,
            }
        });
        let parts: Vec<_> = parts.collect();
        // Orders of other threads hang on this one: they must hear of it.
        catch_unwind(AssertUnwindSafe(|| forward(&x, &parts))).ok()
    }
}

impl<E> Together<E> {
    fn rows(&self) -> usize {
        self.pieces.iter().map(|(_, piece)| piece.rows.len()).sum()
    }
}

impl Done {
    fn copy_to(&self, out: &mut [f32]) {
        out[self.at..self.at + self.len]
            .copy_from_slice(&self.product[self.from..self.from + self.len]);
    }
}

/// What tells one resident expert from another, for as long as both are here.
fn address<E>(expert: &Arc<E>) -> usize {
    Arc::as_ptr(expert).addr()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
