//! A run for people: a table for the terminal, and a page with plots that needs nothing else.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::metrics::{Outcome, families, per_second, under_way};
use super::plot::{self, Line};

/// Metrics of the table: its title and the field.
const ROWS: [(&str, &str); 13] = [
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Maximum request concurrency", "max_concurrency"),
    ("Request rate configured (RPS)", "request_rate"),
    ("Benchmark duration (s)", "duration"),
    ("Total input tokens", "total_input_tokens"),
    ("Total generated tokens", "total_output_tokens"),
    ("Request throughput (req/s)", "request_throughput"),
    ("Request goodput (req/s)", "request_goodput"),
    ("Output token throughput (tok/s)", "output_throughput"),
    (
        "Peak output token throughput (tok/s)",
        "max_output_tokens_per_s",
    ),
    ("Peak concurrent requests", "max_concurrent_requests"),
    ("Total token throughput (tok/s)", "total_token_throughput"),
];

/// Families of times, as the fields are called and in words.
const TIMES: [(&str, &str); 4] = [
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token after the first"),
    ("itl", "Inter-token latency"),
    ("e2el", "End-to-end latency"),
];

fn shown(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            format!("{:.2}", number.as_f64().unwrap_or_default())
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Titles and values of what the result has.
fn rows(result: &Map<String, Value>) -> Vec<(String, String)> {
    let head = ROWS.into_iter().filter_map(|(title, field)| {
        let value = result.get(field).filter(|value| !value.is_null())?;
        Some((title.to_owned(), shown(value)))
    });
    let times = TIMES.into_iter().flat_map(|(name, _)| {
        let suffix = format!("_{name}_ms");
        result.iter().filter_map(move |(field, value)| {
            let kind = field.strip_suffix(&suffix)?;
            Some((format!("{kind} {} (ms)", name.to_uppercase()), shown(value)))
        })
    });
    head.chain(times).collect()
}

/// The figures, a line each.
pub(super) fn table(result: &Map<String, Value>) -> String {
    let mut out = String::new();
    for (title, value) in rows(result) {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{title:<40} {value:>12}");
    }
    out
}

/// The page.
pub(super) fn page(result: &Map<String, Value>, outcomes: &[Outcome]) -> String {
    let title = result.get("label").and_then(Value::as_str);
    let model = result
        .get("model_id")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let title = escaped(title.unwrap_or(model));
    let mut table = String::new();
    for (name, value) in rows(result) {
        let _ = write!(
            table,
            "<tr><td>{}</td><td>{}</td></tr>",
            escaped(&name),
            escaped(&value)
        );
    }
    let mut plots = String::new();
    for ((name, times), (_, words)) in families(outcomes).into_iter().zip(TIMES) {
        plots += &plot::line(&distribution(name, words, times));
    }
    let tokens = per_second(outcomes).into_iter().enumerate();
    plots += &plot::line(&Line {
        title: "Chunks with tokens in each second".into(),
        x: "seconds",
        y: "chunks",
        points: tokens
            .map(|(second, n)| (second as f64, n as f64))
            .collect(),
    });
    let under_way = under_way(outcomes);
    plots += &plot::line(&Line {
        title: "Requests under way".into(),
        x: "seconds",
        y: "requests",
        points: under_way
            .into_iter()
            .map(|(at, n)| (at, n as f64))
            .collect(),
    });
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>\
         body{{font:14px system-ui,sans-serif;margin:2em;color:#222}}table{{border-collapse:collapse}}\
         td{{padding:.15em .8em;border-bottom:1px solid #ddd}}td+td{{text-align:right;font-variant-numeric:tabular-nums}}\
         .plots{{display:flex;flex-wrap:wrap;gap:1em;margin-top:1em}}</style></head><body>\
         <h1>{title}</h1><p>{} &middot; {}</p><table>{table}</table><div class=\"plots\">{plots}</div></body></html>\n",
        escaped(model),
        escaped(
            result
                .get("date")
                .and_then(Value::as_str)
                .unwrap_or_default()
        ),
    )
}

/// Which share of the values is below each.
fn distribution(name: &str, words: &str, mut times: Vec<f64>) -> Line {
    times.sort_by(f64::total_cmp);
    let n = times.len().max(1) as f64;
    Line {
        title: format!("{words} ({})", name.to_uppercase()),
        x: "ms",
        y: "share of values",
        points: (1..)
            .zip(times)
            .map(|(i, ms)| (ms, f64::from(i) / n))
            .collect(),
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn outcome() -> Outcome {
        Outcome {
            prompt_len: 4,
            output_len: 3,
            ttft: 0.1,
            itl: vec![0.02, 0.03],
            latency: 0.15,
            ..Outcome::default()
        }
    }

    #[test]
    fn a_page_stands_alone_and_escapes_what_servers_say() {
        let result =
            json!({"label": "<script>", "model_id": "m", "completed": 1, "mean_ttft_ms": 100.0});
        let page = page(result.as_object().unwrap_or(&Map::new()), &[outcome()]);
        assert!(!page.contains("<script"), "{page}");
        assert!(!page.contains("http://") || page.contains("http://www.w3.org"));
        assert_eq!(page.matches("<svg").count(), 6);
        assert!(page.contains("mean TTFT (ms)</td><td>100.00"));
    }

    #[test]
    fn nothing_answered_still_makes_a_page() {
        let page = page(&Map::new(), &[]);
        assert_eq!(page.matches("<svg").count(), 6);
    }
}
