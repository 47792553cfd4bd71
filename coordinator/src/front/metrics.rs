//! What the front door has served, as a page for Prometheus.
//!
//! Secret: the names. They are those of vLLM under a prefix of our own, so that a dashboard is carried over by
//! renaming. An answer is counted when it has come to its end; of one that a stop string cut off, drafts up to the cut.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use guild_node::metrics::{Histogram, Page, TokenTimes};
use guild_proto::inference::v1::{Complete, Usage};

use tonic::Code;

use super::answer::finish_reason;

/// Counters since the start. They only grow.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    counts: Mutex<Counts>,
    pub(super) token_times: TokenTimes,
    whole: Histogram,
}

#[derive(Debug, Default)]
struct Counts {
    /// Answers, by why they ended.
    answers: BTreeMap<String, u64>,
    /// Requests that were refused or failed, by the name of the gRPC code.
    failures: BTreeMap<String, u64>,
    prompt: u64,
    cached: u64,
    generated: u64,
    /// Drafted and accepted, by place in a draft.
    places: Vec<(u64, u64)>,
}

impl Metrics {
    /// Counts an answer to a request that was `received` then, and has ended now.
    pub(super) fn count(&self, complete: &Complete, received: Instant) {
        self.whole.observe(received.elapsed());
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.answers.entry(finish_reason(complete)).or_default() += 1;
        let none = Usage::default();
        let usage = complete.usage.as_ref().unwrap_or(&none);
        counts.prompt += u64::from(usage.prompt_tokens);
        counts.cached += u64::from(usage.cached_tokens);
        counts.generated += u64::from(usage.completion_tokens);
        let places = usage.drafted_tokens.len();
        if counts.places.len() < places {
            counts.places.resize(places, (0, 0));
        }
        for (place, &drafted) in counts.places.iter_mut().zip(&usage.drafted_tokens) {
            place.0 += u64::from(drafted);
        }
        for (place, &accepted) in counts.places.iter_mut().zip(&usage.accepted_tokens) {
            place.1 += u64::from(accepted);
        }
    }

    /// Counts a request that the cluster has no answer to.
    pub(super) fn fail(&self, code: Code) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.failures.entry(format!("{code:?}")).or_default() += 1;
    }

    /// All of them, for the model that clients call so, while so many requests are in flight.
    pub(super) fn page(&self, model: &str, in_flight: usize) -> Page {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = Page::of(model);
        page.gauge(
            "guild_num_requests_running",
            "Requests that are being answered, those that wait at a node among them.",
            in_flight,
        );
        page.counters(
            "guild_request_success_total",
            "Answers that have come to their end.",
            "finished_reason",
            counts.answers.iter().map(|(reason, &n)| (reason, n)),
        );
        page.counters(
            "guild_request_failure_total",
            "Requests that the cluster has refused or that have failed, by the gRPC code of the reason.",
            "code",
            counts.failures.iter().map(|(code, &n)| (code, n)),
        );
        page.counter(
            "guild_prompt_tokens_total",
            "Tokens of prompts.",
            counts.prompt,
        );
        page.counter(
            "guild_generation_tokens_total",
            "Tokens of answers.",
            counts.generated,
        );
        page.prefix_cache(counts.prompt, counts.cached);
        page.drafts(&counts.places);
        page.token_times(&self.token_times);
        page.histogram(
            "guild_e2e_request_latency_seconds",
            "From a request to the end of its answer.",
            &self.whole,
        );
        page
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use guild_proto::inference::v1::FinishReason;

    use super::*;

    #[test]
    fn counters_add_up_over_answers_and_places() {
        let metrics = Metrics::default();
        for (drafted, accepted) in [
            (vec![4, 2], vec![3, 1]),
            (vec![2], vec![0]),
            (vec![], vec![]),
        ] {
            let complete = Complete {
                finish_reason: FinishReason::Length.into(),
                usage: Some(Usage {
                    prompt_tokens: 10,
                    cached_tokens: 4,
                    completion_tokens: 7,
                    drafted_tokens: drafted,
                    accepted_tokens: accepted,
                    ..Usage::default()
                }),
                ..Complete::default()
            };
            metrics.count(&complete, Instant::now());
        }
        for code in [
            Code::Unavailable,
            Code::Unavailable,
            Code::ResourceExhausted,
        ] {
            metrics.fail(code);
        }
        let text = metrics.page("demo", 2).text().unwrap();
        for line in [
            r#"guild_request_success_total{model_name="demo",finished_reason="length"} 3"#,
            r#"guild_request_failure_total{model_name="demo",code="Unavailable"} 2"#,
            r#"guild_request_failure_total{model_name="demo",code="ResourceExhausted"} 1"#,
            r#"guild_num_requests_running{model_name="demo"} 2"#,
            r#"guild_e2e_request_latency_seconds_count{model_name="demo"} 3"#,
            r#"guild_prompt_tokens_total{model_name="demo"} 30"#,
            r#"guild_prefix_cache_hits_total{model_name="demo"} 12"#,
            r#"guild_generation_tokens_total{model_name="demo"} 21"#,
            r#"guild_spec_decode_num_drafts_total{model_name="demo"} 6"#,
            r#"guild_spec_decode_num_draft_tokens_total{model_name="demo"} 8"#,
            r#"guild_spec_decode_num_accepted_tokens_total{model_name="demo"} 4"#,
            r#"guild_spec_decode_num_draft_tokens_per_pos_total{model_name="demo",position="1"} 2"#,
            r#"guild_spec_decode_num_accepted_tokens_per_pos_total{model_name="demo",position="0"} 3"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
