//! Requests whose pages come from elsewhere: they hold what they need, get no rows before it is there,
//! and give everything back.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use guild_scheduler::batch::{Arrival, Limits, NewRequest, Outcome, Scheduler, Step};

const NOW: Duration = Duration::ZERO;

fn scheduler(pages: usize) -> Scheduler {
    Scheduler::new(Limits {
        max_running: 4,
        max_waiting: 8,
        max_step_tokens: 16,
        page_tokens: 4,
        pages,
        max_context: 64,
        ..Limits::default()
    })
    .unwrap()
}

/// A request of 14 tokens, of which three pages can come from elsewhere.
fn arriving(id: u64) -> NewRequest {
    NewRequest {
        arrives: true,
        keys: (0..3).map(|page| u128::from(id) << 8 | page).collect(),
        ..NewRequest::new(id, 14, 2)
    }
}

fn rows(step: &Step) -> Vec<(u64, usize, usize)> {
    step.chunks.iter().map(|c| (c.id, c.start, c.len)).collect()
}

fn place(scheduler: &Scheduler, id: u64) -> Option<usize> {
    match scheduler.arrival(id) {
        Arrival::Page { index, .. } => Some(index),
        Arrival::NotYet | Arrival::Over => None,
    }
}

fn ends(id: u64) -> Outcome {
    Outcome {
        id,
        finished: true,
        ..Outcome::default()
    }
}

#[test]
fn it_goes_on_with_its_tail_when_the_last_page_has_come_and_others_are_not_held_up() {
    let mut s = scheduler(16);
    s.submit(NOW, arriving(1)).unwrap();
    assert_eq!(s.arrival(1), Arrival::NotYet);
    s.submit(NOW, NewRequest::new(2, 5, 1)).unwrap();
    let step = s.next(NOW);
    assert_eq!(rows(&step), [(2, 0, 5)], "the other one computes");
    for page in 0..3 {
        assert_eq!(place(&s, 1), Some(page));
        s.arrived(1);
        s.audit().unwrap();
    }
    assert_eq!(s.arrival(1), Arrival::Over);
    s.commit(NOW, &[]);
    assert_eq!(rows(&s.next(NOW)), [(1, 12, 2)]);
    // What has come is known to others now, and to whoever asks for it by name.
    assert!(s.page_of(1 << 8 | 2).is_some());
    s.commit(NOW, &[ends(1)]);
    s.audit().unwrap();
    assert_eq!(s.counts().free_pages, 16);
    // It is found here: nothing has to come.
    let again = NewRequest {
        id: 3,
        ..arriving(1)
    };
    s.submit(NOW, again).unwrap();
    assert_eq!(rows(&s.next(NOW)), [(3, 12, 2)]);
}

#[test]
fn what_does_not_come_is_computed_from_where_the_pages_end() {
    for came in 0..3 {
        let mut s = scheduler(16);
        s.submit(NOW, arriving(1)).unwrap();
        assert!(s.next(NOW).chunks.is_empty());
        for _ in 0..came {
            s.arrived(1);
        }
        s.await_no_more(1);
        assert_eq!(s.arrival(1), Arrival::Over);
        // Too late.
        s.arrived(1);
        assert_eq!(rows(&s.next(NOW)), [(1, came * 4, 14 - came * 4)]);
    }
    // Before it was admitted.
    let mut s = scheduler(16);
    s.submit(NOW, arriving(1)).unwrap();
    s.await_no_more(1);
    assert_eq!(rows(&s.next(NOW)), [(1, 0, 14)]);
}

#[test]
fn whoever_leaves_while_it_waits_for_pages_gives_all_of_them_back() {
    let mut s = scheduler(16);
    s.submit(NOW, arriving(1)).unwrap();
    assert!(s.next(NOW).chunks.is_empty());
    s.arrived(1);
    assert_eq!(s.counts().free_pages, 12);
    assert!(s.cancel(1));
    assert_eq!((s.counts().free_pages, s.counts().cached_pages), (16, 1));
    assert_eq!(s.arrival(1), Arrival::Over);
    s.arrived(1);
    s.await_no_more(1);
    s.audit().unwrap();
    assert!(s.is_idle());

    let late = NewRequest {
        deadline: Some(Duration::from_secs(1)),
        ..arriving(2)
    };
    s.submit(NOW, late).unwrap();
    assert!(s.next(NOW).chunks.is_empty());
    assert_eq!(s.next(Duration::from_secs(2)).expired.len(), 1);
    assert!(s.is_idle() && s.arrival(2) == Arrival::Over);
    assert_eq!(s.counts().free_pages, 16);
}

#[test]
fn one_that_is_preempted_waits_no_more() {
    let mut s = scheduler(7);
    s.submit(NOW, NewRequest::new(1, 11, 16)).unwrap();
    s.next(NOW);
    s.commit(NOW, &[]);
    s.submit(NOW, arriving(2)).unwrap();
    let mut steps = 0;
    while s.counts().preemptions == 0 {
        s.next(NOW);
        s.commit(NOW, &[]);
        s.audit().unwrap();
        steps += 1;
        assert!(steps < 10, "{:?}", s.counts());
    }
    assert_eq!(s.arrival(2), Arrival::Over);
    while s.contains(2) {
        s.next(NOW);
        s.commit(NOW, &[]);
        s.audit().unwrap();
        steps += 1;
        assert!(steps < 60, "it is computed here");
    }
}
