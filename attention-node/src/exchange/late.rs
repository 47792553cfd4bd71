//! What is done about nodes that owe an answer: helped out, suspected, probed, heard in the end.

use std::sync::Arc;

use futures::stream::StreamExt;
use guild_transport::{Fabric, NodeId};
use tokio::time::{Instant, sleep_until};

use super::{Away, SILENCE_GRACE, is_away};
use crate::peers::Trust;

impl<F: Fabric + 'static> Away<'_, F> {
    /// When something is to be done about a part that is away, if nothing comes before.
    pub(super) fn overdue_at(&self) -> Option<Instant> {
        let stragglers = self.has_stragglers();
        let open = self.parts.iter().filter(|part| part.open);
        let times = open.flat_map(|part| [part.suspect_at, part.late_at.filter(|_| stragglers)]);
        times.flatten().min()
    }

    /// Whether what is still away is late by itself: where most parts are, the reason is here or
    /// everywhere, and asking others would make it worse.
    fn has_stragglers(&self) -> bool {
        let open = self.parts.iter().filter(|part| part.open).count();
        open == 1 || 2 * open <= self.parts.len()
    }

    /// Asks others as well for what is late, and suspects who has been silent for too long.
    pub(super) fn hedge(&mut self, now: Instant) {
        let stragglers = self.has_stragglers();
        for at in 0..self.parts.len() {
            let part = &mut self.parts[at];
            if !part.open {
                continue;
            }
            let (node, number) = (part.node, part.number);
            if part.suspect_at.is_some_and(|at| at <= now) {
                (part.suspect_at, part.late_at) = (None, None);
                self.exchange.peers.suspect(node);
                self.ask_others(at, Trust::Slow);
            } else if stragglers && part.late_at.is_some_and(|at| at <= now) {
                part.late_at = None;
                self.exchange.peers.late(node, number);
                self.ask_others(at, Trust::Full);
            }
        }
    }

    /// Asks other homes, trusted at least so far, for what nobody else is about to bring.
    fn ask_others(&mut self, part: usize, least: Trust) {
        let Some(view) = self.view() else { return };
        let node = self.parts[part].node;
        let targets = self.parts[part].targets.iter().copied();
        let targets = targets.filter(|&target| {
            let target = self.state[target as usize];
            !target.here && target.parts <= 1
        });
        let wanted = self.with_experts(&targets.collect::<Vec<_>>());
        let mut avoid = self.failed.clone();
        avoid.insert(node);
        let plan = self.choose(&view, &wanted, &avoid, least);
        if plan.is_empty() {
            return;
        }
        let peers = &self.exchange.peers;
        if !peers.may_hedge(plan.len() as u64) {
            // The budget grows with what others send.
            let again = peers.late_after(node, wanted.len() as u64);
            self.parts[part].late_at = again.map(|again| Instant::now() + again);
            return;
        }
        tracing::debug!(
            layer = self.layer,
            epoch = self.epoch,
            node = self.parts[part].name(),
            rows = wanted.len(),
            "no answer yet: asking other homes of these experts"
        );
        for (other, rows) in plan {
            if let Err(error) = self.post(&view, other, &rows) {
                self.blame(other, error);
            }
        }
    }

    /// Asks the node whose answer would be the greatest news for one row, beside what is sent
    /// elsewhere: whether it is quick again must not cost a request anything.
    pub(super) fn probe(&mut self) {
        let Some(view) = self.view() else { return };
        let (peers, fabric) = (&self.exchange.peers, &self.exchange.fabric);
        for node in peers.to_probe(&|node| fabric.is_here(node)) {
            let known = (0u32..)
                .zip(&self.routes.experts)
                .find_map(|(target, &expert)| {
                    let homes = view.resolve(self.layer as u32, expert);
                    let home = homes.iter().find(|(home, _)| *home == node);
                    home.map(|&(_, slot)| (target, slot))
                });
            let Some(known) = known else { continue };
            let out = peers.send(&view, node, 1);
            if let Ok(handle) = self.hand_over(&view, node, &[known]) {
                let (peers, fabric) = (Arc::clone(peers), Arc::clone(fabric));
                tokio::spawn(async move {
                    match fabric.combine(handle).await {
                        Ok(returned) => out.answered(returned.arrived),
                        Err(error) if is_away(&error) => peers.suspect(node),
                        Err(_) => {}
                    }
                });
            }
            return;
        }
    }

    /// Nodes whose answer came too late to be used are heard all the same: they are alive. Those
    /// that stay silent are suspected when it is time.
    pub(super) fn hear_the_late(&mut self) {
        let mut late = std::mem::take(&mut self.answers);
        if late.is_empty() {
            return;
        }
        let peers = Arc::clone(&self.exchange.peers);
        let nodes: Vec<NodeId> = self.parts.iter().map(|part| part.node).collect();
        let open = (0..).zip(&self.parts).filter(|(_, part)| part.open);
        let silent = open.filter_map(|(at, part)| Some((at, part.suspect_at?)));
        let mut silent: Vec<(usize, Instant)> = silent.collect();
        // Nobody is waited for beyond the exchange's deadline.
        let end = self.deadline + SILENCE_GRACE;
        let hearing = async move {
            loop {
                let wake = silent.iter().map(|&(_, at)| at).fold(end, Instant::min);
                tokio::select! {
                    biased;
                    answer = late.next() => {
                        let Some(answer) = answer else { return };
                        let node = nodes[answer.part];
                        silent.retain(|&(part, _)| part != answer.part);
                        match answer.returned {
                            Ok(returned) => answer.out.answered(returned.arrived),
                            Err(error) if is_away(&error) => peers.suspect(node),
                            Err(_) => {}
                        }
                    }
                    () = sleep_until(wake) => {
                        let now = Instant::now();
                        silent.retain(|&(part, at)| {
                            if at <= now {
                                peers.suspect(nodes[part]);
                            }
                            at > now
                        });
                        if now >= end {
                            return;
                        }
                    }
                }
            }
        };
        tokio::spawn(hearing);
    }
}
