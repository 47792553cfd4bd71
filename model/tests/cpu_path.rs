//! The CPU path against the goldens, and its exactness: what must not change a bit does not.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::bounds::F32;
use common::golden::{self, Golden, assert_close, assert_close_relative, assert_same_bits};
use common::oracle::{Oracle, Piece};
use guild_model::cache::SeqRows;
use guild_model::checkpoint::Dtype;
use guild_model::{Cpu, Isa};

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
        assert_close_relative(&name("hidden"), &pass.hidden.concat(), &hidden, width, F32.hidden);
        for (layer, routes) in &pass.routes {
            let stored = |t: &str| format!("{p}.router{layer}.{t}");
            assert_eq!(routes.experts, golden.ids(&stored("ids")), "{case} {}", stored("ids"));
            assert_close(&stored("weights"), &routes.weights, &golden.floats(&stored("weights")), F32.router_weights);
            assert_close(&stored("logits"), &routes.logits, &golden.floats(&stored("logits")), F32.router_logits);
        }
        let norm = golden.floats(&format!("{p}.final_norm"));
        assert_close_relative(&name("final_norm"), &pass.final_norm, &norm, width, F32.hidden);
        assert_close(&name("logits"), &pass.logits, &golden.floats(&format!("{p}.logits")), F32.logits);
        assert_eq!(model.greedy(&tokens, 32), golden.ids(&format!("{p}.greedy_ids")), "{case} {p}.greedy_ids");
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
