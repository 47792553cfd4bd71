//! Which replica serves how many rows of a batch.
//!
//! Secret of this module: water-filling. The rows of an expert are poured over
//! its replicas as over a floor of uneven height, the height being the time in
//! which a node would have answered without them: the way there and back, and
//! what waits there already. No weights move, nothing is remembered, the same
//! inputs give the same rows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rounds in which every expert is poured again on what the others left.
/// The first one does nearly all; a round never raises the worst node.
const ROUNDS: usize = 3;

/// What a node has before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Queue {
    /// Rows that wait at the node.
    pub rows: u64,
    /// Rows the node executes in a unit of time.
    pub capacity: f64,
    /// What an answer of the node takes in any case, in the same unit of time.
    pub latency: f64,
}

impl Queue {
    /// When the node will have answered if it gets nothing but what `rows` says.
    fn end(&self, rows: u64) -> f64 {
        self.latency + rows as f64 / self.capacity
    }
}

/// Replicas that cannot be poured on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SpreadError {
    /// `rows` and `replicas` speak of different numbers of experts.
    #[error("replicas: {replicas} experts where rows has {rows}")]
    Lengths {
        /// Experts in `rows`.
        rows: usize,
        /// Experts in `replicas`.
        replicas: usize,
    },
    /// An expert has rows and no replica.
    #[error("replicas[{0}]: the expert has rows and no replica")]
    NoReplica(usize),
    /// A replica is on a node that `queues` does not have.
    #[error("replicas[{expert}]: node {node} has no queue")]
    NoQueue {
        /// The expert.
        expert: usize,
        /// The node.
        node: u32,
    },
    /// A capacity is not a positive number.
    #[error("queues[{node}].capacity: {capacity} is not a positive number")]
    Capacity {
        /// The node.
        node: usize,
        /// Its capacity.
        capacity: f64,
    },
    /// A latency is negative or no number.
    #[error("queues[{node}].latency: {latency} is not a time")]
    Latency {
        /// The node.
        node: usize,
        /// Its latency.
        latency: f64,
    },
}

/// Shares out the rows of a batch: `rows[e]` rows of expert `e` over the nodes
/// `replicas[e]` (indices into `queues`, no two alike). Returns the rows of
/// every replica, expert after expert, in the order of `replicas`.
///
/// All rows are given out, the last answer comes never later than under an even
/// split, and of two equal choices the lower node takes the row. One round
/// costs O(n log n) in the number of replicas.
///
/// # Errors
/// An expert with rows but no replica, an unknown node, a senseless capacity or
/// latency.
pub fn spread<R: AsRef<[u32]>>(
    rows: &[u32],
    replicas: &[R],
    queues: &[Queue],
) -> Result<Vec<u32>, SpreadError> {
    check(rows, replicas, queues)?;
    let mut depth: Vec<u64> = queues.iter().map(|q| q.rows).collect();
    let mut shares: Vec<u32> = Vec::with_capacity(replicas.iter().map(|r| r.as_ref().len()).sum());
    for (&rows, nodes) in rows.iter().zip(replicas) {
        let nodes = nodes.as_ref();
        for (i, &node) in (0u32..).zip(nodes) {
            let count = nodes.len() as u32;
            let share = rows / count + u32::from(i < rows % count);
            shares.push(share);
            let depth = &mut depth[node as usize];
            *depth = depth.saturating_add(u64::from(share));
        }
    }
    let mut water = Water::default();
    for _ in 0..ROUNDS {
        let mut rest = shares.as_mut_slice();
        let mut changed = false;
        for (&rows, nodes) in rows.iter().zip(replicas) {
            let nodes = nodes.as_ref();
            let (mine, tail) = rest.split_at_mut(nodes.len());
            rest = tail;
            if nodes.len() > 1 && rows > 0 {
                changed |= water.pour(rows, nodes, queues, &mut depth, mine);
            }
        }
        if !changed {
            break;
        }
    }
    Ok(shares)
}

fn check<R: AsRef<[u32]>>(
    rows: &[u32],
    replicas: &[R],
    queues: &[Queue],
) -> Result<(), SpreadError> {
    if rows.len() != replicas.len() {
        return Err(SpreadError::Lengths {
            rows: rows.len(),
            replicas: replicas.len(),
        });
    }
    for (node, queue) in queues.iter().enumerate() {
        if !queue.capacity.is_normal() || queue.capacity < 0.0 {
            return Err(SpreadError::Capacity {
                node,
                capacity: queue.capacity,
            });
        }
        if !queue.latency.is_finite() || queue.latency < 0.0 {
            return Err(SpreadError::Latency {
                node,
                latency: queue.latency,
            });
        }
    }
    for (expert, (&rows, nodes)) in rows.iter().zip(replicas).enumerate() {
        let nodes = nodes.as_ref();
        if nodes.is_empty() && rows > 0 {
            return Err(SpreadError::NoReplica(expert));
        }
        if let Some(&node) = nodes.iter().find(|&&n| n as usize >= queues.len()) {
            return Err(SpreadError::NoQueue { expert, node });
        }
    }
    Ok(())
}

/// The level to which `rows` rise over floors of (height, width): heights are
/// load / capacity, widths capacities. Sorts `floors`.
pub(crate) fn level(rows: f64, floors: &mut [(f64, f64)]) -> f64 {
    floors.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (mut volume, mut width, mut level) = (rows, 0.0, 0.0);
    for i in 0..floors.len() {
        let (height, cap) = floors[i];
        volume += height * cap;
        width += cap;
        level = volume / width;
        if floors.get(i + 1).is_none_or(|next| level <= next.0) {
            break;
        }
    }
    level
}

#[derive(Default)]
struct Water {
    floors: Vec<(f64, f64)>,
    /// (time after one more row, node, index), the earliest first.
    next: BinaryHeap<Reverse<(u64, u32, usize)>>,
}

impl Water {
    /// Pours one expert anew on what is there without it. True if it changed.
    fn pour(
        &mut self,
        rows: u32,
        nodes: &[u32],
        queues: &[Queue],
        depth: &mut [u64],
        shares: &mut [u32],
    ) -> bool {
        self.floors.clear();
        for (&node, &share) in nodes.iter().zip(shares.iter()) {
            let depth = &mut depth[node as usize];
            *depth -= u64::from(share).min(*depth);
            let queue = &queues[node as usize];
            self.floors.push((queue.end(*depth), queue.capacity));
        }
        let level = level(f64::from(rows), &mut self.floors);
        let mut changed = false;
        let mut left = rows;
        self.next.clear();
        for (i, (&node, share)) in nodes.iter().zip(shares.iter_mut()).enumerate() {
            let (here, queue) = (depth[node as usize], &queues[node as usize]);
            let below = (level - queue.latency) * queue.capacity;
            // Whole rows only; rounding must never give out more than there are.
            let whole = (below - here as f64).floor().max(0.0) as u32;
            let whole = whole.min(left);
            left -= whole;
            changed |= *share != whole;
            *share = whole;
            depth[node as usize] = here.saturating_add(u64::from(whole));
            let after = queue.end(depth[node as usize].saturating_add(1));
            self.next.push(Reverse((after.to_bits(), node, i)));
        }
        while left > 0 {
            let Some(mut first) = self.next.peek_mut() else {
                break;
            };
            let (_, node, i) = first.0;
            left -= 1;
            shares[i] += 1;
            changed = true;
            let depth = &mut depth[node as usize];
            *depth = depth.saturating_add(1);
            let after = queues[node as usize].end(depth.saturating_add(1));
            first.0.0 = after.to_bits();
        }
        changed
    }
}
