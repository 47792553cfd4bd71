//! A layer laid out anew, whatever it was: the cold start and the fallback.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Node;
use crate::eplb::{Shape, rebalance};

/// Lays out one layer on the live nodes: by EPLB (global) where they are alike,
/// with second copies on one node left out; else by falling load per replica,
/// each on the node with the lowest load over capacity. `rows` are the loads of
/// the experts. Returns the experts in the slots of every node; with room for
/// all experts on the live nodes every expert has a home.
pub fn fresh(nodes: &[Node], rows: &[f64]) -> Vec<Vec<Option<u32>>> {
    let live: Vec<usize> = (0..nodes.len()).filter(|&n| nodes[n].live).collect();
    let mut layout = vec![Vec::new(); nodes.len()];
    let alike = live.windows(2).all(|w| {
        let (a, b) = (&nodes[w[0]], &nodes[w[1]]);
        a.slots == b.slots && a.capacity == b.capacity
    });
    let slots = live.first().map_or(0, |&n| nodes[n].slots as usize);
    let shape = Shape {
        num_replicas: slots * live.len(),
        num_groups: 1,
        num_nodes: 1,
        num_gpus: live.len(),
    };
    let weight: Vec<f32> = rows.iter().map(|&r| r as f32).collect();
    match rebalance(&[weight], shape) {
        Ok(plan) if alike => {
            for (&n, held) in live.iter().zip(plan.phy2log(0).chunks(slots)) {
                let mut seen: Vec<u32> = held.to_vec();
                seen.sort_unstable();
                seen.dedup();
                layout[n] = seen.into_iter().map(Some).collect();
            }
        }
        _ => by_falling_load(nodes, &live, rows, &mut layout),
    }
    for (held, node) in layout.iter_mut().zip(nodes) {
        held.resize(if node.live { node.slots as usize } else { 0 }, None);
    }
    layout
}

fn by_falling_load(nodes: &[Node], live: &[usize], rows: &[f64], layout: &mut [Vec<Option<u32>>]) {
    let bits = |load: f64| load.max(0.0).to_bits();
    let room: usize = live
        .iter()
        .map(|&n| (nodes[n].slots as usize).min(rows.len()))
        .sum();
    let mut count = vec![1usize; rows.len()];
    let mut hottest: BinaryHeap<(u64, Reverse<usize>)> = rows
        .iter()
        .enumerate()
        .map(|(e, &r)| (bits(r), Reverse(e)))
        .collect();
    for _ in rows.len()..room {
        let Some((_, Reverse(e))) = hottest.pop() else {
            break;
        };
        count[e] += 1;
        if count[e] < live.len() {
            hottest.push((bits(rows[e] / count[e] as f64), Reverse(e)));
        }
    }
    let mut order: Vec<usize> = (0..rows.len()).collect();
    let share = |e: usize| rows[e] / count[e] as f64;
    order.sort_by(|&a, &b| share(b).total_cmp(&share(a)));
    // First homes before further ones, so that none is left without.
    let first = order.iter().map(|&e| (e, 1));
    let more = order.iter().map(|&e| (e, count[e] - 1));
    let mut load = vec![0.0; nodes.len()];
    for (e, copies) in first.chain(more) {
        for _ in 0..copies {
            let after = |n: usize| (load[n] + share(e)) / nodes[n].capacity;
            let open = live.iter().copied().filter(|&n| {
                layout[n].len() < nodes[n].slots as usize && !layout[n].contains(&Some(e as u32))
            });
            let Some(n) = open.min_by(|&a, &b| after(a).total_cmp(&after(b))) else {
                break;
            };
            load[n] += share(e);
            layout[n].push(Some(e as u32));
        }
    }
}

/// Gives the rows of a fresh layout to the nodes so that as many experts as
/// possible stay where they are. Only like live nodes exchange theirs.
pub fn relabel(
    nodes: &[Node],
    present: &[Vec<Option<u32>>],
    layout: Vec<Vec<Option<u32>>>,
) -> Vec<Vec<Option<u32>>> {
    let live: Vec<usize> = (0..nodes.len()).filter(|&n| nodes[n].live).collect();
    let top = layout
        .iter()
        .flatten()
        .flatten()
        .max()
        .map_or(0, |&e| e as usize + 1);
    let mut on = vec![false; top];
    let cost: Vec<Vec<i64>> = (live.iter())
        .map(|&n| {
            on.fill(false);
            for &e in present[n].iter().flatten() {
                if let Some(on) = on.get_mut(e as usize) {
                    *on = true;
                }
            }
            let overlap = |l: usize| {
                let alike =
                    nodes[l].slots == nodes[n].slots && nodes[l].capacity == nodes[n].capacity;
                let stay = layout[l]
                    .iter()
                    .flatten()
                    .filter(|&&e| on[e as usize])
                    .count();
                if alike { -(stay as i64) } else { 1 << 40 }
            };
            live.iter().map(|&l| overlap(l)).collect()
        })
        .collect();
    let mut given: Vec<Vec<Option<u32>>> = vec![Vec::new(); nodes.len()];
    for (&n, l) in live.iter().zip(assign(&cost)) {
        given[n] = layout[live[l]].clone();
    }
    given
}

/// The assignment of rows to columns of lowest cost (Kuhn 1955, with potentials,
/// O(n^3)). Returns the column of each row of a square matrix.
fn assign(cost: &[Vec<i64>]) -> Vec<usize> {
    let n = cost.len();
    // Row and column 0 are the virtual start; `owner[c]` is the row of column c.
    let (mut u, mut v) = (vec![0i64; n + 1], vec![0i64; n + 1]);
    let mut owner = vec![0usize; n + 1];
    for row in 1..=n {
        owner[0] = row;
        let mut column = 0;
        let mut slack = vec![i64::MAX; n + 1];
        let mut before = vec![0usize; n + 1];
        let mut done = vec![false; n + 1];
        while owner[column] != 0 {
            done[column] = true;
            let r = owner[column];
            let (mut delta, mut next) = (i64::MAX, 0);
            for c in 1..=n {
                if done[c] {
                    continue;
                }
                let reduced = cost[r - 1][c - 1] - u[r] - v[c];
                if reduced < slack[c] {
                    slack[c] = reduced;
                    before[c] = column;
                }
                if slack[c] < delta {
                    delta = slack[c];
                    next = c;
                }
            }
            for c in 0..=n {
                if done[c] {
                    u[owner[c]] += delta;
                    v[c] -= delta;
                } else if slack[c] != i64::MAX {
                    slack[c] -= delta;
                }
            }
            column = next;
        }
        while column != 0 {
            let from = before[column];
            owner[column] = owner[from];
            column = from;
        }
    }
    let mut columns = vec![0; n];
    for c in 1..=n {
        columns[owner[c] - 1] = c - 1;
    }
    columns
}
