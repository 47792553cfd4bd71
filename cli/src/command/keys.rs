//! `guild keys`.

use std::io::Write as _;

use guild_node::ExitKind;
use guild_node::keys::{NewKey, NewKeyError};

use crate::args::{Keys, KeysCommand};
use crate::failure::Failure;

pub(crate) fn run(args: &Keys) -> Result<(), Failure> {
    match &args.command {
        KeysCommand::New(new) => {
            let key = NewKey::draw(&new.name).map_err(|error| match error {
                NewKeyError::Name(problem) => Failure::usage(format!("--name: {problem}")),
                NewKeyError::Random => Failure::new(ExitKind::Resources, error.to_string()),
            })?;
            let mut stderr = std::io::stderr();
            writeln!(
                stderr,
                "the key, shown this once, and the line for the file that --api-keys names:"
            )?;
            let mut stdout = std::io::stdout();
            writeln!(stdout, "{}\n{}", key.secret, key.line)?;
            Ok(stdout.flush()?)
        }
    }
}
