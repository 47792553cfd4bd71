//! Stop strings over a stream of text.

use std::sync::Arc;

/// Finds the first stop string in a text that arrives in pieces.
///
/// Text that may still become a stop string is held back, so what has been
/// released never has to be taken back. The result does not depend on where
/// the pieces were cut: the stop string that is complete first wins, and of
/// several that end at one place the longest.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Arc<[String]>,
    held: String,
}

/// What one piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Text that may be shown now.
    pub text: String,
    /// The stop string that was found; `text` then ends right before it.
    pub stop: Option<String>,
}

impl StopStrings {
    /// A matcher for these strings; empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Takes the next piece of text. After a match nothing is held any more.
    pub fn push(&mut self, piece: &str) -> StopMatch {
        if self.stops.is_empty() {
            return StopMatch {
                text: piece.to_owned(),
                stop: None,
            };
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| {
                self.held
                    .find(stop.as_str())
                    .map(|at| (at + stop.len(), at, stop))
            })
            .min_by_key(|(end, at, _)| (*end, *at));
        if let Some((_, at, stop)) = found {
            let stop = Some(stop.clone());
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return StopMatch { text, stop };
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopMatch {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// What was held back: the text has ended and it became no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` with which `stop` begins, less than all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&n| {
            text.is_char_boundary(text.len() - n)
                && stop
                    .as_bytes()
                    .starts_with(&text.as_bytes()[text.len() - n..])
        })
        .unwrap_or(0)
}
