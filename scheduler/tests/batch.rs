//! Continuous batching: single decisions by example.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use guild_scheduler::batch::{
    Counts, Decoded, Expiry, Invalid, InvalidLimits, Limits, NewRequest, Outcome, PREFILL_FLOOR,
    Payoff, REST_FIRST, RETRY_FIRST, Refusal, Scheduler, Step,
};

const NOW: Duration = Duration::ZERO;

fn limits() -> Limits {
    Limits {
        max_running: 4,
        max_waiting: 8,
        max_step_tokens: 8,
        page_tokens: 4,
        pages: 16,
        max_context: 64,
        ..Limits::default()
    }
}

fn scheduler(limits: Limits) -> Scheduler {
    Scheduler::new(limits).unwrap()
}

fn request(id: u64, prompt: usize, max_tokens: usize) -> NewRequest {
    NewRequest::new(id, prompt, max_tokens)
}

/// One that begins with these pages.
fn with_keys(id: u64, prompt: usize, max_tokens: usize, keys: &[u128]) -> NewRequest {
    NewRequest {
        keys: keys.to_vec(),
        ..request(id, prompt, max_tokens)
    }
}

fn stopped(id: u64) -> Outcome {
    Outcome {
        id,
        tokens: 1,
        finished: true,
        ..Outcome::default()
    }
}

fn free(s: &Scheduler) -> usize {
    s.audit().unwrap();
    s.counts().free_pages
}

/// `id@start+len`, with `~drafts` behind them, and `!` where the last row yields a token.
fn show(step: &Step) -> String {
    let chunk = |c: &guild_scheduler::batch::Chunk| {
        format!(
            "{}@{}+{}{}{}",
            c.id,
            c.start,
            c.len,
            if c.drafts > 0 {
                format!("~{}", c.drafts)
            } else {
                String::new()
            },
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
        scheduler.commit(NOW, &[]);
    }
    steps
}

#[test]
fn a_prompt_is_cut_into_chunks_and_then_decodes() {
    let mut s = scheduler(limits());
    s.submit(NOW, request(1, 19, 3)).unwrap();
    assert_eq!(
        run(&mut s),
        ["1@0+8", "1@8+8", "1@16+3!", "1@19+1!", "1@20+1!"]
    );
    assert_eq!(
        s.counts(),
        Counts {
            free_pages: 16,
            run: 21,
            ..Counts::default()
        }
    );
}

#[test]
fn decode_rows_come_first_and_prefill_fills_the_rest() {
    let mut s = scheduler(limits());
    s.submit(NOW, request(1, 2, 3)).unwrap();
    s.submit(NOW, request(2, 9, 1)).unwrap();
    s.submit(NOW, request(3, 1, 2)).unwrap();
    assert_eq!(
        run(&mut s),
        ["1@0+2! 2@0+6", "1@2+1! 2@6+3! 3@0+1!", "1@3+1! 3@1+1!"]
    );
}

#[test]
fn a_request_without_output_runs_its_prompt_and_leaves() {
    let mut s = scheduler(limits());
    s.submit(NOW, request(1, 9, 0)).unwrap();
    assert_eq!(run(&mut s), ["1@0+8", "1@8+1"]);
}

#[test]
fn a_stop_frees_pages_for_the_next_in_line() {
    let mut s = scheduler(Limits {
        pages: 3,
        ..limits()
    });
    s.submit(NOW, request(1, 9, 3)).unwrap();
    s.submit(NOW, request(2, 4, 8)).unwrap();
    assert_eq!(show(&s.next(NOW)), "1@0+8");
    s.commit(NOW, &[]);
    assert_eq!(show(&s.next(NOW)), "1@8+1!");
    s.commit(NOW, &[stopped(1)]);
    assert_eq!(
        s.counts(),
        Counts {
            waiting: 1,
            free_pages: 3,
            outstanding: 12,
            run: 9,
            ..Counts::default()
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
    s.submit(NOW, request(1, 4, 12)).unwrap();
    s.submit(NOW, request(2, 16, 0)).unwrap();
    s.submit(NOW, request(3, 1, 1)).unwrap();
    assert_eq!(
        show(&s.next(NOW)),
        "1@0+4!",
        "2 needs four pages, three are free; 3 stays behind it"
    );
}

#[test]
fn cancelling_frees_at_once_or_at_the_commit_of_the_step_that_is_out() {
    let mut s = scheduler(limits());
    s.submit(NOW, request(1, 4, 4)).unwrap();
    s.submit(NOW, request(2, 4, 4)).unwrap();
    let step = s.next(NOW);
    assert_eq!(show(&step), "1@0+4! 2@0+4!");
    assert!(s.cancel(1));
    assert_eq!(free(&s), 14, "its rows are still being computed");
    s.commit(NOW, &[]);
    assert_eq!(free(&s), 15);
    assert!(s.cancel(2));
    assert!(!s.cancel(2));
    assert_eq!(free(&s), 16);
    assert!(s.is_idle());
}

#[test]
fn a_step_without_commit_never_ran() {
    let mut s = scheduler(limits());
    s.submit(NOW, request(1, 4, 4)).unwrap();
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
    assert_eq!(
        refused(s.submit(NOW, request(1, 0, 4))),
        Invalid::EmptyPrompt
    );
    assert!(matches!(
        refused(s.submit(NOW, request(1, 60, 5))),
        Invalid::TooLong {
            max_context: 64,
            ..
        }
    ));
    assert!(matches!(
        refused(s.submit(NOW, request(1, usize::MAX, usize::MAX))),
        Invalid::TooLong { .. }
    ));
    assert_eq!(
        refused(s.submit(NOW, request(1, 16, 1))),
        Invalid::TooLarge {
            needed: 5,
            pages: 4
        }
    );
    s.submit(NOW, request(1, 4, 4)).unwrap();
    assert_eq!(
        refused(s.submit(NOW, request(1, 4, 4))),
        Invalid::Duplicate { id: 1 }
    );
    assert_eq!(
        s.submit(NOW, request(2, 4, 4)),
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
        while let Err(refusal) = s.submit(NOW, request(id, 1, 1)) {
            assert!(matches!(refusal, Refusal::Overloaded { .. }));
            s.next(Duration::from_secs(5 * id));
            s.commit(NOW, &[]);
        }
    }
    let Err(Refusal::Overloaded { retry_after, .. }) = s.submit(NOW, request(99, 1, 1)) else {
        panic!("the queue should be full");
    };
    assert_eq!(retry_after, Duration::from_secs(5));
}

#[test]
fn limits_that_contradict_themselves_are_refused() {
    for limit in 0..7 {
        let mut l = limits();
        let field = [
            &mut l.max_running,
            &mut l.max_waiting,
            &mut l.max_waiting_tokens,
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

#[test]
fn a_prompt_takes_the_longest_beginning_that_is_known_and_computes_at_least_a_token() {
    let mut s = scheduler(limits());
    s.submit(NOW, with_keys(1, 10, 1, &[7, 8])).unwrap();
    assert_eq!(run(&mut s), ["1@0+8", "1@8+2!"]);
    assert_eq!(s.counts().cached_pages, 2);
    // The same; one that is all known but for its last token; one that differs in its second page.
    for (id, length, keys, from) in [(2, 10, [7, 8], 8), (3, 8, [7, 8], 4), (4, 9, [7, 9], 4)] {
        s.submit(NOW, with_keys(id, length, 1, &keys)).unwrap();
        let step = s.next(NOW);
        let chunk = &step.chunks[0];
        assert_eq!((chunk.id, chunk.start, chunk.cached), (id, from, from));
        s.audit().unwrap();
        s.commit(NOW, &[]);
    }
    let alone = NewRequest {
        reuse: false,
        ..with_keys(5, 10, 1, &[7, 8])
    };
    s.submit(NOW, alone).unwrap();
    assert_eq!(show(&s.next(NOW)), "5@0+8", "every row is asked for");
    s.commit(NOW, &[]);
    run(&mut s);
    assert_eq!(free(&s), 16);
    s.forget();
    assert_eq!(s.counts().cached_pages, 0);
    assert_eq!(free(&s), 16);
}

#[test]
fn what_a_step_wrote_is_shared_when_the_step_went_through_and_not_before() {
    let mut s = scheduler(limits());
    s.submit(NOW, with_keys(1, 5, 4, &[7])).unwrap();
    s.submit(NOW, with_keys(2, 3, 1, &[])).unwrap();
    assert_eq!(show(&s.next(NOW)), "1@0+5! 2@0+3!");
    s.fail();
    assert!(s.is_idle(), "a step that fails takes its requests along");
    assert_eq!((free(&s), s.counts().cached_pages), (16, 0));
    s.submit(NOW, with_keys(3, 5, 4, &[7])).unwrap();
    s.submit(NOW, with_keys(4, 5, 1, &[7])).unwrap();
    assert_eq!(
        show(&s.next(NOW)),
        "3@0+5! 4@0+3",
        "at the same time: each for itself"
    );
    s.commit(NOW, &[]);
    s.submit(NOW, with_keys(5, 5, 1, &[7])).unwrap();
    assert_eq!(show(&s.next(NOW)), "3@5+1! 4@3+2! 5@4+1!");
}

#[test]
fn output_pages_are_shared_once_their_keys_are_known() {
    let mut s = scheduler(limits());
    s.submit(NOW, with_keys(1, 3, 4, &[])).unwrap();
    for n in 0..3 {
        s.next(NOW);
        let outcome = Outcome {
            id: 1,
            tokens: 1,
            keys: if n == 1 { vec![7] } else { vec![] },
            ..Outcome::default()
        };
        s.commit(NOW, &[outcome]);
    }
    s.submit(NOW, with_keys(2, 6, 1, &[7])).unwrap();
    assert_eq!(show(&s.next(NOW)), "1@5+1! 2@4+2!");
}

#[test]
fn pages_that_nobody_holds_are_reclaimed_the_longest_unused_first_and_from_their_end() {
    let mut s = scheduler(Limits {
        pages: 4,
        ..limits()
    });
    for (id, keys) in [(1, [1, 2]), (2, [3, 4])] {
        s.submit(NOW, with_keys(id, 8, 0, &keys)).unwrap();
        run(&mut s);
    }
    assert_eq!((free(&s), s.counts().cached_pages), (4, 4));
    s.submit(NOW, request(3, 4, 0)).unwrap();
    run(&mut s);
    assert_eq!(s.counts().cached_pages, 3);
    s.submit(NOW, with_keys(4, 9, 0, &[1, 2])).unwrap();
    assert_eq!(
        show(&s.next(NOW)),
        "4@4+5",
        "the second page is gone, the first is not"
    );
    s.commit(NOW, &[]);
    s.submit(NOW, with_keys(5, 9, 0, &[3, 4])).unwrap();
    assert_eq!(
        show(&s.next(NOW)),
        "5@4+5",
        "two pages were needed, one was free"
    );
}

#[test]
fn when_pages_run_out_the_last_to_come_starts_again_and_comes_back_first() {
    let mut s = scheduler(Limits {
        pages: 4,
        ..limits()
    });
    s.submit(NOW, request(1, 4, 9)).unwrap();
    s.submit(NOW, request(2, 3, 6)).unwrap();
    s.submit(NOW, request(3, 1, 1)).unwrap();
    let mut steps = Vec::new();
    while !s.is_idle() {
        steps.push(show(&s.next(NOW)));
        s.audit().unwrap();
        s.commit(NOW, &[]);
    }
    assert_eq!(
        steps,
        [
            "1@0+4! 2@0+3! 3@0+1!",
            "1@4+1! 2@3+1!",
            "1@5+1! 2@4+1!",
            "1@6+1! 2@5+1!",
            "1@7+1! 2@6+1!",
            // There is no third page for the first one.
            "1@8+1!",
            "1@9+1!",
            "1@10+1!",
            "1@11+1!",
            "2@0+8!",
        ]
    );
    assert_eq!(free(&s), 4);
}

#[test]
fn lower_priorities_go_first_and_are_preempted_last() {
    let mut s = scheduler(Limits {
        max_running: 1,
        ..limits()
    });
    for (id, priority) in [(1, 5), (2, 0), (3, -1), (4, 0)] {
        let request = NewRequest {
            priority,
            ..request(id, 2, 1)
        };
        s.submit(NOW, request).unwrap();
    }
    assert_eq!(run(&mut s), ["3@0+2!", "2@0+2!", "4@0+2!", "1@0+2!"]);
}

#[test]
fn tenants_take_turns_however_much_one_of_them_asks() {
    let mut s = scheduler(Limits {
        max_running: 1,
        ..limits()
    });
    for id in 0..8 {
        let tenant = u64::from(id >= 6);
        let request = NewRequest {
            tenant,
            ..request(id, 2, 1)
        };
        s.submit(NOW, request).unwrap();
    }
    let order: Vec<String> = run(&mut s)
        .iter()
        .map(|step| step[..1].to_owned())
        .collect();
    assert_eq!(order.concat(), "06172345");
}

#[test]
fn a_request_whose_time_is_over_is_let_go_of() {
    let mut s = scheduler(Limits {
        max_running: 1,
        ..limits()
    });
    let second = Duration::from_secs(1);
    let late = NewRequest {
        deadline: Some(2 * second),
        ..request(1, 2, 9)
    };
    let waits = NewRequest {
        start_by: Some(second),
        ..request(2, 2, 9)
    };
    s.submit(NOW, late).unwrap();
    s.submit(NOW, waits).unwrap();
    assert_eq!(show(&s.next(NOW)), "1@0+2!");
    s.commit(NOW, &[]);
    let step = s.next(second);
    assert_eq!(step.expired, [(2, Expiry::Queue)]);
    assert_eq!(show(&step), "1@2+1!");
    s.commit(NOW, &[]);
    let step = s.next(2 * second);
    assert_eq!(
        (step.chunks.len(), step.expired),
        (0, vec![(1, Expiry::Deadline)])
    );
    assert!(s.is_idle());
    assert_eq!(free(&s), 16);
}

#[test]
fn a_request_that_would_wait_too_long_is_refused_at_once() {
    let mut s = scheduler(Limits {
        max_running: 1,
        max_waiting_tokens: 40,
        max_wait: Some(Duration::from_secs(60)),
        ..limits()
    });
    // One admission in ten seconds.
    let mut now = NOW;
    for id in 0..4 {
        s.submit(now, request(id, 1, 2)).unwrap();
    }
    for _ in 0..5 {
        s.next(now);
        s.commit(NOW, &[]);
        now += Duration::from_secs(5);
    }
    assert_eq!((s.counts().running, s.counts().waiting), (1, 1));
    let hurried = NewRequest {
        start_by: Some(now + Duration::from_secs(9)),
        ..request(10, 1, 1)
    };
    let refused = Err(Refusal::TooLate {
        expected: Duration::from_secs(10),
        retry_after: Duration::from_secs(10),
    });
    assert_eq!(s.submit(now, hurried.clone()), refused);
    let first = NewRequest {
        priority: -1,
        ..hurried
    };
    s.submit(now, first).unwrap();
    let large = s.submit(now, request(11, 40, 1));
    assert!(
        matches!(large, Err(Refusal::Overloaded { .. })),
        "{large:?}"
    );
    for id in 20..26 {
        let taken = s.submit(now, request(id, 1, 1));
        assert_eq!(taken.is_ok(), id < 25, "{id}: {taken:?}");
    }
}

#[test]
fn drafts_are_rows_that_may_hold() {
    let mut s = scheduler(Limits {
        drafts: 2,
        pages: 3,
        ..limits()
    });
    let said = |tokens, drafts| Outcome {
        id: 1,
        tokens,
        drafts,
        ..Outcome::default()
    };
    s.submit(NOW, request(1, 3, 7)).unwrap();
    let mut steps = Vec::new();
    for (tokens, drafts) in [(1, 2), (1, 2), (3, 1), (2, 2)] {
        steps.push(show(&s.next(NOW)));
        s.audit().unwrap();
        s.commit(NOW, &[said(tokens, drafts)]);
    }
    assert_eq!(
        steps,
        ["1@0+3!", "1@3+1~2!", "1@4+1~2!", "1@7+1~1!"],
        "a draft beyond max_tokens is not tried"
    );
    assert!(s.is_idle());
    assert_eq!(free(&s), 3);
}

/// A machine on which a step costs five milliseconds, a decode row a tenth of one and a prefill row more
/// and more as its prompt goes on.
fn seconds(step: &Step) -> f64 {
    let cost = |c: &guild_scheduler::batch::Chunk| match c.len {
        1 => 0.1e-3,
        rows => rows as f64 * (0.2e-3 + c.start as f64 * 2e-8),
    };
    5e-3 + step.chunks.iter().map(cost).sum::<f64>()
}

#[test]
fn a_long_prompt_neither_holds_up_those_who_decode_nor_stands_still() {
    let limits = Limits {
        max_running: 16,
        max_waiting: 16,
        max_step_tokens: 2048,
        itl_target: Some(Duration::from_millis(50)),
        page_tokens: 16,
        pages: 4096,
        max_context: 40_000,
        ..Limits::default()
    };
    let mut s = scheduler(limits);
    for id in 0..8 {
        s.submit(NOW, request(id, 8, 2000)).unwrap();
    }
    for _ in 0..4 {
        let took = Duration::from_secs_f64(seconds(&s.next(NOW)));
        s.commit(took, &[]);
    }
    s.submit(NOW, request(100, 32_768, 4)).unwrap();
    let (mut steps, mut late, mut total) = (0, 0, 0.0);
    while s.contains(100) {
        let step = s.next(NOW);
        let rows = step.chunks.iter().filter(|c| c.id < 8).count();
        assert_eq!(rows, 8, "everybody decodes in every step");
        let long = step.chunks.iter().find(|c| c.id == 100).unwrap();
        let to_go = 32_768usize.saturating_sub(long.start);
        assert!(long.len >= PREFILL_FLOOR.min(to_go.max(1)), "{long:?}");
        let took = seconds(&step);
        late += usize::from(took > 0.055);
        steps += 1;
        total += took;
        s.commit(Duration::from_secs_f64(took), &[]);
    }
    assert!(late <= 1, "{late} of {steps} steps were late");
    // All rows alone would be 17 s of prefill.
    assert!(total < 30.0, "{total} s for the prompt");
}

/// Runs a payoff for so many steps of `requests(step)` requests; a draft holds with a probability, in percent, and
/// a step with drafts takes so much longer, in percent. How many steps had drafts.
fn drafted_of(
    payoff: &mut Payoff,
    requests: impl Fn(u64) -> usize,
    steps: u64,
    holds: u64,
    dearer: u64,
) -> u64 {
    let (mut drafted, mut next) = (0, false);
    for step in 0..steps {
        let requests = requests(step);
        let drafts = if next { requests } else { 0 };
        drafted += u64::from(next);
        let held = (0..drafts as u64)
            .filter(|n| (step * 37 + n * 61) % 100 < holds)
            .count();
        payoff.observe(Decoded {
            requests,
            tokens: requests + held,
            drafts,
            took: Duration::from_micros(if next { 1000 + 10 * dearer } else { 1020 }),
            drafting: Duration::from_micros(20),
        });
        next = payoff.pays() && !payoff.measures_plain();
    }
    drafted
}

fn drafted(payoff: &mut Payoff, requests: usize, steps: u64, holds: u64, dearer: u64) -> u64 {
    drafted_of(payoff, |_| requests, steps, holds, dearer)
}

#[test]
fn drafting_goes_on_where_it_pays_and_rests_where_it_does_not() {
    let mut payoff = Payoff::new();
    assert!(
        drafted(&mut payoff, 1, 4000, 60, 20) > 3500,
        "1.6 tokens for 1.2 steps"
    );
    let lost = drafted(&mut payoff, 16, 4000, 60, 80);
    assert!(lost < 100, "1.6 tokens for 1.8 steps, and yet {lost} steps");
    assert!(
        drafted(&mut payoff, 1, 1000, 60, 20) > 700,
        "it depends on how many decode"
    );
    // It is tried again, and stays where things have changed.
    let before = drafted(&mut payoff, 16, 16 * REST_FIRST, 60, 20);
    assert!(before > 1000, "{before}");
    assert!(drafted(&mut payoff, 16, 1000, 60, 20) > 800);
}

#[test]
fn requests_that_come_and_go_do_not_have_drafting_tried_again() {
    let mut payoff = Payoff::new();
    // Now and then all but a few end together.
    let requests = |step: u64| match step % 60 {
        few @ 0..4 => 1 + few as usize,
        _ => 8,
    };
    let lost = drafted_of(&mut payoff, requests, 8000, 60, 80);
    assert!(lost < 150, "{lost} steps");
}
