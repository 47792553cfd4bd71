//! Membership: who is there, which placement holds, what is being waited for.
//!
//! Secret of this module: the coordinator's judgement, as a pure state machine.
//! What happens goes in (a node registers, beats, leaves; time passes), what
//! follows comes out as [`Action`]s; `now` is the time since an arbitrary
//! start. It knows neither sockets nor clocks.
//!
//! The life of a placement: expert nodes join; when no more have joined for the
//! settle time it is published as LOADING under a new epoch; when every node in
//! it has reported that epoch as loaded it is ACTIVE, and stays so while the
//! next one loads. When a node is lost and every expert has another live home,
//! the ACTIVE placement goes on without it under a new epoch, and missing copies
//! are made up for by one that loads behind it. Only an expert without any live
//! home takes ACTIVE back.
//!
//! A migration moves experts between live nodes by the same epochs: see
//! [`Membership::migrate`]. Lost homes come before it.

mod admission;
mod draining;
mod epochs;
mod failing;
mod moving;
mod planning;
mod snapshot;
mod status;
mod types;
mod words;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::placement::{NodeId, Placement, Shortfall};

pub use admission::NUMERICS_OF_CACHE;
use admission::coarse;
use failing::{BackOff, Restoring};
use moving::Moving;

pub use failing::{BACK_OFF, MAX_BACK_OFF};
pub use snapshot::{Snapshot, SnapshotError};
pub use status::{DrainError, Drained, MigrateError, MigrationStatus, Outcome, Phase};
pub use types::{
    Action, Duty, Loss, MAX_NODES, MAX_TEXT, Measured, Node, Placed, Published, Refused,
    Registration, Report, Role, Serving, Settings, UnknownNode,
};

/// Highest epoch a node may report; no cluster lives long enough to pass it.
pub const MAX_EPOCH: u64 = 1 << 62;
/// Incarnations of lost nodes that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// The state of a cluster's membership.
#[derive(Clone, Debug)]
pub struct Membership {
    settings: Settings,
    nodes: BTreeMap<NodeId, Node>,
    last_id: NodeId,
    /// What requests are served by: every expert has a live home that has loaded it.
    active: Option<Published>,
    /// What comes after it: newer than `active`, and not loaded by everybody.
    next: Option<Published>,
    /// Since this epoch there has been an active placement without a break.
    active_since: u64,
    /// Highest epoch published here or reported by anybody.
    newest_epoch: u64,
    /// The next placement needs a new epoch even if it has the same homes.
    renew: bool,
    /// When the next placement is to be made, if one is wanted.
    plan_at: Option<Duration>,
    shortfall: Option<Shortfall>,
    /// The first request has been served: from now on nothing live moves.
    served: bool,
    /// Incarnations that have got their epochs from here.
    remembered: VecDeque<u64>,
    /// The newest epoch that has been active.
    last_active: u64,
    /// What has been active before, and is still in use.
    retired: Vec<Placement>,
    oldest_epoch: u64,
    withdrawn: Option<u64>,
    moving: Option<Moving>,
    status: MigrationStatus,
    /// Incarnations of the nodes that an operator has emptied.
    drained: BTreeSet<u64>,
    /// Nodes, by name, that have failed as destinations.
    backed_off: BTreeMap<String, BackOff>,
    restoring: Restoring,
    /// When a node that had failed may be tried again.
    retry_at: Option<Duration>,
    /// Drains that have failed are not begun again before.
    rest_until: Duration,
    /// Why lost homes could not be restored the last time.
    loading_failure: String,
    /// The time of the last event.
    clock: Duration,
    actions: Vec<Action>,
}

impl Membership {
    /// A cluster that nobody has joined. `now` is the time of its start.
    pub fn new(settings: Settings, now: Duration) -> Membership {
        let mut membership = Membership {
            settings,
            nodes: BTreeMap::new(),
            last_id: 0,
            active: None,
            next: None,
            active_since: 0,
            newest_epoch: 0,
            renew: false,
            plan_at: None,
            shortfall: None,
            served: false,
            remembered: VecDeque::new(),
            last_active: 0,
            retired: Vec::new(),
            oldest_epoch: 0,
            withdrawn: None,
            moving: None,
            status: MigrationStatus::default(),
            drained: BTreeSet::new(),
            backed_off: BTreeMap::new(),
            restoring: Restoring::default(),
            retry_at: None,
            rest_until: Duration::ZERO,
            loading_failure: String::new(),
            clock: now,
            actions: Vec::new(),
        };
        if membership.needs_no_expert_node() {
            membership.plan_at = Some(now + membership.settings.settle);
        }
        membership
    }

    /// Gives ids above `last` from now on. Whoever begins with nothing, and cannot know which ids
    /// were given before, begins somewhere at random: what a node of an earlier life still asks for
    /// by its id must not be another's.
    pub fn number_above(&mut self, last: NodeId) {
        self.last_id = self.last_id.max(last);
    }

    /// A node wants to join, or to join again. Returns its id.
    ///
    /// # Errors
    /// It may not; nothing has changed then.
    pub fn register(&mut self, now: Duration, new: Registration) -> Result<NodeId, Refused> {
        self.check(&new)?;
        let namesake = self.nodes.values().find(|node| node.name == new.name);
        if let Some(node) = namesake {
            if node.role != new.role {
                return Err(Refused::NameTaken {
                    name: new.name,
                    role: node.role,
                });
            }
            let id = node.id;
            if node.incarnation == new.incarnation && node.address == new.address {
                // The answer to its first call was lost on the way.
                self.note_seen(now, id);
                self.step(now);
                return Ok(id);
            }
            self.remove(now, id, Loss::Replaced);
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(Refused::Full);
        }
        let id = self.last_id.checked_add(1).ok_or(Refused::Full)?;
        self.last_id = id;
        self.respect_epoch(now, &new);
        let role = new.role;
        self.actions.push(Action::Joined {
            node: id,
            name: new.name.clone(),
        });
        self.nodes.insert(
            id,
            Node {
                id,
                role: new.role,
                name: new.name,
                address: new.address,
                numerics_class: new.numerics_class,
                report: Report::default(),
                process: new.process,
                failure_domain: new.failure_domain,
                duty: new.duty,
                speed: 0.0,
                tokens_per_second: 0.0,
                capacity_bytes: new.capacity_bytes,
                incarnation: new.incarnation,
                resident: 0,
                last_seen: now,
                gone_at: None,
            },
        );
        if role == Role::Expert {
            self.expect_more(now);
        }
        self.step(now);
        Ok(id)
    }

    /// A node is alive and says how it is.
    ///
    /// # Errors
    /// It is not a member, or another process is by that id.
    pub fn heartbeat(
        &mut self,
        now: Duration,
        id: NodeId,
        incarnation: u64,
        mut report: Report,
    ) -> Result<(), UnknownNode> {
        // Expiry first: a lease that has run out is not renewed.
        self.step(now);
        let node = self
            .nodes
            .get_mut(&id)
            .filter(|node| node.incarnation == incarnation)
            .ok_or(UnknownNode(id))?;
        truncate(&mut report.reason);
        if let Some((_, failure)) = &mut report.failed {
            truncate(failure);
        }
        node.speed = coarse(report.measured.rows_per_second, node.speed);
        let since = now.saturating_sub(node.last_seen).as_secs_f64();
        let run = |report: &Report| report.serving.tokens_run;
        if since > 0.0 {
            node.tokens_per_second = run(&report).saturating_sub(run(&node.report)) as f64 / since;
        }
        let failed = report.failed.clone();
        let returns = node.role == Role::Expert && node.report.draining && !report.draining;
        // A process never loses what it has reported: what says less is late, or about the next.
        if report.ready {
            node.resident = node.resident.max(report.epoch);
        }
        let reported = report.epoch;
        node.report = report;
        self.note_seen(now, id);
        self.rise_above(now, reported);
        if returns && self.has_holes() {
            self.plan_at.get_or_insert(now);
        }
        if let Some((epoch, failure)) = failed {
            self.cannot_load(now, id, epoch, &failure);
        }
        self.step(now);
        Ok(())
    }

    /// A node goes.
    ///
    /// # Errors
    /// It is not a member, or another process is by that id.
    pub fn leave(
        &mut self,
        now: Duration,
        id: NodeId,
        incarnation: u64,
    ) -> Result<(), UnknownNode> {
        if self
            .nodes
            .get(&id)
            .is_none_or(|node| node.incarnation != incarnation)
        {
            return Err(UnknownNode(id));
        }
        self.remove(now, id, Loss::Left);
        self.step(now);
        Ok(())
    }

    /// A node asks what it is to hold: it is alive.
    ///
    /// # Errors
    /// It is not a member.
    pub fn watches(&mut self, now: Duration, id: NodeId) -> Result<(), UnknownNode> {
        // Expiry first: a lease that has run out is not renewed.
        self.step(now);
        if !self.nodes.contains_key(&id) {
            return Err(UnknownNode(id));
        }
        self.note_seen(now, id);
        Ok(())
    }

    /// The connection of a node that watched has broken without a farewell, as it does when a
    /// process dies. A living one is heard of again within an interval of its heartbeats: this one
    /// is given little more than that instead of a whole lease.
    pub fn hung_up(&mut self, now: Duration, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.gone_at = Some(now + self.settings.lease * 2 / 5);
        }
        self.step(now);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) {
        self.step(now);
    }

    /// A request is being served: nothing live moves from now on. Means nothing
    /// while no placement is active, because then nothing can be served.
    pub fn mark_served(&mut self) {
        self.served |= self.active_epoch().is_some();
    }

    /// What has followed from the events since the last call.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// The placement that requests are served by.
    pub fn active(&self) -> Option<&Published> {
        self.active.as_ref()
    }

    /// The newest epoch that was active, and what is missing in words, while nothing can be served
    /// and nobody has room for the experts that were lost.
    pub fn lost(&self) -> Option<(u64, String)> {
        let hopeless = self.shortfall.is_some() || self.usable_experts().next().is_none();
        if self.active.is_some() || self.last_active == 0 || !hopeless {
            return None;
        }
        Some((self.last_active, self.waiting_for()?))
    }

    /// The placement that is being loaded, or that has lost its last home of an
    /// expert; newer than the active one.
    pub fn next(&self) -> Option<&Published> {
        self.next.as_ref()
    }

    /// The newest placement.
    pub fn published(&self) -> Option<&Published> {
        self.next.as_ref().or(self.active.as_ref())
    }

    /// Homes on distinct nodes: what was asked for, and what every expert of the
    /// active placement has. Less where nodes or their memory do not allow more.
    pub fn redundancy(&self) -> (u32, u32) {
        let wanted = self.settings.replicas.max(1);
        let has = self.active.as_ref().map_or(0, |active| {
            let (layers, experts) = (&self.settings.layers, self.settings.experts);
            active.placement.redundancy(layers, experts)
        });
        (wanted, has)
    }

    /// What does not change.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All members by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// One member.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// Attention nodes that can be given a request now: ready at the epoch that
    /// is active, or at one before it from which there has been no break; they
    /// go on by the newer one when they hear of it. Empty when none is active.
    pub fn serving(&self) -> impl Iterator<Item = &Node> {
        let epochs = self.active_epoch().map(|newest| self.active_since..=newest);
        self.nodes.values().filter(move |node| {
            node.role == Role::Attention
                && node.report.ready
                && !node.report.draining
                && epochs
                    .as_ref()
                    .is_some_and(|epochs| epochs.contains(&node.report.epoch))
        })
    }

    /// What is served otherwise than it was meant to be, in words.
    pub fn degraded(&self) -> Option<&'static str> {
        let mut duties = self.serving().map(|node| node.duty).peekable();
        duties.peek()?;
        (!duties.any(Duty::decodes))
            .then_some("no attention node that decodes is there: those for prefill do it")
    }

    /// The epoch by which requests can be served, if there is one.
    pub fn active_epoch(&self) -> Option<u64> {
        self.active.as_ref().map(|active| active.placement.epoch())
    }

    /// A node may have seen, from an earlier coordinator, an epoch that this one
    /// is using for something else: then this one goes above it.
    fn respect_epoch(&mut self, now: Duration, new: &Registration) {
        self.rise_above(now, new.newest_epoch);
        if self.remembered.contains(&new.incarnation) {
            return;
        }
        if self.remembered.len() >= MAX_REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back(new.incarnation);
        let ours = self.published().map(|p| p.placement.epoch());
        if ours.is_some_and(|ours| new.newest_epoch >= ours) {
            self.plan_at.get_or_insert(now);
            self.renew = true;
        }
        self.newest_epoch = self.newest_epoch.max(new.newest_epoch);
    }

    /// Somebody has seen an epoch that was never made here: another leader made it, and what was
    /// written of it is lost. That number must not come to mean something else.
    fn rise_above(&mut self, now: Duration, epoch: u64) {
        if epoch > self.newest_epoch && epoch <= MAX_EPOCH {
            self.newest_epoch = epoch;
            self.renew = true;
            self.plan_at.get_or_insert(now);
        }
    }

    /// An expert node has joined: is a new placement wanted, and when?
    fn expect_more(&mut self, now: Duration) {
        let at = now + self.settings.settle;
        if !self.served {
            self.plan_at = Some(at);
        } else if self.has_holes() {
            self.plan_at.get_or_insert(at);
        }
    }

    fn note_seen(&mut self, now: Duration, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.last_seen = node.last_seen.max(now);
            node.gone_at = None;
        }
    }

    fn remove(&mut self, now: Duration, id: NodeId, how: Loss) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        self.actions.push(Action::Lost {
            node: id,
            name: node.name.clone(),
            how,
        });
        if !matches!(how, Loss::Silent | Loss::Gone) {
            self.drained.remove(&node.incarnation);
        }
        self.lost_to_migration(id, &node.name);
        let held = [&self.active, &self.next]
            .into_iter()
            .flatten()
            .any(|p| p.placement.nodes().iter().any(|slots| slots.node == id));
        // A shortfall is counted anew, so that it stays true.
        if held || (node.role == Role::Expert && self.shortfall.is_some()) {
            self.plan_at.get_or_insert(now);
        }
    }

    /// Everything that follows from the present state and time.
    fn step(&mut self, now: Duration) {
        self.clock = self.clock.max(now);
        let lost = |node: &Node| match node.gone_at {
            _ if now.saturating_sub(node.last_seen) > self.settings.lease => Some(Loss::Silent),
            Some(at) if now >= at => Some(Loss::Gone),
            _ => None,
        };
        let nodes = self.nodes.values();
        let lost: Vec<(NodeId, Loss)> = nodes
            .filter_map(|node| Some((node.id, lost(node)?)))
            .collect();
        for (id, how) in lost {
            self.remove(now, id, how);
        }
        self.judge(now);
        self.watch_restoring();
        if self.retry_at.take_if(|at| now >= *at).is_some() {
            self.retry_at = self.next_retry(now);
            if self.shortfall.is_some() || self.has_holes() {
                self.plan_at.get_or_insert(now);
            }
        }
        if self.plan_at.is_some_and(|at| now >= at) {
            self.plan_at = None;
            self.plan();
            self.forget_overtaken();
            self.judge(now);
        }
        self.free();
        self.advance(now);
    }

    fn of_role(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |node| node.role == role)
    }

    fn usable_experts(&self) -> impl Iterator<Item = &Node> {
        self.of_role(Role::Expert)
            .filter(|node| !node.report.draining && !self.is_drained(node))
    }

    fn needs_no_expert_node(&self) -> bool {
        self.settings.layers.is_empty() || self.settings.experts == 0
    }

    fn wanted_experts(&self) -> usize {
        if self.needs_no_expert_node() {
            0
        } else if self.served {
            1
        } else {
            self.settings.min_expert_nodes.max(1)
        }
    }
}

fn truncate(text: &mut String) {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT)
            .rev()
            .find(|&i| text.is_char_boundary(i))
            .unwrap_or(0);
        text.truncate(end);
    }
}
