//! Every fail point of an expert node: what goes wrong there is helped, or is told and changes
//! nothing.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;

use common::{Key, Source, Stage, expected, expert, placement, through};
use guild_node::failpoint;
use guild_proto::cluster::v1::{
    HeartbeatRequest, Placement,
    PlacementState::{Active, Loading},
};

/// What is copied, and what is here already.
const KEY: Key = (1, 0);
const OWN: Key = (3, 3);

/// What a node says that is to copy [`KEY`] from an honest source at epoch 2 while `points` act,
/// and how often the source gave it away.
async fn copying(points: &[(&str, &str)]) -> (HeartbeatRequest, usize) {
    let (place, source) = Source::honest(KEY).serve(50, "expert-0").await;
    let stage = Stage::new().await;
    let node = stage.node("expert-9", |_| ()).await;
    let nodes = |own: &[Key]| [place.with(&[KEY]), node.place.with(own)];
    let active = placement(1, Active, &nodes(&[OWN]));
    stage.publish(std::slice::from_ref(&active));
    stage.ready("expert-9", 1).await;
    for (name, actions) in points {
        failpoint::set(name, actions).unwrap();
    }
    stage.publish(&[active, placement(2, Loading, &nodes(&[OWN, KEY]))]);
    let tried = |beat: &HeartbeatRequest| beat.epoch == 2 || beat.failed_epoch == 2;
    let beat = stage.hears("expert-9", tried).await;
    for (name, _) in points {
        failpoint::set(name, "off").unwrap();
    }
    // Whatever came of it, the node serves, and keeps nothing of what failed.
    assert!(beat.ready, "{beat:?}");
    let held = if beat.epoch == 2 {
        [OWN, KEY].as_slice()
    } else {
        &[OWN]
    };
    let bytes = held.iter().map(|&key| expert(key).bytes()).sum::<u64>();
    stage
        .hears("expert-9", |beat| beat.resident_bytes == bytes)
        .await;
    for (slot, &key) in (0..).zip(held) {
        let rows = through(&node.place, beat.epoch, slot).await.unwrap();
        assert_eq!(rows, expected(key));
    }
    node.end().await.unwrap();
    (beat, source.given.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_on_the_way_from_a_source_is_helped_by_the_checkpoint() {
    for (point, given) in [("copy::source", 0), ("copy::chunk", 1), ("canary::send", 1)] {
        let (beat, gave) = copying(&[(point, "return(error)")]).await;
        assert_eq!(beat.epoch, 2, "{point}: {}", beat.failure);
        assert_eq!(gave, given, "{point}");
    }
    // Time alone is no failure.
    let (beat, gave) = copying(&[("copy::chunk", "sleep(50)")]).await;
    assert_eq!((beat.epoch, gave), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_that_nothing_helps_is_told_and_the_last_epoch_serves_on() {
    let error = "return(error)";
    let fatal: [&[(&str, &str)]; 5] = [
        &[("copy::begin", error)],
        &[("copy::source", error), ("copy::checkpoint", error)],
        &[("digest::check", error)],
        &[("canary::compare", error)],
        &[("epoch::resident", error)],
    ];
    for points in fatal {
        let (beat, _) = copying(points).await;
        assert_eq!((beat.epoch, beat.failed_epoch), (1, 2), "{points:?}");
        assert!(beat.failure.contains("epoch 2"), "{}", beat.failure);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_not_be_freed_is_freed_with_the_next_news() {
    let stage = Stage::new().await;
    let node = stage.node("a", |_| ()).await;
    let at = |epoch, oldest_epoch, key| Placement {
        oldest_epoch,
        ..placement(epoch, Active, &[node.place.with(&[key])])
    };
    stage.publish(&[at(1, 0, (1, 0))]);
    stage.ready("a", 1).await;
    stage.publish(&[at(2, 0, (1, 1))]);
    stage.ready("a", 2).await;
    failpoint::set("epoch::free", "1*return(error)->off").unwrap();
    stage.publish(&[at(2, 1, (1, 1))]);
    stage.publish(&[at(2, 2, (1, 1))]);
    let each = expert((1, 1)).bytes();
    // Rows by the old epoch are answered until then.
    stage.publish(&[at(3, 2, (1, 1))]);
    stage.ready("a", 3).await;
    // In case that this was the news at which it failed.
    stage.publish(&[at(3, 3, (1, 1))]);
    stage.hears("a", |beat| beat.resident_bytes == each).await;
    assert!(through(&node.place, 1, 0).await.is_err());
    assert_eq!(through(&node.place, 3, 0).await.unwrap(), expected((1, 1)));
    node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_active_placement_that_could_not_be_loaded_is_tried_again_by_itself() {
    let stage = Stage::new().await;
    let node = stage.node("a", |_| ()).await;
    let at = |epoch, slots: &[Key]| placement(epoch, Active, &[node.place.with(slots)]);
    stage.publish(&[at(1, &[(1, 0)])]);
    stage.ready("a", 1).await;
    failpoint::set("copy::checkpoint", "2*return(error)->off").unwrap();
    stage.publish(&[at(2, &[(1, 0), (1, 1)])]);
    let failed = stage.hears("a", |beat| beat.failed_epoch == 2).await;
    assert!(!failed.ready, "rows come by epoch 2 now");
    stage.ready("a", 2).await;
    failpoint::set("copy::checkpoint", "off").unwrap();
    assert_eq!(through(&node.place, 2, 1).await.unwrap(), expected((1, 1)));

    // One that gives it nothing at all is no different.
    failpoint::set("epoch::resident", "1*return(error)->off").unwrap();
    stage.publish(&[at(3, &[])]);
    stage.hears("a", |beat| beat.failed_epoch == 3).await;
    stage.ready("a", 3).await;
    failpoint::set("epoch::resident", "off").unwrap();
    node.end().await.unwrap();
}
