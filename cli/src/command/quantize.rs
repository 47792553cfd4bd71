//! `guild quantize`: a checkpoint in another format.

use std::fmt;
use std::time::Instant;

use guild_model::Checkpoint;
use guild_model::checkpoint::Dtype;
use guild_model::quantize::{self, Begun, Job};
use serde::Serialize;

use super::log_role;
use super::random::shard_bytes;
use crate::args::{Quantize, Target};
use crate::failure::Failure;
use crate::json;
use crate::loading::Progress;
use crate::units;

/// What has been done, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Summary {
    out: String,
    dtype: String,
    files: usize,
    tensors: usize,
    bytes: u64,
    bytes_before: u64,
    seconds: f64,
}

pub(crate) fn run(args: &Quantize) -> Result<(), Failure> {
    log_role(&args.common)?;
    let dtype = dtype(args)?;
    let shard_bytes = shard_bytes(args.shard_gb)?;
    let source = Checkpoint::open(&args.model)?;
    let begun = Instant::now();
    let progress = Progress::new("quantising");
    let job = Job {
        source: &source,
        dtype,
        shard_bytes,
        out: &args.out,
    };
    let written = job
        .run(&tell, &|done, total| progress.at(done, total))
        .map_err(|error| match quantize::unfinished(&args.out) {
            Some(dir) => Failure::from(error).hint(format!(
                "{} keeps what is finished: the same command goes on from there",
                dir.display()
            )),
            None => Failure::from(error),
        })?;
    let summary = Summary {
        out: args.out.display().to_string(),
        dtype: dtype.to_string(),
        files: written.files,
        tensors: written.tensors,
        bytes: written.bytes,
        bytes_before: source.required_bytes(),
        seconds: begun.elapsed().as_secs_f64(),
    };
    json::print_or_say(&summary, args.json)
}

/// What is asked for; the group only where there are groups.
fn dtype(args: &Quantize) -> Result<Dtype, Failure> {
    let name = match args.to {
        Target::Int4 => "int4",
        Target::Int8 => "int8",
        Target::Fp8 => "fp8",
        Target::Bf16 => "bf16",
    };
    let text = match args.group {
        Some(_) if matches!(args.to, Target::Fp8 | Target::Bf16) => {
            return Err(Failure::usage(format!(
                "--group: {name} has no groups; they are for int4 and int8"
            )));
        }
        Some(group) => format!("{name}-g{group}"),
        None => name.to_owned(),
    };
    text.parse()
        .map_err(|error| Failure::usage(format!("--group: {error}")))
}

fn tell(begun: Begun) {
    match begun {
        Begun::Anew => {}
        Begun::Resumed { files, of } => {
            tracing::info!("goes on where an earlier run ended: {files} of {of} files are there");
        }
        Begun::Discarded { reason } => {
            tracing::warn!("starts anew, what an earlier run has left is of no use: {reason}");
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, {} tensors in {} files, {} of {} before, in {:.1} s",
            self.out,
            self.dtype,
            units::count(self.tensors as u64),
            self.files,
            units::bytes(self.bytes),
            units::bytes(self.bytes_before),
            self.seconds
        )
    }
}
