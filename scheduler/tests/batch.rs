//! Continuous batching: single decisions by example, invariants over random schedules.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use guild_scheduler::batch::{
    Counts, Invalid, InvalidLimits, Limits, NewRequest, RETRY_FIRST, Refusal, Scheduler, Step,
};
use proptest::prelude::*;

const NOW: Duration = Duration::ZERO;

fn limits() -> Limits {
    Limits {
        max_running: 4,
        max_waiting: 8,
        max_step_tokens: 8,
        page_tokens: 4,
        pages: 16,
        max_context: 64,
    }
}

fn scheduler(limits: Limits) -> Scheduler {
    Scheduler::new(limits).unwrap()
}

fn request(id: u64, prompt: usize, max_tokens: usize) -> NewRequest {
    NewRequest {
        id,
        prompt,
        max_tokens,
    }
}

/// `id@start+len`, with `!` where the last row yields a token.
fn show(step: &Step) -> String {
    let chunk = |c: &guild_scheduler::batch::Chunk| {
        format!(
            "{}@{}+{}{}",
            c.id,
            c.start,
            c.len,
            if c.sample { "!" } else { "" }
        )
    };
    step.chunks.iter().map(chunk).collect::<Vec<_>>().join(" ")
}

/// Runs until idle and shows every step.
fn run(scheduler: &mut Scheduler) -> Vec<String> {
    let mut steps = Vec::new();
    while !scheduler.is_idle() {
        let step = scheduler.next(NOW);
        assert!(!step.chunks.is_empty(), "stuck after {steps:?}");
        steps.push(show(&step));
        scheduler.commit(&[]);
    }
    steps
}

#[test]
fn a_prompt_is_cut_into_chunks_and_then_decodes() {
    let mut s = scheduler(limits());
    s.submit(request(1, 19, 3)).unwrap();
    assert_eq!(
        run(&mut s),
        ["1@0+8", "1@8+8", "1@16+3!", "1@19+1!", "1@20+1!"]
    );
    assert_eq!(
        s.counts(),
        Counts {
            running: 0,
            waiting: 0,
            free_pages: 16
        }
    );
}

#[test]
fn decode_rows_come_first_and_prefill_fills_the_rest() {
    let mut s = scheduler(limits());
    s.submit(request(1, 2, 3)).unwrap();
    s.submit(request(2, 9, 1)).unwrap();
    s.submit(request(3, 1, 2)).unwrap();
    assert_eq!(
        run(&mut s),
        ["1@0+2! 2@0+6", "1@2+1! 2@6+3! 3@0+1!", "1@3+1! 3@1+1!"]
    );
}

#[test]
fn a_request_without_output_runs_its_prompt_and_leaves() {
    let mut s = scheduler(limits());
    s.submit(request(1, 9, 0)).unwrap();
    assert_eq!(run(&mut s), ["1@0+8", "1@8+1"]);
}

#[test]
fn a_stop_frees_pages_for_the_next_in_line() {
    let mut s = scheduler(Limits {
        pages: 3,
        ..limits()
    });
    s.submit(request(1, 4, 8)).unwrap();
    s.submit(request(2, 4, 8)).unwrap();
    assert_eq!(show(&s.next(NOW)), "1@0+4!");
    s.commit(&[(1, true)]);
    assert_eq!(
        s.counts(),
        Counts {
            running: 0,
            waiting: 1,
            free_pages: 3
        }
    );
    assert_eq!(show(&s.next(NOW)), "2@0+4!");
}

#[test]
fn a_small_request_does_not_overtake_the_head() {
    let mut s = scheduler(Limits {
        pages: 4,
        ..limits()
    });
    s.submit(request(1, 4, 4)).unwrap();
    s.submit(request(2, 8, 4)).unwrap();
    s.submit(request(3, 1, 1)).unwrap();
    assert_eq!(
        show(&s.next(NOW)),
        "1@0+4!",
        "2 needs three pages, two are free; 3 stays behind it"
    );
}

#[test]
fn cancelling_frees_at_once_or_at_the_commit_of_the_step_that_is_out() {
    let mut s = scheduler(limits());
    s.submit(request(1, 4, 4)).unwrap();
    s.submit(request(2, 4, 4)).unwrap();
    let step = s.next(NOW);
    assert_eq!(show(&step), "1@0+4! 2@0+4!");
    assert!(s.cancel(1));
    assert_eq!(
        s.counts().free_pages,
        12,
        "its rows are still being computed"
    );
    s.commit(&[]);
    assert_eq!(s.counts().free_pages, 14);
    assert!(s.cancel(2));
    assert!(!s.cancel(2));
    assert_eq!(s.counts().free_pages, 16);
    assert!(s.is_idle());
}

#[test]
fn a_step_without_commit_never_ran() {
    let mut s = scheduler(limits());
    s.submit(request(1, 4, 4)).unwrap();
    let first = s.next(NOW);
    assert_eq!(s.next(NOW), first);
}

#[test]
fn refusals_say_why() {
    let mut s = scheduler(Limits {
        max_waiting: 1,
        pages: 4,
        ..limits()
    });
    let refused = |r: Result<(), Refusal>| match r {
        Err(Refusal::Invalid(invalid)) => invalid,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(s.submit(request(1, 0, 4))), Invalid::EmptyPrompt);
    assert!(matches!(
        refused(s.submit(request(1, 60, 5))),
        Invalid::TooLong {
            max_context: 64,
            ..
        }
    ));
    assert!(matches!(
        refused(s.submit(request(1, usize::MAX, usize::MAX))),
        Invalid::TooLong { .. }
    ));
    assert_eq!(
        refused(s.submit(request(1, 16, 1))),
        Invalid::TooLarge {
            needed: 5,
            pages: 4
        }
    );
    s.submit(request(1, 4, 4)).unwrap();
    assert_eq!(
        refused(s.submit(request(1, 4, 4))),
        Invalid::Duplicate { id: 1 }
    );
    assert_eq!(
        s.submit(request(2, 4, 4)),
        Err(Refusal::Overloaded {
            waiting: 1,
            retry_after: RETRY_FIRST
        })
    );
    assert_eq!(s.counts().waiting, 1, "a refused request leaves no trace");
}

#[test]
fn the_retry_hint_follows_the_pace_of_admissions() {
    let mut s = scheduler(Limits {
        max_waiting: 2,
        max_running: 1,
        ..limits()
    });
    for id in 0..20 {
        while let Err(refusal) = s.submit(request(id, 1, 1)) {
            assert!(matches!(refusal, Refusal::Overloaded { .. }));
            s.next(Duration::from_secs(5 * id));
            s.commit(&[]);
        }
    }
    let Err(Refusal::Overloaded { retry_after, .. }) = s.submit(request(99, 1, 1)) else {
        panic!("the queue should be full");
    };
    assert_eq!(retry_after, Duration::from_secs(5));
}

#[test]
fn limits_that_contradict_themselves_are_refused() {
    for limit in 0..6 {
        let mut l = limits();
        let field = [
            &mut l.max_running,
            &mut l.max_waiting,
            &mut l.max_step_tokens,
            &mut l.page_tokens,
            &mut l.pages,
            &mut l.max_context,
        ];
        *field.into_iter().nth(limit).unwrap() = 0;
        assert!(matches!(Scheduler::new(l), Err(InvalidLimits::Zero { .. })));
    }
    let small = Limits {
        max_step_tokens: 3,
        ..limits()
    };
    assert!(matches!(
        Scheduler::new(small),
        Err(InvalidLimits::StepTooSmall { .. })
    ));
    let many = Limits {
        pages: usize::MAX,
        ..limits()
    };
    assert!(matches!(
        Scheduler::new(many),
        Err(InvalidLimits::TooManyPages { .. })
    ));
}

#[derive(Debug, Clone)]
enum Op {
    Submit {
        prompt: usize,
        max_tokens: usize,
    },
    /// Index into all requests ever submitted.
    Cancel(usize),
    /// One step; the n-th chunk stops early where the mask says so; one request may be
    /// cancelled while the step is out.
    Step {
        stop_mask: u16,
        cancel: Option<usize>,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1usize..40, 0usize..12).prop_map(|(prompt, max_tokens)| Op::Submit { prompt, max_tokens }),
        1 => (0usize..64).prop_map(Op::Cancel),
        6 => (any::<u16>(), any::<u16>(), prop::option::weighted(0.2, 0usize..64))
            .prop_map(|(a, b, cancel)| Op::Step { stop_mask: a & b & (a >> 3), cancel }),
    ]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (1usize..6, 1usize..10, 0usize..20, 1usize..9, 1usize..40).prop_map(
        |(max_running, max_waiting, extra, page_tokens, pages)| Limits {
            max_running,
            max_waiting,
            max_step_tokens: max_running + extra,
            page_tokens,
            pages,
            max_context: 48,
        },
    )
}

/// What a request must have seen so far, kept independently of the scheduler.
#[derive(Debug)]
struct Expected {
    prompt: usize,
    max_tokens: usize,
    computed: usize,
    generated: usize,
    started: bool,
    pages: Vec<u32>,
}

struct Model {
    scheduler: Scheduler,
    live: BTreeMap<u64, Expected>,
    submitted: Vec<u64>,
}

impl Model {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: scheduler(limits),
            live: BTreeMap::new(),
            submitted: Vec::new(),
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Submit { prompt, max_tokens } => {
                let id = self.submitted.len() as u64;
                if self
                    .scheduler
                    .submit(request(id, prompt, max_tokens))
                    .is_ok()
                {
                    let expected = Expected {
                        prompt,
                        max_tokens,
                        computed: 0,
                        generated: 0,
                        started: false,
                        pages: Vec::new(),
                    };
                    self.live.insert(id, expected);
                }
                self.submitted.push(id);
            }
            Op::Cancel(which) => self.cancel(which),
            Op::Step { stop_mask, cancel } => self.step(stop_mask, cancel),
        }
        self.check_pages();
    }

    fn cancel(&mut self, which: usize) {
        if let Some(&id) = self.submitted.get(which) {
            let known = self.live.remove(&id).is_some();
            assert_eq!(self.scheduler.cancel(id), known);
        }
    }

    fn step(&mut self, stop_mask: u16, cancel: Option<usize>) {
        let limits = self.scheduler.limits().clone();
        let decoding: BTreeSet<u64> = self
            .live
            .iter()
            .filter(|(_, e)| e.started && e.computed >= e.prompt)
            .map(|(&id, _)| id)
            .collect();
        let step = self.scheduler.next(NOW);
        assert!(step.rows() <= limits.max_step_tokens, "token budget");
        assert_eq!(
            step.chunks.is_empty(),
            self.live.is_empty(),
            "work is done whenever there is some"
        );

        let mut outcomes = Vec::new();
        let mut prefilling = None;
        let mut stepped = BTreeSet::new();
        for (n, chunk) in step.chunks.iter().enumerate() {
            assert!(stepped.insert(chunk.id), "one chunk a request");
            let expected = self.live.get_mut(&chunk.id).expect("a live request");
            assert!(chunk.len > 0);
            assert_eq!(chunk.start, expected.computed, "rows are contiguous");
            let end = chunk.start + chunk.len;
            if expected.computed < expected.prompt {
                assert!(end <= expected.prompt, "a chunk never passes the prompt");
                assert!(prefilling < Some(chunk.id), "prefill in order of arrival");
                prefilling = Some(chunk.id);
            } else {
                assert_eq!(chunk.len, 1);
                assert!(prefilling.is_none(), "decode rows first");
            }
            let samples = end >= expected.prompt && expected.max_tokens > 0;
            assert_eq!(chunk.sample, samples);
            assert!(
                chunk.pages.len() * limits.page_tokens >= end,
                "pages cover the rows"
            );
            if expected.started {
                assert_eq!(expected.pages[..], chunk.pages[..], "pages never change");
            }
            expected.started = true;
            expected.pages = chunk.pages.to_vec();
            expected.computed = end;
            expected.generated += usize::from(samples);
            outcomes.push((chunk.id, stop_mask >> (n % 16) & 1 == 1));
        }
        assert!(decoding.is_subset(&stepped), "decode never waits");
        let started: Vec<bool> = self.live.values().map(|e| e.started).collect();
        assert!(
            started.is_sorted_by(|a, b| a >= b),
            "nobody overtakes: {:?}",
            self.live
        );

        if let Some(which) = cancel {
            self.cancel(which);
        }
        self.scheduler.commit(&outcomes);
        for (id, finished) in outcomes {
            let done =
                |e: &Expected| finished || (e.computed >= e.prompt && e.generated >= e.max_tokens);
            if self.live.get(&id).is_some_and(done) {
                self.live.remove(&id);
            }
        }
    }

    /// No page is held twice, and those not held are free.
    fn check_pages(&self) {
        let pages = self.scheduler.limits().pages;
        let mut held = BTreeSet::new();
        for expected in self.live.values() {
            for &page in &expected.pages {
                assert!(
                    (page as usize) < pages && held.insert(page),
                    "page {page} shared"
                );
            }
        }
        let counts = self.scheduler.counts();
        assert_eq!(counts.free_pages + held.len(), pages, "pages leaked");
        assert_eq!(counts.running + counts.waiting, self.live.len());
        assert_eq!(
            self.live.values().filter(|e| e.started).count(),
            counts.running
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_schedules_keep_the_invariants(
        limits in any_limits(),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut model = Model::new(limits);
        for op in &ops {
            model.apply(op);
        }
        // Everything that was admitted ends: every step computes a row of it or of one before.
        let mut steps = 0;
        while !model.scheduler.is_idle() {
            model.apply(&Op::Step { stop_mask: 0, cancel: None });
            steps += 1;
            prop_assert!(steps < 10_000, "no progress");
        }
        prop_assert!(model.live.is_empty());
        prop_assert_eq!(model.scheduler.counts().free_pages, model.scheduler.limits().pages);
    }
}
