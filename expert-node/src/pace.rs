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

/// A node that had rows so recently will have more at once.
const BUSY: Duration = Duration::from_millis(20);
/// While this node is busy, work rests so many times as long as a piece of it took. To a copy its
/// connection adds about three times what is measured here: a tenth of the node goes to copies,
/// and the slower the node, the slower they are.
const REST: u32 = 29;
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
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            rows: AtomicUsize::new(0),
            last_rows: Mutex::new(None),
            next: Mutex::new(Instant::now()),
        }
    }
}

/// Rows are here until this is dropped.
pub(crate) struct Rows<'a>(&'a Pace);

/// A piece of work is being done.
struct Turn<'a> {
    next: MutexGuard<'a, Instant>,
    begun: Instant,
}

impl Pace {
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
                return Turn { next, begun };
            }
            drop(next);
            thread::sleep(rest);
        }
    }
}

impl Turn<'_> {
    fn end(mut self) {
        let rest = (self.begun.elapsed() * REST).min(MAX_REST);
        *self.next = Instant::now() + rest;
    }
}

impl Drop for Rows<'_> {
    fn drop(&mut self) {
        *lock(&self.0.last_rows) = Some(Instant::now());
        self.0.rows.fetch_sub(1, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_rows_are_here_every_piece_is_followed_by_a_rest_and_otherwise_none() {
        let pace = Pace::default();
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
        let rows = pace.rows();
        assert!(!pace.is_quiet(Duration::ZERO));
        // Never less, however busy the machine is.
        assert!(pieces(3, piece) >= 3 * piece + 3 * piece * REST);
        drop(rows);
        assert!(pace.is_quiet(Duration::ZERO) && !pace.is_quiet(Duration::from_secs(3600)));
        thread::sleep(BUSY);
        let begun = Instant::now();
        pace.in_pieces(|_| thread::sleep(piece));
        let rest = lock(&pace.next).saturating_duration_since(begun);
        assert!(rest >= piece * REST, "a rest is due if rows come now");
        // None have.
        pieces(1, piece);
    }

    #[test]
    fn work_that_takes_turns_is_never_done_at_the_same_time() {
        let (pace, at_work) = (Pace::default(), AtomicUsize::new(0));
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
