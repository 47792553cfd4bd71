//! Whether tokens are drafted. Secret: how a person writes it.

use crate::engine::MAX_DRAFTS;

/// Speculative decoding by the draft module (MTP) of the checkpoint, if it has one. Output is the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Speculate {
    /// Never.
    #[default]
    Off,
    /// One draft a step, as long as that is measured to be faster.
    Auto,
    /// So many drafts a step, always.
    Drafts(usize),
}

impl Speculate {
    /// Drafts after each token at most.
    pub(crate) fn drafts(self) -> usize {
        match self {
            Speculate::Off => 0,
            Speculate::Auto => 1,
            Speculate::Drafts(drafts) => drafts,
        }
    }
}

impl std::fmt::Display for Speculate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Speculate::Off => f.write_str("off"),
            Speculate::Auto => f.write_str("auto"),
            Speculate::Drafts(drafts) => write!(f, "{drafts}"),
        }
    }
}

impl std::str::FromStr for Speculate {
    type Err = String;

    /// `off`, `auto`, or a number of drafts.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => return Ok(Speculate::Off),
            "auto" => return Ok(Speculate::Auto),
            _ => {}
        }
        let drafts = text.parse().ok().filter(|n| (1..=MAX_DRAFTS).contains(n));
        drafts.map(Speculate::Drafts).ok_or_else(|| {
            format!("{text:?} is neither `off`, `auto` nor a number from 1 to {MAX_DRAFTS}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for speculate in [Speculate::Off, Speculate::Auto, Speculate::Drafts(3)] {
            assert_eq!(speculate.to_string().parse(), Ok(speculate));
        }
        for bad in ["", "0", "9", "-1", "on"] {
            assert!(bad.parse::<Speculate>().is_err(), "{bad}");
        }
    }
}
