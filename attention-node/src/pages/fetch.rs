//! The node that decodes: pages that another one has computed for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::metrics::Page;
use guild_proto::pages::v1::pages_client::PagesClient;
use guild_proto::pages::v1::{PageFrame, PrefillRequest};
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{differ, digest, told};
use crate::moving::Arriving;

/// Other nodes that connections are kept to, at most.
const MAX_HELPERS: usize = 256;
/// A node that has failed is not asked again for so long: prompts are run here meanwhile.
const REST: Duration = Duration::from_secs(5);
/// A node that has said nothing for this long is asked for a sign of life.
const QUIET: Duration = Duration::from_millis(500);
/// Without one it is given up after this long.
const SILENCE: Duration = Duration::from_secs(1);
/// How long the next page, or a sign that the other engine runs, is waited for at least.
const PAGE_FLOOR: Duration = Duration::from_secs(1);
/// How long at most, the first one's place in the other node's queue among it.
const PAGE_LIMIT: Duration = Duration::from_secs(15);
/// How long where nobody knows what a prompt takes here.
const PAGE_UNKNOWN: Duration = Duration::from_secs(3);
/// In between so many times as long as what is missing would take to compute here: whatever has become of the other
/// node, waiting for it costs little more than never having asked.
const PAGE_WORTH: f64 = 2.0;

/// What has been moved here so far.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    pages: AtomicU64,
    bytes: AtomicU64,
    micros: AtomicU64,
    prompts: AtomicU64,
    failures: AtomicU64,
}

impl Moved {
    /// The same for Prometheus.
    pub(crate) fn write(&self, page: &mut Page) {
        for (name, help, value) in [
            (
                "prompts",
                "Prompts that other nodes have run for this one.",
                &self.prompts,
            ),
            (
                "failures",
                "Prompts of which other nodes have run a part at most.",
                &self.failures,
            ),
            (
                "pages",
                "KV pages that have come from other nodes.",
                &self.pages,
            ),
            ("bytes", "Bytes of these pages.", &self.bytes),
        ] {
            page.counter(&format!("guild_prefill_moved_{name}_total"), help, value);
        }
        page.counter(
            "guild_prefill_moved_seconds_total",
            "Time that prompts were waited for.",
            Duration::from_micros(self.micros.load(Ordering::Relaxed)),
        );
    }

    /// One line for the log, if there is anything to say.
    pub(crate) fn log(&self) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let (prompts, failures) = (load(&self.prompts), load(&self.failures));
        if prompts + failures > 0 {
            tracing::info!(
                prompts,
                failures,
                pages = load(&self.pages),
                bytes = load(&self.bytes),
                seconds = load(&self.micros) as f64 / 1e6,
                "prompts that other nodes have run for this one"
            );
        }
    }
}

struct Helper {
    channel: Channel,
    rests_until: Option<Instant>,
}

/// The nodes that run prompts for this one.
pub(crate) struct Helpers {
    dialer: Dialer,
    numerics: String,
    known: Mutex<HashMap<String, Helper>>,
    counters: Moved,
}

/// A prompt that another node is to run.
pub(crate) struct Fetching {
    /// `host:port` of that node.
    pub(crate) from: String,
    /// Digest of configuration and weights.
    pub(crate) digest: String,
    pub(crate) prompt: Vec<u32>,
    pub(crate) tenant: u64,
    pub(crate) priority: i32,
    pub(crate) timeout: Option<Duration>,
    /// Seconds that one of its tokens takes to run here, as far as that is known.
    pub(crate) row_cost: Option<f64>,
    /// Rows of a step at most, here and, as far as anybody knows, there.
    pub(crate) step_rows: usize,
}

impl std::fmt::Debug for Helpers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Helpers").finish_non_exhaustive()
    }
}

impl Helpers {
    pub(crate) fn new(dialer: Dialer, numerics: &str) -> Helpers {
        Helpers {
            dialer,
            numerics: numerics.to_owned(),
            known: Mutex::default(),
            counters: Moved::default(),
        }
    }

    /// Which numerics this node's pages are of.
    pub(crate) fn numerics(&self) -> &str {
        &self.numerics
    }

    pub(crate) fn counters(&self) -> &Moved {
        &self.counters
    }

    /// Brings the pages of a prompt, as far as they come.
    pub(crate) async fn fetch(&self, asked: Fetching, arriving: Arriving) {
        let from = asked.from.clone();
        let Some(channel) = self.channel(&from) else {
            return;
        };
        let began = Instant::now();
        let outcome = tokio::select! {
            outcome = self.bring(channel, asked, &arriving) => outcome,
            () = arriving.over() => Ok(()),
        };
        let micros = began.elapsed().as_micros() as u64;
        self.counters.micros.fetch_add(micros, Ordering::Relaxed);
        match outcome {
            Ok(()) => {
                self.counters.prompts.fetch_add(1, Ordering::Relaxed);
            }
            Err(status) => {
                self.counters.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(from, "pages are computed here: {}", status.message());
                if let Some(helper) = self.lock().get_mut(&from)
                    && status.code() != Code::ResourceExhausted
                {
                    helper.rests_until = Some(Instant::now() + REST);
                }
            }
        }
    }

    async fn bring(
        &self,
        channel: Channel,
        asked: Fetching,
        arriving: &Arriving,
    ) -> Result<(), Status> {
        let form = told(
            &arriving.form,
            arriving.drafts,
            &asked.digest,
            &self.numerics,
        );
        let page_tokens = arriving.form.page_tokens;
        let needed = arriving.keys.len() * page_tokens + 1;
        let page_bytes = arriving.form.bytes(arriving.drafts);
        let request = PrefillRequest {
            form: Some(form.clone()),
            token_ids: asked.prompt.into_iter().take(needed).collect(),
            tenant: asked.tenant,
            priority: asked.priority,
            first_page: arriving.known as u32,
            timeout_ms: { asked.timeout }
                .map(|limit| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX)),
        };
        let missing = |index: usize| (arriving.keys.len() - index) * page_tokens;
        let patience = |rows: usize| patience(asked.row_cost, rows, asked.step_rows);
        let mut waits = patience(missing(arriving.known));
        let mut since = Instant::now();
        let mut client = PagesClient::new(channel);
        let answer = timeout(waits.silence, client.prefill(request));
        let mut frames = answer.await.map_err(|_| late(waits.silence))??.into_inner();
        for (index, &key) in arriving.keys.iter().enumerate().skip(arriving.known) {
            let mut bytes = Vec::with_capacity(page_bytes);
            loop {
                let left = waits.page.saturating_sub(since.elapsed());
                if left.is_zero() {
                    return Err(late(waits.page));
                }
                let frame = timeout(waits.silence.min(left), frames.message());
                let Some(frame) = frame.await.map_err(|_| late(since.elapsed()))?? else {
                    return Err(Status::unavailable("the other node has stopped early"));
                };
                // Its engine runs.
                if frame.data.is_empty() {
                    continue;
                }
                if append(&mut bytes, index, page_bytes, &frame)? {
                    if frame.digest[..] != digest(&form, key, &bytes)[..] {
                        return Err(differ(format!("page {index} has a wrong digest")));
                    }
                    break;
                }
            }
            self.counters.pages.fetch_add(1, Ordering::Relaxed);
            let moved = bytes.len() as u64;
            self.counters.bytes.fetch_add(moved, Ordering::Relaxed);
            if !arriving.bring((index, bytes)).await {
                break;
            }
            (waits, since) = (patience(missing(index + 1)), Instant::now());
        }
        Ok(())
    }

    /// To a node that is not left alone at present.
    fn channel(&self, address: &str) -> Option<Channel> {
        let now = Instant::now();
        let mut known = self.lock();
        if let Some(helper) = known.get(address) {
            let rests = helper.rests_until.is_some_and(|until| now < until);
            return (!rests).then(|| helper.channel.clone());
        }
        if known.len() >= MAX_HELPERS {
            // Connections that streams use live on with them.
            known.clear();
        }
        match self.dialer.lazy_alert(address, QUIET, SILENCE) {
            Ok(channel) => {
                let helper = Helper {
                    channel: channel.clone(),
                    rests_until: None,
                };
                known.insert(address.to_owned(), helper);
                Some(channel)
            }
            Err(error) => {
                tracing::warn!("prefill_from: {error}");
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Helper>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long another node is waited for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Waits {
    /// For the next page.
    page: Duration,
    /// For any frame: its engine may be at a step.
    silence: Duration,
}

/// What waiting is worth while so many rows are missing, of which a step runs at most `step_rows`.
fn patience(row_cost: Option<f64>, rows: usize, step_rows: usize) -> Waits {
    let Some(row) = row_cost else {
        return Waits {
            page: PAGE_UNKNOWN,
            silence: PAGE_FLOOR,
        };
    };
    let worth = |rows: usize| {
        let worth = Duration::try_from_secs_f64(row * rows as f64 * PAGE_WORTH);
        worth.unwrap_or(PAGE_LIMIT).clamp(PAGE_FLOOR, PAGE_LIMIT)
    };
    Waits {
        page: worth(rows),
        silence: worth(rows.min(step_rows)),
    }
}

fn late(limit: Duration) -> Status {
    Status::deadline_exceeded(format!("no page has come within {limit:?}"))
}

/// Adds a piece of page `index` to what there is of it. True: it is whole.
fn append(
    bytes: &mut Vec<u8>,
    index: usize,
    page_bytes: usize,
    frame: &PageFrame,
) -> Result<bool, Status> {
    let follows = frame.page as usize == index && frame.offset as usize == bytes.len();
    let fits = frame.data.len() <= page_bytes - bytes.len();
    if !follows || !fits {
        return Err(differ(format!(
            "page {index} has a piece of {} bytes of page {} at {}, and {} of {page_bytes} bytes were there",
            frame.data.len(),
            frame.page,
            frame.offset,
            bytes.len()
        )));
    }
    bytes.extend_from_slice(&frame.data);
    Ok(bytes.len() == page_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_soon_be_computed_here_is_not_waited_for_for_long() {
        let ms = Duration::from_millis;
        for (row_cost, rows, page, silence) in [
            (None, 4096, PAGE_UNKNOWN, PAGE_FLOOR),
            (Some(0.0), 4096, PAGE_FLOOR, PAGE_FLOOR),
            (Some(1e-4), 4096, PAGE_FLOOR, PAGE_FLOOR),
            (Some(1.25e-3), 4096, ms(10_240), ms(1280)),
            (Some(1e-3), 16, PAGE_FLOOR, PAGE_FLOOR),
            (Some(1.0), 4096, PAGE_LIMIT, PAGE_LIMIT),
            (Some(f64::INFINITY), 4096, PAGE_LIMIT, PAGE_LIMIT),
            (Some(f64::NAN), 4096, PAGE_LIMIT, PAGE_LIMIT),
        ] {
            let waits = patience(row_cost, rows, 512);
            assert_eq!(waits, Waits { page, silence }, "{row_cost:?} {rows}");
        }
    }
}
