//! The flags of `guild manifest`.

use std::path::PathBuf;

use clap::Args;

use super::Common;
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild manifest models/demo             # reads everything; exit code 4 where something differs
  guild manifest models/demo --write

A manifest lists a BLAKE3 digest for every tensor and for the small files beside the weights. Every
role holds what it loads against it; without one, weights are served unverified.

{EXIT_CODES}"))]
pub(crate) struct Manifest {
    /// Folder of the checkpoint
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// Make the manifest of what is there; an older one is replaced
    #[arg(long, conflicts_with = "check")]
    pub(crate) write: bool,
    /// Read everything and hold it against the manifest; what happens without a flag, too
    #[arg(long)]
    pub(crate) check: bool,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}
