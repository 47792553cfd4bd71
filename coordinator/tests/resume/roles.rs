//! Streams go to nodes that decode, and long prompts to nodes for prefill.

use guild_proto::cluster::v1::{Duty, Role};
use guild_proto::inference::v1::{GenerateRequest, SamplingParams};
use guild_scheduler::affinity::MIN_MOVED_TOKENS;

use crate::PATIENT;
use crate::common::{Coordinator, Node, expect};
use crate::fake::{Fake, Plan, request};

fn asked(len: u32, seed: u32) -> GenerateRequest {
    let ids: Vec<u32> = (0..len).map(|n| (n * 7 + seed) % 50 + 2).collect();
    let sampling = SamplingParams {
        max_tokens: Some(3),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    request(&ids, sampling)
}

async fn coordinator() -> (Coordinator, Node) {
    let coordinator = Coordinator::start_with(PATIENT).await;
    let expert = Node::join(&coordinator, Role::Expert, "expert-1").await;
    expert.follow();
    (coordinator, expert)
}

/// Which node got the request, and which one it was told to have its prompt from.
async fn placed(coordinator: &Coordinator, plan: &Plan, asked: &GenerateRequest) -> [String; 2] {
    plan.set(&[]);
    coordinator.run(asked.clone()).await.unwrap();
    let (name, got) = plan.calls().pop().unwrap();
    [name, got.prefill_from]
}

#[tokio::test]
async fn a_long_prompt_has_a_node_for_prefill_and_no_stream_goes_there() {
    let (coordinator, _expert) = coordinator().await;
    let plan = Plan::default();
    let join = async |name, duty| Fake::join_for(&coordinator, name, &plan, duty).await;
    let helpers = [
        join("prefill-1", Duty::Prefill).await,
        join("prefill-2", Duty::Prefill).await,
    ];
    let _decoding = join("decode-1", Duty::Decode).await;
    coordinator.ready_attention_nodes(3).await;
    let helps = |from: &str| helpers.iter().any(|helper| helper.address() == from);
    let long = MIN_MOVED_TOKENS as u32 * 2;

    let mut used = Vec::new();
    for seed in 0..4 {
        let [node, from] = placed(&coordinator, &plan, &asked(long, seed)).await;
        assert!(node == "decode-1" && helps(&from), "{node} from {from:?}");
        used.push(from);
        // It knows the prompt now.
        let again = placed(&coordinator, &plan, &asked(long, seed)).await;
        assert_eq!(again, ["decode-1", ""]);
    }
    used.sort_unstable();
    used.dedup();
    assert_eq!(used.len(), 2, "they share the work");

    let short = asked(MIN_MOVED_TOKENS as u32 - 1, 9);
    assert_eq!(placed(&coordinator, &plan, &short).await, ["decode-1", ""]);
    // Clients have no say in it, and rows of others have no logits.
    let mut meddles = short.clone();
    meddles.prefill_from = "127.0.0.1:1".to_owned();
    assert_eq!(
        placed(&coordinator, &plan, &meddles).await,
        ["decode-1", ""]
    );
    let mut scored = asked(long, 77);
    scored.sampling.as_mut().unwrap().prompt_logprobs = Some(1);
    assert_eq!(placed(&coordinator, &plan, &scored).await, ["decode-1", ""]);
}

#[tokio::test]
async fn nodes_for_prefill_decode_only_while_no_other_is_there_and_status_says_so() {
    let (coordinator, _expert) = coordinator().await;
    let plan = Plan::default();
    let _helper = Fake::join_for(&coordinator, "prefill-1", &plan, Duty::Prefill).await;
    coordinator.ready_attention_nodes(1).await;
    let long = MIN_MOVED_TOKENS as u32 * 2;
    let alone = placed(&coordinator, &plan, &asked(long, 1)).await;
    assert_eq!(alone, ["prefill-1", ""]);
    let status = coordinator.status().await;
    assert!(status.degraded.contains("prefill"), "{}", status.degraded);
    assert!(status.nodes.iter().any(|node| node.duty() == Duty::Prefill));

    let _other = Fake::join_for(&coordinator, "both-1", &plan, Duty::Both).await;
    coordinator.ready_attention_nodes(2).await;
    expect("a node that decodes", || async {
        coordinator.status().await.degraded.is_empty()
    })
    .await;
    for seed in 0..3 {
        let [node, _] = placed(&coordinator, &plan, &asked(long, seed + 2)).await;
        assert_eq!(node, "both-1");
    }
}
