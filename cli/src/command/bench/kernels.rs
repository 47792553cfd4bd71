//! `guild bench kernels`: the kernels against what this machine allows in the same minute.
//!
//! Secret: which cases, and that all are measured in turns, so that what disturbs one disturbs all. A case knows the bytes it
//! must read and the operations it must do; its floor is the slower of both at the rates measured in the same rounds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use guild_kernels::floor::{self, Unit};
use guild_kernels::pack::{self, Int};
use guild_kernels::{
    Arithmetic, Cpu, Ffn, LatentAttention, LatentFormat, MatrixRef, Memory, QueryRow, WeightsRef,
};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::index;

use super::figures::{self, Figure, median};
use crate::args::BenchKernels;
use crate::command::log_tool;
use crate::failure::Failure;

/// A case is run again until it has taken so long in a round.
const AT_LEAST: Duration = Duration::from_millis(30);
/// Share of the available memory that weights may take.
const SHARE: u64 = 2;
/// Read in one measure of bandwidth: beyond any cache.
const READ: usize = 512 << 20;
/// Columns that share a scale.
const GROUP: usize = pack::GROUP;

/// Shapes of one run.
struct Shapes {
    hidden: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
    hot: usize,
    hot_rows: usize,
    tokens: &'static [usize],
    contexts: &'static [usize],
    heads: &'static [usize],
    batches: &'static [usize],
}

/// DeepSeek-V3's experts and attention.
const FULL: Shapes = Shapes {
    hidden: 7168,
    inner: 2048,
    experts: 64,
    top_k: 8,
    hot: 2048,
    hot_rows: 256,
    tokens: &[1, 8, 64, 512],
    contexts: &[1024, 8192, 32768],
    heads: &[16, 128],
    batches: &[1, 16],
};
/// Small enough to try the command out.
const QUICK: Shapes = Shapes {
    hidden: 256,
    inner: 128,
    experts: 8,
    top_k: 2,
    hot: 128,
    hot_rows: 16,
    tokens: &[1, 8],
    contexts: &[100],
    heads: &[16],
    batches: &[1, 2],
};

/// What one call of a case must do.
#[derive(Clone, Copy)]
struct Work {
    bytes: f64,
    ops: f64,
    unit: Unit,
    /// What is counted, in `unit_of_value`.
    items: f64,
}

struct Case<'a> {
    name: String,
    format: &'static str,
    m: usize,
    unit: &'static str,
    alone: bool,
    /// One call, and what it did.
    call: Box<dyn FnMut() -> Work + 'a>,
    rates: Vec<f64>,
    /// Of the last call: calls of a case differ by the experts they hit, and little.
    work: Option<Work>,
}

/// Rates of the machine, round by round.
#[derive(Default)]
struct Machine {
    read: Vec<f64>,
    fma: Vec<f64>,
    bf16: Vec<f64>,
    int8: Vec<f64>,
}

impl Machine {
    fn measure(&mut self, cpu: &Cpu, memory: &[u8]) {
        self.read.push(floor::read(cpu, memory));
        for (unit, rates) in [
            (Unit::Fma, &mut self.fma),
            (Unit::Bf16, &mut self.bf16),
            (Unit::Int8, &mut self.int8),
        ] {
            rates.extend(floor::peak(cpu, unit));
        }
    }

    /// Operations per second of a unit; where a machine lacks it, its f32 multipliers do the work.
    fn peak(&self, unit: Unit) -> f64 {
        let of = match unit {
            Unit::Int8 if !self.int8.is_empty() => &self.int8,
            Unit::Bf16 if !self.bf16.is_empty() => &self.bf16,
            _ => &self.fma,
        };
        median(of)
    }

    /// Seconds that `work` takes at the least, and what binds it.
    fn floor(&self, work: Work) -> (f64, &'static str) {
        let (read, ops) = (
            work.bytes / median(&self.read),
            work.ops / self.peak(work.unit),
        );
        if read > ops {
            return (read, "read");
        }
        let unit = match work.unit {
            Unit::Fma => "fma",
            Unit::Bf16 => "bf16 dot",
            Unit::Int8 => "int8 dot",
        };
        (ops, unit)
    }
}

pub(super) fn run(args: &BenchKernels) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let both = |arithmetic| -> Result<[Cpu; 2], Failure> {
        let with = |threads| args.instructions.cpu(threads, arithmetic);
        let all = with(args.threads)?;
        args.host.arrange(&all);
        Ok([all, with(1)?])
    };
    let [cpu, one] = both(Arithmetic::Fma)?;
    let dots = Arithmetic::fastest_dot(cpu.isa())
        .ok()
        .map(both)
        .transpose()?;
    let shapes = if args.quick { &QUICK } else { &FULL };
    let rounds = if args.quick { 1 } else { args.rounds as usize };

    let (experts, bytes) = affordable(shapes);
    if experts < shapes.experts {
        tracing::warn!(
            "{experts} experts instead of {}: not enough memory",
            shapes.experts
        );
    }
    let memory = figures::filled(&cpu, bytes)?;
    let read = &memory[..READ.min(memory.len())];
    let longest = shapes.contexts.iter().max().copied().unwrap_or(0);
    let batch = shapes.batches.iter().max().copied().unwrap_or(1);
    let rows = batch * longest.next_multiple_of(PAGE_TOKENS);
    let cache = figures::filled(
        &cpu,
        rows * LatentFormat::Bf16.row_bytes(WIDTH, VALUE_WIDTH),
    )?;

    let mut cases = Vec::new();
    for (cpu, alone) in [(&one, true), (&cpu, false)] {
        for format in FORMATS {
            cases.push(gemm(cpu, alone, &memory, format, shapes.hot_rows, shapes));
        }
    }
    for m in FEW {
        cases.push(gemm(&one, true, &memory, Format::Bf16, m, shapes));
    }
    if let Some([cpu, one]) = &dots {
        for format in DOTS {
            for m in FEW {
                cases.push(gemm(one, true, &memory, format, m, shapes));
            }
            for (cpu, alone) in [(one, true), (cpu, false)] {
                cases.push(gemm(cpu, alone, &memory, format, shapes.hot_rows, shapes));
            }
            for m in [1, 8] {
                cases.push(ffn(cpu, &memory, format, m, shapes));
            }
        }
    }
    for format in [Format::Int4, Format::Int8, Format::Fp8, Format::Bf16] {
        for m in [1, 8] {
            cases.push(ffn(&cpu, &memory, format, m, shapes));
        }
    }
    for format in [Format::Int4, Format::Int8] {
        for &tokens in shapes.tokens {
            cases.push(moe(&cpu, &memory, format, tokens, experts, shapes));
        }
    }
    for format in [LatentFormat::Bf16, LatentFormat::Fp8] {
        for &heads in shapes.heads {
            for &context in shapes.contexts {
                for &batch in shapes.batches {
                    cases.push(attention(&cpu, &cache, format, heads, context, batch));
                }
            }
        }
    }
    if let Some(only) = &args.only {
        cases.retain(|case| case.name.contains(only) || case.format == only);
    }

    let (mut all, mut single) = (Machine::default(), Machine::default());
    // The first round warms up and does not count.
    for round in 0..=rounds {
        all.measure(&cpu, read);
        single.measure(&one, read);
        for case in &mut cases {
            let rate = case.rate();
            if round > 0 {
                case.rates.push(rate);
            }
        }
    }
    let machines = [(&single, one.threads()), (&all, cpu.threads())];
    let mut figures: Vec<Figure> = machines
        .into_iter()
        .flat_map(|(m, t)| limits(m, t))
        .collect();
    figures.extend(cases.iter().map(|case| {
        let machine = if case.alone { &single } else { &all };
        case.figure(machine, if case.alone { 1 } else { cpu.threads() })
    }));
    figures.extend(together(&cases, cpu.threads()));
    figures::print(&cpu.describe(), &figures, args.json)
}

/// The machine's rates as figures, each its own floor.
fn limits(machine: &Machine, threads: usize) -> Vec<Figure> {
    let rates = [
        ("machine: read", "GB/s", &machine.read),
        ("machine: fma", "GFLOPS", &machine.fma),
        ("machine: bf16 dot", "GFLOPS", &machine.bf16),
        ("machine: int8 dot", "GOPS", &machine.int8),
    ];
    let measured = rates.into_iter().filter(|(.., rates)| !rates.is_empty());
    measured
        .map(|(name, unit, rates)| Figure {
            name: name.to_owned(),
            format: "-".to_owned(),
            m: 0,
            threads,
            value: median(rates) / 1e9,
            unit,
            floor: median(rates) / 1e9,
            bound: "itself",
        })
        .collect()
}

/// How many times faster all threads are than one, where both were measured.
fn together(cases: &[Case<'_>], threads: usize) -> Vec<Figure> {
    let pairs = cases.iter().filter(|case| case.alone).filter_map(|one| {
        let what = |case: &Case<'_>| (case.name.clone(), case.format, case.m);
        let same = |case: &&Case<'_>| !case.alone && what(case) == what(one);
        Some((one, cases.iter().find(same)?))
    });
    pairs
        .map(|(one, all)| Figure {
            name: format!("{}, all / one", one.name),
            format: one.format.to_owned(),
            m: one.m,
            threads,
            value: median(&all.rates) / median(&one.rates),
            unit: "x",
            floor: threads as f64,
            bound: "threads",
        })
        .collect()
}

impl Case<'_> {
    /// Items per second.
    fn rate(&mut self) -> f64 {
        let mut items = 0.0;
        let start = Instant::now();
        loop {
            let work = (self.call)();
            items += work.items;
            self.work = Some(work);
            if start.elapsed() >= AT_LEAST {
                return items / start.elapsed().as_secs_f64();
            }
        }
    }

    fn figure(&self, machine: &Machine, threads: usize) -> Figure {
        let (floor, bound) = self.work.map_or((f64::NAN, "-"), |work| {
            let (seconds, bound) = machine.floor(work);
            (work.items / seconds, bound)
        });
        Figure {
            name: self.name.clone(),
            format: self.format.to_owned(),
            m: self.m,
            threads,
            value: median(&self.rates),
            unit: self.unit,
            floor,
            bound,
        }
    }
}

/// How weights are stored.
#[derive(Clone, Copy, PartialEq)]
enum Format {
    F32,
    Bf16,
    Fp8,
    /// Multiplied in pairs of bf16, as the next.
    Bf16Dot,
    Fp8Dot,
    Int8,
    Int4,
}

/// Those that ask for an instruction of the machine.
const DOTS: [Format; 2] = [Format::Bf16Dot, Format::Fp8Dot];
/// Rows of products between the few of decoding and the many of prefill.
const FEW: [usize; 2] = [4, 16];
const FORMATS: [Format; 5] = [
    Format::F32,
    Format::Bf16,
    Format::Fp8,
    Format::Int8,
    Format::Int4,
];

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Fp8 => "fp8",
            Format::Bf16Dot => "bf16-dot",
            Format::Fp8Dot => "fp8-dot",
            Format::Int8 => "int8",
            Format::Int4 => "int4",
        }
    }

    /// What its rule multiplies with: floating formats are widened to f32 exactly, but for dots.
    fn unit(self) -> Unit {
        match self {
            Format::F32 | Format::Bf16 | Format::Fp8 => Unit::Fma,
            Format::Bf16Dot | Format::Fp8Dot => Unit::Bf16,
            Format::Int8 | Format::Int4 => Unit::Int8,
        }
    }

    fn data_bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            Format::F32 => rows * cols * 4,
            Format::Bf16 | Format::Bf16Dot => rows * cols * 2,
            Format::Fp8 | Format::Fp8Dot => rows * cols,
            Format::Int8 => pack::bytes(Int::Int8, rows, cols, GROUP),
            Format::Int4 => pack::bytes(Int::Int4, rows, cols, GROUP),
        }
    }

    fn scale_bytes(self, rows: usize, cols: usize) -> usize {
        match self {
            Format::F32 | Format::Bf16 | Format::Bf16Dot => 0,
            Format::Fp8 | Format::Fp8Dot => rows.div_ceil(128) * cols.div_ceil(128) * 4,
            Format::Int8 | Format::Int4 => pack::scales(rows, cols, GROUP) * 2,
        }
    }

    /// A matrix that lies at `at`, and where it ends.
    fn matrix(
        self,
        memory: &Memory,
        at: usize,
        rows: usize,
        cols: usize,
    ) -> (MatrixRef<'_>, usize) {
        let middle = (at + self.data_bytes(rows, cols)).next_multiple_of(64);
        let end = (middle + self.scale_bytes(rows, cols)).next_multiple_of(64);
        let bytes = &memory[at..at + self.data_bytes(rows, cols)];
        let halves = |from: usize, to: usize| &memory.as_bf16()[from / 2..to / 2];
        let floats = |from: usize, to: usize| &memory.as_f32()[from / 4..to / 4];
        let scales = middle + self.scale_bytes(rows, cols);
        let data = match self {
            Format::F32 => WeightsRef::F32(floats(at, at + bytes.len())),
            Format::Bf16 | Format::Bf16Dot => WeightsRef::Bf16(halves(at, at + bytes.len())),
            Format::Fp8 | Format::Fp8Dot => WeightsRef::Fp8 {
                data: bytes,
                scales: floats(middle, scales),
            },
            Format::Int8 => WeightsRef::Int8 {
                data: bytes,
                scales: halves(middle, scales),
                group: GROUP,
            },
            Format::Int4 => WeightsRef::Int4 {
                data: bytes,
                scales: halves(middle, scales),
                group: GROUP,
            },
        };
        (MatrixRef { rows, cols, data }, end)
    }
}

/// Experts that fit, and the bytes to ask for.
fn affordable(shapes: &Shapes) -> (usize, usize) {
    let each = expert_bytes(Format::Int8, shapes);
    let least = READ.max(2 * expert_bytes(Format::F32, shapes));
    if shapes.hidden == QUICK.hidden {
        return (shapes.experts, (shapes.experts * each).max(64 << 20));
    }
    let room = guild_node::memory::available().map_or(usize::MAX, |b| (b / SHARE) as usize);
    let experts = (room / each).clamp(shapes.top_k, shapes.experts);
    (experts, (experts * each).max(least))
}

/// An expert's matrices: gate, up, down.
type Expert<'a> = [MatrixRef<'a>; 3];

fn expert<'a>(
    memory: &'a Memory,
    format: Format,
    at: usize,
    shapes: &Shapes,
) -> (Expert<'a>, usize) {
    let (gate, at) = format.matrix(memory, at, shapes.inner, shapes.hidden);
    let (up, at) = format.matrix(memory, at, shapes.inner, shapes.hidden);
    let (down, at) = format.matrix(memory, at, shapes.hidden, shapes.inner);
    ([gate, up, down], at)
}

/// What all of an expert takes, scales included.
fn expert_bytes(format: Format, shapes: &Shapes) -> usize {
    let (hidden, inner) = (shapes.hidden, shapes.inner);
    let one = |rows, cols| {
        let data = format.data_bytes(rows, cols).next_multiple_of(64);
        data + format.scale_bytes(rows, cols).next_multiple_of(64)
    };
    2 * one(inner, hidden) + one(hidden, inner)
}

/// A product whose weights stay in the caches.
fn gemm<'a>(
    cpu: &'a Cpu,
    alone: bool,
    memory: &'a Memory,
    format: Format,
    m: usize,
    shapes: &Shapes,
) -> Case<'a> {
    let n = shapes.hot;
    let (w, _) = format.matrix(memory, 0, n, n);
    let x = vec![0.5; m * n];
    let mut out = vec![0.0; m * n];
    let ops = (2 * m * n * n) as f64;
    Case::new(
        format!("gemm hot {n}x{n}"),
        format.name(),
        m,
        "GFLOPS",
        move || {
            cpu.matmul(&mut out, &x, w);
            black_box(&mut out);
            Work {
                bytes: 0.0,
                ops,
                unit: format.unit(),
                items: ops / 1e9,
            }
        },
    )
    .alone(alone)
}

/// Experts one after the other, each cold when its turn comes.
fn ffn<'a>(
    cpu: &'a Cpu,
    memory: &'a Memory,
    format: Format,
    m: usize,
    shapes: &Shapes,
) -> Case<'a> {
    let each = expert_bytes(format, shapes);
    let experts: Vec<Expert<'a>> = (0..memory.len() / each)
        .map(|i| expert(memory, format, i * each, shapes).0)
        .collect();
    let x = vec![0.5; m * shapes.hidden];
    let mut out = vec![0.0; m * shapes.hidden];
    let ops = (6 * m * shapes.hidden * shapes.inner) as f64;
    let mut next = 0;
    let name = format!("ffn cold {}x{}", shapes.hidden, shapes.inner);
    Case::new(name, format.name(), m, "GB/s", move || {
        cpu.ffn(&mut out, &x, &[mlp(&experts[next], None)]);
        black_box(&mut out);
        next = (next + 1) % experts.len();
        Work {
            bytes: each as f64,
            ops,
            unit: format.unit(),
            items: each as f64 / 1e9,
        }
    })
}

fn mlp<'a>(&[gate, up, down]: &Expert<'a>, rows: Option<&'a [u32]>) -> Ffn<'a> {
    Ffn {
        gate,
        up,
        down,
        rows,
    }
}

/// The routed half of a MoE layer: gather, experts, weighted sum. Every call routes anew.
fn moe<'a>(
    cpu: &'a Cpu,
    memory: &'a Memory,
    format: Format,
    tokens: usize,
    resident: usize,
    shapes: &Shapes,
) -> Case<'a> {
    let (hidden, top_k, each) = (shapes.hidden, shapes.top_k, expert_bytes(format, shapes));
    let experts: Vec<Expert<'a>> = (0..resident)
        .map(|i| expert(memory, format, i * each, shapes).0)
        .collect();
    let x = vec![0.5; tokens * hidden];
    let mut sums = vec![0.0; tokens * hidden];
    let mut out = vec![0.0; tokens * top_k * hidden];
    let ops = (tokens * top_k * 6 * hidden * shapes.inner) as f64;
    let mut random = StdRng::seed_from_u64(tokens as u64);
    let name = format!("moe layer, {resident} experts, top {top_k}");
    Case::new(name, format.name(), tokens, "tokens/s", move || {
        let mut rows = vec![Vec::new(); resident];
        for token in 0..tokens {
            for expert in index::sample(&mut random, resident, top_k) {
                rows[expert].push(token as u32);
            }
        }
        let touched = experts
            .iter()
            .zip(&rows)
            .filter(|(_, rows)| !rows.is_empty());
        let mlps: Vec<Ffn<'_>> = touched
            .map(|(expert, rows)| mlp(expert, Some(rows.as_slice())))
            .collect();
        cpu.ffn(&mut out, &x, &mlps);
        // Answers of a token, by ascending expert.
        let mut answers: Vec<Vec<&[f32]>> = vec![Vec::new(); tokens];
        for (&token, answer) in rows.iter().flatten().zip(out.chunks_exact(hidden)) {
            answers[token as usize].push(answer);
        }
        cpu.par_chunks(&mut sums, hidden, |token, sum| {
            sum.fill(0.0);
            for answer in &answers[token] {
                cpu.fma(sum, 0.125, answer);
            }
        });
        black_box(&mut sums);
        Work {
            bytes: (mlps.len() * each) as f64,
            ops,
            unit: format.unit(),
            items: tokens as f64,
        }
    })
}

/// Elements of a cached row: DeepSeek's, and every model's of its family so far.
const WIDTH: usize = 576;
const VALUE_WIDTH: usize = 512;
const PAGE_TOKENS: usize = 16;

/// Absorbed attention of one new row for each of `batch` sequences.
fn attention<'a>(
    cpu: &'a Cpu,
    cache: &'a Memory,
    format: LatentFormat,
    heads: usize,
    context: usize,
    batch: usize,
) -> Case<'a> {
    let row_bytes = format.row_bytes(WIDTH, VALUE_WIDTH);
    let pages = context.div_ceil(PAGE_TOKENS);
    // Pages of all sequences lie among each other.
    let tables: Vec<Vec<u32>> = (0..batch)
        .map(|b| (0..pages).map(|p| (p * batch + b) as u32).collect())
        .collect();
    let q = vec![0.1; batch * heads * WIDTH];
    let mut out = vec![0.0; batch * heads * VALUE_WIDTH];
    let ops = (2 * batch * heads * context * (WIDTH + VALUE_WIDTH)) as f64;
    let name = format!("mla decode, {heads} heads, context {context}");
    let format_name = match format {
        LatentFormat::F32 => "f32",
        LatentFormat::Bf16 => "bf16",
        LatentFormat::Fp8 => "fp8",
    };
    Case::new(name, format_name, batch, "GFLOPS", move || {
        let row = |pages| QueryRow {
            pages,
            visible: context,
        };
        let rows: Vec<QueryRow<'_>> = tables.iter().map(|pages| row(pages)).collect();
        cpu.attend_latent(LatentAttention {
            q: &q,
            out: &mut out,
            heads,
            width: WIDTH,
            value_width: VALUE_WIDTH,
            scale: 0.1,
            rows: &rows,
            cache,
            format,
            page_tokens: PAGE_TOKENS,
            page_stride: PAGE_TOKENS * row_bytes,
            offset: 0,
        });
        black_box(&mut out);
        Work {
            bytes: (batch * context * row_bytes) as f64,
            ops,
            unit: Unit::Fma,
            items: ops / 1e9,
        }
    })
}

impl<'a> Case<'a> {
    fn new(
        name: String,
        format: &'static str,
        m: usize,
        unit: &'static str,
        call: impl FnMut() -> Work + 'a,
    ) -> Case<'a> {
        Case {
            name,
            format,
            m,
            unit,
            alone: false,
            call: Box::new(call),
            rates: Vec::new(),
            work: None,
        }
    }

    fn alone(self, alone: bool) -> Case<'a> {
        Case { alone, ..self }
    }
}
