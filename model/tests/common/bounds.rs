//! How far a computation may be from the goldens: one bound for each numeric format, in this one place.
//!
//! The goldens are f32 computations over weights as stored (FP8 dequantised), and two f32 programs that
//! sum in different orders are what is compared, so the f32 class is what every stored format is judged by
//! when it is computed as it is stored. Rounding weights to another format is another function, and these
//! small random models amplify it too much to bound: it is judged operator by operator elsewhere.

/// Largest absolute differences allowed.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Logits and log-probabilities, of the main model and of drafts.
    pub logits: f32,
    /// Residual stream and normed hidden states, relative to the largest element of the row.
    pub hidden: f32,
    /// Router logits.
    pub router_logits: f32,
    /// Weights of the chosen experts. The chosen ids must be equal.
    pub router_weights: f32,
}

/// f32 arithmetic over f32, bf16, f16 or block-scaled FP8 weights, none of them rounded again.
pub const F32: Bounds = Bounds {
    logits: 5e-4,
    hidden: 1e-4,
    router_logits: 1e-4,
    router_weights: 1e-4,
};
