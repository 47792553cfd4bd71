//! When each node would answer, as far as its answers so far tell.
//!
//! Secret: what counts as a difference. Nodes that differ by no more than their answers vary are
//! alike, so that noise moves no rows; a node that has not answered yet is taken for a usual one.

use guild_scheduler::spread::Queue;
use guild_transport::NodeId;

use super::{Fit, Known, Peer};
use crate::view::View;

/// Seconds that the way there and back takes while no node far away has answered.
const WIRE: f64 = 1e-3;
/// Capacities that differ by no more than this factor are alike.
const ALIKE: f64 = 1.5;

impl Known {
    /// What each of `nodes` has before it, times in seconds. A node that is `near` answers without
    /// delay but for its work.
    pub(super) fn queues(
        &self,
        view: &View,
        nodes: &[NodeId],
        near: &dyn Fn(NodeId) -> bool,
    ) -> Vec<Queue> {
        let peers = nodes.iter().map(|node| self.peers.get(node));
        let peers: Vec<Option<&Peer>> = peers.collect();
        let said = |&node: &NodeId| view.rows_per_second(node).map(f64::recip);
        let per_row = peers.iter().zip(nodes).filter_map(|(peer, node)| {
            let fit = peer.and_then(Peer::fit);
            fit.map(|fit| fit.per_row).or_else(|| said(node))
        });
        let usual_row = median(per_row).unwrap_or(1.0);
        // Answers to probes alone say nothing about rows: those are taken for usual, too.
        let fit = |(peer, node): (&Option<&Peer>, &NodeId)| {
            let pace = peer.map(|peer| &peer.pace);
            pace.and_then(|pace| pace.fit(said(node).or(Some(usual_row))))
        };
        let fits: Vec<Option<Fit>> = peers.iter().zip(nodes).map(fit).collect();
        let far = || {
            let far = fits.iter().zip(nodes).filter(|&(_, &node)| !near(node));
            far.filter_map(|(fit, _)| *fit)
        };
        let usual = median(far().map(|fit| fit.fixed)).unwrap_or(WIRE);
        let noise = median(far().map(|fit| fit.deviation)).unwrap_or(0.0);
        let queue = |at: usize| {
            let row = fits[at].map(|fit| fit.per_row).or_else(|| said(&nodes[at]));
            let row = row.filter(|row| {
                let ratio = row / usual_row;
                !(1.0 / ALIKE..=ALIKE).contains(&ratio)
            });
            let fixed = fits[at].map(|fit| fit.fixed);
            let fixed = fixed.filter(|fixed| (fixed - usual).abs() > noise);
            Queue {
                rows: peers[at].map_or(0, Peer::waiting),
                capacity: row.unwrap_or(usual_row).recip(),
                latency: match near(nodes[at]) {
                    true => 0.0,
                    false => fixed.unwrap_or(usual),
                },
            }
        };
        (0..nodes.len()).map(queue).collect()
    }
}

impl Peer {
    /// Rows that it has not answered.
    fn waiting(&self) -> u64 {
        self.owed.values().map(|owed| owed.rows).sum()
    }
}

/// The lower median; None of nothing.
pub(super) fn median(of: impl Iterator<Item = f64>) -> Option<f64> {
    let mut all: Vec<f64> = of.collect();
    all.sort_unstable_by(f64::total_cmp);
    let middle = all.len().checked_sub(1)? / 2;
    all.get(middle).copied()
}
