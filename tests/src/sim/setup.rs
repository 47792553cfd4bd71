//! The cluster of a run: its size, its model, its faults and clients, all from the seed.

use std::time::Duration;

use guild_scheduler::membership::Settings;

use super::arithmetic::Model;
use super::attention::Attention;
use super::coordinator::Coordinator;
use super::event::{MS, SEC, Time, Who};
use super::expert::{Expert, SLOT_BYTES};
use super::message::Event;
use super::relay::Client;
use super::rng::Rng;
use super::world::World;
use super::{Options, faults};

/// When the last fault is over.
pub(super) const HEAL: Time = 30 * SEC;
/// By then all must be well: leases, back-offs and patience of every kind are long over.
pub(super) const END: Time = HEAL + 75 * SEC;
/// The first fault: the cluster has mostly come up.
const CALM: Time = 3 * SEC;

/// What does not change during a run.
#[derive(Clone, Debug)]
pub(super) struct Set {
    pub(super) model: Model,
    pub(super) lease: Time,
    /// How long a leader may be silent towards the store.
    pub(super) ttl: Time,
    pub(super) replicas: u32,
    pub(super) copy_deadline: Time,
    /// Slots (0: any number) and failure domain of every expert node.
    pub(super) experts: Vec<(u64, String)>,
    pub(super) min_expert_nodes: usize,
}

impl Set {
    pub(super) fn settings(&self) -> Settings {
        Settings {
            model_digest: "digest".to_owned(),
            layers: self.model.layers(),
            experts: self.model.experts,
            slot_bytes: SLOT_BYTES,
            lease: Duration::from_micros(self.lease),
            settle: Duration::from_millis(500),
            min_expert_nodes: self.min_expert_nodes,
            replicas: self.replicas,
            redundant_experts: 1,
            copy_deadline: Duration::from_micros(self.copy_deadline),
        }
    }
}

fn draw(rng: &mut Rng) -> Set {
    let model = Model {
        layers: rng.between(1, 2) as u32,
        experts: rng.between(4, 7) as u32,
        top_k: 2,
    };
    let nodes = rng.between(2, 4);
    let replicas = rng.pick(&[1, 2, 2, 2]);
    let slots = u64::from(model.layers * model.experts);
    // Room for everything on all nodes but one, and some more to move in.
    let even = (slots * u64::from(replicas)).div_ceil((nodes - 1).max(u64::from(replicas)));
    let room = |rng: &mut Rng| match rng.chance(300) {
        true => 0,
        false => (even + rng.between(1, 4)).min(slots + 2),
    };
    let domains = rng.between(2, 4);
    let experts = (0..nodes).map(|at| (room(rng), format!("rack-{}", at % domains)));
    let experts: Vec<_> = experts.collect();
    Set {
        model,
        lease: 3 * SEC,
        ttl: 3 * SEC,
        replicas,
        copy_deadline: rng.between(300 * MS, 4 * SEC),
        min_expert_nodes: experts.len() - usize::from(rng.chance(300)),
        experts,
    }
}

impl World {
    /// The world of a seed, before its first event.
    pub(super) fn of(seed: u64, options: &Options) -> World {
        let mut rng = Rng::new(seed);
        let set = draw(&mut rng);
        let mut world = World::new(rng, set, options);
        let coordinators = world.rng.between(1, 3) as usize;
        let attentions = world.rng.between(1, 2) as usize;
        world.begin(Who::Store);
        for at in 0..coordinators {
            world
                .coordinators
                .push(Coordinator::new(world.set.settings(), 0));
            world.processes.entry(Who::Coordinator(at)).or_default();
        }
        for at in 0..world.set.experts.len() {
            let (capacity, domain) = world.set.experts[at].clone();
            world.experts.push(Expert::new(at, capacity, domain, 0));
            world.processes.entry(Who::Expert(at)).or_default();
        }
        for at in 0..attentions {
            world.attentions.push(Attention::new(at, 0));
            world.processes.entry(Who::Attention(at)).or_default();
        }
        // Any role may start first; some come much later.
        let all: Vec<Who> = world
            .processes
            .keys()
            .copied()
            .filter(|&who| who != Who::Store)
            .collect();
        for who in all {
            let late = world.rng.chance(100);
            let at = world.rng.below(if late { 15 * SEC } else { SEC });
            world
                .agenda
                .add(at, Event::Fault(faults::Fault::Start(who)));
        }
        for at in 0..world.rng.between(4, 10) as usize {
            let length = world.rng.between(1, 4) as usize;
            let prompt = (0..length).map(|_| world.rng.below(1000) as u32).collect();
            let tokens = world.rng.between(1, 24) as usize;
            world.clients.push(Client::new(prompt, tokens));
            let begins = world.rng.between(SEC, HEAL + 2 * SEC);
            world.agenda.add(begins, Event::Client(at));
        }
        for _ in 0..world.rng.between(1, 9) {
            let at = world.rng.between(CALM, HEAL - 2 * SEC);
            let fault = faults::draw(&mut world);
            world.agenda.add(at, Event::Fault(fault));
        }
        world.agenda.add(HEAL, Event::Heal);
        world
    }
}
