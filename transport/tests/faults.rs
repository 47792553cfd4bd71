//! Every way in which an exchange can fail: an error with its origin, never a
//! number, and the link lives on.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use common::{
    EPOCH, Made, Node, Raw, SLOTS, both, frame, gated, honest, links, name, oracle, set_nodes, to,
};
use guild_proto::{
    experts::v1::{CombineFrame, DispatchFrame, ExchangeFault, FaultCode, experts_server::Experts},
    frame::Combine,
};
use guild_transport::{
    Batch, ExchangeCode, ExchangeError, Fabric, LinkLimits, Links, Returned, ServiceLimits,
    SlotHost, Switchboard, Work,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, Streaming};

/// Two rows of width 2 to slot 1 of node 0, and back.
async fn exchange(links: &Links, deadline: Option<Instant>) -> Result<Returned, ExchangeError> {
    exchange_at(links, EPOCH, 1, deadline).await
}

async fn exchange_at(
    links: &Links,
    epoch: u64,
    slot: u32,
    deadline: Option<Instant>,
) -> Result<Returned, ExchangeError> {
    let batch = Batch {
        epoch,
        width: 2,
        rows: &[1.0, 2.0, 3.0, 4.0],
        assignments: &[to(0, slot, 1), to(0, slot, 0)],
        deadline,
    };
    links.combine(links.dispatch(batch)?).await
}

fn right() -> Vec<f32> {
    [3.0, 4.0, 1.0, 2.0].map(|x| oracle(0, 1, x)).to_vec()
}

fn after(ms: u64) -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(ms))
}

#[tokio::test]
async fn what_a_node_refuses_arrives_with_its_name() {
    let (_server, fabrics) = both(honest(0));
    for links in &fabrics {
        let error = exchange_at(links, EPOCH + 1, 1, None).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::UnknownEpoch);
        assert!(error.is_retryable());
        assert_eq!(error.node, "e0");
        assert!(error.message.contains("epoch 8"), "{error}");
        let error = exchange_at(links, EPOCH, SLOTS, None).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::UnknownSlot);
        assert!(error.message.contains("slot 16"), "{error}");
        assert_eq!(exchange(links, None).await.unwrap().rows, right());
    }
}

#[tokio::test]
async fn a_node_that_lies_about_its_rows_or_panics_is_found_out() {
    let mode = Arc::new(AtomicUsize::new(0));
    let host = {
        let mode = Arc::clone(&mode);
        Made(move |work: Work| match mode.load(Ordering::Relaxed) {
            0 => Ok(vec![1.0; work.pairs() * work.width - 1]),
            1 => Ok(vec![1.0; (work.pairs() + 1) * work.width]),
            2 => panic!("a bug, on purpose"),
            _ => honest(0).execute(work),
        })
    };
    let (_server, fabrics) = both(Arc::new(host));
    for links in &fabrics {
        for (lie, says) in ["3 elements", "6 elements", "panicked"].iter().enumerate() {
            mode.store(lie, Ordering::Relaxed);
            let error = exchange(links, None).await.unwrap_err();
            assert_eq!(error.code, ExchangeCode::Internal);
            assert_eq!(error.node, "e0");
            assert!(error.message.contains(says), "{error}");
            assert!(error.message.contains("epoch 7, slots 1"), "{error}");
        }
        mode.store(3, Ordering::Relaxed);
        assert_eq!(exchange(links, None).await.unwrap().rows, right());
    }
}

#[tokio::test]
async fn deadlines_hold_at_both_leaves() {
    let slow = Made(|work: Work| {
        std::thread::sleep(Duration::from_millis(120));
        honest(0).execute(work)
    });
    let (_server, fabrics) = both(Arc::new(slow));
    for links in &fabrics {
        let error = exchange(links, after(20)).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::Deadline);
        assert_eq!(error.node, "e0");
        let passed = Some(Instant::now());
        assert_eq!(
            exchange(links, passed).await.unwrap_err().code,
            ExchangeCode::Deadline
        );
        assert_eq!(exchange(links, after(20_000)).await.unwrap().rows, right());
    }
}

#[tokio::test]
async fn bad_frames_get_a_fault_by_their_id_and_the_stream_goes_on() {
    let server = Node::serve(0, honest(0), ServiceLimits::default());
    let mut raw = Raw::connect(&server.address).await.unwrap();
    let corrupt: Vec<fn(&mut DispatchFrame)> = vec![
        |f| f.crc ^= 1 << 7,
        |f| {
            let mut rows = f.rows.to_vec();
            rows[5] ^= 0x10;
            f.rows = rows.into();
        },
        |f| f.slots[0].slot ^= 1,
        |f| f.slots[1].row_index[0] ^= 1,
        |f| f.epoch ^= 1,
        |f| f.width = 1,
    ];
    let malformed: Vec<fn(&mut DispatchFrame)> = vec![
        |f| f.width = 3,
        |f| f.width = 0,
        |f| f.format = 0,
        |f| f.slots[1].row_index[0] = 2,
        |f| f.rows = f.rows.slice(..9),
        |f| f.width = u32::MAX,
    ];
    let mut id = 0;
    let mut expect = Vec::new();
    for change in corrupt {
        id += 1;
        let mut bad = frame(id).sealed();
        change(&mut bad);
        raw.send(bad).await;
        expect.push(FaultCode::Checksum);
    }
    for change in malformed {
        id += 1;
        let mut bad = frame(id);
        change(&mut bad);
        raw.send(bad.sealed()).await;
        expect.push(FaultCode::Malformed);
    }
    let mut faults: Vec<(u64, ExchangeFault)> = Vec::new();
    for _ in &expect {
        let combine = raw.next().await.unwrap();
        faults.push((combine.id, combine.outcome.unwrap_err()));
    }
    faults.sort_by_key(|(id, _)| *id);
    for ((id, fault), (expected_id, code)) in faults.iter().zip((1..).zip(&expect)) {
        assert_eq!(*id, expected_id);
        assert_eq!(fault.code(), *code, "{id}: {}", fault.message);
        assert_eq!(fault.node, "e0");
        assert!(fault.message.contains("epoch"), "{}", fault.message);
    }
    raw.send(frame(99).sealed()).await;
    let good = raw.next().await.unwrap();
    assert_eq!(good.id, 99);
    assert_eq!(good.outcome.unwrap().num_rows, 3);
}

#[tokio::test]
async fn the_serving_end_holds_to_the_deadline_of_a_frame() {
    let host = gated(0);
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    let mut raw = Raw::connect(&server.address).await.unwrap();
    let mut late = frame(1);
    late.deadline_ms = 20;
    raw.send(late.sealed()).await;
    let fault = raw.next().await.unwrap().outcome.unwrap_err();
    assert_eq!(fault.code(), FaultCode::Deadline);
    host.open();
    raw.send(frame(2).sealed()).await;
    assert!(raw.next().await.unwrap().outcome.is_ok());
}

#[tokio::test]
async fn the_serving_end_refuses_more_than_its_limits() {
    let host = gated(0);
    let limits = ServiceLimits {
        max_streams: 1,
        max_frames: 2,
        ..ServiceLimits::default()
    };
    let server = Node::serve(0, host.clone(), limits);
    let mut raw = Raw::connect(&server.address).await.unwrap();
    for id in 1..=3 {
        raw.send(frame(id).sealed()).await;
    }
    let refused = raw.next().await.unwrap();
    assert_eq!(refused.id, 3);
    assert_eq!(refused.outcome.unwrap_err().code(), FaultCode::Overloaded);
    let second = Raw::connect(&server.address).await.err().unwrap();
    assert_eq!(second.code(), tonic::Code::ResourceExhausted);
    host.open();
    let mut answered = [raw.next().await.unwrap().id, raw.next().await.unwrap().id];
    answered.sort_unstable();
    assert_eq!(answered, [1, 2]);

    // The byte budget: 40 bytes of rows a frame, rounded up to a KiB each.
    let host = gated(0);
    let limits = ServiceLimits {
        max_bytes: 1 << 10,
        ..ServiceLimits::default()
    };
    let server = Node::serve(0, host.clone(), limits);
    let mut raw = Raw::connect(&server.address).await.unwrap();
    raw.send(frame(1).sealed()).await;
    raw.send(frame(2).sealed()).await;
    let refused = raw.next().await.unwrap();
    assert_eq!(refused.id, 2);
    assert_eq!(refused.outcome.unwrap_err().code(), FaultCode::Overloaded);
    host.open();
    assert!(raw.next().await.unwrap().outcome.is_ok());
}

#[tokio::test]
async fn answers_overtake_each_other() {
    let host = gated(0);
    let gate = host.clone();
    let mixed = Made(move |work: Work| {
        if work.slots[0].0 == 0 {
            gate.execute(work)
        } else {
            honest(0).execute(work)
        }
    });
    let server = Node::serve(0, Arc::new(mixed), ServiceLimits::default());
    let links = links(LinkLimits::default(), &[(0, &server.address)]);
    let batch = Batch {
        epoch: EPOCH,
        width: 1,
        rows: &[5.0],
        assignments: &[to(0, 0, 0)],
        deadline: None,
    };
    let first = links.dispatch(batch).unwrap();
    assert_eq!(exchange(&links, None).await.unwrap().rows, right());
    host.open();
    assert_eq!(links.combine(first).await.unwrap().rows, [5.0]);
}

#[tokio::test]
async fn a_link_takes_no_more_than_its_limits() {
    let limits = [
        LinkLimits {
            max_frames: 2,
            ..LinkLimits::default()
        },
        // One dispatch of `exchange` is 16 bytes out and 16 back.
        LinkLimits {
            max_bytes: 64,
            ..LinkLimits::default()
        },
    ];
    for limits in limits {
        let host = gated(0);
        let server = Node::serve(0, host.clone(), ServiceLimits::default());
        let links = links(limits, &[(0, &server.address)]);
        let batch = Batch {
            epoch: EPOCH,
            width: 2,
            rows: &[1.0, 2.0, 3.0, 4.0],
            assignments: &[to(0, 1, 1), to(0, 1, 0)],
            deadline: None,
        };
        let first = links.dispatch(batch).unwrap();
        let second = links.dispatch(batch).unwrap();
        let error = links.dispatch(batch).unwrap_err();
        assert_eq!(error.code, ExchangeCode::Overloaded);
        assert!(error.is_retryable());
        assert_eq!(error.node, "e0");
        host.open();
        assert_eq!(links.combine(first).await.unwrap().rows, right());
        assert_eq!(links.combine(second).await.unwrap().rows, right());
        assert_eq!(exchange(&links, None).await.unwrap().rows, right());
    }
}

#[tokio::test]
async fn a_dead_peer_fails_what_is_in_flight_and_is_found_again() {
    let host = gated(0);
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    let address = server.address.clone();
    let limits = LinkLimits {
        min_backoff: Duration::from_millis(10),
        max_backoff: Duration::from_millis(40),
        ..LinkLimits::default()
    };
    let links = Arc::new(links(limits, &[(0, &address)]));
    let in_flight = tokio::spawn({
        let links = Arc::clone(&links);
        async move { exchange(&links, None).await }
    });
    host.arrived(1).await;
    server.kill();
    let error = in_flight.await.unwrap().unwrap_err();
    host.open();
    assert_eq!(error.code, ExchangeCode::Unreachable);
    assert!(error.is_retryable());
    assert_eq!(error.node, "e0");
    assert!(error.message.contains("epoch 7, slots 1"), "{error}");

    // Nobody there: errors, of the same kind, as long as it lasts.
    for _ in 0..4 {
        let error = exchange(&links, None).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::Unreachable);
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    let _again = Node::serve_at(
        address.parse().unwrap(),
        0,
        honest(0),
        ServiceLimits::default(),
    );
    let returned = loop {
        match exchange(&links, None).await {
            Ok(returned) => break returned,
            Err(error) => assert_eq!(error.code, ExchangeCode::Unreachable),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(returned.rows, right());
}

#[tokio::test]
async fn within_the_pause_after_a_failure_a_dispatch_fails_at_once() {
    let limits = LinkLimits {
        min_backoff: Duration::from_secs(3600),
        max_backoff: Duration::from_secs(3600),
        ..LinkLimits::default()
    };
    let links = links(limits, &[(0, "127.0.0.1:1")]);
    let first = exchange(&links, None).await.unwrap_err();
    assert_eq!(first.code, ExchangeCode::Unreachable);
    let batch = Batch {
        epoch: EPOCH,
        width: 1,
        rows: &[1.0],
        assignments: &[to(0, 1, 0)],
        deadline: None,
    };
    let second = links.dispatch(batch).unwrap_err();
    assert_eq!(second.code, ExchangeCode::Unreachable);
    assert!(second.message.contains("127.0.0.1:1"), "{second}");
}

#[tokio::test]
async fn a_draining_node_answers_what_it_has_and_ends_the_stream() {
    let host = gated(0);
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    let mut raw = Raw::connect(&server.address).await.unwrap();
    raw.send(frame(1).sealed()).await;
    host.arrived(1).await;
    server.closing.cancel();
    raw.send(frame(2).sealed()).await;
    let refused = raw.next().await.unwrap();
    assert_eq!(refused.id, 2);
    assert_eq!(refused.outcome.unwrap_err().code(), FaultCode::Draining);
    host.open();
    let done = raw.next().await.unwrap();
    assert_eq!(done.id, 1);
    assert!(done.outcome.is_ok());
    assert!(raw.next().await.is_none());
    let status = Raw::connect(&server.address).await.err().unwrap();
    assert_eq!(status.code(), tonic::Code::Unavailable);
}

/// A peer whose answer to a frame is what a closure says.
struct Scripted<F> {
    answer: Arc<F>,
    streams: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl<F> Experts for Scripted<F>
where
    F: Fn(&DispatchFrame) -> Vec<CombineFrame> + Send + Sync + 'static,
{
    async fn exchange(
        &self,
        request: Request<Streaming<DispatchFrame>>,
    ) -> Result<Response<BoxStream<CombineFrame>>, Status> {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let (answers, outgoing) = mpsc::channel(16);
        let answer = Arc::clone(&self.answer);
        let mut frames = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                for answer in answer(&frame) {
                    let _ = answers.send(Ok(answer)).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

fn scripted(
    answer: impl Fn(&DispatchFrame) -> Vec<CombineFrame> + Send + Sync + 'static,
) -> (Node, Arc<AtomicUsize>) {
    let streams = Arc::new(AtomicUsize::new(0));
    let node = Node::raw(Scripted {
        answer: Arc::new(answer),
        streams: Arc::clone(&streams),
    });
    (node, streams)
}

/// What an honest peer answers to a frame of `exchange`.
fn answer(frame: &DispatchFrame) -> CombineFrame {
    let pairs: usize = frame.slots.iter().map(|slot| slot.row_index.len()).sum();
    CombineFrame {
        id: frame.id,
        epoch: frame.epoch,
        format: frame.format,
        width: frame.width,
        rows: vec![0; pairs * frame.width as usize * 4].into(),
        ..CombineFrame::default()
    }
}

#[tokio::test]
async fn an_answer_that_disagrees_with_its_dispatch_is_an_error() {
    let changes: Vec<fn(&mut CombineFrame)> = vec![
        |f| f.rows = f.rows.slice(..8),
        |f| f.rows = vec![0; 24].into(),
        |f| f.rows = bytes::Bytes::new(),
        |f| f.width = 1,
        |f| f.width = 4,
        |f| f.epoch += 1,
    ];
    for change in changes {
        let honest_now = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&honest_now);
        let (node, streams) = scripted(move |frame| {
            let mut answer = answer(frame);
            if !flag.load(Ordering::Relaxed) {
                change(&mut answer);
            }
            vec![answer.sealed()]
        });
        let links = links(LinkLimits::default(), &[(0, &node.address)]);
        let error = exchange(&links, None).await.unwrap_err();
        assert_eq!(error.code, ExchangeCode::Malformed, "{error}");
        assert_eq!(error.node, "e0");
        assert!(error.message.contains("epoch 7, slots 1"), "{error}");
        honest_now.store(true, Ordering::Relaxed);
        exchange(&links, None).await.unwrap();
        assert_eq!(streams.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn an_answer_that_cannot_be_trusted_ends_the_connection() {
    type Script = fn(&DispatchFrame) -> Vec<CombineFrame>;
    let scripts: Vec<(ExchangeCode, Script)> = vec![
        (ExchangeCode::Checksum, |frame| {
            let mut answer = answer(frame).sealed();
            answer.crc ^= 1;
            vec![answer]
        }),
        (ExchangeCode::Malformed, |frame| {
            let mut answer = answer(frame);
            answer.format = 9;
            vec![answer.sealed()]
        }),
        (ExchangeCode::Unreachable, |frame| {
            let mut answer = answer(frame);
            answer.id += 1;
            vec![answer.sealed()]
        }),
    ];
    for (code, script) in scripts {
        let (node, streams) = scripted(move |frame| {
            if frame.id == 1 {
                script(frame)
            } else {
                vec![answer(frame).sealed()]
            }
        });
        let limits = LinkLimits {
            min_backoff: Duration::from_millis(1),
            ..LinkLimits::default()
        };
        let links = links(limits, &[(0, &node.address)]);
        let error = exchange(&links, None).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(error.node, "e0");
        while exchange(&links, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(streams.load(Ordering::Relaxed), 2);
    }
}

#[tokio::test]
async fn a_peer_that_stops_answering_loses_the_connection() {
    let (node, streams) = scripted(|frame| {
        if frame.id == 1 {
            return Vec::new();
        }
        vec![answer(frame).sealed()]
    });
    let limits = LinkLimits {
        max_frames: 1,
        stall_grace: Duration::from_millis(50),
        min_backoff: Duration::from_millis(1),
        ..LinkLimits::default()
    };
    let links = links(limits, &[(0, &node.address)]);
    let error = exchange(&links, after(100)).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::Deadline);
    // The only place of the link is taken by the answer that does not come.
    loop {
        match exchange(&links, after(5_000)).await {
            Ok(_) => break,
            Err(error) => assert!(
                matches!(
                    error.code,
                    ExchangeCode::Overloaded | ExchangeCode::Unreachable
                ),
                "{error}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(streams.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn links_outlive_a_change_of_nodes_and_let_go_of_those_that_leave() {
    let (node, streams) = scripted(|frame| vec![answer(frame).sealed()]);
    let links = links(LinkLimits::default(), &[(0, &node.address)]);
    exchange(&links, None).await.unwrap();
    set_nodes(&links, &[(0, &node.address), (1, "127.0.0.1:1")]);
    exchange(&links, None).await.unwrap();
    assert_eq!(
        streams.load(Ordering::Relaxed),
        1,
        "the connection was not kept"
    );
    set_nodes(&links, &[]);
    let error = exchange(&links, None).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::UnknownNode);
    set_nodes(&links, &[(0, &node.address)]);
    exchange(&links, None).await.unwrap();
    assert_eq!(streams.load(Ordering::Relaxed), 2);

    // What is in flight to a node that leaves still comes back.
    let host = gated(0);
    let server = Node::serve(0, host.clone(), ServiceLimits::default());
    set_nodes(&links, &[(0, &server.address)]);
    let batch = Batch {
        epoch: EPOCH,
        width: 2,
        rows: &[1.0, 2.0, 3.0, 4.0],
        assignments: &[to(0, 1, 1), to(0, 1, 0)],
        deadline: None,
    };
    let handle = links.dispatch(batch).unwrap();
    host.arrived(1).await;
    set_nodes(&links, &[]);
    host.open();
    assert_eq!(links.combine(handle).await.unwrap().rows, right());
}

#[tokio::test]
async fn a_local_node_that_left_is_missed() {
    let board = Switchboard::default();
    board.attach(name(0), honest(0));
    let handle = tokio::runtime::Handle::current();
    let links = Links::new("a0", LinkLimits::default(), handle);
    links.set_nodes(&[(0, name(0), String::new())], Some(&board));
    assert_eq!(exchange(&links, None).await.unwrap().rows, right());
    board.detach(&name(0));
    let error = exchange(&links, None).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::Unreachable);
    assert_eq!(error.node, "e0");
}

#[tokio::test]
async fn one_failed_part_fails_the_whole() {
    let good = Node::serve(0, honest(0), ServiceLimits::default());
    let links = links(
        LinkLimits::default(),
        &[(0, &good.address), (1, "127.0.0.1:1")],
    );
    let batch = Batch {
        epoch: EPOCH,
        width: 1,
        rows: &[1.0],
        assignments: &[to(0, 1, 0), to(1, 1, 0)],
        deadline: None,
    };
    let error = links
        .combine(links.dispatch(batch).unwrap())
        .await
        .unwrap_err();
    assert_eq!(error.code, ExchangeCode::Unreachable);
    assert_eq!(error.node, "e1");
}

/// The scripted peer itself speaks the protocol.
#[test]
fn the_scripted_answer_is_well_formed() {
    let combine = Combine::try_from(answer(&frame(1)).sealed()).unwrap();
    assert_eq!(combine.outcome.unwrap().num_rows, 3);
}
