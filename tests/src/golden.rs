//! The golden references: what an independent implementation computed, in f32,
//! for the checkpoints in `tests/golden`.

use std::path::{Path, PathBuf};

use guild_model::compare::log_sum_exp;
use safetensors::{Dtype, SafeTensors};

use crate::process::golden_dir;

/// The golden checkpoints.
pub const CASES: &[&str] = &[
    "v3-basic",
    "v3-yarn",
    "v3-noqlora",
    "v2-lite",
    "v3-fp8",
    "v3-mtp",
];

/// Bound on a log-probability against an f32 reference, when weights are used as stored and activations are f32.
/// Two independent f32 implementations stay within 1e-4 of each other here; every wrong variant tried moved logits by over 0.6.
pub const LOGPROB_BOUND_F32: f32 = 5e-4;

/// One prompt of a golden case.
pub struct Prompt {
    /// The prompt.
    pub ids: Vec<u32>,
    /// `[n, vocab]`: log-softmax of the reference's logits.
    pub logprobs: Vec<Vec<f32>>,
    /// Greedy continuation, EOS ignored.
    pub greedy: Vec<u32>,
}

/// All prompts of a case.
pub fn prompts(case: &str) -> Vec<Prompt> {
    read(&golden_dir(case).join("golden.safetensors"))
}

/// One prompt of a variant: what its `expect.json` says.
#[derive(serde::Deserialize)]
pub struct Expected {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Greedy continuation, EOS ignored.
    pub greedy: Vec<u32>,
    /// Log-probability of each prompt token from the second on.
    pub logprobs: Vec<f32>,
}

/// The variants: (folder, prompts).
pub fn variants() -> Vec<(PathBuf, Vec<Expected>)> {
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(golden_dir("variants"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    dirs.into_iter()
        .map(|dir| {
            let text = std::fs::read(dir.join("expect.json")).unwrap();
            let expected = serde_json::from_slice(&text).unwrap();
            (dir, expected)
        })
        .collect()
}

fn read(path: &Path) -> Vec<Prompt> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Option<Vec<u32>> {
        let t = file.tensor(name).ok()?;
        assert_eq!(t.dtype(), Dtype::I64);
        Some(
            t.data()
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
                .collect(),
        )
    };
    (0..)
        .map_while(|p| {
            let prompt = ids(&format!("p{p}.input_ids"))?;
            let logits = file.tensor(&format!("p{p}.logits")).unwrap();
            let vocab = logits.shape()[1];
            let values: Vec<f32> = logits
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            Some(Prompt {
                ids: prompt,
                logprobs: values.chunks_exact(vocab).map(log_softmax).collect(),
                greedy: ids(&format!("p{p}.greedy_ids")).unwrap(),
            })
        })
        .collect()
}

fn log_softmax(row: &[f32]) -> Vec<f32> {
    let norm = log_sum_exp(row);
    row.iter().map(|&x| (f64::from(x) - norm) as f32).collect()
}
