//! Work of several senders, run together: an expert's weights are read once for
//! all the rows that wait for it.
//!
//! Secret: who runs what. The thread of the oldest work leads: it goes through
//! the experts of its own work, takes along the rows that others have here for
//! the expert at hand, and hands the lead to the next oldest when its own rows
//! are done. So nobody's answer waits for experts it did not ask for, and what
//! arrives while one expert runs can still join the next. Before it starts it
//! may wait a moment for company (`company`). Knows neither slots nor epochs,
//! nor what an expert does with rows: merging is right because a row's result
//! depends on that row alone.

mod company;

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use guild_transport::Rows;

use company::Company;

/// Rows of one product, at most, when others join: with so many, reading the
/// weights is a small part of it, and more would only delay whoever came first.
/// Work that brings more by itself runs as it is.
pub const MERGED_ROWS: usize = 256;

/// Turns merging off and on again, for measurements, and counts products.
/// Clones are the same switch.
#[derive(Clone, Debug)]
pub struct Merging(Arc<Switch>);

#[derive(Debug)]
struct Switch {
    on: AtomicBool,
    products: AtomicU64,
    rows: AtomicU64,
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
    /// On.
    fn default() -> Self {
        Self(Arc::new(Switch {
            on: AtomicBool::new(true),
            products: AtomicU64::new(0),
            rows: AtomicU64::new(0),
        }))
    }
}

impl Merging {
    /// While off, work that arrives is run by itself.
    pub fn set(&self, on: bool) {
        self.0.on.store(on, Ordering::Relaxed);
    }

    /// What was run until now.
    pub fn products(&self) -> Products {
        Products {
            products: self.0.products.load(Ordering::Relaxed),
            rows: self.0.rows.load(Ordering::Relaxed),
        }
    }

    fn is_on(&self) -> bool {
        self.0.on.load(Ordering::Relaxed)
    }

    fn count(&self, rows: usize) {
        self.0.products.fetch_add(1, Ordering::Relaxed);
        self.0.rows.fetch_add(rows as u64, Ordering::Relaxed);
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

/// Pieces of one expert that run together.
struct Batch<E> {
    expert: Arc<E>,
    pieces: Vec<(u64, Arc<Rows>, Piece<E>)>,
}

impl<E> Merger<E> {
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
        }
    }

    /// Runs an order, perhaps with others, and returns its rows in the order of
    /// its pieces. `forward` takes rows `[m, width]` to rows `[m, width]`, each
    /// alone; every caller gives the same one, and whose is called is not said.
    ///
    /// # Errors
    /// The deadline has passed, or `forward` panicked on rows of this order's experts.
    pub(crate) fn run(
        &self,
        order: Order<E>,
        forward: impl Fn(&E, &[f32]) -> Vec<f32>,
    ) -> Result<Vec<f32>, Stopped> {
        let width = order.width;
        let pairs: usize = order.pieces.iter().map(|piece| piece.rows.len()).sum();
        let mut out = vec![0.0; pairs * width];
        if pairs == 0 {
            return Ok(out);
        }
        if !self.merging.is_on() {
            self.alone(order, forward, &mut out)?;
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

    fn alone(
        &self,
        order: Order<E>,
        forward: impl Fn(&E, &[f32]) -> Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), Stopped> {
        let (width, rows) = (order.width, Arc::new(order.rows));
        for piece in order.pieces {
            let at = piece.at * width;
            let batch = Batch {
                expert: Arc::clone(&piece.expert),
                pieces: vec![(0, Arc::clone(&rows), piece)],
            };
            self.merging.count(batch.rows());
            let product = batch.run(width, &forward).map_err(|_| Stopped::Panicked)?;
            out[at..at + product.len()].copy_from_slice(&product);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what the order `id` still needs, with what others have for the same experts.
    fn lead(
        &self,
        id: u64,
        width: usize,
        forward: &impl Fn(&E, &[f32]) -> Vec<f32>,
        out: &mut [f32],
    ) {
        self.hold(id);
        loop {
            let Some(batch) = self.lock().take(id, Instant::now()) else {
                return;
            };
            self.merging.count(batch.rows());
            let begun = Instant::now();
            let product = batch.run(width, forward).map(Arc::new);
            let took = begun.elapsed();
            let mut from = 0;
            let mut state = self.lock();
            state.company.product_took(took);
            for (of, _, piece) in batch.pieces {
                let len = piece.rows.len() * width;
                let done = product.as_ref().ok().map(|product| Done {
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
            let now = Instant::now();
            let hold = state.hold(id, begun, now);
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
        self.company
            .came(order.source, experts.collect(), Instant::now());
        self.queue.push_back(Entry {
            id,
            source: order.source,
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

    /// The next expert of the order `id`, with everybody's rows for it. None: it needs no more.
    fn take(&mut self, id: u64, now: Instant) -> Option<Batch<E>> {
        for entry in &mut self.queue {
            if entry.is_open() && entry.deadline.is_some_and(|at| at <= now) {
                entry.stop(Stopped::Late);
            }
        }
        let expert = Arc::clone(&self.entry(id)?.pieces.first()?.expert);
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
                let joins = Arc::ptr_eq(&piece.expert, &expert) && rows + piece.rows.len() <= most;
                rows += if joins { piece.rows.len() } else { 0 };
                joins
            };
            for piece in entry.pieces.extract_if(.., joins) {
                pieces.push((entry.id, Arc::clone(&entry.rows), piece));
            }
        }
        Some(Batch { expert, pieces })
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
    fn rows(&self) -> usize {
        self.pieces
            .iter()
            .map(|(_, _, piece)| piece.rows.len())
            .sum()
    }

    /// `[rows, width]` in the order of the pieces.
    fn run(
        &self,
        width: usize,
        forward: &impl Fn(&E, &[f32]) -> Vec<f32>,
    ) -> Result<Vec<f32>, Box<dyn Any + Send>> {
        let mut gathered = Vec::with_capacity(self.rows() * width);
        for (_, rows, piece) in &self.pieces {
            for &row in &piece.rows {
                let start = row as usize * width;
                gathered.extend_from_slice(&rows[start..start + width]);
            }
        }
        // Orders of other threads hang on this one: they must hear of it.
        catch_unwind(AssertUnwindSafe(|| forward(&self.expert, &gathered)))
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
mod tests {
    use std::{
        sync::mpsc::{Receiver, Sender, channel},
        thread::{self, JoinHandle},
    };

    use super::*;

    const WIDTH: usize = 2;
    /// A row that begins with this makes its expert panic.
    const POISON: f32 = -1.0;

    /// An expert that says when it begins, and goes on when it is told to.
    struct Gated {
        number: f32,
        begun: Sender<(f32, Vec<f32>)>,
        go: Mutex<Receiver<()>>,
    }

    /// What the test holds of such experts.
    struct House {
        merger: Arc<Merger<Gated>>,
        experts: Vec<Arc<Gated>>,
        begun: Receiver<(f32, Vec<f32>)>,
        go: Vec<Sender<()>>,
    }

    type Answer = JoinHandle<Result<Vec<f32>, Stopped>>;

    impl House {
        fn with(experts: usize) -> House {
            let (say, begun) = channel();
            let (go, experts) = (0..experts)
                .map(|number| {
                    let (go, wait) = channel();
                    let gated = Gated {
                        number: number as f32,
                        begun: say.clone(),
                        go: Mutex::new(wait),
                    };
                    (go, Arc::new(gated))
                })
                .unzip();
            House {
                merger: Arc::new(Merger::new(Merging::default())),
                experts,
                begun,
                go,
            }
        }

        /// Rows that begin with `first` to `experts`, on a thread of its own,
        /// which has let them in when this returns.
        fn send(&self, first: f32, experts: &[usize], deadline: Option<Instant>) -> Answer {
            let pieces = (0..).zip(experts).map(|(at, &expert)| Piece {
                expert: Arc::clone(&self.experts[expert]),
                rows: vec![0],
                at,
            });
            let order = Order {
                source: first as u64,
                deadline,
                rows: Rows::from(vec![first, 0.5]),
                width: WIDTH,
                pieces: pieces.collect(),
            };
            let merger = Arc::clone(&self.merger);
            let known = self.merger.lock().next;
            let answer = thread::spawn(move || {
                merger.run(order, |expert, rows| {
                    let firsts: Vec<f32> = rows.iter().step_by(WIDTH).copied().collect();
                    expert.begun.send((expert.number, firsts.clone())).unwrap();
                    expert.go.lock().unwrap().recv().unwrap();
                    assert!(!firsts.contains(&POISON));
                    rows.iter().map(|x| x + 100.0 * expert.number).collect()
                })
            });
            while self.merger.lock().next == known {
                thread::yield_now();
            }
            answer
        }

        /// The next product that begins: which expert, and who is in it.
        fn next(&self) -> (usize, Vec<f32>) {
            let (expert, rows) = self.begun.recv().unwrap();
            (expert as usize, rows)
        }

        fn go(&self, expert: usize) {
            self.go[expert].send(()).unwrap();
        }
    }

    fn ok(answer: Answer) -> Vec<f32> {
        answer.join().unwrap().unwrap()
    }

    #[test]
    fn what_arrives_while_one_expert_runs_joins_the_next() {
        let house = House::with(4);
        let a = house.send(1.0, &[0, 1, 2], None);
        assert_eq!(house.next(), (0, vec![1.0]));
        let b = house.send(2.0, &[0, 2], None);
        let c = house.send(3.0, &[2, 1, 3], None);
        house.go(0);
        assert_eq!(house.next(), (1, vec![1.0, 3.0]));
        house.go(1);
        assert_eq!(house.next(), (2, vec![1.0, 2.0, 3.0]));
        house.go(2);
        // Done: its answer waits for nobody else's experts.
        assert_eq!(ok(a), [1.0, 0.5, 101.0, 100.5, 201.0, 200.5]);
        // The next oldest leads.
        assert_eq!(house.next(), (0, vec![2.0]));
        house.go(0);
        assert_eq!(ok(b), [2.0, 0.5, 202.0, 200.5]);
        assert_eq!(house.next(), (3, vec![3.0]));
        house.go(3);
        assert_eq!(ok(c), [203.0, 200.5, 103.0, 100.5, 303.0, 300.5]);
        let products = house.merger.merging.products();
        assert_eq!((products.products, products.rows), (5, 8));
        assert!(house.merger.lock().queue.is_empty());
    }

    #[test]
    fn a_follower_whose_rows_are_done_leaves_before_the_leader() {
        let house = House::with(3);
        let a = house.send(1.0, &[0, 1, 2], None);
        house.next();
        let b = house.send(2.0, &[1], None);
        house.go(0);
        assert_eq!(house.next(), (1, vec![1.0, 2.0]));
        house.go(1);
        assert_eq!(ok(b), [102.0, 100.5]);
        house.next();
        house.go(2);
        ok(a);
    }

    #[test]
    fn who_comes_too_late_is_not_run_and_holds_up_nobody() {
        let house = House::with(2);
        let a = house.send(1.0, &[0], None);
        house.next();
        let late = house.send(2.0, &[1], Some(Instant::now()));
        let b = house.send(3.0, &[1], None);
        house.go(0);
        ok(a);
        assert_eq!(house.next(), (1, vec![3.0]));
        house.go(1);
        assert_eq!(late.join().unwrap(), Err(Stopped::Late));
        assert_eq!(ok(b), [103.0, 100.5]);
    }

    #[test]
    fn a_panic_is_answered_to_all_whose_rows_were_in_it_and_others_go_on() {
        let house = House::with(2);
        let a = house.send(1.0, &[0, 1], None);
        house.next();
        let poisoned = house.send(POISON, &[1], None);
        let b = house.send(3.0, &[0], None);
        house.go(0);
        assert_eq!(house.next(), (1, vec![1.0, POISON]));
        house.go(1);
        assert_eq!(a.join().unwrap(), Err(Stopped::Panicked));
        assert_eq!(poisoned.join().unwrap(), Err(Stopped::Panicked));
        assert_eq!(house.next(), (0, vec![3.0]));
        house.go(0);
        assert_eq!(ok(b), [3.0, 0.5]);
        let c = house.send(4.0, &[1], None);
        house.next();
        house.go(1);
        assert_eq!(ok(c), [104.0, 100.5]);
    }

    #[test]
    fn a_product_has_its_limit_and_large_work_runs_as_it_is() {
        let rows = |n: usize| vec![0; n];
        let expert = Arc::new(0);
        let order = |source, n| Order {
            source,
            deadline: None,
            rows: Rows::from(vec![0.0; WIDTH]),
            width: WIDTH,
            pieces: vec![Piece {
                expert: Arc::clone(&expert),
                rows: rows(n),
                at: 0,
            }],
        };
        let taken = |sizes: &[usize]| {
            let merger = Merger::new(Merging::default());
            let mut state = merger.lock();
            for (source, &n) in (0..).zip(sizes) {
                state.enter(order(source, n), Arc::default());
            }
            let batch = state.take(0, Instant::now()).unwrap();
            let sources = batch.pieces.iter().map(|(id, ..)| *id);
            (batch.rows(), sources.collect::<Vec<_>>())
        };
        let most = MERGED_ROWS;
        assert_eq!(taken(&[1, most - 2, 2, 1]), (most, vec![0, 1, 3]));
        assert_eq!(taken(&[most + 1, 1]), (most + 1, vec![0]));
    }

    #[test]
    fn switched_off_everybody_runs_alone() {
        let house = House::with(1);
        house.merger.merging.set(false);
        house.go(0);
        let order = Order {
            source: 0,
            deadline: None,
            rows: Rows::from(vec![1.0, 2.0]),
            width: WIDTH,
            pieces: vec![Piece {
                expert: Arc::clone(&house.experts[0]),
                rows: vec![0],
                at: 0,
            }],
        };
        let out = house.merger.run(order, |_, rows| rows.to_vec()).unwrap();
        assert_eq!(out, [1.0, 2.0]);
        assert_eq!(house.merger.lock().next, 0);
    }
}
