//! How a command fails: a kind that decides the exit code, a sentence, and what
//! to do about it.

use std::io::Write as _;
use std::process::ExitCode;

use guild_model::ModelError;
use guild_node::config::ConfigError;
use guild_node::{ExitKind, HasExitKind};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Shown under every `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  internal error
  2  usage: a flag or a field of the request is wrong
  3  configuration: a file or an environment variable is wrong
  4  model: the checkpoint is missing, damaged or not the one served
  5  network: an address is taken, or a peer cannot be reached or refuses
  6  resources: memory, threads, handles or a limit of the server
  7  verdict: a comparison found the new result worse
  130  ended by a second signal while draining

Every flag can be given as GUILD_<FLAG> in the environment and by its name in a
TOML file (--config); a typed flag wins over the environment, that over the file.";

/// Why a command ends without success.
#[derive(Debug)]
pub(crate) struct Failure {
    kind: ExitKind,
    message: String,
    hints: Vec<String>,
    /// Rendered by clap itself; help and version are no failure.
    clap: Option<clap::Error>,
}

impl Failure {
    pub(crate) fn new(kind: ExitKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hints: Vec::new(),
            clap: None,
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitKind::Usage, message)
    }

    pub(crate) fn network(message: impl Into<String>) -> Self {
        Self::new(ExitKind::Network, message)
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Any error that knows its kind.
    pub(crate) fn of(error: &dyn HasExitKind) -> Self {
        Self::new(error.exit_kind(), error.to_string())
    }

    /// Says it on stderr and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        if let Some(error) = self.clap {
            let code = if error.use_stderr() {
                ExitKind::Usage.code()
            } else {
                0
            };
            // Nothing is left to do when the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "error: {}", self.message);
        for hint in &self.hints {
            let _ = writeln!(stderr, "  hint: {hint}");
        }
        ExitCode::from(self.kind.code())
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn hints(&self) -> &[String] {
        &self.hints
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let mut failure = Self::new(error.exit_kind(), error.to_string());
        if let ConfigError::CommandLine(error) = error {
            failure.clap = Some(error);
        }
        failure
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        let kind = match error {
            ModelError::Input { .. } => ExitKind::Usage,
            _ => ExitKind::Model,
        };
        Self::new(kind, error.to_string())
    }
}

/// What a server answered: the fields it names become hints.
impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let kind = match status.code() {
            Code::InvalidArgument
            | Code::OutOfRange
            | Code::Unauthenticated
            | Code::PermissionDenied => ExitKind::Usage,
            Code::NotFound | Code::FailedPrecondition => ExitKind::Model,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => {
                ExitKind::Network
            }
            Code::ResourceExhausted => ExitKind::Resources,
            _ => ExitKind::Internal,
        };
        let mut failure = Self::new(
            kind,
            format!(
                "the server answered {:?}: {}",
                status.code(),
                status.message()
            ),
        );
        if status.code() == Code::Unauthenticated {
            failure = failure.hint("give the key as --api-key or GUILD_API_KEY");
        }
        let details = status.get_error_details();
        for violation in details
            .bad_request()
            .map(|bad| bad.field_violations.as_slice())
            .unwrap_or_default()
        {
            failure = failure.hint(format!(
                "field `{}`: {}",
                violation.field, violation.description
            ));
        }
        if let Some(reason) = guild_node::status::reason_of(&status)
            && reason != "INVALID_ARGUMENT"
        {
            failure = failure.hint(format!("reason {reason}"));
        }
        if let Some(wait) = guild_node::status::retry_after(&status) {
            failure = failure.hint(format!("try again in {:.1} s", wait.as_secs_f32()));
        }
        failure
    }
}

/// Output cannot be written: the reader has gone or the disk is full.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(ExitKind::Resources, format!("cannot write output: {error}"))
    }
}
