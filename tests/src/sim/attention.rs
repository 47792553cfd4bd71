//! An attention node: takes sequences, runs steps, layer by layer, by the newest ACTIVE placement.
//! A step commits only with every row of every layer; else its sequences fail with EXPERT_LOST.

use std::collections::BTreeMap;
use std::sync::Arc;

use guild_scheduler::membership::Role;

use super::Defect;
use super::arithmetic::{combine, embed, head};
use super::event::{MS, Time, Who};
use super::exchange::{Exchange, Peers};
use super::message::{Message, Open, Push, Timer, Wire};
use super::session::Session;
use super::world::{World, note};

/// Sequences that one step runs.
const BATCH: usize = 3;
/// Shortest and longest time between two steps.
const STEP: (Time, Time) = (20 * MS, 250 * MS);

/// One attention node process.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) session: Session,
    /// The newest active placement it has heard of.
    pub(super) view: Option<Arc<Wire>>,
    /// By their connection.
    running: BTreeMap<u64, Sequence>,
    pub(super) step: Option<Step>,
    pub(super) stamp: u64,
    pub(super) peers: Peers,
    stepping: bool,
}

#[derive(Debug)]
struct Sequence {
    tokens: Vec<u32>,
    left: usize,
}

/// One step under way.
#[derive(Debug)]
pub(super) struct Step {
    sequences: Vec<u64>,
    rows: Vec<u64>,
    layer: u32,
    pub(super) exchange: Exchange,
}

impl Attention {
    pub(super) fn new(at: usize, incarnation: u64) -> Attention {
        Attention {
            session: Session::new(
                Role::Attention,
                format!("attention-{at}"),
                String::new(),
                0,
                incarnation,
            ),
            view: None,
            running: BTreeMap::new(),
            step: None,
            stamp: 0,
            peers: Peers::default(),
            stepping: false,
        }
    }
}

impl World {
    pub(super) fn start_attention(&mut self, at: usize) {
        self.begin(Who::Attention(at));
        let incarnation = self.id();
        self.attentions[at] = Attention::new(at, incarnation);
        self.join(Who::Attention(at));
    }

    pub(super) fn attention_message(&mut self, at: usize, message: Message) {
        let who = Who::Attention(at);
        match message {
            Message::Answer { rpc, body } if !self.session_answer(who, rpc, &body) => {
                self.exchange_answer(at, rpc, body);
            }
            Message::Push { conn, body } if self.session_push(who, conn, &body) => {
                self.adopt_view(at);
            }
            Message::Open {
                conn,
                body: Open::Generate { tokens, more },
            } => {
                let node = &mut self.attentions[at];
                if node.view.is_none() || node.session.leaving || node.session.said.draining {
                    self.push(conn, Push::NotNow);
                    return self.close(conn, who);
                }
                node.running.insert(conn, Sequence { tokens, left: more });
                self.push(conn, Push::Accepted);
                self.say_running(at);
                self.step_soon(at);
            }
            Message::Broken { conn } => {
                self.session_broken(who, conn);
                if self.attentions[at].running.remove(&conn).is_some() {
                    self.say_running(at);
                }
            }
            _ => {}
        }
    }

    fn say_running(&mut self, at: usize) {
        let node = &mut self.attentions[at];
        // With the next heartbeat.
        node.session.said.serving.running = node.running.len() as u32;
    }

    /// The newest active placement becomes what is routed by.
    fn adopt_view(&mut self, at: usize) {
        let who = Who::Attention(at);
        let session = &self.attentions[at].session;
        let told = match self.has(Defect::RoutesByWhatIsLoading) {
            true => session.placement.clone(),
            false => session.active.clone(),
        };
        let Some(active) = told else { return };
        if !(active.placement).covers(&self.model.layers(), self.model.experts) {
            return;
        }
        let before = self.attentions[at].view.replace(Arc::clone(&active));
        let epoch = active.epoch();
        if before.as_ref().is_some_and(|before| before.epoch() > epoch) {
            self.report
                .wrong(format!("{who:?} goes back to epoch {epoch}"));
        }
        self.routes_by(who, epoch);
        if before.is_none_or(|before| before.epoch() != epoch) {
            note!(self, "{who:?} routes by epoch {epoch}");
            self.exchange_news(at);
        }
        self.say(who, |said| {
            (said.epoch, said.ready) = (epoch, true);
        });
        self.step_soon(at);
    }

    fn step_soon(&mut self, at: usize) {
        let node = &self.attentions[at];
        if node.stepping || node.running.is_empty() {
            return;
        }
        let pause = self.rng.between(STEP.0, STEP.1);
        let node = &mut self.attentions[at];
        node.stepping = true;
        node.stamp += 1;
        let stamp = node.stamp;
        self.timer(Who::Attention(at), pause, Timer::Step { stamp });
    }

    pub(super) fn attention_timer(&mut self, at: usize, timer: Timer) {
        let who = Who::Attention(at);
        if self.session_timer(who, &timer) {
            return;
        }
        match timer {
            Timer::Step { stamp } if stamp == self.attentions[at].stamp => self.begin_step(at),
            Timer::Exchange { stamp } if stamp == self.attentions[at].stamp => {
                self.exchange_timer(at)
            }
            Timer::Goodbye { away } => self.goodbye(who, away),
            _ => {}
        }
    }

    fn begin_step(&mut self, at: usize) {
        let node = &mut self.attentions[at];
        let sequences: Vec<u64> = node.running.keys().copied().take(BATCH).collect();
        if sequences.is_empty() {
            node.stepping = false;
            return;
        }
        let rows: Vec<u64> = sequences
            .iter()
            .map(|s| embed(&node.running[s].tokens))
            .collect();
        self.begin_layer(at, sequences, rows, 1);
    }

    fn begin_layer(&mut self, at: usize, sequences: Vec<u64>, rows: Vec<u64>, layer: u32) {
        let exchange = Exchange::new(&self.model, layer, &rows, self.now);
        self.attentions[at].step = Some(Step {
            sequences,
            rows,
            layer,
            exchange,
        });
        self.exchange_begin(at);
    }

    /// All rows of a layer are here, or all that will come when `partial`.
    pub(super) fn layer_done(&mut self, at: usize) {
        let skips = self.has(Defect::SkipsAMissingRow);
        let Some(step) = self.attentions[at].step.take() else {
            return;
        };
        let Step {
            sequences,
            rows,
            layer,
            exchange,
        } = step;
        let mut next = Vec::with_capacity(rows.len());
        for (row, here) in rows.iter().zip(exchange.rows(rows.len())) {
            if !skips && here.iter().any(Option::is_none) {
                return self
                    .report
                    .wrong("a layer is summed without all of its rows".to_owned());
            }
            next.push(combine(*row, here.iter().flatten().copied()));
        }
        if layer < self.model.layers {
            return self.begin_layer(at, sequences, next, layer + 1);
        }
        for (conn, row) in sequences.into_iter().zip(next) {
            let Some(sequence) = self.attentions[at].running.get_mut(&conn) else {
                continue;
            };
            let token = head(row);
            sequence.tokens.push(token);
            sequence.left = sequence.left.saturating_sub(1);
            let done = sequence.left == 0;
            self.push(conn, Push::Token(token));
            if done {
                self.attentions[at].running.remove(&conn);
                self.push(conn, Push::Complete);
                self.close(conn, Who::Attention(at));
            }
        }
        self.step_over(at);
    }

    /// The exchange has come to its deadline without all rows.
    pub(super) fn layer_failed(&mut self, at: usize) {
        if self.has(Defect::SkipsAMissingRow) {
            return self.layer_done(at);
        }
        let Some(step) = self.attentions[at].step.take() else {
            return;
        };
        note!(
            self,
            "Attention({at}) layer {}: experts are lost",
            step.layer
        );
        for conn in step.sequences {
            if self.attentions[at].running.remove(&conn).is_some() {
                self.push(conn, Push::ExpertLost);
                self.close(conn, Who::Attention(at));
            }
        }
        self.step_over(at);
    }

    fn step_over(&mut self, at: usize) {
        self.attentions[at].stepping = false;
        self.say_running(at);
        self.step_soon(at);
    }
}
