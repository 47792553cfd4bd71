//! The flags of `guild random-model`.

use std::path::PathBuf;

use clap::Args;
use guild_model::checkpoint::Dtype;

use super::Common;
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild random-model --shape tiny --out /tmp/tiny
  guild random-model --shape moonlight-4L --set num_hidden_layers=6 --out /tmp/moonlight
  guild random-model --shape moonlight-4L --dtype int4 --out /tmp/moonlight-int4

Every value is a function of seed, tensor name and index alone: the same command
writes the same bytes anywhere.

{EXIT_CODES}"))]
pub(crate) struct RandomModel {
    /// Shape to start from; an unknown one is answered with the list
    #[arg(long, value_name = "SHAPE")]
    pub(crate) shape: String,
    /// Change one key of its config.json; may be given more than once
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Seed of the weights
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub(crate) seed: u64,
    /// What weights are written in: bf16, fp8, int8 or int4; integers perhaps with a group, as in int4-g32. All but
    /// bf16 are made from the bf16 weights, which are beside the output meanwhile
    #[arg(long, default_value = "bf16", value_name = "DTYPE")]
    pub(crate) dtype: Dtype,
    /// Largest file, in GB
    #[arg(long, default_value_t = 4.0, value_name = "GB")]
    pub(crate) shard_gb: f64,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) common: Common,
}
