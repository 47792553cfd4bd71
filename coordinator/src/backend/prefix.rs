//! Blocks of prompts by name.
//!
//! Secret: what a name is. A block's name stands for its tokens and all before them, of one tenant:
//! tenants do not share caches. Names are drawn anew in every process, so that nobody can look for
//! prompts with equal ones; two that are equal all the same cost a detour.

use std::hash::{BuildHasher as _, RandomState};

/// Tokens of a block: a prefix of fewer is not worth a detour.
pub(super) const BLOCK: usize = 64;
/// Blocks of a prompt that are named, at most.
const MAX_NAMED: usize = 1 << 11;

/// Gives names.
#[derive(Debug, Default)]
pub(super) struct Names(RandomState);

impl Names {
    /// The names of the whole blocks of a prompt, but for one that ends with it: its last token is
    /// run in any case.
    pub(super) fn of(&self, tenant: u64, tokens: &[u32]) -> Vec<u64> {
        let all = tokens.len().saturating_sub(1) / BLOCK;
        let blocks = tokens.chunks_exact(BLOCK).take(all.min(MAX_NAMED));
        let mut before = self.0.hash_one(tenant);
        blocks
            .map(|block| {
                before = self.0.hash_one((before, block));
                before
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_all_before_it_and_for_one_tenant() {
        let names = Names::default();
        let tokens: Vec<u32> = (0..3 * BLOCK as u32).collect();
        let mut other = tokens.clone();
        other[BLOCK + 1] += 1;
        let (mine, theirs) = (names.of(1, &tokens), names.of(1, &other));
        assert_eq!(mine.len(), 2, "the last token is run in any case");
        assert_eq!(mine[0], theirs[0]);
        assert_ne!(mine[1], theirs[1]);
        other[BLOCK + 1] -= 1;
        other[0] += 1;
        assert!(names.of(1, &other).iter().all(|name| !mine.contains(name)));
        assert!(names.of(2, &tokens).iter().all(|name| !mine.contains(name)));
        assert_eq!(
            names.of(1, &[tokens.clone(), vec![7]].concat())[..2],
            mine[..]
        );
        assert!(names.of(1, &tokens[..BLOCK]).is_empty());
        assert!(names.of(1, &[]).is_empty());
    }
}
