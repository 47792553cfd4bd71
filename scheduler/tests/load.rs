//! Counting expert load, and sharing out rows among replicas.
#![allow(clippy::unwrap_used)]

use guild_scheduler::load::{
    Delta, EWMA_WEIGHT, LoadError, Meter, Shot, Synthetic, Trace, WINDOW_SHOTS, balancedness,
};
use guild_scheduler::spread::{Queue, SpreadError, spread};
use proptest::prelude::*;

fn delta(source: u32, sequence: u64, rows: &[(u32, u32, u64)]) -> Delta {
    Delta {
        source,
        sequence,
        rows: rows.to_vec(),
    }
}

#[test]
fn deltas_of_several_sources_make_one_shot() {
    let mut meter = Meter::new(vec![1, 3], 4).unwrap();
    assert!(meter.merge(&delta(7, 0, &[(1, 0, 5), (3, 3, 2)])).unwrap());
    assert!(meter.merge(&delta(8, 0, &[(1, 0, 1), (1, 2, 9)])).unwrap());
    // A delta that comes twice counts once.
    assert!(!meter.merge(&delta(7, 0, &[(1, 0, 5), (3, 3, 2)])).unwrap());
    meter.close();
    let shot = Shot {
        rows: vec![vec![6, 0, 9, 0], vec![0, 0, 0, 2]],
    };
    assert_eq!(meter.window().collect::<Vec<_>>(), [&shot]);
    assert_eq!(meter.ewma().unwrap()[0], [6.0, 0.0, 9.0, 0.0]);

    assert!(
        meter
            .merge(&delta(7, 1, &[(1, 0, 10), (1, 1, u64::MAX), (1, 1, 1)]))
            .unwrap()
    );
    meter.close();
    assert_eq!(meter.ewma().unwrap()[0][0], 6.0 + EWMA_WEIGHT * 4.0);
    assert_eq!(meter.window().last().unwrap().rows[0][1], u64::MAX);
    meter.trace().check().unwrap();
}

#[test]
fn quiet_shots_are_left_out_and_the_window_ends() {
    let mut meter = Meter::new(vec![0], 1).unwrap();
    meter.close();
    assert_eq!(meter.window().len(), 0);
    assert!(meter.ewma().is_none());
    for n in 1..=WINDOW_SHOTS as u64 + 2 {
        meter.merge(&delta(0, n, &[(0, 0, n)])).unwrap();
        meter.close();
    }
    assert_eq!(meter.window().len(), WINDOW_SHOTS);
    assert_eq!(meter.window().next().unwrap().rows[0][0], 3);
}

#[test]
fn a_bad_delta_counts_nothing() {
    let mut meter = Meter::new(vec![1, 3], 4).unwrap();
    for bad in [(2, 0, 1), (1, 4, 1)] {
        let error = meter.merge(&delta(7, 0, &[(1, 0, 5), bad])).unwrap_err();
        assert!(matches!(error, LoadError::Unknown { origin: 7, .. }));
    }
    meter.close();
    assert_eq!(meter.window().len(), 0);
    // The source may send it again, put right.
    assert!(meter.merge(&delta(7, 0, &[(1, 0, 5)])).unwrap());
    assert!(!meter.merge(&delta(7, 0, &[(1, 0, 5)])).unwrap());
    meter.forget(7);
    assert!(meter.merge(&delta(7, 0, &[(1, 0, 5)])).unwrap());
}

#[test]
fn traces_are_checked() {
    let good = Trace {
        layers: vec![1, 2],
        experts: 2,
        shots: vec![Shot {
            rows: vec![vec![1, 2], vec![3, 4]],
        }],
    };
    good.check().unwrap();
    let spoilt = |spoil: &dyn Fn(&mut Trace)| {
        let mut bad = good.clone();
        spoil(&mut bad);
        bad.check().unwrap_err().to_string()
    };
    assert!(spoilt(&|t| t.layers.swap(0, 1)).starts_with("layers: 1 "));
    assert!(spoilt(&|t| t.experts = 0).starts_with("layers, experts:"));
    assert!(spoilt(&|t| t.experts = u32::MAX).starts_with("layers, experts:"));
    assert!(spoilt(&|t| t.shots[0].rows[1] = vec![1]).starts_with("shots[0].rows:"));
    assert!(spoilt(&|t| t.shots[0].rows.truncate(1)).starts_with("shots[0].rows:"));
}

#[test]
fn balancedness_is_the_mean_over_layers_of_mean_over_max() {
    assert_eq!(balancedness(&[vec![2.0, 2.0], vec![4.0, 0.0]]), Some(0.75));
    assert_eq!(balancedness(&[vec![0.0, 0.0]]), Some(1.0));
    assert_eq!(balancedness::<Vec<f64>>(&[]), None);
}

#[test]
fn synthetic_loads_are_seeded_skewed_and_drift() {
    let make = |seed| Synthetic {
        seed,
        layers: 2,
        experts: 64,
        shots: 20,
        rows: 100_000,
        zipf: 1.0,
        drift: 0.1,
        jump: 0.2,
    };
    let trace = make(3).trace().unwrap();
    trace.check().unwrap();
    assert_eq!(trace, make(3).trace().unwrap());
    assert_ne!(trace, make(4).trace().unwrap());
    for row in trace.shots.iter().flat_map(|s| &s.rows) {
        let all: u64 = row.iter().sum();
        assert!((95_000..105_000).contains(&all), "{all}");
        let mut sorted = row.clone();
        sorted.sort_unstable();
        assert!(sorted[63] > 8 * sorted[32], "skewed: {sorted:?}");
    }
    assert_ne!(trace.shots[0].rows[0], trace.shots[1].rows[0]);
}

fn queues(rows: &[u64]) -> Vec<Queue> {
    let queue = |&rows: &u64| Queue {
        rows,
        capacity: 1.0,
        latency: 0.0,
    };
    rows.iter().map(queue).collect()
}

#[test]
fn rows_are_poured_onto_the_shorter_queues() {
    let spread = |rows: &[u32], replicas: &[Vec<u32>], depth: &[u64]| {
        spread(rows, replicas, &queues(depth)).unwrap()
    };
    assert_eq!(spread(&[10], &[vec![0, 1]], &[6, 0]), [2, 8]);
    assert_eq!(spread(&[4], &[vec![0, 1]], &[6, 0]), [0, 4]);
    // Of two equal choices the lower node takes the row.
    assert_eq!(spread(&[3], &[vec![0, 1]], &[0, 0]), [2, 1]);
    assert_eq!(spread(&[1], &[vec![2, 1]], &[0, 0, 0]), [0, 1]);
    // What has no choice makes others move.
    assert_eq!(spread(&[8, 6], &[vec![0, 1], vec![0]], &[0, 0]), [1, 7, 6]);
    assert_eq!(spread(&[0, 0], &[vec![], vec![0, 1]], &[0, 0]), [0, 0]);
}

#[test]
fn faster_nodes_get_more_rows() {
    let mut queues = queues(&[0, 0]);
    queues[1].capacity = 3.0;
    assert_eq!(spread(&[100], &[vec![0, 1]], &queues).unwrap(), [25, 75]);
}

#[test]
fn a_node_far_away_gets_what_it_answers_as_early_as_the_others() {
    let mut queues = queues(&[0, 0, 0]);
    queues[1].latency = 8.0;
    let spread = |rows: &[u32], replicas: &[Vec<u32>]| spread(rows, replicas, &queues).unwrap();
    assert_eq!(spread(&[6], &[vec![0, 1]]), [6, 0]);
    assert_eq!(spread(&[10], &[vec![0, 1]]), [9, 1]);
    // What has no other home goes there however long it takes, and the rest keeps away.
    assert_eq!(spread(&[4, 2], &[vec![1, 2], vec![1]]), [0, 4, 2]);
    // Two far ones are as good as two near ones.
    let mut far = queues.clone();
    far.iter_mut().for_each(|queue| queue.latency = 1e6);
    let shares = guild_scheduler::spread::spread(&[9], &[vec![0, 1, 2]], &far);
    assert_eq!(shares.unwrap(), [3, 3, 3]);
}

#[test]
fn senseless_replicas_are_refused() {
    let two = queues(&[0, 0]);
    assert_eq!(
        spread(&[1], &[vec![]], &two),
        Err(SpreadError::NoReplica(0))
    );
    assert_eq!(
        spread(&[1], &[vec![2]], &two),
        Err(SpreadError::NoQueue { expert: 0, node: 2 })
    );
    assert_eq!(
        spread::<Vec<u32>>(&[1], &[], &two),
        Err(SpreadError::Lengths {
            rows: 1,
            replicas: 0
        })
    );
    for capacity in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let queue = Queue { capacity, ..two[0] };
        let error = spread(&[1], &[vec![0]], &[queue]).unwrap_err();
        assert!(
            matches!(error, SpreadError::Capacity { node: 0, .. }),
            "{error}"
        );
    }
    for latency in [-1.0, f64::NAN, f64::INFINITY] {
        let queue = Queue { latency, ..two[0] };
        let error = spread(&[1], &[vec![0]], &[queue]).unwrap_err();
        assert!(
            matches!(error, SpreadError::Latency { node: 0, .. }),
            "{error}"
        );
    }
}

fn batches() -> impl Strategy<Value = (Vec<u32>, Vec<Vec<u32>>, Vec<Queue>)> {
    (1usize..8, 1usize..20).prop_flat_map(|(nodes, experts)| {
        let all: Vec<u32> = (0..nodes as u32).collect();
        let homes = prop::sample::subsequence(all, 1..=nodes);
        let latency = prop_oneof![Just(0u32), 0u32..50, 0u32..1000];
        let queue = (0u64..500, 1u32..5, latency).prop_map(|(rows, capacity, latency)| Queue {
            rows,
            capacity: f64::from(capacity),
            latency: f64::from(latency),
        });
        (
            prop::collection::vec(0u32..300, experts),
            prop::collection::vec(homes, experts),
            prop::collection::vec(queue, nodes),
        )
    })
}

/// When the last answer is here; nodes without rows owe none.
fn end(shares: &[u32], replicas: &[Vec<u32>], queues: &[Queue]) -> f64 {
    let mut depth: Vec<u64> = queues.iter().map(|q| q.rows).collect();
    for (&node, &share) in replicas.iter().flatten().zip(shares) {
        depth[node as usize] += u64::from(share);
    }
    depth
        .iter()
        .zip(queues)
        .filter(|&(&rows, _)| rows > 0)
        .map(|(&rows, queue)| queue.latency + rows as f64 / queue.capacity)
        .fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn all_rows_are_shared_out_and_never_worse_than_evenly((rows, replicas, queues) in batches()) {
        let shares = spread(&rows, &replicas, &queues).unwrap();
        prop_assert_eq!(&shares, &spread(&rows, &replicas, &queues).unwrap());
        let mut rest = shares.as_slice();
        let mut even = Vec::new();
        for (&rows, nodes) in rows.iter().zip(&replicas) {
            let (mine, tail) = rest.split_at(nodes.len());
            prop_assert_eq!(mine.iter().sum::<u32>(), rows);
            rest = tail;
            let count = nodes.len() as u32;
            even.extend((0..count).map(|i| rows / count + u32::from(i < rows % count)));
        }
        prop_assert!(rest.is_empty());
        prop_assert!(end(&shares, &replicas, &queues) <= end(&even, &replicas, &queues) + 1e-9);
    }

    #[test]
    fn one_expert_ends_as_early_as_it_can((mut rows, mut replicas, queues) in batches()) {
        rows.truncate(1);
        replicas.truncate(1);
        let shares = spread(&rows, &replicas, &queues).unwrap();
        // Row by row to whoever is done first: the best there is.
        let mut best = vec![0; shares.len()];
        for _ in 0..rows[0] {
            let after = |i: &usize| {
                let q = queues[replicas[0][*i] as usize];
                q.latency + (q.rows as f64 + f64::from(best[*i]) + 1.0) / q.capacity
            };
            let first = (0..best.len()).min_by(|a, b| after(a).total_cmp(&after(b))).unwrap();
            best[first] += 1;
        }
        let (found, least) = (end(&shares, &replicas, &queues), end(&best, &replicas, &queues));
        prop_assert!(found <= least + 1e-9, "{} > {}", found, least);
    }

    #[test]
    fn no_row_goes_where_it_would_be_late_while_another_home_is_in_time(
        (mut rows, mut replicas, queues) in batches(),
    ) {
        rows.truncate(1);
        replicas.truncate(1);
        let shares = spread(&rows, &replicas, &queues).unwrap();
        let after = |i: usize, more: u32| {
            let q = queues[replicas[0][i] as usize];
            q.latency + (q.rows as f64 + f64::from(shares[i] + more)) / q.capacity
        };
        for given in (0..shares.len()).filter(|&i| shares[i] > 0) {
            for other in 0..shares.len() {
                prop_assert!(after(given, 0) <= after(other, 1) + 1e-9);
            }
        }
    }
}
