//! Experts with two homes: a node that dies, is silent or slow in the middle of requests changes
//! no bit of any of them.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{DEADLINE, Fate, Model, Random, Rig, assert_same_bits, bits, limits, request};
use guild_attention_node::Patience;
use guild_attention_node::sequence::Request;
use guild_model::sampler::Sampling;

/// Short, so that a test need not wait; what it makes suspect by mistake must not matter either.
const SUSPECT_AFTER: Duration = Duration::from_millis(60);
/// Extra messages that the budget allows: a share of all, and a few.
const HEDGES: (u64, u64) = (10, 8);

fn rig(nodes: u32) -> Rig {
    let model = Model::v3_basic();
    let patience = Patience {
        deadline: DEADLINE,
        suspect_after: SUSPECT_AFTER,
    };
    Rig::patient(model, limits(), model.deal_twice(1, 1, nodes, 3), patience)
}

fn requests() -> Vec<Request> {
    let vocab = Model::v3_basic().trunk.config().vocab_size;
    let mut random = Random(7);
    (0..6)
        .map(|n| Request {
            sampling: Sampling {
                temperature: [0.0, 0.9][n % 2],
                seed: n as u64,
                ..Sampling::GREEDY
            },
            ..request(
                (0..5 + 4 * n).map(|_| random.below(vocab) as u32).collect(),
                24,
            )
        })
        .collect()
}

/// No bit is another whatever `strike` does, and few messages are sent twice.
async fn struck(rig: &Rig, strike: impl FnOnce(&Rig)) {
    assert_same_bits(rig, &requests(), strike).await;
    let count = |of: &AtomicU64| of.load(Ordering::SeqCst);
    let (hedges, all) = (count(&rig.counters.hedges), count(&rig.counters.dispatches));
    assert!(hedges <= all / HEDGES.0 + HEDGES.1, "{hedges} of {all}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_costs_no_request_and_no_bit() {
    for nodes in [2, 3, 5] {
        let rig = rig(nodes);
        struck(&rig, |rig| rig.wire.strike(1, Fate::Dead)).await;
        assert!(rig.counters.suspected.load(Ordering::SeqCst) > 0);
        // Known to be gone, it is not even tried: a probe now and then is all it gets.
        let before = rig.counters.retries.load(Ordering::SeqCst);
        rig.run(&requests()[1]).await;
        assert_eq!(rig.counters.retries.load(Ordering::SeqCst), before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_costs_a_pause_and_no_bit() {
    let rig = rig(3);
    struck(&rig, |rig| rig.wire.strike(2, Fate::Silent)).await;
    assert!(rig.counters.hedges.load(Ordering::SeqCst) > 0);
    // Others have been asked long before; the node is suspected all the same.
    let begun = Instant::now();
    while rig.counters.suspected.load(Ordering::SeqCst) == 0 {
        assert!(begun.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_node_is_helped_within_the_budget() {
    let rig = rig(3);
    let slow = Fate::Slow(SUSPECT_AFTER * 3);
    struck(&rig, |rig| rig.wire.strike(3, slow)).await;
    assert!(rig.counters.hedges.load(Ordering::SeqCst) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_lost_with_all_homes_of_an_expert_are_waited_for() {
    let rig = rig(3);
    let model = Model::v3_basic();
    struck(&rig, |rig| {
        rig.wire.strike(1, Fate::Dead);
        rig.wire.strike(2, Fate::Silent);
        // What the coordinator does about it: new homes, on live nodes.
        rig.place(model.deal(2, 3, 1, 0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_back_gets_rows_again() {
    let rig = rig(2);
    struck(&rig, |rig| rig.wire.strike(1, Fate::Silent)).await;
    rig.wire.heal(1);
    let before = rig.wire.sent_to(1);
    let request = &requests()[0];
    let expected = bits(&Rig::new(Model::v3_basic()).run(request).await);
    // More than probes: each of them comes later than the one before.
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        assert_eq!(bits(&rig.run(request).await), expected);
        if rig.wire.sent_to(1) > before + 10 {
            return;
        }
    }
    panic!("a healed node is left alone for ever");
}
