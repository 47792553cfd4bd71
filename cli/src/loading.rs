//! Progress of something that takes a while: a bar on a terminal, otherwise a
//! line every tenth of the way.
//!
//! The roles tell how far they are in log events with the fields `bytes` or
//! `done` and `total` or `wanted`. On a terminal those events move a bar
//! instead of becoming lines.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use guild_node::telemetry::{self, LogFormat};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::failure::Failure;
use crate::units;

/// Lines between start and end when there is no terminal.
const LINES: u64 = 10;
/// What is done sooner needs no lines.
const PATIENCE: Duration = Duration::from_secs(1);
/// Columns of a bar.
const STYLE: &str = "{msg:16} [{bar:40}] {percent:>3} % {eta}";

/// Sets up the log of a role on stderr, with bars when a person watches.
///
/// # Errors
/// A malformed level.
pub(crate) fn init_log(format: LogFormat, level: &str) -> Result<(), Failure> {
    if format == LogFormat::Json || !io::stderr().is_terminal() {
        return telemetry::init(format, level).map_err(|error| Failure::of(&error));
    }
    let filter = EnvFilter::try_new(level)
        .map_err(|error| Failure::usage(format!("--log-level: `{level}` is not valid: {error}")))?;
    let bars = Bars::default();
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_writer(bars.clone())
        .with_filter(filter_fn(|event| !is_progress(event)));
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(bars)
        .try_init()
        .map_err(|error| Failure::new(guild_node::ExitKind::Internal, format!("logging: {error}")))
}

fn is_progress(event: &Metadata<'_>) -> bool {
    let has = |name| event.fields().field(name).is_some();
    (has("total") && has("bytes")) || (has("wanted") && has("done"))
}

/// The bars of this process, by what they show.
#[derive(Clone, Default)]
struct Bars {
    screen: MultiProgress,
    known: Arc<Mutex<HashMap<String, ProgressBar>>>,
}

impl Bars {
    fn at(&self, what: &str, key: String, done: u64, total: u64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = known
            .entry(key)
            .or_insert_with(|| self.screen.add(bar(what)));
        bar.set_length(total);
        // Several nodes of one process share a bar: it shows the furthest.
        bar.set_position(bar.position().max(done));
        if done >= total {
            bar.finish_and_clear();
        }
    }
}

impl<S: Subscriber> Layer<S> for Bars {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if !is_progress(event.metadata()) {
            return;
        }
        let mut told = Told::default();
        event.record(&mut told);
        let done = told.done.unwrap_or(told.bytes);
        let key = format!("{}{}", told.message, told.epoch);
        self.at(
            &told.message,
            key,
            done,
            told.total.or(told.wanted).unwrap_or(0),
        );
    }
}

/// The fields of a progress event.
#[derive(Default)]
struct Told {
    message: String,
    epoch: u64,
    bytes: u64,
    total: Option<u64>,
    done: Option<u64>,
    wanted: Option<u64>,
}

impl Visit for Told {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "epoch" => self.epoch = value,
            "bytes" => self.bytes = value,
            "total" => self.total = Some(value),
            "done" => self.done = Some(value),
            "wanted" => self.wanted = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}

/// Log lines go above the bars.
impl<'a> MakeWriter<'a> for Bars {
    type Writer = Above;

    fn make_writer(&'a self) -> Above {
        Above(self.screen.clone())
    }
}

struct Above(MultiProgress);

impl Write for Above {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what.to_owned());
    match ProgressStyle::with_template(STYLE) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// Shows (bytes done, bytes in all) of what this program does itself; usable
/// from any thread.
pub(crate) struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    /// Tenths that have been told.
    told: AtomicU64,
    begun: Instant,
}

impl Progress {
    pub(crate) fn new(what: &'static str) -> Self {
        let bar = io::stderr().is_terminal().then(|| bar(what));
        Self {
            what,
            bar,
            told: AtomicU64::new(0),
            begun: Instant::now(),
        }
    }

    /// Writes what a bar must not be drawn over.
    pub(crate) fn suspend<R>(&self, write: impl FnOnce() -> R) -> R {
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// `done` of `total` bytes; may come out of order.
    pub(crate) fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
            return;
        }
        let tenth = done
            .saturating_mul(LINES)
            .checked_div(total)
            .unwrap_or(LINES);
        if self.told.fetch_max(tenth, Ordering::Relaxed) < tenth && self.begun.elapsed() >= PATIENCE
        {
            tracing::info!(
                "{}: {} of {}",
                self.what,
                units::bytes(done),
                units::bytes(total)
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::Bars;

    #[test]
    fn what_roles_tell_moves_a_bar_and_other_events_do_not() {
        let bars = Bars::default();
        let subscriber = tracing_subscriber::registry().with(bars.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(
                percent = 10u64,
                bytes = 30u64,
                total = 300u64,
                "loading weights"
            );
            tracing::info!(
                epoch = 3u64,
                done = 8usize,
                wanted = 80usize,
                bytes = 99u64,
                "loading experts"
            );
            tracing::info!(bytes = 5u64, "something else");
        });
        let known = bars.known.lock().unwrap();
        let shown = |key: &str| (known[key].position(), known[key].length());
        assert_eq!(shown("loading weights0"), (30, Some(300)));
        assert_eq!(shown("loading experts3"), (8, Some(80)));
        assert_eq!(known.len(), 2);
    }
}
