//! `guild manifest`: the digests of a checkpoint, written or held against what is there.

use std::fmt;
use std::time::Instant;

use guild_model::checkpoint::manifest::{self, Manifest};
use guild_model::{Checkpoint, ModelError};
use guild_node::ExitKind;
use serde::Serialize;

use super::log_tool;
use crate::args;
use crate::failure::Failure;
use crate::json;
use crate::loading::Progress;
use crate::units;

/// Differences that are told one by one.
const MAX_TOLD: usize = 20;

/// What has been done, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Summary {
    manifest: String,
    /// `written` or `verified`.
    done: &'static str,
    tensors: usize,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &args::Manifest) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let begun = Instant::now();
    let path = args.model.join(manifest::FILE);
    let (done, tensors, bytes) = if args.write {
        let checkpoint = Checkpoint::open_unlisted(&args.model)?;
        let progress = Progress::new("reading weights");
        let made = Manifest::of(&checkpoint, &|done, total| progress.at(done, total))?;
        made.write(&args.model)?;
        // What cannot be read back is no manifest.
        let checkpoint = Checkpoint::open(&args.model)?;
        let bytes = checkpoint.tensors().map(|t| t.bytes().len() as u64).sum();
        ("written", made.tensors(), bytes)
    } else {
        let checkpoint = Checkpoint::open(&args.model)?;
        if !checkpoint.has_manifest() {
            return Err(Failure::from(ModelError::file(&path, "missing"))
                .hint("--write makes the manifest of what is there"));
        }
        let progress = Progress::new("verifying weights");
        let found = checkpoint.verify(&|done, total| progress.at(done, total));
        refuse(&found.faults, found.tensors)?;
        ("verified", found.tensors, found.bytes)
    };
    let summary = Summary {
        manifest: path.display().to_string(),
        done,
        tensors,
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
    };
    json::print_or_say(&summary, args.json)
}

fn refuse(faults: &[ModelError], tensors: usize) -> Result<(), Failure> {
    let Some(first) = faults.first() else {
        return Ok(());
    };
    let mut failure = Failure::new(ExitKind::Model, first.to_string());
    for fault in faults.iter().take(MAX_TOLD).skip(1) {
        failure = failure.hint(format!("also {fault}"));
    }
    Err(failure.hint(format!(
        "{} of {} tensors differ",
        units::count(faults.len() as u64),
        units::count(tensors as u64)
    )))
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, {} tensors, {} in {:.1} s",
            self.manifest,
            self.done,
            units::count(self.tensors as u64),
            units::bytes(self.bytes),
            self.seconds
        )
    }
}
