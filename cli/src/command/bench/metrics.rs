//! From what each client saw to the figures of a run.
//!
//! Secret: the definitions, which are those of `vllm bench serve`, names and all: a result can
//! be read by whatever reads that. Standard deviations are those of the population, percentiles
//! lie between the two nearest values, a request with one token has no TPOT (and a perfect one
//! where goodput is asked).

use serde_json::{Map, Value, json};

use crate::args::Objective;

/// What one request came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// Tokens of the prompt: as the server counted, else as was asked.
    pub(super) prompt_len: usize,
    /// Tokens of the answer; 0 where it failed.
    pub(super) output_len: usize,
    /// Seconds from the start of the run to its sending.
    pub(super) start: f64,
    /// Seconds it waited here for --max-concurrency.
    pub(super) queued: f64,
    /// Seconds from sending to the first token.
    pub(super) ttft: f64,
    /// Seconds between chunks with tokens.
    pub(super) itl: Vec<f64>,
    /// Seconds from sending to the last token.
    pub(super) latency: f64,
    pub(super) text: String,
    /// Why it failed.
    pub(super) error: Option<String>,
}

impl Outcome {
    /// Seconds per token after the first; None: there is none.
    fn tpot(&self) -> Option<f64> {
        (self.output_len > 1).then(|| (self.latency - self.ttft) / (self.output_len - 1) as f64)
    }

    fn end(&self) -> f64 {
        self.start + self.latency
    }

    /// When each chunk came, in seconds from the start of the run.
    pub(super) fn chunks(&self) -> impl Iterator<Item = f64> {
        let first = self.start + self.ttft;
        std::iter::once(first).chain(self.itl.iter().scan(first, |at, gap| {
            *at += gap;
            Some(*at)
        }))
    }

    fn keeps(&self, objectives: &[(Objective, f64)]) -> bool {
        objectives.iter().all(|(objective, limit)| {
            let seconds = match objective {
                Objective::Ttft => self.ttft,
                Objective::Tpot => self.tpot().unwrap_or(0.0),
                Objective::E2el => self.latency,
            };
            seconds * 1000.0 <= *limit
        })
    }
}

/// The requests that were answered.
pub(super) fn answered(outcomes: &[Outcome]) -> impl Iterator<Item = &Outcome> {
    outcomes.iter().filter(|outcome| outcome.error.is_none())
}

/// The four families of times, each under its name, in milliseconds.
pub(super) fn families(outcomes: &[Outcome]) -> [(&'static str, Vec<f64>); 4] {
    let of = |time: fn(&Outcome) -> Option<f64>| {
        answered(outcomes)
            .filter_map(time)
            .map(|s| s * 1000.0)
            .collect()
    };
    [
        ("ttft", of(|o| Some(o.ttft))),
        ("tpot", of(Outcome::tpot)),
        (
            "itl",
            answered(outcomes)
                .flat_map(|o| o.itl.iter().map(|s| s * 1000.0))
                .collect(),
        ),
        ("e2el", of(|o| Some(o.latency))),
    ]
}

/// The figures of a run of `duration` seconds.
pub(super) fn figures(
    outcomes: &[Outcome],
    duration: f64,
    objectives: &[(Objective, f64)],
    percentiles: &[f64],
) -> Map<String, Value> {
    let completed = answered(outcomes).count();
    let input: usize = answered(outcomes).map(|o| o.prompt_len).sum();
    let output: usize = answered(outcomes).map(|o| o.output_len).sum();
    let good = answered(outcomes).filter(|o| o.keeps(objectives)).count();
    let rate = |n: usize| n as f64 / duration;
    let mut figures = Map::new();
    let mut put = |name: String, value: Value| {
        figures.insert(name, value);
    };
    put("duration".into(), json!(duration));
    put("completed".into(), json!(completed));
    put("failed".into(), json!(outcomes.len() - completed));
    put("total_input_tokens".into(), json!(input));
    put("total_output_tokens".into(), json!(output));
    put("request_throughput".into(), json!(rate(completed)));
    let goodput = (!objectives.is_empty()).then(|| rate(good));
    put("request_goodput".into(), json!(goodput));
    put("output_throughput".into(), json!(rate(output)));
    put("total_token_throughput".into(), json!(rate(input + output)));
    let busiest = per_second(outcomes).into_iter().max().unwrap_or(0);
    put("max_output_tokens_per_s".into(), json!(busiest as f64));
    put(
        "max_concurrent_requests".into(),
        json!(concurrency(outcomes)),
    );
    for (name, mut times) in families(outcomes) {
        times.sort_by(f64::total_cmp);
        let (mean, deviation) = moments(&times);
        put(format!("mean_{name}_ms"), json!(mean));
        put(format!("median_{name}_ms"), json!(percentile(&times, 50.0)));
        put(format!("std_{name}_ms"), json!(deviation));
        for &p in percentiles {
            put(format!("p{p}_{name}_ms"), json!(percentile(&times, p)));
        }
    }
    figures
}

/// Every request by itself, in the order they were made.
pub(super) fn details(outcomes: &[Outcome]) -> Map<String, Value> {
    let each = |value: fn(&Outcome) -> Value| Value::Array(outcomes.iter().map(value).collect());
    let lists = [
        ("input_lens", each(|o| json!(o.prompt_len))),
        ("output_lens", each(|o| json!(o.output_len))),
        ("ttfts", each(|o| json!(o.ttft))),
        ("itls", each(|o| json!(o.itl))),
        ("latencies", each(|o| json!(o.latency))),
        ("start_times", each(|o| json!(o.start))),
        ("queue_times", each(|o| json!(o.queued))),
        ("generated_texts", each(|o| json!(o.text))),
        ("errors", each(|o| json!(o.error.as_deref().unwrap_or("")))),
    ];
    lists
        .into_iter()
        .map(|(name, list)| (name.to_owned(), list))
        .collect()
}

/// Chunks with tokens in each second since the first request was sent.
pub(super) fn per_second(outcomes: &[Outcome]) -> Vec<u64> {
    let first = answered(outcomes)
        .map(|o| o.start)
        .fold(f64::INFINITY, f64::min);
    let last = answered(outcomes).map(Outcome::end).fold(first, f64::max);
    if !first.is_finite() {
        return Vec::new();
    }
    let mut seconds = vec![0u64; (last - first).ceil() as usize + 1];
    for at in answered(outcomes).flat_map(Outcome::chunks) {
        if let Some(second) = seconds.get_mut((at - first) as usize) {
            *second += 1;
        }
    }
    seconds
}

/// Times at which the number of requests under way changes, and that number from then on.
pub(super) fn under_way(outcomes: &[Outcome]) -> Vec<(f64, i64)> {
    let mut events: Vec<(f64, i64)> = answered(outcomes)
        .flat_map(|o| [(o.start, 1), (o.end(), -1)])
        .collect();
    // One that ends as another begins was not there at the same time.
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut now = 0;
    for (_, change) in &mut events {
        now += *change;
        *change = now;
    }
    events
}

fn concurrency(outcomes: &[Outcome]) -> i64 {
    under_way(outcomes)
        .into_iter()
        .map(|(_, n)| n)
        .max()
        .unwrap_or(0)
}

fn moments(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

/// Of ascending values, between the two nearest; 0 where there are none.
pub(super) fn percentile(values: &[f64], p: f64) -> f64 {
    let Some(last) = values.len().checked_sub(1) else {
        return 0.0;
    };
    let at = p / 100.0 * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    values[low] + (values[high.min(last)] - values[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start: f64, ttft: f64, itl: &[f64], output_len: usize) -> Outcome {
        Outcome {
            prompt_len: 10,
            output_len,
            start,
            ttft,
            itl: itl.to_vec(),
            latency: ttft + itl.iter().sum::<f64>(),
            ..Outcome::default()
        }
    }

    fn failed() -> Outcome {
        Outcome {
            prompt_len: 10,
            error: Some("503".into()),
            ..Outcome::default()
        }
    }

    /// Numbers worked out by hand from the definitions.
    #[test]
    fn figures_follow_the_definitions() {
        let runs = [
            outcome(0.0, 0.1, &[0.02, 0.04], 3),
            // Two tokens came in one chunk.
            outcome(1.0, 0.3, &[0.06], 3),
            outcome(1.2, 0.2, &[], 1),
            failed(),
        ];
        let objectives = [(Objective::Ttft, 250.0), (Objective::Tpot, 30.0)];
        let figures = figures(&runs, 2.0, &objectives, &[99.0, 99.9]);
        let get = |name: &str| figures[name].as_f64().unwrap_or(f64::NAN);
        let near = |name: &str, want: f64| {
            assert!(
                (get(name) - want).abs() < 1e-9,
                "{name}: {} not {want}",
                get(name)
            );
        };
        near("completed", 3.0);
        near("failed", 1.0);
        near("total_input_tokens", 30.0);
        near("total_output_tokens", 7.0);
        near("request_throughput", 1.5);
        near("output_throughput", 3.5);
        near("total_token_throughput", 18.5);
        // The second is too late with its first token, the third has no further one.
        near("request_goodput", 1.0);
        near("mean_ttft_ms", 200.0);
        near("median_ttft_ms", 200.0);
        near("std_ttft_ms", (20_000.0f64 / 3.0).sqrt());
        near("p99_ttft_ms", 298.0);
        near("p99.9_ttft_ms", 299.8);
        // Of the first two only: 60 ms over two, 60 ms over two.
        near("mean_tpot_ms", 30.0);
        near("mean_itl_ms", 40.0);
        near("median_itl_ms", 40.0);
        near("median_e2el_ms", 200.0);
        near("max_concurrent_requests", 2.0);
        // In the first second three chunks, in the next the other three.
        near("max_output_tokens_per_s", 3.0);
    }

    #[test]
    fn nothing_answered_is_zeros_and_no_division_by_them() {
        let figures = figures(&[failed()], 1.0, &[], &[99.0]);
        assert_eq!(figures["completed"], 0);
        assert_eq!(figures["request_goodput"], Value::Null);
        assert_eq!(figures["p99_itl_ms"], 0.0);
        assert_eq!(figures["max_concurrent_requests"], 0);
    }

    #[test]
    fn a_request_that_ends_as_another_begins_is_not_beside_it() {
        let runs = [outcome(0.0, 0.5, &[], 1), outcome(0.5, 0.5, &[], 1)];
        assert_eq!(concurrency(&runs), 1);
    }

    #[test]
    fn details_are_a_list_for_every_request() {
        let details = details(&[outcome(0.0, 0.1, &[0.2], 2), failed()]);
        assert!(
            details
                .values()
                .all(|list| list.as_array().is_some_and(|l| l.len() == 2))
        );
        assert_eq!(details["errors"], json!(["", "503"]));
    }
}
