//! Nodes that cannot take what they are given: what is given up for it, and how
//! long they are left alone.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Membership, Node, Role};
use crate::placement::NodeId;

/// A node that has failed as a destination is not one again for this long.
pub const BACK_OFF: Duration = Duration::from_secs(2);
/// The same after many failures: it doubles with each of them up to this.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(300);

/// How often a node has failed as a destination, and until when it is left alone.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    pub(super) failures: u32,
    pub(super) until: Duration,
}

impl BackOff {
    /// After so many failures, the last of them at `now`.
    pub(super) fn again(failures: u32, now: Duration) -> BackOff {
        let times = 1u32 << failures.saturating_sub(1).min(16);
        BackOff {
            failures,
            until: now.saturating_add(BACK_OFF.saturating_mul(times).min(MAX_BACK_OFF)),
        }
    }
}

/// How far those have come that make up for lost homes.
#[derive(Clone, Debug, Default)]
pub(super) struct Restoring {
    epoch: u64,
    /// The bytes that a node has said it holds, and since when no more.
    seen: BTreeMap<NodeId, (u64, Duration)>,
}

impl Membership {
    /// Lost homes are being restored behind what is active: a node that has got no further for the
    /// time of a step is left alone, and others are given what it was to hold. However much there
    /// is to restore, a node that goes on has its time.
    pub(super) fn watch_restoring(&mut self) {
        let next = self.next.as_ref().filter(|next| !next.was_active);
        let epoch = next.map(|next| next.placement.epoch());
        let epoch = epoch.filter(|_| self.active.is_some() && self.step_epoch().is_none());
        let Some(epoch) = epoch else {
            return;
        };
        if self.restoring.epoch != epoch {
            let seen = BTreeMap::new();
            self.restoring = Restoring { epoch, seen };
        }
        let (now, limit) = (self.clock, self.settings.copy_deadline);
        let mut late = Vec::new();
        for id in self.gaining() {
            let node = self.nodes.get(&id).filter(|node| node.resident < epoch);
            let Some(node) = node else { continue };
            let bytes = node.report.measured.resident_bytes;
            let seen = self.restoring.seen.entry(id).or_insert((bytes, now));
            if bytes > seen.0 {
                *seen = (bytes, now);
            }
            if now.saturating_sub(seen.1) >= limit {
                late.push(node.name.clone());
            }
        }
        if late.is_empty() {
            return;
        }
        late.iter().for_each(|name| self.back_off(name));
        let (limit, late) = (limit.as_secs_f64(), late.join(", "));
        let reason = format!("nothing more of epoch {epoch} was loaded for {limit} s ({late})");
        self.withdraw(&reason);
        self.plan_at = Some(now);
        self.loading_failure = reason;
    }

    /// Whether experts may come to this node: it is an expert node, is not
    /// leaving or drained, and has not failed of late.
    pub fn is_open(&self, node: &Node) -> bool {
        node.role == Role::Expert
            && !node.report.draining
            && !self.is_drained(node)
            && !self.is_backed_off(node)
    }

    pub(super) fn is_backed_off(&self, node: &Node) -> bool {
        let entry = self.backed_off.get(&node.name);
        entry.is_some_and(|entry| entry.until > self.clock)
    }

    /// When the next of the nodes that are left alone is not any more.
    pub(super) fn next_retry(&self, now: Duration) -> Option<Duration> {
        let ends = self.backed_off.values().map(|entry| entry.until);
        ends.filter(|&until| until > now).min()
    }

    /// The time for a step is over.
    pub(super) fn blame_late(&mut self, epoch: u64) {
        let gaining = self.gaining();
        let nodes = self.next.iter().flat_map(|next| next.placement.nodes());
        let late: Vec<(NodeId, String)> = nodes
            .filter_map(|slots| self.nodes.get(&slots.node))
            .filter(|node| node.resident < epoch)
            .map(|node| (node.id, node.name.clone()))
            .collect();
        for (_, name) in late.iter().filter(|(id, _)| gaining.contains(id)) {
            self.back_off(name);
        }
        let late: Vec<String> = late.into_iter().map(|(_, name)| name).collect();
        let limit = self.settings.copy_deadline.as_secs_f64();
        self.roll_back(&format!(
            "epoch {epoch} was not loaded within {limit} s ({})",
            late.join(", ")
        ));
    }

    /// A node says that it cannot load an epoch.
    pub(super) fn cannot_load(&mut self, now: Duration, id: NodeId, epoch: u64, failure: &str) {
        let of_it = self.next.as_ref().filter(|next| {
            next.placement.epoch() == epoch
                && !next.was_active
                && next.placement.nodes().iter().any(|slots| slots.node == id)
        });
        let (Some(_), Some(node)) = (of_it, self.nodes.get(&id)) else {
            return;
        };
        let name = node.name.clone();
        let reason = format!("`{name}` cannot load epoch {epoch}: {failure}");
        self.back_off(&name);
        if self.step_epoch().is_some() {
            self.roll_back(&reason);
        } else {
            self.withdraw(&reason);
            self.plan_at = Some(now);
            self.loading_failure = reason;
        }
    }

    /// A node that is a part of the migration is gone.
    pub(super) fn lost_to_migration(&mut self, id: NodeId, name: &str) {
        let Some(moving) = &self.moving else {
            return;
        };
        let next = self.next.iter().flat_map(|next| next.placement.nodes());
        if !{ next }.chain(&moving.target).any(|slots| slots.node == id) {
            return;
        }
        if self.gaining().contains(&id) {
            self.back_off(name);
        }
        self.roll_back(&format!("`{name}` was lost"));
    }

    /// Leaves a node alone for a while, longer each time.
    pub(super) fn back_off(&mut self, name: &str) {
        let clock = self.clock;
        self.backed_off
            .retain(|_, entry| clock < entry.until.saturating_add(MAX_BACK_OFF));
        let entry = self.backed_off.entry(name.to_owned()).or_default();
        *entry = BackOff::again(entry.failures.saturating_add(1), clock);
        let until = entry.until;
        // What it was to hold may have found no other place.
        self.retry_at = Some(self.retry_at.map_or(until, |at| at.min(until)));
    }
}
