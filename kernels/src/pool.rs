//! The threads of one [`Cpu`](crate::Cpu).
//!
//! Secret: how work is handed out. The caller takes part, so a pool of `n` threads owns `n - 1`; pieces are claimed from
//! a counter, so a late or busy worker costs nothing but its share. A worker that has nothing to do looks for more for a
//! short while, since the next operation of a step comes soon, and then sleeps. Workers may be kept on a core each; the
//! first core is left to whoever calls. Knows nothing of arithmetic.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crate::topology::{self, Topology};

/// How long a worker looks for work before it sleeps: longer than the gaps inside a step, and short enough that a host
/// at rest, or a quota of processor time, does not notice.
const AWAKE: Duration = Duration::from_micros(50);
/// Looks in a row before a worker offers its processor to whoever else wants it.
const SPINS: usize = 200;
/// How often the caller looks for the others' last pieces before it sleeps: some ten microseconds, less than the
/// operating system needs to put a thread to sleep and wake it.
const LAST_SPINS: usize = 2000;

/// Most threads a pool takes, whatever is asked for.
pub(crate) const MAX_THREADS: usize = 1024;

pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Besides the caller.
    workers: Vec<topology::Thread>,
    /// Those that are kept on a core each.
    pinned: AtomicUsize,
}

/// What workers and callers share.
struct Shared {
    /// Jobs that may have unclaimed pieces. Whoever joins a job does so under this lock, and a caller takes its job away
    /// under it, so that nobody joins afterwards.
    jobs: Mutex<Vec<JobRef>>,
    news: Condvar,
    /// Goes up with every job.
    published: AtomicUsize,
    sleeping: AtomicUsize,
    stop: AtomicBool,
    /// Whether there is a processor for every thread; otherwise looking for work would take one from those that have some.
    spins: bool,
}

/// One call of [`Pool::for_each`], on its caller's stack.
struct Job<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    n: usize,
    next: AtomicUsize,
    /// Workers that are inside.
    inside: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct JobRef(*const Job<'static>);

// SAFETY: a job is shared data behind atomics and locks, and `f` is `Sync`; that it lives as long as anybody looks at it
// is the duty of `Pool::for_each`.
unsafe impl Send for JobRef {}

impl Job<'_> {
    /// Runs pieces until none is left. A panic ends the job; the caller hears of it.
    fn work(&self) {
        let pieces = || {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= self.n {
                    break;
                }
                (self.f)(i);
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(pieces)) {
            self.next.store(self.n, Ordering::Relaxed);
            *lock(&self.panic) = Some(panic);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that could panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// `threads = 0` means one per physical core this process may use. When the system refuses the threads, the caller
    /// works with those it has.
    pub(crate) fn new(threads: usize) -> Pool {
        let available = thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 {
            available.min(Topology::here().cores.len())
        } else {
            threads.min(MAX_THREADS)
        };
        let shared = Arc::new(Shared {
            jobs: Mutex::new(Vec::new()),
            news: Condvar::new(),
            published: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            spins: threads <= available,
        });
        let (tell, told) = mpsc::channel();
        for i in 1..threads {
            let (shared, tell) = (Arc::clone(&shared), tell.clone());
            let worker = thread::Builder::new().name(format!("guild-cpu-{i}"));
            let spawned = worker.spawn(move || {
                // The pool listens until all of them have told.
                let _ = tell.send(topology::Thread::this());
                drop(tell);
                shared.serve();
            });
            if spawned.is_err() {
                break;
            }
        }
        drop(tell);
        Pool {
            shared,
            workers: told.into_iter().collect(),
            pinned: AtomicUsize::new(0),
        }
    }

    /// Keeps each worker on a core of its own, as far as there are cores and the system does it; says how many are kept.
    pub(crate) fn pin(&self) -> usize {
        let cores = Topology::here().cores;
        let pairs = self.workers.iter().zip(cores.iter().skip(1));
        let pinned = pairs.filter(|(worker, core)| worker.bind(**core)).count();
        self.pinned.store(pinned, Ordering::Relaxed);
        pinned
    }

    /// Workers that are kept on a core each.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned.load(Ordering::Relaxed)
    }

    pub(crate) fn threads(&self) -> usize {
        1 + self.workers.len()
    }

    /// Runs `f(0) .. f(n - 1)`, in any order, and returns when all are done. A panic of one is the caller's, once all
    /// that had begun have ended.
    pub(crate) fn for_each(&self, n: usize, f: impl Fn(usize) + Sync) {
        if n <= 1 || self.workers.is_empty() {
            return (0..n).for_each(f);
        }
        let job = Job {
            f: &f,
            n,
            next: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            caller: thread::current(),
            panic: Mutex::new(None),
        };
        let known = JobRef(std::ptr::from_ref(&job).cast());
        self.shared.publish(known, (n - 1).min(self.workers.len()));
        job.work();
        self.shared.withdraw(known);
        // Nobody joins any more. `job` and `f` stay until those inside have left, whatever has happened: nothing between
        // here and there can panic.
        let mut looks = 0;
        while job.inside.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks < LAST_SPINS {
                std::hint::spin_loop();
            } else {
                thread::park();
            }
        }
        if let Some(panic) = lock(&job.panic).take() {
            resume_unwind(panic);
        }
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
            let piece = lock(&pieces).next();
            if let Some((i, piece)) = piece {
                f(i, piece);
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _jobs = lock(&self.shared.jobs);
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn publish(&self, job: JobRef, wanted: usize) {
        lock(&self.jobs).push(job);
        // Sequentially consistent with `sleep`: either a worker sees the job before it sleeps, or it is seen asleep here.
        self.published.fetch_add(1, Ordering::SeqCst);
        let sleeping = self.sleeping.load(Ordering::SeqCst);
        if sleeping == 0 {
            return;
        }
        // Under the lock, so that nobody is between its last look and its sleep.
        let _jobs = lock(&self.jobs);
        if wanted >= sleeping {
            self.news.notify_all();
        } else {
            (0..wanted).for_each(|_| self.news.notify_one());
        }
    }

    fn withdraw(&self, job: JobRef) {
        lock(&self.jobs).retain(|other| !std::ptr::eq(other.0, job.0));
    }

    /// The life of a worker.
    fn serve(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let seen = self.published.load(Ordering::SeqCst);
            match self.join() {
                Some(job) => self.take_part(job),
                None => self.wait(seen),
            }
        }
    }

    /// A job with unclaimed pieces, which this worker is now inside of.
    fn join(&self) -> Option<JobRef> {
        let jobs = lock(&self.jobs);
        jobs.iter().copied().find(|known| {
            // SAFETY: it is in the list, so its caller has not withdrawn it and waits in `for_each`.
            let job = unsafe { &*known.0 };
            let open = job.next.load(Ordering::Relaxed) < job.n;
            if open {
                job.inside.fetch_add(1, Ordering::Relaxed);
            }
            open
        })
    }

    fn take_part(&self, job: JobRef) {
        // SAFETY: `join` has counted this worker as inside under the lock, and the caller waits for it.
        let job = unsafe { &*job.0 };
        job.work();
        let caller = job.caller.clone();
        if job.inside.fetch_sub(1, Ordering::Release) == 1 {
            // The job may be gone by now.
            caller.unpark();
        }
    }

    /// Returns when something may have been published since `seen`.
    fn wait(&self, seen: usize) {
        let news =
            || self.published.load(Ordering::SeqCst) != seen || self.stop.load(Ordering::Relaxed);
        let start = Instant::now();
        while self.spins && start.elapsed() < AWAKE {
            for _ in 0..SPINS {
                if news() {
                    return;
                }
                std::hint::spin_loop();
            }
            thread::yield_now();
        }
        let mut jobs = lock(&self.jobs);
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        while !news() {
            jobs = self.news.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}
