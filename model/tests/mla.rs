//! Absorbed attention against the naive form in f64, for the variants of the family.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::golden::assert_close_relative;
use common::tiny;
use guild_model::cache::{Format, LatentCache, SeqRows};
use guild_model::checkpoint::{Checkpoint, Dtype};
use guild_model::config::LATENT_NORM_EPS;
use guild_model::trunk::Trunk;
use guild_model::{Config, Cpu};
use serde_json::{Value, json};

/// A linear layer of the checkpoint, in f64.
struct Linear {
    weight: Vec<f32>,
    cols: usize,
    bias: Option<Vec<f32>>,
}

impl Linear {
    fn load(ckpt: &Checkpoint, name: &str) -> Linear {
        let (weight, shape) = ckpt.weight_f32(name).unwrap();
        let bias = ckpt
            .tensor(&format!("{name}.bias"))
            .ok()
            .map(|b| b.to_f32().unwrap());
        Linear {
            weight,
            cols: shape[1],
            bias,
        }
    }

    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let bias = |r: usize| self.bias.as_ref().map_or(0.0, |b| f64::from(b[r]));
        let dot = |row: &[f32]| {
            row.iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * x)
                .sum::<f64>()
        };
        self.weight
            .chunks(self.cols)
            .enumerate()
            .map(|(r, row)| dot(row) + bias(r))
            .collect()
    }
}

fn rms_norm(ckpt: &Checkpoint, name: &str, x: &[f64], eps: f32) -> Vec<f64> {
    let weight = ckpt
        .tensor(&format!("{name}.weight"))
        .unwrap()
        .to_f32()
        .unwrap();
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter()
        .zip(weight)
        .map(|(v, w)| v * scale * f64::from(w))
        .collect()
}

fn rotate(cfg: &Config, position: usize, x: &[f64]) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for (i, freq) in cfg.rope_inv_freq().into_iter().enumerate() {
        let (sin, cos) = (position as f64 * f64::from(freq)).sin_cos();
        let (sin, cos) = (
            sin * f64::from(cfg.rope_factor()),
            cos * f64::from(cfg.rope_factor()),
        );
        let (a, b) = if cfg.rope.interleave {
            (2 * i, 2 * i + 1)
        } else {
            (i, i + half)
        };
        (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
    }
    out
}

/// Layer 0's attention with keys and values built for every head, as the report first writes it.
fn naive(ckpt: &Checkpoint, hidden: &[f32]) -> Vec<f32> {
    let cfg = ckpt.config();
    let name = |n: &str| format!("model.layers.0.self_attn.{n}");
    let (nope, value, latent) = (cfg.qk_nope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank);
    let linear = |n: &str| Linear::load(ckpt, &name(n));
    let (kv_a, kv_b, output) = (
        linear("kv_a_proj_with_mqa"),
        linear("kv_b_proj"),
        linear("o_proj"),
    );
    let queries: Vec<Linear> = match cfg.q_lora_rank {
        Some(_) => vec![linear("q_a_proj"), linear("q_b_proj")],
        None => vec![linear("q_proj")],
    };
    let query = |x: &[f64]| match queries.as_slice() {
        [a, b] => b.forward(&rms_norm(
            ckpt,
            &name("q_a_layernorm"),
            &a.forward(x),
            LATENT_NORM_EPS,
        )),
        direct => direct[0].forward(x),
    };
    let mut keys: Vec<Vec<Vec<f64>>> = Vec::new();
    let mut values: Vec<Vec<Vec<f64>>> = Vec::new();
    let mut out = Vec::new();
    for (position, row) in hidden.chunks(cfg.hidden_size).enumerate() {
        let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        let x = rms_norm(
            ckpt,
            "model.layers.0.input_layernorm",
            &row,
            cfg.rms_norm_eps,
        );
        let kv = kv_a.forward(&x);
        let c_kv = rms_norm(
            ckpt,
            &name("kv_a_layernorm"),
            &kv[..latent],
            LATENT_NORM_EPS,
        );
        let k_pe = rotate(cfg, position, &kv[latent..]);
        let up = kv_b.forward(&c_kv);
        let heads = || up.chunks(nope + value);
        keys.push(heads().map(|h| [&h[..nope], &k_pe].concat()).collect());
        values.push(heads().map(|h| h[nope..].to_vec()).collect());
        let mut attended = Vec::new();
        for (h, q) in query(&x).chunks(cfg.qk_head_dim()).enumerate() {
            let q = [&q[..nope], &rotate(cfg, position, &q[nope..])].concat();
            let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
            let scores: Vec<f64> = keys
                .iter()
                .map(|k| dot(&k[h]) * f64::from(cfg.softmax_scale()))
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..value {
                let weighted = scores
                    .iter()
                    .zip(&values)
                    .map(|(s, v)| (s - max).exp() / sum * v[h][d]);
                attended.push(weighted.sum::<f64>());
            }
        }
        out.extend(
            row.iter()
                .zip(output.forward(&attended))
                .map(|(r, o)| (r + o) as f32),
        );
    }
    out
}

fn absorbed_agrees_with_naive(what: &str, changes: Value) {
    let dir = tempfile::tempdir().unwrap();
    tiny::write(dir.path(), &tiny::config_with(changes));
    let ckpt = Checkpoint::open(dir.path()).unwrap();
    let trunk = Trunk::load(&ckpt, Dtype::Auto, &Cpu::new(2), &|_, _| ()).unwrap();
    let (cfg, tokens) = (ckpt.config(), 23);
    let hidden = tiny::random(&mut 7, tokens * cfg.hidden_size, 1.0);
    let mut cache = LatentCache::new(cfg, cfg.num_hidden_layers, 5, 5, Format::F32);
    let mut absorbed = hidden.clone();
    let seqs = [SeqRows {
        rows: 0..tokens,
        start: 0,
        pages: &[3, 0, 4, 1, 2],
    }];
    trunk.layers()[0].attend(&mut absorbed, &seqs, &mut cache);
    assert_close_relative(
        what,
        &absorbed,
        &naive(&ckpt, &hidden),
        cfg.hidden_size,
        1e-5,
    );
}

#[test]
fn with_a_low_rank_query() {
    absorbed_agrees_with_naive("low rank", json!({}));
}

#[test]
fn with_a_direct_query() {
    absorbed_agrees_with_naive("direct", json!({"q_lora_rank": null}));
}

#[test]
fn with_attention_bias() {
    absorbed_agrees_with_naive("bias", json!({"attention_bias": true}));
}

#[test]
fn with_half_split_rope() {
    absorbed_agrees_with_naive("half split", json!({"rope_interleave": false}));
}

#[test]
fn with_yarn_and_two_different_mscales() {
    let yarn = json!({"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0});
    absorbed_agrees_with_naive("yarn", json!({"rope_scaling": yarn}));
}

/// Past the table of rotations, positions are turned one by one, and the same.
#[test]
fn positions_past_the_longest_context_are_rotated_alike() {
    let logits = |longest: usize| {
        let dir = tempfile::tempdir().unwrap();
        tiny::write(
            dir.path(),
            &tiny::config_with(json!({"max_position_embeddings": longest})),
        );
        let ckpt = Checkpoint::open(dir.path()).unwrap();
        let trunk = Trunk::load(&ckpt, Dtype::Auto, &Cpu::new(1), &|_, _| ()).unwrap();
        let mut hidden = tiny::random(&mut 7, 3 * ckpt.config().hidden_size, 1.0);
        let mut cache = LatentCache::new(ckpt.config(), 2, 1, 2048, Format::F32);
        let seqs = [SeqRows {
            rows: 0..3,
            start: 1022,
            pages: &[0],
        }];
        trunk.layers()[0].attend(&mut hidden, &seqs, &mut cache);
        hidden
    };
    assert_eq!(logits(1024), logits(4096));
}
