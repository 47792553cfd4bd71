//! The window of shots as the search sees it: folded, scaled, continued.

use super::MAX_SHOTS;

/// Weight of a shot over that of the next younger one.
const RECENCY: f64 = 0.85;
/// Shots that are foreseen beside those that were seen.
const FORESEEN: usize = 4;
/// How far the load is foreseen to go, in standard deviations of the window.
const REACH: f64 = 1.5;

/// Shots of a layer in the board's units, with their mean first, and the weights.
pub(super) fn fold(shots: &[&[u64]], experts: usize, total: f64) -> (Vec<Vec<f64>>, Vec<f64>) {
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
    for shot in &mut rows {
        let all: f64 = shot.iter().sum();
        shot.iter_mut().for_each(|n| *n *= total / all);
    }
    if rows.len() == 1 {
        return (rows, vec![1.0]);
    }
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
    (rows, weight)
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
        let all: f64 = next.iter().sum();
        if all > 0.0 {
            next.iter_mut().for_each(|n| *n *= total / all);
            rows.push(next);
            weight.push(1.0);
        }
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
