//! Places in the queue are shared: whoever asks for little gets in, however much others ask for.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use guild_scheduler::batch::{Expiry, Limits, NewRequest, Refusal, Scheduler};
use proptest::prelude::*;

const NOW: Duration = Duration::ZERO;
const PROMPT: usize = 4;

fn limits(max_waiting: usize) -> Limits {
    Limits {
        max_running: 2,
        max_waiting,
        max_step_tokens: 16,
        page_tokens: 4,
        pages: 1024,
        max_context: 64,
        ..Limits::default()
    }
}

fn of(tenant: u64, id: u64) -> NewRequest {
    NewRequest {
        tenant,
        ..NewRequest::new(id, PROMPT, 2)
    }
}

/// Who waits, as the clients know it.
#[derive(Default)]
struct Queue {
    /// Tenants by request.
    waiting: BTreeMap<u64, u64>,
    begun: BTreeSet<u64>,
    displaced: BTreeSet<u64>,
}

impl Queue {
    fn places(&self, tenant: u64) -> usize {
        self.waiting.values().filter(|&&of| of == tenant).count()
    }

    fn tenants(&self) -> BTreeSet<u64> {
        self.waiting.values().copied().collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_tenant_with_no_more_than_its_share_is_let_in_and_stays(
        max_waiting in 1usize..12,
        actions in prop::collection::vec((0u64..5, 0u32..10), 1..200),
    ) {
        let mut s = Scheduler::new(limits(max_waiting)).unwrap();
        let mut queue = Queue::default();
        for (id, (tenant, what)) in (0..).zip(actions) {
            // The first tenant asks far more often than all the others.
            let tenant = if what < 6 { 0 } else { tenant };
            let before = queue.places(tenant);
            let mut all = queue.tenants();
            all.insert(tenant);
            let within = before < max_waiting / all.len();
            match s.submit(NOW, of(tenant, id)) {
                Ok(()) => {
                    let all = queue.waiting.clone().into_iter();
                    for (gone, whose) in all.filter(|&(id, _)| !s.contains(id)) {
                        queue.waiting.remove(&gone);
                        prop_assert_eq!(queue.waiting.len() + 1, max_waiting);
                        prop_assert!(queue.places(whose) > before, "{whose} had no more");
                        queue.displaced.insert(gone);
                    }
                    queue.waiting.insert(id, tenant);
                }
                Err(Refusal::Overloaded { waiting, .. }) => {
                    prop_assert!(!within, "{before} of {max_waiting} places, {} tenants", all.len());
                    prop_assert_eq!(waiting, max_waiting);
                }
                Err(other) => prop_assert!(false, "{other:?}"),
            }
            if what % 3 == 0 {
                let step = s.next(NOW);
                for (gone, expiry) in step.expired {
                    prop_assert_eq!(expiry, Expiry::Displaced);
                    prop_assert!(!queue.begun.contains(&gone), "{gone} had begun");
                    prop_assert!(queue.displaced.remove(&gone), "{gone} had its place");
                }
                for chunk in &step.chunks {
                    queue.waiting.remove(&chunk.id);
                    queue.begun.insert(chunk.id);
                }
                s.commit(NOW, &[]);
                s.audit().unwrap();
                prop_assert_eq!(s.counts().waiting, queue.waiting.len());
            }
            prop_assert!(s.counts().waiting <= max_waiting);
        }
        // Everybody is told what became of them, and all pages come back.
        while !s.is_idle() {
            for (gone, _) in s.next(NOW).expired {
                queue.displaced.remove(&gone);
            }
            s.commit(NOW, &[]);
        }
        prop_assert!(queue.displaced.is_empty());
        prop_assert_eq!(s.counts().free_pages, 1024);
    }
}

#[test]
fn the_newest_of_whoever_has_most_gives_way_and_nobody_for_a_tenant_of_as_many() {
    let mut s = Scheduler::new(limits(4)).unwrap();
    for id in 0..4 {
        s.submit(NOW, of(0, id)).unwrap();
    }
    let full = |refused| matches!(refused, Err(Refusal::Overloaded { waiting: 4, .. }));
    assert!(full(s.submit(NOW, of(0, 9))), "its own places");
    s.submit(NOW, of(1, 10)).unwrap();
    s.submit(NOW, of(1, 11)).unwrap();
    assert!(full(s.submit(NOW, of(1, 12))), "two each");
    s.submit(NOW, of(2, 20)).unwrap();
    assert!(!s.contains(3) && !s.contains(2) && !s.contains(11));
    let displaced = [3, 2, 11].map(|id| (id, Expiry::Displaced));
    assert_eq!(s.next(NOW).expired, displaced);
    assert_eq!(s.next(NOW).expired, [], "told once");
}

#[test]
fn prompts_that_wait_are_shared_by_their_tokens() {
    let mut s = Scheduler::new(Limits {
        max_waiting_tokens: 60,
        ..limits(16)
    })
    .unwrap();
    let long = |tenant, id, prompt| NewRequest {
        tenant,
        ..NewRequest::new(id, prompt, 1)
    };
    s.submit(NOW, long(0, 0, 25)).unwrap();
    s.submit(NOW, long(0, 1, 25)).unwrap();
    let refused = s.submit(NOW, long(1, 10, 40));
    assert!(
        matches!(refused, Err(Refusal::Overloaded { .. })),
        "more than what is left to them"
    );
    s.submit(NOW, long(1, 11, 20)).unwrap();
    assert!(!s.contains(1) && s.contains(0));
}

#[test]
fn a_tenant_that_asks_for_little_is_not_told_that_the_others_queue_is_long() {
    let mut s = Scheduler::new(Limits {
        max_running: 1,
        max_wait: Some(Duration::from_secs(35)),
        ..limits(64)
    })
    .unwrap();
    // One admission in ten seconds.
    let mut now = NOW;
    for id in 0..8 {
        s.submit(now, of(0, id)).unwrap();
    }
    for _ in 0..8 {
        s.next(now);
        s.commit(NOW, &[]);
        now += Duration::from_secs(5);
    }
    let late = s.submit(now, of(0, 20));
    assert!(matches!(late, Err(Refusal::TooLate { .. })), "{late:?}");
    s.submit(now, of(1, 21)).unwrap();
}
