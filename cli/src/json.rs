//! What `--json` prints: one object on one line of stdout.

use std::fmt::Display;
use std::io::Write as _;

use guild_node::ExitKind;
use serde::Serialize;

use crate::failure::Failure;

/// The object on one line, without its end.
pub(crate) fn line(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(value)
        .map_err(|error| Failure::new(ExitKind::Internal, format!("cannot write JSON: {error}")))
}

/// Prints the object; whoever reads a pipe has it at once.
pub(crate) fn print(value: &impl Serialize) -> Result<(), Failure> {
    tell(line(value)?)
}

/// Prints a result of one line: as an object with `json`, in words without.
pub(crate) fn print_or_say(value: &(impl Serialize + Display), json: bool) -> Result<(), Failure> {
    match json {
        true => print(value),
        false => tell(value),
    }
}

fn tell(line: impl Display) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
