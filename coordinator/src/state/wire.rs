//! What nodes are told of placements, as messages.

use std::sync::Arc;

use guild_proto::cluster::v1::{Placement, PlacementNode, PlacementState, Slot};
use guild_scheduler::membership::{Membership, Published};

/// What nodes are told of: all may hold at the same time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placements {
    /// Requests are served by it.
    active: Option<Arc<Placement>>,
    /// Instead of it: what was served by and cannot be restored.
    lost: Option<Arc<Placement>>,
    /// The newest that was LOADING and will never be active: neither will any
    /// before it that a node still loads.
    withdrawn: Option<Arc<Placement>>,
    /// Newer than `active`, and not active (yet).
    next: Option<Arc<Placement>>,
}

impl Placements {
    pub(super) fn of(membership: &Membership) -> Placements {
        let oldest = membership.oldest_epoch();
        let withdrawn = |epoch| Placement {
            epoch,
            state: PlacementState::Withdrawn.into(),
            ..Placement::default()
        };
        let told = |published: Option<&Published>, oldest_epoch| {
            let placement = published.map(to_wire)?;
            Some(Arc::new(Placement {
                oldest_epoch,
                ..placement
            }))
        };
        let lost = |(epoch, reason)| Placement {
            epoch,
            state: PlacementState::Lost.into(),
            reason,
            ..Placement::default()
        };
        Placements {
            lost: membership.lost().map(lost).map(Arc::new),
            active: told(membership.active(), oldest),
            withdrawn: membership.withdrawn().map(withdrawn).map(Arc::new),
            // A node that loads it does not begin again because of others.
            next: told(membership.next(), 0),
        }
    }

    /// What differs from `told`, in the order in which it is to be heard; `told`
    /// is brought up to it. A withdrawal comes behind what is served by, so that
    /// a node has something to go back to, and before what is loaded instead.
    pub(crate) fn news(self, told: &mut Placements) -> Vec<Arc<Placement>> {
        let news = [
            (&self.active, &told.active),
            (&self.lost, &told.lost),
            (&self.withdrawn, &told.withdrawn),
            (&self.next, &told.next),
        ];
        let news = news.into_iter().filter(|(now, was)| now != was);
        let news = news.filter_map(|(now, _)| now.clone()).collect();
        *told = self;
        news
    }

    /// The fail points that telling of this instead of `told` passes.
    pub(super) fn fail_points(&self, told: &Placements) -> Vec<&'static str> {
        let epoch = |placement: &Option<Arc<Placement>>| placement.as_ref().map(|p| p.epoch);
        let oldest = |placements: &Placements| {
            let active = placements.active.as_ref();
            active.map_or(0, |placement| placement.oldest_epoch)
        };
        let changes = [
            (
                "migrate::step",
                self.next.is_some() && epoch(&self.next) != epoch(&told.next),
            ),
            (
                "migrate::publish",
                self.active.is_some() && epoch(&self.active) != epoch(&told.active),
            ),
            (
                "migrate::withdraw",
                epoch(&self.withdrawn) != epoch(&told.withdrawn),
            ),
            ("migrate::free", oldest(self) != oldest(told)),
        ];
        let changed = changes.into_iter().filter(|(_, changed)| *changed);
        changed.map(|(name, _)| name).collect()
    }
}

fn to_wire(published: &Published) -> Placement {
    let state = match published.active {
        true => PlacementState::Active,
        false => PlacementState::Loading,
    };
    let nodes = published.placement.nodes().iter().zip(&published.nodes);
    Placement {
        epoch: published.placement.epoch(),
        state: state.into(),
        oldest_epoch: 0,
        reason: String::new(),
        nodes: nodes
            .map(|(slots, placed)| PlacementNode {
                node_id: slots.node,
                name: placed.name.clone(),
                address: placed.address.clone(),
                slots: slots
                    .slots
                    .iter()
                    .map(|&(layer, expert)| Slot { layer, expert })
                    .collect(),
                process: placed.process.clone(),
                rows_per_second: placed.rows_per_second,
            })
            .collect(),
    }
}
