//! Who is next: the order of the queue, and what each tenant has had.
//!
//! Secret: fairness. Lower priorities go first; among equals, requests that were running already (and
//! were preempted) come back first; then the tenant that was served the fewest tokens, in order of
//! arrival within it (a virtual token counter: Sheng et al., "Fairness in serving large language
//! models", OSDI 2024). A tenant that comes back after a pause does not bring credit along: it
//! starts where the least served of the present ones stands.
//!
//! Places in the queue are shared the same way: one tenant alone may have all of them, but where it has more
//! than another would have with one more, its newest request gives way (longest queue drop: Suter et al.,
//! "Design considerations for supporting TCP with per-flow queueing", INFOCOM 1998).

use std::collections::HashMap;

use super::limits::Limits;
use super::request::{Live, NewRequest};

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

/// Who has to leave the queue so that it has room for `request`: the newest requests of tenants that take more of it
/// than this one's does with it. Nobody where there is room; None where nobody has to give way. Who has run before
/// stays.
pub(super) fn give_way(
    waiting: &[Live],
    limits: &Limits,
    request: &NewRequest,
) -> Option<Vec<u64>> {
    let mut taken: HashMap<u64, (usize, usize)> = HashMap::new();
    for live in waiting {
        let (places, tokens) = taken.entry(live.request.tenant).or_default();
        *places += 1;
        *tokens = tokens.saturating_add(live.known());
    }
    let mut gone: Vec<u64> = Vec::new();
    loop {
        let tokens = taken.values().map(|&(_, tokens)| tokens);
        let tokens = tokens.fold(request.prompt, usize::saturating_add);
        let left = waiting.len() - gone.len();
        let full = left >= limits.max_waiting;
        if !full && (tokens <= limits.max_waiting_tokens || left == 0) {
            return Some(gone);
        }
        let own = taken.get(&request.tenant).copied().unwrap_or_default();
        let gives = |live: &&Live| {
            let other = live.request.tenant != request.tenant;
            if !other || live.cached.is_some() || gone.contains(&live.request.id) {
                return false;
            }
            let (places, tokens) = taken[&live.request.tenant];
            match full {
                true => places > own.0 + 1,
                false => tokens - live.known() >= own.1.saturating_add(request.prompt),
            }
        };
        let newest = |live: &&Live| {
            let (places, tokens) = taken[&live.request.tenant];
            let most = if full { places } else { tokens };
            (most, live.request.priority, live.arrival)
        };
        let live = waiting.iter().filter(gives).max_by_key(newest)?;
        gone.push(live.request.id);
        let known = live.known();
        if let Some((places, tokens)) = taken.get_mut(&live.request.tenant) {
            *places -= 1;
            *tokens -= known;
        }
    }
}

/// How many of those that wait go before `request`, where tenants take turns: those of lower priority, those of its
/// own, and of every other tenant no more than it has itself, this one included.
pub(super) fn ahead(waiting: &[Live], request: &NewRequest) -> usize {
    let mut before = 0;
    let mut tenants: HashMap<u64, usize> = HashMap::new();
    for live in waiting {
        let (other, fresh) = (&live.request, live.cached.is_none());
        match other.priority.cmp(&request.priority) {
            std::cmp::Ordering::Less => before += 1,
            std::cmp::Ordering::Equal if !fresh => before += 1,
            std::cmp::Ordering::Equal => *tenants.entry(other.tenant).or_default() += 1,
            std::cmp::Ordering::Greater => {}
        }
    }
    let own = tenants.remove(&request.tenant).unwrap_or(0);
    let others = tenants.into_values().map(|places| places.min(own + 1));
    before + own + others.sum::<usize>()
}
