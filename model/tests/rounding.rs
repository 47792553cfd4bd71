//! What rounding cached latents or activations does to a trained model, and that it does so alike however the tokens come.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use common::golden;
use common::oracle::{Oracle, Piece};
use guild_kernels::{Arithmetic, Isa};
use guild_model::Cpu;
use guild_model::cache::Format;
use guild_model::checkpoint::Dtype;
use guild_model::compare::{best, divergence, log_sum_exp};

/// Logits `[tokens, vocab]` with the cache in `format`, in chunks of `chunk` tokens.
fn logits(model: &Oracle, tokens: &[u32], format: Format, chunk: usize) -> Vec<f32> {
    let mut cache = model.cache_in(format, tokens.len().div_ceil(16), 16);
    let pages: Vec<u32> = (0..cache.pages() as u32).rev().collect();
    let mut all = Vec::new();
    for (i, tokens) in tokens.chunks(chunk).enumerate() {
        let piece = Piece {
            tokens,
            start: i * chunk,
            pages: &pages,
        };
        all.extend(model.forward(&[piece], &mut cache).logits);
    }
    all
}

/// Mean over positions of KL(exact || other) in nats, and the share of positions with the same most probable token.
fn distance(exact: &[f32], other: &[f32], vocab: usize) -> (f64, f64) {
    let (mut kl, mut same) = (0.0, 0);
    let rows = exact.chunks_exact(vocab).zip(other.chunks_exact(vocab));
    for (exact, other) in rows.clone() {
        kl += divergence(exact, log_sum_exp(exact), other, log_sum_exp(other));
        same += usize::from(best(exact) == best(other));
    }
    let n = rows.len() as f64;
    (kl / n, same as f64 / n)
}

fn text() -> Vec<u32> {
    golden::demo_greedy()
        .into_iter()
        .flat_map(|(prompt, continuation)| [prompt, continuation].concat())
        .take(400)
        .collect()
}

/// How far `model` with its cache in `format` is from `exact`, and that chunks and single tokens give it the same bits.
fn rounded(exact: &[f32], model: &Oracle, format: Format, what: &str) -> (f64, f64) {
    let tokens = text();
    let vocab = model.trunk.config().vocab_size;
    let (kl, same) = distance(exact, &logits(model, &tokens, format, 64), vocab);
    println!("{what}: KL {kl:.2e} nats, {:.1} % same", same * 100.0);
    let short = &tokens[..40];
    let bits = |chunk| -> Vec<u32> {
        let logits = logits(model, short, format, chunk);
        logits.iter().map(|l| l.to_bits()).collect()
    };
    let whole = bits(40);
    assert_eq!(bits(1), whole, "{what}");
    assert_eq!(bits(7), whole, "{what}");
    (kl, same)
}

/// Measured on the demo model: the bounds are some three times what was seen.
#[test]
fn rounded_latents_hardly_change_what_the_demo_says() {
    let model = Oracle::open(&golden::demo(), Dtype::Auto, Cpu::new(2));
    let exact = logits(&model, &text(), Format::F32, 64);
    for (format, most, least) in [
        (Format::F32, 0.0, 1.0),
        (Format::Bf16, 6e-4, 0.97),
        (Format::Fp8, 1.2e-2, 0.96),
    ] {
        let (kl, same) = rounded(&exact, &model, format, &format.to_string());
        assert!(kl <= most && same >= least, "{format}: {kl}, {same} same");
    }
}

/// As above. Where the instructions are missing plain code computes the same bits.
#[test]
fn activations_rounded_for_pairs_hardly_change_what_the_demo_says() {
    let open = |cpu| Oracle::open(&golden::demo(), Dtype::Auto, cpu);
    let exact = logits(&open(Cpu::new(2)), &text(), Format::F32, 64);
    for arithmetic in [Arithmetic::DotAvx512, Arithmetic::DotAmx] {
        let cpu = Cpu::with(2, Isa::available()[0], arithmetic).unwrap();
        let what = format!("{arithmetic:?}");
        let (kl, same) = rounded(&exact, &open(cpu), Format::F32, &what);
        assert!(kl <= 5e-3 && same >= 0.97, "{what}: {kl}, {same} same");
    }
}
