//! Rows that the gate has sent to each expert, since somebody last asked.
//!
//! Secret: how a step counts without a lock or an allocation while another thread takes
//! what has been counted: nothing is lost between the two and nothing counted twice.

use std::sync::atomic::{AtomicU64, Ordering};

use guild_model::Config;
use guild_model::gate::Routes;
use guild_node::member::{Routed, RoutedSource};

/// Counters of every (MoE layer, logical expert).
#[derive(Debug)]
pub struct RoutedRows {
    layers: Vec<u32>,
    experts: usize,
    /// [layers, experts]
    rows: Vec<AtomicU64>,
}

impl RoutedRows {
    /// All zero, for the MoE layers of the main model.
    pub(crate) fn new(model: &Config) -> RoutedRows {
        let layers: Vec<u32> = model.moe_layers().map(|layer| layer as u32).collect();
        let experts = model.n_routed_experts;
        RoutedRows {
            rows: (0..layers.len() * experts)
                .map(|_| AtomicU64::new(0))
                .collect(),
            layers,
            experts,
        }
    }

    /// Counts what the gate of MoE layer number `at` (dense layers left out) has chosen.
    pub(crate) fn count(&self, at: usize, routes: &Routes) {
        let first = at * self.experts;
        let Some(layer) = self.rows.get(first..first + self.experts) else {
            return;
        };
        for &expert in &routes.experts {
            if let Some(rows) = layer.get(expert as usize) {
                rows.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl RoutedSource for RoutedRows {
    fn take(&self) -> Routed {
        Routed {
            layers: self.layers.clone(),
            experts: self.experts as u32,
            rows: (self.rows.iter())
                .map(|rows| rows.swap(0, Ordering::Relaxed))
                .collect(),
        }
    }
}
