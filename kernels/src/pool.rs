//! The threads of one [`Cpu`](crate::Cpu).
//!
//! Secret: how work is handed out. The caller takes part, so a pool of `n` threads owns `n - 1`; pieces are claimed from
//! a counter, so a late or busy worker costs nothing but its share. Knows nothing of arithmetic.

use std::{
    collections::HashSet,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// How often the caller looks for the others' last pieces before it blocks: some ten microseconds, less than the
/// operating system needs to put a thread to sleep and wake it.
const SPINS: usize = 2000;

/// Most threads a pool takes, whatever is asked for.
pub(crate) const MAX_THREADS: usize = 1024;

pub(crate) struct Pool {
    /// The other threads; `None` when the caller is alone.
    workers: Option<ThreadPool>,
}

impl Pool {
    /// `threads = 0` means one per physical core this process may use. When the system refuses the threads, the caller
    /// works alone.
    pub(crate) fn new(threads: usize) -> Pool {
        let threads = if threads == 0 {
            physical_cores()
        } else {
            threads.min(MAX_THREADS)
        };
        let workers = (threads > 1)
            .then(|| {
                ThreadPoolBuilder::new()
                    .num_threads(threads - 1)
                    .thread_name(|i| format!("guild-cpu-{}", i + 1))
                    .build()
                    .ok()
            })
            .flatten();
        Pool { workers }
    }

    pub(crate) fn threads(&self) -> usize {
        1 + self
            .workers
            .as_ref()
            .map_or(0, ThreadPool::current_num_threads)
    }

    /// Runs `f(0) .. f(n - 1)`, in any order, and returns when all are done.
    pub(crate) fn for_each(&self, n: usize, f: impl Fn(usize) + Sync) {
        let Some(workers) = self.workers.as_ref().filter(|_| n > 1) else {
            return (0..n).for_each(f);
        };
        let next = AtomicUsize::new(0);
        let done = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= n {
                    break;
                }
                f(i);
                done.fetch_add(1, Ordering::Release);
            }
        };
        workers.in_place_scope(|scope| {
            for _ in 0..workers.current_num_threads().min(n - 1) {
                scope.spawn(|_| work());
            }
            work();
            for _ in 0..SPINS {
                if done.load(Ordering::Acquire) >= n {
                    break;
                }
                std::hint::spin_loop();
            }
        });
    }

    /// Splits `data` into pieces of `chunk` elements, the last perhaps shorter, and runs `f(index, piece)` on each.
    pub(crate) fn for_each_chunk<T: Send>(
        &self,
        data: &mut [T],
        chunk: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let chunk = chunk.max(1);
        let n = data.len().div_ceil(chunk);
        let pieces = Mutex::new(data.chunks_mut(chunk).enumerate());
        self.for_each(n, |_| {
            let piece = pieces.lock().map_or(None, |mut pieces| pieces.next());
            if let Some((i, piece)) = piece {
                f(i, piece);
            }
        });
    }
}

/// Physical cores, as far as the system tells, and never more than this process may use.
fn physical_cores() -> usize {
    let logical = thread::available_parallelism().map_or(1, usize::from);
    let siblings: HashSet<String> = std::fs::read_dir("/sys/devices/system/cpu")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            std::fs::read_to_string(entry.path().join("topology/thread_siblings_list")).ok()
        })
        .collect();
    if siblings.is_empty() {
        logical
    } else {
        logical.min(siblings.len())
    }
}
