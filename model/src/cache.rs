//! The latent KV cache: for each token and layer the normed c_kv and the rotated k_pe, nothing else.
//!
//! Secret: where a row lies. Memory is one block `[page][layer][token][latent_width]` f32; a sequence
//! names its pages by a page table, in the order of its positions, so a page may lie anywhere. Who
//! owns which page is the scheduler's business and not known here.

use crate::Config;

/// Pages of cached latents, for all layers of one attention node.
///
/// The memory is asked for zeroed and touched page by page as rows are written, so a cache that is
/// never filled costs address space only.
#[derive(Debug)]
pub struct LatentCache {
    data: Vec<f32>,
    layers: usize,
    pages: usize,
    page_tokens: usize,
    width: usize,
}

impl LatentCache {
    /// A cache of `pages` pages of `page_tokens` tokens each, for `layers` layers (the MTP layer counts
    /// as one more after the main model's when drafts are computed).
    ///
    /// # Panics
    /// More memory than there is address space; whoever sizes the cache asks the machine first.
    pub fn new(cfg: &Config, layers: usize, pages: usize, page_tokens: usize) -> LatentCache {
        let width = cfg.latent_width();
        let elements = [layers, page_tokens, width]
            .into_iter()
            .fold(pages, usize::saturating_mul);
        LatentCache {
            data: vec![0.0; elements],
            layers,
            pages,
            page_tokens,
            width,
        }
    }

    /// Tokens of one page.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages in all; page numbers are below this.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Layers cached per token.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Resident bytes when every page is in use.
    pub fn bytes(&self) -> usize {
        size_of_val(self.data.as_slice())
    }

    /// Cached bytes per token over the layers of the main model; one MTP layer adds `1 / num_hidden_layers` of it.
    pub fn bytes_per_token(cfg: &Config) -> usize {
        cfg.num_hidden_layers * cfg.latent_width() * size_of::<f32>()
    }

    /// Pages that hold `tokens` tokens.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// The row `[latent_width]` of one position: c_kv, then k_pe. `pages` is the sequence's page table.
    pub fn row(&self, layer: usize, pages: &[u32], position: usize) -> &[f32] {
        let at = self.at(layer, pages, position);
        &self.data[at..at + self.width]
    }

    /// As [`LatentCache::row`], for writing.
    pub fn row_mut(&mut self, layer: usize, pages: &[u32], position: usize) -> &mut [f32] {
        let at = self.at(layer, pages, position);
        &mut self.data[at..at + self.width]
    }

    /// The whole memory, for the attention kernel.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// Elements between the starts of two pages.
    pub fn page_stride(&self) -> usize {
        self.layers * self.page_tokens * self.width
    }

    /// Elements from the start of a page to the rows of `layer`.
    pub fn layer_offset(&self, layer: usize) -> usize {
        debug_assert!(
            layer < self.layers,
            "layer {layer} of a cache of {}",
            self.layers
        );
        layer * self.page_tokens * self.width
    }

    fn at(&self, layer: usize, pages: &[u32], position: usize) -> usize {
        let page = pages[position / self.page_tokens] as usize;
        page * self.page_stride()
            + self.layer_offset(layer)
            + position % self.page_tokens * self.width
    }
}

/// Consecutive rows of a batch that belong to one sequence.
#[derive(Debug, Clone)]
pub struct SeqRows<'a> {
    /// Rows in the batch.
    pub rows: std::ops::Range<usize>,
    /// Position of the first of them in the sequence; earlier positions are cached already.
    pub start: usize,
    /// The sequence's page table, covering `start + rows.len()` tokens.
    pub pages: &'a [u32],
}
