//! Gated MLPs over lists of rows give the bits of their three products for each row alone, in every format, whatever
//! shares the call.
#![allow(clippy::unwrap_used)]

mod oracle;
mod packed;

use guild_kernels::{Cpu, Ffn, Isa, MatrixRef, pack::Int};
use oracle::{Format, Matrix, bits, config, cpus, values};
use packed::Packed;
use proptest::prelude::*;

/// The format of a matrix.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Float(Format),
    Packed(Int, usize),
}

const KINDS: [Kind; 7] = [
    Kind::Float(Format::F32),
    Kind::Float(Format::Bf16),
    Kind::Float(Format::Fp8),
    Kind::Packed(Int::Int4, 32),
    Kind::Packed(Int::Int4, 128),
    Kind::Packed(Int::Int8, 64),
    Kind::Packed(Int::Int8, 128),
];

#[derive(Debug)]
enum Weights {
    Float(Matrix),
    Packed(Packed),
}

impl Weights {
    fn new(kind: Kind, seed: u64, rows: usize, cols: usize) -> Weights {
        match kind {
            Kind::Float(format) => Weights::Float(Matrix::new(format, seed, rows, cols)),
            Kind::Packed(int, group) => {
                Weights::Packed(Packed::random(int, group, rows, cols, seed))
            }
        }
    }

    fn as_ref(&self) -> MatrixRef<'_> {
        match self {
            Weights::Float(w) => w.as_ref(),
            Weights::Packed(w) => w.as_ref(),
        }
    }
}

#[derive(Debug)]
struct Expert {
    gate: Weights,
    up: Weights,
    down: Weights,
    rows: Option<Vec<u32>>,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    n: usize,
    hidden: usize,
    inner: usize,
    width: usize,
}

impl Expert {
    fn new(up: Kind, down: Kind, shape: Shape, seed: u64, rows: Option<Vec<u32>>) -> Expert {
        let Shape {
            hidden,
            inner,
            width,
            ..
        } = shape;
        Expert {
            gate: Weights::new(up, seed, inner, hidden),
            up: Weights::new(up, seed + 1, inner, hidden),
            down: Weights::new(down, seed + 2, width, inner),
            rows,
        }
    }

    /// Different experts, one for each list of rows.
    fn of_kind(kind: Kind, shape: Shape, rows: &[Option<Vec<u32>>]) -> Vec<Expert> {
        let rows = rows.iter().zip((1..).step_by(3));
        rows.map(|(rows, seed)| Expert::new(kind, kind, shape, seed, rows.clone()))
            .collect()
    }

    fn as_ref(&self) -> Ffn<'_> {
        Ffn {
            gate: self.gate.as_ref(),
            up: self.up.as_ref(),
            down: self.down.as_ref(),
            rows: self.rows.as_deref(),
        }
    }
}

fn run(cpu: &Cpu, x: &[f32], shape: Shape, experts: &[Expert]) -> Vec<f32> {
    let pairs: usize = experts
        .iter()
        .map(|e| e.rows.as_ref().map_or(shape.n, Vec::len))
        .sum();
    let mut out = vec![f32::NAN; pairs * shape.width];
    let experts: Vec<_> = experts.iter().map(Expert::as_ref).collect();
    cpu.ffn(&mut out, x, &experts);
    out
}

/// Each row alone through the three products, on plain Rust.
fn expected(x: &[f32], shape: Shape, experts: &[Expert]) -> Vec<f32> {
    let cpu = Cpu::with_isa(1, Isa::Portable).unwrap();
    let mut out = Vec::new();
    for expert in experts {
        let all: Vec<u32> = (0..shape.n as u32).collect();
        for &row in expert.rows.as_ref().unwrap_or(&all) {
            let x = &x[row as usize * shape.hidden..][..shape.hidden];
            let (mut gate, mut up) = (vec![0.0; shape.inner], vec![0.0; shape.inner]);
            let mut down = vec![0.0; shape.width];
            cpu.matmul(&mut gate, x, expert.gate.as_ref());
            cpu.matmul(&mut up, x, expert.up.as_ref());
            cpu.silu_mul(&mut gate, &up);
            cpu.matmul(&mut down, &gate, expert.down.as_ref());
            out.extend(down);
        }
    }
    out
}

fn check(x: &[f32], shape: Shape, experts: &[Expert]) {
    let expected = bits(&expected(x, shape, experts));
    for cpu in cpus() {
        let found = bits(&run(&cpu, x, shape, experts));
        let odd = (0..expected.len()).find(|&i| found[i] != expected[i]);
        assert!(
            odd.is_none(),
            "{shape:?} on {cpu:?}: element {odd:?} of {}: {:#x} instead of {:#x}",
            expected.len(),
            found[odd.unwrap_or(0)],
            expected[odd.unwrap_or(0)]
        );
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(&KINDS)
}

fn shape() -> impl Strategy<Value = Shape> {
    (1usize..30, 1usize..200, 1usize..200, 1usize..60).prop_map(|(n, hidden, inner, width)| Shape {
        n,
        hidden,
        inner,
        width,
    })
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn any_experts_and_rows(
        shape in shape(),
        experts in prop::collection::vec((kind(), kind(), prop::option::weighted(0.8, prop::collection::vec(0u32..1000, 0..25))), 0..5),
        seed: u32,
    ) {
        let x = values(u64::from(seed), shape.n * shape.hidden);
        let experts: Vec<_> = experts
            .into_iter()
            .enumerate()
            .map(|(i, (up, down, rows))| {
                let rows = rows.map(|rows| rows.iter().map(|r| r % shape.n as u32).collect());
                Expert::new(up, down, shape, u64::from(seed) + 9 * i as u64, rows)
            })
            .collect();
        check(&x, shape, &experts);
    }
}

/// A hot expert goes through several rounds, cold ones beside it through one.
#[test]
fn hot_and_cold_experts_share_a_call() {
    let shape = Shape {
        n: 300,
        hidden: 70,
        inner: 130,
        width: 33,
    };
    let x = values(3, shape.n * shape.hidden);
    let few = (0..300).rev().step_by(7).collect();
    let rows = [Some(vec![7]), None, Some(vec![]), Some(few)];
    for kind in KINDS {
        check(&x, shape, &Expert::of_kind(kind, shape, &rows));
    }
}

/// Large enough for every thread to have tasks of every kind.
#[test]
fn tasks_of_all_threads_make_one_result() {
    let shape = Shape {
        n: 13,
        hidden: 1024,
        inner: 704,
        width: 1024,
    };
    let x = values(5, shape.n * shape.hidden);
    for kind in KINDS {
        let experts = Expert::of_kind(kind, shape, &[Some(vec![3]), None]);
        let one = Cpu::with_isa(1, Isa::available()[0]).unwrap();
        let alone = run(&one, &x, shape, &experts);
        let isas = Isa::available().into_iter();
        for isa in isas.filter(|&isa| isa != Isa::Portable) {
            for threads in [2, 4] {
                let cpu = Cpu::with_isa(threads, isa).unwrap();
                let found = run(&cpu, &x, shape, &experts);
                assert!(bits(&found) == bits(&alone), "{kind:?} on {cpu:?}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "ffn: row Some(2) of 2")]
fn rows_that_are_not_there_are_refused() {
    let shape = Shape {
        n: 2,
        hidden: 3,
        inner: 4,
        width: 5,
    };
    let kind = Kind::Float(Format::F32);
    let expert = Expert::new(kind, kind, shape, 1, Some(vec![0, 2]));
    run(&Cpu::new(1), &[0.0; 6], shape, &[expert]);
}

#[test]
fn gate_and_up_may_differ_in_format() {
    let shape = Shape {
        n: 23,
        hidden: 83,
        inner: 71,
        width: 5,
    };
    let x = values(1, shape.n * shape.hidden);
    for (i, gate) in KINDS.into_iter().enumerate() {
        for (j, up) in KINDS.into_iter().enumerate() {
            let mut expert = Expert::new(gate, KINDS[(i + j) % 7], shape, 1, None);
            expert.up = Weights::new(up, 2, shape.inner, shape.hidden);
            let mut few = Expert::new(gate, gate, shape, 3, Some(vec![5, 4]));
            few.up = Weights::new(up, 4, shape.inner, shape.hidden);
            check(&x, shape, &[few, expert]);
        }
    }
}
