//! Row-invariant CPU arithmetic: the only room of the project with `unsafe` code.
//!
//! Secret: the instruction set. Every operation is defined by one written rule (see the methods of [`Cpu`]) and gives
//! the same bits on every instruction set, for every thread count, tile and number of rows in the call. It may use the
//! host's SIMD and threads; it must not know what a model, a token or a network is.

pub mod file;
mod naive;

use std::sync::{Arc, Mutex};

/// An instruction set the kernels have a leaf for. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// AArch64 Advanced SIMD.
    Neon,
    /// Plain Rust: any machine.
    Portable,
}

impl Isa {
    /// What this machine can run, best first; never empty.
    pub fn available() -> Vec<Isa> {
        vec![Isa::Portable]
    }
}

/// A weight matrix as the checkpoint stores it: row-major `[rows (out), cols (in)]`.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The elements.
    pub data: WeightsRef<'a>,
}

/// The elements of a weight matrix, as stored.
#[derive(Clone, Copy, Debug)]
pub enum WeightsRef<'a> {
    /// `[rows, cols]`.
    F32(&'a [f32]),
    /// `[rows, cols]`, widened exactly.
    Bf16(&'a [half::bf16]),
    /// OCP FP8 e4m3 with one scale per 128 x 128 block; a weight is `f32(byte) * scale`, rounded once to f32.
    Fp8 {
        /// `[rows, cols]` e4m3 bytes.
        data: &'a [u8],
        /// `[ceil(rows / 128), ceil(cols / 128)]`.
        scales: &'a [f32],
    },
}

/// One query row of a latent attention call.
#[derive(Clone, Copy, Debug)]
pub struct QueryRow<'a> {
    /// Page table of the row's sequence: page `i` holds positions `i * page_tokens ..`.
    pub pages: &'a [u32],
    /// Keys this row sees: positions `0..visible`, its own included.
    pub visible: usize,
}

/// Multi-head latent attention in the absorbed form over a paged cache (DeepSeek-V2 report, section 2.1).
///
/// Element `d` of the cached row at position `t` lies at
/// `cache[pages[t / page_tokens] * page_stride + offset + (t % page_tokens) * width + d]`.
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
    pub cache: &'a [f32],
    /// Tokens in a page.
    pub page_tokens: usize,
    /// Elements from one page to the next.
    pub page_stride: usize,
    /// Elements from the start of a page to this layer's rows.
    pub offset: usize,
}

/// The chosen instruction set and its threads. Cheap to clone.
#[derive(Clone)]
pub struct Cpu {
    inner: Arc<Inner>,
}

struct Inner {
    isa: Isa,
    threads: usize,
}

impl Cpu {
    /// Picks the best instruction set of this machine. `threads = 0` means one per physical core.
    pub fn new(threads: usize) -> Cpu {
        let isa = Isa::available()[0];
        Cpu { inner: Arc::new(Inner { isa, threads: threads.max(1) }) }
    }

    /// The same on a given instruction set; `None` when this machine lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Option<Cpu> {
        Isa::available().contains(&isa).then(|| Cpu { inner: Arc::new(Inner { isa, threads: threads.max(1) }) })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.inner.isa
    }

    /// Threads that take part in one operation, the caller's included.
    pub fn threads(&self) -> usize {
        self.inner.threads
    }

    /// Names the arithmetic rule. Nodes of one class give the same bits.
    pub fn numerics_class(&self) -> &'static str {
        "f32-fma16-v1"
    }

    /// What was chosen and why, for a log line.
    pub fn describe(&self) -> String {
        format!("{:?}, {} threads", self.isa(), self.threads())
    }

    /// Runs `f(0) .. f(n - 1)` on the pool, in any order.
    pub fn par_for(&self, n: usize, f: impl Fn(usize) + Sync) {
        (0..n).for_each(f);
    }

    /// Splits `data` into pieces of `chunk` elements (the last may be shorter) and runs `f(index, piece)` on the pool.
    pub fn par_chunks<T: Send>(&self, data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        let pieces = Mutex::new(data.chunks_mut(chunk.max(1)).enumerate());
        while let Some((i, piece)) = pieces.lock().map_or(None, |mut p| p.next()) {
            f(i, piece);
        }
    }

    /// `out[m, rows] = x[m, cols] wᵀ`; `m` follows from `x`.
    pub fn matmul(&self, out: &mut [f32], x: &[f32], w: MatrixRef<'_>) {
        let m = x.len().checked_div(w.cols).unwrap_or(0);
        assert_eq!(x.len(), m * w.cols, "matmul: x is not whole rows of {} columns", w.cols);
        assert_eq!(out.len(), m * w.rows, "matmul: out must be [{m}, {}]", w.rows);
        for (x, out) in x.chunks_exact(w.cols).zip(out.chunks_exact_mut(w.rows)) {
            for (r, o) in out.iter_mut().enumerate() {
                *o = naive::dot(|k| x[k], |k| naive::weight(&w, r, k), w.cols);
            }
        }
    }

    /// Root-mean-square norm of each row of `weight.len()`: `x / sqrt(mean(x²) + eps) * weight`.
    pub fn rms_norm(&self, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        let n = weight.len();
        for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
            let mean = naive::dot(|k| x[k], |k| x[k], n) / n as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * scale * w;
            }
        }
    }

    /// `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + naive::exp(-*g)) * u;
        }
    }

    /// Softmax of one row.
    pub fn softmax(&self, x: &mut [f32]) {
        naive::softmax(x);
    }

    /// `1 / (1 + exp(-x))`, each element.
    pub fn sigmoid(&self, x: &mut [f32]) {
        for x in x {
            *x = 1.0 / (1.0 + naive::exp(-*x));
        }
    }

    /// `ln(sum(exp(x)))` of one row.
    pub fn log_sum_exp(&self, x: &[f32]) -> f32 {
        let max = naive::max(x);
        let sum = naive::sum_exp(&mut x.to_vec(), max);
        max + libm::log(f64::from(sum)) as f32
    }

    /// `acc += x`.
    pub fn add(&self, acc: &mut [f32], x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "add: lengths differ");
        for (a, x) in acc.iter_mut().zip(x) {
            *a += x;
        }
    }

    /// `acc = fma(w, x, acc)`, each element.
    pub fn fma(&self, acc: &mut [f32], w: f32, x: &[f32]) {
        assert_eq!(acc.len(), x.len(), "fma: lengths differ");
        for (a, x) in acc.iter_mut().zip(x) {
            *a = w.mul_add(*x, *a);
        }
    }

    /// Absorbed latent attention, each query row alone.
    pub fn attend_latent(&self, job: LatentAttention<'_>) {
        naive::attend(job);
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
