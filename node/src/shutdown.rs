//! Ending on request: one flag that every part of a process can wait for.

use tokio_util::sync::CancellationToken;

/// Exit code after a second signal: 128 + SIGINT, as shells report it.
const FORCED_EXIT: i32 = 130;

/// A request to end gracefully. Clones share one state; the first
/// [`trigger`](Shutdown::trigger) counts and cannot be taken back.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// A shutdown nobody has asked for yet, independent of signals.
    pub fn new() -> Shutdown {
        Shutdown::default()
    }

    /// A shutdown that SIGTERM or SIGINT (Ctrl-C) triggers. A second signal
    /// ends the process at once, for the operator who does not want to wait
    /// for the drain. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The handlers could not be installed.
    pub fn from_signals() -> std::io::Result<Shutdown> {
        let shutdown = Shutdown::new();
        let mut signals = Signals::install()?;
        let triggered = shutdown.clone();
        tokio::spawn(async move {
            let name = signals.next().await;
            tracing::info!("{name} received: draining; a second signal ends the process at once");
            triggered.trigger();
            let name = signals.next().await;
            tracing::warn!("{name} received while draining: ending now");
            std::process::exit(FORCED_EXIT);
        });
        Ok(shutdown)
    }

    /// Asks for the end.
    pub fn trigger(&self) {
        self.token.cancel();
    }

    /// Whether the end has been asked for.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Completes when the end is asked for; at once if it was already.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    /// A shutdown of a part: triggered with this one, or alone.
    pub fn child(&self) -> Shutdown {
        Shutdown {
            token: self.token.child_token(),
        }
    }
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn install() -> std::io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn install() -> std::io::Result<Signals> {
        Ok(Signals)
    }

    async fn next(&mut self) -> &'static str {
        // Without a handler there is nothing to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        "Ctrl-C"
    }
}

#[cfg(test)]
mod tests {
    use super::Shutdown;

    #[tokio::test]
    async fn a_trigger_reaches_every_clone_and_child_and_a_child_alone_stays_alone() {
        let whole = Shutdown::new();
        let part = whole.child();
        part.trigger();
        part.requested().await;
        assert!(!whole.is_requested());

        let other = whole.child();
        let clone = whole.clone();
        whole.trigger();
        clone.requested().await;
        other.requested().await;
        assert!(other.is_requested());
    }
}
