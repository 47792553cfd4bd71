//! A steady load whose every token is compared with an undisturbed run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guild_proto::inference::v1::GenerateRequest;
use guild_proto::inference::v1::generate_response::Event;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::certs::Door;
use crate::client::Answer;

/// Streams that run at the same time.
pub const STREAMS: usize = 6;
/// A stream that takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);
/// Pause of a stream whose request has failed.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// What a load has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Requests that were answered as they should be.
    pub whole: usize,
    /// Requests that were not answered.
    pub failed: Vec<Status>,
    /// How long each of these had had no event before it was told so.
    pub waited: Vec<Duration>,
    /// Requests that found one door shut, before any event, and were answered at the next.
    pub turned: usize,
    /// Between two events of a stream, in no order.
    pub gaps: Vec<Gap>,
}

/// Time between two events of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// When the later one came.
    pub end: Instant,
    /// How long after the earlier one.
    pub length: Duration,
}

impl Seen {
    /// The longest time between two events of a stream.
    pub fn stall(&self) -> Duration {
        longest(self.gaps.iter())
    }

    /// The longest one that was over by then.
    pub fn stall_before(&self, then: Instant) -> Duration {
        longest(self.gaps.iter().filter(|gap| gap.end <= then))
    }

    /// The longest one that ended after that.
    pub fn stall_after(&self, then: Instant) -> Duration {
        longest(self.gaps.iter().filter(|gap| gap.end > then))
    }

    /// 99 of 100 gaps are no longer.
    pub fn p99(&self) -> Duration {
        let mut lengths: Vec<Duration> = self.gaps.iter().map(|gap| gap.length).collect();
        lengths.sort_unstable();
        let at = (lengths.len() * 99).div_ceil(100).saturating_sub(1);
        lengths.get(at).copied().unwrap_or_default()
    }

    fn add(&mut self, other: Seen) {
        self.whole += other.whole;
        self.turned += other.turned;
        self.failed.extend(other.failed);
        self.waited.extend(other.waited);
        self.gaps.extend(other.gaps);
    }
}

fn longest<'a>(gaps: impl Iterator<Item = &'a Gap>) -> Duration {
    gaps.map(|gap| gap.length).max().unwrap_or_default()
}

/// [`STREAMS`] streams that run until told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    streams: JoinSet<Seen>,
}

impl Load {
    /// Begins; `want` has the answer to each of `requests`. A client whose door is shut turns to
    /// the next of `doors`, once round.
    pub fn start(
        doors: &[Door],
        requests: &Arc<Vec<GenerateRequest>>,
        want: &Arc<Vec<Answer>>,
    ) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let mut streams = JoinSet::new();
        for first in 0..STREAMS {
            let (requests, want) = (Arc::clone(requests), Arc::clone(want));
            let (doors, stop) = (doors.to_vec(), Arc::clone(&stop));
            streams.spawn(async move {
                let mut seen = Seen::default();
                let mut at = first;
                let mut door = first;
                while !stop.load(Ordering::SeqCst) {
                    let which = at % requests.len();
                    at += STREAMS + 1;
                    let mut left = doors.len();
                    loop {
                        let opened = &doors[door % doors.len()];
                        let before = seen.gaps.len();
                        let mut last = Instant::now();
                        let (request, want) = (&requests[which], &want[which]);
                        let following = follow(opened, request, want, &mut last, &mut seen.gaps);
                        let followed = tokio::time::timeout(HANGS, following).await;
                        left -= 1;
                        match followed.expect("a stream hangs") {
                            Ok(()) => seen.whole += 1,
                            Err(status)
                                if shut(&status) && seen.gaps.len() == before && left > 0 =>
                            {
                                door += 1;
                                seen.turned += 1;
                                continue;
                            }
                            Err(status) => {
                                seen.failed.push(status);
                                seen.waited.push(last.elapsed());
                                tokio::time::sleep(AFTER_FAILURE).await;
                            }
                        }
                        break;
                    }
                }
                seen
            });
        }
        Load { stop, streams }
    }

    /// Lets what runs come to its end. Panics when an answer was not the expected one.
    pub async fn stop(mut self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Seen::default();
        while let Some(seen) = self.streams.join_next().await {
            all.add(seen.expect("an answer differed"));
        }
        all
    }
}

/// A door that cannot be gone through now.
fn shut(status: &Status) -> bool {
    status.code() == Code::Unavailable
}

/// One stream, whose last event was at `last`; panics at the first token or log-probability that is
/// not the expected one.
async fn follow(
    door: &Door,
    request: &GenerateRequest,
    want: &Answer,
    last: &mut Instant,
    gaps: &mut Vec<Gap>,
) -> Result<(), Status> {
    let mut client = door.inference().await?;
    *last = Instant::now();
    let mut stream = client.generate(request.clone()).await?.into_inner();
    let mut tokens = 0;
    let mut complete = false;
    while let Some(response) = stream.message().await? {
        let now = Instant::now();
        gaps.push(Gap {
            end: now,
            length: now - *last,
        });
        *last = now;
        match response.event.unwrap() {
            Event::Chunk(chunk) => {
                for (token, logprobs) in chunk.token_ids.iter().zip(chunk.logprobs) {
                    assert_eq!(*token, want.token_ids[tokens], "a wrong token");
                    let wanted = &want.logprobs[tokens];
                    assert_eq!(*wanted, logprobs.into(), "other log-probabilities");
                    tokens += 1;
                }
            }
            Event::Prompt(_) => {}
            Event::Complete(_) => complete = true,
        }
    }
    let all = want.token_ids.len();
    assert!(complete && tokens == all, "an answer was cut short");
    Ok(())
}
