//! Attention nodes that run a made-up model, and break off when told to.
//!
//! Like the real one, the model's next token depends on the tokens before it,
//! the sampling parameters and the position in the whole sequence, and on
//! nothing else.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use guild_node::member::{Member, MemberConfig, NodeState};
use guild_node::serve::{Server, bind};
use guild_node::{Shutdown, status};
use guild_proto::cluster::v1::{Duty, Role};
use guild_proto::inference::v1::complete::MatchedStop;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::inference_server::{Inference, InferenceServer};
use guild_proto::inference::v1::{
    AbortRequest, AbortResponse, Chunk, Complete, FinishReason, GenerateRequest, GenerateResponse,
    ModelInfoRequest, ModelInfoResponse, Prompt, SamplingParams, TokenIds, TokenLogprobs,
    TopLogprob, Usage,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

use crate::common::{Coordinator, expect, member};

/// Tokens of the made-up model's output are below this: few, so that stop
/// tokens come up.
pub(crate) const VOCABULARY: u32 = 24;

/// A request by ids.
pub(crate) fn request(ids: &[u32], sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        request_id: "resumed".into(),
        input: Some(Input::TokenIds(TokenIds { ids: ids.to_vec() })),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

fn hash(tokens: &[u32], salt: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ salt;
    let step = |h: u64, &t: &u32| (h ^ u64::from(t)).wrapping_mul(0x0100_0000_01b3);
    let h = tokens.iter().fold(start, step);
    h ^ (h >> 29)
}

fn logprobs(before: &[u32], token: u32, top: u32) -> TokenLogprobs {
    let of = |token: u32| -((hash(before, u64::from(token)) % 1000) as f32) / 64.0;
    let top = (0..top).map(|token_id| TopLogprob {
        token_id,
        logprob: of(token_id),
    });
    TokenLogprobs {
        token_id: token,
        logprob: of(token),
        top: top.collect(),
    }
}

/// What an undisturbed node says to a request.
pub(crate) fn events(request: &GenerateRequest, eos: &[u32]) -> Vec<Event> {
    let Some(Input::TokenIds(TokenIds { ids: prompt })) = &request.input else {
        panic!("token ids are expected");
    };
    let sampling = request.sampling.clone().unwrap();
    let mut stops = sampling.stop_token_ids.clone();
    if !sampling.ignore_eos {
        stops.extend_from_slice(eos);
    }
    let scored = |top| (1..prompt.len()).map(move |at| logprobs(&prompt[..at], prompt[at], top));
    let mut events = vec![Event::Prompt(Prompt {
        request_id: request.request_id.clone(),
        token_ids: prompt.clone(),
        logprobs: sampling
            .prompt_logprobs
            .into_iter()
            .flat_map(scored)
            .collect(),
    })];
    let salt = match sampling.temperature.unwrap_or(0.0) {
        0.0 => 0,
        temperature => sampling.seed.unwrap_or(0) ^ u64::from(temperature.to_bits()) << 32,
    };
    let mut tokens = prompt.clone();
    let mut end = (FinishReason::Length, None);
    for generated in 0..sampling.max_tokens.unwrap() {
        let mut token = (hash(&tokens, salt) % u64::from(VOCABULARY)) as u32;
        while generated < sampling.min_tokens.unwrap_or(0) && stops.contains(&token) {
            token = (token + 1) % VOCABULARY;
        }
        let scored = sampling.logprobs.map(|top| logprobs(&tokens, token, top));
        tokens.push(token);
        events.push(Event::Chunk(Chunk {
            token_ids: vec![token],
            text: String::new(),
            logprobs: scored.into_iter().collect(),
            ..Chunk::default()
        }));
        if stops.contains(&token) {
            end = (FinishReason::Stop, Some(MatchedStop::StopTokenId(token)));
            break;
        }
    }
    events.push(Event::Complete(Complete {
        finish_reason: end.0.into(),
        matched_stop: end.1,
        usage: Some(Usage {
            prompt_tokens: prompt.len() as u32,
            completion_tokens: (tokens.len() - prompt.len()) as u32,
            ..Usage::default()
        }),
    }));
    events
}

/// How a node leaves a request.
#[derive(Clone, Debug)]
pub(crate) enum How {
    /// The connection is reset.
    Cut,
    /// The stream ends as if it were through.
    End,
    /// UNAVAILABLE with this reason.
    Say(&'static str),
    /// A status as a library makes it, without a reason.
    Bare(Code),
    /// Nothing more is heard: not from the stream, not from the node.
    Silence,
    /// Nothing more comes, but the node is well.
    Hang,
    /// The request is refused outright, with this status.
    Refuse(Status),
}

/// After so many events, so.
pub(crate) type Break = (usize, How);

/// What is common to the nodes of a test.
#[derive(Clone, Default)]
pub(crate) struct Plan {
    breaks: Arc<Mutex<VecDeque<Break>>>,
    /// Every request that a node has got: its name, the request.
    calls: Arc<Mutex<Vec<(String, GenerateRequest)>>>,
}

impl Plan {
    /// The next requests, to whatever node, break off like this; those after
    /// them run through.
    pub(crate) fn set(&self, breaks: &[Break]) {
        *self.breaks.lock().unwrap() = breaks.iter().cloned().collect();
        self.calls.lock().unwrap().clear();
    }

    /// Requests since the plan was set.
    pub(crate) fn calls(&self) -> Vec<(String, GenerateRequest)> {
        self.calls.lock().unwrap().clone()
    }

    /// Which nodes have got requests since the plan was set.
    pub(crate) fn homes(&self) -> Vec<String> {
        self.calls().into_iter().map(|(name, _)| name).collect()
    }
}

/// A pretended attention node behind a wire that can be cut.
pub(crate) struct Fake {
    name: String,
    duty: Duty,
    address: String,
    service: Service,
    shutdown: Shutdown,
}

impl Fake {
    /// Serves and joins, ready for whatever placement comes.
    pub(crate) async fn join(coordinator: &Coordinator, name: &str, plan: &Plan) -> Fake {
        Fake::join_for(coordinator, name, plan, Duty::Both).await
    }

    /// The same for a part of the work.
    pub(crate) async fn join_for(
        coordinator: &Coordinator,
        name: &str,
        plan: &Plan,
        duty: Duty,
    ) -> Fake {
        let (wire, listener) = (bind("127.0.0.1:0").await, bind("127.0.0.1:0").await);
        let (wire, listener) = (wire.unwrap(), listener.unwrap());
        let address = wire.local_addr().unwrap().to_string();
        let cut = watch::Sender::new(());
        tokio::spawn(carry(
            wire,
            listener.local_addr().unwrap().to_string(),
            cut.clone(),
        ));
        let service = Service {
            name: name.to_owned(),
            plan: plan.clone(),
            eos: coordinator.eos.clone(),
            cut,
            membership: Arc::default(),
            running: Arc::default(),
        };
        let shutdown = Shutdown::new();
        let server = Server::new()
            .await
            .add(InferenceServer::new(service.clone()));
        tokio::spawn(server.run(listener, shutdown.clone(), Duration::ZERO));
        let fake = Fake {
            name: name.to_owned(),
            duty,
            address,
            service,
            shutdown,
        };
        fake.rejoin(coordinator).await;
        fake
    }

    /// Joins as a new process by the same name would.
    pub(crate) async fn rejoin(&self, coordinator: &Coordinator) {
        let (cluster, digest) = (&coordinator.cluster, &coordinator.digest);
        let joins = member(cluster, digest, Role::Attention, &self.name, &self.address);
        let member = Member::start(MemberConfig {
            duty: self.duty,
            ..joins
        })
        .unwrap();
        expect("joining", || async { member.node_id().is_some() }).await;
        let task = tokio::spawn(async move {
            let mut placements = member.placement();
            loop {
                let newest = placements.borrow_and_update().clone();
                let epoch = newest.map_or(0, |placement| placement.epoch);
                member.set_state(NodeState {
                    epoch,
                    ready: epoch > 0,
                    reason: String::new(),
                    failed: None,
                });
                if placements.changed().await.is_err() {
                    return;
                }
            }
        });
        *self.service.membership.lock().unwrap() = Some(task.abort_handle());
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Where others reach it.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Streams that are open.
    pub(crate) fn running(&self) -> usize {
        self.service.running.load(Ordering::SeqCst)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

/// Carries bytes until it is cut; connections made later are carried again.
async fn carry(wire: TcpListener, to: String, cut: watch::Sender<()>) {
    while let Ok((mut from, _)) = wire.accept().await {
        let (to, mut cut) = (to.clone(), cut.subscribe());
        tokio::spawn(async move {
            let Ok(mut to) = TcpStream::connect(to).await else {
                return;
            };
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

#[derive(Clone)]
struct Service {
    name: String,
    plan: Plan,
    eos: Vec<u32>,
    cut: watch::Sender<()>,
    membership: Arc<Mutex<Option<AbortHandle>>>,
    running: Arc<AtomicUsize>,
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Service {
    /// The last that a stream gives; None: it ends.
    async fn break_off(self, how: How) -> Option<Result<GenerateResponse, Status>> {
        match how {
            How::End => return None,
            How::Say(reason) => return Some(Err(status::unavailable(reason, "as planned", None))),
            How::Bare(code) => return Some(Err(Status::new(code, "as planned"))),
            How::Refuse(status) => return Some(Err(status)),
            How::Hang => {}
            How::Cut => {
                self.cut.send_replace(());
            }
            How::Silence => {
                // Its heartbeats end with the last handle of the membership.
                if let Some(task) = self.membership.lock().unwrap().take() {
                    task.abort();
                }
            }
        }
        std::future::pending().await
    }
}

#[tonic::async_trait]
impl Inference for Service {
    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<BoxStream<GenerateResponse>>, Status> {
        let request = request.into_inner();
        let call = (self.name.clone(), request.clone());
        self.plan.calls.lock().unwrap().push(call);
        let planned = self.plan.breaks.lock().unwrap().pop_front();
        if let Some((_, How::Refuse(status))) = planned {
            return Err(status);
        }
        let mut said = events(&request, &self.eos);
        if let Some((after, _)) = &planned {
            said.truncate(*after);
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        let open = Open(Arc::clone(&self.running));
        let said = said
            .into_iter()
            .map(|event| Ok(GenerateResponse { event: Some(event) }));
        let service = self.clone();
        let last = planned.map(|(_, how)| service.break_off(how));
        let last = stream::iter(last).filter_map(|last| last);
        let all = stream::iter(said).chain(last).map(move |event| {
            let _counted = &open;
            event
        });
        Ok(Response::new(Box::pin(all)))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented("streams are dropped here"))
    }

    async fn model_info(
        &self,
        _: Request<ModelInfoRequest>,
    ) -> Result<Response<ModelInfoResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
