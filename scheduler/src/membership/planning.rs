//! Which placement follows from who is there, and when it is active.

use std::time::Duration;

use super::{Action, Membership, Node, Placed, Published, Role};
use crate::placement::{Candidate, NodeId, NodeSlots, Placement, Shortfall, assign};

impl Membership {
    /// Makes the next placement, unless it would be what there is.
    pub(super) fn plan(&mut self) {
        self.shortfall = None;
        if self.usable_experts().count() < self.wanted_experts() {
            // The next one to join asks again.
            return;
        }
        // A step of a migration is given up when homes are missing.
        let newest = match self.step_epoch() {
            Some(_) => self.active.as_ref(),
            None => self.published(),
        };
        // What nodes hold is what was active last, where nothing is.
        let newest = newest.map(|published| &published.placement);
        let newest = newest.or_else(|| self.retired.iter().max_by_key(|p| p.epoch()));
        let assigned = match newest.filter(|_| self.served) {
            Some(keep) => self.fill_up(keep),
            None => match self.share_out_anew() {
                // Not where the nodes hold too much of what was active.
                Ok(slots) if self.active.is_none() && !self.fits(&slots) => match newest {
                    Some(keep) => self.fill_up(keep),
                    None => Ok(slots),
                },
                anew => anew,
            },
        };
        match assigned {
            Ok(slots) => {
                let same = newest.is_some_and(|newest| same_homes(newest.nodes(), &slots));
                let news = !same || self.published().is_none();
                if news || self.renew {
                    self.go_to(slots);
                }
            }
            Err(short) => {
                self.shortfall = Some(short);
                self.tell();
            }
        }
    }

    /// What is there, with homes for what is missing.
    fn fill_up(&self, keep: &Placement) -> Result<Vec<NodeSlots>, Shortfall> {
        let domains = self.domains();
        let nodes = self.of_role(Role::Expert);
        let candidates: Vec<Candidate> = nodes
            .filter(|node| !node.report.draining)
            .map(|node| {
                let kept = keep.nodes().iter().find(|slots| slots.node == node.id);
                let kept = kept.map_or(0, |slots| slots.slots.len() as u64);
                let room = self.capacity_slots(node);
                Candidate {
                    node: node.id,
                    domain: domains.get(&node.id).copied().unwrap_or_default(),
                    capacity_slots: match self.is_open(node) {
                        true => room.saturating_sub(self.unfreed(node.id, Some(keep))),
                        false => kept,
                    },
                }
            })
            .collect();
        self.assigned(&candidates, Some(keep))
    }

    /// A placement that regards nothing that is there.
    fn share_out_anew(&self) -> Result<Vec<NodeSlots>, Shortfall> {
        let mut nodes: Vec<&Node> = (self.usable_experts())
            .filter(|node| self.is_open(node))
            .collect();
        // In the order of names, which outlive a coordinator while ids do
        // not: after its restart every node is given what it holds already.
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        let domains = self.domains();
        let candidates: Vec<Candidate> = (0..)
            .zip(&nodes)
            .map(|(turn, node)| Candidate {
                node: turn,
                domain: domains.get(&node.id).copied().unwrap_or_default(),
                capacity_slots: self.capacity_slots(node),
            })
            .collect();
        let mut slots = self.assigned(&candidates, None)?;
        for slots in &mut slots {
            slots.node = nodes[slots.node as usize].id;
        }
        Ok(slots)
    }

    fn assigned(
        &self,
        candidates: &[Candidate],
        keep: Option<&Placement>,
    ) -> Result<Vec<NodeSlots>, Shortfall> {
        let (layers, experts) = (&self.settings.layers, self.settings.experts);
        let replicas = self.settings.replicas.max(1);
        let mut slots = assign(layers, experts, candidates, replicas, keep)?;
        // A node without experts has nothing to load and is not waited for.
        slots.retain(|node| !node.slots.is_empty());
        Ok(slots)
    }

    /// To a placement at once, or in steps where the nodes cannot hold it beside
    /// the one that is active.
    fn go_to(&mut self, slots: Vec<NodeSlots>) {
        let moving = self.moving.as_ref();
        if moving.is_some_and(|moving| same_homes(&moving.target, &slots)) {
            return;
        }
        if moving.is_some() {
            self.roll_back("the homes had to be given out anew");
        }
        if self.served || self.active.is_none() || self.fits(&slots) {
            self.publish(slots);
        } else {
            self.withdraw("it has been overtaken");
            // Where there is no way, what is active stays.
            let _ = self.begin(slots, "join", None);
        }
    }

    /// Whether the nodes can hold all this beside what is still in use.
    fn fits(&self, slots: &[NodeSlots]) -> bool {
        slots.iter().all(|slots| {
            let node = self.nodes.get(&slots.node);
            let newest = Placement::new(0, vec![slots.clone()]).ok();
            let all = self.unfreed(slots.node, newest.as_ref()) + slots.slots.len() as u64;
            node.is_some_and(|node| all <= self.capacity_slots(node))
        })
    }

    fn publish(&mut self, slots: Vec<NodeSlots>) {
        let epoch = self.newest_epoch + 1;
        // `assign` gives no node an expert twice, which is all that `new` asks for.
        let Ok(placement) = Placement::new(epoch, slots) else {
            return;
        };
        self.withdraw("it has been overtaken");
        self.newest_epoch = epoch;
        self.renew = false;
        self.next = Some(self.described(placement, false, epoch));
        self.tell();
    }

    pub(super) fn tell(&mut self) {
        if self.actions.last() != Some(&Action::Publish) {
            self.actions.push(Action::Publish);
        }
    }

    pub(super) fn described(
        &self,
        placement: Placement,
        active: bool,
        loaded_as: u64,
    ) -> Published {
        let nodes = placement
            .nodes()
            .iter()
            .filter_map(|slots| self.nodes.get(&slots.node))
            .map(placed)
            .collect();
        Published {
            placement,
            active,
            loaded_as,
            was_active: false,
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
        let name = |id| self.nodes.get(&id).map(|node| node.name.clone());
        let loaded = self.next.as_ref().is_some_and(whole);
        let gained: Vec<String> = match loaded {
            true => self.gaining().into_iter().filter_map(name).collect(),
            false => Vec::new(),
        };
        if loaded && let Some(mut loaded) = self.next.take() {
            let epoch = loaded.placement.epoch();
            for name in gained {
                self.backed_off.remove(&name);
            }
            loaded.active = true;
            if self.active.is_none() {
                self.active_since = epoch;
            }
            self.last_active = epoch;
            let before = self.active.replace(loaded);
            self.retire(before);
            self.step_done(epoch);
            self.loading_failure.clear();
            self.tell();
        } else if let Some(active) = self.active.take_if(|active| !whole(active)) {
            self.lose(now, active);
        }
    }

    /// A home in the active placement is gone.
    fn lose(&mut self, now: Duration, mut active: Published) {
        if self.moving.is_some() {
            self.roll_back("a home in the active placement was lost");
        }
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
            self.last_active = left.epoch();
            self.retire(Some(active));
            self.active = Some(self.described(left, true, loaded_as));
            // What was being loaded is older now: it gets a new epoch.
            self.renew |= self.next.is_some();
        } else if self.next.is_none() {
            // Some experts have no home: nothing can be served before a next one.
            active.active = false;
            active.was_active = true;
            self.next = Some(active);
        } else {
            self.retire(Some(active));
        }
        self.tell();
    }

    /// What was being loaded when the active placement lost a node, and was not
    /// made anew since.
    pub(super) fn forget_overtaken(&mut self) {
        let active = self.active_epoch();
        let older = |next: &Published| active.is_some_and(|active| next.placement.epoch() < active);
        if self.next.as_ref().is_some_and(older) {
            self.withdraw("it has been overtaken");
        }
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
}

/// A node as those who read a placement have to know it.
pub(super) fn placed(node: &Node) -> Placed {
    Placed {
        name: node.name.clone(),
        address: node.address.clone(),
        process: node.process.clone(),
        rows_per_second: node.speed,
    }
}

/// Whether both give the same slots to the same nodes, in whatever order of nodes.
fn same_homes(a: &[NodeSlots], b: &[NodeSlots]) -> bool {
    a.len() == b.len() && a.iter().all(|node| b.contains(node))
}
