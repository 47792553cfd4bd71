//! A stream whose attention node goes is continued on another one, and its
//! client cannot tell.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod fake;
mod roles;

use std::time::Duration;

use common::{Coordinator, Node, expect};
use fake::{Break, Fake, How, Plan, VOCABULARY, events, request};
use guild_node::status;
use guild_proto::cluster::v1::Role;
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::{FinishReason, GenerateRequest, SamplingParams};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A coordinator, one expert node, and `N` attention nodes that break by plan.
struct Cluster<const N: usize> {
    coordinator: Coordinator,
    _expert: Node,
    nodes: [Fake; N],
    plan: Plan,
}

impl<const N: usize> Cluster<N> {
    async fn start(resume_wait: Duration) -> Self {
        let coordinator = Coordinator::start_with(resume_wait).await;
        let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
        expert.follow();
        let plan = Plan::default();
        let mut nodes = Vec::new();
        for number in 1..=N {
            let name = format!("attention-{number}");
            nodes.push(Fake::join(&coordinator, &name, &plan).await);
        }
        coordinator.ready_attention_nodes(N).await;
        let Ok(nodes) = nodes.try_into() else {
            panic!("{N} nodes");
        };
        Cluster {
            coordinator,
            _expert: expert,
            nodes,
            plan,
        }
    }

    /// What the client of `request` gets when its nodes break off like this.
    async fn run(&self, request: &GenerateRequest, breaks: &[Break]) -> Result<Vec<Event>, Status> {
        self.plan.set(breaks);
        self.coordinator.run(request.clone()).await
    }

    fn undisturbed(&self, request: &GenerateRequest) -> Vec<Event> {
        events(request, &self.coordinator.eos)
    }
}

/// The reason that a status carries, in the words of whichever room.
fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

/// Long enough for anything that a test brings about.
const PATIENT: Duration = Duration::from_secs(20);

/// Six tokens with all that can be said about them.
fn six() -> GenerateRequest {
    let sampling = SamplingParams {
        max_tokens: Some(6),
        temperature: Some(0.8),
        seed: Some(41),
        ignore_eos: true,
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..SamplingParams::default()
    };
    request(&[3, 5, 8, 13], sampling)
}

#[tokio::test]
async fn a_break_at_any_point_of_a_stream_leaves_no_trace() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    let request = six();
    let undisturbed = cluster.undisturbed(&request);
    assert_eq!(undisturbed.len(), 8);
    let ways = [
        How::Cut,
        How::End,
        How::Say("DRAINING"),
        How::Say("NOT_READY"),
        How::Say("ENGINE_STOPPED"),
        How::Bare(Code::Unknown),
        How::Bare(Code::Unavailable),
    ];
    for how in ways {
        for after in 0..undisturbed.len() {
            let what = format!("{how:?} after {after} events");
            let got = cluster.run(&request, &[(after, how.clone())]).await;
            assert_eq!(got.unwrap(), undisturbed, "{what}");
            let calls = cluster.plan.calls();
            // After the last token there is nothing left to ask for. An event
            // may be lost on a wire that is cut.
            if matches!(how, How::Cut) {
                assert!(calls.len() <= 2, "{what}");
                continue;
            }
            assert_eq!(calls.len(), if after == 7 { 1 } else { 2 }, "{what}");
            let Some((_, second)) = calls.get(1) else {
                continue;
            };
            let Some(Input::TokenIds(ids)) = &second.input else {
                panic!("{what}: {second:?}");
            };
            let emitted = after.saturating_sub(1);
            let sampling = second.sampling.clone().unwrap();
            assert_eq!(ids.ids.len(), 4 + emitted, "{what}");
            assert_eq!(sampling.max_tokens, Some(6 - emitted as u32), "{what}");
            assert_eq!(
                sampling.prompt_logprobs,
                (after == 0).then_some(1),
                "{what}"
            );
        }
    }
}

/// Requests as clients may send them, and up to three breaks.
fn cases() -> impl Strategy<Value = (GenerateRequest, Vec<Break>)> {
    let prompt = prop::collection::vec(0..VOCABULARY, 1..12);
    let how = prop_oneof![
        Just(How::Cut),
        Just(How::End),
        Just(How::Say("DRAINING")),
        Just(How::Say("ENGINE_STOPPED")),
        Just(How::Bare(Code::Internal)),
        Just(How::Refuse(Status::resource_exhausted("no"))),
    ];
    let breaks = prop::collection::vec((0..20usize, how), 0..=3);
    let sampling = (
        1..24u32,
        0..24u32,
        prop::option::of(any::<u64>()),
        prop::collection::vec(0..VOCABULARY, 0..3),
        any::<bool>(),
        (prop::option::of(0..4u32), prop::option::of(0..4u32)),
    );
    let sampling = sampling.prop_map(|(most, least, seed, stop, ignore_eos, (own, of_prompt))| {
        SamplingParams {
            max_tokens: Some(most),
            min_tokens: Some(least.min(most)),
            // The front door knows one greedy seed only.
            temperature: Some(if seed.is_some() { 0.7 } else { 0.0 }),
            seed: Some(seed.unwrap_or(0)),
            stop_token_ids: stop,
            ignore_eos,
            logprobs: own,
            prompt_logprobs: of_prompt,
            ..SamplingParams::default()
        }
    });
    (prompt, sampling, breaks).prop_map(|(ids, sampling, breaks)| (request(&ids, sampling), breaks))
}

/// Whether a request that breaks off like this is a refusal and no more: a new
/// one that nobody takes is not waited for.
fn is_refused(breaks: &[Break], nodes: usize) -> bool {
    let refused = breaks
        .iter()
        .take_while(|(_, how)| matches!(how, How::Refuse(_)));
    refused.count() >= nodes
}

fn random_breaks<const N: usize>(cases_to_run: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let cluster = runtime.block_on(Cluster::<N>::start(PATIENT));
    let config = Config {
        cases: cases_to_run,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let outcome = runner.run(&cases(), |(request, breaks)| {
        let got = runtime.block_on(cluster.run(&request, &breaks));
        match is_refused(&breaks, N) {
            true => prop_assert_eq!(got.unwrap_err().code(), Code::ResourceExhausted),
            false => prop_assert_eq!(got.unwrap(), cluster.undisturbed(&request)),
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn random_breaks_leave_no_trace_with_two_nodes() {
    random_breaks::<2>(96);
}

#[test]
fn random_breaks_leave_no_trace_with_three_nodes() {
    random_breaks::<3>(96);
}

#[tokio::test]
async fn a_silent_node_is_left_when_its_lease_runs_out_and_not_heard_again() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    let request = six();
    for after in [0, 1, 4, 7] {
        // Both are well at first.
        cluster.coordinator.ready_attention_nodes(2).await;
        let got = cluster
            .run(&request, &[(after, How::Silence)])
            .await
            .unwrap();
        assert_eq!(got, cluster.undisturbed(&request), "after {after} events");
        expect("the old stream to be dropped", || async {
            cluster.nodes.iter().all(|node| node.running() == 0)
        })
        .await;
        let first = &cluster.plan.homes()[0];
        let silent = cluster
            .nodes
            .iter()
            .find(|node| node.name() == first)
            .unwrap();
        silent.rejoin(&cluster.coordinator).await;
    }
}

#[tokio::test]
async fn the_only_node_is_waited_for() {
    let cluster = Cluster::<1>::start(PATIENT).await;
    let request = six();
    // A connection that breaks while the node lives: it is gone back to.
    let got = cluster.run(&request, &[(3, How::Cut)]).await.unwrap();
    assert_eq!(got, cluster.undisturbed(&request));

    // A node that is gone: until it is back by the same name.
    cluster.plan.set(&[(4, How::Silence)]);
    let back = async {
        cluster
            .coordinator
            .waits_for("no attention node is ready")
            .await;
        cluster.nodes[0].rejoin(&cluster.coordinator).await;
    };
    let (got, ()) = tokio::join!(cluster.coordinator.run(request.clone()), back);
    assert_eq!(got.unwrap(), cluster.undisturbed(&request));
}

#[tokio::test]
async fn waiting_for_a_node_has_an_end() {
    let cluster = Cluster::<1>::start(Duration::from_millis(300)).await;
    let error = cluster.run(&six(), &[(4, How::Silence)]).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(reason_of(&error).as_deref(), Some("ATTENTION_NODE_LOST"));
    assert!(error.message().contains("attention-1"), "{error}");
    assert!(error.message().contains("300ms"), "{error}");
}

#[tokio::test]
async fn a_request_that_brings_nodes_down_does_not_go_through_all_of_them() {
    let cluster = Cluster::<3>::start(PATIENT).await;
    let fatal = vec![(1, How::Cut); 20];
    let error = cluster.run(&six(), &fatal).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(reason_of(&error).as_deref(), Some("ATTENTION_NODE_LOST"));
    let calls = cluster.plan.calls().len();
    assert!((1..=4).contains(&calls), "{calls} calls");
    // One token each time is progress, but not for ever.
    let slow = vec![(2, How::End); 40];
    let sampling = SamplingParams {
        max_tokens: Some(30),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let long = request(&[2], sampling);
    let error = cluster.run(&long, &slow).await.unwrap_err();
    assert_eq!(reason_of(&error).as_deref(), Some("ATTENTION_NODE_LOST"));
    assert_eq!(cluster.plan.calls().len(), 17);
}

#[tokio::test]
async fn what_another_node_would_say_too_ends_the_stream() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    for after in [0, 3] {
        let got = cluster
            .run(&six(), &[(after, How::Say("EXPERT_LOST"))])
            .await;
        let error = got.unwrap_err();
        assert_eq!(reason_of(&error).as_deref(), Some("EXPERT_LOST"));
        assert_eq!(cluster.plan.calls().len(), 1);
    }
}

#[tokio::test]
async fn an_output_that_has_outgrown_every_node_ends_by_length() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    let too_long = How::Refuse(status::invalid("token_ids", "no room"));
    let breaks = [(4, How::End), (0, too_long.clone()), (0, too_long)];
    let got = cluster.run(&six(), &breaks).await.unwrap();
    assert_eq!(got[..4], cluster.undisturbed(&six())[..4]);
    let Some(Event::Complete(complete)) = got.get(4) else {
        panic!("{got:?}");
    };
    assert_eq!(complete.finish_reason(), FinishReason::Length);
    assert_eq!(complete.usage.as_ref().unwrap().completion_tokens, 3);
}

#[tokio::test]
async fn dropping_a_stream_after_its_move_cancels_it_where_it_is() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    cluster.plan.set(&[(2, How::End), (2, How::Hang)]);
    let mut stream = cluster.coordinator.send(six()).await.unwrap();
    for _ in 0..3 {
        stream.message().await.unwrap().unwrap();
    }
    assert_eq!(cluster.plan.homes().len(), 2);
    let running = || cluster.nodes.iter().map(Fake::running).sum::<usize>();
    assert_eq!(running(), 1);
    drop(stream);
    expect("cancellation", || async { running() == 0 }).await;
}

#[tokio::test]
async fn requests_go_where_the_fewest_tokens_are_outstanding() {
    let cluster = Cluster::<2>::start(PATIENT).await;
    let tokens = |prompt: usize, most| {
        let sampling = SamplingParams {
            max_tokens: Some(most),
            ignore_eos: true,
            ..SamplingParams::default()
        };
        request(&vec![4; prompt], sampling)
    };
    cluster.plan.set(&vec![(1, How::Hang); 4]);
    let mut open = Vec::new();
    // 62 tokens; 15; 15 and 20 are still fewer; so are 35 and 20.
    for (prompt, most) in [(12, 50), (5, 10), (10, 10), (1, 19)] {
        let mut stream = cluster
            .coordinator
            .send(tokens(prompt, most))
            .await
            .unwrap();
        stream.message().await.unwrap().unwrap();
        open.push(stream);
    }
    let [one, two] = ["attention-1", "attention-2"];
    assert_eq!(cluster.plan.homes(), [one, two, two, two]);
    // What is done no longer counts: now all have nothing, the lower id has it.
    drop(open);
    expect("cancellation", || async {
        cluster.nodes.iter().all(|node| node.running() == 0)
    })
    .await;
    cluster.run(&tokens(1, 1), &[]).await.unwrap();
    assert_eq!(cluster.plan.homes(), [one]);
}
