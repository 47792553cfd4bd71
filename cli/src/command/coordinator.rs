//! `guild coordinator`.

use guild_coordinator::{CoordinatorConfig, Listeners};
use guild_model::Checkpoint;
use guild_node::tls::Role;

use super::{block_on, listening, log_role, signals};
use crate::args::{Coordinator, PlannerArg};
use crate::banner::Banner;
use crate::failure::Failure;
use crate::listen::{address_of, bind, reachable};
use crate::security::{Door, Protection, node_tls};
use crate::shells;

pub(crate) fn run(args: &Coordinator) -> Result<(), Failure> {
    log_role(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &Coordinator) -> Result<(), Failure> {
    let shutdown = signals()?;
    let insecure = args.exposure.insecure;
    let tls = node_tls(&args.tls, Role::Coordinator, None, insecure)?;
    let door = Door::open(&args.door)?;
    let clients = door.protection(insecure);
    let listeners = Listeners {
        cluster: bind("listen", &args.listen, Protection::Enough).await?,
        http: bind("http", &args.doors.http, clients).await?,
        grpc: bind("grpc", &args.doors.grpc, clients).await?,
    };
    let scheme = door.scheme();
    listening(&address_of(&listeners.cluster)?.to_string())?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let name = args.named.of(&checkpoint);
    let http = address_of(&listeners.http)?;
    let mut banner = Banner::new("coordinator");
    banner
        .model(&name, &checkpoint)?
        .line(
            "waits for",
            format!(
                "an attention node, expert nodes: {} or more",
                args.min_expert_nodes
            ),
        )
        .line(
            "nodes join",
            format!(
                "{}://{}",
                if tls.is_some() { "https" } else { "http" },
                address_of(&listeners.cluster)?
            ),
        )
        .line("store", args.store.to_string())
        .line("http", format!("{scheme}://{http}/v1"))
        .line(
            "grpc",
            format!("{scheme}://{}", address_of(&listeners.grpc)?),
        )
        .try_it(&name, &checkpoint, reachable(http), &door)
        .tls(tls.as_ref())
        .insecure(insecure)
        .show(args.common.log_format);
    let config = shells::coordinator(&shells::FrontDesk {
        model: &checkpoint,
        model_name: &name,
        weights: args.weights,
        max_context: args.max_context,
        min_expert_nodes: args.min_expert_nodes,
        redundancy: args.redundancy,
        rebalance: args.balance.policy(PlannerArg::Guild),
        redundant_experts: args.balance.redundant_experts,
        settle: None,
        exposure: args.exposure,
        tls: tls.as_ref(),
        door: &door,
    });
    let config = CoordinatorConfig {
        store: args.store.clone(),
        advertise: args.advertise.clone(),
        metrics: args.metrics_listen.clone(),
        ..config
    };
    guild_coordinator::run(config, listeners, shutdown)
        .await
        .map_err(|error| Failure::of(&error))
}
