//! `guild up`: a whole cluster in one process.

use std::io::Write as _;
use std::net::SocketAddr;

use guild_coordinator::Listeners;
use guild_model::{Checkpoint, Cpu};

use super::{block_on, log_role};
use crate::args::{FabricKind, Up};
use crate::banner::Banner;
use crate::failure::Failure;
use crate::listen::{EPHEMERAL, address_of, bind, reachable};
use crate::local::{Local, Plan};
use crate::security::{Door, Protection};

pub(crate) fn run(args: &Up) -> Result<(), Failure> {
    log_role(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &Up) -> Result<(), Failure> {
    let shutdown = super::signals()?;
    let insecure = args.exposure.insecure;
    let door = Door::open(&args.door)?;
    let clients = door.protection(insecure);
    let http = bind("http", &args.doors.http, clients).await?;
    let grpc = bind("grpc", &args.doors.grpc, clients).await?;
    let doors = (address_of(&http)?, address_of(&grpc)?);
    let checkpoint = super::open(&args.model, args.compute)?;
    let cluster = bind("listen", EPHEMERAL, Protection::LOOPBACK).await?;
    let cpu = args.compute.cpu()?;
    let plan = Plan {
        model: checkpoint.clone(),
        model_name: args.named.of(&checkpoint),
        attention_nodes: args.attention_nodes,
        expert_nodes: args.expert_nodes,
        fabric: args.fabric,
        compute: args.compute,
        exposure: args.exposure,
        engine: args.engine,
        door,
        redundancy: args.redundancy,
        balance: args.balance,
    };
    let mut banner = banner(args, &plan, &checkpoint, &cpu, doors)?;
    banner
        .line("cluster", format!("http://{}", address_of(&cluster)?))
        .show(args.common.log_format);
    let listeners = Listeners {
        cluster,
        http,
        grpc,
    };
    let mut local = Local::start(&plan, &cpu, listeners).await?;
    let ended = tokio::select! {
        ended = announce(&mut local, doors) => ended,
        () = shutdown.requested() => Ok(()),
    };
    let ended = match ended {
        Ok(()) => tokio::select! {
            failure = local.failed() => Err(failure),
            () = shutdown.requested() => Ok(()),
        },
        failed => failed,
    };
    let stopped = local.stop().await;
    ended.and(stopped)
}

/// Waits until the cluster serves and says so to programs: one line on stdout.
async fn announce(
    local: &mut Local,
    (http, grpc): (SocketAddr, SocketAddr),
) -> Result<(), Failure> {
    local.ready().await?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "guild: serving http={http} grpc={grpc}")?;
    Ok(stdout.flush()?)
}

fn banner(
    args: &Up,
    plan: &Plan,
    checkpoint: &Checkpoint,
    cpu: &Cpu,
    (http, grpc): (SocketAddr, SocketAddr),
) -> Result<Banner, Failure> {
    let fabric = match args.fabric {
        FabricKind::Local => "in memory",
        FabricKind::Grpc => "over loopback gRPC",
    };
    let mut banner = Banner::new(format!(
        "up: coordinator, {} attention, {} expert in one process, rows {fabric}",
        args.attention_nodes, args.expert_nodes
    ));
    banner
        .model(&plan.model_name, checkpoint)?
        .weights(checkpoint, args.compute.weights.dtype)
        .kv(checkpoint, args.engine)
        .cpu(cpu)
        .line("http", format!("{}://{http}/v1", plan.door.scheme()))
        .line("grpc", format!("{}://{grpc}", plan.door.scheme()))
        .try_it(&plan.model_name, checkpoint, reachable(http), &plan.door)
        .insecure(args.exposure.insecure);
    Ok(banner)
}
