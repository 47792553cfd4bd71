//! The flags of `guild quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::Common;
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild quantize --model models/demo --to int4 --out /tmp/demo-int4
  guild inspect --compare models/demo /tmp/demo-int4 --prompts models/demo/prompts.txt
  guild up --model /tmp/demo-int4

The folder appears complete or not at all. A run that was interrupted is taken up by the same command.
int8 and int4 are read by guild alone; fp8 and bf16 are plain Hugging Face checkpoints.

{EXIT_CODES}"))]
pub(crate) struct Quantize {
    /// Folder of the checkpoint to read
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// What weights become. int4: embedding and head are int8; both: kv_b_proj stays bf16, norms and routers stay as
    /// they are. fp8: as DeepSeek-V3 is released
    #[arg(
        long,
        value_enum,
        value_name = "int4|int8|fp8|bf16",
        hide_possible_values = true
    )]
    pub(crate) to: Target,
    /// Columns that share a scale, for int4 and int8: 32, 64 (the default) or 128. Fewer err less and take more memory
    #[arg(long, value_name = "N")]
    pub(crate) group: Option<u32>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Largest file, in GB
    #[arg(long, default_value_t = 4.0, value_name = "GB")]
    pub(crate) shard_gb: f64,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    Int4,
    Int8,
    Fp8,
    Bf16,
}
