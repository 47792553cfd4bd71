//! The flags of `guild expert-node`.

use std::str::FromStr as _;

use clap::Args;
use guild_expert_node::CopyFrom;

use super::{Common, Compute, Exposure, Joining};
use crate::failure::EXIT_CODES;
use crate::units;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild expert-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs

{EXIT_CODES}"))]
pub(crate) struct ExpertNode {
    #[command(flatten)]
    pub(crate) joining: Joining,
    /// Memory for resident experts, such as 32GiB; 0: as much as is placed here
    #[arg(long, default_value = "0", value_parser = units::parse_bytes, value_name = "SIZE")]
    pub(crate) capacity: u64,
    /// Where experts come from first that other nodes have: from these, or from the checkpoint
    #[arg(long, default_value_t, value_parser = CopyFrom::from_str, value_name = "peer|checkpoint")]
    pub(crate) copy_from: CopyFrom,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) common: Common,
}
