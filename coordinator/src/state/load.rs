//! The load of the experts, as attention nodes report it to the leader.
//!
//! Secret: when a shot ends, and how much of it all one answer holds.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use guild_proto::cluster::v1::{
    ExpertLoadResponse, ExpertNodeLoad, LoadShot, ReportLoadRequest, Slot,
};
use guild_scheduler::load::{Delta, LoadError, MAX_CELLS, Meter, Shot, balancedness};
use guild_scheduler::membership::{Placed, Published};
use guild_scheduler::placement::{NodeId, NodeSlots};
use guild_scheduler::planner::Split;
use guild_scheduler::rebalance::{shares, speeds};

/// Span of a shot.
const SHOT: Duration = Duration::from_secs(1);
/// Cells (layers by experts) of all shots that one answer lists, at most; one
/// shot is always listed.
const MAX_LISTED_CELLS: usize = 1 << 20;

/// The meter and its clock. None: the model has no experts.
pub(crate) struct LoadBook(Option<Mutex<Inner>>);

struct Inner {
    meter: Meter,
    /// When the open shot closes.
    closes: Duration,
}

impl LoadBook {
    /// For these layers (ascending indices) of `experts` experts each.
    pub(super) fn new(layers: &[u32], experts: u32) -> LoadBook {
        let meter = Meter::new(layers.to_vec(), experts).ok();
        LoadBook(meter.map(|meter| {
            Mutex::new(Inner {
                meter,
                closes: SHOT,
            })
        }))
    }

    fn with<R>(&self, work: impl FnOnce(&mut Inner) -> R) -> Option<R> {
        let inner = self.0.as_ref()?;
        // Counts are whole between two calls.
        Some(work(
            &mut inner.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    /// Counts a report, unless it was counted before.
    ///
    /// # Errors
    /// It counts what the model does not have; nothing of it is counted.
    pub(crate) fn count(&self, report: &ReportLoadRequest) -> Result<(), ReportError> {
        let cells = report.layers.len().saturating_mul(report.experts as usize);
        if cells != report.rows.len() || cells > MAX_CELLS {
            return Err(ReportError::Shape);
        }
        let experts = report.experts.max(1) as usize;
        let listed = report
            .rows
            .iter()
            .enumerate()
            .filter(|(_, rows)| **rows > 0);
        let delta = Delta {
            source: report.node_id,
            sequence: report.sequence,
            rows: listed
                .map(|(cell, &rows)| (report.layers[cell / experts], (cell % experts) as u32, rows))
                .collect(),
        };
        let merged = self.with(|inner| inner.meter.merge(&delta));
        merged.unwrap_or(Ok(false)).map(|_| ())?;
        Ok(())
    }

    /// A node that has left does not report any more.
    pub(super) fn forget(&self, node: NodeId) {
        self.with(|inner| inner.meter.forget(node));
    }

    /// Closes the shot whose time has come.
    pub(super) fn tick(&self, now: Duration) {
        self.with(|inner| {
            if now >= inner.closes {
                inner.meter.close();
                inner.closes = now + SHOT;
            }
        });
    }

    /// The closed shots of the window, oldest first: what is planned by.
    pub(super) fn shots(&self) -> Vec<Shot> {
        let shots = self.with(|inner| inner.meter.window().cloned().collect());
        shots.unwrap_or_default()
    }

    /// All that is known, over the homes of `active`, whose nodes do `measured` rows
    /// a second (None: unknown); shots after number `shots_after`, if asked for.
    pub(crate) fn answer(
        &self,
        active: Option<&Published>,
        measured: &[Option<f64>],
        shots_after: Option<u64>,
    ) -> ExpertLoadResponse {
        let answer = self.with(|inner| of_meter(&inner.meter, active, measured, shots_after));
        answer.unwrap_or_default()
    }
}

/// Why a report is not counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReportError {
    /// The lists do not belong together.
    #[error("rows: not layers times experts")]
    Shape,
    /// It counts something else.
    #[error(transparent)]
    Load(#[from] LoadError),
}

fn of_meter(
    meter: &Meter,
    active: Option<&Published>,
    measured: &[Option<f64>],
    shots_after: Option<u64>,
) -> ExpertLoadResponse {
    let layers = meter.layers();
    let mut window = Shot {
        rows: vec![vec![0; meter.experts() as usize]; layers.len()],
    };
    for shot in meter.window() {
        for (sum, &n) in window
            .rows
            .iter_mut()
            .flatten()
            .zip(shot.rows.iter().flatten())
        {
            *sum = sum.saturating_add(n);
        }
    }
    let placed = active.map_or(&[][..], |active| active.placement.nodes());
    let speeds = speeds(measured);
    let rows = shares(placed, layers, &window, &speeds, Split::Filled);
    // What EPLB takes for granted.
    let alike = vec![1.0; placed.len()];
    let even = shares(placed, layers, &window, &alike, Split::Even);
    let over = |(rows, speed): (&f64, &f64)| rows / speed;
    let balance = |rows: &Vec<f64>, speeds: &[f64]| {
        let loads: Vec<f64> = rows.iter().zip(speeds).map(over).collect();
        balancedness(&[loads]).unwrap_or(1.0)
    };
    let nodes = active.map_or_else(Vec::new, |active| {
        let nodes = placed.iter().zip(&active.nodes).enumerate();
        nodes
            .map(|(n, (node, placed))| listed_node(node, placed, rows.iter().map(|rows| rows[n])))
            .collect()
    });
    ExpertLoadResponse {
        epoch: active.map_or(0, |active| active.placement.epoch()),
        layers: layers.to_vec(),
        experts: meter.experts(),
        shot_ms: SHOT.as_millis() as u32,
        closed: meter.closed(),
        window: meter.window().len() as u32,
        rows: window.rows.concat(),
        ewma: meter.ewma().map_or_else(Vec::new, |ewma| ewma.concat()),
        balancedness: rows.iter().map(|rows| balance(rows, &speeds)).collect(),
        even_balancedness: even.iter().map(|rows| balance(rows, &alike)).collect(),
        nodes,
        shots: shots_after.map_or_else(Vec::new, |after| listed(meter, after)),
    }
}

fn listed_node(
    node: &NodeSlots,
    placed: &Placed,
    rows: impl Iterator<Item = f64>,
) -> ExpertNodeLoad {
    let slot = |&(layer, expert): &(u32, u32)| Slot { layer, expert };
    ExpertNodeLoad {
        node_id: node.node,
        name: placed.name.clone(),
        slots: node.slots.iter().map(slot).collect(),
        rows: rows.collect(),
    }
}

/// The shots after `after` that are still in the window, oldest first, as many
/// as one answer holds.
fn listed(meter: &Meter, after: u64) -> Vec<LoadShot> {
    let window = meter.window();
    let first = meter.closed() - window.len() as u64 + 1;
    let cells = meter.layers().len() * meter.experts() as usize;
    let shot = |(number, shot): (u64, &Shot)| LoadShot {
        number,
        rows: shot.rows.concat(),
    };
    (first..)
        .zip(window)
        .filter(|(number, _)| *number > after)
        .take((MAX_LISTED_CELLS / cells).max(1))
        .map(shot)
        .collect()
}
