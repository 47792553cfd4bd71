//! What comes back is what the slots computed, whatever the leaf, the grouping
//! and the concurrency.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, atomic::Ordering};

use common::{EPOCH, Node, SLOTS, honest, links, name, oracle, to};
use guild_proto::limits::{MAX_ROWS, MAX_WIDTH};
use guild_transport::{
    Assignment, Batch, ExchangeCode, Fabric, LinkLimits, Links, NodeId, ServiceLimits, Switchboard,
};
use proptest::prelude::*;
use tokio::runtime::Runtime;

const NODES: NodeId = 4;

/// Every node by gRPC, every node in this process, and half of each.
fn fabrics() -> (Vec<Node>, [Links; 3]) {
    let all = Switchboard::default();
    let even = Switchboard::default();
    let mut served = Vec::new();
    let mut peers = Vec::new();
    for node in 0..NODES {
        let host = honest(node);
        all.attach(name(node), host.clone());
        if node % 2 == 0 {
            even.attach(name(node), host.clone());
        }
        let server = Node::serve(node, host, ServiceLimits::default());
        peers.push((node, name(node), server.address.clone()));
        served.push(server);
    }
    let fabric = |board: Option<&Switchboard>| {
        let handle = tokio::runtime::Handle::current();
        let links = Links::new("a0", LinkLimits::default(), handle);
        links.set_nodes(&peers, board);
        links
    };
    let fabrics = [fabric(None), fabric(Some(&all)), fabric(Some(&even))];
    (served, fabrics)
}

fn batches() -> impl Strategy<Value = (usize, Vec<f32>, Vec<Assignment>)> {
    (1usize..40, 1usize..24).prop_flat_map(|(width, num_rows)| {
        let rows = prop::collection::vec(any::<f32>(), width * num_rows);
        let assignment = (0..num_rows as u32, 0..NODES, 0..SLOTS)
            .prop_map(|(row, node, slot)| to(node, slot, row));
        let assignments = prop::collection::vec(assignment, 0..120);
        (Just(width), rows, assignments)
    })
}

#[test]
fn local_and_grpc_give_the_same_rows() {
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let (_served, fabrics) = fabrics();
    proptest!(ProptestConfig::with_cases(96), |((width, rows, assignments) in batches())| {
        let expected: Vec<u32> = assignments
            .iter()
            .flat_map(|a| {
                let start = a.row as usize * width;
                rows[start..start + width].iter().map(|&x| oracle(a.node, a.slot, x).to_bits())
            })
            .collect();
        for fabric in &fabrics {
            let batch = Batch { epoch: EPOCH, width, rows: &rows, assignments: &assignments, deadline: None };
            let returned = runtime.block_on(fabric.combine(fabric.dispatch(batch).unwrap())).unwrap();
            let bits: Vec<u32> = returned.rows.iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(returned.width, width);
            prop_assert_eq!(&bits, &expected);
        }
    });
}

#[tokio::test]
async fn a_node_gets_one_message_and_every_row_once() {
    let host = honest(0);
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    let links = links(LinkLimits::default(), &[(0, &server.address)]);
    let assignments: Vec<_> = (0..SLOTS)
        .flat_map(|slot| [to(0, slot, 0), to(0, slot, 1)])
        .collect();
    let batch = Batch {
        epoch: EPOCH,
        width: 1,
        rows: &[1.0, 2.0],
        assignments: &assignments,
        deadline: None,
    };
    let returned = links.combine(links.dispatch(batch).unwrap()).await.unwrap();
    assert_eq!(returned.rows.len(), 2 * SLOTS as usize);
    assert_eq!(host.executed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_empty_batch_goes_nowhere_and_returns_nothing() {
    let links = links(LinkLimits::default(), &[(0, "127.0.0.1:1")]);
    let batch = Batch {
        epoch: EPOCH,
        width: 0,
        rows: &[],
        assignments: &[],
        deadline: None,
    };
    let returned = links.combine(links.dispatch(batch).unwrap()).await.unwrap();
    assert!(returned.rows.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_dispatches_at_a_time() {
    const DISPATCHES: usize = 1000;
    let served: Vec<Node> = (0..2)
        .map(|node| {
            let limits = ServiceLimits {
                max_frames: 2 * DISPATCHES,
                ..ServiceLimits::default()
            };
            Node::serve(node, honest(node), limits)
        })
        .collect();
    let limits = LinkLimits {
        max_frames: DISPATCHES,
        ..LinkLimits::default()
    };
    let links = Arc::new(links(
        limits,
        &[(0, &served[0].address), (1, &served[1].address)],
    ));
    let dispatches = (0..DISPATCHES).map(|i| {
        let links = Arc::clone(&links);
        tokio::spawn(async move {
            let rows: Vec<f32> = (0..6).map(|j| (i * 6 + j) as f32).collect();
            let assignments = [
                to(i as u32 % 2, 2, 1),
                to(0, 5, 0),
                to(1, i as u32 % SLOTS, 2),
            ];
            let batch = Batch {
                epoch: EPOCH,
                width: 2,
                rows: &rows,
                assignments: &assignments,
                deadline: None,
            };
            let returned = links.combine(links.dispatch(batch).unwrap()).await.unwrap();
            let expected: Vec<f32> = assignments
                .iter()
                .flat_map(|a| {
                    let start = a.row as usize * 2;
                    rows[start..start + 2]
                        .iter()
                        .map(|&x| oracle(a.node, a.slot, x))
                })
                .collect();
            assert_eq!(returned.rows, expected);
        })
    });
    for done in futures::future::join_all(dispatches).await {
        done.unwrap();
    }
}

#[tokio::test]
async fn a_batch_that_fits_no_message_is_refused_before_it_is_sent() {
    let limits = LinkLimits {
        max_payload_bytes: 64,
        ..LinkLimits::default()
    };
    // Nobody listens there: a refusal cannot come from the far end.
    let small = links(limits, &[(0, "127.0.0.1:1")]);
    let large = links(LinkLimits::default(), &[(0, "127.0.0.1:1")]);
    let refused = |links: &Links, width, rows: &[f32], assignments: &[Assignment]| {
        let batch = Batch {
            epoch: EPOCH,
            width,
            rows,
            assignments,
            deadline: None,
        };
        let error = links.dispatch(batch).unwrap_err();
        assert_eq!(error.code, ExchangeCode::TooLarge, "{error}");
        assert!(!error.is_retryable());
        error.to_string()
    };
    // 17 elements out; 4 out but 20 back.
    let error = refused(&small, 17, &[0.0; 17], &[to(0, 0, 0)]);
    assert!(error.contains("68 bytes of rows out"), "{error}");
    assert!(
        error.contains("to e0") && error.contains("epoch 7"),
        "{error}"
    );
    let five: Vec<_> = (0..5).map(|slot| to(0, slot, 0)).collect();
    let error = refused(&small, 4, &[0.0; 4], &five);
    assert!(error.contains("80 back"), "{error}");
    // The limits of the wire itself.
    let wide = vec![0.0; MAX_WIDTH + 1];
    let error = refused(&large, wide.len(), &wide, &[to(0, 0, 0)]);
    assert!(error.contains("width"), "{error}");
    let many: Vec<_> = (0..=MAX_ROWS as u32).map(|row| to(0, 0, row)).collect();
    let error = refused(&large, 1, &vec![0.0; MAX_ROWS + 1], &many);
    assert!(error.contains("rows: 16385"), "{error}");
}

#[tokio::test]
async fn a_batch_that_does_not_hold_together_is_refused_at_every_leaf() {
    let board = Switchboard::default();
    board.attach(name(0), honest(0));
    let local = Links::new(
        "a0",
        LinkLimits::default(),
        tokio::runtime::Handle::current(),
    );
    local.set_nodes(&[(0, name(0), String::new())], Some(&board));
    let remote = links(LinkLimits::default(), &[(0, "127.0.0.1:1")]);
    for links in [local, remote] {
        let refused = |width, rows: &[f32], assignment| {
            let batch = Batch {
                epoch: EPOCH,
                width,
                rows,
                assignments: &[assignment],
                deadline: None,
            };
            let error = links.dispatch(batch).unwrap_err();
            assert_eq!(error.node, "a0");
            error.code
        };
        assert_eq!(refused(0, &[1.0], to(0, 0, 0)), ExchangeCode::Malformed);
        assert_eq!(refused(2, &[1.0; 3], to(0, 0, 0)), ExchangeCode::Malformed);
        assert_eq!(refused(2, &[1.0; 4], to(0, 0, 2)), ExchangeCode::Malformed);
        assert_eq!(
            refused(2, &[1.0; 4], to(9, 0, 0)),
            ExchangeCode::UnknownNode
        );
    }
}
