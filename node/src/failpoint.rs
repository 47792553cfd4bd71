//! Fail points: named places of a process where a test makes it fail, stall or die.
//!
//! Secret: how a test gets hold of them. Without the feature `failpoints`, which no release has,
//! [`at`] is nothing at all. With it a process does at each place what `FAILPOINTS` says, as
//! `PLACE=ACTION;PLACE=ACTION`: the actions are those of the crate `fail`, with its percentages
//! and counts, so that `copy::chunk=9*off->1*return(error)` fails the tenth time. `return(error)`
//! is an error, `return(crash)` ends the process on the spot, `return(delay MS)` stalls the thread;
//! each of them is in the log. `sleep(MS)` and `pause` stall it without a word. This module must not know what happens at the places.

/// The places: those of the coordinator that leads, then those of an expert node.
pub const ALL: &[&str] = &[
    "migrate::plan",
    "migrate::step",
    "migrate::publish",
    "migrate::withdraw",
    "migrate::free",
    "copy::begin",
    "copy::chunk",
    "copy::source",
    "copy::checkpoint",
    "digest::check",
    "canary::send",
    "canary::compare",
    "epoch::resident",
    "epoch::free",
];

/// A fail point said that this is where it goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fail point {0}")]
pub struct Fired(pub &'static str);

/// Does what was asked for at the place `name`, usually nothing. May block the thread or end the
/// process.
///
/// # Errors
/// The test wants one here.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn at(_name: &'static str) -> Result<(), Fired> {
    Ok(())
}

#[cfg(feature = "failpoints")]
pub use armed::{ActionError, arm, at, set};

#[cfg(feature = "failpoints")]
mod armed {
    use super::{ALL, Fired};
    use crate::exit::{ExitKind, HasExitKind};

    /// The variable with the actions.
    const VARIABLE: &str = "FAILPOINTS";

    /// Actions that cannot be followed.
    #[derive(Clone, Debug, thiserror::Error)]
    #[error("{VARIABLE}: {entry}: {reason}")]
    pub struct ActionError {
        entry: String,
        reason: String,
    }

    impl HasExitKind for ActionError {
        fn exit_kind(&self) -> ExitKind {
            ExitKind::Config
        }
    }

    /// Does what was asked for at the place `name`, usually nothing. May block the thread or end
    /// the process.
    ///
    /// # Errors
    /// The test wants one here.
    pub fn at(name: &'static str) -> Result<(), Fired> {
        fail::fail_point!(name, |what| {
            tracing::warn!(name, what, "fail point");
            let what = what.as_deref().unwrap_or_default();
            if what == "crash" {
                std::process::abort();
            }
            let delay = what.strip_prefix("delay ");
            match delay.and_then(|ms| ms.trim().parse().ok()) {
                Some(ms) => {
                    std::thread::sleep(std::time::Duration::from_millis(ms));
                    Ok(())
                }
                None => Err(Fired(name)),
            }
        });
        Ok(())
    }

    /// Follows `FAILPOINTS` from now on.
    ///
    /// # Errors
    /// It names a place that is none, or an action that is none.
    pub fn arm() -> Result<(), ActionError> {
        let actions = std::env::var(VARIABLE).unwrap_or_default();
        for entry in actions.split(';').map(str::trim).filter(|e| !e.is_empty()) {
            let (name, actions) = entry.split_once('=').unwrap_or((entry, ""));
            set(name.trim(), actions.trim())?;
        }
        Ok(())
    }

    /// Follows `actions` at the place `name` from now on; `off` does nothing there.
    ///
    /// # Errors
    /// No place has this name, or the actions cannot be read.
    pub fn set(name: &str, actions: &str) -> Result<(), ActionError> {
        let error = |reason: String| ActionError {
            entry: format!("{name}={actions}"),
            reason,
        };
        if !ALL.contains(&name) {
            return Err(error(format!("the places are {}", ALL.join(" "))));
        }
        fail::cfg(name, actions).map_err(error)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn places_have_one_name_each_and_do_nothing_by_themselves() {
        let mut names = ALL.to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        assert!(ALL.iter().all(|name| at(name).is_ok()));
    }

    #[cfg(feature = "failpoints")]
    #[test]
    fn actions_are_followed_and_bad_ones_named() {
        set("copy::begin", "1*off->1*return(error)->off").unwrap();
        let seen: Vec<bool> = (0..4).map(|_| at("copy::begin").is_ok()).collect();
        assert_eq!(seen, [true, false, true, true]);
        set("copy::begin", "1*return(delay 1)->1*return(error)").unwrap();
        let seen: Vec<bool> = (0..2).map(|_| at("copy::begin").is_ok()).collect();
        assert_eq!(seen, [true, false]);
        let wrong = set("copy::begin", "explode").unwrap_err();
        assert!(wrong.to_string().contains("copy::begin=explode"), "{wrong}");
        let nowhere = set("copy::nowhere", "off").unwrap_err();
        assert!(nowhere.to_string().contains("copy::source"), "{nowhere}");
    }
}
