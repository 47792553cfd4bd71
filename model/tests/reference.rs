//! The reference against independent computations of every golden case.
#![allow(clippy::unwrap_used)]

mod common;

use common::bounds::F32;
use common::golden::{self, Golden, assert_close, assert_close_relative};
use guild_model::reference::{Reference, Routed};
use guild_model::{Checkpoint, ModelError};

fn load(case: &str) -> (Reference, Checkpoint) {
    let checkpoint = Checkpoint::open(&golden::dir(case)).unwrap();
    (Reference::load(&checkpoint).unwrap(), checkpoint)
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len())
        .rev()
        .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
        .unwrap() as u32
}

fn check_router(golden: &Golden, key: &str, routed: &Routed) {
    assert_eq!(routed.ids, golden.ids(&format!("{key}.ids")), "{key}: ids");
    assert_close(
        &format!("{key}.weights"),
        &routed.weights,
        &golden.floats(&format!("{key}.weights")),
        F32.router_weights,
    );
    if golden.has(&format!("{key}.logits")) {
        let expected = golden.floats(&format!("{key}.logits"));
        assert_close(
            &format!("{key}.logits"),
            &routed.logits,
            &expected,
            F32.router_logits,
        );
    }
}

fn check_case(case: &str) {
    let (reference, checkpoint) = load(case);
    let golden = Golden::open(case);
    let config = checkpoint.config();
    for p in golden.prompts() {
        let prompt = golden.ids(&format!("{p}.input_ids"));
        let what = |part: &str| format!("{case} {p} {part}");
        let trace = reference.forward(&prompt).unwrap();
        assert_close(
            &what("logits"),
            &trace.logits,
            &golden.floats(&format!("{p}.logits")),
            F32.logits,
        );
        let hidden = golden.floats(&format!("{p}.hidden"));
        assert_close_relative(
            &what("hidden"),
            &trace.hidden,
            &hidden,
            config.hidden_size,
            F32.hidden,
        );
        let normed = golden.floats(&format!("{p}.final_norm"));
        assert_close_relative(
            &what("final_norm"),
            &trace.final_norm,
            &normed,
            config.hidden_size,
            F32.hidden,
        );
        let layers: Vec<usize> = trace.routed.iter().map(|r| r.layer).collect();
        assert_eq!(layers, config.moe_layers().collect::<Vec<_>>());
        for routed in &trace.routed {
            check_router(&golden, &format!("{p}.router{}", routed.layer), routed);
        }
        // Fed its own greedy continuation, every position must choose the next token of it: greedy
        // decoding by induction.
        let greedy = golden.ids(&format!("{p}.greedy_ids"));
        let whole = [&prompt[..], &greedy[..greedy.len() - 1]].concat();
        let rows = reference.forward(&whole).unwrap().logits;
        let chosen: Vec<u32> = rows
            .chunks(config.vocab_size)
            .skip(prompt.len() - 1)
            .map(argmax)
            .collect();
        assert_eq!(chosen, greedy, "{}", what("greedy"));
    }
}

#[test]
fn v3_basic() {
    check_case("v3-basic");
}

#[test]
fn v3_yarn() {
    check_case("v3-yarn");
}

#[test]
fn v3_noqlora() {
    check_case("v3-noqlora");
}

#[test]
fn v2_lite() {
    check_case("v2-lite");
}

#[test]
fn v3_fp8() {
    check_case("v3-fp8");
}

#[test]
fn v3_mtp() {
    check_case("v3-mtp");
}

#[test]
fn mtp_drafts() {
    let (reference, checkpoint) = load("v3-mtp");
    let golden = Golden::open("v3-mtp");
    let (width, vocab) = (
        checkpoint.config().hidden_size,
        checkpoint.config().vocab_size,
    );
    for p in golden.prompts() {
        let get = |part: &str| golden.floats(&format!("{p}.mtp.{part}"));
        let tokens = golden.ids(&format!("{p}.mtp.ids"));
        let hidden = reference.forward(&tokens).unwrap().final_norm;
        let used = hidden.len() - width;
        assert_close_relative(
            "hidden_in",
            &hidden[..used],
            &get("hidden_in"),
            width,
            F32.hidden,
        );
        let trace = reference.mtp(&tokens, &hidden).unwrap();
        assert_close_relative("eh", &trace.eh, &get("eh"), width, F32.hidden);
        assert_close_relative(
            "block_out",
            &trace.block_out,
            &get("block_out"),
            width,
            F32.hidden,
        );
        assert_close(
            "draft_logits",
            &trace.draft_logits,
            &get("draft_logits"),
            F32.logits,
        );
        check_router(&golden, &format!("{p}.mtp.router"), &trace.routed.unwrap());
        let drafts: Vec<u32> = trace.draft_logits.chunks(vocab).map(argmax).collect();
        assert_eq!(drafts, golden.ids(&format!("{p}.mtp.draft_ids")));
    }
}

#[test]
fn greedy_steps_agree_with_the_golden() {
    let (reference, _) = load("v3-basic");
    let golden = Golden::open("v3-basic");
    let expected = golden.ids("p1.greedy_ids");
    let tokens = reference.greedy(&golden.ids("p1.input_ids"), 8).unwrap();
    assert_eq!(tokens, expected[..8]);
}

/// What the MTP module drafts after each token of the demo's greedy continuations.
fn demo_drafts() -> Vec<Vec<u32>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/demo.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = json["cases"].as_array().unwrap();
    cases
        .iter()
        .map(|c| serde_json::from_value(c["draft_ids"].clone()).unwrap())
        .collect()
}

#[test]
fn demo_continuations_and_drafts() {
    let checkpoint = Checkpoint::open(&golden::demo()).unwrap();
    let reference = Reference::load(&checkpoint).unwrap();
    let vocab = checkpoint.config().vocab_size;
    for ((prompt, greedy), drafts) in golden::demo_greedy().into_iter().zip(demo_drafts()) {
        let whole = [&prompt[..], &greedy].concat();
        let trace = reference.forward(&whole).unwrap();
        let chosen: Vec<u32> = trace
            .logits
            .chunks(vocab)
            .skip(prompt.len() - 1)
            .take(greedy.len())
            .map(argmax)
            .collect();
        assert_eq!(chosen, greedy);
        let drafted = reference
            .mtp(&whole, &trace.final_norm)
            .unwrap()
            .draft_logits;
        let drafted: Vec<u32> = drafted
            .chunks(vocab)
            .skip(prompt.len() - 1)
            .take(drafts.len())
            .map(argmax)
            .collect();
        assert_eq!(drafted, drafts);
    }
}

#[test]
fn unfit_input_is_refused() {
    let (reference, _) = load("v3-basic");
    let what = |e: ModelError| match e {
        ModelError::Input { what, .. } => what,
        other => panic!("{other}"),
    };
    assert_eq!(what(reference.forward(&[]).unwrap_err()), "tokens");
    assert_eq!(what(reference.forward(&[320]).unwrap_err()), "tokens");
    assert_eq!(what(reference.forward(&[0; 4097]).unwrap_err()), "tokens");
    assert_eq!(what(reference.mtp(&[1, 2], &[0.0; 64]).unwrap_err()), "mtp");
    let (reference, _) = load("v3-mtp");
    assert_eq!(
        what(reference.mtp(&[1, 2], &[0.0; 63]).unwrap_err()),
        "hidden"
    );
    assert_eq!(what(reference.mtp(&[1], &[]).unwrap_err()), "hidden");
}
