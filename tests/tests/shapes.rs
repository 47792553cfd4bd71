//! Promise 1: a cluster of any shape emits what one process emits, bit for bit:
//! token ids and log-probabilities, whatever the number of nodes, the fabric,
//! the processes, the threads and the batch.

#![allow(clippy::unwrap_used)]

use guild_model::Checkpoint;
use guild_model::quantize::{DEFAULT_SHARD_BYTES, Job};
use guild_tests::client::{Answer, generate_all, generate_each, mixed_workload};
use guild_tests::process::{Cluster, Shape, demo, golden_dir};

/// The reference: one process, one node of each kind, one thread, each request alone.
async fn alone(model: &std::path::Path, vocab: u32) -> Vec<Answer> {
    let cluster = Cluster::start(Shape::Local, model, 1, 1, &["--threads", "1"]);
    generate_each(&cluster.grpc, &mixed_workload(vocab)).await
}

fn assert_same(what: &str, want: &[Answer], got: &[Answer]) {
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        assert_eq!(
            want.token_ids, got.token_ids,
            "{what}: tokens of request {i}"
        );
        assert_eq!(
            want.logprobs, got.logprobs,
            "{what}: logprobs of request {i}"
        );
        assert_eq!(
            want.prompt_logprobs, got.prompt_logprobs,
            "{what}: prompt logprobs of request {i}"
        );
        assert_eq!(want, got, "{what}: request {i}");
    }
    assert_eq!(want.len(), got.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_of_any_shape_emits_the_same_bits() {
    let want = alone(&demo(), 2048).await;
    assert!(
        want.iter()
            .any(|a| a.token_ids.windows(2).any(|w| w[0] != w[1])),
        "the workload is not degenerate"
    );
    for (shape, attention, expert, threads) in [
        (Shape::Local, 1, 1, "2"),
        (Shape::Local, 1, 2, "1"),
        (Shape::Local, 1, 5, "3"),
        (Shape::Local, 2, 3, "2"),
        (Shape::Grpc, 1, 1, "1"),
        (Shape::Grpc, 1, 2, "2"),
        (Shape::Grpc, 1, 5, "2"),
        (Shape::Grpc, 2, 3, "4"),
    ] {
        let what = format!("{shape:?} {attention}x{expert}, {threads} threads");
        let cluster = Cluster::start(shape, &demo(), attention, expert, &["--threads", threads]);
        assert_same(
            &format!("{what}, batch of 16"),
            &want,
            &generate_all(&cluster.grpc, &mixed_workload(2048)).await,
        );
        assert_same(
            &format!("{what}, one by one"),
            &want[..4],
            &generate_each(&cluster.grpc, &mixed_workload(2048)[..4]).await,
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn separate_processes_emit_the_same_bits() {
    let want = alone(&demo(), 2048).await;
    for (attention, expert, threads) in [(1, 1, "1"), (1, 2, "2"), (1, 5, "1"), (2, 3, "2")] {
        let what = format!("processes {attention}x{expert}, {threads} threads");
        let cluster = Cluster::start(
            Shape::Processes,
            &demo(),
            attention,
            expert,
            &["--threads", threads],
        );
        assert_same(
            &what,
            &want,
            &generate_all(&cluster.grpc, &mixed_workload(2048)).await,
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fp8_and_grouped_checkpoints_keep_their_bits_across_shapes() {
    for (case, vocab) in [("v3-fp8", 256), ("v3-mtp", 320), ("v2-lite", 320)] {
        let model = golden_dir(case);
        let want = alone(&model, vocab).await;
        for (shape, attention, expert) in [
            (Shape::Local, 2, 3),
            (Shape::Grpc, 1, 5),
            (Shape::Processes, 1, 2),
        ] {
            let cluster = Cluster::start(shape, &model, attention, expert, &[]);
            let got = generate_all(&cluster.grpc, &mixed_workload(vocab)).await;
            assert_same(
                &format!("{case} {shape:?} {attention}x{expert}"),
                &want,
                &got,
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_checkpoints_keep_their_bits_across_shapes_copied_mapped_or_quantised_at_load() {
    for dtype in ["int4", "int8"] {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join(dtype);
        Job {
            source: &Checkpoint::open(&demo()).unwrap(),
            dtype: dtype.parse().unwrap(),
            shard_bytes: DEFAULT_SHARD_BYTES,
            out: &model,
        }
        .run(&|_| (), &|_, _| ())
        .unwrap();
        let want = alone(&model, 2048).await;
        for (shape, model, attention, expert, flags) in [
            (Shape::Local, &model, 2, 3, ["--threads", "2"].as_slice()),
            (Shape::Local, &demo(), 1, 2, &["--dtype", dtype]),
            (Shape::Grpc, &model, 1, 2, &["--mmap"]),
            (Shape::Processes, &model, 1, 2, &[]),
            (Shape::Processes, &model, 2, 2, &["--mmap"]),
        ] {
            let what = format!("{dtype} {shape:?} {attention}x{expert} {flags:?}");
            let cluster = Cluster::start(shape, model, attention, expert, flags);
            let got = generate_all(&cluster.grpc, &mixed_workload(2048)).await;
            assert_same(&what, &want, &got);
        }
    }
}
