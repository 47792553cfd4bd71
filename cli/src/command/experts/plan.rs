//! `guild experts plan`: what the planner would have done with a recorded load.
//!
//! Every plan is made from the shots of one interval and scored on those of the
//! next: planner, EPLB made anew at each interval (and relabelled so that it
//! moves as little as it can), and the first layout left as it is.

use std::io::Write as _;

use guild_scheduler::load::{Shot, Trace, balancedness};
use guild_scheduler::planner::{
    self, Aim, Cluster, Layer, Node, PlanError, Policy, Split, fresh, node_loads, relabel,
};
use serde::{Deserialize, Serialize};

use super::read;
use crate::args::{ExpertsPlan, SplitArg};
use crate::command::log_tool;
use crate::failure::Failure;
use crate::json;
use crate::units;

/// First line of a trace.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    layers: Vec<u32>,
    experts: u32,
}

/// Every other line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    rows: Vec<Vec<u64>>,
}

/// One plan, or the mean over all of them.
#[derive(Default, Serialize)]
struct Outcome {
    /// Which one, from 1; None: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<usize>,
    /// Balancedness of the interval after, 1 is perfect: rows poured over homes by
    /// water-filling.
    balancedness: f64,
    eplb_balancedness: f64,
    unplanned_balancedness: f64,
    /// The same as EPLB reckons: rows shared evenly by homes.
    even_balancedness: f64,
    eplb_even_balancedness: f64,
    unplanned_even_balancedness: f64,
    bytes: u64,
    eplb_bytes: u64,
    /// Hot experts without a second home in another failure domain.
    unprotected: usize,
    /// Every move, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    moves: Vec<String>,
}

pub(super) fn run(args: &ExpertsPlan) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let trace = parse(&read(&args.trace, "--trace")?).map_err(|problem| {
        Failure::usage(format!("--trace: {}: {problem}", args.trace.display()))
    })?;
    let interval = usize::from(args.interval);
    let windows: Vec<Vec<&Shot>> = trace
        .shots
        .chunks_exact(interval)
        .map(|shots| shots.iter().collect())
        .collect();
    if windows.len() < 3 {
        return Err(Failure::usage(format!(
            "--trace: {} shots are fewer than three intervals of {interval}",
            trace.shots.len()
        ))
        .hint("give a longer trace or a smaller --interval"));
    }
    let aim = match args.split {
        SplitArg::Both => Aim::Both,
        SplitArg::Filled => Aim::Filled,
        SplitArg::Even => Aim::Even,
    };
    let policy = Policy {
        budget_bytes: args.budget.unwrap_or(u64::MAX),
        aim,
        ..Policy::default()
    };
    let refused = |error: PlanError| Failure::usage(error.to_string());

    // The first interval only says where everything is at the start.
    let unbounded = Policy {
        aim,
        ..Policy::default()
    };
    let mut ours = empty(args, &trace);
    ours.layers = planner::plan(&ours, &windows[0], &unbounded)
        .map_err(refused)?
        .layers;
    let unplanned = ours.clone();
    let mut eplb = ours.clone();
    let mut all = Outcome::default();
    let plans = windows.len() - 2;
    for (at, pair) in windows[1..].windows(2).enumerate() {
        let (seen, next) = (&pair[0], &pair[1]);
        let plan = planner::plan(&ours, seen, &policy).map_err(refused)?;
        ours.layers = plan.layers;
        let (layers, eplb_bytes) = by_eplb(&eplb, seen);
        eplb.layers = layers;
        let score = |cluster: &Cluster, split| score(cluster, next, split).map_err(refused);
        let filled = |cluster: &Cluster| score(cluster, Split::Filled);
        let even = |cluster: &Cluster| score(cluster, Split::Even);
        let outcome = Outcome {
            plan: Some(at + 1),
            balancedness: filled(&ours)?,
            eplb_balancedness: filled(&eplb)?,
            unplanned_balancedness: filled(&unplanned)?,
            even_balancedness: even(&ours)?,
            eplb_even_balancedness: even(&eplb)?,
            unplanned_even_balancedness: even(&unplanned)?,
            bytes: plan.bytes,
            eplb_bytes,
            unprotected: plan.unprotected.len(),
            moves: if args.explain {
                plan.moves.iter().map(ToString::to_string).collect()
            } else {
                Vec::new()
            },
        };
        all.balancedness += outcome.balancedness / plans as f64;
        all.eplb_balancedness += outcome.eplb_balancedness / plans as f64;
        all.unplanned_balancedness += outcome.unplanned_balancedness / plans as f64;
        all.even_balancedness += outcome.even_balancedness / plans as f64;
        all.eplb_even_balancedness += outcome.eplb_even_balancedness / plans as f64;
        all.unplanned_even_balancedness += outcome.unplanned_even_balancedness / plans as f64;
        all.bytes = all.bytes.saturating_add(outcome.bytes);
        all.eplb_bytes = all.eplb_bytes.saturating_add(outcome.eplb_bytes);
        all.unprotected = outcome.unprotected;
        outcome.show(args.json)?;
    }
    all.show(args.json)
}

impl Outcome {
    fn show(&self, json: bool) -> Result<(), Failure> {
        if json {
            return json::print(self);
        }
        let mut out = std::io::stdout().lock();
        for line in &self.moves {
            writeln!(out, "  {line}")?;
        }
        let name = self
            .plan
            .map_or_else(|| "all plans".to_owned(), |at| format!("plan {at}"));
        writeln!(
            out,
            "{name}: balancedness {:.4} (by an even split {:.4}) moving {}; EPLB {:.4} ({:.4}) moving {}; nothing moved {:.4} ({:.4})",
            self.balancedness,
            self.even_balancedness,
            units::bytes(self.bytes),
            self.eplb_balancedness,
            self.eplb_even_balancedness,
            units::bytes(self.eplb_bytes),
            self.unplanned_balancedness,
            self.unplanned_even_balancedness,
        )?;
        if self.unprotected > 0 {
            writeln!(
                out,
                "  {} hot experts have no second home in another failure domain",
                self.unprotected
            )?;
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<Trace, String> {
    let mut lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let (_, head) = lines.next().ok_or("is empty")?;
    let head: Head = serde_json::from_str(head).map_err(|error| format!("line 1: {error}"))?;
    let shots = lines
        .map(|(at, line)| {
            let line: Line =
                serde_json::from_str(line).map_err(|error| format!("line {}: {error}", at + 1))?;
            Ok(Shot { rows: line.rows })
        })
        .collect::<Result<_, String>>()?;
    let trace = Trace {
        layers: head.layers,
        experts: head.experts,
        shots,
    };
    trace.check().map_err(|error| error.to_string())?;
    Ok(trace)
}

fn empty(args: &ExpertsPlan, trace: &Trace) -> Cluster {
    let slots = args
        .slots
        .unwrap_or_else(|| trace.experts.div_ceil(args.nodes).saturating_add(1));
    let domains = args.domains.unwrap_or(args.nodes).min(args.nodes);
    let node = |id: u32| Node {
        id,
        capacity: 1.0,
        slots,
        // Neighbours fail together: 8 nodes in 2 domains are 0-3 and 4-7.
        domain: (u64::from(id) * u64::from(domains) / u64::from(args.nodes)) as u32,
        live: true,
    };
    let layer = |&layer: &u32| Layer {
        layer,
        slots: vec![Vec::new(); args.nodes as usize],
    };
    Cluster {
        nodes: (0..args.nodes).map(node).collect(),
        layers: trace.layers.iter().map(layer).collect(),
        experts: trace.experts,
        expert_bytes: args.expert_bytes,
    }
}

/// EPLB on the sum of the shots, and the bytes that it moves.
fn by_eplb(present: &Cluster, shots: &[&Shot]) -> (Vec<Layer>, u64) {
    let mut copies = 0;
    let layers = (present.layers.iter().enumerate())
        .map(|(at, layer)| {
            let sum = |e: usize| shots.iter().map(|s| s.rows[at][e] as f64).sum();
            let rows: Vec<f64> = (0..present.experts as usize).map(sum).collect();
            let slots = relabel(&present.nodes, &layer.slots, fresh(&present.nodes, &rows));
            for (had, has) in layer.slots.iter().zip(&slots) {
                copies += has
                    .iter()
                    .flatten()
                    .filter(|e| !had.contains(&Some(**e)))
                    .count() as u64;
            }
            Layer {
                layer: layer.layer,
                slots,
            }
        })
        .collect();
    (layers, copies.saturating_mul(present.expert_bytes))
}

fn score(cluster: &Cluster, shots: &[&Shot], split: Split) -> Result<f64, PlanError> {
    let mut sum = 0.0;
    for shot in shots {
        sum += balancedness(&node_loads(cluster, shot, split)?).unwrap_or(1.0);
    }
    Ok(sum / shots.len() as f64)
}
