//! Progress of something that takes a while: a bar on a terminal, otherwise a
//! line every tenth of the way.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::units;

/// Lines between start and end when there is no terminal.
const LINES: u64 = 10;
/// What is done sooner needs no lines.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows (bytes done, bytes in all) of one named activity; usable from any thread.
pub(crate) struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    /// Tenths that have been told.
    told: AtomicU64,
    begun: Instant,
}

impl Progress {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{msg:24} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
            );
            let bar = ProgressBar::new(0).with_message(what.clone());
            match style {
                Ok(style) => bar.with_style(style.progress_chars("=> ")),
                Err(_) => bar,
            }
        });
        Self { what, bar, told: AtomicU64::new(0), begun: Instant::now() }
    }

    /// `done` of `total` bytes; may come out of order.
    pub(crate) fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if done >= total {
                bar.finish_and_clear();
            }
        }
        let tenth = done.saturating_mul(LINES).checked_div(total).unwrap_or(LINES);
        if self.told.fetch_max(tenth, Ordering::Relaxed) < tenth {
            let (done, total) = (units::bytes(done), units::bytes(total));
            if self.bar.is_none() && self.begun.elapsed() >= PATIENCE {
                tracing::info!("{}: {done} of {total}", self.what);
            }
        }
    }
}
