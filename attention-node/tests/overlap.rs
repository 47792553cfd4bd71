//! Steps in two micro-batches give the bits of steps in one piece, whatever becomes of the rows that are away.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{
    DEADLINE, Fate, Model, Random, Rig, assert_same_bits, bits, limits, read_all, request, tokens,
    undisturbed,
};
use guild_attention_node::sequence::{Event, Events, Failure, Request};
use guild_attention_node::{MicroBatches, Patience};
use guild_model::sampler::Sampling;

/// Short, so that a test need not wait; what it makes suspect by mistake must not matter either.
const SUSPECT_AFTER: Duration = Duration::from_millis(60);
/// Long enough that the rows of both micro-batches are away at the same time.
const WIRE: Duration = Duration::from_millis(1);

fn requests() -> Vec<Request> {
    let vocab = Model::v3_basic().trunk.config().vocab_size;
    let mut random = Random(23);
    let one = |n: usize| Request {
        sampling: Sampling {
            temperature: [0.0, 0.9][n % 2],
            seed: n as u64,
            ..Sampling::GREEDY
        },
        ..request(
            (0..3 + 5 * n).map(|_| random.below(vocab) as u32).collect(),
            20,
        )
    };
    (0..7).map(one).collect()
}

/// An engine that always cuts, with two homes for every expert, each some way off.
fn in_two(nodes: u32) -> Rig {
    let model = Model::v3_basic();
    let patience = Patience {
        deadline: DEADLINE,
        suspect_after: SUSPECT_AFTER,
    };
    let rig = Rig::patient(model, limits(), model.deal_twice(1, 1, nodes, 3), patience);
    rig.overlap.set(MicroBatches::On);
    for node in 1..=nodes {
        rig.wire.strike(node, Fate::Slow(WIRE));
    }
    rig
}

/// Steps are cut, and no bit is another, whatever `strike` does meanwhile.
async fn assert_cut(rig: &Rig, strike: impl FnOnce(&Rig)) {
    assert_same_bits(rig, &requests(), strike).await;
    assert!(rig.overlap.so_far().split > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_a_step_is_cut_changes_no_bit() {
    for nodes in [2, 3] {
        assert_cut(&in_two(nodes), |_| ()).await;
    }
    // From one step to the next.
    assert_cut(&in_two(2), |rig| rig.overlap.set(MicroBatches::Auto)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_lost_with_rows_of_both_costs_no_bit() {
    for fate in [Fate::Dead, Fate::Silent, Fate::Slow(3 * SUSPECT_AFTER)] {
        assert_cut(&in_two(3), |rig| rig.wire.strike(1, fate)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_that_fail_for_a_while_or_move_cost_no_bit() {
    for refusals in [1, 2, 5] {
        assert_cut(&in_two(2), |rig| rig.trouble.refuse(refusals)).await;
    }
    let model = Model::v3_basic();
    assert_cut(&in_two(2), |rig| rig.place(model.deal(2, 30, 3, 1))).await;
}

fn failed(events: &[Event]) -> bool {
    matches!(events.last(), Some(Event::Failed(Failure::Exchange(_))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_rows_of_one_are_lost_for_good_the_step_has_failed_and_nothing_is_published() {
    let model = Model::v3_basic();
    // One message an exchange.
    let rig = Rig::with(model, limits(), model.deal(1, 1, 1, 0), DEADLINE);
    rig.overlap.set(MicroBatches::On);
    let prompt: Vec<u32> = (0..40).map(|n| 3 + n % 50).collect();
    let long = request(prompt, 4);
    let in_step = 2 * model.trunk.config().moe_layers().count() as i64;
    for exchange in 0..in_step {
        rig.trouble.fault_after(exchange);
        let events = rig.run(&long).await;
        assert!(failed(&events), "exchange {exchange}: {events:?}");
        assert_eq!(tokens(&events), [0; 0]);
        rig.settle().await;
        assert_eq!(rig.engine.counts().cached_pages, 0);
    }
    let expected = undisturbed(std::slice::from_ref(&long)).await;
    assert_eq!(bits(&rig.run(&long).await), expected[0]);
    rig.settle().await;
    assert!(rig.engine.counts().cached_pages > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_was_in_the_step_fails_with_it() {
    let model = Model::v3_basic();
    let rig = Rig::with(model, limits(), model.deal(1, 1, 1, 0), DEADLINE);
    rig.overlap.set(MicroBatches::On);
    let long = [request(vec![5; 4], 200), request(vec![9; 4], 200)];
    let mut readers: Vec<Events> = long.iter().map(|request| rig.submit(request)).collect();
    for reader in &mut readers {
        reader.recv().await.unwrap();
    }
    rig.trouble.fault_after(3);
    for reader in readers {
        let events = read_all(reader).await;
        assert!(failed(&events), "{events:?}");
    }
    rig.settle().await;
}
