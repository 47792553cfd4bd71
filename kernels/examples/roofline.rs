//! What the machine allows and what the products make of it, measured in turns in one run.
//!
//! `cargo run --release -p guild-kernels --example roofline [threads] [isa] [part of a line's name]`. Weights are cold: 1 GiB is cycled through.

use std::{hint::black_box, time::Instant};

use guild_kernels::{Cpu, Isa, LatentAttention, LatentFormat, MatrixRef, QueryRow, WeightsRef};
use half::bf16;

const GIB: usize = 1 << 30;
const ROUNDS: usize = 7;
/// A common expert shape (Moonlight-16B-A3B gate and up projections) and a wide one (DeepSeek-V3 down projection).
const SHAPES: [(usize, usize); 2] = [(1408, 2048), (7168, 18432)];
const FMAS: usize = 40_000_000;

struct Line {
    name: String,
    /// Of the limit it is held against: bytes/s or flop/s.
    rates: Vec<f64>,
    limit: Limit,
}

#[derive(Clone, Copy, PartialEq)]
enum Limit {
    Bandwidth,
    Peak,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().and_then(|a| a.parse().ok()).unwrap_or(0);
    let isa = arguments.next().and_then(|a| {
        Isa::available()
            .into_iter()
            .find(|i| format!("{i:?}").eq_ignore_ascii_case(&a))
    });
    let cpu = isa
        .and_then(|isa| Cpu::with_isa(threads, isa))
        .unwrap_or_else(|| Cpu::new(threads));
    let only = arguments.next().unwrap_or_default();
    println!("{}", cpu.describe());

    let mut bytes = vec![0u8; GIB];
    cpu.par_chunks(&mut bytes, 1 << 20, |i, piece| {
        for (j, b) in piece.iter_mut().enumerate() {
            *b = (i * 31 + j * 7) as u8 & 0x3f;
        }
    });
    let mut lines: Vec<Line> = Vec::new();
    let mut cold = Cold { at: 0 };
    for _ in 0..ROUNDS {
        let mut turn = Turn {
            lines: &mut lines,
            next: 0,
            only: &only,
        };
        turn.rate("read, all threads", Limit::Bandwidth, || read(&cpu, &bytes));
        turn.rate("f32 FMA, all threads", Limit::Peak, || peak(&cpu));
        for format in ["bf16", "f32", "fp8"] {
            for (rows, cols) in SHAPES {
                turn.rate(
                    &format!("m=1 {format} [{rows}, {cols}]"),
                    Limit::Bandwidth,
                    || product(&cpu, &bytes, &mut cold, format, 1, rows, cols, GIB / 4).0,
                );
            }
        }
        for (format, m) in [
            ("bf16", 4),
            ("bf16", 16),
            ("bf16", 64),
            ("bf16", 512),
            ("f32", 512),
            ("fp8", 512),
        ] {
            for (rows, cols) in SHAPES {
                turn.rate(
                    &format!("m={m} {format} [{rows}, {cols}]"),
                    Limit::Peak,
                    || product(&cpu, &bytes, &mut cold, format, m, rows, cols, 1).1,
                );
            }
        }
        turn.rate("attention, 1 row, 16 heads, 4096 keys", Limit::Peak, || {
            attention(&cpu, 1, 4096)
        });
        turn.rate(
            "attention, 128 rows, 16 heads, 1024 keys",
            Limit::Peak,
            || attention(&cpu, 128, 1024),
        );
    }
    let limit = |which| {
        lines
            .iter()
            .find(|l| l.limit == which)
            .map_or(f64::NAN, |l| median(&l.rates))
    };
    let (bandwidth, peak) = (limit(Limit::Bandwidth), limit(Limit::Peak));
    println!(
        "{:<44} {:>12} {:>10} {:>10}",
        "", "median", "of limit", "best"
    );
    for line in &lines {
        let rate = median(&line.rates);
        let (shown, of) = match line.limit {
            Limit::Bandwidth => (format!("{:.1} GB/s", rate / 1e9), rate / bandwidth),
            Limit::Peak => (format!("{:.0} GFLOPS", rate / 1e9), rate / peak),
        };
        let best = line.rates.iter().copied().fold(0.0, f64::max) / 1e9;
        println!(
            "{:<44} {shown:>12} {:>9.0}% {best:>10.1}",
            line.name,
            of * 100.0
        );
    }
}

/// One round: each measure adds its rate to its own line.
struct Turn<'a> {
    lines: &'a mut Vec<Line>,
    next: usize,
    only: &'a str,
}

impl Turn<'_> {
    fn rate(&mut self, name: &str, limit: Limit, measure: impl FnOnce() -> f64) {
        // The two limits come first and are always measured.
        if self.next > 1 && !name.contains(self.only) {
            return;
        }
        if self.next == self.lines.len() {
            self.lines.push(Line {
                name: name.into(),
                rates: Vec::new(),
                limit,
            });
        }
        self.lines[self.next].rates.push(measure());
        self.next += 1;
    }
}

fn median(rates: &[f64]) -> f64 {
    let mut rates = rates.to_vec();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Bytes per second of adding up a buffer.
fn read(cpu: &Cpu, bytes: &[u8]) -> f64 {
    let pieces: Vec<&[u8]> = bytes.chunks(4 << 20).collect();
    let start = Instant::now();
    cpu.par_for(pieces.len(), |i| {
        let (words, _) = pieces[i].as_chunks::<64>();
        let mut sums = [0u64; 8];
        for words in words {
            for (sum, word) in sums.iter_mut().zip(words.as_chunks::<8>().0) {
                *sum = sum.wrapping_add(u64::from_le_bytes(*word));
            }
        }
        black_box(sums);
    });
    bytes.len() as f64 / start.elapsed().as_secs_f64()
}

/// Flop per second of independent FMA chains in registers.
fn peak(cpu: &Cpu) -> f64 {
    let pieces = cpu.threads() * 4;
    let start = Instant::now();
    cpu.par_for(pieces, |_| {
        #[cfg(target_arch = "x86_64")]
        match cpu.isa() {
            // SAFETY: the handle exists on this instruction set only where the machine has it.
            Isa::Amx | Isa::Avx512Vnni | Isa::Avx512 => unsafe { x86::fma512(FMAS / 16) },
            // SAFETY: as above.
            Isa::AvxVnni | Isa::Avx2 => unsafe { x86::fma256(FMAS / 8) },
            _ => {}
        }
    });
    if matches!(cpu.isa(), Isa::NeonDot | Isa::Neon | Isa::Portable) {
        return f64::NAN;
    }
    (2 * FMAS * pieces) as f64 / start.elapsed().as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    const CHAINS: usize = 12;

    /// # Safety
    /// The machine has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(crate) unsafe fn fma512(n: usize) {
        let mut acc = [_mm512_set1_ps(1.0); CHAINS];
        let (a, b) = (
            black_box(_mm512_set1_ps(0.5)),
            black_box(_mm512_set1_ps(0.25)),
        );
        for _ in 0..n / CHAINS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    /// # Safety
    /// The machine has FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(crate) unsafe fn fma256(n: usize) {
        let mut acc = [_mm256_set1_ps(1.0); CHAINS];
        let (a, b) = (
            black_box(_mm256_set1_ps(0.5)),
            black_box(_mm256_set1_ps(0.25)),
        );
        for _ in 0..n / CHAINS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}

/// Walks through the weights so that none is met again soon.
struct Cold {
    at: usize,
}

impl Cold {
    fn take<'a>(&mut self, bytes: &'a [u8], n: usize) -> &'a [u8] {
        if self.at + n > bytes.len() {
            self.at = 0;
        }
        let taken = &bytes[self.at..self.at + n];
        self.at += n.next_multiple_of(4096);
        taken
    }
}

/// Weight bytes and flop per second over matrices of at least `volume` bytes in all.
#[allow(clippy::too_many_arguments, reason = "a measure, not an interface")]
fn product(
    cpu: &Cpu,
    bytes: &[u8],
    cold: &mut Cold,
    format: &str,
    m: usize,
    rows: usize,
    cols: usize,
    volume: usize,
) -> (f64, f64) {
    let size = match format {
        "f32" => 4,
        "bf16" => 2,
        _ => 1,
    };
    let x = vec![0.5f32; m * cols];
    let mut out = vec![0.0f32; m * rows];
    let scales = vec![0.25f32; rows.div_ceil(128) * cols.div_ceil(128)];
    let each = rows * cols * size;
    let times = volume.div_ceil(each);
    let start = Instant::now();
    for _ in 0..times {
        let taken = cold.take(bytes, each);
        // SAFETY: every bit pattern is an f32 and a bf16, and `align_to` cuts the slice to their alignment.
        let data = unsafe {
            match format {
                "f32" => WeightsRef::F32(taken.align_to::<f32>().1),
                "bf16" => WeightsRef::Bf16(taken.align_to::<bf16>().1),
                _ => WeightsRef::Fp8 {
                    data: taken,
                    scales: &scales,
                },
            }
        };
        cpu.matmul(&mut out, &x, MatrixRef { rows, cols, data });
        black_box(&mut out);
    }
    let seconds = start.elapsed().as_secs_f64();
    (
        (each * times) as f64 / seconds,
        (2 * m * rows * cols * times) as f64 / seconds,
    )
}

/// Flop per second of latent attention at the widths of DeepSeek-V3.
fn attention(cpu: &Cpu, n: usize, keys: usize) -> f64 {
    let (heads, width, value_width, page_tokens) = (16, 576, 512, 64);
    let format = LatentFormat::Bf16;
    let cache = vec![0x11; keys * format.row_bytes(width, value_width)];
    let pages: Vec<u32> = (0..keys.div_ceil(page_tokens) as u32).collect();
    let rows = vec![
        QueryRow {
            pages: &pages,
            visible: keys
        };
        n
    ];
    let q = vec![0.1f32; n * heads * width];
    let mut out = vec![0.0f32; n * heads * value_width];
    let start = Instant::now();
    cpu.attend_latent(LatentAttention {
        q: &q,
        out: &mut out,
        heads,
        width,
        value_width,
        scale: 0.1,
        rows: &rows,
        cache: &cache,
        format,
        page_tokens,
        page_stride: page_tokens * format.row_bytes(width, value_width),
        offset: 0,
    });
    black_box(&mut out);
    (2 * n * heads * keys * (width + value_width)) as f64 / start.elapsed().as_secs_f64()
}
