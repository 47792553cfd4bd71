//! `guild inspect --compare`: how far a quantised checkpoint is from what it was made from.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use guild_model::checkpoint::Dtype;
use guild_model::compare::{self, LogitError, WeightError};
use guild_model::text::Text;
use guild_model::{Checkpoint, Cpu};
use serde::Serialize;

use crate::args::Inspect;
use crate::failure::Failure;
use crate::json;
use crate::loading::Progress;
use crate::units;

/// Weights that are shown one by one.
const WORST: usize = 10;
/// Largest file of prompts in bytes.
const MAX_PROMPTS_BYTES: u64 = 16 << 20;
/// Most tokens of all prompts: their rows are in memory together.
const MAX_TOKENS: usize = 1 << 16;

/// Everything that was measured.
#[derive(Debug, Serialize)]
struct Comparison {
    a: String,
    b: String,
    bytes_a: u64,
    bytes_b: u64,
    weights: Vec<WeightError>,
    logits: Option<LogitError>,
}

pub(super) fn run(args: &Inspect, a: &Path, b: &Path, cpu: &Cpu) -> Result<(), Failure> {
    if args.compute.weights.dtype != Dtype::Auto {
        return Err(
            Failure::usage("--dtype: checkpoints are compared as they are stored")
                .hint("`guild quantize` writes the other one"),
        );
    }
    let (first, second) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    compare::comparable(&first, &second)?;
    let texts = match &args.prompts {
        Some(path) => Some(prompts(path, &first)?),
        None => None,
    };
    let progress = Progress::new("comparing");
    let weights = compare::weights(&first, &second, &|done, total| progress.at(done, total))?;
    let logits = match &texts {
        Some(texts) => {
            let progress = Progress::new("computing");
            let told = |done, total| progress.at(done, total);
            Some(compare::logits(&first, &second, cpu, texts, &told)?)
        }
        None => None,
    };
    let comparison = Comparison {
        a: a.display().to_string(),
        b: b.display().to_string(),
        bytes_a: first.required_bytes(),
        bytes_b: second.required_bytes(),
        weights,
        logits,
    };
    if args.json {
        return json::print(&comparison);
    }
    comparison.print()
}

/// The texts of a file, as tokens.
fn prompts(path: &Path, model: &Checkpoint) -> Result<Vec<Vec<u32>>, Failure> {
    let bad = |reason: String| Failure::usage(format!("--prompts: {}: {reason}", path.display()));
    let meta = fs::metadata(path).map_err(|error| bad(error.to_string()))?;
    if meta.len() > MAX_PROMPTS_BYTES {
        return Err(bad(format!(
            "{} bytes, more than {MAX_PROMPTS_BYTES}",
            meta.len()
        )));
    }
    let file = fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    let text = Text::load(model.dir(), model.config())?;
    let mut texts = Vec::new();
    for (number, line) in file
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        if let Ok(ids) = serde_json::from_str::<Vec<u32>>(line) {
            texts.push(ids);
            continue;
        }
        let words = serde_json::from_str(line).unwrap_or_else(|_| line.to_owned());
        let Some(text) = &text else {
            return Err(bad(format!(
                "line {}: the model has no tokenizer; give lists of token ids",
                number + 1
            )));
        };
        texts.push(text.encode(&words)?);
    }
    let tokens: usize = texts.iter().map(Vec::len).sum();
    match tokens {
        0 => Err(bad("no text".into())),
        _ if tokens > MAX_TOKENS => Err(bad(format!("{tokens} tokens, more than {MAX_TOKENS}"))),
        _ => Ok(texts),
    }
}

/// Weights that are stored alike in B.
#[derive(Default)]
struct Group {
    tensors: u64,
    elements: u64,
    /// Sum over weights of elements times the square of the relative error.
    squares: f64,
    worst: f64,
}

impl Comparison {
    fn print(&self) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "A {} ({})", self.a, units::bytes(self.bytes_a))?;
        writeln!(out, "B {} ({})", self.b, units::bytes(self.bytes_b))?;
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        for weight in &self.weights {
            let [a, b] = &weight.formats;
            let group = groups.entry(format!("{a} -> {b}")).or_default();
            group.tensors += 1;
            group.elements += weight.elements;
            group.squares += weight.elements as f64 * weight.relative_rms * weight.relative_rms;
            group.worst = group.worst.max(weight.relative_rms);
        }
        writeln!(
            out,
            "\n{:<24} {:>8} {:>12} {:>12} {:>12}",
            "stored", "tensors", "parameters", "rel. rms", "worst"
        )?;
        for (name, group) in &groups {
            let mean = (group.squares / group.elements as f64).sqrt();
            writeln!(
                out,
                "{name:<24} {:>8} {:>12} {mean:>12.6} {:>12.6}",
                group.tensors,
                units::parameters(group.elements),
                group.worst
            )?;
        }
        writeln!(
            out,
            "\n{:<12} {:>10} {:>10} {:>9}  worst weights",
            "stored", "rel. rms", "max", "SQNR dB"
        )?;
        for weight in self.weights.iter().filter(|w| w.max > 0.0).take(WORST) {
            writeln!(
                out,
                "{:<12} {:>10.6} {:>10.6} {:>9.1}  {}",
                weight.formats[1],
                weight.relative_rms,
                weight.max,
                weight.sqnr_db.unwrap_or(f64::INFINITY),
                weight.tensor
            )?;
        }
        let Some(logits) = &self.logits else {
            return Ok(());
        };
        writeln!(
            out,
            "\nnext token at {} positions: KL(A || B) mean {:.6}, 99 % {:.6}, max {:.6} nats; the same likeliest token at {:.2} %",
            units::count(logits.positions),
            logits.kl_mean,
            logits.kl_p99,
            logits.kl_max,
            100.0 * logits.top1
        )?;
        if let (Some(a), Some(b)) = (logits.perplexity_a, logits.perplexity_b) {
            writeln!(out, "perplexity of the texts: A {a:.4}, B {b:.4}")?;
        }
        Ok(())
    }
}
