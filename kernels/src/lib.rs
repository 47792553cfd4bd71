//! Row-invariant CPU arithmetic: the only room of the project with `unsafe` code.
//!
//! Secret: the instruction set. Every operation is defined by one written rule (see [`Cpu`]) and gives the same bits on
//! every instruction set, for every thread count, tile and number of rows in the call. It may use the host's SIMD and
//! threads; it must not know what a model, a token or a network is.
//!
//! Inside: `generic` holds the algorithms over 16 virtual lanes, `x86`, `arm` and `portable` the leaves that compile
//! them, `isa` the one choice between leaves, `arithmetic` that between rules for bf16, `plan` and `pool` the cut into
//! tasks, [`pack`] the layout of small integers, [`mod@file`] the mapping of checkpoints.

mod arithmetic;
#[cfg(target_arch = "aarch64")]
mod arm;
mod cpu;
pub mod file;
pub mod floor;
mod generic;
mod isa;
mod latent;
mod memory;
pub mod pack;
mod plan;
mod pool;
mod portable;
mod reuse;
pub mod topology;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use arithmetic::Arithmetic;
pub use cpu::Cpu;
pub use isa::Isa;
pub use latent::LatentFormat;
pub use memory::{HugePages, Memory};
pub use reuse::reused;

/// A weight matrix `[rows (out), cols (in)]`: row-major as the checkpoint stores it, or packed.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The elements.
    pub data: WeightsRef<'a>,
}

/// The elements of a weight matrix.
#[derive(Clone, Copy, Debug)]
pub enum WeightsRef<'a> {
    /// `[rows, cols]`.
    F32(&'a [f32]),
    /// `[rows, cols]`, widened exactly.
    Bf16(&'a [half::bf16]),
    /// OCP FP8 e4m3 with one scale per 128 x 128 block (DeepSeek-V3 report, section 3.3.2); a weight is
    /// `f32(byte) * scale`, rounded once to f32.
    Fp8 {
        /// `[rows, cols]` e4m3 bytes; 0x7f and 0xff are NaN.
        data: &'a [u8],
        /// `[ceil(rows / 128), ceil(cols / 128)]`.
        scales: &'a [f32],
    },
    /// 8-bit integers as [`pack`] lays them, multiplied by rows that are quantised alike.
    Int8 {
        /// [`pack::bytes`] of them.
        data: &'a [u8],
        /// [`pack::scales`] of them.
        scales: &'a [half::bf16],
        /// Columns that share a scale.
        group: usize,
    },
    /// 4-bit integers as [`pack`] lays them, multiplied by rows that are quantised to 8 bits.
    Int4 {
        /// [`pack::bytes`] of them.
        data: &'a [u8],
        /// [`pack::scales`] of them.
        scales: &'a [half::bf16],
        /// Columns that share a scale.
        group: usize,
    },
}

/// A gated MLP (SwiGLU) and the rows of a call that go through it: `down(silu(gate x) * up x)`.
#[derive(Clone, Copy, Debug)]
pub struct Ffn<'a> {
    /// `[inner, hidden]`
    pub gate: MatrixRef<'a>,
    /// `[inner, hidden]`
    pub up: MatrixRef<'a>,
    /// `[out, inner]`
    pub down: MatrixRef<'a>,
    /// Which rows, in any order and any number of times; `None` for every one in order.
    pub rows: Option<&'a [u32]>,
}

/// Where the heads of a batch of rows lie: element `i` of head `h` of row `r` is at
/// `offset + r * row + h * head + i`.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one head to the next.
    pub head: usize,
    /// Elements before the first.
    pub offset: usize,
}

/// One query row of a latent attention call.
#[derive(Clone, Copy, Debug)]
pub struct QueryRow<'a> {
    /// Page table of the row's sequence: page `i` holds positions `i * page_tokens ..`.
    pub pages: &'a [u32],
    /// Keys this row sees: positions `0..visible`, its own included. With none the output is zero.
    pub visible: usize,
}

/// Multi-head latent attention in the absorbed form over a paged cache (DeepSeek-V2 report, section 2.1).
///
/// The cached row of position `t`, [`LatentFormat::row_bytes`] long, begins at byte
/// `pages[t / page_tokens] * page_stride + offset + (t % page_tokens) * row_bytes`.
#[derive(Debug)]
pub struct LatentAttention<'a> {
    /// Absorbed queries `[n, heads, width]`.
    pub q: &'a [f32],
    /// Weighted latents `[n, heads, value_width]`.
    pub out: &'a mut [f32],
    /// Attention heads.
    pub heads: usize,
    /// Elements of a cached row: `kv_lora_rank + rope`.
    pub width: usize,
    /// Values are the first `value_width` elements of a cached row: `kv_lora_rank`.
    pub value_width: usize,
    /// Multiplies each score.
    pub scale: f32,
    /// One entry per query row, `n` in all.
    pub rows: &'a [QueryRow<'a>],
    /// The whole cache.
    pub cache: &'a [u8],
    /// How rows are stored.
    pub format: LatentFormat,
    /// Tokens in a page.
    pub page_tokens: usize,
    /// Bytes from one page to the next.
    pub page_stride: usize,
    /// Bytes from the start of a page to this layer's rows.
    pub offset: usize,
}
