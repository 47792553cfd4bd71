//! `guild experts ls`: who holds what.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use guild_proto::cluster::v1::{ExpertLoadResponse, NodeStatus, Role, StatusResponse};
use serde::Serialize;

use super::leader::Asking;
use crate::args::ExpertsLs;
use crate::command::{block_on, log_tool};
use crate::failure::Failure;
use crate::json;
use crate::units::{bytes, count};

/// Experts of a list for people, at most.
const LISTED: usize = 16;

pub(super) fn run(args: &ExpertsLs) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let holdings = block_on(async {
        let mut leader = Asking::at(&args.leader)?;
        Ok(Holdings::of(
            &leader.load(None).await?,
            &leader.status().await?,
        ))
    })?;
    if args.json {
        return json::print(&holdings);
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
    /// Homes that every expert is to have, and those that every one has.
    replicas_wanted: u32,
    replicas: u32,
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
    ready: bool,
    /// Why not.
    reason: String,
    /// Experts are being moved off it, or it is about to leave.
    draining: bool,
    /// Measured; None: not known yet.
    rows_per_second: Option<f64>,
    /// Experts in memory, those of every epoch.
    resident_bytes: u64,
    /// What further experts may take; None: not known.
    free_bytes: Option<u64>,
}

impl Holdings {
    fn of(answer: &ExpertLoadResponse, status: &StatusResponse) -> Holdings {
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
        let holder = |id: u32, name: &str, slots: Vec<Expert>| {
            let said = status.nodes.iter().find(|node| node.node_id == id);
            let gone = NodeStatus {
                reason: "is no member any more".to_owned(),
                ..NodeStatus::default()
            };
            let said = said.unwrap_or(&gone);
            Holder {
                node: id,
                name: name.to_owned(),
                single: slots.iter().filter(|slot| homes[slot] == 1).count(),
                slots,
                ready: said.ready,
                reason: said.reason.clone(),
                draining: said.draining,
                rows_per_second: Some(said.rows_per_second).filter(|rate| *rate > 0.0),
                resident_bytes: said.resident_bytes,
                free_bytes: said.free_bytes,
            }
        };
        let mut nodes: Vec<Holder> = (answer.nodes.iter())
            .map(|node| {
                let slots = node.slots.iter().map(|s| (s.layer, s.expert)).collect();
                holder(node.node_id, &node.name, slots)
            })
            .collect();
        // Those that hold nothing have a line as well.
        for node in &status.nodes {
            let known = nodes.iter().any(|holder| holder.node == node.node_id);
            if node.role() == Role::Expert && !known {
                nodes.push(holder(node.node_id, &node.name, Vec::new()));
            }
        }
        Holdings {
            epoch: answer.epoch,
            layers: answer.layers.clone(),
            experts: answer.experts,
            replicas_wanted: status.replicas_wanted,
            replicas: status.replicas,
            nodes,
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
            "  {:>4}  {:<wide$}  {:>6}  {:>11}  {:>9}  {:>9}  {:>9}  state",
            "node", "name", "slots", "single-copy", "rows/s", "resident", "free"
        );
        for node in &self.nodes {
            let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let _ = writeln!(
                out,
                "  {:>4}  {:<wide$}  {:>6}  {:>11}  {:>9}  {:>9}  {:>9}  {}",
                node.node,
                node.name,
                node.slots.len(),
                node.single,
                known(node.rows_per_second.map(|rate| count(rate as u64))),
                bytes(node.resident_bytes),
                known(node.free_bytes.map(bytes)),
                node.state()
            );
        }
        let _ = writeln!(
            out,
            "every expert has {} of {} homes",
            self.replicas, self.replicas_wanted
        );
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

impl Holder {
    fn state(&self) -> &str {
        match (self.draining, self.ready, self.reason.as_str()) {
            (true, ..) => "draining",
            (false, true, _) => "ready",
            (false, false, "") => "not ready",
            (false, false, reason) => reason,
        }
    }
}
