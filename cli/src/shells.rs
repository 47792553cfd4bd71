//! From flags to the configurations of the three shells.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;

use guild_attention_node::{AttentionNodeConfig, Overlap, Patience};
use guild_coordinator::{CoordinatorConfig, Rebalance};
use guild_expert_node::ExpertNodeConfig;
use guild_model::Checkpoint;
use guild_node::tls::Tls;

use crate::args::{Compute, Engine, Exposure, Redundancy, Weights};
use crate::security::Door;

/// Where a node stands in its cluster.
pub(crate) struct Place {
    pub(crate) model: Checkpoint,
    /// What clients call it.
    pub(crate) model_name: String,
    pub(crate) name: String,
    /// `host:port` where others reach it.
    pub(crate) address: String,
    /// URL of the coordinator.
    pub(crate) coordinator: String,
    /// Its certificate, if it has one.
    pub(crate) tls: Option<Tls>,
    /// Where probes ask for its health.
    pub(crate) health: Option<String>,
    /// Where Prometheus asks for what it counts.
    pub(crate) metrics: Option<String>,
    /// The same for all nodes of this process, and for no other.
    pub(crate) process: String,
    /// What fails together with it.
    pub(crate) failure_domain: String,
}

/// A name for this process that no other has.
pub(crate) fn process_id() -> String {
    // Each hasher has keys of its own, from the operating system's random numbers.
    let draw = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", draw(), draw())
}

pub(crate) fn attention(
    place: &Place,
    compute: Compute,
    engine: Engine,
    exposure: Exposure,
) -> AttentionNodeConfig {
    AttentionNodeConfig {
        model_name: place.model_name.clone(),
        dtype: compute.weights.dtype,
        kv_memory: engine.kv_memory,
        kv_dtype: engine.latents.format(),
        page_tokens: engine.page_tokens as usize,
        max_running: engine.max_running as usize,
        max_waiting: engine.max_waiting as usize,
        max_waiting_tokens: (engine.max_waiting_tokens > 0)
            .then_some(engine.max_waiting_tokens as usize),
        max_wait: some(Duration::from_secs(engine.max_wait.into())),
        itl_target: some(Duration::from_millis(engine.itl_target.into())),
        prefix_cache: !engine.no_prefix_cache,
        speculate: engine.speculate,
        overlap: Overlap::new(engine.micro_batches),
        max_step_tokens: engine.max_step_tokens as usize,
        max_context: context(engine.max_context),
        patience: Patience {
            suspect_after: Duration::from_millis(engine.suspect_after.into()),
            deadline: Duration::from_millis(engine.expert_deadline.into()),
        },
        drain: drain(exposure),
        tls: place.tls.clone(),
        health: place.health.clone(),
        metrics: place.metrics.clone(),
        process: place.process.clone(),
        failure_domain: place.failure_domain.clone(),
        ..AttentionNodeConfig::new(
            place.model.clone(),
            &place.name,
            &place.address,
            &place.coordinator,
        )
    }
}

pub(crate) fn expert(
    place: &Place,
    compute: Compute,
    capacity: u64,
    exposure: Exposure,
) -> ExpertNodeConfig {
    ExpertNodeConfig {
        model_name: place.model_name.clone(),
        dtype: compute.weights.dtype,
        capacity_bytes: capacity,
        drain: drain(exposure),
        tls: place.tls.clone(),
        health: place.health.clone(),
        metrics: place.metrics.clone(),
        process: place.process.clone(),
        failure_domain: place.failure_domain.clone(),
        ..ExpertNodeConfig::new(
            place.model.clone(),
            &place.name,
            &place.address,
            &place.coordinator,
        )
    }
}

/// What a coordinator is told beyond its addresses.
pub(crate) struct FrontDesk<'a> {
    pub(crate) model: &'a Checkpoint,
    pub(crate) model_name: &'a str,
    pub(crate) weights: Weights,
    /// 0: what the model was made for.
    pub(crate) max_context: u32,
    pub(crate) min_expert_nodes: u16,
    pub(crate) redundancy: Redundancy,
    pub(crate) rebalance: Rebalance,
    /// Homes of a layer beyond its replicas.
    pub(crate) redundant_experts: u32,
    /// Wait for further expert nodes; None: as long as usual.
    pub(crate) settle: Option<Duration>,
    pub(crate) exposure: Exposure,
    /// Its certificate, if it has one.
    pub(crate) tls: Option<&'a Tls>,
    pub(crate) door: &'a Door,
}

pub(crate) fn coordinator(desk: &FrontDesk<'_>) -> CoordinatorConfig {
    CoordinatorConfig {
        model_name: desk.model_name.to_owned(),
        dtype: desk.weights.dtype,
        max_context: context(desk.max_context),
        min_expert_nodes: usize::from(desk.min_expert_nodes),
        replicas: desk.redundancy.replicas.into(),
        lease: Duration::from_secs_f64(desk.redundancy.lease),
        rebalance: desk.rebalance,
        redundant_experts: desk.redundant_experts,
        settle: desk.settle.unwrap_or(CoordinatorConfig::SETTLE),
        drain: drain(desk.exposure),
        tls: desk.tls.cloned(),
        front_tls: desk.door.tls.clone(),
        api_keys: desk.door.keys.clone(),
        ..CoordinatorConfig::new(desk.model.clone())
    }
}

/// None where 0 stands for no limit.
fn some(limit: Duration) -> Option<Duration> {
    (!limit.is_zero()).then_some(limit)
}

fn context(max_context: u32) -> Option<usize> {
    (max_context > 0).then_some(max_context as usize)
}

fn drain(exposure: Exposure) -> Duration {
    Duration::from_secs(u64::from(exposure.drain))
}
