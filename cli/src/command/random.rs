//! `guild random-model`: a checkpoint of any shape.

use std::time::Instant;

use guild_model::random;

use super::log_role;
use crate::args::RandomModel;
use crate::failure::Failure;
use crate::loading::Progress;
use crate::units;

/// Bytes of the unit of `--shard-gb`.
const GB: f64 = 1e9;
/// Largest shard that can be asked for.
const MAX_SHARD_GB: f64 = 1000.0;

pub(crate) fn run(args: &RandomModel) -> Result<(), Failure> {
    log_role(&args.common)?;
    let shard_bytes = shard_bytes(args.shard_gb)?;
    let shape = random::shape(&args.shape).ok_or_else(|| {
        Failure::usage(format!("--shape: `{}` is unknown", args.shape))
            .hint(format!("one of {}", random::NAMES.join(", ")))
    })?;
    let overrides = args
        .set
        .iter()
        .map(|text| random::parse_override(text))
        .collect::<Result<Vec<_>, _>>()?;
    let config = shape.clone().with(&overrides).config().map_err(|error| {
        Failure::usage(error.to_string()).hint("the field comes from --shape or --set")
    })?;
    tracing::info!(
        "{}: {} parameters, {} layers, {} experts",
        args.shape,
        units::parameters(config.parameters()),
        config.num_hidden_layers,
        config.n_routed_experts
    );
    let begun = Instant::now();
    let progress = Progress::new("writing weights");
    random::write(
        shape,
        &overrides,
        args.seed,
        shard_bytes,
        &args.out,
        &|done, total| progress.at(done, total),
    )?;
    tracing::info!(
        "{} written in {:.1} s",
        args.out.display(),
        begun.elapsed().as_secs_f32()
    );
    Ok(())
}

/// Bytes of the largest file, from `--shard-gb`.
pub(super) fn shard_bytes(gb: f64) -> Result<u64, Failure> {
    if gb > 0.0 && gb <= MAX_SHARD_GB {
        return Ok((gb * GB) as u64);
    }
    Err(Failure::usage(format!(
        "--shard-gb: {gb} is not between 0 and {MAX_SHARD_GB}"
    )))
}
