//! What the front door has served, in the text format that Prometheus reads.
//!
//! Secret: the names. They are those of vLLM under a prefix of our own, so that a dashboard is carried over by
//! renaming. An answer is counted when it has come to its end; one that its client or a stop string cut off is counted
//! without the drafts, which only the node knew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use guild_proto::inference::v1::{Complete, Usage};

use super::answer::finish_reason;

/// Media type of the exposition.
pub(super) const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Counters since the start. They only grow.
#[derive(Debug, Default)]
pub(super) struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Answers, by why they ended.
    answers: BTreeMap<String, u64>,
    prompt: u64,
    cached: u64,
    generated: u64,
    /// Drafted and accepted, by place in a draft.
    places: Vec<(u64, u64)>,
}

impl Metrics {
    /// Counts an answer that has ended.
    pub(super) fn count(&self, complete: &Complete) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// All of them, for the model that clients call so.
    pub(super) fn text(&self, model: &str) -> String {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let model = format!("model_name=\"{}\"", escaped(model));
        let mut page = Page::default();
        page.family(
            "guild_request_success_total",
            "Answers that have come to their end.",
            counts
                .answers
                .iter()
                .map(|(reason, &n)| (format!("{model},finished_reason=\"{reason}\""), n)),
        );
        let (mut drafted, mut accepted) = (0, 0);
        for place in &counts.places {
            drafted += place.0;
            accepted += place.1;
        }
        for (name, help, value) in [
            (
                "guild_prompt_tokens_total",
                "Tokens of prompts.",
                counts.prompt,
            ),
            (
                "guild_generation_tokens_total",
                "Tokens of answers.",
                counts.generated,
            ),
            (
                "guild_prefix_cache_queries_total",
                "Tokens of prompts that were looked for in prefix caches.",
                counts.prompt,
            ),
            (
                "guild_prefix_cache_hits_total",
                "Tokens of prompts that were found there.",
                counts.cached,
            ),
            (
                "guild_spec_decode_num_drafts_total",
                "Drafts, of one token or several.",
                counts.places.first().map_or(0, |place| place.0),
            ),
            (
                "guild_spec_decode_num_draft_tokens_total",
                "Tokens drafted.",
                drafted,
            ),
            (
                "guild_spec_decode_num_accepted_tokens_total",
                "Tokens drafted and accepted.",
                accepted,
            ),
        ] {
            page.family(name, help, [(model.clone(), value)]);
        }
        for (name, help, value) in [
            (
                "guild_spec_decode_num_draft_tokens_per_pos_total",
                "Tokens drafted, by place in the draft.",
                (|place| place.0) as fn(&(u64, u64)) -> u64,
            ),
            (
                "guild_spec_decode_num_accepted_tokens_per_pos_total",
                "Tokens accepted, by place in the draft.",
                |place| place.1,
            ),
        ] {
            let places = counts.places.iter().enumerate();
            page.family(
                name,
                help,
                places.map(|(at, place)| (format!("{model},position=\"{at}\""), value(place))),
            );
        }
        page.0
    }
}

#[derive(Default)]
struct Page(String);

impl Page {
    /// A counter and its series: labels and value.
    fn family(&mut self, name: &str, help: &str, series: impl IntoIterator<Item = (String, u64)>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} counter");
        for (labels, value) in series {
            let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
        }
    }
}

/// A label's value between quotation marks.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
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
            metrics.count(&Complete {
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
            });
        }
        let text = metrics.text("a \"b\"\\c");
        for line in [
            r#"guild_request_success_total{model_name="a \"b\"\\c",finished_reason="length"} 3"#,
            r#"guild_prompt_tokens_total{model_name="a \"b\"\\c"} 30"#,
            r#"guild_prefix_cache_hits_total{model_name="a \"b\"\\c"} 12"#,
            r#"guild_generation_tokens_total{model_name="a \"b\"\\c"} 21"#,
            r#"guild_spec_decode_num_drafts_total{model_name="a \"b\"\\c"} 6"#,
            r#"guild_spec_decode_num_draft_tokens_total{model_name="a \"b\"\\c"} 8"#,
            r#"guild_spec_decode_num_accepted_tokens_total{model_name="a \"b\"\\c"} 4"#,
            r#"guild_spec_decode_num_draft_tokens_per_pos_total{model_name="a \"b\"\\c",position="1"} 2"#,
            r#"guild_spec_decode_num_accepted_tokens_per_pos_total{model_name="a \"b\"\\c",position="0"} 3"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let typed = text.lines().filter(|line| line.ends_with(" counter"));
        assert_eq!(typed.count(), 10);
    }
}
