//! What each token stands for, in bytes: one flat table, made once.

use std::collections::HashMap;

use tokenizers::Tokenizer;

/// Bytes of every token below the vocabulary size.
pub(super) struct TokenBytes {
    data: Vec<u8>,
    /// Token `i` is `data[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    special: Vec<bool>,
    longest: usize,
    byte_level: bool,
}

impl TokenBytes {
    pub(super) fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Self {
        let byte_level = super::is_byte_level(tokenizer);
        let byte_of = bytes_of_alphabet();
        let mut table = Self {
            data: Vec::new(),
            ends: Vec::with_capacity(vocab_size),
            special: vec![false; vocab_size],
            longest: 1,
            byte_level,
        };
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if let Some(flag) = table.special.get_mut(id as usize) {
                *flag = token.special;
            }
        }
        for id in 0..vocab_size {
            let token = tokenizer.id_to_token(id as u32).unwrap_or_default();
            let start = table.data.len();
            match byte_fallback(&token) {
                Some(byte) if !byte_level => table.data.push(byte),
                _ if byte_level => match token
                    .chars()
                    .map(|c| byte_of.get(&c).copied())
                    .collect::<Option<Vec<u8>>>()
                {
                    Some(bytes) => table.data.extend(bytes),
                    None => table.data.extend_from_slice(token.as_bytes()),
                },
                _ => table
                    .data
                    .extend_from_slice(token.replace('▁', " ").as_bytes()),
            }
            table.ends.push(table.data.len() as u32);
            table.longest = table.longest.max(table.data.len() - start);
        }
        table
    }

    pub(super) fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.data[start as usize..end as usize]
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// Whether decoding is the concatenation of these bytes.
    pub(super) fn is_byte_level(&self) -> bool {
        self.byte_level
    }
}

/// The byte of a byte-fallback token, written `<0x0A>`.
pub(super) fn byte_fallback(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2)
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

/// The byte that each printable character stands for in a byte-level
/// vocabulary (GPT-2 report, section 2.2): printable Latin-1 is itself, the
/// characters from U+0100 on are the other bytes in order.
fn bytes_of_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let themselves = (0..=255u8)
        .filter(|b| printable(*b))
        .map(|b| (char::from(b), b));
    let moved = ('\u{100}'..).zip((0..=255u8).filter(|b| !printable(*b)));
    themselves.chain(moved).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_the_published_one() {
        let byte = bytes_of_alphabet();
        assert_eq!(byte.len(), 256);
        assert_eq!(
            ['A', 'Ġ', 'Ċ', 'Ā', 'Ń', 'ÿ'].map(|c| byte[&c]),
            [b'A', b' ', b'\n', 0, 0xAD, 0xFF]
        );
    }

    #[test]
    fn byte_fallback_tokens_are_told_from_others() {
        assert_eq!(byte_fallback("<0x0A>"), Some(10));
        assert_eq!(byte_fallback("<0xZZ>"), None);
        assert_eq!(byte_fallback("<0x0>"), None);
        assert_eq!(byte_fallback("<s>"), None);
    }
}
