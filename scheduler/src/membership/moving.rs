//! The migration under way: one LOADING epoch after the other until the target
//! is active, or back to what is active.
//!
//! A step is published only when everybody has left the epochs before the
//! active one, so that their tables take no room any more. Until it is active
//! nothing is lost by giving it up: a withdrawn epoch is never used again.

use std::time::Duration;

use super::failing::BACK_OFF;
use super::status::{MigrateError, MigrationStatus, Outcome, Phase};
use super::{Action, Membership, Node, Role};
use crate::migration::{self, Step};
use crate::placement::{NodeId, NodeSlots, Placement};

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

    /// Slots a node has in all; `u64::MAX`: any number.
    pub fn capacity_slots(&self, node: &Node) -> u64 {
        match node.capacity_bytes {
            0 => u64::MAX,
            bytes => bytes / self.settings.slot_bytes.max(1),
        }
    }

    /// The epoch that is LOADING as a step of a migration.
    pub(super) fn step_epoch(&self) -> Option<u64> {
        let step = self.moving.as_ref()?.step.as_ref()?;
        let next = self.next.as_ref()?;
        (next.placement.epoch() == step.epoch).then_some(step.epoch)
    }

    /// Experts that a node has in the active placement.
    pub(super) fn held(&self, id: NodeId) -> u32 {
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
        let failed = matches!(outcome, Outcome::RolledBack(_));
        self.actions.push(Action::MigrationEnded {
            migration: status.migration,
            outcome,
        });
        if failed && self.has_holes() {
            // It may have been what was to fill them: nobody else will ask again.
            let at = self.clock + BACK_OFF;
            self.retry_at = Some(self.retry_at.map_or(at, |known| known.min(at)));
        }
    }
}
