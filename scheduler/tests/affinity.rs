//! Requests go where their prefix is known, as long as that pins no work to one node.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use guild_scheduler::affinity::{
    Affinity, Candidate, Choice, Decoder, MAX_OVER_MEAN, MIN_MOVED_TOKENS,
};
use proptest::prelude::*;

const BLOCK: u64 = 64;

/// Nodes, and what is still to be run there.
struct Cluster {
    affinity: Affinity,
    outstanding: BTreeMap<u32, u64>,
}

impl Cluster {
    fn of(nodes: u32, most: usize) -> Cluster {
        Cluster {
            affinity: Affinity::new(BLOCK, most),
            outstanding: (1..=nodes).map(|node| (node, 0)).collect(),
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let all = self.outstanding.iter();
        all.map(|(&node, &outstanding)| Candidate { node, outstanding })
            .collect()
    }

    /// Sends a request, and says by how much its node is above what it may be at.
    fn send(&mut self, prefix: &[u64], tokens: u64) -> Choice {
        let before = self.outstanding.clone();
        let choice = self
            .affinity
            .choose(prefix, tokens, &self.candidates())
            .unwrap();
        self.affinity.note(prefix, choice.node);
        *self.outstanding.get_mut(&choice.node).unwrap() += tokens - choice.cached;
        let mean = self.outstanding.values().sum::<u64>() as f64 / before.len() as f64;
        let mine = self.outstanding[&choice.node] as f64;
        let least = before[&choice.node] == *before.values().min().unwrap();
        assert!(
            least || mine <= MAX_OVER_MEAN * mean + 1e-6,
            "{choice:?} {before:?}"
        );
        choice
    }

    fn run(&mut self, node: u32, tokens: u64) {
        let left = self.outstanding.get_mut(&node).unwrap();
        *left = left.saturating_sub(tokens);
    }
}

/// Blocks of a prompt of one family, of which `own` are its own.
fn prompt(family: u64, shared: u64, own: u64, of: u64) -> Vec<u64> {
    let shared = (0..shared).map(|at| family << 40 | at);
    shared
        .chain((0..own).map(|at| 1 << 60 | of << 20 | at))
        .collect()
}

#[test]
fn a_known_prefix_draws_and_a_queue_repels() {
    let mut c = Cluster::of(3, 1000);
    let first = c.send(&prompt(1, 8, 2, 1), 640);
    assert_eq!((first.cached, first.turned_away), (0, false));
    c.run(first.node, 640);
    // Others fill other nodes, and nobody the caches of the first one.
    let other = c.send(&prompt(2, 8, 2, 2), 640);
    assert_ne!(other.node, first.node, "empty nodes before full caches");
    c.run(other.node, 640);
    let again = c.send(&prompt(1, 8, 2, 3), 640);
    assert_eq!((again.node, again.cached), (first.node, 512));
    // As much before it as the cache saves: another one is as soon.
    *c.outstanding.get_mut(&first.node).unwrap() = 513;
    let away = c.send(&prompt(1, 8, 2, 4), 640);
    assert_ne!(away.node, first.node);
    assert_eq!(away.cached, 0);
}

#[test]
fn prompts_that_all_begin_alike_keep_every_node_busy() {
    let mut c = Cluster::of(4, 10_000);
    let mut sent = BTreeMap::new();
    for of in 0..400 {
        let choice = c.send(&prompt(1, 30, 2, of), 32 * BLOCK);
        *sent.entry(choice.node).or_insert(0) += 1;
        for node in 1..=4 {
            // Together they run a little less than comes.
            c.run(node, 30);
        }
    }
    assert!(
        sent.len() == 4 && sent.values().all(|&n| n >= 50),
        "{sent:?}"
    );
}

#[test]
fn conversations_stay_where_they_are_known() {
    let mut c = Cluster::of(4, 100_000);
    let (mut cached, mut all) = (0, 0);
    for turn in 1..=10 {
        for family in 0..32 {
            let prefix = prompt(family, 4 * turn, 0, 0);
            let tokens = prefix.len() as u64 * BLOCK;
            let choice = c.send(&prefix, tokens);
            cached += choice.cached;
            all += tokens;
            for node in 1..=4 {
                c.run(node, 200);
            }
        }
    }
    // At best all but the four new blocks of each turn are known: 45 / 55 of the prompts.
    assert!(cached * 100 >= all * 78, "{cached} of {all}");
}

#[test]
fn what_is_remembered_is_bounded_and_goes_with_its_node() {
    let mut affinity = Affinity::new(BLOCK, 100);
    for family in 0..50 {
        affinity.note(&prompt(family, 10, 0, 0), 1 + (family % 2) as u32);
        assert!(affinity.len() <= 100);
    }
    let candidates = [1, 2].map(|node| Candidate {
        node,
        outstanding: 0,
    });
    let known = |affinity: &Affinity, family| {
        let choice = affinity.choose(&prompt(family, 10, 0, 0), 640, &candidates);
        choice.unwrap().cached
    };
    assert_eq!([known(&affinity, 49), known(&affinity, 0)], [640, 0]);
    affinity.forget(2);
    assert_eq!([known(&affinity, 49), known(&affinity, 48)], [0, 640]);
    affinity.forget(1);
    assert!(affinity.is_empty());
    assert_eq!(affinity.choose(&[], 1, &[]), None);
    // More blocks than are remembered at all: the first ones are.
    affinity.note(&prompt(7, 300, 0, 0), 1);
    assert_eq!((affinity.len(), known(&affinity, 7)), (100, 640));
}

proptest! {
    #[test]
    fn no_node_has_more_than_its_part_however_much_it_knows(
        nodes in 1u32..9,
        most in 1usize..400,
        events in prop::collection::vec((0u64..4, 0u64..40, 0u64..6, 1u64..4000, 0u64..3000), 1..200),
    ) {
        let mut c = Cluster::of(nodes, most);
        for (of, (family, shared, own, tokens, run)) in (0u64..).zip(events) {
            let prefix = prompt(family, shared, own, of);
            let tokens = tokens + prefix.len() as u64 * BLOCK;
            // The bound is asserted where it is sent.
            let choice = c.send(&prefix, tokens);
            prop_assert!(choice.cached <= prefix.len() as u64 * BLOCK);
            prop_assert!(c.affinity.len() <= most);
            c.run(1 + (of % u64::from(nodes)) as u32, run);
            if run % 97 == 0 {
                c.affinity.forget(choice.node);
            }
        }
    }
}

#[test]
fn a_long_prompt_is_run_by_a_node_for_prefill_where_that_is_worth_it() {
    let mut affinity = Affinity::new(BLOCK, 1000);
    let known: Vec<u64> = (1..=8).collect();
    let helper = |node, outstanding| Candidate { node, outstanding };
    let idle = [helper(5, 0), helper(6, 0)];
    let decoder = Decoder {
        node: 1,
        outstanding: 0,
        cached: 0,
        runs_prompts: false,
    };
    let node = |choice: Option<Choice>| choice.map(|choice| choice.node);

    // What is left of the prompt there decides, not how long it is.
    let least = MIN_MOVED_TOKENS;
    assert_eq!(node(affinity.pair(&[], least, &decoder, &idle)), Some(5));
    assert_eq!(affinity.pair(&[], least - 1, &decoder, &idle), None);
    let knows = Decoder {
        cached: 400,
        ..decoder
    };
    assert_eq!(affinity.pair(&[], 400 + least - 1, &knows, &idle), None);
    assert!(affinity.pair(&[], 400 + least, &knows, &idle).is_some());

    // Nobody is there, or only itself.
    assert_eq!(affinity.pair(&[], 1000, &decoder, &[]), None);
    assert_eq!(affinity.pair(&[], 1000, &decoder, &[helper(1, 0)]), None);

    // The one that has less to do, unless the other one knows the prompt.
    let busy = [helper(5, 300), helper(6, 250)];
    assert_eq!(node(affinity.pair(&known, 600, &decoder, &busy)), Some(6));
    affinity.note(&known, 5);
    let choice = affinity.pair(&known, 600, &decoder, &busy).unwrap();
    assert_eq!((choice.node, choice.cached), (5, 8 * BLOCK));

    // A node that runs prompts does so unless it would be through later.
    let both = Decoder {
        runs_prompts: true,
        ..decoder
    };
    assert_eq!(affinity.pair(&[], 600, &both, &[helper(6, 0)]), None);
    let behind = Decoder {
        outstanding: 50,
        ..both
    };
    assert_eq!(
        node(affinity.pair(&[], 600, &behind, &[helper(6, 0)])),
        Some(6)
    );
    assert_eq!(affinity.pair(&[], 600, &behind, &[helper(6, 60)]), None);
}
