//! The migration under way: one LOADING epoch after the other until the target
//! is active, or back to what is active.
//!
//! A step is published only when everybody has left the epochs before the
//! active one, so that their tables take no room any more. Until it is active
//! nothing is lost by giving it up: a withdrawn epoch is never used again.

use std::time::Duration;

use super::status::{DrainError, Drained, MigrateError, MigrationStatus, Outcome, Phase};
use super::{Action, Membership, Node, Role};
use crate::migration::{self, Step};
use crate::placement::{Candidate, NodeId, NodeSlots, Placement, Shortfall, assign};

/// A node that has failed as a destination is not one again for this long.
pub const BACK_OFF: Duration = Duration::from_secs(2);
/// The same after many failures: it doubles with each of them up to this.
pub const MAX_BACK_OFF: Duration = Duration::from_secs(300);

/// A target and how far the way to it has been gone.
#[derive(Clone, Debug)]
pub(super) struct Moving {
    pub(super) target: Vec<NodeSlots>,
    /// The node that is to be emptied by it.
    pub(super) drains: Option<NodeId>,
    pub(super) step: Option<LoadingStep>,
}

/// The step that is the LOADING epoch.
#[derive(Clone, Debug)]
pub(super) struct LoadingStep {
    pub(super) epoch: u64,
    pub(super) copies: u32,
    pub(super) deadline: Duration,
}

/// How often a node has failed as a destination, and until when it is left alone.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    failures: u32,
    pub(super) until: Duration,
}

impl Membership {
    /// Begins to move the experts to where `target` has them. Returns the number
    /// of the migration.
    ///
    /// # Errors
    /// Another one is under way, something is being loaded, or the target is not
    /// whole, cannot be reached, or is what there is. Nothing has changed then.
    pub fn migrate(
        &mut self,
        now: Duration,
        target: Vec<NodeSlots>,
        cause: &str,
    ) -> Result<u64, MigrateError> {
        self.step(now);
        let number = self.begin(target, cause, None)?;
        self.step(now);
        Ok(number)
    }

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

    /// Gives the migration under way up, if there is one.
    pub fn abandon(&mut self, now: Duration, reason: &str) {
        if self.moving.is_some() {
            self.roll_back(reason);
        }
        self.step(now);
    }

    /// The migration under way, or the last one.
    pub fn migration(&self) -> &MigrationStatus {
        &self.status
    }

    /// Whether an operator has this node emptied.
    pub fn is_drained(&self, node: &Node) -> bool {
        self.drained.contains(&node.incarnation)
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

    /// Slots a node has in all; `u64::MAX`: any number.
    pub fn capacity_slots(&self, node: &Node) -> u64 {
        match node.capacity_bytes {
            0 => u64::MAX,
            bytes => bytes / self.settings.slot_bytes.max(1),
        }
    }

    pub(super) fn drains(&self) -> Option<NodeId> {
        self.moving.as_ref().and_then(|moving| moving.drains)
    }

    /// The epoch that is LOADING as a step of a migration.
    pub(super) fn step_epoch(&self) -> Option<u64> {
        let step = self.moving.as_ref()?.step.as_ref()?;
        let next = self.next.as_ref()?;
        (next.placement.epoch() == step.epoch).then_some(step.epoch)
    }

    /// Experts that a node has in the active placement.
    fn held(&self, id: NodeId) -> u32 {
        let active = self.active.iter().flat_map(|p| p.placement.nodes());
        let here = active.filter(|slots| slots.node == id);
        here.map(|slots| slots.slots.len() as u32).sum()
    }

    fn room(&self, id: NodeId) -> u64 {
        (self.nodes.get(&id)).map_or(0, |node| self.capacity_slots(node))
    }

    pub(super) fn begin(
        &mut self,
        target: Vec<NodeSlots>,
        cause: &str,
        drains: Option<NodeId>,
    ) -> Result<u64, MigrateError> {
        if self.moving.is_some() {
            return Err(MigrateError::Busy {
                migration: self.status.migration,
                cause: self.status.cause.clone(),
            });
        }
        let active = self.active.as_ref().ok_or(MigrateError::NotActive)?;
        if let Some(next) = &self.next {
            return Err(MigrateError::Loading(next.placement.epoch()));
        }
        self.check_target(&target)?;
        let steps = migration::steps(active.placement.nodes(), &target, |id| self.room(id))?;
        if steps.is_empty() {
            return Err(MigrateError::Nothing);
        }
        self.check_destinations(&steps[..])?;
        let copies = steps.iter().map(|step| step.copies.len()).sum::<usize>();
        self.status = MigrationStatus {
            migration: self.status.migration + 1,
            phase: Phase::Draining,
            epoch: active.placement.epoch(),
            cause: cause.to_owned(),
            copies_done: 0,
            copies: copies as u32,
            bytes_done: 0,
            bytes: (copies as u64).saturating_mul(self.settings.slot_bytes),
            ..std::mem::take(&mut self.status)
        };
        self.moving = Some(Moving {
            target,
            drains,
            step: None,
        });
        Ok(self.status.migration)
    }

    fn check_target(&self, target: &[NodeSlots]) -> Result<(), MigrateError> {
        let (layers, experts) = (&self.settings.layers, self.settings.experts);
        let wrong = |problem: String| Err(MigrateError::Target(problem));
        let placement = match Placement::new(0, target.to_vec()) {
            Ok(placement) => placement,
            Err(error) => return wrong(error.to_string()),
        };
        if !placement.covers(layers, experts) {
            return wrong("an expert has no home".to_owned());
        }
        let unknown = |slot: &&(u32, u32)| !layers.contains(&slot.0) || slot.1 >= experts;
        let slots = target.iter().flat_map(|node| &node.slots);
        match { slots }.find(unknown) {
            Some((layer, expert)) => wrong(format!("there is no expert {expert} in layer {layer}")),
            None => Ok(()),
        }
    }

    fn check_destinations(&self, steps: &[Step]) -> Result<(), MigrateError> {
        for &(node, ..) in steps.iter().flat_map(|step| &step.copies) {
            let problem = match self.nodes.get(&node) {
                None => "it is not a member",
                Some(node) if self.is_open(node) => continue,
                Some(node) if node.role != Role::Expert => "it is no expert node",
                Some(node) if self.is_backed_off(node) => "it has failed of late",
                Some(_) => "it is being drained",
            };
            return Err(MigrateError::Destination { node, problem });
        }
        Ok(())
    }

    /// What the others hold once a node has been emptied.
    fn without(&self, id: NodeId) -> Result<Vec<NodeSlots>, Shortfall> {
        let active = self.active.as_ref().map(|active| &active.placement);
        let others = self.of_role(Role::Expert).filter(|node| node.id != id);
        let candidates: Vec<Candidate> = others
            .map(|node| Candidate {
                node: node.id,
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
    fn go_on_draining(&mut self) {
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

    /// What follows for migrations from the present state and time.
    pub(super) fn advance(&mut self, now: Duration) {
        if self.moving.is_none() {
            self.go_on_draining();
        }
        let Some(moving) = &self.moving else {
            return;
        };
        if let Some(step) = &moving.step {
            if now >= step.deadline {
                let epoch = step.epoch;
                self.blame_late(epoch);
            }
            return;
        }
        let Some(active) = &self.active else {
            return;
        };
        if !self.retired.is_empty() || self.next.is_some() {
            return;
        }
        let room = |id| self.room(id);
        match migration::next_step(active.placement.nodes(), &moving.target, room) {
            Ok(None) => self.end(Outcome::Completed),
            Ok(Some(step)) => match self.check_destinations(std::slice::from_ref(&step)) {
                Ok(()) => self.publish_step(now, step),
                Err(error) => self.roll_back(&error.to_string()),
            },
            Err(error) => self.roll_back(&error.to_string()),
        }
    }

    fn publish_step(&mut self, now: Duration, step: Step) {
        let epoch = self.newest_epoch + 1;
        let placement = match Placement::new(epoch, step.nodes) {
            Ok(placement) => placement,
            Err(error) => return self.roll_back(&error.to_string()),
        };
        self.newest_epoch = epoch;
        self.renew = false;
        self.next = Some(self.described(placement, false, epoch));
        self.status.phase = Phase::Copying;
        self.status.epoch = epoch;
        if let Some(moving) = &mut self.moving {
            moving.step = Some(LoadingStep {
                epoch,
                copies: step.copies.len() as u32,
                deadline: now.saturating_add(self.settings.copy_deadline),
            });
        }
        self.actions.push(Action::StepBegun {
            migration: self.status.migration,
            epoch,
            copies: step.copies.len(),
        });
        self.tell();
    }

    /// A placement has become active: was it a step?
    pub(super) fn step_done(&mut self, epoch: u64) {
        let Some(moving) = &mut self.moving else {
            return;
        };
        let Some(step) = moving.step.take_if(|step| step.epoch == epoch) else {
            return;
        };
        let status = &mut self.status;
        status.phase = Phase::Draining;
        status.copies_done = status.copies_done.saturating_add(step.copies);
        let bytes = u64::from(step.copies).saturating_mul(self.settings.slot_bytes);
        status.bytes_done = status.bytes_done.saturating_add(bytes);
        self.actions.push(Action::StepPublished {
            migration: status.migration,
            epoch,
        });
    }

    /// The time for a step is over.
    fn blame_late(&mut self, epoch: u64) {
        let late: Vec<String> = (self.gaining().into_iter())
            .filter_map(|id| self.nodes.get(&id))
            .filter(|node| node.resident < epoch)
            .map(|node| node.name.clone())
            .collect();
        for name in &late {
            self.back_off(name);
        }
        let limit = self.settings.copy_deadline.as_secs_f64();
        self.roll_back(&format!(
            "epoch {epoch} was not loaded within {limit} s ({})",
            late.join(", ")
        ));
    }

    /// Nodes that the LOADING placement gives something that they do not have.
    pub(super) fn gaining(&self) -> Vec<NodeId> {
        let (Some(next), active) = (&self.next, &self.active) else {
            return Vec::new();
        };
        let has = |id: NodeId, slot: &(u32, u32)| {
            let active = active.iter().flat_map(|p| p.placement.nodes());
            { active }.any(|node| node.node == id && node.slots.contains(slot))
        };
        let nodes = next.placement.nodes().iter();
        nodes
            .filter(|node| !node.slots.iter().all(|slot| has(node.node, slot)))
            .map(|node| node.node)
            .collect()
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
        let times = 1u32 << entry.failures.min(16);
        entry.failures = entry.failures.saturating_add(1);
        entry.until = clock.saturating_add(BACK_OFF.saturating_mul(times).min(MAX_BACK_OFF));
        let until = entry.until;
        // What it was to hold may have found no other place.
        self.retry_at = Some(self.retry_at.map_or(until, |at| at.min(until)));
    }

    /// Gives the migration up; what is active goes on.
    pub(super) fn roll_back(&mut self, reason: &str) {
        if self.step_epoch().is_some() {
            self.withdraw(reason);
        }
        if self.drains().is_some() {
            self.rest_until = self.clock + BACK_OFF;
        }
        self.end(Outcome::RolledBack(reason.to_owned()));
    }

    /// The LOADING epoch will not be active.
    pub(super) fn withdraw(&mut self, reason: &str) {
        let Some(next) = self.next.take() else {
            return;
        };
        let epoch = next.placement.epoch();
        if next.was_active {
            self.retired.push(next.placement);
            return;
        }
        self.withdrawn = self.withdrawn.max(Some(epoch));
        self.actions.push(Action::Withdrawn {
            epoch,
            reason: reason.to_owned(),
        });
        self.tell();
    }

    fn end(&mut self, outcome: Outcome) {
        self.moving = None;
        let status = &mut self.status;
        status.phase = Phase::Idle;
        match &outcome {
            Outcome::Completed => status.completed += 1,
            Outcome::RolledBack(reason) => {
                status.rolled_back += 1;
                status.last_failure.clone_from(reason);
            }
        }
        self.actions.push(Action::MigrationEnded {
            migration: status.migration,
            outcome,
        });
    }
}
