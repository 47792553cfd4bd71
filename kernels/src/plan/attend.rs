//! How latent attention is cut into tasks.
//!
//! Secret: queries of a task, and which thread makes which spans. No cut shows in the results: a span's state is made by one task from
//! nothing, and states are merged in ascending order.

use std::cell::Cell;
use std::ops::Range;

use super::{TASKS_PER_THREAD, for_each, is_small};
use crate::{
    LatentAttention, QueryRow,
    generic::{
        LANES,
        attention::{EMPTY, Finish, Keys, Line, Merge, SPAN, Span, States, floats},
    },
    isa::Choice,
    pool::Pool,
};

/// Queries (a row's heads, heads of several rows) that share widened keys: their states and the keys fill half of an L2.
const QUERIES: usize = 64;
/// Fewer queries a task make widening a part of the work that shows.
const FEW_QUERIES: usize = 16;
/// Queries that registers take at once.
const TILE: usize = 4;

thread_local! {
    /// Queries, states and scratch of an attention task.
    static SCRATCH: Cell<[Vec<Line>; 4]> = const { Cell::new([Vec::new(), Vec::new(), Vec::new(), Vec::new()]) };
    /// States of all spans, where threads share a query.
    static PARTS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// The cut of a call, and its spans.
    static GROUPS: Cell<Vec<Group>> = const { Cell::new(Vec::new()) };
    static SPANS: Cell<Vec<(usize, usize)>> = const { Cell::new(Vec::new()) };
}

/// Some heads of consecutive rows of one sequence.
struct Group {
    rows: Range<usize>,
    heads: Range<usize>,
    /// Spans of the row that sees most.
    spans: usize,
}

impl Group {
    fn queries(&self) -> usize {
        self.rows.len() * self.heads.len()
    }
}

/// Absorbed latent attention; the caller has checked the shapes.
pub(crate) fn attend(isa: Choice, pool: &Pool, job: LatentAttention<'_>) {
    let keys: usize = job.rows.iter().map(|row| row.visible).sum();
    let macs = keys * job.heads * (job.width + job.value_width);
    let pool = (!is_small(0, macs)).then_some(pool);
    let tasks = pool.map_or(1, |pool| pool.threads() * TASKS_PER_THREAD);
    // Larger groups widen keys less often, smaller ones give every thread something to do.
    let mut queries = QUERIES;
    let mut groups = GROUPS.take();
    cut(&job, queries, &mut groups);
    while queries > FEW_QUERIES && groups.len() < tasks {
        queries /= 2;
        cut(&job, queries, &mut groups);
    }
    let enough = groups.len() >= tasks;
    let spans = |groups: &[Group]| groups.iter().map(|group| group.spans).sum::<usize>();
    while !enough && queries > TILE && spans(&groups) < tasks / 2 {
        queries /= 2;
        cut(&job, queries, &mut groups);
    }
    let shared = Shared::new(isa, &job);
    let out = Out {
        heads: job.heads,
        width: job.value_width,
        data: job.out.as_mut_ptr(),
    };
    if groups.len() >= tasks || groups.iter().all(|group| group.spans <= 1) {
        whole(pool, &shared, out, &groups);
    } else {
        by_span(pool, &shared, out, &groups);
    }
    GROUPS.set(groups);
}

/// Groups of at most `queries` queries.
fn cut(job: &LatentAttention<'_>, queries: usize, groups: &mut Vec<Group>) {
    let heads_together = job.heads.min(queries).max(1);
    let rows_together = (queries / heads_together).max(1);
    let same = |a: &QueryRow<'_>, b: &QueryRow<'_>| std::ptr::eq(a.pages, b.pages);
    groups.clear();
    let mut first = 0;
    for sequence in job.rows.chunk_by(same) {
        for start in (0..sequence.len()).step_by(rows_together) {
            let rows = start..sequence.len().min(start + rows_together);
            let visible = sequence[rows.clone()].iter().map(|row| row.visible).max();
            let spans = visible.unwrap_or(0).div_ceil(SPAN);
            for head in (0..job.heads).step_by(heads_together) {
                groups.push(Group {
                    rows: first + rows.start..first + rows.end,
                    heads: head..job.heads.min(head + heads_together),
                    spans,
                });
            }
        }
        first += sequence.len();
    }
}

/// Where the results of a call go: `[rows, heads, width]`.
#[derive(Clone, Copy)]
struct Out {
    data: *mut f32,
    heads: usize,
    width: usize,
}

// SAFETY: it stands for memory that the call has alone, and tasks take disjoint parts of it.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The result of one query of a group, and its row.
    ///
    /// # Safety
    /// The group is one of a cut of this call, and nobody else has this query meanwhile.
    unsafe fn query<'o>(self, group: &Group, query: usize) -> (usize, &'o mut [f32]) {
        let row = group.rows.start + query / group.heads.len();
        let head = group.heads.start + query % group.heads.len();
        let at = (row * self.heads + head) * self.width;
        // SAFETY: rows and heads of a cut are those of the call; the rest is the caller's promise.
        (row, unsafe {
            std::slice::from_raw_parts_mut(self.data.add(at), self.width)
        })
    }
}

/// What a task needs of the job besides its own part of the output.
struct Shared<'a> {
    isa: Choice,
    q: &'a [f32],
    heads: usize,
    scale: f32,
    rows: &'a [QueryRow<'a>],
    keys: Keys<'a>,
}

impl<'a> Shared<'a> {
    fn new(isa: Choice, job: &LatentAttention<'a>) -> Shared<'a> {
        Shared {
            isa,
            q: job.q,
            heads: job.heads,
            scale: job.scale,
            rows: job.rows,
            keys: Keys {
                cache: job.cache,
                format: job.format,
                pages: &[],
                page_tokens: job.page_tokens,
                page_stride: job.page_stride,
                offset: job.offset,
                width: job.width,
                value_width: job.value_width,
            },
        }
    }

    /// Lines of a state.
    fn state(&self) -> usize {
        self.keys.value_lines() + 1
    }

    /// The queries of a group, each in whole lines.
    fn gather(&self, group: &Group, to: &mut Vec<Line>) {
        let (width, lines) = (self.keys.width, self.keys.lines());
        if to.len() < group.queries() * lines {
            to.resize(group.queries() * lines, EMPTY);
        }
        let queries = group
            .rows
            .clone()
            .flat_map(|row| group.heads.clone().map(move |head| row * self.heads + head));
        for (query, to) in queries.zip(floats(to).chunks_exact_mut(lines * LANES)) {
            let (q, padding) = to.split_at_mut(width);
            q.copy_from_slice(&self.q[query * width..][..width]);
            padding.fill(0.0);
        }
    }

    /// States of a group's queries over one span.
    fn span(
        &self,
        group: &Group,
        span: usize,
        queries: &[Line],
        states: &mut [Line],
        scratch: &mut Vec<Line>,
    ) {
        let mut visible = [0; QUERIES];
        let visible = &mut visible[..group.rows.len()];
        for (visible, row) in visible.iter_mut().zip(&self.rows[group.rows.clone()]) {
            *visible = row.visible;
        }
        let keys = Keys {
            pages: self.rows[group.rows.start].pages,
            ..self.keys
        };
        // SAFETY: asks for nothing besides the instruction set: it checks its shapes.
        unsafe {
            self.isa.run(Span {
                keys,
                queries,
                heads: group.heads.len(),
                visible,
                scale: self.scale,
                from: span * SPAN,
                states: States {
                    lines: states,
                    value_lines: keys.value_lines(),
                },
                scratch,
            })
        };
    }

    fn merge(&self, into: &mut [Line], later: &[Line]) {
        // SAFETY: asks for nothing besides the instruction set.
        unsafe { self.isa.run(Merge { into, later }) };
    }

    fn finish(&self, row: usize, state: &[Line], out: &mut [f32]) {
        if self.rows[row].visible == 0 {
            return out.fill(0.0);
        }
        // SAFETY: asks for nothing besides the instruction set.
        unsafe { self.isa.run(Finish { state, out }) };
    }
}

/// Every group by one task, span after span.
fn whole(pool: Option<&Pool>, shared: &Shared<'_>, out: Out, groups: &[Group]) {
    let each = shared.state();
    for_each(pool, groups.len(), |index| {
        let group = &groups[index];
        let mut all = SCRATCH.take();
        let [queries, total, later, scratch] = &mut all;
        let states = group.queries() * each;
        for states_of in [&mut *total, &mut *later] {
            if states_of.len() < states {
                states_of.resize(states, EMPTY);
            }
        }
        shared.gather(group, queries);
        for span in 0..group.spans {
            let into = if span == 0 { &mut *total } else { &mut *later };
            shared.span(group, span, queries, &mut into[..states], scratch);
            if span > 0 {
                let pairs = total.chunks_exact_mut(each).zip(later.chunks_exact(each));
                for (query, (into, later)) in pairs.enumerate().take(group.queries()) {
                    let row = group.rows.start + query / group.heads.len();
                    if shared.rows[row].visible > span * SPAN {
                        shared.merge(into, later);
                    }
                }
            }
        }
        let states = total.chunks_exact(each).enumerate();
        for (query, state) in states.take(group.queries()) {
            // SAFETY: groups are disjoint, and each is one task's.
            let (row, out) = unsafe { out.query(group, query) };
            shared.finish(row, state, out);
        }
        SCRATCH.set(all);
    });
}

/// The states of all spans of all groups, while tasks write them.
#[derive(Clone, Copy)]
struct Parts(*mut Line);

// SAFETY: it stands for memory that the call has alone, and tasks take disjoint parts of it.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

impl Parts {
    /// # Safety
    /// The range lies in the memory, and nobody else has it meanwhile.
    unsafe fn lines<'p>(self, range: Range<usize>) -> &'p mut [Line] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Every span of every group by one task; then the states are merged.
fn by_span(pool: Option<&Pool>, shared: &Shared<'_>, out: Out, groups: &[Group]) {
    let each = shared.state();
    let mut spans = SPANS.take();
    spans.clear();
    let mut needed = 0;
    for (index, group) in groups.iter().enumerate() {
        for _ in 0..group.spans {
            spans.push((index, needed));
            needed += group.queries() * each;
        }
    }
    let mut memory = PARTS.take();
    if memory.len() < needed {
        memory.resize(needed, EMPTY);
    }
    let parts = Parts(memory.as_mut_ptr());
    // The first span of a group, by the group.
    let first = |index: usize| spans.partition_point(|&(of, _)| of < index);
    for_each(pool, spans.len(), |task| {
        let (index, at) = spans[task];
        let group = &groups[index];
        let mut all = SCRATCH.take();
        let [queries, _, _, scratch] = &mut all;
        shared.gather(group, queries);
        // SAFETY: the states of the spans lie one after another, and each span is one task's.
        let states = unsafe { parts.lines(at..at + group.queries() * each) };
        shared.span(group, task - first(index), queries, states, scratch);
        SCRATCH.set(all);
    });
    for_each(pool, groups.len(), |index| {
        let group = &groups[index];
        let queries = group.queries();
        let at = spans.get(first(index)).map_or(0, |&(_, at)| at);
        // SAFETY: the states of a group's spans lie one after another; they are written, and each group is one task's.
        let states = unsafe { parts.lines(at..at + group.spans * queries * each) };
        let (first, later) = states.split_at_mut((queries * each).min(states.len()));
        for query in 0..queries {
            // SAFETY: groups are disjoint, and each is one task's.
            let (row, out) = unsafe { out.query(group, query) };
            if first.is_empty() {
                shared.finish(row, &[], out);
                continue;
            }
            let into = &mut first[query * each..][..each];
            for span in 1..shared.rows[row].visible.div_ceil(SPAN) {
                let at = ((span - 1) * queries + query) * each;
                shared.merge(into, &later[at..][..each]);
            }
            shared.finish(row, into, out);
        }
    });
    PARTS.set(memory);
    SPANS.set(spans);
}
