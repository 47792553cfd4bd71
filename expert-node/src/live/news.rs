//! What the coordinator has published, as an expert node looks at it.
//!
//! Secret: in which order the newest placement and the newest active one are read, so that none is
//! missed. It must not know what a node makes of them.

use std::sync::Arc;

use guild_proto::cluster::v1::Placement;
use tokio::{select, sync::watch};

/// What the coordinator has published: the newest placement, and the newest that is active.
pub(super) struct News {
    pub(super) newest: watch::Receiver<Option<Arc<Placement>>>,
    pub(super) active: watch::Receiver<Option<Arc<Placement>>>,
}

/// One look at the news.
#[derive(Clone, Default)]
pub(super) struct Published {
    pub(super) newest: Option<Arc<Placement>>,
    pub(super) active: Option<Arc<Placement>>,
}

impl News {
    pub(super) fn look(&mut self) -> Published {
        // The newest is read first: an active one that came before it is then seen as well.
        let newest = self.newest.borrow_and_update().clone();
        let active = self.active.borrow_and_update().clone();
        Published { newest, active }
    }

    /// Completes when there is something to look at; never when the membership has ended.
    pub(super) async fn changed(&mut self) {
        let changed = select! {
            changed = self.newest.changed() => changed,
            changed = self.active.changed() => changed,
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Published {
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Placement>> {
        [&self.active, &self.newest].into_iter().flatten()
    }

    pub(super) fn has(&self, epoch: u64) -> bool {
        self.all().any(|placement| placement.epoch == epoch)
    }

    pub(super) fn active_epoch(&self) -> u64 {
        self.active.as_ref().map_or(0, |active| active.epoch)
    }
}
