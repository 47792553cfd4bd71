//! What is done about nodes that owe an answer: suspected, helped out, probed, heard in the end.

use std::sync::Arc;

use futures::stream::StreamExt;
use guild_transport::Fabric;
use tokio::time::{Instant, timeout_at};

use super::{Away, Part, SILENCE_GRACE};
use crate::view::View;

impl<F: Fabric + 'static> Away<'_, F> {
    /// Suspects who is overdue, and asks others as well where there are others.
    pub(super) fn hedge(&mut self, now: Instant) {
        let Some(view) = self.view() else { return };
        for part in 0..self.parts.len() {
            let Part {
                node,
                open,
                overdue_at,
                ..
            } = self.parts[part];
            if !open || overdue_at.is_none_or(|at| at > now) {
                continue;
            }
            self.parts[part].overdue_at = None;
            self.exchange.peers.suspect(node);
            let targets = self.parts[part].targets.iter().copied();
            let targets = targets.filter(|&target| !self.state[target as usize].here);
            let wanted = self.with_experts(&targets.collect::<Vec<_>>());
            let peers = &self.exchange.peers;
            let layer = self.layer as u32;
            let (plan, _) = peers.choose(&view, layer, &wanted, &self.failed, true);
            if plan.is_empty() {
                continue;
            }
            if !peers.may_hedge(plan.len() as u64) {
                // The budget grows with what others send.
                self.parts[part].overdue_at = Some(now + peers.patience(node, wanted.len()));
                continue;
            }
            tracing::warn!(
                layer = self.layer,
                epoch = self.epoch,
                node = self.parts[part].name,
                rows = wanted.len(),
                "no answer yet: asking other homes of these experts"
            );
            for (other, rows) in plan {
                if let Err(error) = self.post(&view, other, &rows) {
                    self.blame(other, error);
                }
            }
        }
    }

    /// Asks suspected nodes for one row each, beside what is sent elsewhere: whether they are
    /// back must not cost a request anything.
    pub(super) fn probe(&mut self, view: &View) {
        for node in self.exchange.peers.to_probe() {
            let known = (0u32..)
                .zip(&self.routes.experts)
                .find_map(|(target, &expert)| {
                    let homes = view.resolve(self.layer as u32, expert);
                    let home = homes.iter().find(|(home, _)| *home == node);
                    home.map(|&(_, slot)| (target, slot))
                });
            let Some(known) = known else { continue };
            let out = self.exchange.peers.send(node, 1);
            if let Ok(handle) = self.hand_over(view, node, &[known]) {
                let fabric = Arc::clone(&self.exchange.fabric);
                tokio::spawn(async move {
                    if fabric.combine(handle).await.is_ok() {
                        out.answered();
                    }
                });
            }
        }
    }

    /// Nodes whose answer came too late to be used are heard all the same: they are alive.
    pub(super) fn hear_the_late(&mut self) {
        let mut late = std::mem::take(&mut self.answers);
        if late.is_empty() {
            return;
        }
        let hearing = async move {
            while let Some(answer) = late.next().await {
                if answer.returned.is_ok() {
                    answer.out.answered();
                }
            }
        };
        // Nobody is waited for beyond the exchange's deadline.
        let end = self.deadline + SILENCE_GRACE;
        tokio::spawn(async move {
            let _ = timeout_at(end, hearing).await;
        });
    }
}
