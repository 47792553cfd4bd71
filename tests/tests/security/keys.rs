//! API keys: what is compared is the hash of what is shown, in a time that tells nothing.

use std::time::Instant;

use guild_node::keys::{ApiKeys, NewKey};
use guild_tests::work::{line, long};
use serde_json::json;

/// Tries of each kind.
const TRIES: usize = 100_000;
/// Student's t of two samples of one distribution is beyond that once in 150 000.
const MOST_T: f64 = 4.5;

/// The keys of a file with one line, and the line's secret and hash.
fn keys(dir: &tempfile::TempDir) -> (ApiKeys, String, String) {
    let new = NewKey::draw("tester").unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, &new.line).unwrap();
    let hash = new.line.split_once(':').unwrap().1.to_owned();
    (ApiKeys::open(&file).unwrap(), new.secret.clone(), hash)
}

#[test]
fn what_the_file_of_keys_says_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, secret, hash) = keys(&dir);
    assert_eq!(keys.name_of(secret.as_bytes()), Some("tester".to_owned()));
    // Were it compared as it is shown, the hash would do.
    let raw: Vec<u8> = (0..hash.len() / 2)
        .map(|at| u8::from_str_radix(&hash[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    for shown in [hash.as_bytes(), &raw, b"", &secret.as_bytes()[1..]] {
        assert_eq!(keys.name_of(shown), None);
    }
}

/// Welch's t between a key whose hash differs in its first bit and one that agrees with it nowhere
/// in particular; both as long as a right one. What the machine was interrupted by is left out.
#[test]
fn how_long_a_comparison_takes_tells_nothing() {
    if !long() {
        println!("SKIPPED: only with `cargo xtask chaos --long`");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (keys, secret, _) = keys(&dir);
    let mut almost = secret.clone().into_bytes();
    *almost.last_mut().unwrap() ^= 1;
    let never = vec![b'x'; secret.len()];
    let mut took: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for round in 0..2 * TRIES {
        // In an order without a period.
        let which = (round.wrapping_mul(2_654_435_761) >> 16) % 2;
        let shown = if which == 0 { &almost } else { &never };
        let begun = Instant::now();
        assert!(std::hint::black_box(keys.name_of(std::hint::black_box(shown))).is_none());
        took[which].push(begun.elapsed().as_nanos() as f64);
    }
    let mut all = took.concat();
    all.sort_by(f64::total_cmp);
    let most = all[all.len() * 9 / 10];
    let [(m0, v0, n0), (m1, v1, n1)] = took.map(|times| {
        let kept: Vec<f64> = times.into_iter().filter(|time| *time <= most).collect();
        let n = kept.len() as f64;
        let mean = kept.iter().sum::<f64>() / n;
        let variance = kept.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (mean, variance, n)
    });
    let t = (m0 - m1) / (v0 / n0 + v1 / n1).sqrt();
    line(&json!({
        "test": "security", "case": "key_comparison", "tries": 2 * TRIES, "t": t,
        "mean_ns": [m0, m1],
    }));
    assert!(t.abs() < MOST_T, "{t}: {m0} ns and {m1} ns");
}
