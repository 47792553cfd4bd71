//! The flags of `guild inspect`.

use std::path::PathBuf;

use clap::Args;

use super::{Common, Compute};
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild inspect --model models/demo --nodes 4
  guild inspect --model models/demo --reference --token-ids 0,839,30 --max-tokens 8 --json
  guild inspect --compare models/demo /tmp/demo-int4 --prompts models/demo/prompts.txt
  guild inspect --cpu

{EXIT_CODES}"))]
pub(crate) struct Inspect {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Expert nodes of the cluster to plan for
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) nodes: u16,
    /// Run the slow f32 reference on --token-ids and print what `generate --json` prints
    #[arg(long, requires = "token_ids")]
    pub(crate) reference: bool,
    /// Prompt of the reference
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', num_args = 1)]
    pub(crate) token_ids: Vec<u32>,
    /// Tokens that the reference continues greedily
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// Best alternatives at every place of the reference
    #[arg(long, default_value_t = 5, value_name = "K")]
    pub(crate) logprobs: u32,
    /// How far B is from A, two checkpoints of one model in different formats: error of every weight
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["model", "reference"])]
    pub(crate) compare: Vec<PathBuf>,
    /// Texts for --compare, one a line (a JSON string or list of token ids is taken as such): how far apart the
    /// distributions of the next token are, at every token
    #[arg(long, value_name = "FILE", requires = "compare")]
    pub(crate) prompts: Option<PathBuf>,
    /// Say which instruction set this machine's arithmetic uses, and why
    #[arg(long)]
    pub(crate) cpu: bool,
    /// One JSON object instead of words
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) common: Common,
}
