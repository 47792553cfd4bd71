//! What a process has counted, as the page that Prometheus reads, and the port that it reads it from.
//!
//! Secret: the text format. Whoever counts keeps plain atomics and says, when a page is asked for, what they are called;
//! nothing is done for a page that nobody asks for. Names are those of vLLM under a prefix of our own where there is such
//! a thing there, so that a dashboard is carried over by renaming. A page has no content of requests and no names of
//! clients, so the port is plain HTTP and asks for nothing, like etcd's `--listen-metrics-urls`. This module must not
//! know what is counted.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::TextEncoder;
use prometheus::proto::{self, LabelPair, Metric, MetricFamily, MetricType};

use crate::serve::Health;

/// Media type of a page.
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of histograms of times that somebody waits for, in seconds: vLLM's for the first token and beyond.
pub const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
/// Upper bounds of histograms of numbers of rows.
pub const ROWS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0,
];

/// A page that is being written. Every series of it has the labels that it was made with.
#[derive(Debug)]
pub struct Page {
    labels: Vec<(&'static str, String)>,
    families: Vec<MetricFamily>,
}

impl Page {
    /// An empty page about the model that clients call so.
    pub fn of(model: &str) -> Page {
        Page {
            labels: vec![("model_name", model.to_owned())],
            families: Vec::new(),
        }
    }

    /// Something that only grows; by the custom its name ends in `_total`.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Number) {
        self.counters(name, help, "", [("", value)]);
    }

    /// Such things by the values of one label more; nothing where there are none.
    pub fn counters<V: fmt::Display>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        series: impl IntoIterator<Item = (V, impl Number)>,
    ) {
        let series = series.into_iter().map(|(of, value)| {
            let mut counter = proto::Counter::default();
            counter.set_value(value.float());
            let mut metric = Metric::from_label(self.labels(label, &of.to_string()));
            metric.set_counter(counter);
            metric
        });
        let series = series.collect();
        self.family(name, help, MetricType::COUNTER, series);
    }

    /// How much of something there is now.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Number) {
        let mut gauge = proto::Gauge::default();
        gauge.set_value(value.float());
        let mut metric = Metric::from_label(self.labels("", ""));
        metric.set_gauge(gauge);
        self.family(name, help, MetricType::GAUGE, vec![metric]);
    }

    /// How often something was how large.
    pub fn histogram(&mut self, name: &str, help: &str, value: &Histogram) {
        let mut metric = Metric::from_label(self.labels("", ""));
        metric.set_histogram(value.read());
        self.family(name, help, MetricType::HISTOGRAM, vec![metric]);
    }

    /// Tokens of prompts that were looked for in a prefix cache, and those found there.
    pub fn prefix_cache(&mut self, queries: u64, hits: u64) {
        self.counter(
            "guild_prefix_cache_queries_total",
            "Tokens of prompts that were looked for in the prefix cache.",
            queries,
        );
        self.counter(
            "guild_prefix_cache_hits_total",
            "Tokens of prompts that were found there.",
            hits,
        );
    }

    /// Drafts by their `places`: how many tokens were tried at each, and how many of them held.
    pub fn drafts(&mut self, places: &[(u64, u64)]) {
        let (tried, held) = places
            .iter()
            .fold((0, 0), |sum, place| (sum.0 + place.0, sum.1 + place.1));
        let first = places.first().map_or(0, |place| place.0);
        for (name, help, value) in [
            ("drafts", "Drafts, of one token or several.", first),
            ("draft_tokens", "Tokens drafted.", tried),
            ("accepted_tokens", "Tokens drafted and accepted.", held),
        ] {
            self.counter(&format!("guild_spec_decode_num_{name}_total"), help, value);
        }
        let at = || places.iter().enumerate();
        self.counters(
            "guild_spec_decode_num_draft_tokens_per_pos_total",
            "Tokens drafted, by place in the draft.",
            "position",
            at().map(|(at, place)| (at, place.0)),
        );
        self.counters(
            "guild_spec_decode_num_accepted_tokens_per_pos_total",
            "Tokens accepted, by place in the draft.",
            "position",
            at().map(|(at, place)| (at, place.1)),
        );
    }

    /// What clients have waited for tokens.
    pub fn token_times(&mut self, times: &TokenTimes) {
        self.histogram(
            "guild_time_to_first_token_seconds",
            "From a request's arrival here to the first token of its output.",
            &times.first,
        );
        self.histogram(
            "guild_inter_token_latency_seconds",
            "From one token of an output to the next; those of drafts that held come together.",
            &times.between,
        );
    }

    /// The page as text.
    ///
    /// # Errors
    /// What is wrong with it: a defect of who has written it.
    pub fn text(&self) -> Result<String, String> {
        let text = TextEncoder::new().encode_to_string(&self.families);
        text.map_err(|error| error.to_string())
    }

    fn family(&mut self, name: &str, help: &str, kind: MetricType, series: Vec<Metric>) {
        // The format has no families without series.
        if series.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(series);
        self.families.push(family);
    }

    /// Those of the page, and one more if it has a name.
    fn labels(&self, name: &str, value: &str) -> Vec<LabelPair> {
        let own = self.labels.iter().map(|(name, value)| (*name, &value[..]));
        own.chain((!name.is_empty()).then_some((name, value)))
            .map(|(name, value)| {
                let mut pair = LabelPair::default();
                pair.set_name(name.to_owned());
                pair.set_value(value.to_owned());
                pair
            })
            .collect()
    }
}

/// The page as an answer over HTTP.
impl IntoResponse for Page {
    fn into_response(self) -> Response {
        match self.text() {
            Ok(text) => ([(header::CONTENT_TYPE, MEDIA_TYPE)], text).into_response(),
            Err(defect) => (StatusCode::INTERNAL_SERVER_ERROR, defect).into_response(),
        }
    }
}

/// What series count by: Prometheus has floats alone.
pub trait Number {
    /// The same, rounded where a float has no place for it.
    fn float(self) -> f64;
}

impl Number for f64 {
    fn float(self) -> f64 {
        self
    }
}

impl Number for u64 {
    fn float(self) -> f64 {
        self as f64
    }
}

impl Number for usize {
    fn float(self) -> f64 {
        self as f64
    }
}

impl Number for &AtomicU64 {
    fn float(self) -> f64 {
        self.load(Ordering::Relaxed) as f64
    }
}

/// Seconds.
impl Number for Duration {
    fn float(self) -> f64 {
        self.as_secs_f64()
    }
}

/// How often something was how large, counted without a lock.
#[derive(Debug)]
pub struct Histogram {
    /// Ascending.
    bounds: &'static [f64],
    /// Observations up to each bound and above the one before; the last ones are above all.
    counts: Vec<AtomicU64>,
    /// Of what was observed, the bits of a float.
    sum: AtomicU64,
}

/// Of times that somebody waits for: an empty one in [`SECONDS`].
impl Default for Histogram {
    fn default() -> Self {
        Self::new(SECONDS)
    }
}

impl Histogram {
    /// An empty one with the upper bounds `bounds`, ascending, and one more bucket above them.
    pub fn new(bounds: &'static [f64]) -> Histogram {
        Histogram {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0.0f64.to_bits()),
        }
    }

    /// Counts one observation.
    pub fn observe(&self, value: impl Number) {
        let value = value.float();
        let at = self.bounds.partition_point(|&bound| bound < value);
        if let Some(count) = self.counts.get(at) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let add = |sum: u64| Some((f64::from_bits(sum) + value).to_bits());
        // It always has a value to try.
        let _ = self
            .sum
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    fn read(&self) -> proto::Histogram {
        let mut so_far = 0;
        let buckets = self.bounds.iter().zip(&self.counts).map(|(&bound, count)| {
            so_far += count.load(Ordering::Relaxed);
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(so_far);
            bucket
        });
        let mut read = proto::Histogram::default();
        read.set_bucket(buckets.collect());
        let above = self.counts.last();
        let above = above.map_or(0, |count| count.load(Ordering::Relaxed));
        read.set_sample_count(so_far + above);
        read.set_sample_sum(f64::from_bits(self.sum.load(Ordering::Relaxed)));
        read
    }
}

/// How long after its request an output began, and how long after one another its tokens came, over all outputs.
#[derive(Debug, Default)]
pub struct TokenTimes {
    first: Histogram,
    between: Histogram,
}

impl TokenTimes {
    /// A token has come `now`, for a request that came at `arrived` and had the token before this one at `last`, if
    /// there was one.
    pub fn token(&self, arrived: Instant, last: Option<Instant>, now: Instant) {
        match last {
            None => self.first.observe(now - arrived),
            Some(last) => self.between.observe(now - last),
        }
    }
}

/// A plain port for `/metrics` and `/health`.
#[derive(Clone)]
pub struct MetricsPort {
    /// `host:port`.
    pub address: String,
    /// Writes the page as it is now.
    pub page: Arc<dyn Fn() -> Page + Send + Sync>,
}

impl fmt::Debug for MetricsPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MetricsPort").field(&self.address).finish()
    }
}

impl MetricsPort {
    /// The port at `address`, if there is one.
    pub fn at(
        address: Option<String>,
        page: impl Fn() -> Page + Send + Sync + 'static,
    ) -> Option<MetricsPort> {
        let page = Arc::new(page);
        address.map(|address| MetricsPort { address, page })
    }

    /// What it answers, with the health of the process.
    pub(crate) fn router(self, health: Health) -> Router {
        let page = self.page;
        Router::new()
            .route("/metrics", get(move || async move { page() }))
            .route(
                "/health",
                get(move || async move {
                    match health.is_serving().await {
                        true => (StatusCode::OK, "ready\n"),
                        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
                    }
                }),
            )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_page_names_each_family_once_and_escapes_what_labels_say() {
        let mut page = Page::of("a \"b\"\\c");
        page.counter("guild_a_total", "A.", 3u64);
        page.counters("guild_b_total", "B.", "position", [(0, 2usize), (1, 1)]);
        page.counters("guild_none_total", "None.", "position", [(0, 2u64); 0]);
        page.gauge("guild_c_seconds", "C.", Duration::from_millis(1500));
        let want = r#"# HELP guild_a_total A.
# TYPE guild_a_total counter
guild_a_total{model_name="a \"b\"\\c"} 3
# HELP guild_b_total B.
# TYPE guild_b_total counter
guild_b_total{model_name="a \"b\"\\c",position="0"} 2
guild_b_total{model_name="a \"b\"\\c",position="1"} 1
# HELP guild_c_seconds C.
# TYPE guild_c_seconds gauge
guild_c_seconds{model_name="a \"b\"\\c"} 1.5
"#;
        assert_eq!(page.text().unwrap(), want);
    }

    #[test]
    fn the_first_token_is_timed_from_its_request_and_each_other_from_the_one_before() {
        let times = TokenTimes::default();
        let arrived = Instant::now();
        let at = |ms| arrived + Duration::from_millis(ms);
        times.token(arrived, None, at(500));
        times.token(arrived, Some(at(500)), at(750));
        times.token(arrived, Some(at(750)), at(1000));
        let mut page = Page::of("m");
        page.token_times(&times);
        let text = page.text().unwrap();
        for line in [
            r#"guild_time_to_first_token_seconds_sum{model_name="m"} 0.5"#,
            r#"guild_time_to_first_token_seconds_count{model_name="m"} 1"#,
            r#"guild_time_to_first_token_seconds_bucket{model_name="m",le="60"} 1"#,
            r#"guild_inter_token_latency_seconds_sum{model_name="m"} 0.5"#,
            r#"guild_inter_token_latency_seconds_bucket{model_name="m",le="0.1"} 0"#,
            r#"guild_inter_token_latency_seconds_bucket{model_name="m",le="0.25"} 2"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn buckets_of_a_histogram_hold_what_is_at_most_their_bound() {
        let rows = Histogram::new(&[1.0, 2.0, 4.0]);
        for n in [1usize, 2, 2, 3, 9] {
            rows.observe(n);
        }
        let mut page = Page::of("m");
        page.histogram("guild_rows", "Rows.", &rows);
        let text = page.text().unwrap();
        for line in [
            r#"guild_rows_bucket{model_name="m",le="1"} 1"#,
            r#"guild_rows_bucket{model_name="m",le="2"} 3"#,
            r#"guild_rows_bucket{model_name="m",le="4"} 4"#,
            r#"guild_rows_bucket{model_name="m",le="+Inf"} 5"#,
            r#"guild_rows_sum{model_name="m"} 17"#,
            r#"guild_rows_count{model_name="m"} 5"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
