//! `guild random-model`: a checkpoint of any shape, in any format.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use guild_model::checkpoint::Dtype;
use guild_model::quantize::Job;
use guild_model::{Checkpoint, random};

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
    let dtype = match args.dtype {
        Dtype::Auto | Dtype::F32 => {
            return Err(Failure::usage(format!(
                "--dtype: {} is not what random weights are written in",
                args.dtype
            ))
            .hint("one of bf16, fp8, int8, int4; or int8-g32, int4-g128 and the like"));
        }
        dtype => dtype,
    };
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
    let plain = Plain::of(&args.out, dtype)?;
    let to = plain.as_ref().map_or(&args.out, |plain| &plain.0);
    let progress = Progress::new("writing weights");
    let tell = |done, total| progress.at(done, total);
    random::write(shape, &overrides, args.seed, shard_bytes, to, &tell)?;
    if let Some(plain) = &plain {
        let progress = Progress::new("quantising");
        let job = Job {
            source: &Checkpoint::open(&plain.0)?,
            dtype,
            shard_bytes,
            out: &args.out,
        };
        job.run(&|_| (), &|done, total| progress.at(done, total))?;
    }
    tracing::info!(
        "{} written in {:.1} s",
        args.out.display(),
        begun.elapsed().as_secs_f32()
    );
    Ok(())
}

/// The bf16 weights that others are made from, beside the output until it is there.
struct Plain(PathBuf);

impl Plain {
    /// None: the output has them itself.
    fn of(out: &Path, dtype: Dtype) -> Result<Option<Plain>, Failure> {
        if dtype == Dtype::Bf16 {
            return Ok(None);
        }
        // It would be found out only when everything has been written once.
        if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Failure::usage(format!(
                "--out: {} is not empty; give a directory that does not exist yet",
                out.display()
            )));
        }
        let mut name = OsString::from(".");
        name.push(out.file_name().unwrap_or_default());
        name.push(format!(".plain-{}", std::process::id()));
        Ok(Some(Plain(out.with_file_name(name))))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // Nobody needs it any more; what cannot be removed is only in the way.
        let _ = fs::remove_dir_all(&self.0);
    }
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
