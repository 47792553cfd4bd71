//! The multi-token-prediction module: a draft of the token after the next (DeepSeek-V3 report, section 2.2).
//!
//! Secret: what surrounds its one decoder layer. The layer itself is a [`Layer`] like any other, with its
//! own rows in the cache and its own routed experts, so a caller runs it with the same code as the rest.

use std::sync::Arc;

use crate::ModelError;
use crate::mla::Rope;
use crate::trunk::{self, Layer, Norm};
use crate::weights::{Loader, Matrix};
use crate::workspace::{Buffer, Workspace};

/// The first MTP module of a model.
///
/// For a row at position i: [`Mtp::combine_input`] of the token at i + 1 and the main model's final
/// norm at i, then [`Mtp::layer`] at position i, then [`Mtp::draft_logits`], which predict the token at i + 2.
#[derive(Debug)]
pub struct Mtp {
    workspace: Workspace,
    layer: Layer,
    embedding: Arc<Matrix>,
    embedding_norm: Norm,
    hidden_norm: Norm,
    projection: Matrix,
    norm: Norm,
    head: Arc<Matrix>,
}

impl Mtp {
    pub(crate) fn load(
        loader: &Loader<'_>,
        workspace: &Workspace,
        rope: &Arc<Rope>,
        embedding: &Arc<Matrix>,
        head: &Arc<Matrix>,
    ) -> Result<Mtp, ModelError> {
        let cfg = loader.config();
        let prefix = format!("model.layers.{}", cfg.num_hidden_layers);
        Ok(Mtp {
            workspace: workspace.clone(),
            layer: Layer::load(loader, cfg.num_hidden_layers, workspace, rope)?,
            embedding: own_or_main(loader, &format!("{prefix}.embed_tokens"), embedding)?,
            embedding_norm: Norm::load(loader, &format!("{prefix}.enorm"))?,
            hidden_norm: Norm::load(loader, &format!("{prefix}.hnorm"))?,
            projection: loader.matrix(
                &format!("{prefix}.eh_proj"),
                cfg.hidden_size,
                2 * cfg.hidden_size,
            )?,
            norm: Norm::load(loader, &format!("{prefix}.shared_head.norm"))?,
            head: own_or_main(loader, &format!("{prefix}.shared_head.head"), head)?,
        })
    }

    /// The input of the layer `[n, hidden]`: eh_proj of (normed embedding of the next token | normed hidden
    /// state), the embedding first, as the released weights have it (the report writes them the other way).
    ///
    /// `next_tokens` `[n]` follow the rows; `hidden` `[n, hidden]` is the main model's after its final norm.
    ///
    /// # Panics
    /// As [`Trunk::embed`](crate::trunk::Trunk::embed).
    pub fn combine_input(&self, next_tokens: &[u32], hidden: &[f32]) -> Buffer {
        let (workspace, width) = (&self.workspace, self.projection.rows());
        let embedded = trunk::embed(workspace, &self.embedding, next_tokens);
        let embedded = self.embedding_norm.forward(workspace, &embedded);
        let hidden = self.hidden_norm.forward(workspace, hidden);
        let mut both = workspace.take(2 * hidden.len());
        let halves = embedded.chunks_exact(width).zip(hidden.chunks_exact(width));
        for (both, (e, h)) in both.chunks_exact_mut(2 * width).zip(halves) {
            both[..width].copy_from_slice(e);
            both[width..].copy_from_slice(h);
        }
        self.projection.apply(workspace, &both)
    }

    /// The decoder layer between input and head; its cache layer and its experts are those of its index.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// What a further draft takes in place of the main model's hidden state: the layer's output rows
    /// `[n, hidden]` after the module's norm, as the main model's come after its own.
    pub fn carry(&self, hidden: &[f32]) -> Buffer {
        self.norm.forward(&self.workspace, hidden)
    }

    /// Logits `[n, vocab]` of the layer's output rows `[n, hidden]`.
    pub fn draft_logits(&self, hidden: &[f32]) -> Buffer {
        let normed = self.norm.forward(&self.workspace, hidden);
        self.head.apply(&self.workspace, &normed)
    }

    /// Resident bytes beyond the main model's embedding and head where those are shared.
    pub(crate) fn bytes(&self, embedding: &Arc<Matrix>, head: &Arc<Matrix>) -> u64 {
        let own = |mine: &Arc<Matrix>, main: &Arc<Matrix>| {
            if Arc::ptr_eq(mine, main) {
                0
            } else {
                mine.bytes()
            }
        };
        let norms = self.embedding_norm.bytes() + self.hidden_norm.bytes() + self.norm.bytes();
        let matrices =
            self.projection.bytes() + own(&self.embedding, embedding) + own(&self.head, head);
        norms + matrices + self.layer.bytes()
    }
}

/// The module's own copy of a matrix, or the main model's where it has none or the same: released
/// checkpoints repeat embedding and head bit for bit, and holding them twice would be gigabytes.
fn own_or_main(
    loader: &Loader<'_>,
    own: &str,
    matrix: &Arc<Matrix>,
) -> Result<Arc<Matrix>, ModelError> {
    let ckpt = loader.checkpoint();
    let tensor = format!("{own}.weight");
    if !ckpt.contains(&tensor) || ckpt.repeats_main(&tensor)? {
        return Ok(Arc::clone(matrix));
    }
    Ok(Arc::new(loader.matrix(
        own,
        matrix.rows(),
        matrix.cols(),
    )?))
}
