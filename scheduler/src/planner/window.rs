//! The window of shots as the search sees it: folded, scaled, continued.

use super::{MAX_SHOTS, Split};

/// Weight of a shot over that of the next younger one.
const RECENCY: f64 = 0.85;
/// Shots that are foreseen beside those that were seen.
const FORESEEN: usize = 4;
/// An expert whose load changes by this many times the variance of chance stands out.
const STANDS_OUT: f64 = 4.0;
/// How far the load is foreseen to go, in standard deviations of the window.
const REACH: f64 = 1.5;

/// Shots of a layer in the board's units, their mean first.
pub(super) struct Window {
    /// [shots, experts]
    pub(super) rows: Vec<Vec<f64>>,
    /// [shots]: 1 for the mean, 1 for all others together.
    pub(super) weight: Vec<f64>,
    /// Which of the rows are shots that were seen.
    pub(super) seen: std::ops::Range<usize>,
}

impl Window {
    /// `total`: the rows of a shot in the board's units. An even split cannot do
    /// anything about what chance makes of a shot, so that this is taken out of
    /// it; water-filling can, where there is slack.
    pub(super) fn new(shots: &[&[u64]], experts: usize, total: f64, split: Split) -> Window {
        let loaded: Vec<&&[u64]> = shots.iter().filter(|s| s.iter().any(|&n| n > 0)).collect();
        let per = loaded.len().div_ceil(MAX_SHOTS).max(1);
        // Groups are counted from the youngest shot, so that it is never alone at the end.
        let mut rows: Vec<Vec<f64>> = (loaded.rchunks(per))
            .map(|group| {
                let sum = |e: usize| group.iter().map(|s| s[e] as f64).sum::<f64>();
                (0..experts).map(sum).collect()
            })
            .collect();
        if rows.is_empty() {
            rows.push(vec![1.0; experts]);
        }
        rows.reverse();
        if split == Split::Even {
            calm(&mut rows);
        }
        rows.iter_mut().for_each(|shot| scale(shot, total));
        if rows.len() == 1 {
            let weight = vec![1.0];
            return Window {
                rows,
                weight,
                seen: 0..1,
            };
        }
        let seen = 1..1 + rows.len();
        let mut weight: Vec<f64> = (0..rows.len())
            .rev()
            .map(|age| RECENCY.powi(age as i32))
            .collect();
        foresee(&mut rows, &mut weight, total);
        let all: f64 = weight.iter().sum();
        weight.iter_mut().for_each(|w| *w /= all);
        let mean = |e: usize| rows.iter().zip(&weight).map(|(s, w)| s[e] * w).sum();
        let mean = (0..experts).map(mean).collect();
        rows.insert(0, mean);
        weight.insert(0, 1.0);
        Window { rows, weight, seen }
    }
}

fn scale(shot: &mut [f64], total: f64) {
    let all: f64 = shot.iter().sum();
    shot.iter_mut().for_each(|n| *n *= total / all);
}

/// Draws the shots together by what chance alone makes of counts, whose variance
/// is their mean (Poisson): what is left differs because the load does. It is
/// estimated over all experts, and for those alone that stand out.
fn calm(rows: &mut [Vec<f64>]) {
    if rows.len() < 2 {
        return;
    }
    let shots = rows.len() as f64;
    let each = rows.iter().flatten().sum::<f64>() / shots;
    rows.iter_mut().for_each(|shot| scale(shot, each));
    let moments: Vec<(f64, f64)> = (0..rows[0].len())
        .map(|e| {
            let mean = rows.iter().map(|s| s[e]).sum::<f64>() / shots;
            let square = rows.iter().map(|s| (s[e] - mean).powi(2)).sum::<f64>();
            (mean, square / (shots - 1.0))
        })
        .collect();
    let (noise, all) = (moments.iter()).fold((0.0, 0.0), |(m, v), (mean, variance)| {
        (m + mean, v + variance)
    });
    let part = |noise: f64, all: f64| if all > noise { 1.0 - noise / all } else { 0.0 };
    let common = part(noise, all);
    for (e, &(mean, variance)) in moments.iter().enumerate() {
        let kept = part(STANDS_OUT * mean, variance).max(common);
        for shot in rows.iter_mut() {
            shot[e] = mean + kept * (shot[e] - mean);
        }
    }
}

/// Adds shots that may come: the youngest, with every expert's load changed at
/// random by as much as it changed in the window. What looks balanced on the
/// past alone has no slack for them.
fn foresee(rows: &mut Vec<Vec<f64>>, weight: &mut Vec<f64>, total: f64) {
    let (past, youngest) = (rows.len() as f64, rows[rows.len() - 1].clone());
    let spread: Vec<f64> = (0..youngest.len())
        .map(|e| {
            let mean = rows.iter().map(|s| s[e]).sum::<f64>() / past;
            let square = rows.iter().map(|s| (s[e] - mean).powi(2)).sum::<f64>() / (past - 1.0);
            if mean > 0.0 {
                square.sqrt() / mean
            } else {
                0.0
            }
        })
        .collect();
    for shot in 0..FORESEEN {
        let draw = |(e, (rows, spread)): (usize, (&f64, &f64))| {
            rows * (1.0 + REACH * spread * unrest(shot, e)).max(0.0)
        };
        let mut next: Vec<f64> = youngest.iter().zip(&spread).enumerate().map(draw).collect();
        if next.iter().all(|rows| *rows == 0.0) {
            next.clone_from(&youngest);
        }
        scale(&mut next, total);
        rows.push(next);
        weight.push(1.0);
    }
}

/// A fixed draw for (shot, expert), close to normal.
fn unrest(shot: usize, expert: usize) -> f64 {
    let mut state = (shot as u64) << 32 | expert as u64;
    let mut sum = 0.0;
    for _ in 0..3 {
        // SplitMix64's output function, as a hash.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum += ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
    }
    // Three uniform draws have mean 3/2 and standard deviation 1/2.
    (sum - 1.5) * 2.0
}
