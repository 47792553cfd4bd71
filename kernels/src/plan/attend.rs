//! How latent attention is cut into tasks.
//!
//! Secret: queries of a task, and which thread makes which spans. No cut shows in the results: a span's state is made by one task from
//! nothing, and states are merged in ascending order.

use std::cell::Cell;
use std::ops::Range;

use super::{TASKS_PER_THREAD, for_each_chunk, is_small};
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
    let mut groups = cut(&job, queries);
    while queries > FEW_QUERIES && groups.len() < tasks {
        queries /= 2;
        groups = cut(&job, queries);
    }
    if groups.len() >= tasks {
        return whole(isa, pool, job, &groups);
    }
    while queries > TILE && groups.iter().map(|group| group.spans).sum::<usize>() < tasks / 2 {
        queries /= 2;
        groups = cut(&job, queries);
    }
    if groups.len() >= tasks || groups.iter().all(|group| group.spans <= 1) {
        whole(isa, pool, job, &groups);
    } else {
        by_span(isa, pool, job, &groups);
    }
}

/// Groups of at most `queries` queries.
fn cut(job: &LatentAttention<'_>, queries: usize) -> Vec<Group> {
    let heads_together = job.heads.min(queries).max(1);
    let rows_together = (queries / heads_together).max(1);
    let same = |a: &QueryRow<'_>, b: &QueryRow<'_>| std::ptr::eq(a.pages, b.pages);
    let mut groups = Vec::new();
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
    groups
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
        let visible: Vec<usize> = self.rows[group.rows.clone()]
            .iter()
            .map(|row| row.visible)
            .collect();
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
                visible: &visible,
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
fn whole(isa: Choice, pool: Option<&Pool>, job: LatentAttention<'_>, groups: &[Group]) {
    let shared = Shared::new(isa, &job);
    let (heads, value_width, each) = (job.heads, job.value_width, shared.state());
    let mut tasks = outputs(groups, heads, value_width, job.out);
    for_each_chunk(pool, &mut tasks, 1, |index, task| {
        let Some(outs) = task.first_mut() else { return };
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
        for (query, (state, out)) in total.chunks_exact(each).zip(outs.iter_mut()).enumerate() {
            let row = group.rows.start + query / group.heads.len();
            shared.finish(row, state, out);
        }
        SCRATCH.set(all);
    });
}

/// The output of each group's queries.
fn outputs<'o>(
    groups: &[Group],
    heads: usize,
    value_width: usize,
    out: &'o mut [f32],
) -> Vec<Vec<&'o mut [f32]>> {
    let mut of_query: Vec<Option<&mut [f32]>> =
        out.chunks_exact_mut(value_width).map(Some).collect();
    let mut take = |group: &Group| {
        let mut outs = Vec::with_capacity(group.queries());
        for row in group.rows.clone() {
            let of_group = &mut of_query[row * heads..][group.heads.clone()];
            outs.extend(of_group.iter_mut().filter_map(Option::take));
        }
        outs
    };
    groups.iter().map(&mut take).collect()
}

/// Every span of every group by one task; then the states are merged.
fn by_span(isa: Choice, pool: Option<&Pool>, job: LatentAttention<'_>, groups: &[Group]) {
    let shared = Shared::new(isa, &job);
    let each = shared.state();
    let mut parts = PARTS.take();
    let needed: usize = groups
        .iter()
        .map(|group| group.spans * group.queries() * each)
        .sum();
    if parts.len() < needed {
        parts.resize(needed, EMPTY);
    }
    let mut tasks = Vec::new();
    let mut rest = &mut parts[..needed];
    for group in groups {
        for span in 0..group.spans {
            let (states, more) = rest.split_at_mut(group.queries() * each);
            tasks.push((group, span, states));
            rest = more;
        }
    }
    for_each_chunk(pool, &mut tasks, 1, |_, task| {
        let Some((group, span, states)) = task.first_mut() else {
            return;
        };
        let mut all = SCRATCH.take();
        let [queries, _, _, scratch] = &mut all;
        shared.gather(group, queries);
        shared.span(group, *span, queries, states, scratch);
        SCRATCH.set(all);
    });
    let mut rest = &mut parts[..needed];
    let mut outs = outputs(groups, job.heads, job.value_width, job.out);
    let mut merges = Vec::new();
    for (group, outs) in groups.iter().zip(&mut outs) {
        let (states, more) = rest.split_at_mut(group.spans * group.queries() * each);
        merges.push((group, states, outs));
        rest = more;
    }
    for_each_chunk(pool, &mut merges, 1, |_, merge| {
        let Some((group, states, outs)) = merge.first_mut() else {
            return;
        };
        let queries = group.queries();
        for (query, out) in outs.iter_mut().enumerate() {
            let row = group.rows.start + query / group.heads.len();
            let (first, later) = states.split_at_mut((queries * each).min(states.len()));
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
    PARTS.set(parts);
}
