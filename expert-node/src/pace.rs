//! Rows first: work that can wait is done in pieces, with rests between them while rows come.
//!
//! Secret: how much of a busy node such work takes. A node that is given a part of a processor
//! stands still when it has used it up, and all rows with it; so no piece is long, and all who
//! copy, read and look at experts together take turns. This module must not know what the work is.

use std::{
    cell::Cell,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use guild_model::expert::Breathe;

use crate::quota;

/// A node that had rows so recently will have more at once.
const BUSY: Duration = Duration::from_millis(20);
/// While this node is busy, one part in so many of its processors' time goes to such work. To a
/// copy its connection adds about three times what is measured here, so copies take a tenth of a
/// node, and the slower the node, the slower they are.
const PARTS: f64 = 30.0;
/// The longest rest at a time.
const MAX_REST: Duration = Duration::from_secs(1);

/// Who is at work on a node, and whose turn it is.
#[derive(Debug)]
pub(crate) struct Pace {
    rows: AtomicUsize,
    /// When rows were last here.
    last_rows: Mutex<Option<Instant>>,
    /// Held by a piece of work; not to be taken before that time while rows come.
    next: Mutex<Instant>,
    /// That rows are worked on with.
    threads: usize,
}

/// Rows are here until this is dropped.
pub(crate) struct Rows<'a>(&'a Pace);

/// A piece of work is being done.
struct Turn<'a> {
    next: MutexGuard<'a, Instant>,
    begun: Instant,
    threads: usize,
}

impl Pace {
    /// For a node of so many threads, which has a processor for each unless a quota gives it less.
    pub(crate) fn new(threads: usize) -> Pace {
        Pace {
            rows: AtomicUsize::new(0),
            last_rows: Mutex::new(None),
            next: Mutex::new(Instant::now()),
            threads,
        }
    }

    /// Rows have come.
    pub(crate) fn rows(&self) -> Rows<'_> {
        self.rows.fetch_add(1, Ordering::AcqRel);
        Rows(self)
    }

    /// Whether no rows are here and none have been for `time`.
    pub(crate) fn is_quiet(&self, time: Duration) -> bool {
        let last = *lock(&self.last_rows);
        self.rows.load(Ordering::Acquire) == 0 && last.is_none_or(|at| at.elapsed() >= time)
    }

    /// Does work that can wait. It calls what it is given after every piece. Blocks.
    pub(crate) fn in_pieces<T>(&self, work: impl FnOnce(Breathe<'_>) -> T) -> T {
        let turn = Cell::new(Some(self.turn()));
        let end = || {
            if let Some(turn) = turn.take() {
                turn.end();
            }
        };
        let out = work(&|| {
            end();
            turn.set(Some(self.turn()));
        });
        end();
        out
    }

    fn turn(&self) -> Turn<'_> {
        loop {
            let next = lock(&self.next);
            let rest = next.saturating_duration_since(Instant::now());
            if rest.is_zero() || self.is_quiet(BUSY) {
                let begun = Instant::now();
                let threads = self.threads;
                return Turn {
                    next,
                    begun,
                    threads,
                };
            }
            drop(next);
            thread::sleep(rest);
        }
    }
}

impl Turn<'_> {
    fn end(mut self) {
        let processors = processors(self.threads, quota::cpus());
        *self.next = Instant::now() + rest(self.begun.elapsed(), processors);
    }
}

impl Drop for Rows<'_> {
    fn drop(&mut self) {
        *lock(&self.0.last_rows) = Some(Instant::now());
        self.0.rows.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Processors that a node of so many threads has. Its quota may be changed while it runs.
fn processors(threads: usize, quota: Option<f64>) -> f64 {
    quota.map_or(threads as f64, |quota| quota.min(threads as f64))
}

/// The rest after a piece of work that took so long, on a node with so many processors.
fn rest(piece: Duration, processors: f64) -> Duration {
    let rest = piece.as_secs_f64() * (PARTS / processors - 1.0).max(0.0);
    Duration::from_secs_f64(rest.min(MAX_REST.as_secs_f64()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_rows_are_here_every_piece_is_followed_by_a_rest_and_otherwise_none() {
        let pace = Pace::new(1);
        let pieces = |count: u32, piece: Duration| {
            let begun = Instant::now();
            pace.in_pieces(|breathe| {
                for _ in 0..count {
                    thread::sleep(piece);
                    breathe();
                }
            });
            begun.elapsed()
        };
        let piece = Duration::from_millis(2);
        let due = rest(piece, processors(1, quota::cpus()));
        let rows = pace.rows();
        assert!(!pace.is_quiet(Duration::ZERO));
        // Never less, however busy the machine is.
        assert!(pieces(3, piece) >= 3 * piece + 3 * due);
        drop(rows);
        assert!(pace.is_quiet(Duration::ZERO) && !pace.is_quiet(Duration::from_secs(3600)));
        thread::sleep(BUSY);
        let begun = Instant::now();
        pace.in_pieces(|_| thread::sleep(piece));
        let left = lock(&pace.next).saturating_duration_since(begun);
        assert!(left >= due, "a rest is due if rows come now");
        // None have.
        pieces(1, piece);
    }

    #[test]
    fn a_part_of_a_processor_rests_longer_and_many_rest_less() {
        let of_a_ms = |processors| rest(Duration::from_millis(1), processors);
        assert_eq!(of_a_ms(processors(2, None)), Duration::from_millis(14));
        assert_eq!(
            of_a_ms(processors(2, Some(0.25))),
            Duration::from_millis(119)
        );
        assert_eq!(of_a_ms(processors(2, Some(8.0))), Duration::from_millis(14));
        assert_eq!(of_a_ms(64.0), Duration::ZERO);
        assert_eq!(rest(Duration::from_secs(9), 1.0), MAX_REST);
    }

    #[test]
    fn work_that_takes_turns_is_never_done_at_the_same_time() {
        let (pace, at_work) = (Pace::new(1), AtomicUsize::new(0));
        let _rows = pace.rows();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    pace.in_pieces(|breathe| {
                        for _ in 0..5 {
                            assert_eq!(at_work.fetch_add(1, Ordering::SeqCst), 0);
                            thread::yield_now();
                            at_work.fetch_sub(1, Ordering::SeqCst);
                            breathe();
                        }
                    })
                });
            }
        });
    }
}
