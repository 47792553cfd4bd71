//! The operations as the rest of the project sees them: shapes are checked here, once, and everything below relies on
//! it.
//!
//! Secret: none; it hands to `plan` what is worth cutting and to the leaf what is not.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    Arithmetic, Ffn, HeadLayout, Isa, LatentAttention, MatrixRef, WeightsRef,
    generic::{
        matmul::{Input, Output},
        rows::{Add, Both, Each, Fma, Map2, MaxAndSum, RmsNorm, Sigmoid, SiluMul, Softmax},
        weights::BLOCK,
    },
    isa::Choice,
    pack::{self, Int},
    plan,
    pool::Pool,
};

/// Elements of one task of an elementwise operation.
const PIECE: usize = 8192;
/// Weight of one exponential in multiplications, for the decision whether threads pay.
const EXP_MACS: usize = 16;

/// The chosen instruction set and its threads. Cheap to clone.
///
/// The rule behind every result: a dot product or sum over `k` has 16 f32 lanes; lane `j` takes the elements
/// `k ≡ j (mod 16)` in ascending order, by fused multiply-add (or addition) from +0.0; a ragged end counts as zeros; then
/// `l[i] + l[i + 8]`, `+ 4`, `+ 2`, `+ 1`. A result row depends on its own input row alone. NaN results are NaN
/// everywhere, but which NaN is not defined.
///
/// Weights of 8 and 4 bits ([`crate::pack`]) have a rule of their own: a row of x is quantised to 8 bits in the groups of
/// the weights (`s = max |x| / 127`, the nearest integer of `x / s`), a group's dot product is an exact integer, and an
/// output is the chain `fma(dot, weight scale * s, acc)` over the groups in ascending order from +0.0. A group of x with a
/// number that is not finite makes its row NaN.
///
/// Weights of bf16 and FP8 may be multiplied in pairs of bf16 instead ([`Arithmetic`]): a row of x is rounded to bf16
/// once, to the nearest, halves to even; products are added in f32 as the instruction does, each step rounded to the
/// nearest, subnormal numbers counting as zeros. By `vdpbf16ps` lane `j` of 16 takes, of each 32 columns, `2 j + 1` and then
/// `2 j`, and the tree above ends; by `tdpbf16ps` 32 columns give the sum of two chains, of even and of odd columns, which
/// is added to the output's. FP8 weights go in without their scale: what 128 columns give from +0.0 on is the `part` of
/// `fma(part, scale, acc)`.
///
/// Shapes are the caller's duty: a wrong one panics with a message and never touches foreign memory.
#[derive(Clone)]
pub struct Cpu {
    inner: Arc<Inner>,
}

struct Inner {
    isa: Isa,
    arithmetic: Arithmetic,
    choice: Choice,
    pool: Pool,
    clock: Clock,
}

/// Time that callers have spent in products and attention, as long as somebody wants to know it.
#[derive(Default)]
struct Clock {
    runs: AtomicBool,
    nanos: AtomicU64,
}

impl Cpu {
    /// Picks the best instruction set of this machine. `threads = 0` means one per physical core.
    ///
    /// An operation runs on the calling thread and on `threads - 1` others, which all callers share.
    pub fn new(threads: usize) -> Cpu {
        let best = Isa::available()
            .into_iter()
            .find_map(|isa| Cpu::with_isa(threads, isa));
        best.unwrap_or_else(|| unreachable!("the portable leaf runs everywhere"))
    }

    /// The same on a given instruction set; `None` when this machine lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Option<Cpu> {
        Cpu::with(threads, isa, Arithmetic::Fma).ok()
    }

    /// The same with a given rule for bf16 and FP8 weights.
    ///
    /// # Errors
    /// Why this machine lacks the instruction set, and those that it has. A rule is never refused:
    /// [`Arithmetic::emulated`] tells where it is slow.
    pub fn with(threads: usize, isa: Isa, arithmetic: Arithmetic) -> Result<Cpu, String> {
        let choice = Choice::new(isa, arithmetic).map_err(|why| {
            let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
            format!("{isa}: {why}; this machine has {}", names.join(", "))
        })?;
        Ok(Cpu {
            inner: Arc::new(Inner {
                isa,
                arithmetic,
                choice,
                pool: Pool::new(threads),
                clock: Clock::default(),
            }),
        })
    }

    /// The proof that it can be used.
    pub(crate) fn choice(&self) -> Choice {
        self.inner.choice
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.inner.isa
    }

    /// The rule for bf16 and FP8 weights.
    pub fn arithmetic(&self) -> Arithmetic {
        self.inner.arithmetic
    }

    /// Threads that take part in one operation, the caller's included.
    pub fn threads(&self) -> usize {
        self.inner.pool.threads()
    }

    /// Keeps every thread of its own on a physical core from now on, as far as there are cores; the first is left to the
    /// threads that call. Says how many the system has so kept.
    pub fn pin_threads(&self) -> usize {
        self.inner.pool.pin()
    }

    /// Names the arithmetic rule. Nodes of one class give the same bits.
    pub fn numerics_class(&self) -> &'static str {
        self.arithmetic().numerics_class()
    }

    /// What was chosen and why, for a log line.
    pub fn describe(&self) -> String {
        let slow = match self.arithmetic().emulated(self.isa()) {
            Some(why) => format!(", its dot products by plain Rust and slow: {why}"),
            None => String::new(),
        };
        let pinned = match self.inner.pool.pinned() {
            0 => String::new(),
            n => format!(" ({n} kept on a core each)"),
        };
        format!(
            "{:?} (this machine has {:?}), {} threads{pinned}, numerics {}{slow}",
            self.isa(),
            Isa::available(),
            self.threads(),
            self.numerics_class()
        )
    }

    /// From now on counts the time that callers spend in [`Cpu::matmul`], [`Cpu::matmul_heads`], [`Cpu::ffn`] and
    /// [`Cpu::attend_latent`]: two looks at a clock for each call.
    pub fn count_time(&self) {
        self.inner.clock.runs.store(true, Ordering::Relaxed);
    }

    /// What has been counted until now, of all callers together.
    pub fn counted_time(&self) -> Duration {
        Duration::from_nanos(self.inner.clock.nanos.load(Ordering::Relaxed))
    }

    fn timed(&self, run: impl FnOnce()) {
        let clock = &self.inner.clock;
        if !clock.runs.load(Ordering::Relaxed) {
            return run();
        }
        let begun = Instant::now();
        run();
        let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        clock.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Runs `f(0) .. f(n - 1)` on the threads, in any order, and returns when all are done.
    pub fn par_for(&self, n: usize, f: impl Fn(usize) + Sync) {
        self.inner.pool.for_each(n, f);
    }

    /// Splits `data` into pieces of `chunk` elements, the last perhaps shorter, and runs `f(index, piece)` on the
    /// threads.
    pub fn par_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        self.inner.pool.for_each_chunk(data, chunk, f);
    }

    /// `out[m, rows] = x[m, cols] wᵀ`; `m` follows from `x`.
    ///
    /// # Panics
    /// When `x`, `out` or the elements of `w` do not have the shapes named.
    pub fn matmul(&self, out: &mut [f32], x: &[f32], w: MatrixRef<'_>) {
        check_weights(&w);
        let m = x.len().checked_div(w.cols).unwrap_or(0);
        assert_eq!(
            x.len(),
            m * w.cols,
            "matmul: x is not whole rows of {} columns",
            w.cols
        );
        assert_eq!(
            Some(out.len()),
            m.checked_mul(w.rows),
            "matmul: out must be [{m}, {}]",
            w.rows
        );
        let out = Output {
            data: out.as_mut_ptr(),
            stride: w.rows,
        };
        let x = Input {
            data: x,
            index: None,
            stride: w.cols,
            m,
            cols: w.cols,
        };
        // SAFETY: `out` is exclusively ours and was checked to be `[m, rows]`; so were `x` and `w`.
        self.timed(|| unsafe {
            plan::matmul(self.inner.choice, Some(&self.inner.pool), out, x, w)
        });
    }

    /// Several gated MLPs at once, such as the experts that a batch of rows goes to: row `i` of `out` `[pairs, down.rows]`
    /// is `down(silu(gate x) * up x)` of the `i`-th pair, counting the rows of the first MLP, then those of the second, and
    /// so on; `x` is `[n, hidden]`. Gives the bits that [`Cpu::matmul`] and [`Cpu::silu_mul`] give for one row alone.
    ///
    /// # Panics
    /// When shapes disagree or a row lies outside `x`.
    pub fn ffn(&self, out: &mut [f32], x: &[f32], experts: &[Ffn<'_>]) {
        let Some(first) = experts.first() else {
            return;
        };
        let (hidden, width) = (first.gate.cols, first.down.rows);
        let n = x.len().checked_div(hidden).unwrap_or(0);
        assert_eq!(
            x.len(),
            n * hidden,
            "ffn: x is not whole rows of {hidden} columns"
        );
        let mut pairs = 0;
        for expert in experts {
            let Ffn {
                gate,
                up,
                down,
                rows,
            } = expert;
            for w in [gate, up, down] {
                check_weights(w);
            }
            let shape = (gate.cols, up.cols, up.rows, down.cols, down.rows);
            assert_eq!(
                shape,
                (hidden, hidden, gate.rows, gate.rows, width),
                "ffn: matrices that do not fit each other"
            );
            let odd = rows.and_then(|rows| rows.iter().find(|&&row| row as usize >= n));
            assert!(odd.is_none(), "ffn: row {odd:?} of {n}");
            pairs += rows.map_or(n, <[u32]>::len);
        }
        assert_eq!(
            Some(out.len()),
            pairs.checked_mul(width),
            "ffn: out must be [{pairs}, {width}]"
        );
        if out.is_empty() {
            return;
        }
        let out = Output {
            data: out.as_mut_ptr(),
            stride: width,
        };
        // SAFETY: `out` is exclusively ours and was checked to be `[pairs, width]`; so were the weights.
        self.timed(|| unsafe { plan::ffn(self.inner.choice, &self.inner.pool, out, x, experts) });
    }

    /// One product per head: `out[r, h] = x[r, h] w[h]ᵀ` for `m` rows that hold their heads side by side, as the absorbed
    /// projections of latent attention do. All of `w` have one shape. Elements of `out` outside the heads stay.
    ///
    /// # Panics
    /// When a head's part lies outside its slice, or parts of `out` overlap.
    pub fn matmul_heads(
        &self,
        out: &mut [f32],
        out_at: HeadLayout,
        x: &[f32],
        x_at: HeadLayout,
        m: usize,
        w: &[MatrixRef<'_>],
    ) {
        let Some(first) = w.first().filter(|_| m > 0) else {
            return;
        };
        let (rows, cols) = (first.rows, first.cols);
        for w in w {
            check_weights(w);
            assert_eq!(
                (w.rows, w.cols),
                (rows, cols),
                "matmul_heads: heads of different shapes"
            );
        }
        check_heads("out", out.len(), out_at, m, w.len(), rows);
        check_heads("x", x.len(), x_at, m, w.len(), cols);
        // Heads inside a row, or rows inside a head.
        let apart = out_at.head >= rows && out_at.row >= (w.len() - 1) * out_at.head + rows
            || out_at.row >= rows && out_at.head >= (m - 1) * out_at.row + rows;
        assert!(apart, "matmul_heads: parts of out overlap");
        let out = Output {
            data: out.as_mut_ptr(),
            stride: out_at.row,
        };
        let heads = plan::Heads {
            out,
            out_at,
            x,
            x_at,
            m,
            w,
        };
        // SAFETY: `out` is exclusively ours; the checks above keep every part inside and apart from the others.
        self.timed(|| unsafe { plan::matmul_heads(self.inner.choice, &self.inner.pool, heads) });
    }

    /// Root-mean-square norm of each row of `weight.len()`: `x * (1 / sqrt(sum(x²) / n + eps)) * weight`, in this order.
    ///
    /// # Panics
    /// When `x` is not whole rows or `out` is not as long as `x`.
    pub fn rms_norm(&self, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
        let n = weight.len();
        assert_eq!(out.len(), x.len(), "rms_norm: out and x differ in length");
        assert!(
            x.is_empty() || n > 0 && x.len().is_multiple_of(n),
            "rms_norm: x is not whole rows of {n}"
        );
        if x.is_empty() {
            return;
        }
        let piece = (PIECE / n).max(1) * n;
        self.pieces(out, piece, 2 * x.len(), |i, out| {
            let x = &x[i * piece..][..out.len()];
            // SAFETY: asks for nothing besides the instruction set.
            unsafe {
                self.inner.choice.run(RmsNorm {
                    out,
                    x,
                    weight,
                    eps,
                })
            };
        });
    }

    /// `gate = silu(gate) * up`, with `silu(x) = x / (1 + exp(-x))`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        self.both("silu_mul", gate, up, SiluMul, EXP_MACS);
    }

    /// `acc += x`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add(&self, acc: &mut [f32], x: &[f32]) {
        self.both("add", acc, x, Add, 1);
    }

    /// `acc = fma(w, x, acc)`, each element.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn fma(&self, acc: &mut [f32], w: f32, x: &[f32]) {
        self.both("fma", acc, x, Fma(w), 1);
    }

    /// `1 / (1 + exp(-x))`, each element.
    pub fn sigmoid(&self, x: &mut [f32]) {
        let macs = x.len() * EXP_MACS;
        self.pieces(x, PIECE, macs, |_, x| {
            // SAFETY: asks for nothing besides the instruction set.
            unsafe { self.inner.choice.run(Each(x, Sigmoid)) };
        });
    }

    /// `exp`, each element: within 2 ulp, the same bits everywhere.
    pub fn exp(&self, x: &mut [f32]) {
        let macs = x.len() * EXP_MACS;
        self.pieces(x, PIECE, macs, |_, x| {
            // SAFETY: asks for nothing besides the instruction set.
            unsafe { self.inner.choice.run(Each(x, crate::generic::rows::Exp)) };
        });
    }

    /// Softmax of one row: `exp(x - max)` times the reciprocal of their sum. A row whose largest element is infinite
    /// gives NaN.
    pub fn softmax(&self, x: &mut [f32]) {
        // SAFETY: asks for nothing besides the instruction set.
        unsafe { self.inner.choice.run(Softmax(x)) };
    }

    /// `max + ln(sum(exp(x - max)))` of one row; -inf for a row without any finite element, NaN when one is NaN.
    pub fn log_sum_exp(&self, x: &[f32]) -> f32 {
        // SAFETY: asks for nothing besides the instruction set.
        let (max, sum) = unsafe { self.inner.choice.run(MaxAndSum(x)) };
        if max.is_infinite() && !x.iter().any(|x| x.is_nan()) {
            return max;
        }
        max + libm::log(f64::from(sum)) as f32
    }

    /// Absorbed latent attention, each query row alone: scores `dot(q, key) * scale`, their softmax over all visible keys,
    /// and the sum of values it weighs, block by block of 64 positions in spans of 512 that are merged in ascending order
    /// (the rule is written out in `generic/attention`). Keys are widened exactly.
    ///
    /// # Panics
    /// When shapes disagree or a page of a visible key lies outside the cache.
    pub fn attend_latent(&self, job: LatentAttention<'_>) {
        let (n, heads) = (job.rows.len(), job.heads);
        assert_eq!(
            job.q.len(),
            n * heads * job.width,
            "attend_latent: q must be [{n}, {heads}, {}]",
            job.width
        );
        assert_eq!(
            job.out.len(),
            n * heads * job.value_width,
            "attend_latent: out must be [{n}, {heads}, {}]",
            job.value_width
        );
        assert!(
            job.value_width <= job.width,
            "attend_latent: values are wider than cached rows"
        );
        assert!(job.page_tokens > 0, "attend_latent: pages of no token");
        for row in job.rows {
            let pages = row.visible.div_ceil(job.page_tokens);
            assert!(
                pages <= row.pages.len(),
                "attend_latent: {} visible keys need {pages} pages, the table has {}",
                row.visible,
                row.pages.len()
            );
        }
        if !job.out.is_empty() {
            self.timed(|| plan::attend(self.inner.choice, &self.inner.pool, job));
        }
    }

    fn both<M: Map2 + Copy + Sync>(
        &self,
        name: &str,
        a: &mut [f32],
        b: &[f32],
        map: M,
        macs: usize,
    ) {
        assert_eq!(a.len(), b.len(), "{name}: lengths differ");
        let macs = macs * a.len();
        self.pieces(a, PIECE, macs, |i, a| {
            let b = &b[i * PIECE..][..a.len()];
            // SAFETY: asks for nothing besides the instruction set.
            unsafe { self.inner.choice.run(Both(a, b, map)) };
        });
    }

    /// Runs `f` on pieces of `data`, on the threads when the work is worth it.
    fn pieces(
        &self,
        data: &mut [f32],
        piece: usize,
        macs: usize,
        f: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        if plan::is_small(size_of_val(data), macs) {
            data.chunks_mut(piece)
                .enumerate()
                .for_each(|(i, piece)| f(i, piece));
        } else {
            self.inner.pool.for_each_chunk(data, piece, f);
        }
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({})", self.describe())
    }
}

fn check_weights(w: &MatrixRef<'_>) {
    let (rows, cols) = (w.rows, w.cols);
    let len = match w.data {
        WeightsRef::F32(data) => data.len(),
        WeightsRef::Bf16(data) => data.len(),
        WeightsRef::Fp8 { data, scales } => {
            let (r, c) = (rows.div_ceil(BLOCK), cols.div_ceil(BLOCK));
            assert_eq!(scales.len(), r * c, "weight scales must be [{r}, {c}]");
            data.len()
        }
        WeightsRef::Int8 {
            data,
            scales,
            group,
        } => {
            return check_packed(Int::Int8, rows, cols, data, scales, group);
        }
        WeightsRef::Int4 {
            data,
            scales,
            group,
        } => {
            return check_packed(Int::Int4, rows, cols, data, scales, group);
        }
    };
    assert_eq!(
        Some(len),
        rows.checked_mul(cols),
        "weights must be [{rows}, {cols}]"
    );
}

fn check_packed(
    int: Int,
    rows: usize,
    cols: usize,
    data: &[u8],
    scales: &[half::bf16],
    group: usize,
) {
    assert_eq!(
        data.len(),
        pack::bytes(int, rows, cols, group),
        "weights must be [{rows}, {cols}] packed in groups of {group}"
    );
    assert_eq!(
        scales.len(),
        pack::scales(rows, cols, group),
        "weight scales must be those of [{rows}, {cols}] in groups of {group}"
    );
}

/// Panics unless `width` elements of every head of every row lie in a slice of `len`.
fn check_heads(name: &str, len: usize, at: HeadLayout, m: usize, heads: usize, width: usize) {
    let end = (m - 1)
        .checked_mul(at.row)
        .and_then(|end| end.checked_add((heads - 1).checked_mul(at.head)?))
        .and_then(|end| end.checked_add(at.offset)?.checked_add(width));
    assert!(
        end.is_some_and(|end| end <= len),
        "matmul_heads: {name} is too short for {m} rows of {heads} heads"
    );
}
