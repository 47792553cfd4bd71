//! Two attention nodes, one of which runs prompts for the other: whatever becomes of the pages on their
//! way, the stream is the same as at one node alone.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{DEADLINE, Model, Rig, limits};
use futures::{StreamExt, stream};
use guild_attention_node::Patience;
use guild_attention_node::service::{Inference, Phase};
use guild_model::cache::Format;
use guild_node::channel::Dialer;
use guild_node::status::reason_of;
use guild_proto::cluster::v1::Duty;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_server::Inference as _;
use guild_proto::inference::v1::{GenerateRequest, SamplingParams, TokenIds};
use guild_proto::pages::v1::pages_client::PagesClient;
use guild_proto::pages::v1::pages_server::{Pages, PagesServer};
use guild_proto::pages::v1::{PageForm, PageFrame, PrefillRequest};
use guild_scheduler::batch::Limits;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

const DIGEST: &str = "d1gest";
const NUMERICS: &str = "numerics";
/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Far less than a page is waited for that is worth a long wait: these prompts are not.
const STUCK: Duration = Duration::from_secs(12);

/// What becomes of the frames of a helper.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Whole,
    /// A bit of this frame is turned.
    Corrupt(usize),
    /// The wire ends after so many frames.
    Dies(usize),
    /// Nothing comes after so many frames.
    Hangs(usize),
    /// Before the first one so many signs come that the engine is at other work.
    Late(u32),
}

/// Between two such signs.
const BEAT: Duration = Duration::from_millis(200);

/// One attention node. Its engine is told to cache in `format`.
struct Node {
    rig: Rig,
    service: Arc<Inference>,
    _phase: watch::Sender<Phase>,
}

impl Node {
    fn new(limits: Limits, format: Format, duty: Duty) -> Node {
        let model = Model::v3_mtp();
        let patience = Patience {
            deadline: DEADLINE,
            ..Patience::default()
        };
        let homes = model.deal(1, 1, 2, 0);
        let rig = Rig::made(model, limits, homes, format, patience, |engine| engine);
        let serving = Phase::Serving {
            engine: rig.engine.clone(),
            digest: DIGEST.to_owned(),
        };
        let (says, hears) = watch::channel(serving);
        let config = Arc::new(model.trunk.config().clone());
        let service = Inference::new(config, "model", hears).pairing(Dialer::Plain, NUMERICS, duty);
        Node {
            rig,
            service: Arc::new(service),
            _phase: says,
        }
    }

    /// What a client of it sees, with a helper or without.
    async fn generate(&self, asked: &GenerateRequest, helper: Option<SocketAddr>) -> Vec<Event> {
        let asked = GenerateRequest {
            prefill_from: helper.map(|at| at.to_string()).unwrap_or_default(),
            ..asked.clone()
        };
        let answer = self.service.generate(Request::new(asked)).await.unwrap();
        let events = answer.into_inner();
        let events = events.map(|event| told(event.unwrap().event.unwrap()));
        events.collect().await
    }

    /// Tokens that it has run.
    fn run(&self) -> u64 {
        self.rig.engine.counts().run
    }
}

/// An event without what depends on who has done the work.
fn told(event: Event) -> Event {
    match event {
        Event::Chunk(mut chunk) => {
            chunk.cached_tokens = 0;
            chunk.drafted_tokens.clear();
            chunk.accepted_tokens.clear();
            Event::Chunk(chunk)
        }
        Event::Complete(mut complete) => {
            complete.usage = None;
            Event::Complete(complete)
        }
        other => other,
    }
}

/// A helper's door, where frames meet their fate.
struct Wire {
    service: Arc<Inference>,
    fate: Fate,
    frames: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Pages for Wire {
    async fn prefill(
        &self,
        call: Request<PrefillRequest>,
    ) -> Result<Response<BoxStream<PageFrame>>, Status> {
        let frames = self.service.prefill(call).await?.into_inner();
        let (fate, seen) = (self.fate, Arc::clone(&self.frames));
        let frames = frames.enumerate().then(move |(at, frame)| {
            seen.fetch_add(1, Ordering::SeqCst);
            async move {
                match fate {
                    Fate::Corrupt(bad) if bad == at => frame.map(|mut frame| {
                        let mut data = frame.data.to_vec();
                        data[7] ^= 4;
                        frame.data = data.into();
                        frame
                    }),
                    Fate::Dies(after) if at >= after => Err(Status::unavailable("gone")),
                    Fate::Hangs(after) if at >= after => std::future::pending().await,
                    _ => frame,
                }
            }
        });
        let beats = match fate {
            Fate::Late(beats) => beats,
            _ => 0,
        };
        let beats = stream::iter(0..beats).then(|_| async {
            tokio::time::sleep(BEAT).await;
            Ok(PageFrame::default())
        });
        Ok(Response::new(beats.chain(frames).boxed()))
    }
}

/// A node that runs prompts for others, and where it is reached.
struct Helper {
    node: Node,
    at: SocketAddr,
    frames: Arc<AtomicUsize>,
}

impl Helper {
    async fn start(limits: Limits, format: Format, duty: Duty, fate: Fate) -> Helper {
        let node = Node::new(limits, format, duty);
        let frames = Arc::<AtomicUsize>::default();
        let wire = Wire {
            service: Arc::clone(&node.service),
            fate,
            frames: Arc::clone(&frames),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(PagesServer::new(wire));
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Helper { node, at, frames }
    }
}

fn prompt(len: u32, seed: u32) -> Vec<u32> {
    (0..len)
        .map(|n| (n * 37 + seed * 11 + n * n % 7) % 60 + 2)
        .collect()
}

fn request(ids: Vec<u32>, temperature: f32) -> GenerateRequest {
    GenerateRequest {
        request_id: "r".to_owned(),
        input: Some(Input::TokenIds(TokenIds { ids })),
        sampling: Some(SamplingParams {
            max_tokens: Some(12),
            temperature: Some(temperature),
            seed: Some(5),
            ignore_eos: true,
            logprobs: Some(2),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    }
}

fn drafting(drafts: usize) -> Limits {
    Limits { drafts, ..limits() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_prompt_another_node_has_run_is_the_same_to_the_bit() {
    for (format, drafts) in [
        (Format::F32, 0),
        (Format::Bf16, 1),
        (Format::Fp8, 0),
        (Format::F32, 2),
    ] {
        let alone = Node::new(drafting(drafts), format, Duty::Both);
        let decoding = Node::new(drafting(drafts), format, Duty::Decode);
        let helper = Helper::start(drafting(drafts), format, Duty::Prefill, Fate::Whole).await;
        for (len, temperature) in [
            (100, 0.0),
            (81, 0.8),
            (64, 0.0),
            (17, 0.7),
            (16, 0.0),
            (3, 0.0),
        ] {
            let asked = request(prompt(len, len), temperature);
            let what = format!("{format} with {drafts} drafts, {len} tokens");
            let before = decoding.run();
            let moved = decoding.generate(&asked, Some(helper.at)).await;
            let here = decoding.run() - before;
            assert_eq!(moved, alone.generate(&asked, None).await, "{what}");
            // The tail and the output: the pages have come.
            let tail = u64::from(len) - u64::from((len - 1) / 16 * 16);
            assert!(
                here <= tail + 12 * (1 + drafts as u64),
                "{what}: {here} run"
            );
        }
        for node in [&decoding, &helper.node] {
            node.rig.settle().await;
        }
        assert!(helper.node.run() > 200 && helper.frames.load(Ordering::SeqCst) > 10);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_becomes_of_the_pages_the_stream_is_the_same() {
    let alone = Node::new(limits(), Format::F32, Duty::Both);
    let asked = request(prompt(120, 1), 0.0);
    let wanted = alone.generate(&asked, None).await;
    for fate in [
        Fate::Corrupt(0),
        Fate::Corrupt(3),
        Fate::Dies(0),
        Fate::Dies(4),
        // Its runtime answers, its engine does not.
        Fate::Hangs(0),
        Fate::Hangs(4),
    ] {
        let decoding = Node::new(limits(), Format::F32, Duty::Decode);
        let helper = Helper::start(limits(), Format::F32, Duty::Prefill, fate).await;
        let got = decoding.generate(&asked, Some(helper.at));
        let got = tokio::time::timeout(STUCK, got).await;
        assert_eq!(got.ok().as_ref(), Some(&wanted), "{fate:?}");
        let kept = match fate {
            Fate::Corrupt(n) | Fate::Dies(n) | Fate::Hangs(n) => n as u64,
            Fate::Whole | Fate::Late(_) => 0,
        };
        let run = decoding.run();
        assert!(
            run >= 120 - 16 * kept,
            "{fate:?}: nothing after the fault is used, {run} run"
        );
        // One that has failed is left alone for a while, and nobody waits for it.
        let frames = helper.frames.load(Ordering::SeqCst);
        let other = request(prompt(120, 2), 0.0);
        let got = decoding.generate(&other, Some(helper.at)).await;
        assert_eq!(got, alone.generate(&other, None).await);
        assert_eq!(helper.frames.load(Ordering::SeqCst), frames, "{fate:?}");
        for node in [&decoding, &helper.node] {
            node.rig.settle().await;
        }
    }
    // Nobody is there, and somebody whose pages are others.
    let decoding = Node::new(limits(), Format::F32, Duty::Decode);
    let nobody = "127.0.0.1:1".parse().unwrap();
    assert_eq!(decoding.generate(&asked, Some(nobody)).await, wanted);
    for (limits, format, duty) in [
        (limits(), Format::Bf16, Duty::Prefill),
        (limits(), Format::F32, Duty::Decode),
        (
            Limits {
                page_tokens: 8,
                ..limits()
            },
            Format::F32,
            Duty::Prefill,
        ),
        (
            Limits {
                prefix_cache: false,
                ..limits()
            },
            Format::F32,
            Duty::Prefill,
        ),
    ] {
        let decoding = Node::new(drafting(0), Format::F32, Duty::Decode);
        let helper = Helper::start(limits, format, duty, Fate::Whole).await;
        assert_eq!(decoding.generate(&asked, Some(helper.at)).await, wanted);
        assert_eq!(helper.node.run(), 0, "it was refused");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_helper_that_is_at_other_work_is_waited_for_longer_than_a_silent_one() {
    let asked = request(prompt(120, 1), 0.0);
    let alone = Node::new(limits(), Format::F32, Duty::Both);
    let wanted = alone.generate(&asked, None).await;
    let decoding = Node::new(limits(), Format::F32, Duty::Decode);
    let helper = Helper::start(limits(), Format::F32, Duty::Prefill, Fate::Late(8)).await;
    assert_eq!(decoding.generate(&asked, Some(helper.at)).await, wanted);
    assert!(
        decoding.run() < 120,
        "its pages are used: {}",
        decoding.run()
    );
    // For ever is too long.
    let decoding = Node::new(limits(), Format::F32, Duty::Decode);
    let helper = Helper::start(limits(), Format::F32, Duty::Prefill, Fate::Late(u32::MAX)).await;
    let got = tokio::time::timeout(STUCK, decoding.generate(&asked, Some(helper.at)));
    assert_eq!(got.await.ok(), Some(wanted));
    assert!(decoding.run() >= 120);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_frees_the_pages_of_both_nodes_at_once() {
    for fate in [Fate::Whole, Fate::Hangs(0), Fate::Hangs(3)] {
        let decoding = Node::new(limits(), Format::F32, Duty::Decode);
        let helper = Helper::start(limits(), Format::F32, Duty::Prefill, fate).await;
        let mut streams = Vec::new();
        for seed in 0..6 {
            let asked = GenerateRequest {
                prefill_from: helper.at.to_string(),
                ..request(prompt(150, seed), 0.0)
            };
            let answer = decoding.service.generate(Request::new(asked)).await;
            streams.push(answer.unwrap().into_inner());
        }
        let enough = match fate {
            Fate::Hangs(after) => 6 * after,
            _ => 1,
        };
        let waits = matches!(fate, Fate::Hangs(_));
        let some = async {
            let running = || decoding.rig.engine.counts().running;
            while helper.frames.load(Ordering::SeqCst) < enough || waits && running() < 6 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, some).await.unwrap();
        drop(streams);
        decoding.rig.settle().await;
        helper.node.rig.settle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_a_request_through_that_waits_for_pages() {
    let decoding = Node::new(limits(), Format::F32, Duty::Decode);
    let helper = Helper::start(limits(), Format::F32, Duty::Prefill, Fate::Dies(5)).await;
    let asked = GenerateRequest {
        prefill_from: helper.at.to_string(),
        ..request(prompt(150, 3), 0.0)
    };
    let answer = decoding.service.generate(Request::new(asked)).await;
    decoding.rig.engine.close();
    let events: Vec<_> = answer.unwrap().into_inner().collect().await;
    assert_eq!(events.len(), 14, "{events:?}");
    assert!(events.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_prompt_for_pages_is_refused_by_field() {
    let helper = Helper::start(limits(), Format::F32, Duty::Both, Fate::Whole).await;
    let form = PageForm {
        model_digest: DIGEST.to_owned(),
        numerics_class: NUMERICS.to_owned(),
        format: "f32".to_owned(),
        page_tokens: 16,
        layers: Model::v3_mtp().trunk.layers().len() as u32,
        drafts: false,
    };
    let right = PrefillRequest {
        form: Some(form.clone()),
        token_ids: prompt(33, 1),
        ..PrefillRequest::default()
    };
    let mut client = PagesClient::connect(format!("http://{}", helper.at))
        .await
        .unwrap();
    let frames = client.prefill(right.clone()).await.unwrap().into_inner();
    let frames: Vec<PageFrame> = frames.map(Result::unwrap).collect().await;
    assert_eq!(frames.iter().filter(|f| !f.digest.is_empty()).count(), 2);
    let wrong = [
        PrefillRequest {
            token_ids: vec![3, 1 << 30],
            ..right.clone()
        },
        PrefillRequest {
            token_ids: Vec::new(),
            ..right.clone()
        },
        PrefillRequest {
            token_ids: prompt(16, 1),
            ..right.clone()
        },
        PrefillRequest {
            token_ids: vec![2; 4000],
            ..right.clone()
        },
        PrefillRequest {
            first_page: 2,
            ..right.clone()
        },
    ];
    for wrong in wrong {
        let refused = client.prefill(wrong.clone()).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Code::InvalidArgument,
            "{wrong:?}: {refused}"
        );
    }
    for form in [
        None,
        Some(PageForm {
            model_digest: "another".to_owned(),
            ..form.clone()
        }),
        Some(PageForm {
            numerics_class: "another".to_owned(),
            ..form.clone()
        }),
        Some(PageForm {
            drafts: true,
            ..form
        }),
    ] {
        let asked = PrefillRequest {
            form,
            ..right.clone()
        };
        let refused = client.prefill(asked).await.unwrap_err();
        assert_eq!(reason_of(&refused).as_deref(), Some("PAGES_DIFFER"));
    }
    helper.node.rig.settle().await;
}
