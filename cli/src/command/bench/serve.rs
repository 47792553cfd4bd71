//! `guild bench serve`: offers a load, watches what comes back, says what it was like.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_node::ExitKind;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use super::dataset::{Maker, Sample};
use super::metrics::{Outcome, answered, details, figures};
use super::send::Client;
use super::{arrival, report};
use crate::args::{Api, BenchServe};
use crate::command::{block_on, log_tool};
use crate::failure::Failure;
use crate::http::Server;

/// Different errors that are shown.
const SHOWN_ERRORS: usize = 5;

pub(super) fn run(args: &BenchServe) -> Result<(), Failure> {
    log_tool(&args.common)?;
    block_on(serve(args))
}

async fn serve(args: &BenchServe) -> Result<(), Failure> {
    let server = Server::new(&args.endpoint, &args.access)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&server).await?,
    };
    let maker = Maker::new(args)?;
    let (samples, warmups) = (maker.samples()?, maker.warmups()?);
    let client = Arc::new(Client::new(server, &model, args)?);
    warm_up(&client, warmups).await?;
    let (outcomes, duration) = offer(args, &client, samples).await?;

    let mut result = head(args, &model);
    let figures = figures(&outcomes, duration, &args.goodput, &args.metric_percentiles);
    result.extend(figures);
    if let Some(path) = &args.html {
        write(path, "--html", report::page(&result, &outcomes).as_bytes())?;
    }
    let mut stdout = std::io::stdout();
    if args.json {
        writeln!(stdout, "{}", Value::Object(result.clone()))?;
    } else {
        write!(stdout, "{}", report::table(&result))?;
    }
    for (error, times) in errors(&outcomes) {
        writeln!(std::io::stderr(), "failed {times} times: {error}")?;
    }
    if args.save_detailed {
        result.extend(details(&outcomes));
    }
    if let Some(path) = &args.out {
        write(path, "--out", Value::Object(result).to_string().as_bytes())?;
    }
    match answered(&outcomes).next() {
        Some(_) => Ok(()),
        None => Err(Failure::network("no request was answered")),
    }
}

async fn first_model(server: &Server) -> Result<String, Failure> {
    let models = server.get("/v1/models").await?;
    let name = models["data"][0]["id"].as_str().map(str::to_owned);
    name.ok_or_else(|| Failure::network(format!("{server} lists no model")).hint("give --model"))
}

/// The first requests find everything cold, and say at once when something is wrong.
async fn warm_up(client: &Client, warmups: Vec<Sample>) -> Result<(), Failure> {
    for sample in &warmups {
        let now = Instant::now();
        if let Some(error) = client.ask(sample, now, now).await.error {
            return Err(Failure::network(format!("the first request failed: {error}"))
                .hint("is the server there, and do its limits and the vocabulary allow such requests?"));
        }
    }
    Ok(())
}

/// Sends every request when it is due and waits for all answers: what came of each, in the order
/// of the samples, and the seconds that it took.
async fn offer(
    args: &BenchServe,
    client: &Arc<Client>,
    samples: Vec<Sample>,
) -> Result<(Vec<Outcome>, f64), Failure> {
    let n = samples.len();
    let times: Vec<f64> = match (args.request_rate, samples.iter().map(|s| s.at).collect()) {
        (None, Some(own)) => own,
        (rate, _) => arrival::times(n, rate.unwrap_or(f64::INFINITY), args.burstiness, args.seed),
    };
    let places = args
        .max_concurrency
        .map(|n| Arc::new(Semaphore::new(n as usize)));
    let bar = bar(n);
    let start = Instant::now();
    let mut running = JoinSet::new();
    for (index, (sample, at)) in samples.into_iter().zip(times).enumerate() {
        let (client, places, bar) = (Arc::clone(client), places.clone(), bar.clone());
        running.spawn(async move {
            // Far away, but not beyond what a clock can say.
            let due = start + Duration::try_from_secs_f64(at).unwrap_or(Duration::MAX / 4);
            sleep_until(due.into()).await;
            let _place = match &places {
                Some(places) => places.acquire().await.ok(),
                None => None,
            };
            let outcome = client.ask(&sample, start, due).await;
            bar.inc(1);
            (index, outcome)
        });
    }
    let mut outcomes = vec![Outcome::default(); n];
    while let Some(ended) = running.join_next().await {
        let (index, outcome) = ended.map_err(|error| {
            Failure::new(
                ExitKind::Internal,
                format!("a request has panicked: {error}"),
            )
        })?;
        outcomes[index] = outcome;
    }
    bar.finish_and_clear();
    Ok((outcomes, start.elapsed().as_secs_f64()))
}

fn bar(n: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{pos}/{len} [{bar:40}] {elapsed} {per_sec} {eta}");
    let bar = ProgressBar::new(n as u64);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// What was measured, under the names that others look for.
fn head(args: &BenchServe, model: &str) -> Map<String, Value> {
    let now = OffsetDateTime::now_utc();
    let date = format!(
        "{:04}{:02}{:02}-{:02}{:02}{:02}",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute(),
        now.second()
    );
    let kind = match args.api {
        Api::Completions => "openai",
        Api::Chat => "openai-chat",
    };
    let rate = match args.request_rate {
        Some(rate) if rate.is_finite() => json!(rate),
        _ => json!("inf"),
    };
    let tokenizer = args.tokenizer.as_ref().map(|dir| dir.display().to_string());
    let fields = [
        ("date", json!(date)),
        ("endpoint_type", json!(kind)),
        ("backend", json!(kind)),
        ("label", json!(args.label)),
        ("model_id", json!(model)),
        ("tokenizer_id", json!(tokenizer)),
        ("num_prompts", json!(args.num_prompts)),
        ("request_rate", rate),
        ("burstiness", json!(args.burstiness)),
        ("max_concurrency", json!(args.max_concurrency)),
    ];
    fields
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// Different errors and how often each came, the most frequent first.
fn errors(outcomes: &[Outcome]) -> Vec<(&str, usize)> {
    let mut found: Vec<(&str, usize)> = Vec::new();
    for error in outcomes.iter().filter_map(|o| o.error.as_deref()) {
        match found.iter_mut().find(|(known, _)| *known == error) {
            Some((_, times)) => *times += 1,
            None => found.push((error, 1)),
        }
    }
    found.sort_by_key(|&(_, times)| std::cmp::Reverse(times));
    found.truncate(SHOWN_ERRORS);
    found
}

fn write(path: &Path, flag: &str, bytes: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, bytes).map_err(|error| {
        Failure::new(
            ExitKind::Resources,
            format!("{flag}: cannot write {}: {error}", path.display()),
        )
    })
}
