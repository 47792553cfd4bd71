//! Nodes that an operator has emptied, one migration each.

use std::time::Duration;

use super::failing::BACK_OFF;
use super::status::{DrainError, Drained};
use super::{Membership, Node, Role};
use crate::placement::{Candidate, NodeId, NodeSlots, Shortfall, assign};

impl Membership {
    /// Moves everything off an expert node and lets nothing come to it, or, with
    /// `undo`, lets experts come again. It holds for as long as its process lives.
    ///
    /// # Errors
    /// There is no such node, or the others have no room for what it holds.
    pub fn drain_node(
        &mut self,
        now: Duration,
        name: &str,
        undo: bool,
    ) -> Result<Drained, DrainError> {
        self.step(now);
        let node = self.of_role(Role::Expert).find(|node| node.name == name);
        let Some((id, incarnation)) = node.map(|node| (node.id, node.incarnation)) else {
            return Err(DrainError::Unknown(name.to_owned()));
        };
        if undo {
            self.drained.remove(&incarnation);
            if self.drains() == Some(id) {
                self.roll_back(&format!("draining `{name}` was undone"));
            }
            if self.has_holes() {
                self.plan_at.get_or_insert(now);
            }
            self.step(now);
            return Ok(Drained {
                slots: 0,
                migration: 0,
            });
        }
        let new = self.drained.insert(incarnation);
        let slots = self.held(id);
        let mut migration = 0;
        if self.active.is_none() || slots == 0 {
            // What is being loaded may be for it.
            self.plan_at.get_or_insert(now);
        } else if self.drains() == Some(id) {
            migration = self.status.migration;
        } else if self.next.is_none() || self.moving.is_some() {
            match self.begin_drain(id, name) {
                Ok(number) => migration = number,
                Err(error) => {
                    if new {
                        self.drained.remove(&incarnation);
                    }
                    return Err(error);
                }
            }
        }
        self.step(now);
        Ok(Drained { slots, migration })
    }

    /// Whether an operator has this node emptied.
    pub fn is_drained(&self, node: &Node) -> bool {
        self.drained.contains(&node.incarnation)
    }

    pub(super) fn drains(&self) -> Option<NodeId> {
        self.moving.as_ref().and_then(|moving| moving.drains)
    }

    /// What the others hold once a node has been emptied.
    fn without(&self, id: NodeId) -> Result<Vec<NodeSlots>, Shortfall> {
        let active = self.active.as_ref().map(|active| &active.placement);
        let others = self.of_role(Role::Expert).filter(|node| node.id != id);
        let domains = self.domains();
        let candidates: Vec<Candidate> = others
            .map(|node| Candidate {
                node: node.id,
                domain: domains.get(&node.id).copied().unwrap_or_default(),
                capacity_slots: match self.is_open(node) {
                    true => self.capacity_slots(node),
                    false => u64::from(self.held(node.id)),
                },
            })
            .collect();
        let settings = &self.settings;
        let mut target = assign(
            &settings.layers,
            settings.experts,
            &candidates,
            settings.replicas.max(1),
            active,
        )?;
        target.retain(|node| !node.slots.is_empty());
        Ok(target)
    }

    /// Begins to empty a node, in place of any other migration.
    fn begin_drain(&mut self, id: NodeId, name: &str) -> Result<u64, DrainError> {
        let target = self.without(id).map_err(|short| DrainError::NoRoom {
            name: name.to_owned(),
            short,
        })?;
        if self.moving.is_some() {
            self.roll_back(&format!("draining `{name}` comes first"));
        }
        Ok(self.begin(target, &format!("drain {name}"), Some(id))?)
    }

    /// Drained nodes that hold something still, when nothing else is going on.
    pub(super) fn go_on_draining(&mut self) {
        if self.next.is_some() || self.plan_at.is_some() || self.clock < self.rest_until {
            return;
        }
        let drained = self.nodes.values().filter(|node| self.is_drained(node));
        let full = { drained }.find(|node| self.held(node.id) > 0);
        let Some((id, name)) = full.map(|node| (node.id, node.name.clone())) else {
            return;
        };
        if self.active.is_some() && self.begin_drain(id, &name).is_err() {
            self.rest_until = self.clock + BACK_OFF;
        }
    }
}
