//! A whole model in one process, for measuring it: no batching, no exchange, one pass over given tokens.
//!
//! Secret: that experts are in memory one at a time. All sequences go through a layer together, so every expert is
//! read once however long the prompts are. It must not know of nodes or requests.

use std::collections::BTreeMap;

use guild_kernels::Cpu;

use crate::cache::{Format, LatentCache, SeqRows};
use crate::checkpoint::Dtype;
use crate::expert::Expert;
use crate::gate::Routes;
use crate::trunk::{Ffn, Moe, Trunk};
use crate::{Checkpoint, ModelError};

/// Rows after the final norm `[n, hidden]` of several sequences, each from position 0, in one piece.
///
/// `progress` hears layers done and in all. The memory it takes is the trunk, one expert, and the latent cache and a
/// few rows of every token.
///
/// # Errors
/// A tensor that cannot be used; an empty sequence, one that is longer than the model's context, or an id outside the
/// vocabulary.
pub fn final_rows(
    ckpt: &Checkpoint,
    dtype: Dtype,
    cpu: &Cpu,
    sequences: &[Vec<u32>],
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<f32>, ModelError> {
    let cfg = ckpt.config();
    check(ckpt, sequences)?;
    let tokens: Vec<u32> = sequences.iter().flatten().copied().collect();
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(1);
    let trunk = Trunk::load(ckpt, dtype, cpu, &|_, _| ())?;
    // A page each, as long as the longest.
    let (layers, pages) = (cfg.num_hidden_layers, sequences.len());
    let mut cache = LatentCache::new(cfg, layers, pages, longest, Format::F32);
    let pages: Vec<u32> = (0..).take(sequences.len()).collect();
    let mut row = 0;
    let seqs: Vec<SeqRows<'_>> = { sequences.iter().zip(&pages) }
        .map(|(sequence, page)| {
            let rows = row..row + sequence.len();
            row = rows.end;
            SeqRows {
                rows,
                start: 0,
                pages: std::slice::from_ref(page),
            }
        })
        .collect();
    let mut stream = trunk.embed(&tokens);
    for (done, layer) in trunk.layers().iter().enumerate() {
        progress(done as u64, cfg.num_hidden_layers as u64);
        layer.attend(&mut stream, &seqs, &mut cache);
        match layer.ffn() {
            Ffn::Dense(dense) => dense.forward(&mut stream),
            Ffn::Moe(moe) => routed(ckpt, dtype, cpu, layer.index(), moe, &mut stream)?,
        }
    }
    progress(cfg.num_hidden_layers as u64, cfg.num_hidden_layers as u64);
    Ok(trunk.final_norm(&stream).to_vec())
}

fn check(ckpt: &Checkpoint, sequences: &[Vec<u32>]) -> Result<(), ModelError> {
    let cfg = ckpt.config();
    for (i, sequence) in sequences.iter().enumerate() {
        let bad = |reason: String| Err(ModelError::input(format!("prompt {}", i + 1), reason));
        if sequence.is_empty() {
            return bad("has no tokens".into());
        }
        if sequence.len() > cfg.max_position_embeddings {
            return bad(format!(
                "{} tokens, more than the {} positions of this model",
                sequence.len(),
                cfg.max_position_embeddings
            ));
        }
        if let Some(id) = sequence.iter().find(|&&id| id as usize >= cfg.vocab_size) {
            return bad(format!(
                "token {id} is outside the vocabulary of {}",
                cfg.vocab_size
            ));
        }
    }
    Ok(())
}

/// The feed-forward half of a MoE layer, expert after expert.
fn routed(
    ckpt: &Checkpoint,
    dtype: Dtype,
    cpu: &Cpu,
    layer: usize,
    moe: &Moe,
    stream: &mut [f32],
) -> Result<(), ModelError> {
    let width = ckpt.config().hidden_size;
    let x = moe.norm(stream);
    let routes: Routes = moe.route(&x);
    let mut choices: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (choice, &expert) in routes.experts.iter().enumerate() {
        choices.entry(expert).or_default().push(choice);
    }
    let mut rows = vec![0.0; routes.experts.len() * width];
    for (expert, choices) in choices {
        let asked: Vec<f32> = choices
            .iter()
            .flat_map(|c| &x[c / routes.top_k * width..][..width])
            .copied()
            .collect();
        let expert = Expert::load(ckpt, layer, expert as usize, dtype)?;
        let answer = expert.forward(cpu, &asked);
        for (choice, row) in choices.iter().zip(answer.chunks_exact(width)) {
            rows[choice * width..][..width].copy_from_slice(row);
        }
    }
    moe.combine(stream, &routes, &rows, moe.shared(&x).as_deref());
    Ok(())
}
