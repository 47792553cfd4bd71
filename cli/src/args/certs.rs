//! The flags of `guild certs` and `guild keys`: what nodes and clients prove themselves with.

use std::path::PathBuf;
use std::str::FromStr as _;

use clap::{Args, Subcommand};
use guild_node::tls::Role;

use super::Common;
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild certs --out certs --hosts localhost,127.0.0.1
  guild certs --out certs --role expert --name expert-3 --hosts '*.guild-expert.prod.svc'

The first makes a CA and a certificate for each role, good for any node of the role, and
one for operators, who look after the cluster with `guild experts`.
The second adds one, by the CA in --out, for one node alone.

{EXIT_CODES}"))]
pub(crate) struct Certs {
    /// Folder to write; what is there is not overwritten
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Cluster that the certificates are for; they mean nothing in another
    #[arg(long, default_value = "guild", value_name = "NAME")]
    pub(crate) cluster: String,
    /// Names and addresses under which the nodes are dialled
    #[arg(
        long,
        default_value = "localhost,127.0.0.1,::1",
        value_name = "HOST,HOST",
        value_delimiter = ',',
        num_args = 1
    )]
    pub(crate) hosts: Vec<String>,
    /// Also good wherever else a node of the role is found: for pods, whose addresses change
    #[arg(long)]
    pub(crate) anywhere: bool,
    /// Only for this role
    #[arg(long, value_parser = Role::from_str, value_name = "coordinator|attention|expert|operator")]
    pub(crate) role: Option<Role>,
    /// Only for the node of this name; may be given more than once
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Vec<String>,
    /// Days until they expire
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..), value_name = "N")]
    pub(crate) days: u16,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) command: KeysCommand,
}

/// What to do about keys.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Draws a key and prints it, this once, and the line for the file of keys
    New(NewKey),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Example:
  guild keys new --name alice | tee /dev/tty | tail -n 1 >> api-keys

{EXIT_CODES}"))]
pub(crate) struct NewKey {
    /// Whose key it is
    #[arg(long, value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) common: Common,
}
