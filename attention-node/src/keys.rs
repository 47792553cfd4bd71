//! Keys of KV pages by what is in them.
//!
//! Secret: what a page's contents depend on: every token up to its end, and who may see them. A key is a
//! BLAKE3 digest of the key before it and the page's tokens, so a chain of equal keys is a chain of equal
//! beginnings; the first one begins with the tenant, so tenants share nothing and cannot probe each
//! other's prompts by how fast an answer comes. The latents of a draft module at a position depend on
//! the token after it, too: where they are cached, a page's key covers one token more.

/// Names the keys of this version among all that BLAKE3 derives.
const CONTEXT: &str = "guild v1 latent KV page key";

/// The keys of one sequence's pages, made as its tokens become known.
#[derive(Debug)]
pub(crate) struct Chain {
    before: [u8; 32],
    made: usize,
    page_tokens: usize,
    /// Tokens beyond the end of a page that it depends on.
    ahead: usize,
}

impl Chain {
    /// A chain of nothing yet. `drafting`: pages hold what a draft module makes of them, too.
    pub(crate) fn new(tenant: u64, page_tokens: usize, drafting: bool) -> Chain {
        let mut salt = tenant.to_le_bytes().to_vec();
        salt.push(u8::from(drafting));
        Chain {
            before: blake3::derive_key(CONTEXT, &salt),
            made: 0,
            page_tokens,
            ahead: usize::from(drafting),
        }
    }

    /// Whether pages hold what a draft module makes of them, too.
    pub(crate) fn is_drafting(&self) -> bool {
        self.ahead > 0
    }

    /// Keys of the pages that `tokens`, the whole sequence so far, has filled since the last call.
    pub(crate) fn extend(&mut self, tokens: &[u32]) -> Vec<u128> {
        let full = tokens.len().saturating_sub(self.ahead) / self.page_tokens;
        let mut keys = Vec::with_capacity(full.saturating_sub(self.made));
        for page in self.made..full {
            let end = (page + 1) * self.page_tokens + self.ahead;
            let start = if page == 0 { 0 } else { end - self.page_tokens };
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.before);
            for token in &tokens[start..end] {
                hasher.update(&token.to_le_bytes());
            }
            self.before = hasher.finalize().into();
            let (key, _) = self.before.split_at(16);
            keys.push(key.iter().fold(0, |key, &byte| key << 8 | u128::from(byte)));
        }
        self.made = self.made.max(full);
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(tenant: u64, drafting: bool, tokens: &[u32]) -> Vec<u128> {
        Chain::new(tenant, 4, drafting).extend(tokens)
    }

    #[test]
    fn equal_beginnings_have_equal_keys_and_nothing_else_has() {
        let tokens: Vec<u32> = (0..14).collect();
        let all = keys(1, false, &tokens);
        assert_eq!(all.len(), 3);
        assert_eq!(keys(1, false, &tokens[..8]), all[..2]);
        let mut other = tokens.clone();
        other[5] = 99;
        let differs = keys(1, false, &other);
        assert_eq!(differs[0], all[0]);
        assert!(differs[1] != all[1] && differs[2] != all[2]);
        assert!(keys(2, false, &tokens).iter().all(|key| !all.contains(key)));
        assert!(keys(1, true, &tokens).iter().all(|key| !all.contains(key)));
    }

    #[test]
    fn a_chain_made_bit_by_bit_is_the_same() {
        let tokens: Vec<u32> = (0..40).map(|n| n * 7 % 11).collect();
        for drafting in [false, true] {
            let mut chain = Chain::new(3, 4, drafting);
            let bits: Vec<u128> = (0..=40).flat_map(|n| chain.extend(&tokens[..n])).collect();
            assert_eq!(bits, keys(3, drafting, &tokens));
        }
    }

    #[test]
    fn with_drafts_a_page_waits_for_the_token_behind_it() {
        let tokens: Vec<u32> = (0..9).collect();
        assert_eq!(keys(1, true, &tokens[..8]).len(), 1);
        assert_eq!(keys(1, true, &tokens).len(), 2);
        let mut other = tokens.clone();
        other[8] = 99;
        assert_eq!(keys(1, true, &tokens)[0], keys(1, true, &other)[0]);
        assert_ne!(keys(1, true, &tokens)[1], keys(1, true, &other)[1]);
    }
}
