//! A batch: taken apart into one part per node, put together again from the
//! answers. The checks here are the same for every leaf.

use std::{collections::HashMap, fmt, time::Instant};

use bytes::Bytes;
use guild_proto::{frame, limits::F32_BYTES};
use tokio::sync::oneshot;
use tokio::time;

use crate::{ExchangeCode, ExchangeError, NodeId, rows};

/// One row to one slot of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment {
    /// Index of the row in the batch.
    pub row: u32,
    /// The node that has the slot.
    pub node: NodeId,
    /// The slot, by the numbering of that node at the epoch of the batch.
    pub slot: u32,
}

/// Rows, and where each of them goes.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The placement that the assignments were resolved by.
    pub epoch: u64,
    /// Elements in a row.
    pub width: usize,
    /// `[n, width]`, row-major.
    pub rows: &'a [f32],
    /// What to compute; a row may go to any number of slots.
    pub assignments: &'a [Assignment],
    /// The answer is of no use after this.
    pub deadline: Option<Instant>,
}

/// The rows that came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Returned {
    /// Elements in a row.
    pub width: usize,
    /// `[assignments, width]`: one row per assignment, in their order.
    pub rows: Vec<f32>,
    /// When the last of them was here. Whoever waits may have been busy since.
    pub arrived: time::Instant,
}

/// The part of a batch that goes to one node.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) node: NodeId,
    /// Batch rows that the node needs, each once.
    rows: Vec<u32>,
    /// Slots in the order of their first assignment, each with indices into `rows`.
    pub(crate) slots: Vec<(u32, Vec<u32>)>,
    /// For each row of the answer, the assignment it belongs to.
    targets: Vec<u32>,
}

impl Part {
    /// The rows that the node needs, `[n, width]`.
    pub(crate) fn gather(&self, batch: &Batch<'_>) -> Vec<f32> {
        let width = batch.width;
        let mut gathered = Vec::with_capacity(self.rows.len() * width);
        for &row in &self.rows {
            let start = row as usize * width;
            gathered.extend_from_slice(&batch.rows[start..start + width]);
        }
        gathered
    }

    /// Rows of the answer.
    pub(crate) fn pairs(&self) -> usize {
        self.targets.len()
    }

    /// Bytes of rows in the message and in its answer.
    pub(crate) fn bytes(&self, width: usize) -> (usize, usize) {
        let row = width * F32_BYTES;
        (self.rows.len() * row, self.pairs() * row)
    }

    /// Fails unless this part and its answer each fit one message.
    pub(crate) fn check(
        &self,
        width: usize,
        max_payload_bytes: usize,
    ) -> Result<(), (ExchangeCode, String)> {
        frame::check_shape(width, self.rows.len(), self.slots.len(), self.pairs())
            .map_err(|error| (ExchangeCode::TooLarge, error.to_string()))?;
        let (out, back) = self.bytes(width);
        let largest = out.max(back);
        if largest > max_payload_bytes {
            return Err((
                ExchangeCode::TooLarge,
                format!(
                    "{out} bytes of rows out and {back} back do not fit messages of \
                     {max_payload_bytes} bytes; send smaller batches"
                ),
            ));
        }
        Ok(())
    }
}

/// Groups the assignments of a batch by node, nodes in the order of their first
/// assignment. The error is a description of what is wrong with the batch.
pub(crate) fn split(batch: &Batch<'_>) -> Result<Vec<Part>, String> {
    let width = batch.width;
    if batch.assignments.is_empty() {
        return Ok(Vec::new());
    }
    if width == 0 || !batch.rows.len().is_multiple_of(width) {
        return Err(format!(
            "{} elements are not a whole number of rows of width {width}",
            batch.rows.len()
        ));
    }
    let num_rows = batch.rows.len() / width;
    if u32::try_from(batch.assignments.len()).is_err() {
        return Err(format!("{} assignments", batch.assignments.len()));
    }

    struct Building {
        part: Part,
        /// Batch row -> index in the part, `NONE` while it has none.
        index_of: Vec<u32>,
        slot_at: HashMap<u32, usize>,
        targets: Vec<Vec<u32>>,
    }
    const NONE: u32 = u32::MAX;
    let mut building: Vec<Building> = Vec::new();
    let mut node_at: HashMap<NodeId, usize> = HashMap::new();

    for (target, assignment) in batch.assignments.iter().enumerate() {
        let Assignment { row, node, slot } = *assignment;
        if row as usize >= num_rows {
            return Err(format!(
                "assignment {target} names row {row}, but the batch holds {num_rows} rows"
            ));
        }
        let at = *node_at.entry(node).or_insert_with(|| {
            building.push(Building {
                part: Part {
                    node,
                    rows: Vec::new(),
                    slots: Vec::new(),
                    targets: Vec::new(),
                },
                index_of: vec![NONE; num_rows],
                slot_at: HashMap::new(),
                targets: Vec::new(),
            });
            building.len() - 1
        });
        let Building {
            part,
            index_of,
            slot_at,
            targets,
        } = &mut building[at];
        let index = &mut index_of[row as usize];
        if *index == NONE {
            *index = part.rows.len() as u32;
            part.rows.push(row);
        }
        let slot_index = *slot_at.entry(slot).or_insert_with(|| {
            part.slots.push((slot, Vec::new()));
            targets.push(Vec::new());
            targets.len() - 1
        });
        part.slots[slot_index].1.push(*index);
        targets[slot_index].push(target as u32);
    }
    Ok(building
        .into_iter()
        .map(|Building { part, targets, .. }| Part {
            targets: targets.concat(),
            ..part
        })
        .collect())
}

/// A dispatch that is under way. Dropping it gives up the answer.
#[must_use = "rows come back through `Fabric::combine`"]
#[derive(Debug)]
pub struct Handle {
    pub(crate) epoch: u64,
    pub(crate) width: usize,
    pub(crate) assignments: usize,
    pub(crate) deadline: Option<Instant>,
    pub(crate) parts: Vec<Awaited>,
}

/// The answer of one node, on its way.
#[derive(Debug)]
pub(crate) struct Awaited {
    pub(crate) peer: String,
    pub(crate) part: Part,
    pub(crate) reply: Reply,
}

#[derive(Debug)]
pub(crate) enum Reply {
    /// `[pairs, width]`, from this process.
    Here(Arrived<Vec<f32>>),
    /// `[pairs, width]` as bytes, from a stream that checks them.
    Away(oneshot::Receiver<Arrived<Bytes>>),
}

/// What a node has answered, and when.
#[derive(Debug)]
pub(crate) struct Arrived<T> {
    rows: Result<T, ExchangeError>,
    at: time::Instant,
}

impl<T> Arrived<T> {
    pub(crate) fn now(rows: Result<T, ExchangeError>) -> Self {
        Self {
            rows,
            at: time::Instant::now(),
        }
    }
}

impl Handle {
    /// The nodes that owe an answer or have given it, each once.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.parts.iter().map(|awaited| awaited.part.node)
    }

    /// Waits for every part and puts the rows in the order of the assignments.
    pub(crate) async fn combined(self) -> Result<Returned, ExchangeError> {
        let width = self.width;
        let mut out = vec![0.0; self.assignments * width];
        let mut arrived: Option<time::Instant> = None;
        for Awaited { peer, part, reply } in self.parts {
            let Part { targets, slots, .. } = part;
            let fail = |code, message: String| {
                Err(ExchangeError::new(
                    code,
                    peer.as_str(),
                    format!("{}: {message}", Place::new(self.epoch, &slots)),
                ))
            };
            let bytes;
            let answer: &[u8] = match reply {
                Reply::Here(Arrived { rows, at }) => {
                    let rows = rows?;
                    arrived = arrived.max(Some(at));
                    if rows.len() != targets.len() * width {
                        return fail(
                            ExchangeCode::Malformed,
                            wrong_count(rows.len(), &targets, width),
                        );
                    }
                    for (row, &target) in rows.chunks_exact(width).zip(&targets) {
                        let at = target as usize * width;
                        out[at..at + width].copy_from_slice(row);
                    }
                    continue;
                }
                Reply::Away(answer) => {
                    let answer = match self.deadline {
                        None => answer.await,
                        Some(deadline) => {
                            match tokio::time::timeout_at(deadline.into(), answer).await {
                                Ok(answer) => answer,
                                Err(_) => {
                                    return fail(
                                        ExchangeCode::Deadline,
                                        "no answer in time".to_owned(),
                                    );
                                }
                            }
                        }
                    };
                    match answer {
                        Ok(Arrived { rows, at }) => {
                            bytes = rows?;
                            arrived = arrived.max(Some(at));
                        }
                        Err(_) => {
                            return fail(
                                ExchangeCode::Unreachable,
                                "the link was closed".to_owned(),
                            );
                        }
                    }
                    &bytes
                }
            };
            if answer.len() != targets.len() * width * F32_BYTES {
                let elements = answer.len() / F32_BYTES;
                return fail(
                    ExchangeCode::Malformed,
                    wrong_count(elements, &targets, width),
                );
            }
            for (row, &target) in answer.chunks_exact(width * F32_BYTES).zip(&targets) {
                let at = target as usize * width;
                rows::copy_from_wire(&mut out[at..at + width], row);
            }
        }
        Ok(Returned {
            width,
            rows: out,
            arrived: arrived.unwrap_or_else(time::Instant::now),
        })
    }
}

fn wrong_count(elements: usize, targets: &[u32], width: usize) -> String {
    format!(
        "{elements} elements came back for {} rows of width {width}",
        targets.len()
    )
}

/// Slots that a message names; of others it tells how many there are.
const SHOWN: usize = 4;

/// What work is for, as messages say it. Most work goes well, and nothing is written of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    epoch: u64,
    /// As many as there are.
    first: [u32; SHOWN],
    slots: usize,
}

impl Place {
    pub(crate) fn new(epoch: u64, slots: &[(u32, Vec<u32>)]) -> Place {
        let mut first = [0; SHOWN];
        for (first, (slot, _)) in first.iter_mut().zip(slots) {
            *first = *slot;
        }
        Place {
            epoch,
            first,
            slots: slots.len(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}, slots ", self.epoch)?;
        for (at, slot) in self.first.iter().take(self.slots).enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            write!(f, "{comma}{slot}")?;
        }
        match self.slots.saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assign(row: u32, node: NodeId, slot: u32) -> Assignment {
        Assignment { row, node, slot }
    }

    #[test]
    fn a_row_travels_once_to_each_of_its_nodes() {
        let rows = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let assignments = [
            assign(2, 7, 1),
            assign(2, 7, 0),
            assign(0, 9, 1),
            assign(0, 7, 1),
            assign(2, 9, 1),
        ];
        let batch = Batch {
            epoch: 1,
            width: 2,
            rows: &rows,
            assignments: &assignments,
            deadline: None,
        };
        let parts = split(&batch).expect("well formed");
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].node, 7);
        assert_eq!(parts[0].gather(&batch), [4.0, 5.0, 0.0, 1.0]);
        assert_eq!(parts[0].slots, [(1, vec![0, 1]), (0, vec![0])]);
        assert_eq!(parts[0].targets, [0, 3, 1]);
        assert_eq!(parts[1].node, 9);
        assert_eq!(parts[1].gather(&batch), [0.0, 1.0, 4.0, 5.0]);
        assert_eq!(parts[1].slots, [(1, vec![0, 1])]);
        assert_eq!(parts[1].targets, [2, 4]);
    }

    #[test]
    fn a_batch_that_does_not_hold_together_is_described() {
        let batch = Batch {
            epoch: 1,
            width: 2,
            rows: &[0.0; 3],
            assignments: &[assign(0, 0, 0)],
            deadline: None,
        };
        assert!(split(&batch).is_err_and(|e| e.contains("width 2")));
        let width_0 = Batch { width: 0, ..batch };
        assert!(split(&width_0).is_err_and(|e| e.contains("width 0")));
        let beyond = Batch {
            rows: &[0.0; 4],
            assignments: &[assign(2, 0, 0)],
            ..batch
        };
        assert!(split(&beyond).is_err_and(|e| e.contains("row 2")));
    }
}
