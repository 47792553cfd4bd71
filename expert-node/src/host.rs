//! Rows to slots: the tables of the newest placements, and the work itself.
//!
//! Secret: what an epoch and a slot stand for. Work is checked here as a whole,
//! so that none that will be refused ever meets other work (`merge` runs what
//! was let in), and every product is timed (`capacity`).

use std::{
    borrow::Cow,
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use guild_model::{Cpu, expert::Expert};
use guild_node::{
    member::Lease,
    metrics::{Histogram, Page},
};
use guild_transport::{ExchangeCode, ExchangeError, SlotBlob, SlotHost, Work};

use crate::{
    capacity::{self, Capacity},
    merge::{Merger, Merging, Order, Part, Piece, Stopped},
    pace::Pace,
};

/// Tables kept: the active placement, the one before it for those who have not
/// heard of it yet, and the one that becomes active next.
pub const TABLES: usize = 3;
/// A node without rows for so long has none for the moment.
const QUIET: Duration = Duration::from_secs(1);

/// The slots of one placement.
struct Table {
    epoch: u64,
    slots: Vec<Arc<Expert>>,
}

/// Runs rows through resident experts.
pub struct Host {
    name: String,
    /// Elements in a row: `hidden_size`.
    width: usize,
    cpu: Cpu,
    merger: Merger<Expert>,
    capacity: Capacity,
    /// Oldest first, at most [`TABLES`].
    tables: RwLock<Vec<Arc<Table>>>,
    pace: Arc<Pace>,
    lease: OnceLock<Lease>,
    /// Batches answered while the lease had run out.
    unleased: AtomicU64,
    answered: AtomicU64,
    took: Histogram,
}

impl Host {
    /// A node `name` without experts, for rows of `width` elements.
    pub fn new(name: impl Into<String>, width: usize, cpu: Cpu) -> Self {
        let pace = Arc::new(Pace::new(cpu.threads()));
        Self {
            name: name.into(),
            width,
            cpu,
            merger: Merger::new(Merging::default()),
            capacity: Capacity::default(),
            tables: RwLock::new(Vec::new()),
            pace,
            lease: OnceLock::new(),
            unleased: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            took: Histogram::default(),
        }
    }

    /// The same with a switch of the caller's.
    #[must_use]
    pub fn merging(mut self, merging: Merging) -> Self {
        self.merger = Merger::new(merging);
        self
    }

    /// Makes the host count what it answers while `lease` has run out. Only the
    /// first lease counts.
    pub fn count_by(&self, lease: Lease) {
        // A second one would be a defect of the caller, and harmless.
        let _ = self.lease.set(lease);
    }

    /// Batches answered while the lease had run out: the coordinator may have
    /// taken this node for dead. That is safe: such a node is given no new epoch
    /// before it has joined again, batches of an epoch it was not given are
    /// refused, and the experts of an epoch it has compute the same bits as
    /// their copies elsewhere.
    pub fn answered_without_lease(&self) -> u64 {
        self.unleased.load(Ordering::Relaxed)
    }

    /// Makes `slots` (the index is the slot) the table of `epoch`, beside
    /// those before it; of more than [`TABLES`] the oldest go. Work that has begun keeps its table.
    /// Returns what was in tables that have gone.
    pub fn publish(&self, epoch: u64, slots: Vec<Arc<Expert>>) -> Vec<Arc<Expert>> {
        self.change(|tables| {
            let mut gone = take_out(tables, |table| table.epoch == epoch);
            tables.push(Arc::new(Table { epoch, slots }));
            tables.sort_by_key(|table| table.epoch);
            let old = tables.len().saturating_sub(TABLES);
            gone.extend(tables.drain(..old));
            gone
        })
    }

    /// Lets go of the tables of epochs before `oldest`: nobody routes by them any
    /// more. Work that has begun keeps its table. Returns what was in them.
    pub fn forget_before(&self, oldest: u64) -> Vec<Arc<Expert>> {
        self.change(|tables| take_out(tables, |table| table.epoch < oldest))
    }

    /// Lets go of the table of an epoch that was withdrawn. Returns what was in it.
    pub fn withdraw(&self, epoch: u64) -> Vec<Arc<Expert>> {
        self.change(|tables| take_out(tables, |table| table.epoch == epoch))
    }

    /// Rows wait meanwhile: experts are not given back here.
    fn change(
        &self,
        change: impl FnOnce(&mut Vec<Arc<Table>>) -> Vec<Arc<Table>>,
    ) -> Vec<Arc<Expert>> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let gone = change(&mut tables);
        drop(tables);
        let slots = gone.iter().flat_map(|table| &table.slots);
        slots.cloned().collect()
    }

    /// The expert in a slot.
    ///
    /// # Errors
    /// The epoch is not resident here, or has no such slot.
    pub fn expert(&self, epoch: u64, slot: u32) -> Result<Arc<Expert>, ExchangeError> {
        self.in_slot(self.table(epoch)?.as_ref(), slot)
    }

    /// Measures what this node can do with the experts it has, for
    /// [`Host::rows_per_second`]. Takes some 50 ms of all threads the first time that
    /// experts are resident, and nothing after that.
    pub fn calibrate(&self) {
        if !self.capacity.is_known() {
            let experts = self.some_experts();
            self.capacity
                .calibrate(&experts, self.width, &self.cpu, &|| ());
        }
    }

    /// Whether it is time for [`Host::calibrate_again`]; true once each time.
    pub(crate) fn is_to_be_calibrated_again(&self) -> bool {
        self.capacity.is_due(Instant::now(), self.is_quiet(QUIET))
    }

    /// Measures once more, at the pace of work that can wait. Blocks.
    pub(crate) fn calibrate_again(&self) {
        let experts = self.some_experts();
        self.pace.in_pieces(|breathe| {
            self.capacity
                .calibrate(&experts, self.width, &self.cpu, breathe);
        });
    }

    /// Of those that rows come to, as many as are measured with.
    fn some_experts(&self) -> Vec<Arc<Expert>> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let full = tables.iter().rfind(|table| !table.slots.is_empty());
        let experts = full.map(|table| table.slots.iter().take(capacity::EXPERTS));
        experts.into_iter().flatten().cloned().collect()
    }

    /// Rows (of one expert each) that this node can do in a second when it
    /// decodes, as measured at [`Host::calibrate`] and at everything run since;
    /// `None` before.
    pub fn rows_per_second(&self) -> Option<f64> {
        self.capacity.rows_per_second(self.cpu.threads())
    }

    /// The epochs that rows can be run by, oldest first.
    pub fn epochs(&self) -> Vec<u64> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.iter().map(|table| table.epoch).collect()
    }

    /// What is said of it to Prometheus.
    pub(crate) fn write(&self, page: &mut Page) {
        self.merger.merging().write(page);
        page.counter(
            "guild_expert_batches_total",
            "Batches of rows that were answered.",
            &self.answered,
        );
        page.histogram(
            "guild_expert_batch_duration_seconds",
            "From the arrival of a batch to its answer.",
            &self.took,
        );
        page.counter(
            "guild_expert_unleased_batches_total",
            "Batches answered while the lease had run out.",
            &self.unleased,
        );
        page.gauge(
            "guild_expert_rows_per_second",
            "Rows that this node can do in a second, as it has measured.",
            self.rows_per_second().unwrap_or(0.0),
        );
        let epochs = self.epochs();
        page.gauge(
            "guild_expert_epochs",
            "Placements that rows can be run by.",
            epochs.len(),
        );
        page.gauge(
            "guild_placement_epoch",
            "The newest of them; 0: none yet.",
            epochs.last().copied().unwrap_or(0),
        );
    }

    /// Whether no rows are here and none have been for `time`.
    pub fn is_quiet(&self, time: Duration) -> bool {
        self.pace.is_quiet(time)
    }

    /// By which work that can wait is done beside rows.
    pub(crate) fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    fn table(&self, epoch: u64) -> Result<Arc<Table>, ExchangeError> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let found = tables.iter().find(|table| table.epoch == epoch).cloned();
        drop(tables);
        found.ok_or_else(|| {
            let known = self.epochs();
            self.error(
                ExchangeCode::UnknownEpoch,
                format!("epoch {epoch} is not resident here; {known:?} are"),
            )
        })
    }

    fn in_slot(&self, table: &Table, slot: u32) -> Result<Arc<Expert>, ExchangeError> {
        let found = table.slots.get(slot as usize);
        found.cloned().ok_or_else(|| {
            let (epoch, slots) = (table.epoch, table.slots.len());
            self.error(
                ExchangeCode::UnknownSlot,
                format!("epoch {epoch} has {slots} slots here, there is no slot {slot}"),
            )
        })
    }

    fn error(&self, code: ExchangeCode, message: String) -> ExchangeError {
        ExchangeError::new(code, self.name.as_str(), message)
    }
}

impl SlotHost for Host {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        let began = Instant::now();
        let rows = self.run(work)?;
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.took.observe(began.elapsed());
        Ok(rows)
    }

    fn blob(&self, epoch: u64, slot: u32) -> Result<SlotBlob, ExchangeError> {
        let expert = self.expert(epoch, slot)?;
        Ok(SlotBlob {
            digest: expert.digest(),
            bytes: Bytes::from_owner(Lent(expert)),
        })
    }
}

impl Host {
    fn run(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        let _rows = self.pace.rows();
        let (epoch, width) = (work.epoch, self.width);
        if work.width != width {
            return Err(self.error(
                ExchangeCode::Malformed,
                format!(
                    "epoch {epoch}: rows have width {}, the model {width}",
                    work.width
                ),
            ));
        }
        let table = self.table(epoch)?;
        if self.lease.get().is_some_and(|lease| !lease.is_held()) {
            self.unleased.fetch_add(1, Ordering::Relaxed);
        }
        // All or nothing: no row is computed for a batch that will be refused.
        let mut pieces = Vec::with_capacity(work.slots.len());
        let mut at = 0;
        for (slot, rows) in work.slots {
            let expert = self.in_slot(&table, slot)?;
            let pairs = rows.len();
            if pairs > 0 {
                pieces.push(Piece { expert, rows, at });
            }
            at += pairs;
        }
        let forward = |x: &[f32], parts: &[Part<'_, Expert>]| {
            let begun = Instant::now();
            let experts = parts.iter().map(|part| (part.expert, &*part.rows));
            let experts: Vec<(&Expert, &[u32])> = experts.collect();
            let pairs: usize = experts.iter().map(|(_, rows)| rows.len()).sum();
            let mut out = vec![0.0; pairs * width];
            Expert::forward_all(&self.cpu, &mut out, x, &experts);
            // How the time divides among them does not matter: what counts is the sum.
            let each = begun.elapsed() / experts.len().max(1) as u32;
            for (_, rows) in experts {
                self.capacity.observe(rows.len(), each);
            }
            out
        };
        let merging = self.merger.merging();
        let merged = |piece: &Piece<Expert>| merging.merges(piece.expert.bytes());
        if !pieces.iter().any(merged) {
            let rows = pieces.iter().map(|piece| piece.rows.len());
            merging.count(rows, 1, [Duration::ZERO]);
            let parts = pieces.iter().map(|piece| Part {
                expert: &*piece.expert,
                rows: Cow::Borrowed(&piece.rows[..]),
            });
            return Ok(forward(&work.rows, &parts.collect::<Vec<_>>()));
        }
        let order = Order {
            source: work.source,
            deadline: work.deadline,
            rows: work.rows,
            width,
            pieces,
        };
        self.merger.run(order, forward).map_err(|why| match why {
            Stopped::Late => self.error(
                ExchangeCode::Deadline,
                format!("epoch {epoch}: passed before all rows were computed"),
            ),
            Stopped::Panicked => self.error(
                ExchangeCode::Internal,
                format!("epoch {epoch}: an expert panicked; the log says where"),
            ),
        })
    }
}

/// An expert that lends out its memory.
struct Lent(Arc<Expert>);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.0.blob()
    }
}

/// Takes the tables out that are meant, in their order.
fn take_out(tables: &mut Vec<Arc<Table>>, which: impl Fn(&Table) -> bool) -> Vec<Arc<Table>> {
    tables.extract_if(.., |table| which(table)).collect()
}
