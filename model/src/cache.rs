//! The latent KV cache: for each token and layer the normed c_kv and the rotated k_pe, nothing else.
//!
//! Secret: where a row lies. Memory is one block `[page][layer][token][row]`, a row in the bytes of its format; a sequence
//! names its pages by a page table, in the order of its positions, so a page may lie anywhere. Who
//! owns which page is the scheduler's business and not known here.

pub use guild_kernels::LatentFormat as Format;
use guild_kernels::Memory;

use crate::Config;

/// Pages of cached latents, for all layers of one attention node.
///
/// The memory is asked for zeroed and touched page by page as rows are written, so a cache that is
/// never filled costs address space only.
#[derive(Debug)]
pub struct LatentCache {
    data: Memory,
    format: Format,
    layers: usize,
    pages: usize,
    page_tokens: usize,
    width: usize,
    value_width: usize,
    row_bytes: usize,
}

impl LatentCache {
    /// A cache of `pages` pages of `page_tokens` tokens each, for `layers` layers (the MTP layer counts
    /// as one more after the main model's when drafts are computed).
    ///
    /// # Panics
    /// More memory than there is address space; whoever sizes the cache asks the machine first.
    pub fn new(
        cfg: &Config,
        layers: usize,
        pages: usize,
        page_tokens: usize,
        format: Format,
    ) -> LatentCache {
        let row_bytes = row_bytes(cfg, format);
        let bytes = [layers, page_tokens, row_bytes]
            .into_iter()
            .fold(pages, usize::saturating_mul);
        let data = Memory::new(bytes);
        LatentCache {
            data: data.unwrap_or_else(|error| panic!("{bytes} bytes of KV cache: {error}")),
            format,
            layers,
            pages,
            page_tokens,
            width: cfg.latent_width(),
            value_width: cfg.kv_lora_rank,
            row_bytes,
        }
    }

    /// How rows are stored.
    pub fn format(&self) -> Format {
        self.format
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
        self.data.len()
    }

    /// Cached bytes per token over the layers of the main model; one MTP layer adds `1 / num_hidden_layers` of it.
    pub fn bytes_per_token(cfg: &Config, format: Format) -> usize {
        cfg.num_hidden_layers * row_bytes(cfg, format)
    }

    /// Pages that hold `tokens` tokens.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Caches the row `[latent_width]` of one position: c_kv, then k_pe. `pages` is the sequence's page table.
    pub fn write(&mut self, layer: usize, pages: &[u32], position: usize, row: &[f32]) {
        let at = self.at(layer, pages, position);
        let to = &mut self.data[at..at + self.row_bytes];
        self.format.write(row, self.value_width, to);
    }

    /// What attention sees of one position, `[latent_width]`: what was written, as the format keeps it.
    pub fn read(&self, layer: usize, pages: &[u32], position: usize) -> Vec<f32> {
        let at = self.at(layer, pages, position);
        let mut row = vec![0.0; self.width];
        let from = &self.data[at..at + self.row_bytes];
        self.format.read(from, self.value_width, &mut row);
        row
    }

    /// The bytes of one page, `[layer][token][row]`: what it takes to have the same page elsewhere.
    pub fn page(&self, page: u32) -> &[u8] {
        let stride = self.page_stride();
        &self.data[page as usize * stride..][..stride]
    }

    /// The same to be written. A page that others see is not written again.
    pub fn page_mut(&mut self, page: u32) -> &mut [u8] {
        let stride = self.page_stride();
        &mut self.data[page as usize * stride..][..stride]
    }

    /// The whole memory, for the attention kernel.
    pub fn as_bytes(&self) -> &[u8] {
        &self.data
    }

    /// Bytes between the starts of two pages.
    pub fn page_stride(&self) -> usize {
        self.layers * self.page_tokens * self.row_bytes
    }

    /// Bytes from the start of a page to the rows of `layer`.
    pub fn layer_offset(&self, layer: usize) -> usize {
        debug_assert!(
            layer < self.layers,
            "layer {layer} of a cache of {}",
            self.layers
        );
        layer * self.page_tokens * self.row_bytes
    }

    fn at(&self, layer: usize, pages: &[u32], position: usize) -> usize {
        let page = pages[position / self.page_tokens] as usize;
        page * self.page_stride()
            + self.layer_offset(layer)
            + position % self.page_tokens * self.row_bytes
    }
}

fn row_bytes(cfg: &Config, format: Format) -> usize {
    format.row_bytes(cfg.latent_width(), cfg.kv_lora_rank)
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
