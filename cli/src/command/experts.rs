//! `guild experts`: the layout and the load of the experts, of a cluster and from files.

use std::io::Read as _;
use std::path::Path;

use guild_scheduler::eplb::{self, Shape};
use serde::Serialize;
use serde_json::Value;

use super::log_tool;
use crate::args::{Experts, ExpertsCommand, ExpertsEplb};
use crate::failure::Failure;
use crate::json;

mod drain;
mod heat;
mod leader;
mod ls;
mod plan;
mod progress;
mod rebalance;
mod record;
mod watch;

/// Bytes of an input file, at most.
const MAX_INPUT_BYTES: u64 = 256 << 20;

pub(crate) fn run(args: &Experts) -> Result<(), Failure> {
    match &args.command {
        ExpertsCommand::Ls(args) => ls::run(args),
        ExpertsCommand::Load(args) => heat::run(args),
        ExpertsCommand::Record(args) => record::run(args),
        ExpertsCommand::Eplb(args) => by_eplb(args),
        ExpertsCommand::Plan(args) => plan::run(args),
        ExpertsCommand::Rebalance(args) => rebalance::run(args),
        ExpertsCommand::Drain(args) => drain::run(args),
        ExpertsCommand::Watch(args) => watch::run(args),
    }
}

/// The maps of all layers, as the published function returns them without padding.
#[derive(Serialize)]
struct Maps<'a> {
    /// [layers, replicas]
    phy2log: Vec<&'a [u32]>,
    /// [layers, experts, copies]
    log2phy: Vec<Vec<&'a [u32]>>,
    /// [layers, experts]
    logcnt: Vec<&'a [u32]>,
}

fn by_eplb(args: &ExpertsEplb) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let text = read(&args.input, "--input")?;
    let wrong = |message: String| {
        let file = args.input.display();
        Failure::usage(format!("--input: {file}: {message}"))
    };
    let input: Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
    let count = |field: &str| count(&input, field).map_err(wrong);
    let weight = weight(&input).map_err(wrong)?;
    let shape = Shape {
        num_replicas: count("num_replicas")?,
        num_groups: count("num_groups")?,
        num_nodes: count("num_nodes")?,
        num_gpus: count("num_gpus")?,
    };
    let plan = eplb::rebalance(&weight, shape).map_err(|error| wrong(error.to_string()))?;
    let layers = 0..plan.layers();
    json::print(&Maps {
        phy2log: layers.clone().map(|layer| plan.phy2log(layer)).collect(),
        log2phy: layers
            .clone()
            .map(|layer| plan.log2phy(layer).collect())
            .collect(),
        logcnt: layers.map(|layer| plan.logcnt(layer)).collect(),
    })
}

fn count(input: &Value, field: &str) -> Result<usize, String> {
    let value = input
        .get(field)
        .ok_or_else(|| format!("{field}: is missing"))?;
    let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
    count.ok_or_else(|| format!("{field}: {} is not a count", brief(value)))
}

fn weight(input: &Value) -> Result<Vec<Vec<f32>>, String> {
    let rows = input.get("weight").ok_or("weight: is missing")?;
    let rows = rows
        .as_array()
        .ok_or_else(|| format!("weight: {} is not a list of layers", brief(rows)))?;
    let row = |(layer, row): (usize, &Value)| {
        let loads = row
            .as_array()
            .ok_or_else(|| format!("weight[{layer}]: {} is not a list of loads", brief(row)))?;
        let load = |(expert, load): (usize, &Value)| {
            let number = load.as_f64().map(|n| n as f32);
            number
                .ok_or_else(|| format!("weight[{layer}][{expert}]: {} is not a load", brief(load)))
        };
        loads.iter().enumerate().map(load).collect()
    };
    rows.iter().enumerate().map(row).collect()
}

/// As much of a value as fits into a sentence.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Reads a file of the user's; `-` is stdin.
fn read(path: &Path, flag: &str) -> Result<String, Failure> {
    let wrong = |problem: String| Failure::usage(format!("{flag}: {}: {problem}", path.display()));
    let mut text = String::new();
    let read = |source: &mut dyn std::io::Read, text: &mut String| {
        source.take(MAX_INPUT_BYTES + 1).read_to_string(text)
    };
    let bytes = if path == Path::new("-") {
        read(&mut std::io::stdin(), &mut text)
    } else {
        std::fs::File::open(path).and_then(|mut file| read(&mut file, &mut text))
    };
    let bytes = bytes.map_err(|error| wrong(error.to_string()))?;
    if bytes as u64 > MAX_INPUT_BYTES {
        return Err(wrong(format!("more than {MAX_INPUT_BYTES} bytes")));
    }
    Ok(text)
}
