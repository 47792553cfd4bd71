//! API keys: who may use the front door.
//!
//! Secret: what is kept of a key. The file has one line per key, `NAME:SHA256`, where SHA256 is
//! the hash of the key in hex; blank lines and lines that begin with `#` are skipped. Keys are
//! random, so a fast hash without salt tells nothing about them. A key that is shown is compared
//! with every entry in a time that does not depend on any.

use std::path::Path;
use std::sync::Arc;

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;

use crate::watched::{FileError, Watched};

/// What keys made here begin with: they are found easily where they do not belong.
const KEY_PREFIX: &str = "guild-";
/// Random bytes of a key.
const KEY_BYTES: usize = 32;
/// Keys of one file, at most: every one is looked at for every request.
pub const MAX_KEYS: usize = 4096;
/// Bytes of the name of a key, at most.
pub const MAX_NAME_BYTES: usize = 64;

/// The keys of a file, read again when it changes. Clones share them.
#[derive(Clone, Debug)]
pub struct ApiKeys(Arc<Watched<Vec<Entry>>>);

struct Entry {
    name: String,
    hash: [u8; SHA256_OUTPUT_LEN],
}

impl ApiKeys {
    /// Reads the keys of a file.
    ///
    /// # Errors
    /// The file cannot be read, a line of it is malformed, a name comes twice, or there is no key
    /// in it. Later on a file without keys is taken at its word: nobody may enter.
    pub fn open(path: &Path) -> Result<ApiKeys, FileError> {
        let named = path.to_owned();
        let watched = Watched::open(vec![path.to_owned()], move |contents| {
            entries(&named, contents.first().map_or(&[], Vec::as_slice))
        })?;
        if watched.get().is_empty() {
            let problem = "holds no key, so nobody could enter; `guild keys new` makes one";
            return Err(FileError::new(path, problem));
        }
        Ok(ApiKeys(Arc::new(watched)))
    }

    /// The name that `key` is kept under, if it is.
    pub fn name_of(&self, key: &[u8]) -> Option<String> {
        let shown = digest(&SHA256, key);
        let entries = self.0.get();
        let mut found = None;
        // To the end, whatever was found.
        for entry in entries.iter() {
            if entry.hash.as_slice().ct_eq(shown.as_ref()).into() {
                found = Some(&entry.name);
            }
        }
        found.cloned()
    }
}

fn entries(path: &Path, bytes: &[u8]) -> Result<Vec<Entry>, FileError> {
    let text = std::str::from_utf8(bytes).map_err(|_| FileError::new(path, "is no text"))?;
    let mut entries: Vec<Entry> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |problem: &str| {
            // The line itself may be a key that was not hashed.
            let problem = format!(
                "line {}: {problem}; write NAME:SHA256 as `guild keys new` prints it",
                index + 1
            );
            FileError::new(path, problem)
        };
        let (name, hash) = line.split_once(':').ok_or_else(|| wrong("has no colon"))?;
        check_name(name).map_err(|problem| wrong(&problem))?;
        let hash =
            unhex(hash).ok_or_else(|| wrong("what follows the colon is no SHA-256 in hex"))?;
        if entries.iter().any(|entry| entry.name == name) {
            return Err(wrong(&format!("a second key named {name}")));
        }
        if entries.len() == MAX_KEYS {
            return Err(wrong(&format!("more than {MAX_KEYS} keys")));
        }
        entries.push(Entry {
            name: name.to_owned(),
            hash,
        });
    }
    Ok(entries)
}

/// Whether a key may be called so.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        return Err(format!(
            "a name has 1 to {MAX_NAME_BYTES} of a-z, A-Z, 0-9, `-`, `_`, `.`, `@`"
        ));
    }
    Ok(())
}

/// A new key: the secret for its owner and the line for the file.
#[derive(Clone, PartialEq, Eq)]
pub struct NewKey {
    /// What the owner shows. Kept nowhere.
    pub secret: String,
    /// What the file of keys gets.
    pub line: String,
}

/// Why no key could be made.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NewKeyError {
    /// The name does not do.
    #[error("{0}")]
    Name(String),
    /// The operating system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
}

impl NewKey {
    /// Draws a key called `name`.
    ///
    /// # Errors
    /// The name does not do, or there are no random bytes.
    pub fn draw(name: &str) -> Result<NewKey, NewKeyError> {
        check_name(name).map_err(NewKeyError::Name)?;
        let mut random = [0; KEY_BYTES];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| NewKeyError::Random)?;
        let secret = format!("{KEY_PREFIX}{}", hex(&random));
        let line = format!(
            "{name}:{}",
            hex(digest(&SHA256, secret.as_bytes()).as_ref())
        );
        Ok(NewKey { secret, line })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; SHA256_OUTPUT_LEN]> {
    let text = text.as_bytes();
    if text.len() != 2 * SHA256_OUTPUT_LEN {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; SHA256_OUTPUT_LEN];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}
