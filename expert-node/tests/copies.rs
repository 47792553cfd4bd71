//! How experts come to a node that did not have them: right, or not at all, and within its memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;

use bytes::Bytes;
use common::{Key, Node, PATIENCE, Place, Source, Stage, expected, expert, placement, through};
use guild_expert_node::{CopyFrom, ExpertNodeConfig};
use guild_proto::cluster::v1::{
    Placement,
    PlacementState::{Active, Loading, Withdrawn},
};
use guild_proto::experts::v1::{
    BlobChunk, FetchRequest,
    experts_server::{Experts, ExpertsServer},
};
use guild_transport::{ExchangeCode, SlotBlob};
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// What the copies are of.
const KEY: Key = (1, 0);
/// What the node has that they come to.
const OWN: Key = (3, 3);

/// A node `expert-9` that has [`OWN`], is active at epoch 1 and to have [`KEY`] as well at epoch
/// 2, and others that have it already.
struct Scene {
    stage: Stage,
    node: Node,
    active: Placement,
    loading: Placement,
}

impl Scene {
    async fn new(sources: &[Place], change: impl FnOnce(&mut ExpertNodeConfig)) -> Scene {
        let stage = Stage::new().await;
        let node = stage.node("expert-9", change).await;
        let nodes = |own: &[Key]| {
            // The expert is not in the first slot, and some slots have nothing to do with it.
            let others = sources.iter().map(|source| source.with(&[(2, 2), KEY]));
            others.chain([node.place.with(own)]).collect::<Vec<_>>()
        };
        let active = placement(1, Active, &nodes(&[OWN]));
        let loading = placement(2, Loading, &nodes(&[OWN, KEY]));
        stage.publish(std::slice::from_ref(&active));
        stage.ready("expert-9", 1).await;
        Scene {
            stage,
            node,
            active,
            loading,
        }
    }

    fn load(&self) {
        let both = [self.active.clone(), self.loading.clone()];
        self.stage.publish(&both);
    }

    /// The copy has come and computes what it should.
    async fn succeeds(self) {
        self.load();
        let beat = self.stage.ready("expert-9", 2).await;
        assert_eq!(beat.failed_epoch, 0, "{}", beat.failure);
        let place = &self.node.place;
        assert_eq!(through(place, 2, 1).await.unwrap(), expected(KEY));
        assert_eq!(through(place, 2, 0).await.unwrap(), expected(OWN));
        self.node.end().await.unwrap();
    }

    /// The copy has not come, and the node serves what it had.
    async fn fails(self) -> String {
        self.load();
        let own = expert(OWN).bytes();
        let beat = self.stage.hears("expert-9", |beat| {
            beat.failed_epoch == 2 && beat.resident_bytes == own
        });
        let beat = beat.await;
        assert_eq!((beat.ready, beat.epoch), (true, 1));
        let place = &self.node.place;
        assert_eq!(through(place, 1, 0).await.unwrap(), expected(OWN));
        let error = through(place, 2, 1).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::UnknownEpoch);
        self.node.end().await.unwrap();
        beat.failure
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_expert_comes_from_a_node_that_has_it_and_a_canary_row_is_compared() {
    let (place, source) = Source::honest(KEY).serve(50, "expert-0").await;
    Scene::new(&[place], |_| ()).await.succeeds().await;
    assert_eq!(source.given.load(Ordering::Relaxed), 1);
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_so_it_comes_from_the_checkpoint_and_is_compared_all_the_same() {
    let from_disk = |cfg: &mut ExpertNodeConfig| cfg.copy_from = CopyFrom::Checkpoint;
    let (place, source) = Source::honest(KEY).serve(50, "expert-0").await;
    Scene::new(&[place], from_disk).await.succeeds().await;
    assert_eq!(source.given.load(Ordering::Relaxed), 0);
    assert_eq!(source.asked.load(Ordering::Relaxed), 1);

    let mut other = Source::honest(KEY);
    other.off_by = 1.0;
    let (place, _source) = other.serve(50, "expert-0").await;
    let failure = Scene::new(&[place], from_disk).await.fails().await;
    assert!(failure.contains("canary"), "{failure}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_differs_from_its_original_is_refused_with_who_gave_it() {
    let digest_of = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    // Changed on the way: the digest says so.
    let changed = Source::lying(KEY, |blob| {
        let mut bytes = blob.bytes.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        SlotBlob {
            bytes: bytes.into(),
            ..blob
        }
    });
    // Changed at its source, digest and all: one weight has another sign.
    let broken = Source::lying(KEY, move |blob| {
        let mut bytes = blob.bytes.to_vec();
        bytes[256 + 3] ^= 0x80;
        SlotBlob {
            digest: digest_of(&bytes),
            bytes: bytes.into(),
        }
    });
    // Another expert of the same model.
    let other = Source::lying(KEY, |_| {
        let other = expert((1, 1));
        SlotBlob {
            bytes: Bytes::copy_from_slice(other.blob()),
            digest: other.digest(),
        }
    });
    // The expert, but rows come out of its source that are not its.
    let mut elsewhere = Source::honest(KEY);
    elsewhere.off_by = 1.0;
    for (source, says) in [
        (changed, "digest"),
        (broken, "canary"),
        (other, "expert is 1"),
        (elsewhere, "canary"),
    ] {
        let (place, _source) = source.serve(50, "expert-0").await;
        let failure = Scene::new(&[place], |_| ()).await.fails().await;
        assert!(failure.contains("epoch 2"), "{failure}");
        assert!(failure.contains("layer 1, expert 0"), "{failure}");
        assert!(failure.contains("from expert-0"), "{failure}");
        assert!(failure.contains(says), "{says}: {failure}");
    }
}

/// A node that says the beginning of a blob and then nothing, or ends there.
struct Faint {
    ends: bool,
    begun: watch::Sender<usize>,
}

impl Faint {
    async fn serve(ends: bool, id: u32, name: &str) -> (Place, watch::Receiver<usize>) {
        let (begun, seen) = watch::channel(0);
        let faint = Faint { ends, begun };
        let place = common::serve(ExpertsServer::new(faint), id, name).await;
        (place, seen)
    }
}

#[tonic::async_trait]
impl Experts for Faint {
    async fn fetch(
        &self,
        _: Request<FetchRequest>,
    ) -> Result<Response<BoxStream<BlobChunk>>, Status> {
        let original = expert(KEY);
        let half = BlobChunk {
            total: original.blob().len() as u64,
            data: Bytes::copy_from_slice(&original.blob()[..1000]),
            digest: Bytes::copy_from_slice(&original.digest()),
            ..BlobChunk::default()
        };
        let (to, chunks) = tokio::sync::mpsc::channel(1);
        to.send(Ok(half.sealed())).await.unwrap();
        self.begun.send_modify(|begun| *begun += 1);
        let ends = self.ends;
        tokio::spawn(async move {
            if ends {
                let _ = to.send(Err(Status::unavailable("killed"))).await;
            } else {
                to.closed().await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_midway_is_replaced_by_another_and_that_by_the_checkpoint() {
    let (dying, begun) = Faint::serve(true, 50, "expert-0").await;
    let (second, source) = Source::honest(KEY).serve(51, "expert-1").await;
    // Whichever is asked first, the node is helped.
    let scene = Scene::new(&[dying.clone(), second.clone()], |_| ()).await;
    scene.succeeds().await;
    Scene::new(&[second, dying.clone()], |_| ())
        .await
        .succeeds()
        .await;
    assert_eq!(source.given.load(Ordering::Relaxed), 2);
    assert!(*begun.borrow() >= 1);

    let before = *begun.borrow();
    let dead = Place {
        id: 52,
        name: "expert-2".to_owned(),
        address: "127.0.0.1:1".to_owned(),
    };
    Scene::new(&[dying, dead], |_| ()).await.succeeds().await;
    assert_eq!(*begun.borrow(), before + 1);
    // And nobody else has it.
    Scene::new(&[], |_| ()).await.succeeds().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_fails_again_and_again_is_not_asked_for_every_expert() {
    let (dying, begun) = Faint::serve(true, 50, "expert-0").await;
    let stage = Stage::new().await;
    let node = stage.node("expert-9", |_| ()).await;
    let many: Vec<Key> = (0..12).map(|expert| (2, expert)).collect();
    let nodes = [dying.with(&many), node.place.with(&[])];
    let active = placement(1, Active, &nodes);
    stage.publish(std::slice::from_ref(&active));
    stage.ready("expert-9", 1).await;
    let nodes = [dying.with(&many), node.place.with(&many)];
    stage.publish(&[active, placement(2, Loading, &nodes)]);
    stage.ready("expert-9", 2).await;
    let asked = *begun.borrow();
    assert!((2..=4).contains(&asked), "{asked} times");
    assert_eq!(
        through(&node.place, 2, 11).await.unwrap(),
        expected((2, 11))
    );
    node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_withdrawn_placement_stops_its_copies_at_once_and_gives_their_memory_back() {
    let (silent, mut begun) = Faint::serve(false, 50, "expert-0").await;
    let scene = Scene::new(&[silent], |_| ()).await;
    scene.load();
    let asked = begun.wait_for(|begun| *begun > 0);
    tokio::time::timeout(PATIENCE, asked)
        .await
        .unwrap()
        .unwrap();
    let withdrawn = placement(2, Withdrawn, &[]);
    let place = scene.node.place.clone();
    // The next one does not wait for the copy that will never come.
    let next = placement(3, Loading, &[place.with(&[OWN, (1, 4)])]);
    let published = [scene.active.clone(), withdrawn, next];
    scene.stage.publish(&published);
    scene.stage.ready("expert-9", 3).await;
    assert_eq!(through(&place, 3, 1).await.unwrap(), expected((1, 4)));

    // One that is complete already goes as well.
    let each = expert(OWN).bytes();
    let two = |beat: &guild_proto::cluster::v1::HeartbeatRequest| beat.resident_bytes == 2 * each;
    scene.stage.hears("expert-9", two).await;
    let published = [scene.active.clone(), placement(3, Withdrawn, &[])];
    scene.stage.publish(&published);
    let beat = scene.stage.ready("expert-9", 1).await;
    assert_eq!(beat.failed_epoch, 0);
    scene
        .stage
        .hears("expert-9", |beat| beat.resident_bytes == each)
        .await;
    let error = through(&place, 3, 1).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::UnknownEpoch);
    assert_eq!(through(&place, 1, 0).await.unwrap(), expected(OWN));
    scene.node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_move_between_two_nodes_and_leave_where_no_epoch_needs_them() {
    for stage in [Stage::new().await, Stage::new().await.on_a_board()] {
        let (a, b) = (stage.node("a", |_| ()).await, stage.node("b", |_| ()).await);
        let nodes = |of_a: &[Key], of_b: &[Key]| [a.place.with(of_a), b.place.with(of_b)];
        let first = placement(1, Active, &nodes(&[(1, 0), (1, 1)], &[(1, 2)]));
        stage.publish(std::slice::from_ref(&first));
        stage.ready("a", 1).await;
        stage.ready("b", 1).await;
        let moved = nodes(&[(1, 1)], &[(1, 2), (1, 0)]);
        stage.publish(&[first, placement(2, Loading, &moved)]);
        stage.ready("a", 2).await;
        stage.ready("b", 2).await;
        stage.publish(&[placement(2, Active, &moved)]);
        // Some still send by the old epoch, others by the new one.
        assert_eq!(through(&a.place, 1, 0).await.unwrap(), expected((1, 0)));
        assert_eq!(through(&b.place, 2, 1).await.unwrap(), expected((1, 0)));

        let each = expert((1, 0)).bytes();
        stage
            .hears("a", |beat| beat.resident_bytes == 2 * each)
            .await;
        let freed = Placement {
            oldest_epoch: 2,
            ..placement(2, Active, &moved)
        };
        stage.publish(&[freed]);
        stage.hears("a", |beat| beat.resident_bytes == each).await;
        stage
            .hears("b", |beat| beat.resident_bytes == 2 * each)
            .await;
        let error = through(&a.place, 1, 0).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::UnknownEpoch);
        assert_eq!(through(&a.place, 2, 0).await.unwrap(), expected((1, 1)));
        a.end().await.unwrap();
        b.end().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_epochs_together_stay_within_the_capacity() {
    let each = expert(OWN).bytes();
    let (place, source) = Source::honest(KEY).serve(50, "expert-0").await;
    // One expert is not too many, but it is still held when the next one comes.
    let scene = Scene::new(&[place], |cfg| cfg.capacity_bytes = 2 * each - 1).await;
    let beat = scene
        .stage
        .hears("expert-9", |beat| beat.free_bytes.is_some());
    assert_eq!(beat.await.free_bytes, Some(each - 1));
    let failure = scene.fails().await;
    assert!(failure.contains("--capacity"), "{failure}");
    assert!(
        failure.contains(&format!("with {each} bytes in memory")),
        "{failure}"
    );
    assert_eq!(
        source.given.load(Ordering::Relaxed),
        0,
        "nothing was copied"
    );

    let (place, _source) = Source::honest(KEY).serve(50, "expert-0").await;
    let scene = Scene::new(&[place], |cfg| cfg.capacity_bytes = 2 * each).await;
    scene.succeeds().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_anything_is_active_a_placement_may_take_the_place_of_the_last() {
    let each = expert(OWN).bytes();
    let stage = Stage::new().await;
    let node = stage.node("a", |cfg| cfg.capacity_bytes = each).await;
    for (epoch, key) in [(1, (1, 0)), (2, (1, 1))] {
        stage.publish(&[placement(epoch, Loading, &[node.place.with(&[key])])]);
        stage.ready("a", epoch).await;
        assert_eq!(through(&node.place, epoch, 0).await.unwrap(), expected(key));
    }
    node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_joined_again_makes_room_for_what_it_is_given_then() {
    let each = expert(OWN).bytes();
    let stage = Stage::new().await;
    let node = stage.node("a", |cfg| cfg.capacity_bytes = each).await;
    // What it had under another id, and what it is given as the node that it is now.
    let before = Place {
        id: node.place.id + 1,
        ..node.place.clone()
    };
    let active = placement(1, Active, &[before.with(&[(1, 0)])]);
    stage.publish(std::slice::from_ref(&active));
    stage.ready("a", 1).await;
    let loading = placement(2, Loading, &[node.place.with(&[(1, 1)])]);
    stage.publish(&[active, loading]);
    stage.ready("a", 2).await;
    assert_eq!(through(&node.place, 2, 0).await.unwrap(), expected((1, 1)));
    node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_how_fast_it_is_and_what_room_it_has() {
    let scene = Scene::new(&[], |_| ()).await;
    let beat = scene.stage.hears("expert-9", |beat| {
        beat.rows_per_second > 0.0 && beat.free_bytes.is_some_and(|free| free > 0)
    });
    assert_eq!(beat.await.resident_bytes, expert(OWN).bytes());
    scene.node.end().await.unwrap();
}
