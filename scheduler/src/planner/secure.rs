//! Before balance: every expert has as many live homes as it is to have.

use super::board::{Board, Edit, Step};
use super::{Node, Policy, Reason, fresh};

/// Gives every expert without a live home one, the most loaded first, whatever
/// the budget. In a layer without any live home the placement is a fresh one,
/// and its further replicas are made as far as the budget goes. Returns what is
/// left of it, in copies.
pub(super) fn rehome(board: &mut Board, nodes: &[Node], budget: usize) -> usize {
    let mut lost: Vec<u32> = (0u32..)
        .zip(&board.homes)
        .filter_map(|(e, homes)| homes.is_empty().then_some(e))
        .collect();
    let rows = &board.rows[0];
    lost.sort_by(|&a, &b| rows[b as usize].total_cmp(&rows[a as usize]));
    if lost.len() == board.homes.len() {
        return start(board, nodes, &lost, budget);
    }
    for expert in lost {
        let come = |to: u32| Edit {
            expert,
            from: None,
            to: Some(to),
        };
        let free: Vec<u32> = board.nodes.live().filter(|&n| board.has_room(n)).collect();
        let steps: Vec<Step> = if free.is_empty() {
            spares(board, None)
                .map(|leave| Step([leave.from.map(come), Some(leave), None]))
                .collect()
        } else {
            free.into_iter()
                .map(|n| Step([Some(come(n)), None, None]))
                .collect()
        };
        if let Some(step) = best(board, steps) {
            take(board, &step, Reason::Lost, 0.0);
        }
    }
    budget
}

fn start(board: &mut Board, nodes: &[Node], by_load: &[u32], budget: usize) -> usize {
    // What takes nothing holds nothing of such a layer.
    let nodes: Vec<Node> = (nodes.iter().zip(&board.nodes.open))
        .map(|(node, &live)| Node {
            live,
            ..node.clone()
        })
        .collect();
    let layout = fresh::fresh(&nodes, &board.rows[0]);
    let mut targets: Vec<Vec<u32>> = vec![Vec::new(); board.homes.len()];
    for (node, held) in (0u32..).zip(&layout) {
        for &expert in held.iter().flatten() {
            targets[expert as usize].push(node);
        }
    }
    let mut left = budget;
    let first = by_load
        .iter()
        .filter_map(|&e| Some((e, *targets[e as usize].first()?, Reason::Lost)));
    let more = by_load.iter().flat_map(|&e| {
        let rest = targets[e as usize].iter().skip(1);
        rest.map(move |&n| (e, n, Reason::Fresh))
    });
    for (expert, node, reason) in first.chain(more) {
        if reason == Reason::Fresh {
            if left == 0 {
                break;
            }
            left -= 1;
        }
        board.homes[expert as usize].push(node);
        board.held[node as usize].push(expert);
        board.why.insert((node, expert), (reason, 0.0));
    }
    board
        .homes
        .iter_mut()
        .for_each(|homes| homes.sort_unstable());
    board.settle();
    left
}

/// Gives every expert as many homes as it is to have, as far as there are nodes
/// and room, whatever the budget; the most loaded first, each time to another
/// failure domain if it has one only.
pub(super) fn replicate(board: &mut Board) {
    let most = board.nodes.live().count();
    let mut short: Vec<u32> = (0u32..)
        .zip(&board.homes)
        .filter_map(|(e, homes)| (homes.len() < board.nodes.min_homes.min(most)).then_some(e))
        .collect();
    let rows = &board.rows[0];
    short.sort_by(|&a, &b| rows[b as usize].total_cmp(&rows[a as usize]));
    for expert in short {
        while board.homes[expert as usize].len() < board.nodes.min_homes.min(most) {
            let apart = another_home(board, expert, usize::MAX, true);
            let Some(step) = apart.or_else(|| another_home(board, expert, usize::MAX, false))
            else {
                break;
            };
            take(board, &step, Reason::Replica, 0.0);
        }
    }
}

/// Moves a home of every expert whose homes are all of one failure domain to
/// another one, if it is to have two, into free slots, while the budget lasts.
pub(super) fn part(board: &mut Board, budget: &mut usize) {
    if board.nodes.min_homes < 2 || board.spans(board.nodes.live()) < 2 {
        return;
    }
    for expert in 0..board.homes.len() as u32 {
        let homes = board.homes[expert as usize].clone();
        if *budget == 0 || homes.len() < 2 || board.spans(homes.iter().copied()) > 1 {
            continue;
        }
        let away = |n: &u32| board.spans(homes.iter().copied().chain([*n])) > 1;
        let targets: Vec<u32> = (board.nodes.live())
            .filter(|n| board.has_room(*n) && away(n))
            .collect();
        let moves = homes.iter().flat_map(|&from| {
            targets.iter().map(move |&to| Edit {
                expert,
                from: Some(from),
                to: Some(to),
            })
        });
        let steps = moves.map(|edit| Step([Some(edit), None, None])).collect();
        if let Some(step) = best(board, steps) {
            *budget -= step.copies();
            take(board, &step, Reason::Replica, 0.0);
        }
    }
}

/// Marks the hot experts and gives each a second home in another failure domain
/// (on another node, where all live nodes are of one domain), the most loaded
/// first, while the budget lasts. Returns (board, expert) of those left alone.
pub(super) fn protect(
    boards: &mut [Board],
    policy: &Policy,
    budget: &mut usize,
) -> Vec<(usize, u32)> {
    let mut bare = Vec::new();
    for (at, board) in boards.iter_mut().enumerate() {
        let mean = board.rows[0].iter().sum::<f64>() / board.rows[0].len() as f64;
        for expert in 0..board.homes.len() {
            let rows = board.rows[0][expert];
            board.hot[expert] = rows > 0.0 && rows >= policy.hot * mean;
            if board.hot[expert] && !is_safe(board, expert as u32) {
                bare.push((rows / mean, at, expert as u32));
            }
        }
    }
    bare.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut left = Vec::new();
    for (_, at, expert) in bare {
        match another_home(&mut boards[at], expert, *budget, true) {
            Some(step) => {
                *budget -= step.copies();
                take(&mut boards[at], &step, Reason::Hot, 0.0);
            }
            None => left.push((at, expert)),
        }
    }
    left.sort_unstable();
    left
}

fn is_safe(board: &Board, expert: u32) -> bool {
    let homes = &board.homes[expert as usize];
    let all = board.spans(board.nodes.live());
    homes.len() >= 2 && board.spans(homes.iter().copied()) >= all || board.nodes.live().count() < 2
}

/// The best way to one more home; `apart`: so that there are two failure domains.
fn another_home(board: &mut Board, expert: u32, budget: usize, apart: bool) -> Option<Step> {
    if budget == 0 {
        return None;
    }
    let homes = board.homes[expert as usize].clone();
    let apart = apart && board.spans(board.nodes.live()) > 1;
    let fits = |board: &Board, n: u32| {
        !homes.contains(&n) && (!apart || board.spans(homes.iter().copied().chain([n])) > 1)
    };
    let come = |to: u32| Edit {
        expert,
        from: None,
        to: Some(to),
    };
    let live: Vec<u32> = board.nodes.live().collect();
    let targets: Vec<u32> = live.iter().copied().filter(|&n| fits(board, n)).collect();
    let free = targets.iter().filter(|&&n| board.has_room(n));
    let mut steps: Vec<Step> = free.map(|&n| Step([Some(come(n)), None, None])).collect();
    for &n in &targets {
        steps.extend(spares(board, Some(n)).map(|leave| Step([Some(come(n)), Some(leave), None])));
    }
    if steps.is_empty() && budget >= 2 {
        steps = make_room(board, &targets, expert)
            .into_iter()
            .map(|(n, away, drop)| Step([Some(come(n)), Some(away), drop]))
            .collect();
    }
    best(board, steps)
}

/// Ways to free a slot on one of `targets` when all is full there: an expert
/// goes elsewhere, into a free slot or in place of a spare replica.
fn make_room(board: &Board, targets: &[u32], hot: u32) -> Vec<(u32, Edit, Option<Edit>)> {
    let mut ways = Vec::new();
    let mut elsewhere: Vec<(u32, Option<Edit>)> = board
        .nodes
        .live()
        .filter(|&n| board.has_room(n))
        .map(|n| (n, None))
        .collect();
    elsewhere.extend(spares(board, None).filter_map(|leave| Some((leave.from?, Some(leave)))));
    for &n in targets {
        for &expert in &board.held[n as usize] {
            for &(to, drop) in &elsewhere {
                let away = Edit {
                    expert,
                    from: Some(n),
                    to: Some(to),
                };
                let apart = drop.is_none_or(|d| d.expert != expert && d.expert != hot);
                if to != n && apart && !board.holds(to, expert) && board.allows(away) {
                    ways.push((n, away, drop));
                }
            }
        }
    }
    ways
}

/// Replicas that may go: those of one node, or all.
pub(super) fn spares(board: &Board, node: Option<u32>) -> impl Iterator<Item = Edit> {
    let nodes =
        (0..board.held.len() as u32).filter(move |&n| node.is_none_or(|wanted| wanted == n));
    nodes.flat_map(move |from| {
        let held = board.held[from as usize].iter();
        held.filter_map(move |&expert| {
            let edit = Edit {
                expert,
                from: Some(from),
                to: None,
            };
            board.allows(edit).then_some(edit)
        })
    })
}

/// The step with the lowest penalty, in the mean of the shots; the first of equals.
fn best(board: &mut Board, steps: Vec<Step>) -> Option<Step> {
    let mut best: Option<(Step, f64)> = None;
    for step in steps {
        if !board.is_open(&step) {
            continue;
        }
        let delta = board.delta(&step, 0..board.means());
        if best.is_none_or(|(_, lowest)| delta < lowest) {
            best = Some((step, delta));
        }
    }
    best.map(|(step, _)| step)
}

/// Makes a step and notes why.
pub(super) fn take(board: &mut Board, step: &Step, reason: Reason, gain: f64) {
    board.apply(step);
    for edit in step.edits() {
        if let Some(from) = edit.from {
            board.why.remove(&(from, edit.expert));
        }
        if let Some(to) = edit.to {
            board.why.insert((to, edit.expert), (reason, gain));
        }
    }
}
