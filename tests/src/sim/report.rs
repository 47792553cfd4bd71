//! What a run has seen: how often each rare thing has happened, what went wrong, the event log.

use std::collections::BTreeMap;

use guild_scheduler::membership::{Action, Outcome};

use super::event::Time;
use super::rng::scatter;

/// The account of one run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What must never be; the run ends with it.
    pub violation: Option<String>,
    /// How often what has happened.
    pub sometimes: BTreeMap<&'static str, u64>,
    /// Events of the run.
    pub events: u64,
    /// Tokens that clients were given and that were checked.
    pub tokens: u64,
    /// Microseconds that passed in the world.
    pub virtual_time: Time,
    /// The same for the same seed.
    pub fingerprint: u64,
    /// The readable event log, when asked for.
    pub log: Vec<String>,
    rolled_back: bool,
}

impl Report {
    pub(super) fn count(&mut self, what: &'static str) {
        *self.sometimes.entry(what).or_default() += 1;
    }

    /// Something that must never be. The first one counts.
    pub(super) fn wrong(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(super) fn happened(&mut self, at: Time) {
        self.events += 1;
        self.fingerprint = scatter(self.fingerprint ^ at).wrapping_add(self.events);
    }

    /// What a leader's membership has decided; `cause` is that of its migration.
    pub(super) fn acted(&mut self, action: &Action, cause: &str, healed: bool) {
        match action {
            Action::Withdrawn { reason, .. } => self.count(match reason {
                r if r.contains("was not loaded within") => "epoch withdrawn at its deadline",
                r if r.contains("cannot load") => "epoch withdrawn after a failed copy",
                r if r.contains("was lost") => "epoch withdrawn with a lost node",
                _ => "epoch withdrawn for another reason",
            }),
            Action::MigrationEnded {
                outcome: Outcome::Completed,
                ..
            } => {
                self.count("migration completed");
                if cause.starts_with("drain") {
                    self.count("drain completed");
                }
                if cause == "balance" {
                    self.count("rebalance completed");
                }
                if self.rolled_back {
                    self.count("migration completed after a rollback");
                }
                if healed {
                    self.count("migration completed in good weather");
                }
            }
            Action::MigrationEnded {
                outcome: Outcome::RolledBack(_),
                ..
            } => {
                self.rolled_back = true;
                self.count("migration rolled back");
            }
            Action::StepPublished { .. } => self.count("migration step published"),
            Action::Freed { .. } => self.count("old epochs freed"),
            Action::Lost { .. } => self.count("node lost"),
            _ => {}
        }
    }

    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Report) {
        for (what, times) in &other.sometimes {
            *self.sometimes.entry(what).or_default() += times;
        }
        self.events += other.events;
        self.tokens += other.tokens;
        self.virtual_time += other.virtual_time;
    }
}
