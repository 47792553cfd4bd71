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
    /// All zero, for the MoE layers of the main model, and for that of the draft module if it is used.
    pub(crate) fn new(model: &Config, drafting: bool) -> RoutedRows {
        let layers = model.num_hidden_layers + usize::from(drafting);
        let layers = model.expert_layers().filter(|&layer| layer < layers);
        let layers: Vec<u32> = layers.map(|layer| layer as u32).collect();
        let experts = model.n_routed_experts;
        RoutedRows {
            rows: (0..layers.len() * experts)
                .map(|_| AtomicU64::new(0))
                .collect(),
            layers,
            experts,
        }
    }

    /// Counts what the gate of a layer has chosen.
    pub(crate) fn count(&self, layer: usize, routes: &Routes) {
        let Ok(at) = self.layers.binary_search(&(layer as u32)) else {
            return;
        };
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
