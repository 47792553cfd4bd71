//! What a cluster waits for, in words for its operator.

use super::{Membership, Node, Role};

/// Names listed in one reason; the rest are counted.
const MAX_NAMES_IN_REASON: usize = 8;

impl Membership {
    /// What the cluster waits for, in words. None: it can serve.
    pub fn waiting_for(&self) -> Option<String> {
        if let Some(epoch) = self.active_epoch() {
            if self.serving().next().is_some() {
                return None;
            }
            let all: Vec<&Node> = self.of_role(Role::Attention).collect();
            return Some(match all.as_slice() {
                [] => "no attention node is ready (none has joined)".to_owned(),
                all => format!(
                    "no attention node is ready at epoch {epoch} ({})",
                    names(all)
                ),
            });
        }
        let experts = self.usable_experts().count();
        if self.retry_at.is_some() && self.next.is_none() && !self.loading_failure.is_empty() {
            return Some(format!("waiting to try again: {}", self.loading_failure));
        }
        if let Some(short) = &self.shortfall {
            if experts > 0 {
                let bytes = in_words(short.missing_bytes(self.settings.slot_bytes));
                return Some(format!(
                    "expert memory is short by {bytes} ({} of {} experts have no room): add expert nodes",
                    short.missing(),
                    short.needed
                ));
            }
            return Some("waiting for an expert node".to_owned());
        }
        let wanted = self.wanted_experts();
        if experts < wanted {
            return Some(match (experts, wanted) {
                (0, 1) => "waiting for an expert node".to_owned(),
                (0, wanted) => format!("waiting for {wanted} expert nodes"),
                (experts, wanted) => format!(
                    "waiting for {} more of {wanted} expert nodes",
                    wanted - experts
                ),
            });
        }
        match &self.next {
            Some(published) if self.plan_at.is_none() => {
                let all = published.placement.nodes();
                let missing: Vec<&Node> = all
                    .iter()
                    .filter_map(|slots| self.nodes.get(&slots.node))
                    .filter(|node| node.resident < published.loaded_as)
                    .collect();
                Some(format!(
                    "waiting for {} of {} expert nodes to load epoch {} ({})",
                    missing.len(),
                    all.len(),
                    published.placement.epoch(),
                    names(&missing)
                ))
            }
            _ => Some("waiting a moment for further expert nodes to join".to_owned()),
        }
    }
}

fn names(nodes: &[&Node]) -> String {
    let mut list: Vec<&str> = nodes
        .iter()
        .take(MAX_NAMES_IN_REASON)
        .map(|node| node.name.as_str())
        .collect();
    let rest = format!(
        "and {} more",
        nodes.len().saturating_sub(MAX_NAMES_IN_REASON)
    );
    if nodes.len() > MAX_NAMES_IN_REASON {
        list.push(&rest);
    }
    list.join(", ")
}

fn in_words(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (unit, name) in UNITS {
        if bytes >= unit {
            return format!("{:.1} {name}", bytes as f64 / unit as f64);
        }
    }
    format!("{bytes} bytes")
}
