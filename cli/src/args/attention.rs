//! The flags of `guild attention-node`.

use clap::Args;

use super::{Colocated, Common, Compute, Engine, Exposure, Joining};
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild attention-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs
  guild attention-node --model models/demo --coordinator 127.0.0.1:7000 --tls-dir certs --experts

With --experts SIGTERM first lets the requests of this node end and then takes its experts out of
the cluster; each may take as long as --drain says.

{EXIT_CODES}"))]
pub(crate) struct AttentionNode {
    #[command(flatten)]
    pub(crate) joining: Joining,
    #[command(flatten)]
    pub(crate) colocated: Colocated,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) exposure: Exposure,
    #[command(flatten)]
    pub(crate) engine: Engine,
    #[command(flatten)]
    pub(crate) common: Common,
}
