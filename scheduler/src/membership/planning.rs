//! Which placement follows from who is there, and when it is active.

use std::time::Duration;

use super::{Action, Membership, Node, Published};
use crate::placement::{Candidate, NodeId, NodeSlots, Placement, assign};

impl Membership {
    /// Makes the next placement, unless it would be what there is.
    pub(super) fn plan(&mut self) {
        self.shortfall = None;
        if self.usable_experts().count() < self.wanted_experts() {
            // The next one to join asks again.
            return;
        }
        let newest = self.published().map(|published| &published.placement);
        let keep = newest.filter(|_| self.served);
        let mut nodes: Vec<&Node> = self.usable_experts().collect();
        if keep.is_none() {
            // In the order of names, which outlive a coordinator while ids do
            // not: after its restart every node is given what it holds already.
            nodes.sort_by(|a, b| a.name.cmp(&b.name));
        }
        let ids: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
        let candidates: Vec<Candidate> = (0..)
            .zip(nodes)
            .map(|(turn, node)| Candidate {
                node: if keep.is_none() { turn } else { node.id },
                capacity_slots: self.slots_of(node.capacity_bytes),
            })
            .collect();
        let assigned = assign(
            &self.settings.layers,
            self.settings.experts,
            &candidates,
            self.settings.replicas.max(1),
            keep,
        );
        match assigned {
            Ok(mut slots) => {
                if keep.is_none() {
                    for (slots, id) in slots.iter_mut().zip(ids) {
                        slots.node = id;
                    }
                }
                // A node without experts has nothing to load and is not waited for.
                slots.retain(|node| !node.slots.is_empty());
                let news = newest.is_none_or(|newest| !same_homes(newest.nodes(), &slots));
                if news || self.renew {
                    self.publish(slots);
                }
            }
            Err(short) => self.shortfall = Some(short),
        }
    }

    fn publish(&mut self, slots: Vec<NodeSlots>) {
        let epoch = self.newest_epoch + 1;
        // `assign` gives no node an expert twice, which is all that `new` asks for.
        let Ok(placement) = Placement::new(epoch, slots) else {
            return;
        };
        self.newest_epoch = epoch;
        self.renew = false;
        self.next = Some(self.described(placement, false, epoch));
        self.tell();
    }

    fn tell(&mut self) {
        if self.actions.last() != Some(&Action::Publish) {
            self.actions.push(Action::Publish);
        }
    }

    fn described(&self, placement: Placement, active: bool, loaded_as: u64) -> Published {
        let nodes = placement
            .nodes()
            .iter()
            .filter_map(|slots| self.nodes.get(&slots.node))
            .map(|node| (node.name.clone(), node.address.clone()))
            .collect();
        Published {
            placement,
            active,
            loaded_as,
            nodes,
        }
    }

    /// Is the next placement loaded, and is the active one still whole?
    pub(super) fn judge(&mut self, now: Duration) {
        let has = |id: NodeId, epoch: u64| {
            let node = self.nodes.get(&id);
            node.is_some_and(|node| node.resident >= epoch)
        };
        let whole = |published: &Published| {
            let mut nodes = published.placement.nodes().iter();
            nodes.all(|slots| has(slots.node, published.loaded_as))
        };
        if self.next.as_ref().is_some_and(whole)
            && let Some(mut loaded) = self.next.take()
        {
            loaded.active = true;
            if self.active.is_none() {
                self.active_since = loaded.placement.epoch();
            }
            self.active = Some(loaded);
            self.tell();
        } else if let Some(active) = self.active.take_if(|active| !whole(active)) {
            self.lose(now, active);
        }
    }

    /// A home in the active placement is gone.
    fn lose(&mut self, now: Duration, mut active: Published) {
        let loaded_as = active.loaded_as;
        let stays = |id| {
            let node = self.nodes.get(&id);
            node.is_some_and(|node| node.resident >= loaded_as)
        };
        let left = active.placement.reduced(self.newest_epoch + 1, stays);
        // At once, whatever else is being waited for.
        self.plan_at = Some(now);
        if left.covers(&self.settings.layers, self.settings.experts) {
            // The others have their slots already and need not load anything.
            self.newest_epoch = left.epoch();
            self.active = Some(self.described(left, true, loaded_as));
            // What was being loaded is older now: it gets a new epoch.
            self.renew |= self.next.is_some();
        } else if self.next.is_none() {
            // Some experts have no home: nothing can be served before a next one.
            active.active = false;
            self.next = Some(active);
        }
        self.tell();
    }

    /// What was being loaded when the active placement lost a node, and was not
    /// made anew since.
    pub(super) fn forget_overtaken(&mut self) {
        let active = self.active_epoch();
        self.next
            .take_if(|next| active.is_some_and(|active| next.placement.epoch() < active));
    }

    /// Whether the newest placement has lost homes or has fewer copies than the
    /// nodes that are there could hold.
    pub(super) fn has_holes(&self) -> bool {
        let Some(published) = self.published() else {
            return true;
        };
        let mut nodes = published.placement.nodes().iter();
        let (layers, experts) = (&self.settings.layers, self.settings.experts);
        let could = self.settings.replicas.max(1);
        let could = could.min(self.usable_experts().count() as u32);
        nodes.any(|slots| !self.nodes.contains_key(&slots.node))
            || published.placement.redundancy(layers, experts) < could
    }

    fn slots_of(&self, capacity_bytes: u64) -> u64 {
        match capacity_bytes {
            0 => u64::MAX,
            bytes => bytes / self.settings.slot_bytes.max(1),
        }
    }
}

/// Whether both give the same slots to the same nodes, in whatever order of nodes.
fn same_homes(a: &[NodeSlots], b: &[NodeSlots]) -> bool {
    a.len() == b.len() && a.iter().all(|node| b.contains(node))
}
