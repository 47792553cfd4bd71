//! `guild expert-node`.

use guild_expert_node::ExpertNodeConfig;
use guild_model::Checkpoint;
use guild_node::tls::Role;

use super::{block_on, join, log_role, signals};
use crate::args::{Compute, ExpertNode};
use crate::banner::Banner;
use crate::failure::Failure;
use crate::{shells, units};

pub(crate) fn run(args: &ExpertNode) -> Result<(), Failure> {
    log_role(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &ExpertNode) -> Result<(), Failure> {
    let shutdown = signals()?;
    let (place, listener) = join(
        Role::Expert,
        &args.joining,
        args.exposure,
        args.compute,
        None,
    )
    .await?;
    let checkpoint = &place.model;
    let cpu = args.compute.cpu()?;
    let mut banner = Banner::new(format!("expert-node {}", place.name));
    banner
        .model(&place.model_name, checkpoint)?
        .line("experts", room(checkpoint, args.capacity, args.compute))
        .cpu(&cpu)
        .line("cluster", &place.coordinator)
        .line("reached at", &place.address)
        .tls(place.tls.as_ref())
        .insecure(args.exposure.insecure)
        .show(args.common.log_format);
    let config = ExpertNodeConfig {
        copy_from: args.copy_from,
        ..shells::expert(&place, args.compute, args.capacity, args.exposure)
    };
    guild_expert_node::run(config, listener, cpu, None, shutdown)
        .await
        .map_err(|error| Failure::of(&error))
}

/// How many experts fit, in words.
pub(super) fn room(checkpoint: &Checkpoint, capacity: u64, compute: Compute) -> String {
    let config = checkpoint.config();
    let each = config
        .expert_layers()
        .map(|layer| checkpoint.expert_bytes(layer))
        .max()
        .unwrap_or(0);
    let room = match capacity {
        0 => "as many as are placed here".to_owned(),
        bytes => format!(
            "{} in {}",
            units::count(bytes.checked_div(each).unwrap_or(0)),
            units::bytes(bytes)
        ),
    };
    format!(
        "{room}; {} each as stored (--dtype {})",
        units::bytes(each),
        compute.weights.dtype
    )
}
