//! Arithmetic in which every mistake shows: an expert is a number, a row is hashed by it, a step
//! is a hash of all its rows in order. A sum that lacks a row, has one twice, or one of another
//! expert, gives another token than the reference, which computes the same without a cluster.

use super::rng::scatter;

/// The model that the clusters of a run serve.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// Layers with experts; their indices are `1..=layers`.
    pub layers: u32,
    /// Experts of a layer.
    pub experts: u32,
    /// Experts of a row.
    pub top_k: u32,
}

/// An expert: (layer, number).
pub type Key = (u32, u32);

impl Model {
    /// Indices of the layers.
    pub fn layers(&self) -> Vec<u32> {
        (1..=self.layers).collect()
    }

    /// The experts of a row, ascending.
    pub fn routes(&self, layer: u32, row: u64) -> Vec<u32> {
        let mut chosen = Vec::new();
        let mut at = row ^ u64::from(layer);
        while chosen.len() < self.top_k.min(self.experts) as usize {
            at = scatter(at.wrapping_add(0x9e37_79b9_7f4a_7c15));
            let expert = (at % u64::from(self.experts)) as u32;
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen.sort_unstable();
        chosen
    }

    /// The token that follows `tokens`, without any cluster.
    pub fn reference(&self, tokens: &[u32]) -> u32 {
        let mut row = embed(tokens);
        for layer in self.layers() {
            let experts = self.routes(layer, row);
            row = combine(
                row,
                experts.iter().map(|&e| expert(weight((layer, e)), row)),
            );
        }
        head(row)
    }
}

/// The row of a sequence before the first layer.
pub fn embed(tokens: &[u32]) -> u64 {
    let mix = |row: u64, &token: &u32| scatter(row.rotate_left(7) ^ u64::from(token));
    tokens.iter().fold(1, mix)
}

/// What an expert is: its weights in one number.
pub fn weight((layer, expert): Key) -> u64 {
    scatter((u64::from(layer) << 32 | u64::from(expert)) ^ 0x6a09_e667_f3bc_c908)
}

/// What an expert of that weight makes of a row.
pub fn expert(weight: u64, row: u64) -> u64 {
    scatter(weight ^ row.rotate_left(17))
}

/// The next row: the sum of the expert rows in ascending expert, with the residual.
pub fn combine(row: u64, expert_rows: impl Iterator<Item = u64>) -> u64 {
    let sum = expert_rows.fold(0u64, |sum, one| sum.rotate_left(9).wrapping_add(one));
    scatter(row ^ sum)
}

/// The token of a last row.
pub fn head(row: u64) -> u32 {
    (row >> 40) as u32
}
