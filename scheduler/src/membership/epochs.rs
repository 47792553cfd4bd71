//! Which epochs are still in use: how long the tables of old ones stay.

use super::{Action, Membership, Published, Role};
use crate::placement::{NodeId, Placement};

impl Membership {
    /// Nobody sends rows by an epoch before this one; 0: not known. What only
    /// earlier epochs need can go.
    pub fn oldest_epoch(&self) -> u64 {
        self.oldest_epoch
    }

    /// The newest LOADING epoch that will never be active, while nothing newer
    /// has been published: nodes that have heard of a newer epoch know it.
    pub fn withdrawn(&self) -> Option<u64> {
        let newest = self.published().map_or(0, |p| p.placement.epoch());
        self.withdrawn.filter(|&epoch| epoch > newest)
    }

    /// Takes a placement out of service; it is used until all have moved on.
    pub(super) fn retire(&mut self, active: Option<Published>) {
        self.retired.extend(active.map(|active| active.placement));
    }

    /// How far attention nodes have moved on. One that has not reported an epoch
    /// has not been given a request yet.
    pub(super) fn free(&mut self) {
        let reported = (self.of_role(Role::Attention)).map(|node| node.report.epoch);
        let reported = reported.filter(|&epoch| epoch > 0).min();
        let oldest = self.last_active.min(reported.unwrap_or(u64::MAX));
        if oldest <= self.oldest_epoch {
            return;
        }
        self.oldest_epoch = oldest;
        self.retired.retain(|placement| placement.epoch() >= oldest);
        if self.moving.is_some() {
            self.actions.push(Action::Freed {
                oldest_epoch: oldest,
            });
        }
        if self.shortfall.is_some() {
            // There is more room now.
            self.plan_at.get_or_insert(self.clock);
        }
        self.tell();
    }

    /// Slots that a node has to keep for epochs still in use, beside those of `newest`.
    pub(super) fn unfreed(&self, id: NodeId, newest: Option<&Placement>) -> u64 {
        let slots = |placement: &Placement| -> Vec<(u32, u32)> {
            let mut nodes = placement.nodes().iter();
            let node = nodes.find(|slots| slots.node == id);
            node.map_or_else(Vec::new, |slots| slots.slots.clone())
        };
        let lost = self.next.as_ref().filter(|next| next.was_active);
        let used = self.active.iter().chain(lost);
        let mut old: Vec<(u32, u32)> = (self.retired.iter())
            .chain(used.map(|published| &published.placement))
            .flat_map(slots)
            .collect();
        old.sort_unstable();
        old.dedup();
        let newest = newest.map_or_else(Vec::new, slots);
        let kept = newest.iter().filter(|slot| old.binary_search(slot).is_ok());
        (old.len() - kept.count()) as u64
    }
}
