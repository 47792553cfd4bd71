//! What a slot holds, from node to node: whole and right, or an error that names where it failed.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::{EPOCH, Node, SLOTS, both, gated, links, to};
use guild_proto::experts::v1::{self, BlobChunk, experts_server::Experts};
use guild_transport::{
    Batch, CHUNK_BYTES, DIGEST_BYTES, ExchangeCode, ExchangeError, Fabric, FetchRequest,
    LinkLimits, Links, ServiceLimits, SlotBlob, SlotHost, Work,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// Two whole chunks and a piece.
const LEN: usize = 2 * CHUNK_BYTES + 1000;

/// No two pieces of it are alike.
fn content() -> Bytes {
    (0..LEN as u32)
        .map(|i| (i * 31 + (i >> 13)) as u8)
        .collect()
}

const DIGEST: [u8; DIGEST_BYTES] = [7; DIGEST_BYTES];

/// A host whose slots hold [`content`].
struct Giving {
    content: Bytes,
    asked: AtomicUsize,
}

impl Giving {
    fn new() -> Arc<Giving> {
        Arc::new(Giving {
            content: content(),
            asked: AtomicUsize::new(0),
        })
    }
}

impl SlotHost for Giving {
    fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        common::honest(0).execute(work)
    }

    fn blob(&self, epoch: u64, slot: u32) -> Result<SlotBlob, ExchangeError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let refuse = |code| Err(ExchangeError::new(code, "e0", format!("{epoch}/{slot}")));
        if epoch != EPOCH {
            return refuse(ExchangeCode::UnknownEpoch);
        }
        if slot >= SLOTS {
            return refuse(ExchangeCode::UnknownSlot);
        }
        assert_ne!(slot, 9, "a bug, on purpose");
        Ok(SlotBlob {
            bytes: self.content.clone(),
            digest: DIGEST,
        })
    }
}

fn wanted() -> FetchRequest {
    FetchRequest {
        epoch: EPOCH,
        slot: 1,
        len: LEN,
        deadline: None,
    }
}

async fn fetch(
    links: &Links,
    wanted: FetchRequest,
) -> Result<(Vec<u8>, [u8; DIGEST_BYTES]), ExchangeError> {
    let mut fetch = links.fetch(0, wanted).await?;
    let mut all = Vec::new();
    while let Some(piece) = fetch.next().await? {
        assert!(piece.len() <= CHUNK_BYTES);
        all.extend_from_slice(&piece);
    }
    Ok((all, fetch.digest()))
}

#[tokio::test]
async fn a_blob_arrives_whole_over_the_wire_and_without_one() {
    let (_server, fabrics) = both(Giving::new());
    for links in &fabrics {
        let (bytes, digest) = fetch(links, wanted()).await.unwrap();
        assert!(bytes == content());
        assert_eq!(digest, DIGEST);
    }
}

#[tokio::test]
async fn what_a_node_does_not_have_is_refused_by_name() {
    let (_server, fabrics) = both(Giving::new());
    for links in &fabrics {
        let refused = async |wanted| fetch(links, wanted).await.unwrap_err();
        let error = refused(FetchRequest {
            epoch: 8,
            ..wanted()
        })
        .await;
        assert_eq!(error.code, ExchangeCode::UnknownEpoch);
        assert_eq!(error.node, "e0");
        let error = refused(FetchRequest {
            slot: SLOTS,
            ..wanted()
        })
        .await;
        assert_eq!(error.code, ExchangeCode::UnknownSlot);
        let error = refused(FetchRequest {
            len: LEN + 1,
            ..wanted()
        })
        .await;
        assert_eq!(error.code, ExchangeCode::Malformed);
        assert!(
            error.message.contains("525288 bytes instead of 525289"),
            "{error}"
        );
        let error = refused(FetchRequest {
            slot: 9,
            ..wanted()
        })
        .await;
        assert_eq!(error.code, ExchangeCode::Internal);
        assert!(error.message.contains("panicked"), "{error}");
        // A node that has nothing to give says so.
        let (_server, others) = both(common::honest(0));
        for links in &others {
            let error = fetch(links, wanted()).await.unwrap_err();
            assert_eq!(error.code, ExchangeCode::UnknownSlot);
        }
    }
    let nobody = links(LinkLimits::default(), &[]);
    let error = fetch(&nobody, wanted()).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::UnknownNode);
}

/// What a lying node sends, and then whether it ends its stream.
#[derive(Clone)]
struct Liar {
    chunks: Vec<BlobChunk>,
    /// The last one again and again, moved on by its length.
    for_ever: bool,
    ends: bool,
}

#[tonic::async_trait]
impl Experts for Liar {
    async fn fetch(
        &self,
        _: Request<v1::FetchRequest>,
    ) -> Result<Response<BoxStream<BlobChunk>>, Status> {
        let (to, chunks) = mpsc::channel(1);
        let liar = self.clone();
        tokio::spawn(async move {
            for chunk in &liar.chunks {
                let _ = to.send(Ok(chunk.clone())).await;
            }
            let mut last = liar.chunks.last().cloned().unwrap_or_default();
            if liar.for_ever {
                loop {
                    last.offset += last.data.len() as u64;
                    if to.send(Ok(last.clone())).await.is_err() {
                        return;
                    }
                }
            }
            if !liar.ends {
                to.closed().await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }
}

fn honest_chunks() -> Vec<BlobChunk> {
    let content = content();
    let mut chunks = Vec::new();
    for offset in (0..LEN).step_by(CHUNK_BYTES) {
        let chunk = BlobChunk {
            total: LEN as u64,
            offset: offset as u64,
            data: content.slice(offset..LEN.min(offset + CHUNK_BYTES)),
            digest: if offset == 0 {
                Bytes::copy_from_slice(&DIGEST)
            } else {
                Bytes::new()
            },
            ..BlobChunk::default()
        };
        chunks.push(chunk.sealed());
    }
    chunks
}

/// What comes of an honest stream that `change` has been at.
async fn lied(change: impl FnOnce(&mut Liar)) -> Result<Vec<u8>, ExchangeError> {
    let mut liar = Liar {
        chunks: honest_chunks(),
        for_ever: false,
        ends: true,
    };
    change(&mut liar);
    let node = Node::raw(liar);
    let limits = LinkLimits {
        fetch_stall: Duration::from_millis(300),
        ..LinkLimits::default()
    };
    let links = links(limits, &[(0, &node.address)]);
    fetch(&links, wanted()).await.map(|(bytes, _)| bytes)
}

#[tokio::test]
async fn a_stream_that_is_not_the_blob_is_refused_for_what_is_wrong_with_it() {
    assert!(lied(|_| {}).await.unwrap() == content());
    type Change = fn(&mut Liar);
    let lies: [(&str, ExchangeCode, Change); 12] = [
        ("crc", ExchangeCode::Checksum, |liar| {
            let mut data = liar.chunks[1].data.to_vec();
            data[77] ^= 4;
            liar.chunks[1].data = data.into();
        }),
        ("instead of 525288", ExchangeCode::Malformed, |liar| {
            liar.chunks[0].total = 1 << 60;
        }),
        ("instead of 525288", ExchangeCode::Malformed, |liar| {
            liar.chunks[2].total += 1;
        }),
        (
            "byte 524288 came instead of 262144",
            ExchangeCode::Malformed,
            |liar| {
                liar.chunks.remove(1);
            },
        ),
        (
            "byte 0 came instead of 262144",
            ExchangeCode::Malformed,
            |liar| {
                liar.chunks.insert(0, liar.chunks[0].clone());
            },
        ),
        ("a digest of 0 bytes", ExchangeCode::Malformed, |liar| {
            liar.chunks[0].digest = Bytes::new();
        }),
        ("a digest of 33 bytes", ExchangeCode::Malformed, |liar| {
            liar.chunks[0].digest = vec![0; 33].into();
        }),
        ("a piece of 0 bytes", ExchangeCode::Malformed, |liar| {
            liar.chunks[1].data = Bytes::new();
            liar.chunks[1] = liar.chunks[1].clone().sealed();
        }),
        ("where 0 are left", ExchangeCode::Malformed, |liar| {
            liar.for_ever = true;
        }),
        (
            "before it was complete",
            ExchangeCode::Unreachable,
            |liar| {
                liar.chunks.pop();
            },
        ),
        ("before it began", ExchangeCode::Malformed, |liar| {
            liar.chunks.clear();
        }),
        ("silent for 300ms", ExchangeCode::Deadline, |liar| {
            liar.chunks.pop();
            liar.ends = false;
        }),
    ];
    for (says, code, change) in lies {
        let error = lied(change).await.unwrap_err();
        assert_eq!(error.code, code, "{says}: {error}");
        assert_eq!(error.node, "e0");
        assert!(error.message.contains(says), "{says}: {error}");
        assert!(error.message.contains("epoch 7, slot 1"), "{error}");
    }
}

#[tokio::test]
async fn a_peer_that_never_says_a_word_is_given_up() {
    // It takes the connection and nothing more.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = deaf.local_addr().unwrap().to_string();
    let limits = LinkLimits {
        fetch_stall: Duration::from_millis(100),
        connect_timeout: Duration::from_millis(100),
        ..LinkLimits::default()
    };
    let links = links(limits, &[(0, &address)]);
    let error = fetch(&links, wanted()).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::Deadline);
    // And so is one that is late, whatever it does.
    let silent = lied_until(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(silent.code, ExchangeCode::Deadline);
    assert!(silent.message.contains("not complete in time"), "{silent}");
}

async fn lied_until(time: Duration) -> Result<(Vec<u8>, [u8; DIGEST_BYTES]), ExchangeError> {
    let node = Node::raw(Liar {
        chunks: honest_chunks()[..1].to_vec(),
        for_ever: false,
        ends: false,
    });
    let links = links(LinkLimits::default(), &[(0, &node.address)]);
    let deadline = Some(Instant::now() + time);
    fetch(
        &links,
        FetchRequest {
            deadline,
            ..wanted()
        },
    )
    .await
}

/// A node that gives one blob away at a time, and the wish for one that is more than can be on its way.
fn narrow(limits: ServiceLimits) -> (Node, Links, FetchRequest) {
    let len = 32 * CHUNK_BYTES;
    let host = Arc::new(Giving {
        content: vec![1; len].into(),
        asked: AtomicUsize::new(0),
    });
    let limits = ServiceLimits {
        max_fetches: 1,
        ..limits
    };
    let server = Node::serve(0, host, limits);
    let links = links(LinkLimits::default(), &[(0, &server.address)]);
    (server, links, FetchRequest { len, ..wanted() })
}

/// Waits for the place of another blob.
async fn given_back(links: &Links, wanted: FetchRequest) {
    let patience = Instant::now() + Duration::from_secs(10);
    while links.fetch(0, wanted).await.is_err() {
        assert!(Instant::now() < patience, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn only_so_many_blobs_are_given_away_at_a_time_and_one_that_is_dropped_frees_its_place() {
    let (_server, links, large) = narrow(ServiceLimits::default());
    let mut first = links.fetch(0, large).await.unwrap();
    first.next().await.unwrap();
    let error = links.fetch(0, large).await.unwrap_err();
    assert_eq!(error.code, ExchangeCode::Overloaded);
    drop(first);
    given_back(&links, large).await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_does_not_keep_its_place() {
    let (_server, links, large) = narrow(ServiceLimits {
        fetch_stall: Duration::from_millis(100),
        ..ServiceLimits::default()
    });
    let mut idle = links.fetch(0, large).await.unwrap();
    given_back(&links, large).await;
    // What it takes in the end is not taken for the whole.
    let end = loop {
        match idle.next().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    let error = end.unwrap_err();
    assert_eq!(error.code, ExchangeCode::Unreachable);
}

#[tokio::test]
async fn rows_and_blobs_do_not_wait_for_each_other() {
    // Rows that are in work hold a blob up for moments only.
    let gate = gated(0);
    struct Both(Arc<common::Gated>, Arc<Giving>);
    impl SlotHost for Both {
        fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
            self.0.execute(work)
        }
        fn blob(&self, epoch: u64, slot: u32) -> Result<SlotBlob, ExchangeError> {
            self.1.blob(epoch, slot)
        }
    }
    let host = Arc::new(Both(gate.clone(), Giving::new()));
    let server = Node::serve(0, host, ServiceLimits::default());
    let links = links(LinkLimits::default(), &[(0, &server.address)]);
    let batch = Batch {
        epoch: EPOCH,
        width: 2,
        rows: &[1.0, 2.0],
        assignments: &[to(0, 1, 0)],
        deadline: None,
    };
    let rows = links.dispatch(batch).unwrap();
    gate.arrived(1).await;
    let (bytes, _) = fetch(&links, wanted()).await.unwrap();
    assert!(bytes == content());
    // And a blob that nobody takes does not hold rows up.
    let mut begun = links.fetch(0, wanted()).await.unwrap();
    begun.next().await.unwrap();
    gate.open();
    assert_eq!(links.combine(rows).await.unwrap().rows, [2.0, 4.0]);
    assert_eq!(
        links
            .combine(links.dispatch(batch).unwrap())
            .await
            .unwrap()
            .rows,
        [2.0, 4.0]
    );
}

#[tokio::test]
async fn a_node_that_goes_away_or_comes_back_is_noticed() {
    let host = Arc::new(Giving {
        content: vec![1; 32 * CHUNK_BYTES].into(),
        asked: AtomicUsize::new(0),
    });
    let server = Node::serve(0, host, ServiceLimits::default());
    let links = links(LinkLimits::default(), &[(0, &server.address)]);
    let large = FetchRequest {
        len: 32 * CHUNK_BYTES,
        ..wanted()
    };
    let mut cut = links.fetch(0, large).await.unwrap();
    let address = server.address.parse().unwrap();
    server.kill();
    let end = loop {
        match cut.next().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert_eq!(end.unwrap_err().code, ExchangeCode::Unreachable);

    let again = Giving::new();
    let server = Node::serve_at(address, 0, again, ServiceLimits::default());
    let patience = Instant::now() + Duration::from_secs(10);
    while fetch(&links, wanted()).await.is_err() {
        assert!(Instant::now() < patience, "the node was not found again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.closing.cancel();
    let error = fetch(&links, wanted()).await.unwrap_err();
    assert!(
        error.is_retryable() && error.message.contains("draining"),
        "{error}"
    );
}
