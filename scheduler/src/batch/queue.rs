//! Who is next: the order of the queue, and what each tenant has had.
//!
//! Secret: fairness. Lower priorities go first; among equals, requests that were running already (and
//! were preempted) come back first; then the tenant that was served the fewest tokens, in order of
//! arrival within it (a virtual token counter: Sheng et al., "Fairness in serving large language
//! models", OSDI 2024). A tenant that comes back after a pause does not bring credit along: it
//! starts where the least served of the present ones stands.

use std::collections::HashMap;

/// Tenants whose count is kept while they have no request here; beyond that those with the least
/// debt are forgotten.
pub const MAX_IDLE_TENANTS: usize = 4096;

/// Where a request stands in the queue; the least one is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    pub(super) priority: i32,
    /// False first: it has run before.
    pub(super) fresh: bool,
    pub(super) served: u64,
    pub(super) arrival: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Tenant {
    served: u64,
    /// Requests that wait or run.
    here: usize,
}

/// What each tenant has had, in rows computed and tokens generated.
#[derive(Debug, Default)]
pub(super) struct Shares {
    tenants: HashMap<u64, Tenant>,
}

impl Shares {
    /// A request of the tenant has come.
    pub(super) fn enter(&mut self, tenant: u64) {
        let least = self.least();
        let entry = self.tenants.entry(tenant).or_default();
        if entry.here == 0 {
            entry.served = entry.served.max(least);
        }
        entry.here += 1;
    }

    /// A request of the tenant has gone.
    pub(super) fn leave(&mut self, tenant: u64) {
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.here = entry.here.saturating_sub(1);
        }
        let present = self.tenants.values().filter(|tenant| tenant.here > 0);
        let idle = self.tenants.len() - present.count();
        if idle == self.tenants.len() {
            // Nobody is left who could have been treated unfairly.
            self.tenants.clear();
        } else if idle > MAX_IDLE_TENANTS {
            // Those who would be lifted anyway lose nothing.
            let least = self.least();
            self.tenants
                .retain(|_, tenant| tenant.here > 0 || tenant.served > least);
            if self.tenants.len() > 2 * MAX_IDLE_TENANTS {
                self.tenants.retain(|_, tenant| tenant.here > 0);
            }
        }
    }

    /// The tenant was served so many tokens.
    pub(super) fn serve(&mut self, tenant: u64, tokens: usize) {
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.served = entry.served.saturating_add(tokens as u64);
        }
    }

    /// Tokens that the tenant was served.
    pub(super) fn served(&self, tenant: u64) -> u64 {
        self.tenants.get(&tenant).map_or(0, |entry| entry.served)
    }

    /// What the least served of the present tenants has had.
    fn least(&self) -> u64 {
        let present = self.tenants.values().filter(|tenant| tenant.here > 0);
        present.map(|tenant| tenant.served).min().unwrap_or(0)
    }
}
