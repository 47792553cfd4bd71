//! Text of a growing list of tokens.

use std::sync::Arc;

use super::Text;
use crate::ModelError;

/// Byte-fallback tokens in a row that are held back: some decoders give up a
/// whole run of them when its last one is wrong. A longer run is released up
/// to here as soon as it is valid.
const MAX_HELD: usize = 64;
/// Further tokens that are held back for a character to become complete.
const MAX_CHARACTER: usize = 4;

/// Turns tokens into text one by one.
///
/// Every piece is complete UTF-8: bytes that a following token may complete to
/// a character are held back. All pieces together, with that of
/// [`Detokenizer::finish`], are what decoding all tokens at once gives.
pub struct Detokenizer {
    text: Arc<Text>,
    skip_special: bool,
    /// Special tokens that have text nevertheless.
    kept: Vec<u32>,
    state: State,
}

enum State {
    /// Decoding concatenates bytes; these are the start of a character.
    Bytes(Vec<u8>),
    /// The decoder must be asked.
    Window(Window),
}

#[derive(Default)]
struct Window {
    /// All tokens so far.
    ids: Vec<u32>,
    /// The tokens released last begin here. The decoder is shown them again,
    /// because it may treat the first token of a text differently.
    context: usize,
    /// The first token whose text has not been released.
    pending: usize,
    released: String,
}

impl Detokenizer {
    /// A detokenizer at the start of a text.
    pub fn new(text: Arc<Text>, skip_special: bool) -> Self {
        let state = if text.bytes.is_byte_level() {
            State::Bytes(Vec::new())
        } else {
            State::Window(Window::default())
        };
        Self {
            text,
            skip_special,
            kept: Vec::new(),
            state,
        }
    }

    /// The same, but these tokens have text even if they are special ones.
    pub fn keeping(self, kept: Vec<u32>) -> Self {
        Self { kept, ..self }
    }

    /// Takes the next token and returns the text that is certain now.
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        if self.skip_special && self.text.is_special(id) && !self.kept.contains(&id) {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(held) => {
                held.extend_from_slice(self.text.bytes.of(id));
                Ok(complete_characters(held))
            }
            State::Window(window) => window.push(&self.text, id),
        }
    }

    /// The text that was held back; the token list has ended.
    pub fn finish(&mut self) -> Result<String, ModelError> {
        match &mut self.state {
            State::Bytes(held) => Ok(String::from_utf8_lossy(&std::mem::take(held)).into_owned()),
            State::Window(window) => window.finish(&self.text),
        }
    }
}

/// Takes from `bytes` what is certain; at most the start of one character stays.
fn complete_characters(bytes: &mut Vec<u8>) -> String {
    let mut out = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        // Only at the very end can an invalid part still become a character.
        if std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_some())
            || taken + invalid.len() < bytes.len()
        {
            if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    out
}

impl Window {
    fn push(&mut self, text: &Text, id: u32) -> Result<String, ModelError> {
        // Decoding skips ids that are no tokens.
        let Some(token) = text.tokenizer.id_to_token(id) else {
            return Ok(String::new());
        };
        self.ids.push(id);
        let held = self.ids.len() - self.pending;
        if super::bytes::byte_fallback(&token).is_some() && held < MAX_HELD {
            return Ok(String::new());
        }
        let before = text.decode(&self.ids[self.context..self.pending], false)?;
        let now = text.decode(&self.ids[self.context..], false)?;
        if now.ends_with(char::REPLACEMENT_CHARACTER) && held < MAX_HELD + MAX_CHARACTER {
            return Ok(String::new());
        }
        let Some(new) = now.strip_prefix(before.as_str()) else {
            return Ok(String::new());
        };
        self.released.push_str(new);
        self.context = self.pending;
        self.pending = self.ids.len();
        Ok(new.to_owned())
    }

    fn finish(&mut self, text: &Text) -> Result<String, ModelError> {
        let all = text.decode(&std::mem::take(&mut self.ids), false)?;
        let released = std::mem::take(&mut self.released);
        (self.context, self.pending) = (0, 0);
        Ok(all
            .strip_prefix(released.as_str())
            .unwrap_or_default()
            .to_owned())
    }
}
