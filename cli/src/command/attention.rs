//! `guild attention-node`.

use guild_node::tls::Role;

use super::{block_on, cpu, join, log_role, served_name, signals};
use crate::args::AttentionNode;
use crate::banner::Banner;
use crate::failure::Failure;
use crate::shells;

pub(crate) fn run(args: &AttentionNode) -> Result<(), Failure> {
    log_role(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &AttentionNode) -> Result<(), Failure> {
    let shutdown = signals()?;
    let (place, listener) = join(Role::Attention, &args.joining, args.exposure).await?;
    let cpu = cpu(args.compute.threads);
    let name = served_name(None, place.model.dir());
    let mut banner = Banner::new(format!("attention-node {}", place.name));
    banner
        .model(&name, &place.model)?
        .weights(&place.model, args.compute.dtype)
        .kv(&place.model, args.engine)
        .cpu(&cpu)
        .line("cluster", &place.coordinator)
        .line("reached at", &place.address)
        .tls(place.tls.as_ref())
        .insecure(args.exposure.insecure)
        .show(args.common.log_format);
    let config = shells::attention(&place, &name, args.compute, args.engine, args.exposure);
    guild_attention_node::run(config, listener, cpu, None, shutdown)
        .await
        .map_err(|error| Failure::of(&error))
}
