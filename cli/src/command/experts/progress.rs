//! Following a migration: the stream of its changes, over a change of leader,
//! and how they are shown.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use guild_proto::cluster::v1::{MigrationPhase, MigrationStatus};
use serde::Serialize;
use tonic::{Code, Status, Streaming};

use super::leader::Asking;
use crate::failure::Failure;
use crate::json;
use crate::loading::Progress;
use crate::units::bytes;

/// How long a lost leader is looked for: another one has been elected by then.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks for a leader.
const PAUSE: Duration = Duration::from_millis(500);

/// The changes of what is being moved.
pub(super) struct Changes {
    leader: Asking,
    stream: Option<Streaming<MigrationStatus>>,
}

impl Changes {
    /// # Errors
    /// Nobody answers, or nobody leads.
    pub(super) async fn of(mut leader: Asking) -> Result<Changes, Failure> {
        let stream = leader.watch().await;
        let stream = stream.map_err(|status| leader.failure(status))?;
        Ok(Changes {
            leader,
            stream: Some(stream),
        })
    }

    /// For further questions to the same coordinators.
    pub(super) fn leader(&mut self) -> &mut Asking {
        &mut self.leader
    }

    /// The next change; the first is how it stands. Stays when the leader changes.
    ///
    /// # Errors
    /// There is no leader any more, or it says no.
    pub(super) async fn next(&mut self) -> Result<MigrationStatus, Failure> {
        let begun = Instant::now();
        loop {
            let lost = match &mut self.stream {
                Some(stream) => match stream.message().await {
                    Ok(Some(now)) => return Ok(now),
                    Ok(None) => Status::unavailable("the coordinator ended the stream"),
                    Err(status) => status,
                },
                None => match self.leader.watch().await {
                    Ok(stream) => {
                        self.stream = Some(stream);
                        continue;
                    }
                    Err(status) => status,
                },
            };
            let first = self.stream.take().is_some();
            let patient = first || begun.elapsed() < PATIENCE;
            if lost.code() != Code::Unavailable && !first || !patient {
                return Err(self.leader.failure(lost));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits for a change by which migration `id` has ended, and shows it on the way;
    /// `before` is how it stood when it had not begun. Returns that change.
    ///
    /// # Errors
    /// It was rolled back, or nobody says.
    pub(super) async fn until_ended(
        &mut self,
        id: u64,
        before: &MigrationStatus,
        shown: &mut Shown,
    ) -> Result<MigrationStatus, Failure> {
        loop {
            let now = self.next().await?;
            shown.bar(&now);
            if now.migration < id || (now.migration == id && now.phase() != MigrationPhase::Idle) {
                continue;
            }
            // A new leader counts anew.
            let counted_before = match now.completed < before.completed {
                true => 0,
                false => before.rolled_back,
            };
            if now.rolled_back > counted_before {
                return Err(Failure::network(format!(
                    "migration {id} was rolled back: {}",
                    now.last_failure
                ))
                .hint("what served before goes on serving; the coordinator's log says more"));
            }
            return Ok(now);
        }
    }
}

/// How changes are shown.
#[derive(Default)]
pub(super) struct Shown {
    /// The migration that the bar is for.
    bar: Option<(u64, Progress)>,
    /// The last line, as far as a terminal gets lines: see [`landmark`].
    last: Option<MigrationStatus>,
}

impl Shown {
    /// A line on stdout; where a person watches, copies move a bar instead.
    ///
    /// # Errors
    /// stdout is closed.
    pub(super) fn line(&mut self, now: &MigrationStatus) -> Result<(), Failure> {
        self.bar(now);
        let landmark = landmark(now);
        let told = self.last.replace(landmark.clone()) == Some(landmark);
        if told && std::io::stdout().is_terminal() && self.bar.is_some() {
            return Ok(());
        }
        let write = || {
            let mut stdout = std::io::stdout();
            writeln!(stdout, "{}", words(now))?;
            stdout.flush()
        };
        match &self.bar {
            Some((_, bar)) => bar.suspend(write)?,
            None => write()?,
        }
        Ok(())
    }

    /// Moves the bar on a terminal.
    pub(super) fn bar(&mut self, now: &MigrationStatus) {
        if now.phase() != MigrationPhase::Copying {
            self.bar = None;
            return;
        }
        if self.bar.as_ref().is_none_or(|(id, _)| *id != now.migration) {
            self.bar = Some((now.migration, Progress::new("moving experts")));
        }
        if let Some((_, bar)) = &self.bar {
            bar.at(now.bytes_done, now.bytes);
        }
    }
}

/// What is left of a change when its copies are not counted.
fn landmark(now: &MigrationStatus) -> MigrationStatus {
    MigrationStatus {
        copies_done: 0,
        bytes_done: 0,
        ..now.clone()
    }
}

/// A change on one line.
fn words(now: &MigrationStatus) -> String {
    let copies = || {
        let (done, all) = (bytes(now.bytes_done), bytes(now.bytes));
        format!(
            "migration {} ({}): {} of {} copies, {done} of {all}, epoch {}",
            now.migration, now.cause, now.copies_done, now.copies, now.epoch
        )
    };
    match now.phase() {
        MigrationPhase::Copying => format!("{} is being loaded", copies()),
        MigrationPhase::Draining => {
            format!("{} is active, those before it drain", copies())
        }
        MigrationPhase::Idle | MigrationPhase::Unspecified => {
            let last = match now.last_failure.as_str() {
                "" => String::new(),
                why => format!(" (the last: {why})"),
            };
            format!(
                "nothing is being moved; {} migrations completed, {} rolled back{last}",
                now.completed, now.rolled_back
            )
        }
    }
}

/// A change for programs.
#[derive(Serialize)]
struct Change<'a> {
    migration: u64,
    phase: &'static str,
    epoch: u64,
    cause: &'a str,
    copies_done: u32,
    copies: u32,
    bytes_done: u64,
    bytes: u64,
    completed: u64,
    rolled_back: u64,
    last_failure: &'a str,
}

/// One JSON object on stdout.
///
/// # Errors
/// stdout is closed.
pub(super) fn print_json(now: &MigrationStatus) -> Result<(), Failure> {
    json::print(&Change {
        migration: now.migration,
        phase: match now.phase() {
            MigrationPhase::Copying => "copying",
            MigrationPhase::Draining => "draining",
            MigrationPhase::Idle | MigrationPhase::Unspecified => "idle",
        },
        epoch: now.epoch,
        cause: &now.cause,
        copies_done: now.copies_done,
        copies: now.copies,
        bytes_done: now.bytes_done,
        bytes: now.bytes,
        completed: now.completed,
        rolled_back: now.rolled_back,
        last_failure: &now.last_failure,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_words() {
        let mut now = MigrationStatus {
            migration: 7,
            phase: MigrationPhase::Copying.into(),
            epoch: 41,
            cause: "drain expert-2".to_owned(),
            copies_done: 3,
            copies: 12,
            bytes_done: 3 << 20,
            bytes: 12 << 20,
            ..Default::default()
        };
        assert_eq!(
            words(&now),
            "migration 7 (drain expert-2): 3 of 12 copies, 3.00 MiB of 12.0 MiB, epoch 41 is being loaded"
        );
        now.phase = MigrationPhase::Draining.into();
        assert!(words(&now).ends_with("epoch 41 is active, those before it drain"));
        now.phase = MigrationPhase::Idle.into();
        (now.completed, now.rolled_back) = (5, 1);
        "expert-3 fell silent".clone_into(&mut now.last_failure);
        assert_eq!(
            words(&now),
            "nothing is being moved; 5 migrations completed, 1 rolled back (the last: expert-3 fell silent)"
        );
        // A change of nothing but what was copied is no landmark.
        let mut later = now.clone();
        later.copies_done += 1;
        assert_eq!(landmark(&later), landmark(&now));
        later.epoch += 1;
        assert_ne!(landmark(&later), landmark(&now));
    }
}
