//! What a request gets depends on nothing but the request: thousands of random schedules with chunks of any
//! size, preemptions, prefix hits, drafts, micro-batches and cancellations, on a model small enough for it.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{DEADLINE, Model, Random, Rig, bits, limits, read_all, request, tokens};
use guild_attention_node::MicroBatches;
use guild_attention_node::sequence::{Event, Events, Request, Spent};
use guild_model::sampler::{Sampling, Shaping};
use guild_scheduler::batch::Limits;

/// Positions of the longest request here.
const LONGEST: usize = 40;

/// Requests of which many begin alike: greedy and sampled, shaped and not, stopped early and late.
fn requests(vocab: usize, count: usize) -> Vec<Request> {
    let mut random = Random(7);
    let common: Vec<u32> = (0..24).map(|_| random.below(vocab) as u32).collect();
    let one = |n: usize| {
        let mut prompt = common[..random.below(25)].to_vec();
        let own = 1 + random.below(6);
        prompt.extend((0..own).map(|_| random.below(vocab) as u32));
        Request {
            sampling: Sampling {
                temperature: [0.0, 1.0, 0.6][n % 3],
                top_p: [1.0, 0.9][n % 2],
                top_k: [0, 0, 20][n % 3],
                min_p: [0.0, 0.0, 0.0, 0.02][n % 4],
                seed: n as u64,
            },
            shaping: Shaping {
                // A few likely tokens: then drafts hold now and then.
                bias: vec![(5, 9.0), (6, 9.0), (7, 8.0)][..[0, 3, 2][n / 2 % 3]].to_vec(),
                repetition: [1.0, 1.2][n / 4 % 2],
                presence: [0.0, 0.5][n / 5 % 2],
                frequency: [0.0, 0.3][n / 7 % 2],
            },
            logprobs: [None, Some(0), Some(3)][n % 3],
            prompt_logprobs: [None, None, None, Some(2)][n % 4],
            stop_tokens: vec![[1, 6][n % 2]],
            min_tokens: [0, 4][n % 2],
            priority: [0, 0, -1, 3][n % 4],
            tenant: [0, 0, 1][n % 3],
            ..request(prompt, [1, 4, 8, 10][n % 4])
        }
    };
    (0..count).map(one).collect()
}

/// Everything off, one after the other.
async fn alone(model: &'static Model, requests: &[Request]) -> Vec<Vec<String>> {
    let plain = Limits {
        prefix_cache: false,
        ..limits()
    };
    let rig = Rig::with(model, plain, model.deal(1, 1, 1, 0), DEADLINE);
    let mut results = Vec::new();
    for request in requests {
        results.push(bits(&rig.run(request).await));
        rig.settle().await;
    }
    results
}

fn spent(events: &[Event]) -> Spent {
    match events.last() {
        Some(Event::Finished { spent, .. }) => spent.clone(),
        _ => Spent::default(),
    }
}

/// How often things happened that must not show.
#[derive(Debug, Default)]
struct Seen {
    preempted: u64,
    cached: usize,
    drafted: u32,
    held: u32,
    left: usize,
    /// Steps in one piece and in two micro-batches.
    steps: [u64; 2],
}

async fn schedule(
    model: &'static Model,
    requests: &[Request],
    expected: &[Vec<String>],
    seed: u64,
    seen: &mut Seen,
) {
    let mut random = Random(seed);
    let page_tokens = 1 + random.below(8);
    let max_running = 1 + random.below(6);
    let limits = Limits {
        max_running,
        max_waiting: requests.len(),
        max_step_tokens: max_running + random.below(20),
        itl_target: [None, Some(Duration::from_micros(50))][random.below(2)],
        drafts: random.below(4),
        prefix_cache: random.below(4) > 0,
        page_tokens,
        pages: LONGEST.div_ceil(page_tokens) + random.below(10),
        max_context: LONGEST,
        ..Limits::default()
    };
    let placement = model.deal(1 + seed, 1, 1 + random.below(3) as u32, seed);
    let rig = Rig::with(model, limits, placement, DEADLINE);
    let mut ways = Random(!seed);
    let mut readers: Vec<(usize, Events)> = Vec::new();
    for _ in 0..4 + random.below(8) {
        let way = ways.one_of(&[MicroBatches::Off, MicroBatches::Auto, MicroBatches::On]);
        rig.overlap.set(way);
        let which = random.below(requests.len());
        readers.push((which, rig.submit(&requests[which])));
        let at = random.below(readers.len());
        if random.below(2) == 0 {
            // Until an earlier one has come a little further.
            let (_, reader) = &mut readers[at];
            let unread = reader.unread();
            while reader.unread() == unread && !reader.is_complete() {
                tokio::task::yield_now().await;
            }
        }
        if random.below(6) == 0 {
            readers.swap_remove(random.below(readers.len()));
            seen.left += 1;
        }
    }
    for (which, reader) in readers {
        let events = read_all(reader).await;
        assert_eq!(
            bits(&events),
            expected[which],
            "request {which}, seed {seed}"
        );
        let spent = spent(&events);
        assert!(spent.cached < requests[which].prompt.len());
        seen.cached += spent.cached;
        seen.drafted += spent.drafted.iter().sum::<u32>();
        seen.held += spent.held.iter().sum::<u32>();
    }
    rig.settle().await;
    let overlapped = rig.overlap.so_far();
    seen.steps[0] += overlapped.steps - overlapped.split;
    seen.steps[1] += overlapped.split;
    seen.preempted += rig.engine.counts().preemptions;
    rig.engine.forget_prefixes();
    assert_eq!(rig.engine.counts().cached_pages, 0);
    rig.settle().await;
}

async fn schedules(model: &'static Model, seeds: std::ops::Range<u64>) -> Seen {
    let requests = requests(model.trunk.config().vocab_size, 24);
    let expected = alone(model, &requests).await;
    let mut seen = Seen::default();
    for seed in seeds {
        schedule(model, &requests, &expected, seed, &mut seen).await;
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_schedule_shows_in_tokens_or_logprobs() {
    let seen = schedules(Model::tiny(), 0..2000).await;
    assert!(seen.preempted > 40 && seen.cached > 1000, "{seen:?}");
    assert!(
        seen.drafted > 1000 && seen.held > 300 && seen.left > 1000,
        "{seen:?}"
    );
    assert!(seen.steps.iter().all(|&steps| steps > 5000), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_on_models_with_a_trained_draft_module() {
    let seen = schedules(Model::demo(), 0..20).await;
    assert!(seen.held > 10, "{seen:?}");
    schedules(Model::v3_mtp(), 0..20).await;
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_ten_thousand_requests_every_page_is_free_and_memory_is_flat() {
    let model = Model::tiny();
    let limits = Limits {
        max_running: 8,
        max_waiting: 32,
        max_step_tokens: 32,
        drafts: 2,
        page_tokens: 4,
        pages: 20,
        max_context: LONGEST,
        ..Limits::default()
    };
    let rig = Rig::with(model, limits, model.deal(1, 1, 2, 3), DEADLINE);
    let requests = requests(model.trunk.config().vocab_size, 64);
    let mut random = Random(11);
    let mut readers: Vec<Events> = Vec::new();
    let mut warm = 0;
    for n in 0..10_000 {
        if n == 2_000 {
            warm = resident();
        }
        let which = random.below(requests.len());
        if let Ok(reader) = rig.engine.submit(requests[which].clone()) {
            readers.push(reader);
        }
        while readers.len() > 24 || (random.below(3) == 0 && !readers.is_empty()) {
            let reader = readers.swap_remove(random.below(readers.len()));
            // Some leave at once, some read to the end.
            if random.below(3) > 0 {
                read_all(reader).await;
            }
        }
    }
    readers.clear();
    rig.settle().await;
    let counts = rig.engine.counts();
    assert!(
        counts.cached_pages > 0 && counts.preemptions > 0,
        "{counts:?}"
    );
    rig.engine.forget_prefixes();
    let counts = rig.engine.counts();
    assert_eq!((counts.free_pages, counts.cached_pages), (20, 0));
    rig.engine.audit().unwrap();
    let grown = resident().saturating_sub(warm);
    assert!(grown < 16 << 20, "{grown} bytes more after 8000 requests");
}

fn drafting(drafts: usize) -> Limits {
    Limits { drafts, ..limits() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drafts_change_no_token_greedy_or_drawn() {
    let model = Model::demo();
    let plain = Rig::with(model, drafting(0), model.deal(1, 1, 2, 0), DEADLINE);
    let prompt: Vec<u32> = "def main(".bytes().map(u32::from).collect();
    let mut shares = Vec::new();
    for drafts in [1, 3] {
        let rig = Rig::with(model, drafting(drafts), model.deal(1, 1, 2, 0), DEADLINE);
        let (mut drafted, mut held) = (vec![0; drafts], vec![0; drafts]);
        for seed in 0..6 {
            let asked = Request {
                sampling: Sampling {
                    temperature: [0.0, 0.8, 1.0][seed as usize % 3],
                    seed,
                    ..Sampling::GREEDY
                },
                ..request(prompt.clone(), 60)
            };
            let events = rig.run(&asked).await;
            assert_eq!(bits(&events), bits(&plain.run(&asked).await));
            let spent = spent(&events);
            for place in 0..spent.drafted.len() {
                drafted[place] += spent.drafted[place];
                held[place] += spent.held.get(place).copied().unwrap_or(0);
            }
        }
        rig.settle().await;
        assert!(drafted.iter().zip(&held).all(|(d, h)| h <= d));
        shares.push(f64::from(held[0]) / f64::from(drafted[0]));
    }
    assert!(
        shares.iter().all(|&share| share > 0.2),
        "{shares:?} of first drafts held"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drawn_tokens_follow_the_models_own_distribution_with_drafts() {
    const DRAWS: u64 = 3000;
    let model = Model::tiny();
    let vocab = model.trunk.config().vocab_size;
    let prompt = vec![3, 1, 4];
    let rig = Rig::with(model, drafting(1), model.deal(1, 1, 1, 0), DEADLINE);
    // What the model says of the token after `prompt`.
    let next = async |prompt: Vec<u32>| {
        let asked = Request {
            logprobs: Some(vocab),
            ..request(prompt, 1)
        };
        let mut probabilities = vec![0.0; vocab];
        for event in rig.run(&asked).await {
            if let Event::Token { logprobs, .. } = event {
                for (token, logprob) in logprobs.unwrap().top {
                    probabilities[token as usize] = f64::from(logprob).exp();
                }
            }
        }
        probabilities
    };
    // The second token of the output is the first one that may have been a draft: its distribution over
    // all first ones.
    let mut second = vec![0.0; vocab];
    for (token, p) in next(prompt.clone()).await.into_iter().enumerate() {
        let after = next([&prompt[..], &[token as u32]].concat()).await;
        second
            .iter_mut()
            .zip(after)
            .for_each(|(sum, q)| *sum += p * q);
    }
    let mut counts = vec![0.0; vocab];
    let (mut drafted, mut held) = (0, 0);
    for seed in 0..DRAWS {
        let asked = Request {
            sampling: Sampling {
                temperature: 1.0,
                seed,
                ..Sampling::GREEDY
            },
            logprobs: None,
            ..request(prompt.clone(), 3)
        };
        let events = rig.run(&asked).await;
        counts[tokens(&events)[1] as usize] += 1.0;
        let spent = spent(&events);
        drafted += spent.drafted.iter().sum::<u32>();
        held += spent.held.iter().sum::<u32>();
    }
    assert!(
        held > 100 && drafted > held,
        "{held} of {drafted} drafts held"
    );
    let (mut chi, mut cells) = (0.0, 0);
    let (mut rare, mut rarely) = (0.0, 0.0);
    for (expected, count) in second.iter().map(|p| p * DRAWS as f64).zip(counts) {
        if expected < 5.0 {
            rare += expected;
            rarely += count;
        } else {
            chi += (count - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if rare > 0.0 {
        chi += (rarely - rare).powi(2) / f64::max(rare, 1.0);
    }
    // Five standard deviations above the mean of a chi-square of so many cells.
    let bound = f64::from(cells) + 5.0 * f64::from(2 * cells).sqrt();
    assert!(
        chi < bound,
        "chi-square {chi} over {cells} cells, bound {bound}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_begins_like_another_says_how_much_was_known() {
    let model = Model::tiny();
    let cached = async |drafts, tenant: [u64; 2], scored| {
        let rig = Rig::with(model, drafting(drafts), model.deal(1, 1, 1, 0), DEADLINE);
        let mut result = Vec::new();
        for tenant in tenant {
            let asked = Request {
                tenant,
                prompt_logprobs: scored,
                ..request((0..40).collect(), 5)
            };
            let events = rig.run(&asked).await;
            let first = events.iter().find_map(|event| match event {
                Event::Token { spent, .. } => Some(spent.cached),
                _ => None,
            });
            assert_eq!(first, Some(spent(&events).cached));
            let last = events.iter().rev().find_map(|event| match event {
                Event::Token { spent, .. } => Some(spent.clone()),
                _ => None,
            });
            assert_eq!(
                last,
                Some(spent(&events)),
                "whoever stops here knows as much"
            );
            result.push(spent(&events).cached);
        }
        result
    };
    assert_eq!(cached(0, [1, 1], None).await, [0, 32]);
    assert_eq!(cached(1, [1, 1], None).await, [0, 32]);
    assert_eq!(cached(0, [1, 2], None).await, [0, 0], "another tenant's");
    assert_eq!(
        cached(0, [1, 1], Some(0)).await,
        [0, 0],
        "all rows have to be scored"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draft_module_without_experts_costs_nothing_but_drafts() {
    let model = Model::tiny();
    let requests = requests(model.trunk.config().vocab_size, 12);
    let expected = alone(model, &requests).await;
    let main = model.trunk.config().num_hidden_layers as u32;
    let mut nodes = model.deal(1, 1, 2, 0).nodes().to_vec();
    for node in &mut nodes {
        node.slots.retain(|&(layer, _)| layer < main);
    }
    let placement = guild_scheduler::placement::Placement::new(1, nodes).unwrap();
    let rig = Rig::with(model, drafting(2), placement, Duration::from_millis(20));
    for (request, expected) in requests.iter().zip(expected) {
        let events = rig.run(request).await;
        assert_eq!(bits(&events), expected);
        assert_eq!(spent(&events).drafted, [0; 0]);
    }
    rig.settle().await;
    assert_eq!(
        rig.engine.counts().cached_pages,
        0,
        "pages without its latents are not shared"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_take_too_long_end_with_the_reason() {
    use guild_attention_node::sequence::Failure;
    let model = Model::tiny();
    let one = Limits {
        max_running: 1,
        ..limits()
    };
    let rig = Rig::with(model, one, model.deal(1, 1, 1, 0), DEADLINE);
    let long = request(vec![2; 20], 200);
    let running = rig.submit(&long);
    let waits = Request {
        max_queue: Some(Duration::ZERO),
        ..long.clone()
    };
    let events = rig.run(&waits).await;
    assert_eq!(events.last(), Some(&Event::Failed(Failure::Queue)));
    drop(running);
    let late = Request {
        timeout: Some(Duration::from_millis(1)),
        ..long
    };
    let events = rig.run(&late).await;
    let in_time = tokens(&events).len() == 200;
    assert!(in_time || events.last() == Some(&Event::Failed(Failure::Deadline)));
    rig.settle().await;
}
