//! Experts of a packed checkpoint move and compute as all others do, copied or mapped.
#![allow(clippy::unwrap_used)]

mod common;

use common::{INSTEAD, Key, Source, Stage, checkpoint, expected, expert, placement, through};
use guild_expert_node::CopyFrom;
use guild_model::{Checkpoint, quantize::Job};
use guild_proto::cluster::v1::PlacementState::{Active, Loading};

/// What the copies are of.
const KEY: Key = (1, 0);
/// What a node has from the start.
const OWN: Key = (3, 3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_packed_expert_comes_from_a_peer_or_a_mapped_file_and_computes_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    Job {
        source: &Checkpoint::open(&common::golden()).unwrap(),
        dtype: "int4-g32".parse().unwrap(),
        shard_bytes: u64::MAX,
        out: &packed,
    }
    .run(&|_| (), &|_, _| ())
    .unwrap();
    INSTEAD.set(packed).unwrap();
    assert!(checkpoint().config().packed.is_some());

    for (mapped, copy_from) in [(false, CopyFrom::Peer), (true, CopyFrom::Checkpoint)] {
        let stage = Stage::new().await;
        let node = stage
            .node("expert-9", |cfg| {
                cfg.copy_from = copy_from;
                if mapped {
                    cfg.model = checkpoint().with_mapped_experts().unwrap();
                }
            })
            .await;
        let (place, source) = Source::honest(KEY).serve(50, "expert-0").await;
        let nodes = |own: &[Key]| [place.with(&[(2, 2), KEY]), node.place.with(own)];
        let active = placement(1, Active, &nodes(&[OWN]));
        stage.publish(std::slice::from_ref(&active));
        stage.ready("expert-9", 1).await;
        let loading = placement(2, Loading, &nodes(&[OWN, KEY]));
        stage.publish(&[active, loading]);
        let beat = stage.ready("expert-9", 2).await;
        assert_eq!(beat.failed_epoch, 0, "{}", beat.failure);
        let bytes = expert(OWN).bytes() + expert(KEY).bytes();
        assert_eq!(beat.resident_bytes, bytes);
        assert_eq!(through(&node.place, 2, 1).await.unwrap(), expected(KEY));
        assert_eq!(through(&node.place, 2, 0).await.unwrap(), expected(OWN));
        let given = source.given.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(given, usize::from(!mapped));
        node.end().await.unwrap();
    }
}
