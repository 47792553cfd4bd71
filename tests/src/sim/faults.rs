//! What befalls the world, and how it heals.

use super::event::{MS, SEC, Time, Who};
use super::message::{Event, Timer};
use super::setup::{END, HEAL};
use super::world::{World, note};

/// How often it is looked at whether all is well again.
const LOOK: Time = SEC;

/// One fault, or its end.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// A process starts, if it does not run.
    Start(Who),
    /// It dies and comes back after that time; silently: with its machine.
    Crash {
        who: Who,
        silent: bool,
        away: Time,
    },
    /// The same for whoever leads then.
    LeaderCrash {
        away: Time,
    },
    Freeze {
        who: Who,
        time: Time,
    },
    LeaderFreeze {
        time: Time,
    },
    Thaw(Who),
    /// Says goodbye, ends, and comes back.
    Leave {
        who: Who,
        away: Time,
    },
    /// These lines are cut, each in one direction.
    Cut {
        lines: Vec<(Who, Who)>,
        time: Time,
    },
    Mend {
        lines: Vec<(Who, Who)>,
    },
    Lossy {
        per_mille: u64,
        time: Time,
    },
    StoreAway {
        time: Time,
    },
    StoreSlow {
        delay: Time,
        time: Time,
    },
    StoreWiped,
    StoreWell,
    /// Rows at an expert node take so many times as long.
    Slow {
        at: usize,
        times: u64,
        time: Time,
    },
    DiskFails {
        at: usize,
        time: Time,
    },
    CopiesSpoilt {
        per_mille: u64,
        time: Time,
    },
    TroubleOver,
    /// Looks whether all is well.
    Look,
}

/// Some fault.
pub(super) fn draw(world: &mut World) -> Fault {
    let coordinators: Vec<Who> = (0..world.coordinators.len())
        .map(Who::Coordinator)
        .collect();
    let experts: Vec<Who> = (0..world.experts.len()).map(Who::Expert).collect();
    let attentions: Vec<Who> = (0..world.attentions.len()).map(Who::Attention).collect();
    let nodes: Vec<Who> = experts.iter().chain(&attentions).copied().collect();
    let all: Vec<Who> = nodes.iter().chain(&coordinators).copied().collect();
    let rng = &mut world.rng;
    let time = rng.between(200 * MS, 8 * SEC);
    let away = rng.between(50 * MS, 6 * SEC);
    let node = rng.pick(&nodes);
    let expert = rng.pick(&experts);
    let Who::Expert(at) = expert else {
        return Fault::TroubleOver;
    };
    match rng.below(20) {
        0..=2 => Fault::Crash {
            who: expert,
            silent: rng.chance(500),
            away,
        },
        3 => Fault::Crash {
            who: rng.pick(&all),
            silent: rng.chance(500),
            away,
        },
        4 => Fault::Crash {
            who: rng.pick(&attentions),
            silent: rng.chance(500),
            away,
        },
        5 => Fault::LeaderCrash { away },
        6 => Fault::LeaderFreeze { time },
        7 => Fault::Freeze { who: node, time },
        8 => Fault::Freeze { who: expert, time },
        9 => Fault::Leave { who: node, away },
        10 => {
            // Heartbeats are lost, all else gets through.
            let lines = coordinators.iter().map(|&c| (node, c)).collect();
            Fault::Cut { lines, time }
        }
        11 => {
            let (a, b) = (rng.pick(&all), rng.pick(&all));
            let lines = if rng.chance(500) {
                vec![(a, b)]
            } else {
                vec![(a, b), (b, a)]
            };
            Fault::Cut { lines, time }
        }
        12 => {
            // One process is alone.
            let one = rng.pick(&all);
            let others = all.iter().copied().chain([Who::Store]);
            let lines = others
                .flat_map(|other| [(one, other), (other, one)])
                .collect();
            Fault::Cut { lines, time }
        }
        13 => {
            let (a, b) = (rng.pick(&attentions), expert);
            Fault::Cut {
                lines: vec![(a, b), (b, a)],
                time,
            }
        }
        14 => match rng.below(4) {
            0 => Fault::StoreWiped,
            1 => Fault::StoreSlow {
                delay: rng.between(50 * MS, 2500 * MS),
                time,
            },
            _ => Fault::StoreAway { time },
        },
        15 => {
            let who = rng.pick(&coordinators);
            let lines = match rng.below(3) {
                0 => vec![(who, Who::Store)],
                1 => vec![(Who::Store, who)],
                _ => vec![(who, Who::Store), (Who::Store, who)],
            };
            Fault::Cut { lines, time }
        }
        16 => Fault::Slow {
            at,
            times: rng.pick(&[20, 200, 1000]),
            time,
        },
        17 => Fault::DiskFails { at, time },
        18 => Fault::CopiesSpoilt {
            per_mille: rng.between(100, 900),
            time,
        },
        _ => Fault::Lossy {
            per_mille: rng.between(20, 300),
            time,
        },
    }
}

impl World {
    fn leader(&self) -> Option<Who> {
        let leads =
            |&at: &usize| self.coordinators[at].leads() && self.is_well(Who::Coordinator(at));
        (0..self.coordinators.len())
            .find(leads)
            .map(Who::Coordinator)
    }

    fn later(&mut self, after: Time, fault: Fault) {
        self.agenda.add(self.now + after, Event::Fault(fault));
    }

    fn start(&mut self, who: Who) {
        if self.process(who).up {
            return;
        }
        match who {
            Who::Coordinator(at) => self.start_coordinator(at),
            Who::Expert(at) => self.start_expert(at),
            Who::Attention(at) => self.start_attention(at),
            Who::Store => {}
        }
    }

    fn crash(&mut self, who: Who, silent: bool, away: Time) {
        if !self.process(who).up {
            return;
        }
        self.report.count(if silent {
            "machine lost"
        } else {
            "process crashed"
        });
        self.kill(who, silent);
        if let Who::Coordinator(at) = who {
            self.front_door_lost(at);
        }
        self.later(away, Fault::Start(who));
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        if self.healed && !matches!(fault, Fault::Start(_) | Fault::Look) {
            return;
        }
        if !matches!(fault, Fault::Look | Fault::Start(_)) {
            note!(self, "fault: {fault:?}");
        }
        match fault {
            Fault::Start(who) => self.start(who),
            Fault::Crash { who, silent, away } => self.crash(who, silent, away),
            Fault::LeaderCrash { away } => {
                if let Some(leader) = self.leader() {
                    self.report.count("leader crashed");
                    let silent = self.rng.chance(500);
                    self.crash(leader, silent, away);
                }
            }
            Fault::Freeze { who, time } => self.stun(who, time),
            Fault::LeaderFreeze { time } => {
                if let Some(leader) = self.leader() {
                    self.report.count("leader frozen");
                    self.stun(leader, time);
                }
            }
            Fault::Thaw(who) => self.thaw(who),
            Fault::Leave { who, away } => {
                if self.is_well(who) {
                    self.report.count("node left");
                    self.leave(who);
                    self.timer(who, 300 * MS, Timer::Goodbye { away });
                }
            }
            Fault::Cut { lines, time } => {
                self.report.count(if lines.len() == 1 {
                    "one-way cut"
                } else {
                    "partition"
                });
                self.cuts.extend(lines.iter().copied());
                self.look_at_streams();
                self.later(time, Fault::Mend { lines });
            }
            Fault::Mend { lines } => self.cuts.retain(|line| !lines.contains(line)),
            Fault::Lossy { per_mille, time } => {
                self.report.count("lossy network");
                self.loss = per_mille;
                self.later(time, Fault::TroubleOver);
            }
            Fault::StoreAway { time } => {
                self.report.count("store outage");
                self.store.away = true;
                self.later(time, Fault::StoreWell);
            }
            Fault::StoreSlow { delay, time } => {
                self.report.count("slow store");
                self.store.slow = delay;
                self.later(time, Fault::StoreWell);
            }
            Fault::StoreWiped if self.all_know_the_store() => {
                self.report.count("store wiped");
                self.store.wipe();
            }
            // What only the store knows would be lost for good.
            Fault::StoreWiped => self.later(300 * MS, Fault::StoreWiped),
            Fault::StoreWell => (self.store.away, self.store.slow) = (false, 0),
            Fault::Slow { at, times, time } => {
                self.report.count("slow expert node");
                self.experts[at].trouble.slow = times;
                self.later(time, Fault::TroubleOver);
            }
            Fault::DiskFails { at, time } => {
                self.experts[at].trouble.disk = true;
                self.later(time, Fault::TroubleOver);
            }
            Fault::CopiesSpoilt { per_mille, time } => {
                for node in &mut self.experts {
                    node.trouble.copies = per_mille;
                }
                self.later(time, Fault::TroubleOver);
            }
            Fault::TroubleOver => self.trouble_over(),
            Fault::Look => self.look(),
        }
    }

    fn all_know_the_store(&self) -> bool {
        let Some(stored) = self.store.state() else {
            return false;
        };
        let mut all = (0..).map(Who::Coordinator).zip(&self.coordinators);
        all.all(|(who, c)| self.is_well(who) && c.knows(stored))
    }

    /// A process that has said goodbye ends, and comes back after a while.
    pub(super) fn goodbye(&mut self, who: Who, away: Time) {
        self.kill(who, false);
        self.later(away.max(MS), Fault::Start(who));
    }

    fn stun(&mut self, who: Who, time: Time) {
        if self.is_well(who) {
            self.report.count("process frozen");
            self.freeze(who);
            self.later(time, Fault::Thaw(who));
        }
    }

    fn trouble_over(&mut self) {
        self.loss = 2;
        for node in &mut self.experts {
            node.trouble = Default::default();
        }
    }

    /// Everything that ails the world is over; what is down comes back.
    pub(super) fn heal(&mut self) {
        note!(self, "the world heals");
        self.healed = true;
        self.cuts.clear();
        self.trouble_over();
        self.loss = 0;
        (self.store.away, self.store.slow) = (false, 0);
        let all: Vec<Who> = self.processes.keys().copied().collect();
        for who in all {
            self.thaw(who);
            self.start(who);
        }
        self.later(LOOK, Fault::Look);
    }

    /// The run ends when all is well and stays so for a look, or when it is too late.
    fn look(&mut self) {
        let late = self.now >= END;
        let settled = self.now >= HEAL + 8 * SEC && self.unsettled().is_none();
        match late || settled {
            true => self.agenda.add(self.now, Event::End),
            false => self.later(LOOK, Fault::Look),
        }
    }
}
