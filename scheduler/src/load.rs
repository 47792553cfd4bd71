//! Expert load: what was routed where, layer by layer, over time.
//!
//! Secret of this module: how counts of several attention nodes become one
//! picture. Deltas are merged into the open shot, a closed shot enters a window
//! and an exponentially weighted mean. A shot is a span of the caller's choice;
//! this module has no clock. A `Trace` is a sequence of shots as plain data.

use std::collections::{BTreeMap, VecDeque};

mod synthetic;

pub use synthetic::Synthetic;

/// Weight of the newest shot in the exponentially weighted mean.
pub const EWMA_WEIGHT: f64 = 0.25;
/// Closed shots that are kept: what the planner looks at.
pub const WINDOW_SHOTS: usize = 16;
/// Sources of deltas that are remembered, at most.
pub const MAX_SOURCES: usize = 1 << 12;
/// Cells (layers by experts) of a shot, at most.
pub const MAX_CELLS: usize = 1 << 22;

/// Rows that were routed to each expert in one span of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shot {
    /// [layers, experts], layers in the order of the trace's or meter's list.
    pub rows: Vec<Vec<u64>>,
}

/// A recorded sequence of shots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Layer indices of the model, ascending: what each row of a shot counts.
    pub layers: Vec<u32>,
    /// Logical experts of a layer.
    pub experts: u32,
    /// The shots, oldest first.
    pub shots: Vec<Shot>,
}

/// Counts that do not fit the model they are said to be of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// There is nothing to count, or too much.
    #[error(
        "layers, experts: {layers} layers of {experts} experts cannot be counted (1 to {MAX_CELLS} cells)"
    )]
    Size {
        /// Number of layers.
        layers: usize,
        /// Experts of a layer.
        experts: u32,
    },
    /// The layers are not in ascending order.
    #[error("layers: {0} is listed out of order; layers ascend")]
    LayerOrder(u32),
    /// A shot has another shape than its trace.
    #[error("shots[{shot}].rows: not {layers} layers of {experts} experts")]
    Shot {
        /// Index of the shot.
        shot: usize,
        /// Layers of the trace.
        layers: usize,
        /// Experts of the trace.
        experts: u32,
    },
    /// A delta counts an expert that the model does not have.
    #[error("delta of source {origin}: no expert {expert} in layer {layer}")]
    Unknown {
        /// Who sent the delta.
        origin: u32,
        /// Layer index.
        layer: u32,
        /// Expert index.
        expert: u32,
    },
    /// More attention nodes count than are remembered.
    #[error("delta of source {0}: more than {MAX_SOURCES} sources")]
    Sources(u32),
}

impl Trace {
    /// Checks what came from a file.
    ///
    /// # Errors
    /// The first thing that does not fit, by its field.
    pub fn check(&self) -> Result<(), LoadError> {
        check_size(&self.layers, self.experts)?;
        for (shot, s) in self.shots.iter().enumerate() {
            let fits = s.rows.len() == self.layers.len()
                && s.rows.iter().all(|r| r.len() == self.experts as usize);
            if !fits {
                return Err(LoadError::Shot {
                    shot,
                    layers: self.layers.len(),
                    experts: self.experts,
                });
            }
        }
        Ok(())
    }
}

fn check_size(layers: &[u32], experts: u32) -> Result<(), LoadError> {
    let cells = layers.len().saturating_mul(experts as usize);
    if cells == 0 || cells > MAX_CELLS {
        return Err(LoadError::Size {
            layers: layers.len(),
            experts,
        });
    }
    match layers.windows(2).find(|w| w[0] >= w[1]) {
        Some(w) => Err(LoadError::LayerOrder(w[1])),
        None => Ok(()),
    }
}

/// What one attention node counted since its last delta.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    /// The attention node.
    pub source: u32,
    /// Grows with every delta of a source: a delta that comes twice counts once.
    pub sequence: u64,
    /// (layer, expert, rows); what is not listed is zero.
    pub rows: Vec<(u32, u32, u64)>,
}

/// The load of a cluster, merged from all its attention nodes.
#[derive(Clone, Debug)]
pub struct Meter {
    layers: Vec<u32>,
    experts: u32,
    open: Shot,
    window: VecDeque<Shot>,
    closed: u64,
    ewma: Option<Vec<Vec<f64>>>,
    seen: BTreeMap<u32, u64>,
}

impl Meter {
    /// A meter of these layers (ascending indices) of `experts` experts each.
    ///
    /// # Errors
    /// Nothing to count, too much of it, or layers out of order.
    pub fn new(layers: Vec<u32>, experts: u32) -> Result<Meter, LoadError> {
        check_size(&layers, experts)?;
        let open = zero(layers.len(), experts);
        Ok(Meter {
            layers,
            experts,
            open,
            window: VecDeque::new(),
            closed: 0,
            ewma: None,
            seen: BTreeMap::new(),
        })
    }

    /// Adds a delta to the open shot; false if it was counted before. The order
    /// in which the deltas of different sources come does not matter.
    ///
    /// # Errors
    /// A delta with an unknown layer or expert counts nothing at all.
    pub fn merge(&mut self, delta: &Delta) -> Result<bool, LoadError> {
        if self
            .seen
            .get(&delta.source)
            .is_some_and(|&last| last >= delta.sequence)
        {
            return Ok(false);
        }
        if self.seen.len() >= MAX_SOURCES && !self.seen.contains_key(&delta.source) {
            return Err(LoadError::Sources(delta.source));
        }
        let place = |layer: u32, expert: u32| match self.layers.binary_search(&layer) {
            Ok(row) if expert < self.experts => Ok((row, expert as usize)),
            _ => Err(LoadError::Unknown {
                origin: delta.source,
                layer,
                expert,
            }),
        };
        let cells: Vec<_> = (delta.rows.iter())
            .map(|&(layer, expert, rows)| place(layer, expert).map(|at| (at, rows)))
            .collect::<Result<_, _>>()?;
        for ((row, expert), rows) in cells {
            let cell = &mut self.open.rows[row][expert];
            *cell = cell.saturating_add(rows);
        }
        self.seen.insert(delta.source, delta.sequence);
        Ok(true)
    }

    /// Closes the open shot. A shot without a single row tells nothing about the
    /// experts and is left out.
    pub fn close(&mut self) {
        if self.open.rows.iter().flatten().all(|&rows| rows == 0) {
            return;
        }
        let shot = std::mem::replace(&mut self.open, zero(self.layers.len(), self.experts));
        match &mut self.ewma {
            None => self.ewma = Some(mean(&shot)),
            Some(ewma) => {
                for (mean, &rows) in ewma.iter_mut().flatten().zip(shot.rows.iter().flatten()) {
                    *mean += EWMA_WEIGHT * (rows as f64 - *mean);
                }
            }
        }
        if self.window.len() == WINDOW_SHOTS {
            self.window.pop_front();
        }
        self.window.push_back(shot);
        self.closed += 1;
    }

    /// Forgets a source that has left, so that its successor may count from 0.
    pub fn forget(&mut self, source: u32) {
        self.seen.remove(&source);
    }

    /// The layers that are counted.
    pub fn layers(&self) -> &[u32] {
        &self.layers
    }

    /// Rows per shot of each expert, exponentially weighted, [layers, experts].
    /// None before the first shot.
    pub fn ewma(&self) -> Option<&[Vec<f64>]> {
        self.ewma.as_deref()
    }

    /// The last closed shots, oldest first, at most [`WINDOW_SHOTS`].
    pub fn window(&self) -> impl ExactSizeIterator<Item = &Shot> {
        self.window.iter()
    }

    /// Shots closed so far: the number of the newest in the window, counted from 1.
    pub fn closed(&self) -> u64 {
        self.closed
    }

    /// Logical experts of a layer.
    pub fn experts(&self) -> u32 {
        self.experts
    }

    /// The window as a trace.
    pub fn trace(&self) -> Trace {
        Trace {
            layers: self.layers.clone(),
            experts: self.experts,
            shots: self.window.iter().cloned().collect(),
        }
    }
}

fn zero(layers: usize, experts: u32) -> Shot {
    Shot {
        rows: vec![vec![0; experts as usize]; layers],
    }
}

fn mean(shot: &Shot) -> Vec<Vec<f64>> {
    let row = |r: &Vec<u64>| r.iter().map(|&n| n as f64).collect();
    shot.rows.iter().map(row).collect()
}

/// Mean over layers of mean / max over nodes: 1 is perfect balance, 1/nodes is
/// all on one. `layers` are the loads of the nodes over their capacities; a
/// layer without load is in balance. None: there is no layer.
pub fn balancedness<L: AsRef<[f64]>>(layers: &[L]) -> Option<f64> {
    let one = |loads: &L| {
        let loads = loads.as_ref();
        let max = loads.iter().copied().fold(0.0, f64::max);
        if max > 0.0 {
            loads.iter().sum::<f64>() / loads.len() as f64 / max
        } else {
            1.0
        }
    };
    (!layers.is_empty()).then(|| layers.iter().map(one).sum::<f64>() / layers.len() as f64)
}
