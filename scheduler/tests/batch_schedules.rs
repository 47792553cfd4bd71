//! Continuous batching under thousands of random schedules, against what a request must see and what
//! pages must hold, kept independently of the scheduler.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use guild_scheduler::batch::{Chunk, Expiry, Limits, NewRequest, Outcome, Scheduler, Step};

/// Deterministic numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// A request as its owner sees it: tokens are numbers, and keys are the tokens they stand for.
#[derive(Debug)]
struct Expected {
    prompt: usize,
    max_tokens: usize,
    tokens: Vec<u8>,
    reuse: bool,
    /// Positions that were computed since it was last admitted.
    computed: usize,
    keys: usize,
    started: bool,
    deadline: Option<Duration>,
}

/// What every page holds, by position in it; and the keys made so far.
struct World {
    seed: u64,
    random: Random,
    scheduler: Scheduler,
    live: BTreeMap<u64, Expected>,
    contents: Vec<Vec<Option<Vec<u8>>>>,
    keys: BTreeMap<Vec<u8>, u128>,
    next_id: u64,
    now: Duration,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random(seed);
        let max_running = 1 + random.below(6);
        let page_tokens = 1 + random.below(6);
        let pages = 1 + random.below(30);
        let limits = Limits {
            max_running,
            max_waiting: 1 + random.below(9),
            max_waiting_tokens: 20 + random.below(200),
            max_wait: None,
            max_step_tokens: max_running + random.below(20),
            itl_target: [None, Some(Duration::from_millis(20))][random.below(2)],
            drafts: random.below(4),
            page_tokens,
            pages,
            max_context: 48,
            ..Limits::default()
        };
        World {
            seed,
            random,
            contents: vec![vec![None; page_tokens]; pages],
            scheduler: Scheduler::new(limits).unwrap(),
            live: BTreeMap::new(),
            keys: BTreeMap::new(),
            next_id: 0,
            now: Duration::ZERO,
        }
    }

    fn key(&mut self, tokens: &[u8]) -> u128 {
        let next = self.keys.len() as u128;
        *self.keys.entry(tokens.to_vec()).or_insert(next)
    }

    fn submit(&mut self) {
        // Few tokens and a common beginning: prompts often start the same way.
        let prompt = 1 + self.random.below(30);
        let common = self.random.below(prompt + 1);
        let mut tokens: Vec<u8> = (0..common).map(|at| at as u8 % 3).collect();
        tokens.extend((common..prompt).map(|_| self.random.below(2) as u8));
        let max_tokens = self.random.below(12);
        let page = self.scheduler.limits().page_tokens;
        let keys = self.random.below(5).min(1) * prompt / page;
        let deadline = match self.random.below(8) {
            0 => Some(self.now + Duration::from_millis(self.random.below(200) as u64)),
            _ => None,
        };
        let request = NewRequest {
            priority: self.random.below(3) as i32 - 1,
            tenant: self.random.below(3) as u64,
            deadline,
            reuse: self.random.below(5) > 0,
            keys: (1..=keys).map(|n| self.key(&tokens[..n * page])).collect(),
            ..NewRequest::new(self.next_id, prompt, max_tokens)
        };
        let expected = Expected {
            prompt,
            max_tokens,
            tokens,
            reuse: request.reuse,
            computed: 0,
            keys,
            started: false,
            deadline,
        };
        if self.scheduler.submit(self.now, request).is_ok() {
            self.live.insert(self.next_id, expected);
        }
        self.next_id += 1;
    }

    fn cancel(&mut self) {
        let ids: Vec<u64> = self.live.keys().copied().collect();
        if !ids.is_empty() {
            let id = ids[self.random.below(ids.len())];
            self.live.remove(&id);
            assert!(self.scheduler.cancel(id));
            assert!(!self.scheduler.contains(id) || !self.scheduler.is_idle());
        }
    }

    /// One row of a request is computed: everything before it must be there.
    fn compute(&mut self, chunk: &Chunk, position: usize, tokens: &[u8]) {
        let page = self.scheduler.limits().page_tokens;
        let seed = self.seed;
        for at in 0..position {
            let seen = &self.contents[chunk.pages[at / page] as usize][at % page];
            let whole = seen.as_deref();
            assert_eq!(
                whole,
                Some(&tokens[..=at]),
                "seed {seed}: {chunk:?} reads position {at}"
            );
        }
        let to = chunk.pages[position / page] as usize;
        self.contents[to][position % page] = Some(tokens[..=position].to_vec());
    }

    fn step(&mut self) -> Step {
        let step = self.scheduler.next(self.now);
        self.scheduler
            .audit()
            .unwrap_or_else(|wrong| panic!("seed {}: {wrong}", self.seed));
        for (id, expiry) in &step.expired {
            let gone = self.live.remove(id).unwrap();
            match expiry {
                Expiry::Displaced => assert!(!gone.started, "seed {}", self.seed),
                _ => assert!(gone.deadline.unwrap() <= self.now),
            }
        }
        let limits = self.scheduler.limits().clone();
        assert!(step.rows() <= limits.max_step_tokens, "token budget");
        let nobody = self.live.is_empty();
        assert_eq!(
            step.chunks.is_empty(),
            nobody,
            "seed {}: work is done",
            self.seed
        );
        let mut written = BTreeSet::new();
        let mut seen = BTreeSet::new();
        for chunk in &step.chunks {
            assert!(seen.insert(chunk.id), "one chunk a request");
            let expected = &self.live[&chunk.id];
            let end = chunk.start + chunk.len;
            let known = expected.tokens.len();
            assert!(chunk.len > 0 && end <= known);
            assert_eq!(chunk.sample, end == known && expected.max_tokens > 0);
            assert!(chunk.drafts == 0 || (chunk.sample && chunk.len == 1));
            assert!(end + chunk.drafts < expected.prompt + expected.max_tokens.max(1) + 1);
            if !expected.reuse && known == expected.prompt && expected.computed == 0 {
                assert_eq!(chunk.start, 0, "every row is run");
            }
            // It goes on where it was, or begins again.
            assert!(chunk.start == expected.computed || chunk.start % limits.page_tokens == 0);
            for position in chunk.start..end + chunk.drafts {
                let page = chunk.pages[position / limits.page_tokens];
                assert!(
                    written.insert((page, position % limits.page_tokens)),
                    "written twice"
                );
            }
        }
        step
    }

    /// Runs a step: the drafts hold as they happen to.
    fn run(&mut self) {
        let before: BTreeSet<u64> = self.decoding();
        let step = self.step();
        let preempted = self.scheduler.counts().preemptions;
        let mut outcomes = Vec::new();
        let mut chosen = Vec::new();
        for chunk in &step.chunks {
            let mut tokens = self.live[&chunk.id].tokens.clone();
            let end = chunk.start + chunk.len;
            for position in chunk.start..end {
                self.compute(chunk, position, &tokens);
            }
            let mut new = 0;
            if chunk.sample {
                let holds = self.random.below(chunk.drafts + 1);
                for draft in 0..=chunk.drafts {
                    if draft <= holds {
                        tokens.push(self.random.below(2) as u8);
                        new += 1;
                    }
                    if draft < chunk.drafts {
                        let mut drafted = tokens[..(end + draft).min(tokens.len())].to_vec();
                        drafted.resize(end + draft, 9);
                        drafted.push(if draft < holds {
                            tokens[end + draft]
                        } else {
                            9
                        });
                        self.compute_draft(chunk, end + draft, &drafted);
                    }
                }
            }
            chosen.push((chunk.id, tokens, end + new - usize::from(new > 0), new));
        }
        // Somebody may leave while the step is out.
        if self.random.below(6) == 0 {
            self.cancel();
        }
        let fails = self.random.below(25) == 0;
        if fails {
            self.scheduler.fail();
            for chunk in &step.chunks {
                self.live.remove(&chunk.id);
            }
        } else {
            for (id, tokens, computed, new) in chosen {
                outcomes.extend(self.settle(id, tokens, computed, new));
            }
            let took = Duration::from_millis(1 + step.rows() as u64);
            self.now += took;
            self.scheduler.commit(took, &outcomes);
        }
        self.scheduler
            .audit()
            .unwrap_or_else(|wrong| panic!("seed {}: {wrong}", self.seed));
        for id in before {
            let took_part = step.chunks.iter().any(|chunk| chunk.id == id);
            let gone = !self.live.contains_key(&id);
            assert!(took_part || gone || preempted > 0, "decode never waits");
        }
        assert!(self.live.keys().all(|&id| self.scheduler.contains(id)));
    }

    /// A drafted row: it reads what is before it, right or wrong, and writes where it may.
    fn compute_draft(&mut self, chunk: &Chunk, position: usize, tokens: &[u8]) {
        let page = self.scheduler.limits().page_tokens;
        let to = chunk.pages[position / page] as usize;
        self.contents[to][position % page] = Some(tokens.to_vec());
    }

    fn settle(&mut self, id: u64, tokens: Vec<u8>, computed: usize, new: usize) -> Option<Outcome> {
        let page = self.scheduler.limits().page_tokens;
        let finished = self.random.below(20) == 0;
        let drafts = self.random.below(4);
        let with_keys = self.random.below(4) > 0;
        let expected = self.live.get_mut(&id)?;
        expected.tokens = tokens;
        expected.computed = computed;
        expected.started = true;
        let mut keys = Vec::new();
        let known: Vec<u8> = expected.tokens.clone();
        if with_keys {
            let from = expected.keys + 1;
            expected.keys = expected.keys.max(known.len() / page);
            let to = expected.keys;
            keys = (from..=to).map(|n| self.key(&known[..n * page])).collect();
        }
        let expected = &self.live[&id];
        let generated = expected.tokens.len() - expected.prompt;
        let done = computed >= expected.prompt && generated >= expected.max_tokens;
        if finished || done {
            self.live.remove(&id);
        }
        Some(Outcome {
            id,
            tokens: new,
            drafts,
            finished,
            keys,
            private: false,
        })
    }

    fn decoding(&self) -> BTreeSet<u64> {
        let decodes = |e: &Expected| e.computed > 0 && e.tokens.len() > e.prompt;
        let live = self
            .live
            .iter()
            .filter(|(_, e)| decodes(e) && e.computed + 1 == e.tokens.len());
        live.map(|(&id, _)| id).collect()
    }
}

#[test]
fn random_schedules_keep_the_invariants() {
    let (mut preempted, mut cached) = (0, 0);
    for seed in 0..6000 {
        let mut world = World::new(seed);
        for _ in 0..60 {
            match world.random.below(10) {
                0..4 => world.submit(),
                4 => world.cancel(),
                _ => world.run(),
            }
            world.scheduler.audit().unwrap();
        }
        let mut steps = 0;
        while !world.scheduler.is_idle() {
            world.run();
            steps += 1;
            assert!(
                steps < 3000,
                "seed {seed}: no progress with {:?}",
                world.live
            );
        }
        assert!(world.live.is_empty(), "seed {seed}: {:?}", world.live);
        let counts = world.scheduler.counts();
        assert_eq!(
            counts.free_pages,
            world.scheduler.limits().pages,
            "seed {seed}: leaked"
        );
        preempted += counts.preemptions;
        cached += counts.cached_pages;
        world.scheduler.forget();
        assert_eq!(world.scheduler.counts().cached_pages, 0);
        world.scheduler.audit().unwrap();
    }
    assert!(
        preempted > 300 && cached > 1000,
        "{preempted} preempted, {cached} cached"
    );
}

/// Requests of so many tenants that are always waiting, and what each was served after so many steps.
fn served_after(seed: u64, tenants: u64, steps: usize) -> (Vec<u64>, usize) {
    let mut random = Random(seed);
    let limits = Limits {
        max_running: 1 + random.below(8),
        max_waiting: 10_000,
        max_step_tokens: 32,
        page_tokens: 4,
        pages: 64,
        max_context: 64,
        ..Limits::default()
    };
    let (max_running, longest) = (limits.max_running, limits.max_context);
    let mut scheduler = Scheduler::new(limits).unwrap();
    let mut id = 0;
    for _ in 0..steps {
        for tenant in 0..tenants {
            // The first one asks for ten times as much.
            for _ in 0..if tenant == 0 { 10 } else { 1 } {
                let request = NewRequest {
                    tenant,
                    ..NewRequest::new(id, 1 + random.below(20), 1 + random.below(20))
                };
                let _ = scheduler.submit(Duration::ZERO, request);
                id += 1;
            }
        }
        scheduler.next(Duration::ZERO);
        scheduler.commit(Duration::ZERO, &[]);
    }
    let served = (0..tenants).map(|tenant| scheduler.served(tenant));
    (served.collect(), 2 * max_running * longest)
}

#[test]
fn tenants_that_always_wait_are_served_alike() {
    for seed in 0..20 {
        let (served, bound) = served_after(seed, 4, 250);
        let (most, least) = (served.iter().max().unwrap(), served.iter().min().unwrap());
        assert!(
            most - least <= bound as u64,
            "seed {seed}: {served:?}, bound {bound}"
        );
    }
}

#[test]
fn a_tenant_that_was_away_brings_no_credit_along() {
    let limits = Limits {
        max_running: 1,
        max_waiting: 1000,
        max_step_tokens: 64,
        page_tokens: 4,
        pages: 64,
        max_context: 64,
        ..Limits::default()
    };
    let mut s = Scheduler::new(limits).unwrap();
    let submit = |s: &mut Scheduler, id, tenant| {
        let request = NewRequest {
            tenant,
            ..NewRequest::new(id, 8, 1)
        };
        s.submit(Duration::ZERO, request).unwrap();
    };
    for id in 0..100 {
        submit(&mut s, id, 1);
    }
    for _ in 0..50 {
        s.next(Duration::ZERO);
        s.commit(Duration::ZERO, &[]);
    }
    for id in 100..150 {
        submit(&mut s, id, 2);
    }
    let mut of_two = 0;
    for _ in 0..20 {
        let step = s.next(Duration::ZERO);
        of_two += step.chunks.iter().filter(|chunk| chunk.id >= 100).count();
        s.commit(Duration::ZERO, &[]);
    }
    assert!((9..=11).contains(&of_two), "{of_two} of 20");
}

#[test]
fn whoever_waits_is_served_in_the_end_whatever_comes_behind() {
    for seed in 0..100 {
        let mut random = Random(seed);
        let limits = Limits {
            max_running: 1 + random.below(4),
            max_waiting: 64,
            max_step_tokens: 16,
            page_tokens: 2,
            pages: 24,
            max_context: 40,
            ..Limits::default()
        };
        let mut s = Scheduler::new(limits).unwrap();
        let large = NewRequest {
            tenant: 7,
            ..NewRequest::new(0, 30, 10)
        };
        let mut id = 1;
        let mut submitted = false;
        let mut waited = 0;
        loop {
            for _ in 0..3 {
                let small = NewRequest::new(id, 1 + random.below(6), 1 + random.below(6));
                let _ = s.submit(Duration::ZERO, small);
                id += 1;
            }
            if id > 60 && !submitted {
                submitted = s.submit(Duration::ZERO, large.clone()).is_ok();
            }
            s.next(Duration::ZERO);
            s.commit(Duration::ZERO, &[]);
            s.audit().unwrap();
            if submitted {
                waited += 1;
                if !s.contains(0) {
                    break;
                }
                assert!(waited < 2000, "seed {seed}: the large one starves");
            }
            if s.counts().waiting >= 60 && !submitted {
                // Room for it.
                s.cancel(id - 1);
            }
        }
    }
}
