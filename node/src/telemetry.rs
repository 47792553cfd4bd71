//! Log output of a process: tracing events to standard error, as text for
//! people or as one JSON object a line for machines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::exit::{ExitKind, HasExitKind};

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is neither a level nor a list of directives.
    #[error(
        "log level `{level}` is not valid: {reason}; use error, warn, info, debug, trace, or directives such as `info,guild_node=debug`"
    )]
    Level {
        /// What was given.
        level: String,
        /// Why it was refused.
        reason: String,
    },
    /// Another part of the process has set up logging already.
    #[error("logging is already set up: {0}")]
    Installed(String),
}

impl HasExitKind for TelemetryError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            TelemetryError::Level { .. } => ExitKind::Usage,
            TelemetryError::Installed(_) => ExitKind::Internal,
        }
    }
}

/// Sends every event at or above `level` to standard error from now on.
/// `level` is a level name or a comma-separated list of `target=level`.
///
/// # Errors
/// `level` is malformed, or a subscriber is installed already.
pub fn init(format: LogFormat, level: &str) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(level).map_err(|e| TelemetryError::Level {
        level: level.to_owned(),
        reason: e.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = match format {
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(|e| TelemetryError::Installed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::{LogFormat, TelemetryError, init};

    #[test]
    fn a_malformed_level_is_named() {
        let error = init(LogFormat::Text, "guild_node=loud").expect_err("no such level");
        assert!(matches!(error, TelemetryError::Level { .. }));
        assert!(error.to_string().contains("guild_node=loud"), "{error}");
    }
}
