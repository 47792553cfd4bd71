//! What a placement makes of one shot, searched or not.

use super::board::{Nodes, pour};
use super::{Layer, Split};

/// Rounds, at most, when a placement is scored and not searched.
const SCORE_ROUNDS: usize = 64;

/// Load over capacity of every node when one shot meets a layer as it stands.
pub(super) fn loads(nodes: &Nodes, layer: &Layer, rows: &[u64], split: Split) -> Vec<f64> {
    let mut homes: Vec<Vec<u32>> = vec![Vec::new(); rows.len()];
    for (node, slots) in (0u32..).zip(&layer.slots) {
        if nodes.live[node as usize] {
            for &expert in slots.iter().flatten() {
                homes[expert as usize].push(node);
            }
        }
    }
    if split == Split::Filled {
        homes.iter_mut().for_each(Vec::dedup);
    }
    let mut load = vec![0.0; nodes.live.len()];
    let mut share: Vec<Vec<f64>> = vec![Vec::new(); rows.len()];
    let mut floors = Vec::new();
    for ((homes, share), &rows) in homes.iter().zip(&mut share).zip(rows) {
        pour(
            nodes,
            Split::Even,
            rows as f64,
            homes,
            |_| 0.0,
            &mut floors,
            share,
        );
        for (&n, share) in homes.iter().zip(share.iter()) {
            load[n as usize] += share;
        }
    }
    let rounds = if split == Split::Filled {
        SCORE_ROUNDS
    } else {
        0
    };
    for _ in 0..rounds {
        for ((homes, share), &rows) in homes.iter().zip(&mut share).zip(rows) {
            if homes.len() > 1 {
                for (&n, share) in homes.iter().zip(share.iter()) {
                    load[n as usize] -= share;
                }
                pour(
                    nodes,
                    split,
                    rows as f64,
                    homes,
                    |n| load[n as usize],
                    &mut floors,
                    share,
                );
                for (&n, share) in homes.iter().zip(share.iter()) {
                    load[n as usize] += share;
                }
            }
        }
    }
    load.iter()
        .zip(&nodes.capacity)
        .map(|(l, c)| l / c)
        .collect()
}
