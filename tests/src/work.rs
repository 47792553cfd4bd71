//! The work that a cluster is given while something happens to it, and the line of JSON that each
//! case leaves behind.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guild_proto::inference::v1::GenerateRequest;
use serde_json::{Value, json};

use crate::certs::Door;
use crate::client::{Answer, generate_each};
use crate::load::{Load, STREAMS, Seen};
use crate::process::{Cluster, Shape, demo};

/// Names the extent: `short` and `long` hold the stall limits, `long` also asks for every
/// combination and for outages of their full length. Unset, as in the ordinary tests, it is the
/// short extent without the limits, because the machine may be busy with other things.
pub const EXTENT: &str = "GUILD_CHAOS";
/// File that every line is appended to.
pub const REPORT: &str = "GUILD_CHAOS_REPORT";
/// What a busy machine may do to a stream of the ordinary tests.
const BUSY: Duration = Duration::from_secs(10);

/// Whether every combination is asked for.
pub fn long() -> bool {
    std::env::var(EXTENT).is_ok_and(|extent| extent == "long")
}

/// Requests, and what each gives in a cluster of one process where nothing happens.
pub struct Work {
    requests: Arc<Vec<GenerateRequest>>,
    want: Arc<Vec<Answer>>,
}

impl Work {
    /// Runs the requests one after the other by themselves.
    pub async fn of(requests: Vec<GenerateRequest>) -> Work {
        let cluster = Cluster::start(Shape::Local, &demo(), 1, 1, &["--threads", "1"]);
        let want = without_text(generate_each(&cluster.grpc, &requests).await);
        Work {
            requests: Arc::new(requests),
            want: Arc::new(want),
        }
    }

    /// Keeps streams running at one door.
    pub fn load(&self, door: impl Into<Door>) -> Load {
        self.load_at(&[door.into()])
    }

    /// The same for clients that know several doors and turn to the next when one is shut.
    pub fn load_at(&self, doors: &[Door]) -> Load {
        Load::start(doors, &self.requests, &self.want)
    }

    /// Every request once more, in a quiet cluster: none may fail now.
    pub async fn again(&self, door: impl Into<Door>) {
        let answers = without_text(generate_each(door, &self.requests).await);
        assert_eq!(*self.want, answers, "afterwards");
    }
}

/// Attention nodes know no text.
fn without_text(mut answers: Vec<Answer>) -> Vec<Answer> {
    for answer in &mut answers {
        answer.text.clear();
    }
    answers
}

/// Prints the line of a case, and appends it to the file that [`REPORT`] names.
#[allow(clippy::print_stdout)]
pub fn line(line: &Value) {
    println!("{line}");
    if let Some(path) = std::env::var_os(REPORT) {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

/// The line of a case under load; `more` is what else there is to say. A token that differs has
/// ended the load with a panic before.
pub fn report(case: &str, seen: &Seen, more: Value) {
    let mut all = json!({
        "test": "chaos",
        "case": case,
        "whole": seen.whole,
        "failed": seen.failed.len(),
        "turned": seen.turned,
        "wrong": 0,
        "itl_p99_ms": ms(seen.p99()),
        "longest_stall_ms": ms(seen.stall()),
    });
    let more = more.as_object().unwrap().clone();
    all.as_object_mut().unwrap().extend(more);
    line(&all);
}

/// Whole milliseconds.
pub fn ms(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

/// Every request was answered, and there was some.
pub fn assert_nothing_failed(seen: &Seen) {
    assert!(seen.failed.is_empty(), "{:?}", seen.failed);
    assert!(seen.whole >= STREAMS);
}

/// No stream stood still for longer than `bar` after the fault. What the machine did by itself
/// before it, doubled, comes on top; see [`EXTENT`].
pub fn assert_stall(seen: &Seen, fault: Instant, bar: Duration) {
    let quiet = seen.stall_before(fault);
    let (stall, limit) = (seen.stall_after(fault), limit(bar, quiet));
    assert!(stall <= limit, "{stall:?} of {limit:?}; {quiet:?} before");
}

/// What `bar` is on a machine that by itself holds things up for as long as `quiet`; see [`EXTENT`].
pub fn limit(bar: Duration, quiet: Duration) -> Duration {
    match std::env::var_os(EXTENT) {
        Some(_) => bar + 2 * quiet,
        None => bar.max(BUSY),
    }
}

/// Passes the time.
pub async fn seconds(n: u64) {
    tokio::time::sleep(Duration::from_secs(n)).await;
}
