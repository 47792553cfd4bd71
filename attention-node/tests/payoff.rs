//! Whether drafts are made is measured while they are: where the draft module's experts are slow drafting stops, where
//! the others are it goes on, and neither shows in what a request gets.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{DEADLINE, Fate, Model, Rig, bits, limits, request};
use guild_attention_node::Patience;
use guild_attention_node::sequence::{Event, Request};
use guild_model::cache::Format;
use guild_model::sampler::Sampling;
use guild_scheduler::batch::Limits;
use guild_scheduler::placement::{NodeId, NodeSlots, Placement};

/// Where the experts of the main model are, and those of the draft module.
const MAIN: NodeId = 1;
const MODULE: NodeId = 2;

fn apart(model: &Model) -> Placement {
    let main = model.trunk.config().num_hidden_layers as u32;
    let all = model.deal(1, MAIN, 1, 0).nodes()[0].slots.clone();
    let (main, module): (Vec<_>, Vec<_>) = all.into_iter().partition(|&(layer, _)| layer < main);
    let nodes = [(MAIN, main), (MODULE, module)];
    let nodes = nodes.map(|(node, slots)| NodeSlots { node, slots });
    Placement::new(1, nodes.into()).unwrap()
}

/// Runs these one after the other with a slow node: tokens of output, drafts that were tried, and that held.
async fn drafted(
    model: &'static Model,
    slow: NodeId,
    more: Duration,
    asked: &[Request],
) -> [u32; 3] {
    let plain = Rig::with(model, limits(), model.deal(1, 1, 1, 0), DEADLINE);
    let drafting = Limits {
        drafts: 1,
        ..limits()
    };
    let patience = Patience {
        deadline: DEADLINE,
        ..Patience::default()
    };
    let rig = Rig::made(
        model,
        drafting,
        apart(model),
        Format::F32,
        patience,
        |engine| engine.drafting_while_it_pays(),
    );
    rig.wire.strike(slow, Fate::Slow(more));
    let mut sums = [0; 3];
    for request in asked {
        let events = rig.run(request).await;
        assert_eq!(bits(&events), bits(&plain.run(request).await));
        let Some(Event::Finished {
            generated, spent, ..
        }) = events.last()
        else {
            panic!("{events:?}")
        };
        sums[0] += *generated as u32;
        sums[1] += spent.drafted.iter().sum::<u32>();
        sums[2] += spent.held.iter().sum::<u32>();
    }
    rig.settle().await;
    sums
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafting_stops_where_drafts_take_longer_than_they_save() {
    let requests: Vec<Request> = (0..8)
        .map(|seed| Request {
            sampling: Sampling {
                temperature: 1.0,
                seed: seed.into(),
                ..Sampling::GREEDY
            },
            ..request(vec![3, 1, 4, seed], 60)
        })
        .collect();
    let slow = Duration::from_millis(10);
    let [tokens, tried, _] = drafted(Model::tiny(), MODULE, slow, &requests).await;
    assert!(
        tried > 0 && tried < tokens / 4,
        "{tried} drafts, {tokens} tokens"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafting_goes_on_where_drafts_save_more_than_they_take() {
    let prompt: Vec<u32> = "ROMEO:\n".bytes().map(u32::from).collect();
    let requests: Vec<Request> = (0..3)
        .map(|n| request([&prompt[..], &[70 + n]].concat(), 60))
        .collect();
    let slow = Duration::from_millis(5);
    let [tokens, tried, held] = drafted(Model::demo(), MAIN, slow, &requests).await;
    let steps = tokens - held;
    assert!(tried > steps / 2, "{tried} drafts in {steps} steps");
}
