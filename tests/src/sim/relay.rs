//! Clients, and their streams through the front door: a model of `coordinator::backend`. A stream
//! is its prompt and the tokens so far; when its attention node is lost, another one is asked for
//! the rest. What reaches a client is checked token by token.

use guild_scheduler::placement::NodeId;

use super::Defect;
use super::event::{MS, SEC, Time, Who};
use super::message::{Open, Push, Timer};
use super::world::{World, note};

/// As in `coordinator::backend`.
const MAX_OFFERS: usize = 3;
const MAX_RESUMES: usize = 16;
const MAX_FRUITLESS_RESUMES: usize = 3;
const ACCEPT_LIMIT: Time = 3 * SEC;
const RETRY_PAUSE: Time = 100 * MS;
const SUSPICION: Time = 2 * SEC;
/// How long a stream that has lost its node waits for another.
const PATIENCE: Time = 20 * SEC;
/// What a client waits before it asks again.
const CLIENT_PAUSE: (Time, Time) = (300 * MS, 1500 * MS);

/// Somebody who wants one answer and asks until it has come.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) prompt: Vec<u32>,
    pub(super) tokens: usize,
    /// Of the present attempt.
    got: Vec<u32>,
    attempt: u64,
    pub(super) done: bool,
}

impl Client {
    pub(super) fn new(prompt: Vec<u32>, tokens: usize) -> Client {
        Client {
            prompt,
            tokens,
            got: Vec::new(),
            attempt: 0,
            done: false,
        }
    }
}

/// One stream, and the node it comes from at present.
#[derive(Debug)]
pub(super) struct Relay {
    client: usize,
    attempt: u64,
    /// The prompt, then what has been passed on.
    tokens: Vec<u32>,
    left: usize,
    home: Option<Home>,
    tried: Vec<NodeId>,
    deadline: Time,
    /// It has had a node.
    taken: bool,
    resumes: usize,
    fruitless: usize,
    stamp: u64,
}

#[derive(Clone, Copy, Debug)]
struct Home {
    node: NodeId,
    conn: u64,
    accepted: bool,
}

/// Why a node does not give what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Unreached,
    Lost,
    Refused,
}

impl World {
    /// The client begins, or begins again, at some coordinator.
    pub(super) fn ask(&mut self, at: usize) {
        if self.clients[at].done {
            return;
        }
        let up: Vec<usize> = (0..self.coordinators.len())
            .filter(|&c| self.process(Who::Coordinator(c)).up)
            .collect();
        if up.is_empty() {
            return self.ask_later(at);
        }
        let coordinator = self.rng.pick(&up);
        let client = &mut self.clients[at];
        client.attempt += 1;
        client.got.clear();
        let relay = Relay {
            client: at,
            attempt: client.attempt,
            tokens: client.prompt.clone(),
            left: client.tokens,
            home: None,
            tried: Vec::new(),
            deadline: self.now + PATIENCE,
            taken: false,
            resumes: 0,
            fruitless: 0,
            stamp: 0,
        };
        let stream = self.id();
        self.coordinators[coordinator].relays.insert(stream, relay);
        // A frozen front door takes a call and says nothing.
        self.timer(
            Who::Coordinator(coordinator),
            0,
            Timer::Relay { stream, stamp: 0 },
        );
    }

    fn ask_later(&mut self, client: usize) {
        let pause = self.rng.between(CLIENT_PAUSE.0, CLIENT_PAUSE.1);
        self.agenda
            .add(self.now + pause, super::message::Event::Client(client));
    }

    /// A front door is gone, and the streams through it.
    pub(super) fn front_door_lost(&mut self, at: usize) {
        for relay in std::mem::take(&mut self.coordinators[at].relays).into_values() {
            self.report.count("stream lost with its front door");
            self.ask_later(relay.client);
        }
    }

    fn relay(&mut self, at: usize, stream: u64) -> Option<&mut Relay> {
        self.coordinators[at].relays.get_mut(&stream)
    }

    fn relay_of(&self, at: usize, conn: u64) -> Option<u64> {
        let mut relays = self.coordinators[at].relays.iter();
        let found = relays.find(|(_, r)| r.home.is_some_and(|home| home.conn == conn));
        found.map(|(&stream, _)| stream)
    }

    /// Looks for a node, or finds that an offer was not answered.
    pub(super) fn relay_timer(&mut self, at: usize, stream: u64, stamp: u64) {
        let Some(relay) = self.relay(at, stream) else {
            return;
        };
        if relay.stamp != stamp {
            return;
        }
        match relay.home {
            Some(home) if !home.accepted => self.fault(at, stream, Fault::Unreached),
            Some(_) => {}
            None => {
                relay.tried.clear();
                self.find_home(at, stream);
            }
        }
    }

    fn relay_again(&mut self, at: usize, stream: u64, after: Time) {
        let Some(relay) = self.relay(at, stream) else {
            return;
        };
        relay.stamp += 1;
        let stamp = relay.stamp;
        self.timer(Who::Coordinator(at), after, Timer::Relay { stream, stamp });
    }

    fn find_home(&mut self, at: usize, stream: u64) {
        let (now, c) = (self.now, &self.coordinators[at]);
        let Some(relay) = c.relays.get(&stream) else {
            return;
        };
        let offers_left = relay.taken || relay.tried.len() < MAX_OFFERS;
        let outstanding = |node| {
            let out = c
                .relays
                .values()
                .filter(|r| r.home.is_some_and(|h| h.node == node));
            out.map(|r| r.left).sum::<usize>()
        };
        let rank = |node: NodeId| {
            let suspected = c.suspects.get(&node).is_some_and(|&until| now < until);
            (suspected, outstanding(node), node)
        };
        let open = c.m.serving().filter(|node| !relay.tried.contains(&node.id));
        let best = open
            .min_by_key(|node| rank(node.id))
            .map(|n| (n.id, n.name.clone()));
        let Some((node, name)) = best.filter(|_| offers_left) else {
            if !relay.taken || now >= relay.deadline {
                return self.give_up(at, stream, "no node takes it");
            }
            return self.relay_again(at, stream, RETRY_PAUSE);
        };
        let (tokens, more) = match self.has(Defect::ResumeRepeatsAToken) && relay.resumes > 0 {
            true => (
                relay.tokens[..relay.tokens.len() - 1].to_vec(),
                relay.left + 1,
            ),
            false => (relay.tokens.clone(), relay.left),
        };
        self.with(at, |m, _| m.mark_served());
        let Some(index) = index_of(&name) else { return };
        let body = Open::Generate { tokens, more };
        let conn = self.open(Who::Coordinator(at), Who::Attention(index), body);
        if let Some(relay) = self.relay(at, stream) {
            relay.tried.push(node);
            relay.home = Some(Home {
                node,
                conn,
                accepted: false,
            });
        }
        self.relay_again(at, stream, ACCEPT_LIMIT);
    }

    pub(super) fn relay_push(&mut self, at: usize, conn: u64, push: Push) {
        let Some(stream) = self.relay_of(at, conn) else {
            return self.close(conn, Who::Coordinator(at));
        };
        match push {
            Push::Accepted => {
                let Some(relay) = self.relay(at, stream) else {
                    return;
                };
                if let Some(home) = &mut relay.home {
                    home.accepted = true;
                }
                (relay.taken, relay.stamp) = (true, relay.stamp + 1);
                if relay.resumes > 0 {
                    self.report.count("stream goes on at another node");
                }
            }
            Push::NotNow => self.fault(at, stream, Fault::Refused),
            Push::Token(token) => self.pass_on(at, stream, token),
            Push::Complete => {
                let Some(relay) = self.coordinators[at].relays.remove(&stream) else {
                    return;
                };
                self.complete(&relay);
            }
            Push::ExpertLost => {
                self.report.count("stream ends with EXPERT_LOST");
                self.give_up(at, stream, "an expert is lost");
            }
            _ => {}
        }
    }

    /// A token on its way to the client: the next one, and the right one, or the run fails.
    fn pass_on(&mut self, at: usize, stream: u64, token: u32) {
        let Some(relay) = self.relay(at, stream) else {
            return;
        };
        relay.tokens.push(token);
        relay.fruitless = 0;
        let over = relay.left == 0;
        relay.left = relay.left.saturating_sub(1);
        let (client, attempt) = (relay.client, relay.attempt);
        if over {
            return self
                .report
                .wrong(format!("client {client} is given more than it asked for"));
        }
        self.hand_over(client, attempt, token);
    }

    fn hand_over(&mut self, at: usize, attempt: u64, token: u32) {
        let client = &mut self.clients[at];
        if client.attempt != attempt || client.done {
            return;
        }
        let mut known = client.prompt.clone();
        known.extend_from_slice(&client.got);
        client.got.push(token);
        let (place, right) = (client.got.len(), self.model.reference(&known));
        self.report.tokens += 1;
        if token != right {
            note!(
                self,
                "client {at} token {place}: {token} instead of {right}"
            );
            self.report.wrong(format!(
                "client {at} is given a wrong token in place {place}: lost, repeated, or of a wrong sum"
            ));
        }
    }

    fn complete(&mut self, relay: &Relay) {
        let client = &mut self.clients[relay.client];
        if client.attempt != relay.attempt {
            return;
        }
        client.done = true;
        if client.got.len() != client.tokens {
            let (has, wanted) = (client.got.len(), client.tokens);
            self.report.wrong(format!(
                "client {} has {has} of {wanted} tokens at the end",
                relay.client
            ));
        }
    }

    pub(super) fn relay_broken(&mut self, at: usize, conn: u64) {
        if let Some(stream) = self.relay_of(at, conn) {
            let accepted = self
                .relay(at, stream)
                .is_some_and(|r| r.home.is_some_and(|h| h.accepted));
            self.fault(
                at,
                stream,
                if accepted {
                    Fault::Lost
                } else {
                    Fault::Unreached
                },
            );
        }
    }

    /// The lease of an attention node has run out: the only way to notice a silent one.
    pub(super) fn node_lost(&mut self, at: usize, node: NodeId) {
        let relays = self.coordinators[at].relays.iter();
        let there = relays.filter(|(_, r)| r.home.is_some_and(|home| home.node == node));
        let streams: Vec<u64> = there.map(|(&stream, _)| stream).collect();
        for stream in streams {
            self.report.count("stream leaves a silent node");
            self.fault(at, stream, Fault::Lost);
        }
    }

    fn fault(&mut self, at: usize, stream: u64, fault: Fault) {
        let (now, patience) = (self.now, PATIENCE);
        let Some(relay) = self.relay(at, stream) else {
            return;
        };
        let Some(home) = relay.home.take() else {
            return;
        };
        relay.stamp += 1;
        if fault == Fault::Lost || home.accepted {
            (relay.resumes, relay.fruitless) = (relay.resumes + 1, relay.fruitless + 1);
            (relay.taken, relay.deadline) = (true, now + patience);
            relay.tried.clear();
            let given_up = relay.resumes > MAX_RESUMES || relay.fruitless > MAX_FRUITLESS_RESUMES;
            // Another one must not be asked for what is all out already.
            let all_out = relay.left == 0;
            self.report.count("stream loses its node");
            self.close(home.conn, Who::Coordinator(at));
            self.coordinators[at]
                .suspects
                .insert(home.node, now + SUSPICION);
            if all_out {
                let Some(relay) = self.coordinators[at].relays.remove(&stream) else {
                    return;
                };
                return self.complete(&relay);
            }
            if given_up {
                return self.give_up(at, stream, "it has had too many nodes");
            }
        } else {
            self.close(home.conn, Who::Coordinator(at));
            if fault == Fault::Unreached {
                self.coordinators[at]
                    .suspects
                    .insert(home.node, now + SUSPICION);
                if let Some(relay) = self.relay(at, stream) {
                    relay.taken = true;
                }
            }
        }
        self.find_home(at, stream);
    }

    fn give_up(&mut self, at: usize, stream: u64, why: &str) {
        let Some(relay) = self.coordinators[at].relays.remove(&stream) else {
            return;
        };
        if let Some(home) = relay.home {
            self.close(home.conn, Who::Coordinator(at));
        }
        note!(self, "the request of client {} fails: {why}", relay.client);
        self.report.count("request failed, with a reason");
        if self.clients[relay.client].attempt == relay.attempt {
            self.ask_later(relay.client);
        }
    }
}

/// The place of a process in its list, by its name.
pub(super) fn index_of(name: &str) -> Option<usize> {
    name.rsplit('-').next()?.parse().ok()
}
