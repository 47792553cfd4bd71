//! How the gated MLPs of one call are cut into tasks.
//!
//! Secret: the order of tasks. All of a call is one list: first rows are brought into the form their weights ask for, then
//! come gate and up, whose tasks end with the activation (and with the quantisation that down asks for), then down; in
//! each of these the experts with the most rows come first, and tasks become shorter, so that threads end together. Threads
//! claim tasks in order, and a task that needs others spins until they are done: whoever has them is running, so nobody
//! waits for long, and nothing sleeps between the parts.
//! No cut shows in the results.

use std::{
    cell::Cell,
    hint,
    ops::Range,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use super::{
    BYTES_PER_NS, LANES, MACS_PER_NS, PAIR, SERIAL_NS, for_each,
    operand::{Form, Tiles, grown, product},
    share, weight_bytes,
};
use crate::{
    Ffn, MatrixRef,
    generic::{
        matmul::{Input, Line, Output},
        rows::{Both, SiluMul},
    },
    isa::Choice,
    pool::Pool,
    reuse::reused,
};

/// Rows of one expert that go through the tasks together. More read its weights once again, which costs little beside so
/// much arithmetic, and what a task holds stays near.
const ITEM_ROWS: usize = 252;
/// Memory for prepared rows and activations, in lines, that one pass takes unless a single item needs more.
const PASS_LINES: usize = (64 << 20) / size_of::<Line>();
/// Nothing is cut into tasks shorter than this.
const TASK_NS: usize = 4_000;
/// Most bytes of gate and up that a task leaves for its activations: they are to stay in L2 beside x and weights.
const SCRATCH_BYTES: usize = 256 << 10;
/// Elements of x that one thread brings into another form in a nanosecond.
const ELEMENTS_PER_NS: usize = 4;
/// How often a thread looks for what it needs before it lets others run.
const SPINS: usize = 10_000;

thread_local! {
    /// What the calling thread's passes hold.
    static MEMORY: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// Gate and up of a task.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The lists of a call, whose memory the next one takes.
    static ITEMS: Cell<Vec<Item<'static>>> = const { Cell::new(Vec::new()) };
    static PARTS: Cell<Vec<Parts>> = const { Cell::new(Vec::new()) };
    static TASKS: Cell<Vec<Task>> = const { Cell::new(Vec::new()) };
}

/// Rows of one expert in one pass.
struct Item<'a> {
    gate: MatrixRef<'a>,
    up: MatrixRef<'a>,
    down: MatrixRef<'a>,
    x: Input<'a>,
    out: Output,
    /// Of `x`, for gate and for up.
    forms: [Form; 2],
    /// Of the activations, for down.
    inner: Form,
}

/// Where in the memory of the pass an item has its parts, in lines.
struct Parts {
    /// For gate, and for up where that asks for another form.
    x: [Range<usize>; 2],
    /// `[m, inner]` f32, where down takes floats.
    plain: Range<usize>,
    inner: Range<usize>,
    /// Tasks not done: of `x`, of gate and up, of the tiles of the activations.
    open: [AtomicUsize; 3],
}

#[derive(Clone, Copy)]
enum Step {
    Prepare,
    GateUp,
    Repack,
    Down,
}

struct Task {
    step: Step,
    item: usize,
    /// Pieces of tiles, tiles or columns.
    range: Range<usize>,
}

/// The rows of every expert, `out[i] = down(silu(gate x) * up x)`, one expert's after another's. The caller has checked
/// the shapes.
///
/// # Safety
/// `out` is valid for all rows of all experts, which are written by nobody else meanwhile.
pub(crate) unsafe fn ffn(
    isa: Choice,
    pool: &Pool,
    mut out: Output,
    x: &[f32],
    experts: &[Ffn<'_>],
) {
    let mut items = reused(ITEMS.take());
    for expert in experts {
        let cols = expert.gate.cols;
        let m = expert.rows.map_or(x.len() / cols, <[u32]>::len);
        for first in (0..m).step_by(ITEM_ROWS) {
            let m = ITEM_ROWS.min(m - first);
            let (data, index) = match expert.rows {
                Some(rows) => (x, Some(&rows[first..first + m])),
                None => (&x[first * cols..], None),
            };
            items.push(Item {
                gate: expert.gate,
                up: expert.up,
                down: expert.down,
                x: Input {
                    data,
                    index,
                    stride: cols,
                    m,
                    cols,
                },
                out,
                forms: [&expert.gate, &expert.up].map(|w| Form::of(isa, w, m)),
                inner: Form::of(isa, &expert.down, m),
            });
            out = out.at(m * out.stride);
        }
    }
    items.sort_unstable_by_key(|item| std::cmp::Reverse(item.x.m));
    let (mut memory, mut parts) = (MEMORY.take(), PARTS.take());
    let mut rest = items.as_slice();
    while !rest.is_empty() {
        let mut lines = 0;
        parts.clear();
        for item in rest {
            let part = Parts::new(item, lines);
            if !parts.is_empty() && part.inner.end > PASS_LINES {
                break;
            }
            lines = part.inner.end;
            parts.push(part);
        }
        let (now, later) = rest.split_at(parts.len());
        // SAFETY: the caller's promise; items have disjoint rows of `out` and parts of the memory.
        unsafe { pass(isa, pool, now, &parts, grown(&mut memory, lines)) };
        rest = later;
    }
    MEMORY.set(memory);
    PARTS.set(parts);
    ITEMS.set(reused(items));
}

impl Parts {
    fn new(item: &Item<'_>, from: usize) -> Parts {
        let m = item.x.m;
        let plain = match item.inner {
            Form::Words { .. } => 0,
            _ => (m * item.down.cols).div_ceil(LANES),
        };
        let [gate, up] = [0, 1].map(|i| item.tiles(i) * item.forms[i].tile_lines());
        let x = [from..from + gate, from + gate..from + gate + up];
        let plain = x[1].end..x[1].end + plain;
        let inner = plain.end..plain.end + item.inner.tiles(m) * item.inner.tile_lines();
        Parts {
            x,
            plain,
            inner,
            open: Default::default(),
        }
    }
}

impl Item<'_> {
    /// Tiles of `x` to be prepared for gate, or for up where that asks for another form.
    fn tiles(&self, which: usize) -> usize {
        if which == 1 && self.forms[0] == self.forms[1] {
            return 0;
        }
        self.forms[which].tiles(self.x.m)
    }

    /// Pieces of these tiles.
    fn pieces(&self, which: usize) -> usize {
        if which == 1 && self.forms[0] == self.forms[1] {
            return 0;
        }
        self.forms[which].pieces(self.x.m)
    }

    /// Nanoseconds of one thread, roughly.
    fn cost(&self, w: &MatrixRef<'_>) -> usize {
        weight_bytes(w) / BYTES_PER_NS + self.x.m * w.rows * w.cols / MACS_PER_NS
    }

    /// What a step has to do.
    fn load(&self, step: Step) -> Load {
        let m = self.x.m;
        let moved = |n, cols| Load {
            n,
            cost: if n == 0 {
                0
            } else {
                m * cols / ELEMENTS_PER_NS
            },
            unit: 1,
            most: usize::MAX,
        };
        match step {
            Step::Prepare => moved(self.pieces(0) + self.pieces(1), self.x.cols),
            Step::GateUp => Load {
                n: self.gate.rows,
                cost: self.cost(&self.gate) + self.cost(&self.up),
                // A task has whole groups of what down takes.
                unit: match self.inner {
                    Form::Words { groups, .. } => groups.group,
                    _ => PAIR,
                },
                most: SCRATCH_BYTES / (2 * size_of::<f32>() * m).max(1),
            },
            Step::Repack => match self.inner {
                Form::Lines { .. } | Form::Pairs(_) => moved(self.inner.tiles(m), self.down.cols),
                _ => moved(0, 0),
            },
            Step::Down => Load {
                n: self.down.rows,
                cost: self.cost(&self.down),
                unit: PAIR,
                most: usize::MAX,
            },
        }
    }
}

/// What one step of an item has to do.
struct Load {
    /// Pieces or columns.
    n: usize,
    /// Nanoseconds of one thread for all of them.
    cost: usize,
    /// What is not cut.
    unit: usize,
    /// What a task takes at most, but for one unit.
    most: usize,
}

/// # Safety
/// As for [`ffn`], `memory` holding all parts.
unsafe fn pass(isa: Choice, pool: &Pool, items: &[Item<'_>], parts: &[Parts], memory: &mut [Line]) {
    let all: usize = items
        .iter()
        .map(|item| item.cost(&item.gate) + item.cost(&item.up) + item.cost(&item.down))
        .sum();
    let threads = if all < SERIAL_NS { 1 } else { pool.threads() };
    let mut tasks = TASKS.take();
    list(&mut tasks, items, parts, threads);
    let memory = Memory(Tiles(memory.as_mut_ptr()));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    for_each((threads > 1).then_some(pool), threads, |_| {
        while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            // A thread that panics has others wait for what it does not do.
            let guard = Guard(&failed);
            let run = Run {
                isa,
                memory,
                failed: &failed,
                item: &items[task.item],
                parts: &parts[task.item],
            };
            // SAFETY: the caller's promise; the tasks write disjoint parts, and read what they have waited for.
            unsafe { run.task(task) };
            std::mem::forget(guard);
        }
    });
    TASKS.set(tasks);
}

struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Makes `tasks` those of a pass in the order they are claimed.
fn list(tasks: &mut Vec<Task>, items: &[Item<'_>], parts: &[Parts], threads: usize) {
    tasks.clear();
    for step in [Step::Prepare, Step::GateUp, Step::Repack, Step::Down] {
        let mut left: usize = items.iter().map(|item| item.load(step).cost).sum();
        for (i, item) in items.iter().enumerate() {
            let Load {
                n,
                cost,
                unit,
                most,
            } = item.load(step);
            let begun = tasks.len();
            let mut from = 0;
            while from < n {
                let time = share(left, threads, 1).max(TASK_NS);
                let columns = (n * time / cost.max(1)).min(most);
                let columns = (columns / unit * unit).max(unit);
                let to = n.min(from + columns);
                left = left.saturating_sub(cost * (to - from) / n);
                let range = from..to;
                tasks.push(Task {
                    step,
                    item: i,
                    range,
                });
                from = to;
            }
            let open = match step {
                Step::Prepare => 0,
                Step::GateUp => 1,
                Step::Repack => 2,
                Step::Down => continue,
            };
            parts[i].open[open].store(tasks.len() - begun, Ordering::Relaxed);
        }
    }
}

/// The memory of a pass.
#[derive(Clone, Copy)]
struct Memory(Tiles);

impl Memory {
    /// # Safety
    /// `range` lies in the memory, and nobody writes it meanwhile.
    unsafe fn lines(&self, range: &Range<usize>) -> &[Line] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.0.add(range.start), range.len()) }
    }

    /// What begins at line `from`.
    fn at(&self, from: usize) -> Tiles {
        Tiles(self.0.0.wrapping_add(from))
    }
}

/// One task at work.
struct Run<'a> {
    isa: Choice,
    memory: Memory,
    failed: &'a AtomicBool,
    item: &'a Item<'a>,
    parts: &'a Parts,
}

impl Run<'_> {
    /// # Safety
    /// As for [`pass`]; nobody else has this task.
    unsafe fn task(&self, task: &Task) {
        let Run {
            isa,
            memory,
            item,
            parts,
            ..
        } = *self;
        let range = task.range.clone();
        // SAFETY: the caller's promise; a part is read after all tasks that write it, which `wait` makes sure of.
        unsafe {
            match task.step {
                Step::Prepare => {
                    for piece in range {
                        let (which, piece) = match piece.checked_sub(item.pieces(0)) {
                            None => (0, piece),
                            Some(piece) => (1, piece),
                        };
                        let to = memory.at(parts.x[which].start);
                        item.forms[which].prepare(isa, item.x, piece, to);
                    }
                    self.done(0);
                }
                Step::GateUp => {
                    if !self.wait(0) {
                        return;
                    }
                    self.gate_up(range);
                    self.done(1);
                }
                Step::Repack => {
                    if !self.wait(1) {
                        return;
                    }
                    for tile in range {
                        let to = memory.at(parts.inner.start);
                        item.inner.prepare(isa, self.plain(), tile, to);
                    }
                    self.done(2);
                }
                Step::Down => {
                    if !(self.wait(1) && self.wait(2)) {
                        return;
                    }
                    let rows = match item.inner {
                        // Written with gate and up.
                        Form::Words { .. } => Input {
                            data: &[],
                            index: None,
                            stride: 0,
                            m: item.x.m,
                            cols: item.down.cols,
                        },
                        _ => self.plain(),
                    };
                    let rows = item.inner.rows(rows, memory.lines(&parts.inner));
                    product(isa, item.out, rows, item.down, range.start, range.end);
                }
            }
        }
    }

    /// The activations.
    ///
    /// # Safety
    /// All tasks of gate and up are done.
    unsafe fn plain(&self) -> Input<'_> {
        let (m, cols) = (self.item.x.m, self.item.down.cols);
        // SAFETY: the caller's promise; a line is 16 f32.
        let data = unsafe {
            let lines = self.memory.lines(&self.parts.plain);
            std::slice::from_raw_parts(lines.as_ptr().cast::<f32>(), m * cols)
        };
        Input {
            data,
            index: None,
            stride: cols,
            m,
            cols,
        }
    }

    /// # Safety
    /// As for [`Run::task`].
    unsafe fn gate_up(&self, range: Range<usize>) {
        let Run {
            isa, item, parts, ..
        } = *self;
        let (m, width) = (item.x.m, range.len());
        let mut scratch = SCRATCH.take();
        if scratch.len() < 2 * m * width {
            scratch.resize(2 * m * width, 0.0);
        }
        let (gate, up) = scratch[..2 * m * width].split_at_mut(m * width);
        // SAFETY: the scratch is ours and holds these columns; what is prepared of `x` is no more written.
        unsafe {
            let second = usize::from(item.forms[0] != item.forms[1]);
            for (x, w, to) in [(0, item.gate, &mut *gate), (second, item.up, &mut *up)] {
                let rows = item.forms[x].rows(item.x, self.memory.lines(&parts.x[x]));
                let out = Output {
                    data: to.as_mut_ptr(),
                    stride: width,
                };
                product(
                    isa,
                    out.before(range.start),
                    rows,
                    w,
                    range.start,
                    range.end,
                );
            }
            isa.run(Both(gate, up, SiluMul));
        }
        match item.inner {
            Form::Words { groups, .. } => {
                let x = Input {
                    data: gate,
                    index: None,
                    stride: width,
                    m,
                    cols: width,
                };
                for tile in 0..item.inner.tiles(m) {
                    let at = parts.inner.start + tile * item.inner.tile_lines();
                    let from = range.start / groups.group;
                    // SAFETY: the tile lies in the memory; the groups of these columns are this task's.
                    unsafe {
                        item.inner.quantise(isa, x, tile, from, self.memory.at(at));
                    }
                }
            }
            _ => {
                for (r, row) in gate.chunks_exact(width).enumerate() {
                    // SAFETY: `[m, inner]` lies in the memory, and these columns are this task's.
                    unsafe {
                        let plain = self.memory.at(parts.plain.start).0.cast::<f32>();
                        let to = plain.add(r * item.down.cols + range.start);
                        std::ptr::copy_nonoverlapping(row.as_ptr(), to, width);
                    }
                }
            }
        }
        SCRATCH.set(scratch);
    }

    fn done(&self, open: usize) {
        self.parts.open[open].fetch_sub(1, Ordering::Release);
    }

    /// Waits until all tasks of a part are done; says whether they are.
    fn wait(&self, open: usize) -> bool {
        let mut spins = 0;
        while self.parts.open[open].load(Ordering::Acquire) > 0 {
            if self.failed.load(Ordering::Relaxed) {
                return false;
            }
            spins += 1;
            if spins % SPINS == 0 {
                thread::yield_now();
            }
            hint::spin_loop();
        }
        true
    }
}
