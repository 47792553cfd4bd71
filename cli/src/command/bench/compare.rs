//! `guild bench compare`: is the new result worse than the old one?

use std::io::Write as _;
use std::path::Path;

use guild_node::ExitKind;
use serde_json::{Map, Value, json};

use crate::args::BenchCompare;
use crate::command::log_tool;
use crate::failure::Failure;

/// What decides unless told otherwise, where both results have it.
const USUAL: [&str; 10] = [
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_e2el_ms",
    "p99_e2el_ms",
];

/// One metric of both.
#[derive(Debug, PartialEq)]
struct Row {
    metric: String,
    base: f64,
    new: f64,
    worse: bool,
}

pub(super) fn run(args: &BenchCompare) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let (base, new) = (read(&args.base)?, read(&args.new)?);
    let rows = compare(&base, &new, &args.metrics, args.tolerance).map_err(Failure::usage)?;
    let mut stdout = std::io::stdout();
    if args.json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({"metric": row.metric, "base": row.base, "new": row.new,
                    "ratio": ratio(row), "worse": row.worse})
            })
            .collect();
        writeln!(
            stdout,
            "{}",
            json!({"tolerance_percent": args.tolerance, "metrics": rows})
        )?;
    } else {
        writeln!(
            stdout,
            "{:<28} {:>12} {:>12} {:>8}",
            "", "base", "new", "ratio"
        )?;
        for row in &rows {
            let ratio = ratio(row).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
            let mark = if row.worse { "  worse" } else { "" };
            writeln!(
                stdout,
                "{:<28} {:>12.2} {:>12.2} {ratio:>8}{mark}",
                row.metric, row.base, row.new
            )?;
        }
    }
    let worse: Vec<&str> = rows
        .iter()
        .filter(|r| r.worse)
        .map(|r| r.metric.as_str())
        .collect();
    if worse.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        ExitKind::Verdict,
        format!(
            "worse by more than {} %: {}",
            args.tolerance,
            worse.join(", ")
        ),
    ))
}

fn ratio(row: &Row) -> Option<f64> {
    (row.base != 0.0).then(|| row.new / row.base)
}

fn read(path: &Path) -> Result<Map<String, Value>, Failure> {
    let wrong = |why: String| Failure::usage(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| wrong(format!("no result of a benchmark: {error}")))
}

/// Whether more of a metric is better; None: neither.
fn more_is_better(metric: &str) -> Option<bool> {
    let is = |ends: &[&str]| ends.iter().any(|end| metric.ends_with(end));
    if is(&["_throughput", "_goodput", "_tokens_per_s", "completed"]) {
        Some(true)
    } else if is(&["_ms", "failed", "duration"]) {
        Some(false)
    } else {
        None
    }
}

fn compare(
    base: &Map<String, Value>,
    new: &Map<String, Value>,
    asked: &[String],
    tolerance: f64,
) -> Result<Vec<Row>, String> {
    let number = |of: &Map<String, Value>, metric: &str| of.get(metric).and_then(Value::as_f64);
    let usual = USUAL.iter().map(|&metric| metric.to_owned());
    let metrics: Vec<String> = match asked {
        [] => usual
            .filter(|m| number(base, m).is_some() && number(new, m).is_some())
            .collect(),
        asked => asked.to_vec(),
    };
    if metrics.is_empty() {
        return Err("the two files have no metric in common".to_owned());
    }
    let row = |metric: String| {
        let more = more_is_better(&metric).ok_or_else(|| {
            format!("--metrics: `{metric}` is no metric that can be better or worse")
        })?;
        let (Some(base), Some(new)) = (number(base, &metric), number(new, &metric)) else {
            return Err(format!("--metrics: `{metric}` is not in both files"));
        };
        let allowed = base.abs() * tolerance / 100.0;
        let worse = match more {
            true => new < base - allowed,
            false => new > base + allowed,
        };
        Ok(Row {
            metric,
            base,
            new,
            worse,
        })
    };
    metrics.into_iter().map(row).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn result(throughput: f64, ttft: f64) -> Map<String, Value> {
        let value =
            json!({"output_throughput": throughput, "p99_ttft_ms": ttft, "request_goodput": null});
        value.as_object().cloned().unwrap()
    }

    fn worse(base: (f64, f64), new: (f64, f64)) -> Vec<bool> {
        let (base, new) = (result(base.0, base.1), result(new.0, new.1));
        let rows = compare(&base, &new, &[], 5.0).unwrap();
        rows.iter().map(|row| row.worse).collect()
    }

    #[test]
    fn less_throughput_and_more_time_are_worse_beyond_the_tolerance() {
        assert_eq!(worse((100.0, 10.0), (96.0, 10.4)), [false, false]);
        assert_eq!(worse((100.0, 10.0), (94.0, 10.4)), [true, false]);
        assert_eq!(worse((100.0, 10.0), (200.0, 10.6)), [false, true]);
    }

    #[test]
    fn a_metric_that_is_not_there_is_an_error_when_asked_for() {
        let both = result(1.0, 1.0);
        let asked = |metric: &str| compare(&both, &both, &[metric.to_owned()], 5.0).unwrap_err();
        assert!(asked("p50_ttft_ms").contains("not in both"));
        assert!(asked("model_id").contains("better or worse"));
        assert!(compare(&Map::new(), &both, &[], 5.0).is_err());
    }
}
