//! `guild experts ls`: who holds what.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use guild_proto::cluster::v1::ExpertLoadResponse;
use serde::Serialize;

use super::leader::Asking;
use super::print;
use crate::args::ExpertsLs;
use crate::command::{block_on, log_tool};
use crate::failure::Failure;

/// Experts of a list for people, at most.
const LISTED: usize = 16;

pub(super) fn run(args: &ExpertsLs) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let answer = block_on(async { Asking::at(&args.leader)?.load(None).await })?;
    let holdings = Holdings::of(&answer);
    if args.json {
        return print(&holdings);
    }
    let mut stdout = std::io::stdout();
    stdout.write_all(holdings.words().as_bytes())?;
    Ok(stdout.flush()?)
}

/// (layer, expert)
type Expert = (u32, u32);

/// What each node holds.
#[derive(Debug, Serialize)]
struct Holdings {
    epoch: u64,
    layers: Vec<u32>,
    experts: u32,
    nodes: Vec<Holder>,
    /// Number of experts by their number of copies.
    copies: BTreeMap<usize, usize>,
    /// Experts that are lost with one node.
    single: Vec<Expert>,
}

#[derive(Debug, Serialize)]
struct Holder {
    node: u32,
    name: String,
    /// Index in this list is the slot.
    slots: Vec<Expert>,
    /// Experts that nobody else holds.
    single: usize,
}

impl Holdings {
    fn of(answer: &ExpertLoadResponse) -> Holdings {
        let mut homes: BTreeMap<Expert, usize> = (answer.layers.iter())
            .flat_map(|&layer| (0..answer.experts).map(move |expert| ((layer, expert), 0)))
            .collect();
        for slot in answer.nodes.iter().flat_map(|node| &node.slots) {
            *homes.entry((slot.layer, slot.expert)).or_default() += 1;
        }
        let mut copies = BTreeMap::new();
        for &n in homes.values() {
            *copies.entry(n).or_default() += 1;
        }
        let nodes = answer.nodes.iter().map(|node| {
            let slots: Vec<Expert> = node.slots.iter().map(|s| (s.layer, s.expert)).collect();
            Holder {
                node: node.node_id,
                name: node.name.clone(),
                single: slots.iter().filter(|slot| homes[slot] == 1).count(),
                slots,
            }
        });
        Holdings {
            epoch: answer.epoch,
            layers: answer.layers.clone(),
            experts: answer.experts,
            nodes: nodes.collect(),
            copies,
            single: (homes.iter().filter(|(_, n)| **n == 1))
                .map(|(&expert, _)| expert)
                .collect(),
        }
    }

    fn words(&self) -> String {
        let mut out = String::new();
        // Writing into a string does not fail.
        if self.epoch == 0 {
            let _ = writeln!(out, "no placement is active");
            return out;
        }
        let _ = writeln!(
            out,
            "epoch {}: {} layers of {} experts on {} nodes",
            self.epoch,
            self.layers.len(),
            self.experts,
            self.nodes.len()
        );
        let wide = self.nodes.iter().map(|n| n.name.chars().count()).max();
        let wide = wide.unwrap_or(0).max(4);
        let _ = writeln!(
            out,
            "  {:>4}  {:<wide$}  {:>6}  {:>11}",
            "node", "name", "slots", "single-copy"
        );
        for node in &self.nodes {
            let _ = writeln!(
                out,
                "  {:>4}  {:<wide$}  {:>6}  {:>11}",
                node.node,
                node.name,
                node.slots.len(),
                node.single
            );
        }
        for (copies, experts) in &self.copies {
            let plural = if *copies == 1 { "copy" } else { "copies" };
            let _ = writeln!(out, "{experts} experts have {copies} {plural}");
        }
        if !self.single.is_empty() {
            let listed: Vec<String> = (self.single.iter().take(LISTED))
                .map(|(layer, expert)| format!("{layer}/{expert}"))
                .collect();
            let more = match self.single.len().saturating_sub(LISTED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            let _ = writeln!(
                out,
                "single copies (layer/expert): {}{more}",
                listed.join(" ")
            );
        }
        out
    }
}
