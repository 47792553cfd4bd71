//! Leaf: nodes of this process. Rows are handed over as they are.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError, RwLock},
    time::Instant,
};

use crate::{ExchangeCode, ExchangeError, Fetch, FetchRequest, SlotHost, Work, batch::Place, blob};

/// The nodes of this process, by name. Clones share one table.
#[derive(Clone, Default)]
pub struct Switchboard(Arc<RwLock<HashMap<String, Arc<dyn SlotHost>>>>);

impl Switchboard {
    /// Puts a node on the board, in place of one of the same name.
    pub fn attach(&self, name: impl Into<String>, host: Arc<dyn SlotHost>) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.into(), host);
    }

    /// Takes a node off the board; work that it has begun goes on.
    pub fn detach(&self, name: &str) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }

    /// The node of this name, if it is in this process.
    pub fn get(&self, name: &str) -> Option<Arc<dyn SlotHost>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }
}

impl std::fmt::Debug for Switchboard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let board = self.0.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(board.keys()).finish()
    }
}

/// A link to a node of this process. The name is looked up for every batch, so
/// a node that has left is missed at once.
#[derive(Debug)]
pub(crate) struct Link {
    board: Switchboard,
    peer: String,
}

impl Link {
    pub(crate) fn new(board: Switchboard, peer: String) -> Self {
        Self { board, peer }
    }

    /// Runs `work` on this thread: the nodes of a process share its cores, so a
    /// thread more would only add the cost of changing to it.
    pub(crate) fn execute(&self, work: Work) -> Result<Vec<f32>, ExchangeError> {
        run(&self.peer, self.host()?.as_ref(), work)
    }

    /// The memory of the slot itself, in pieces: nothing is copied here.
    pub(crate) async fn fetch(&self, wanted: FetchRequest) -> Result<Fetch, ExchangeError> {
        let (host, peer) = (self.host()?, self.peer.clone());
        let asked = tokio::task::spawn_blocking(move || {
            blob::ask(&peer, host.as_ref(), wanted.epoch, wanted.slot)
        });
        let blob = asked
            .await
            .map_err(|error| blob::error(&self.peer, &wanted, ExchangeCode::Internal, error))??;
        Fetch::here(&self.peer, wanted, blob)
    }

    fn host(&self) -> Result<Arc<dyn SlotHost>, ExchangeError> {
        self.board.get(&self.peer).ok_or_else(|| {
            ExchangeError::new(
                ExchangeCode::Unreachable,
                self.peer.as_str(),
                "the node has left this process",
            )
        })
    }
}

/// Runs a host and checks what it says: the deadline on both ends of the work,
/// the number of elements, and that it came back at all.
pub(crate) fn run(node: &str, host: &dyn SlotHost, work: Work) -> Result<Vec<f32>, ExchangeError> {
    let elements = work.pairs() * work.width;
    let deadline = work.deadline;
    let place = Place::new(work.epoch, &work.slots);
    let error = |code, what: String| ExchangeError::new(code, node, format!("{place}: {what}"));
    let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    if late() {
        return Err(error(
            ExchangeCode::Deadline,
            "passed before the work began".to_owned(),
        ));
    }
    let rows = catch_unwind(AssertUnwindSafe(|| host.execute(work))).map_err(|_| {
        error(
            ExchangeCode::Internal,
            "the node panicked; its log says where".to_owned(),
        )
    })??;
    if rows.len() != elements {
        return Err(error(
            ExchangeCode::Internal,
            format!(
                "{} elements were computed instead of {elements}",
                rows.len()
            ),
        ));
    }
    if late() {
        return Err(error(
            ExchangeCode::Deadline,
            "passed while the rows were computed".to_owned(),
        ));
    }
    Ok(rows)
}
