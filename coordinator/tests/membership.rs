//! The coordinator over real loopback gRPC, with nodes that are only pretended.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Attention, Coordinator, LEASE, Node, Script, expect};
use guild_node::member::{REASON_DIGEST, REASON_NUMERICS};
use guild_node::status::reason_of;
use guild_proto::cluster::v1::{PlacementState, RegisterRequest, Role, WatchPlacementRequest};
use guild_proto::inference::v1::generate_response::Event;
use tonic::Code;

#[tokio::test]
async fn nodes_join_load_and_serve_in_any_order_and_health_follows() {
    let coordinator = Coordinator::start().await;
    assert!(!coordinator.serving().await);
    assert_eq!(
        coordinator.status().await.reason,
        "waiting for an expert node"
    );

    let attention = Attention::join(&coordinator, "attention-1", Script::Echo).await;
    let slow = Node::join(&coordinator, Role::Expert, "expert-2").await;
    let quick = Node::join(&coordinator, Role::Expert, "expert-1").await;
    quick.load().await;
    coordinator
        .waits_for("1 of 2 expert nodes to load epoch")
        .await;
    assert!(!coordinator.serving().await);
    let loading = quick.placement(PlacementState::Loading).await;
    assert_eq!(loading.nodes.len(), 2);
    let slots: usize = loading.nodes.iter().map(|node| node.slots.len()).sum();
    assert_eq!(slots, coordinator.experts_in_all());
    // Readiness is refused in words, over the very port clients use.
    assert_eq!(coordinator.http_health().await, 503);
    let refused = coordinator.generate(&[1, 2, 3]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(
        refused.message().contains("expert nodes to load"),
        "{refused}"
    );

    slow.load().await;
    let active = attention.node.placement(PlacementState::Active).await;
    assert_eq!((active.epoch, active.nodes), (loading.epoch, loading.nodes));
    coordinator.waits_for("no attention node is ready").await;
    attention.node.load().await;
    coordinator.is_ready().await;
    let status = coordinator.status().await;
    assert_eq!((status.reason.as_str(), status.epoch), ("", active.epoch));
    assert_eq!(status.nodes.len(), 3);

    let events = coordinator.generate(&[1, 2, 3]).await.unwrap();
    assert!(
        matches!(events.last(), Some(Event::Complete(_))),
        "{events:?}"
    );
    assert_eq!(coordinator.http_health().await, 200);
    let mut stream = coordinator.open_on_http(&[1]).await.unwrap();
    while stream.message().await.unwrap().is_some() {}
}

#[tokio::test]
async fn a_silent_expert_node_takes_readiness_away_until_its_experts_have_a_home() {
    let coordinator = Coordinator::start().await;
    let attention = Attention::join(&coordinator, "attention-1", Script::Echo).await;
    let one = Node::join(&coordinator, Role::Expert, "expert-1").await;
    let two = Node::join(&coordinator, Role::Expert, "expert-2").await;
    for node in [&one, &two, &attention.node] {
        node.load().await;
    }
    coordinator.is_ready().await;
    let before = one.placement(PlacementState::Active).await;
    coordinator.generate(&[5]).await.unwrap();

    // No goodbye: as after SIGKILL or a pulled cable.
    drop(two);
    coordinator
        .waits_for("1 of 1 expert nodes to load epoch")
        .await;
    assert!(!coordinator.serving().await);
    let after = one.placement_above(before.epoch).await;
    assert_eq!(after.nodes.len(), 1);
    assert_eq!(after.nodes[0].slots.len(), coordinator.experts_in_all());
    let kept = before
        .nodes
        .iter()
        .find(|node| node.name == "expert-1")
        .unwrap();
    assert!(
        after.nodes[0].slots.starts_with(&kept.slots),
        "live experts stay"
    );
    one.load().await;
    attention.node.load().await;
    coordinator.is_ready().await;
    coordinator.generate(&[5]).await.unwrap();
}

#[tokio::test]
async fn another_model_or_another_numerics_class_is_refused_with_both_values() {
    let coordinator = Coordinator::start().await;
    let _one = Node::join(&coordinator, Role::Expert, "expert-1").await;
    let request = RegisterRequest {
        role: Role::Expert.into(),
        name: "stranger".into(),
        address: "127.0.0.1:1".into(),
        model_digest: coordinator.digest.clone(),
        numerics_class: common::NUMERICS.into(),
        ..RegisterRequest::default()
    };
    let mut client = coordinator.cluster();
    let other = RegisterRequest {
        model_digest: "another".into(),
        ..request.clone()
    };
    let refused = client.register(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason_of(&refused).as_deref(), Some(REASON_DIGEST));
    assert!(
        refused.message().contains("another") && refused.message().contains(&coordinator.digest)
    );

    let other = RegisterRequest {
        numerics_class: "odd".into(),
        ..request.clone()
    };
    let refused = client.register(other).await.unwrap_err();
    assert_eq!(reason_of(&refused).as_deref(), Some(REASON_NUMERICS));
    assert!(refused.message().contains("odd") && refused.message().contains(common::NUMERICS));

    let other = RegisterRequest {
        role: 0,
        ..request.clone()
    };
    assert_eq!(
        client.register(other).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let other = RegisterRequest {
        name: String::new(),
        ..request
    };
    assert_eq!(
        client.register(other).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    assert_eq!(coordinator.status().await.nodes.len(), 1);
}

#[tokio::test]
async fn what_a_process_watches_ends_when_another_one_takes_its_name() {
    let coordinator = Coordinator::start().await;
    let mut client = coordinator.cluster();
    let request = |incarnation| RegisterRequest {
        role: Role::Expert.into(),
        name: "expert-1".into(),
        address: "127.0.0.1:1".into(),
        model_digest: coordinator.digest.clone(),
        numerics_class: common::NUMERICS.into(),
        incarnation,
        ..RegisterRequest::default()
    };
    let first = client.register(request(1)).await.unwrap().into_inner();
    let watch = WatchPlacementRequest {
        node_id: first.node_id,
    };
    let old = client.watch_placement(watch).await.unwrap();
    let mut old = old.into_inner();
    let second = client.register(request(2)).await.unwrap().into_inner();
    assert_ne!(first.node_id, second.node_id, "an id is one process's");
    let ended = async { while let Ok(Some(_)) = old.message().await {} };
    tokio::time::timeout(common::PATIENCE, ended).await.unwrap();
    let gone = client.watch_placement(watch).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
}

#[tokio::test]
async fn nodes_outlive_the_coordinator_and_epochs_go_on() {
    let coordinator = Coordinator::start().await;
    let attention = Attention::join(&coordinator, "attention-1", Script::Echo).await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    // How often an epoch has to be gone through again depends on who comes back first.
    expert.follow();
    attention.node.follow();
    coordinator.is_ready().await;
    let before = expert.placement(PlacementState::Active).await;

    let coordinator = coordinator.restart().await;
    let after = expert.placement_above(before.epoch).await;
    assert!(after.epoch > before.epoch);
    coordinator.is_ready().await;
    coordinator.generate(&[1]).await.unwrap();
}

#[tokio::test]
async fn a_coordinator_that_remembers_nothing_repeats_no_id() {
    let mut coordinator = Coordinator::start().await;
    let mut ids = BTreeSet::new();
    for life in 0..4 {
        let mut client = coordinator.cluster();
        for name in ["expert-1", "expert-2"] {
            let request = RegisterRequest {
                role: Role::Expert.into(),
                name: name.into(),
                address: "127.0.0.1:1".into(),
                model_digest: coordinator.digest.clone(),
                numerics_class: common::NUMERICS.into(),
                incarnation: 1,
                ..RegisterRequest::default()
            };
            let joined = client.register(request).await.unwrap().into_inner();
            assert!(ids.insert(joined.node_id), "life {life}: {ids:?}");
        }
        coordinator = coordinator.restart().await;
    }
}

#[tokio::test]
async fn a_request_refused_before_it_began_goes_to_another_node() {
    let coordinator = Coordinator::start().await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    // The lower id is tried first, other things being equal.
    let refuses = Attention::join(&coordinator, "attention-1", Script::Refuse).await;
    let serves = Attention::join(&coordinator, "attention-2", Script::Echo).await;
    for node in [&expert, &refuses.node, &serves.node] {
        node.load().await;
    }
    coordinator.ready_attention_nodes(2).await;
    coordinator.generate(&[1, 2]).await.unwrap();
    assert_eq!((refuses.calls(), serves.calls()), (1, 1));
}

#[tokio::test]
async fn a_stream_whose_only_node_stays_silent_ends_with_its_name() {
    let coordinator = Coordinator::start().await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    let mut attention = Attention::join(&coordinator, "attention-1", Script::Hang).await;
    expert.load().await;
    attention.node.load().await;
    coordinator.is_ready().await;
    let mut stream = coordinator.open(&[1, 2, 3]).await.unwrap();
    assert!(matches!(
        stream.message().await.unwrap().unwrap().event,
        Some(Event::Prompt(_))
    ));
    // The connection stays up; only the heartbeats stop.
    attention.fall_silent();
    let error = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended as if it were complete"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(reason_of(&error).as_deref(), Some("ATTENTION_NODE_LOST"));
    assert!(error.message().contains("attention-1"), "{error}");
    assert!(!coordinator.serving().await);
}

#[tokio::test]
async fn dropping_a_stream_cancels_it_at_the_attention_node() {
    let coordinator = Coordinator::start().await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    let attention = Attention::join(&coordinator, "attention-1", Script::Hang).await;
    expert.load().await;
    attention.node.load().await;
    coordinator.is_ready().await;
    let mut stream = coordinator.open(&[1]).await.unwrap();
    stream.message().await.unwrap().unwrap();
    assert_eq!(attention.running(), 1);
    drop(stream);
    expect("cancellation", || async { attention.running() == 0 }).await;
}

#[tokio::test]
async fn a_drain_takes_readiness_first_and_waits_for_streams() {
    let coordinator = Coordinator::start().await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    let attention = Attention::join(&coordinator, "attention-1", Script::Hang).await;
    expert.load().await;
    attention.node.load().await;
    coordinator.is_ready().await;
    let mut stream = coordinator.open(&[1]).await.unwrap();
    stream.message().await.unwrap().unwrap();

    coordinator.shutdown.trigger();
    coordinator.waits_for("shutting down").await;
    tokio::time::sleep(LEASE).await;
    attention.release();
    let mut last = None;
    while let Some(event) = stream.message().await.unwrap() {
        last = event.event;
    }
    assert!(matches!(last, Some(Event::Complete(_))), "{last:?}");
    drop(stream);
    tokio::time::timeout(Duration::from_secs(20), coordinator.task)
        .await
        .expect("the drain ends")
        .unwrap()
        .unwrap();
}
