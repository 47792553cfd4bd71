//! The engine over experts of the same process: what a request gets depends on nothing but the
//! request, and a lost expert never costs more than the request.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{DEADLINE, Model, Random, Rig, bits, limits, read_all, repository, request, tokens};
use guild_attention_node::sequence::{Event, Events, Failure, Finish, Request};
use guild_attention_node::{READERS_PER_PLACE, SubmitError};
use guild_model::sampler::{Sampling, Shaping};
use guild_node::member::RoutedSource as _;
use guild_scheduler::batch::{Limits, Refusal};

/// Sixteen different requests: greedy and sampled, long and short, with and without
/// log-probabilities of the prompt.
fn sixteen(vocab: usize) -> Vec<Request> {
    let mut random = Random(16);
    let one = |n: usize| {
        let prompt = (0..1 + random.below(40))
            .map(|_| random.below(vocab) as u32)
            .collect();
        Request {
            sampling: Sampling {
                temperature: [0.0, 0.7, 1.3][n % 3],
                top_p: [1.0, 0.9][n % 2],
                top_k: [0, 0, 20][n % 3],
                min_p: [0.0, 0.0, 0.0, 0.02][n % 4],
                seed: n as u64,
            },
            shaping: Shaping {
                bias: [vec![], vec![(5, 2.0), (9, -3.0)]][n / 8].clone(),
                repetition: [1.0, 1.2][n / 4 % 2],
                presence: [0.0, 0.5][n / 2 % 2],
                frequency: [0.0, 0.3][n / 4 % 2],
            },
            logprobs: [None, Some(0), Some(3)][n % 3],
            prompt_logprobs: [None, Some(2)][n % 2],
            stop_tokens: vec![1],
            min_tokens: [0, 4][n % 2],
            ..request(prompt, [1, 8, 13, 20][n % 4])
        }
    };
    (0..16).map(one).collect()
}

async fn alone(model: &'static Model, requests: &[Request]) -> Vec<Vec<String>> {
    let rig = Rig::new(model);
    let mut results = Vec::new();
    for request in requests {
        results.push(bits(&rig.run(request).await));
        rig.settle().await;
    }
    results
}

/// Submits all requests in a random order at random moments, drops some readers in the middle,
/// and checks those that stay against what they got alone.
async fn mixed(model: &'static Model, requests: &[Request], expected: &[Vec<String>], seed: u64) {
    let mut random = Random(seed);
    let page_tokens = random.one_of(&[1, 3, 16, 64]);
    let max_running = random.one_of(&[2, 5, 16]);
    let limits = Limits {
        max_running,
        max_waiting: 16,
        max_step_tokens: max_running + random.below(30),
        page_tokens,
        pages: 64usize.div_ceil(page_tokens) * random.one_of(&[1, 3, 16]),
        max_context: 64,
        ..Limits::default()
    };
    let placement = model.deal(1 + seed, 1, 1 + random.below(5) as u32, seed);
    let rig = Rig::with(model, limits, placement, DEADLINE);
    let mut order: Vec<usize> = (0..requests.len()).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at + 1));
    }
    let mut readers: Vec<(usize, Events)> = Vec::new();
    for &which in &order {
        readers.push((which, rig.submit(&requests[which])));
        // Until an earlier one has come a little further, sometimes.
        let at = random.below(readers.len());
        if random.below(2) == 0 {
            let (_, reader) = &mut readers[at];
            let seen = reader.unread();
            while reader.unread() == seen && !reader.is_complete() {
                tokio::task::yield_now().await;
            }
        }
        // A neighbour leaves.
        if random.below(5) == 0 {
            readers.swap_remove(random.below(readers.len()));
        }
    }
    for (which, reader) in readers {
        let got = bits(&read_all(reader).await);
        assert_eq!(got, expected[which], "request {which} under seed {seed}");
    }
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_in_any_batch_gets_what_it_gets_alone() {
    let model = Model::v3_basic();
    let requests = sixteen(model.trunk.config().vocab_size);
    let expected = alone(model, &requests).await;
    for seed in 0..32 {
        mixed(model, &requests, &expected, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_goes_on_elsewhere_gets_the_rest_of_its_tokens_whatever_counts_them() {
    let model = Model::v3_basic();
    let rig = Rig::new(model);
    for whole in sixteen(model.trunk.config().vocab_size) {
        let out = tokens(&rig.run(&whole).await);
        for cut in 1..out.len() {
            let mut rest = whole.clone();
            rest.prompt.extend_from_slice(&out[..cut]);
            rest.output_before = cut;
            rest.max_tokens -= cut;
            rest.min_tokens = rest.min_tokens.saturating_sub(cut);
            rest.prompt_logprobs = None;
            assert_eq!(
                tokens(&rig.run(&rest).await),
                out[cut..],
                "{whole:?} at {cut}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_on_the_demo_model() {
    let model = Model::demo();
    let requests = sixteen(model.trunk.config().vocab_size);
    let expected = alone(model, &requests).await;
    for seed in 100..104 {
        mixed(model, &requests, &expected, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_model_continues_as_the_independent_reference_does() {
    let text = std::fs::read_to_string(repository().join("tests/golden/demo.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |of: &serde_json::Value| -> Vec<u32> {
        of.as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect()
    };
    let rig = Rig::new(Model::demo());
    for case in golden["cases"].as_array().unwrap() {
        let expected = ids(&case["greedy_ids"]);
        let request = request(ids(&case["prompt_ids"]), expected.len());
        assert_eq!(tokens(&rig.run(&request).await), expected);
    }
}

/// How a request that was not failed has ended.
fn ended(events: &[Event]) -> (Finish, usize) {
    match events.last() {
        Some(Event::Finished {
            reason, generated, ..
        }) => (*reason, *generated),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_come_in_order_and_say_how_it_ended() {
    let rig = Rig::new(Model::v3_basic());
    let scored = Request {
        prompt_logprobs: Some(0),
        ..request(vec![5, 6, 7], 4)
    };
    let events = rig.run(&scored).await;
    let Event::Prompt { logprobs } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!(logprobs.iter().map(|l| l.token).collect::<Vec<_>>(), [6, 7]);
    assert_eq!(tokens(&events).len(), 4);
    assert_eq!(events.len(), 6);
    assert_eq!(ended(&events), (Finish::Length, 4));

    // The same request, stopped by its own second token.
    let output = tokens(&events);
    let stop = output[1];
    let stopped = Request {
        stop_tokens: vec![stop],
        ..scored.clone()
    };
    let events = rig.run(&stopped).await;
    let length = output.iter().position(|&token| token == stop).unwrap() + 1;
    assert_eq!(tokens(&events), output[..length]);
    assert_eq!(ended(&events), (Finish::Stop(stop), length));

    // Masked out before min_tokens.
    let later = Request {
        min_tokens: 4,
        ..stopped
    };
    let events = rig.run(&later).await;
    assert_eq!(tokens(&events).len(), 4);
    assert!(!tokens(&events).contains(&stop));

    // Nothing but the prompt.
    let only = Request {
        max_tokens: 0,
        ..scored
    };
    let events = rig.run(&only).await;
    assert_eq!(events.len(), 2);
    assert_eq!(ended(&events), (Finish::Length, 0));
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_that_fail_for_a_while_cost_nothing_but_time() {
    let model = Model::v3_basic();
    let rig = Rig::new(model);
    let request = request(vec![9, 8, 7], 12);
    let expected = bits(&rig.run(&request).await);
    for refusals in [1, 3, 7] {
        let mut reader = rig.submit(&request);
        let first = reader.recv().await.unwrap();
        rig.trouble.refuse(refusals);
        let mut got = vec![first];
        got.extend(read_all(reader).await);
        assert_eq!(bits(&got), expected);
    }
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_placement_is_taken_up_in_the_middle_of_a_request() {
    let model = Model::v3_basic();
    let rig = Rig::new(model);
    let request = request(vec![3, 1, 4, 1, 5], 40);
    let expected = bits(&rig.run(&request).await);
    let mut reader = rig.submit(&request);
    let mut got = Vec::new();
    for epoch in 2..8 {
        got.push(reader.recv().await.unwrap());
        // All experts move to other nodes; the old ones are gone.
        rig.place(model.deal(epoch, 10 * epoch as u32, 1 + epoch as u32 % 3, epoch));
    }
    got.extend(read_all(reader).await);
    assert_eq!(bits(&got), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_that_fail_for_ever_cost_the_request_and_nothing_else() {
    let model = Model::v3_basic();
    let deadline = Duration::from_millis(150);
    let rig = Rig::with(model, limits(), model.deal(7, 1, 1, 0), deadline);
    let request = request(vec![9, 8, 7], 5);
    let expected = bits(&rig.run(&request).await);
    rig.trouble.refuse(-1);
    let events = rig.run(&request).await;
    let Some(Event::Failed(Failure::Exchange(failure))) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!(
        (failure.layer, failure.epoch, failure.node.as_str()),
        (1, 7, "expert-1")
    );
    assert!(
        failure.attempts > 1 && !failure.experts.is_empty(),
        "{failure}"
    );
    assert_eq!(tokens(&events), [0; 0], "no token from a partial sum");
    rig.settle().await;

    rig.trouble.refuse(0);
    assert_eq!(bits(&rig.run(&request).await), expected);
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expert_without_a_home_is_waited_for_and_then_named() {
    let model = Model::v3_basic();
    let empty = guild_scheduler::placement::Placement::new(3, Vec::new()).unwrap();
    let rig = Rig::with(model, limits(), empty, Duration::from_millis(50));
    let events = rig.run(&request(vec![1, 2], 2)).await;
    let Some(Event::Failed(Failure::Exchange(failure))) = events.last() else {
        panic!("{events:?}");
    };
    assert_eq!(
        (failure.layer, failure.epoch, failure.experts.len()),
        (1, 3, 1)
    );
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_given_up_when_the_placement_drops_it() {
    let model = Model::v3_basic();
    let rig = Rig::new(model);
    let request = request(vec![3, 1, 4, 1, 5], 40);
    let expected = bits(&rig.run(&request).await);
    let mut reader = rig.submit(&request);
    let mut got = vec![reader.recv().await.unwrap()];
    rig.wire.silent.store(true, Ordering::SeqCst);
    while reader.unread() > 0 {
        got.push(reader.recv().await.unwrap());
    }
    rig.wire.silent.store(false, Ordering::SeqCst);
    // Whatever was lost stays lost; only going elsewhere helps.
    rig.place(model.deal(2, 50, 2, 9));
    got.extend(read_all(reader).await);
    assert_eq!(bits(&got), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_ends_at_the_deadline() {
    let model = Model::v3_basic();
    let rig = Rig::with(
        model,
        limits(),
        model.deal(1, 1, 2, 0),
        Duration::from_millis(30),
    );
    rig.wire.silent.store(true, Ordering::SeqCst);
    let events = rig.run(&request(vec![1, 2], 2)).await;
    assert!(
        matches!(events.last(), Some(Event::Failed(Failure::Exchange(_)))),
        "{events:?}"
    );
    rig.wire.silent.store(false, Ordering::SeqCst);
    assert_eq!(tokens(&rig.run(&request(vec![1, 2], 2)).await).len(), 2);
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_that_nobody_reads_are_bounded() {
    let model = Model::v3_basic();
    let small = Limits {
        max_running: 2,
        max_waiting: 2,
        ..limits()
    };
    let rig = Rig::with(model, small, model.deal(1, 1, 2, 0), DEADLINE);
    let mut unread = Vec::new();
    let refusal = loop {
        match rig.engine.submit(request(vec![1], 2)) {
            Ok(reader) => unread.push(reader),
            Err(refusal) => break refusal,
        }
        rig.settle().await;
    };
    assert_eq!(
        refusal,
        SubmitError::TooManyReaders {
            readers: 4 * READERS_PER_PLACE
        }
    );
    assert_eq!(unread.len(), 4 * READERS_PER_PLACE);
    unread.pop();
    rig.run(&request(vec![1], 2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_leaves_is_forgotten_and_a_slow_one_holds_up_nobody() {
    let rig = Rig::new(Model::v3_basic());
    let long = request(vec![2; 20], 200);
    let slow = rig.submit(&long);
    let mut leaves = rig.submit(&long);
    leaves.recv().await.unwrap();
    drop(leaves);
    drop(rig.submit(&long));
    // The slow one reads nothing until everybody is through.
    rig.run(&request(vec![3], 3)).await;
    rig.settle().await;
    assert_eq!(tokens(&read_all(slow).await).len(), 200);
    let steps = rig.trouble.executed.load(Ordering::SeqCst);
    let layers = 3 * Model::v3_basic().trunk.config().moe_layers().count() as i64;
    assert!(steps < 260 * layers, "{steps} batches for about 200 steps");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_refuses_and_a_closed_engine_ends() {
    let model = Model::v3_basic();
    let small = Limits {
        max_running: 1,
        max_waiting: 2,
        ..limits()
    };
    let mut rig = Rig::with(model, small, model.deal(1, 1, 2, 0), DEADLINE);
    let long = request(vec![2; 20], 200);
    let mut readers = Vec::new();
    let refusal = loop {
        match rig.engine.submit(long.clone()) {
            Ok(reader) => readers.push(reader),
            Err(refusal) => break refusal,
        }
        assert!(readers.len() <= 3);
    };
    assert!(
        matches!(refusal, SubmitError::Refused(Refusal::Overloaded { .. })),
        "{refusal}"
    );
    rig.engine.close();
    assert_eq!(rig.engine.submit(long).unwrap_err(), SubmitError::Draining);
    for reader in readers {
        assert_eq!(
            tokens(&read_all(reader).await).len(),
            200,
            "a drain lets them end"
        );
    }
    assert_eq!((&mut rig.ended).await, Ok(Ok(())));
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halted_engine_says_so_to_everybody() {
    let mut rig = Rig::new(Model::v3_basic());
    let mut readers: Vec<Events> = (0..4)
        .map(|_| rig.submit(&request(vec![2; 9], 200)))
        .collect();
    readers[0].recv().await.unwrap();
    rig.engine.halt();
    for reader in readers {
        let events = read_all(reader).await;
        assert_eq!(events.last(), Some(&Event::Failed(Failure::ShuttingDown)));
    }
    assert_eq!((&mut rig.ended).await, Ok(Ok(())));
    rig.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_step_surfaces() {
    let mut rig = Rig::new(Model::v3_basic());
    // An id beyond the vocabulary: the service refuses it, the engine trusts it.
    let reader = rig.submit(&request(vec![1 << 20], 3));
    let events = read_all(reader).await;
    assert!(
        !events.iter().any(|e| matches!(e, Event::Finished { .. })),
        "{events:?}"
    );
    let end = (&mut rig.ended).await.unwrap();
    assert!(end.is_err());
    assert_eq!(
        rig.engine.submit(request(vec![1], 1)).unwrap_err(),
        SubmitError::Draining
    );
    rig.settle().await;
}

/// Rows that a request takes through every layer: its last token is never an input.
fn rows_of(request: &Request) -> u64 {
    (request.prompt.len() + request.max_tokens - 1) as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_is_counted_once_for_each_expert_that_the_gate_chose() {
    let model = Model::v3_basic();
    let config = model.trunk.config();
    let mut random = Random(5);
    let requests: Vec<Request> = (0..6)
        .map(|_| {
            let prompt = (0..1 + random.below(30)).map(|_| random.below(config.vocab_size) as u32);
            request(prompt.collect(), 1 + random.below(10))
        })
        .collect();
    let rows: u64 = requests.iter().map(rows_of).sum();
    let chosen = rows * config.num_experts_per_tok as u64;

    let rig = Rig::new(model);
    for request in &requests {
        rig.run(request).await;
    }
    let alone = rig.routed.take();
    let layers: Vec<u32> = config.moe_layers().map(|layer| layer as u32).collect();
    assert_eq!(alone.layers, layers);
    assert_eq!(alone.experts as usize, config.n_routed_experts);
    for layer in alone.rows.chunks_exact(config.n_routed_experts) {
        assert_eq!(layer.iter().sum::<u64>(), chosen);
        assert!(
            layer.iter().all(|&n| n <= rows),
            "an expert twice for a row"
        );
    }
    assert!(rig.routed.take().rows.iter().all(|&n| n == 0), "taken once");

    // In one batch the gate chooses the same.
    let readers: Vec<Events> = requests.iter().map(|request| rig.submit(request)).collect();
    for reader in readers {
        read_all(reader).await;
    }
    assert_eq!(rig.routed.take(), alone);
}
