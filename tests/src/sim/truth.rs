//! What must hold, whatever happens, and what must be so in the end. Secret: the invariants. They
//! are looked at after every event, from outside, with what no process can know.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use guild_scheduler::membership::Phase;
use guild_scheduler::placement::Placement;

use super::event::Who;
use super::message::{State, Stored, Wire};
use super::relay::index_of;
use super::world::World;

/// What has been seen of epochs.
#[derive(Debug, Default)]
pub(super) struct Truth {
    /// The one content of each epoch.
    contents: BTreeMap<u64, (Placement, Vec<(String, String)>)>,
    active: BTreeSet<u64>,
    withdrawn: BTreeSet<u64>,
    /// What the store holds as active.
    stored: Option<Arc<Wire>>,
}

impl Truth {
    /// Notes a placement that is known to somebody beside its maker.
    fn note(&mut self, told: &Wire) -> Result<(), String> {
        let epoch = told.epoch();
        if told.state == State::Withdrawn {
            self.withdrawn.insert(epoch);
        } else {
            let content = (told.placement.clone(), told.nodes.clone());
            let known = self
                .contents
                .entry(epoch)
                .or_insert_with(|| content.clone());
            if *known != content {
                return Err(format!("epoch {epoch} has two contents"));
            }
        }
        if told.state == State::Active {
            self.active.insert(epoch);
        }
        match self.withdrawn.contains(&epoch) && self.active.contains(&epoch) {
            true => Err(format!("epoch {epoch} is withdrawn and active")),
            false => Ok(()),
        }
    }
}

impl World {
    fn hold(&mut self, judgement: Result<(), String>) {
        if let Err(wrong) = judgement {
            self.report.wrong(wrong);
        }
    }

    /// A node has been told of a placement.
    pub(super) fn told(&mut self, _node: Who, told: &Wire) {
        let judgement = self.truth.note(told);
        self.hold(judgement);
    }

    /// An attention node routes by an epoch.
    pub(super) fn routes_by(&mut self, node: Who, epoch: u64) {
        if self.truth.withdrawn.contains(&epoch) {
            self.report.wrong(format!(
                "{node:?} routes by epoch {epoch}, which is withdrawn"
            ));
        }
    }

    /// The store has taken a write.
    pub(super) fn written(&mut self, by: usize, before: Option<Stored>, now: &Stored) {
        if before.is_some_and(|before| before.epoch > now.epoch) {
            self.report.wrong(format!(
                "Coordinator({by}) takes the store back to epoch {}",
                now.epoch
            ));
        }
        let placements = Arc::clone(&now.placements);
        for told in [&placements.active, &placements.next, &placements.withdrawn]
            .into_iter()
            .flatten()
        {
            let judgement = self.truth.note(told);
            self.hold(judgement);
        }
        let (layers, experts) = (self.model.layers(), self.model.experts);
        let active = placements.active.as_ref();
        if let Some(torn) = active.filter(|a| !a.placement.covers(&layers, experts)) {
            let epoch = torn.epoch();
            let wrong = format!("epoch {epoch} is active and leaves an expert without a home");
            self.report.wrong(wrong);
        }
        self.truth.stored = placements.active.clone();
    }

    /// Whether a leader has taken readiness away without need.
    pub(super) fn check_active(&mut self, at: usize) {
        let c = &mut self.coordinators[at];
        let epoch = c.m.active_epoch();
        if epoch == c.was_active.as_ref().map(Placement::epoch) {
            return;
        }
        let active = c.m.active().map(|active| active.placement.clone());
        let before = std::mem::replace(&mut c.was_active, active);
        let Some(before) = before.filter(|_| epoch.is_none()) else {
            return;
        };
        let left = before.reduced(0, |id| c.m.node(id).is_some());
        if left.covers(&self.model.layers(), self.model.experts) {
            self.report.wrong(format!(
                "Coordinator({at}) takes epoch {} back while every expert has a live home",
                before.epoch()
            ));
        }
        self.report
            .count("readiness lost with an expert's last home");
    }

    /// Rows of an epoch have come to a node that had it and has let go of it.
    pub(super) fn check_freed(&mut self, at: usize, epoch: u64) {
        // Where nothing is active nobody sends rows, and old tables may be in the way.
        let oldest = self.truth.stored.as_ref();
        let oldest = oldest.map_or(u64::MAX, |stored| stored.oldest);
        // One that has joined again is another node.
        let id = self.experts[at].session.id;
        let content = self.truth.contents.get(&epoch);
        let lists = |(placement, _): &(Placement, _)| {
            let mut nodes = placement.nodes().iter();
            nodes.any(|slots| Some(slots.node) == id)
        };
        let used = self.truth.active.contains(&epoch) && epoch >= oldest;
        if used && content.is_some_and(lists) {
            self.report.wrong(format!(
                "Expert({at}) has freed epoch {epoch} while it is in use"
            ));
        }
    }

    /// What is looked at after every event.
    pub(super) fn check_always(&mut self) {
        for at in 0..self.experts.len() {
            let node = &self.experts[at];
            if node.capacity > 0 && node.memory.len() as u64 > node.capacity {
                let (has, room) = (node.memory.len(), node.capacity);
                return self.report.wrong(format!(
                    "Expert({at}) holds {has} experts and has room for {room}"
                ));
            }
        }
        let Some(stored) = &self.truth.stored else {
            return;
        };
        let homes = stored.placement.nodes().iter().zip(&stored.nodes);
        for (slots, (name, _)) in homes {
            let Some(at) = index_of(name) else { continue };
            let node = &self.experts[at];
            // Another process by that name is another node.
            if !self.process(Who::Expert(at)).up || !node.session.ids.contains(&slots.node) {
                continue;
            }
            if let Some(key) = slots
                .slots
                .iter()
                .find(|key| !node.memory.contains_key(key))
            {
                let wrong = format!(
                    "epoch {} is active and Expert({at}) does not hold {key:?}",
                    stored.epoch()
                );
                return self.report.wrong(wrong);
            }
        }
    }

    /// All is as it is to be: nothing left to wait for.
    pub(super) fn unsettled(&self) -> Option<String> {
        if let Some(client) = self.clients.iter().position(|client| !client.done) {
            return Some(format!("client {client} still waits"));
        }
        let leaders: Vec<usize> = (0..self.coordinators.len())
            .filter(|&c| self.coordinators[c].leads())
            .collect();
        let [leader] = leaders.as_slice() else {
            return Some(format!("{} coordinators lead", leaders.len()));
        };
        let m = &self.coordinators[*leader].m;
        if let Some(reason) = m.waiting_for() {
            return Some(format!("the cluster is not ready: {reason}"));
        }
        if let Some(next) = m.next() {
            return Some(format!(
                "epoch {} is still being loaded",
                next.placement.epoch()
            ));
        }
        if m.migration().phase != Phase::Idle {
            return Some(format!(
                "migration {} does not end",
                m.migration().migration
            ));
        }
        let epoch = m.active_epoch().unwrap_or(0);
        let members = m.nodes().count();
        let all = self.experts.len() + self.attentions.len();
        if members != all {
            return Some(format!("{members} of {all} nodes are members"));
        }
        let behind = self
            .attentions
            .iter()
            .position(|a| a.view.as_ref().map(|v| v.epoch()) != Some(epoch));
        if let Some(at) = behind {
            return Some(format!("Attention({at}) does not route by epoch {epoch}"));
        }
        for (at, node) in self.experts.iter().enumerate() {
            let old = node.tables.keys().filter(|&&table| table != epoch).count();
            if node.is_loading() || old > 0 {
                return Some(format!(
                    "Expert({at}) has {old} tables of other epochs than {epoch}"
                ));
            }
        }
        let (wanted, has) = m.redundancy();
        let nodes = self.experts.len() as u32;
        (has < wanted.min(nodes)).then(|| format!("experts have {has} homes instead of {wanted}"))
    }

    pub(super) fn check_liveness(&mut self) {
        if let Some(left) = self.unsettled() {
            self.report
                .wrong(format!("long after the last fault {left}"));
        }
    }
}
