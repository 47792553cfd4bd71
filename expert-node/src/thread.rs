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
    std::thread::Builder::new()
        .name("guild-loader".to_owned())
        .spawn(move || {
            // Nobody waits any more when the node ends early.
            let _ = done.send(work());
        })
        .map_err(|error| Error::task(what, &error))?;
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
        // Elsewhere this would slow the whole process. A refusal costs politeness only.
        #[cfg(target_os = "linux")]
        let _ = rustix::process::nice(NICENESS);
        work()
    })
    .await
}
