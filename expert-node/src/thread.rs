//! Long work off the async threads. Secret: which threads those are, and who goes first.

use tokio::sync::oneshot;

use crate::Error;

/// How much rows in work go before work that can wait: Linux gives the latter about a tenth of
/// a core where both want it.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

/// Runs `work` on a thread of its own: it may take minutes, and the end of the process need not
/// wait for it.
///
/// # Errors
/// There is no thread to be had, or `work` has panicked.
pub(crate) async fn alone<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = oneshot::channel();
    spawn(what, move || {
        // Nobody waits any more when the node ends early.
        let _ = done.send(work());
    })?;
    result
        .await
        .map_err(|_| Error::task(what, &"it has panicked, see the log"))
}

/// The same for work that lets rows go first.
///
/// # Errors
/// As [`alone`].
pub(crate) async fn behind_serving<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    alone(what, move || {
        give_way();
        work()
    })
    .await
}

/// The same for work that nobody waits for.
///
/// # Errors
/// There is no thread to be had.
pub(crate) fn spawn_behind(
    what: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), Error> {
    spawn(what, move || {
        give_way();
        work();
    })
}

fn spawn(what: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = std::thread::Builder::new().name("guild-loader".to_owned());
    let spawned = thread
        .spawn(work)
        .map_err(|error| Error::task(what, &error));
    spawned.map(|_| ())
}

fn give_way() {
    // Elsewhere this would slow the whole process. A refusal costs politeness only.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(NICENESS);
}
