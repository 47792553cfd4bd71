//! `guild attention-node`, alone or with an expert node in the same process.

use clap::ValueEnum as _;
use guild_attention_node::AttentionNodeConfig;
use guild_expert_node::ExpertNodeConfig;
use guild_node::tls::Role;
use guild_transport::Switchboard;

use super::{block_on, expert, join, log_role, signals};
use crate::args::{AttentionNode, Joining, NodeTls};
use crate::banner::Banner;
use crate::failure::Failure;
use crate::local::Tier;
use crate::shells;

pub(crate) fn run(args: &AttentionNode) -> Result<(), Failure> {
    log_role(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &AttentionNode) -> Result<(), Failure> {
    let shutdown = signals()?;
    let (place, listener) = join(
        Role::Attention,
        &args.joining,
        args.exposure,
        args.compute,
        None,
    )
    .await?;
    let experts = match args.colocated.experts {
        true => {
            let joining = beside(args)?;
            let joined = join(
                Role::Expert,
                &joining,
                args.exposure,
                args.compute,
                Some(&place.model),
            )
            .await?;
            let (mut experts, listener) = joined;
            experts.process = place.process.clone();
            Some((experts, listener))
        }
        false => None,
    };
    let cpu = args.compute.cpu()?;
    let mut banner = Banner::new(format!("attention-node {}", place.name));
    banner
        .model(&place.model_name, &place.model)?
        .weights(&place.model, args.compute.weights.dtype)
        .kv(&place.model, args.engine)
        .cpu(&cpu)
        .line("cluster", &place.coordinator)
        .line("reached at", &place.address);
    if let Some(role) = args.role.to_possible_value() {
        banner.line("role", role.get_name());
    }
    if let Some((experts, _)) = &experts {
        let room = expert::room(&place.model, args.colocated.capacity, args.compute);
        banner.line("experts", room).line(
            "reached at",
            format!("{} as {}", experts.address, experts.name),
        );
    }
    banner
        .tls(place.tls.as_ref())
        .insecure(args.exposure.insecure)
        .show(args.common.log_format);
    let config = AttentionNodeConfig {
        duty: args.role.duty(),
        ..shells::attention(&place, args.compute, args.engine, args.exposure)
    };
    let Some((experts, expert_listener)) = experts else {
        return guild_attention_node::run(config, listener, cpu, None, shutdown)
            .await
            .map_err(|error| Failure::of(&error));
    };

    let board = Switchboard::default();
    let capacity = args.colocated.capacity;
    let expert_config = ExpertNodeConfig {
        copy_from: args.colocated.copy_from,
        ..shells::expert(&experts, args.compute, capacity, args.exposure)
    };
    let (mut front, mut behind) = (Tier::default(), Tier::default());
    behind.spawn(&experts.name, |end| {
        let (cpu, board) = (cpu.clone(), board.clone());
        guild_expert_node::run(expert_config, expert_listener, cpu, Some(board), end)
    });
    front.spawn(&place.name, |end| {
        guild_attention_node::run(config, listener, cpu, Some(board), end)
    });
    let ended = tokio::select! {
        failure = front.failed() => Err(failure),
        failure = behind.failed() => Err(failure),
        () = shutdown.requested() => Ok(()),
    };
    // The experts stay until the last request of this node is through.
    let front = front.stop().await;
    let behind = behind.stop().await;
    ended.and(front).and(behind)
}

/// How the expert node of the process joins.
fn beside(args: &AttentionNode) -> Result<Joining, Failure> {
    let (joining, beside) = (&args.joining, &args.colocated);
    let any_port = |address: &str| {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        format!("{host}:0")
    };
    let tls = &joining.tls;
    let has_tls = tls.tls_cert.is_some() || tls.tls_key.is_some() || tls.tls_ca.is_some();
    let certified = beside.expert_tls_cert.is_some() && beside.expert_tls_key.is_some();
    if has_tls && !certified && tls.tls_dir.is_none() {
        return Err(Failure::usage(
            "--experts with --tls-cert needs --expert-tls-cert and --expert-tls-key: a certificate \
             of the role `expert`, which `guild certs` makes; in --tls-dir both are found",
        ));
    }
    Ok(Joining {
        listen: match &beside.expert_listen {
            Some(listen) => listen.clone(),
            None => any_port(&joining.listen),
        },
        advertise: match &beside.expert_advertise {
            Some(advertise) => Some(advertise.clone()),
            None => joining.advertise.as_deref().map(any_port),
        },
        name: match &beside.expert_name {
            Some(name) => Some(name.clone()),
            None => joining.name.as_ref().map(|name| format!("{name}-experts")),
        },
        // The attention node's tells of the process.
        health: None,
        metrics_listen: beside.expert_metrics_listen.clone(),
        tls: NodeTls {
            tls_dir: tls.tls_dir.clone(),
            tls_cert: beside.expert_tls_cert.clone(),
            tls_key: beside.expert_tls_key.clone(),
            tls_ca: tls.tls_ca.clone(),
        },
        ..joining.clone()
    })
}
