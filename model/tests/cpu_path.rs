//! The CPU path against the goldens, and its exactness: what must not change a bit does not.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::bounds::F32;
use common::golden::{self, Golden, assert_close, assert_close_relative, assert_same_bits};
use common::oracle::{Oracle, Piece};
use common::tiny;
use guild_model::cache::SeqRows;
use guild_model::checkpoint::Dtype;
use guild_model::reference::Reference;
use guild_model::sampler::{self, Sampling};
use guild_model::{Cpu, Isa};
use serde_json::json;

fn oracle(case: &str) -> Oracle {
    Oracle::open(&golden::dir(case), Dtype::Auto, Cpu::new(2))
}

/// Logits at every position, hidden states, router choices and greedy continuations of one case.
fn agrees_with_golden(case: &str) {
    let (model, golden) = (oracle(case), Golden::open(case));
    let width = model.trunk.config().hidden_size;
    for p in golden.prompts() {
        let name = |t: &str| format!("{case} {p}.{t}");
        let tokens = golden.ids(&format!("{p}.input_ids"));
        let pass = model.prefill(&tokens);
        let hidden = golden.floats(&format!("{p}.hidden"));
        assert_close_relative(
            &name("hidden"),
            &pass.hidden.concat(),
            &hidden,
            width,
            F32.hidden,
        );
        for (layer, routes) in &pass.routes {
            let stored = |t: &str| format!("{p}.router{layer}.{t}");
            assert_eq!(
                routes.experts,
                golden.ids(&stored("ids")),
                "{case} {}",
                stored("ids")
            );
            assert_close(
                &stored("weights"),
                &routes.weights,
                &golden.floats(&stored("weights")),
                F32.router_weights,
            );
            assert_close(
                &stored("logits"),
                &routes.logits,
                &golden.floats(&stored("logits")),
                F32.router_logits,
            );
        }
        let norm = golden.floats(&format!("{p}.final_norm"));
        assert_close_relative(
            &name("final_norm"),
            &pass.final_norm,
            &norm,
            width,
            F32.hidden,
        );
        assert_close(
            &name("logits"),
            &pass.logits,
            &golden.floats(&format!("{p}.logits")),
            F32.logits,
        );
        assert_eq!(
            model.greedy(&tokens, 32),
            golden.ids(&format!("{p}.greedy_ids")),
            "{case} {p}.greedy_ids"
        );
    }
}

#[test]
fn v3_basic_agrees_with_its_golden() {
    agrees_with_golden("v3-basic");
}

#[test]
fn v3_yarn_agrees_with_its_golden() {
    agrees_with_golden("v3-yarn");
}

#[test]
fn v3_noqlora_agrees_with_its_golden() {
    agrees_with_golden("v3-noqlora");
}

#[test]
fn v2_lite_agrees_with_its_golden() {
    agrees_with_golden("v2-lite");
}

#[test]
fn v3_fp8_agrees_with_its_golden() {
    agrees_with_golden("v3-fp8");
}

#[test]
fn v3_mtp_agrees_with_its_golden() {
    agrees_with_golden("v3-mtp");
}

#[test]
fn the_demo_continues_as_its_golden() {
    let model = Oracle::open(&golden::demo(), Dtype::Auto, Cpu::new(2));
    for (prompt, continuation) in golden::demo_greedy() {
        assert_eq!(model.greedy(&prompt, continuation.len()), continuation);
    }
}

#[test]
fn mtp_drafts_agree_with_the_golden() {
    let (model, golden) = (oracle("v3-mtp"), Golden::open("v3-mtp"));
    let mtp = model.trunk.mtp().unwrap();
    let width = model.trunk.config().hidden_size;
    for p in golden.prompts() {
        let stored = |t: &str| golden.floats(&format!("{p}.mtp.{t}"));
        let ids = golden.ids(&format!("{p}.mtp.ids"));
        let rows = ids.len() - 1;
        let hidden_in = model.prefill(&ids[..rows]).final_norm;
        assert_close_relative(
            "hidden_in",
            &hidden_in,
            &stored("hidden_in"),
            width,
            F32.hidden,
        );
        let mut stream = mtp.combine_input(&ids[1..], &hidden_in);
        assert_close_relative("eh", &stream, &stored("eh"), width, F32.hidden);
        let mut cache = model.cache(1, rows);
        let seqs = [SeqRows {
            rows: 0..rows,
            start: 0,
            pages: &[0],
        }];
        let routes = model
            .layer(mtp.layer(), &mut stream, &seqs, &mut cache)
            .unwrap();
        assert_eq!(routes.experts, golden.ids(&format!("{p}.mtp.router.ids")));
        assert_close(
            "mtp weights",
            &routes.weights,
            &stored("router.weights"),
            F32.router_weights,
        );
        assert_close_relative(
            "block_out",
            &stream,
            &stored("block_out"),
            width,
            F32.hidden,
        );
        let logits = mtp.draft_logits(&stream);
        assert_close("draft_logits", &logits, &stored("draft_logits"), F32.logits);
        let drafts = logits
            .chunks(model.trunk.config().vocab_size)
            .map(|row| sampler::sample(&model.cpu, row, &Sampling::GREEDY, 0, 0).token);
        assert_eq!(
            drafts.collect::<Vec<_>>(),
            golden.ids(&format!("{p}.mtp.draft_ids"))
        );
    }
}

/// The whole of a prompt in pieces of these lengths (the last one repeats), over this page table.
fn in_pieces(
    model: &Oracle,
    tokens: &[u32],
    lengths: &[usize],
    pages: &[u32],
    page_tokens: usize,
) -> Vec<f32> {
    let mut cache = model.cache(pages.len(), page_tokens);
    let mut logits = Vec::new();
    let (mut start, mut piece) = (0, 0);
    while start < tokens.len() {
        let length = lengths[piece.min(lengths.len() - 1)].min(tokens.len() - start);
        let tokens = &tokens[start..start + length];
        logits.extend(
            model
                .forward(
                    &[Piece {
                        tokens,
                        start,
                        pages,
                    }],
                    &mut cache,
                )
                .logits,
        );
        (start, piece) = (start + length, piece + 1);
    }
    logits
}

#[test]
fn chunks_pages_and_decode_give_the_bits_of_one_prefill() {
    for (case, prompt) in [
        ("v3-basic", "p3"),
        ("v3-noqlora", "p3"),
        ("v3-fp8", "p2"),
        ("v3-yarn", "p1"),
    ] {
        let model = oracle(case);
        let tokens = Golden::open(case).ids(&format!("{prompt}.input_ids"));
        let whole = model.prefill(&tokens).logits;
        for lengths in [
            &[1][..],
            &[2],
            &[7],
            &[16],
            &[tokens.len() - 1, 1],
            &[3, 11, 1],
        ] {
            for page_tokens in [1, 3, 16, 64] {
                let count = tokens.len().div_ceil(page_tokens) as u32;
                let ascending: Vec<u32> = (0..count).collect();
                let stride = (7..).find(|s| gcd(*s, count) == 1).unwrap();
                let shuffled: Vec<u32> = (0..count)
                    .map(|i| (i * stride + count / 2) % count)
                    .collect();
                for pages in [ascending, shuffled] {
                    let logits = in_pieces(&model, &tokens, lengths, &pages, page_tokens);
                    assert_same_bits(
                        &format!("{case}: pieces {lengths:?}, pages of {page_tokens}"),
                        &logits,
                        &whole,
                    );
                }
            }
        }
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[test]
fn batch_mates_change_no_bit() {
    let (model, golden) = (oracle("v3-basic"), Golden::open("v3-basic"));
    let prompts: Vec<Vec<u32>> = golden
        .prompts()
        .iter()
        .map(|p| golden.ids(&format!("{p}.input_ids")))
        .collect();
    let alone: Vec<Vec<f32>> = prompts.iter().map(|p| model.prefill(p).logits).collect();
    let tables: Vec<Vec<u32>> = (0..4)
        .map(|s| (0..10).map(|i| i * 4 + s).collect())
        .collect();
    let vocab = model.trunk.config().vocab_size;
    // Every step takes some tokens of some sequences, in a changing order: prefill, decode and pauses mixed.
    let mut cache = model.cache(40, 4);
    let mut done = [0usize; 4];
    let mut step = 0;
    while (0..4).any(|s| done[s] < prompts[s].len()) {
        let order: Vec<usize> = (0..4)
            .map(|i| (i * 3 + step) % 4)
            .filter(|s| (step + s) % 3 != 0)
            .collect();
        let lengths: Vec<usize> = order
            .iter()
            .map(|&s| (1 + (step * 5 + s) % 6).min(prompts[s].len() - done[s]))
            .collect();
        let taking = order.iter().zip(&lengths).filter(|(_, n)| **n > 0);
        let pieces: Vec<Piece<'_>> = taking
            .clone()
            .map(|(&s, &n)| Piece {
                tokens: &prompts[s][done[s]..done[s] + n],
                start: done[s],
                pages: &tables[s],
            })
            .collect();
        let logits = model.forward(&pieces, &mut cache).logits;
        let mut rows = logits.as_slice();
        for (&s, &n) in taking {
            let (mine, rest) = rows.split_at(n * vocab);
            assert_same_bits(
                &format!("sequence {s}, step {step}"),
                mine,
                &alone[s][done[s] * vocab..][..n * vocab],
            );
            (rows, done[s]) = (rest, done[s] + n);
        }
        step += 1;
    }
}

#[test]
fn every_isa_and_thread_count_gives_the_same_bits() {
    for (case, prompt) in [
        ("v3-basic", "p3"),
        ("v3-noqlora", "p3"),
        ("v3-fp8", "p2"),
        ("v2-lite", "p2"),
    ] {
        let tokens = Golden::open(case).ids(&format!("{prompt}.input_ids"));
        let run = |cpu: Cpu| {
            Oracle::open(&golden::dir(case), Dtype::Auto, cpu)
                .prefill(&tokens)
                .logits
        };
        let expected = run(Cpu::new(1));
        for isa in Isa::available() {
            for threads in [1, 2, 5] {
                let logits = run(Cpu::with_isa(threads, isa).unwrap());
                assert_same_bits(
                    &format!("{case} on {isa:?} with {threads} threads"),
                    &logits,
                    &expected,
                );
            }
        }
    }
}

/// Widening is exact, so weights kept in f32 give the bits of the narrower ones they were made from.
#[test]
fn weights_widened_at_load_give_the_same_bits() {
    for (case, prompt) in [("v3-noqlora", "p3"), ("v3-fp8", "p2"), ("v3-mtp", "p1")] {
        let tokens = Golden::open(case).ids(&format!("{prompt}.input_ids"));
        let run = |dtype| {
            Oracle::open(&golden::dir(case), dtype, Cpu::new(2))
                .prefill(&tokens)
                .logits
        };
        assert_same_bits(case, &run(Dtype::F32), &run(Dtype::Auto));
    }
}

#[test]
fn f16_weights_give_the_bits_of_the_same_weights_in_f32() {
    let run = |stored| {
        let dir = tempfile::tempdir().unwrap();
        tiny::write_as(dir.path(), &tiny::config(), stored, |_| true);
        Oracle::open(dir.path(), Dtype::Auto, Cpu::new(1))
            .prefill(&[3, 1, 4, 1, 5])
            .logits
    };
    assert_same_bits(
        "f16",
        &run(safetensors::Dtype::F16),
        &run(safetensors::Dtype::F32),
    );
}

/// Without copies of its own, the MTP module takes embedding and head of the main model; with, its own.
#[test]
fn the_mtp_module_uses_its_own_embedding_and_head_if_it_has_them() {
    let tokens: Vec<u32> = (0..20).map(|i| i * 37 % 96).collect();
    let config = tiny::config_with(json!({"num_nextn_predict_layers": 1}));
    let drafts = |copies: bool| {
        let dir = tempfile::tempdir().unwrap();
        let is_copy = |name: &str| {
            name.starts_with("model.layers.2.embed_tokens") || name.contains("shared_head.head")
        };
        tiny::write_as(dir.path(), &config, safetensors::Dtype::F32, |name| {
            copies || !is_copy(name)
        });
        let model = Oracle::open(dir.path(), Dtype::Auto, Cpu::new(1));
        let mtp = model.trunk.mtp().unwrap();
        let hidden = model.prefill(&tokens[..19]).final_norm;
        let mut stream = mtp.combine_input(&tokens[1..], &hidden);
        let seqs = [SeqRows {
            rows: 0..19,
            start: 0,
            pages: &[0],
        }];
        model.layer(mtp.layer(), &mut stream, &seqs, &mut model.cache(1, 19));
        let reference = Reference::load(&model.checkpoint)
            .unwrap()
            .mtp(&tokens, &hidden)
            .unwrap();
        (mtp.draft_logits(&stream), reference.draft_logits)
    };
    let (shared, reference) = drafts(false);
    assert_close("drafts", &shared, &reference, F32.logits);
    assert_ne!(drafts(true).0, shared);
}

/// Rounding bf16 to bf16 changes nothing; rounding more than that is another model, but a working one.
#[test]
fn weights_rounded_to_bf16_work() {
    let run = |case: &str, prompt: &str, dtype| {
        let tokens = Golden::open(case).ids(&format!("{prompt}.input_ids"));
        Oracle::open(&golden::dir(case), dtype, Cpu::new(2))
            .prefill(&tokens)
            .logits
    };
    assert_same_bits(
        "v3-noqlora",
        &run("v3-noqlora", "p2", Dtype::Bf16),
        &run("v3-noqlora", "p2", Dtype::Auto),
    );
    for (case, prompt) in [("v3-basic", "p2"), ("v3-fp8", "p1")] {
        let (rounded, exact) = (
            run(case, prompt, Dtype::Bf16),
            run(case, prompt, Dtype::Auto),
        );
        assert!(rounded.iter().all(|l| l.is_finite()));
        assert_ne!(rounded, exact);
    }
}

/// Variants that no golden has, against the reference: one rule, two programs.
#[test]
fn variants_agree_with_the_reference() {
    let yarn = json!({"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 16, "beta_fast": 1,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707});
    let v2 = json!({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "norm_topk_prob": false});
    let variants = [
        ("plain", json!({})),
        ("V2 groups", v2),
        ("tied embeddings", json!({"tie_word_embeddings": true})),
        ("attention bias", json!({"attention_bias": true})),
        ("half-split rope", json!({"rope_interleave": false})),
        ("yarn", json!({"rope_scaling": yarn})),
        ("direct query", json!({"q_lora_rank": null})),
        ("no shared expert", json!({"n_shared_experts": 0})),
        (
            "every other layer dense",
            json!({"num_hidden_layers": 4, "moe_layer_freq": 2, "first_k_dense_replace": 0}),
        ),
        ("all dense", json!({"first_k_dense_replace": 2})),
    ];
    for (what, changes) in variants {
        let dir = tempfile::tempdir().unwrap();
        tiny::write(dir.path(), &tiny::config_with(changes));
        let model = Oracle::open(dir.path(), Dtype::Auto, Cpu::new(2));
        let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 96).collect();
        let pass = model.prefill(&tokens);
        let trace = Reference::load(&model.checkpoint)
            .unwrap()
            .forward(&tokens)
            .unwrap();
        for (routes, expected) in pass.routes.values().zip(&trace.routed) {
            assert_eq!(
                routes.experts, expected.ids,
                "{what}: layer {}",
                expected.layer
            );
            assert_close(what, &routes.weights, &expected.weights, F32.router_weights);
        }
        assert_eq!(pass.routes.len(), trace.routed.len(), "{what}");
        assert_close(what, &pass.logits, &trace.logits, F32.logits);
    }
}
