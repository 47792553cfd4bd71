//! What a node says of itself, checked and made comparable.

use std::collections::BTreeMap;

use super::{MAX_EPOCH, MAX_TEXT, Membership, Node, Refused, Registration, Role};
use crate::placement::NodeId;

impl Membership {
    /// What fails together, as numbers, for every expert node: a named failure
    /// domain, else a process, else the node alone.
    pub(crate) fn domains(&self) -> BTreeMap<NodeId, u32> {
        let key = |node: &Node| match (node.failure_domain.as_str(), node.process.as_str()) {
            ("", "") => (0, node.id.to_string()),
            ("", process) => (1, process.to_owned()),
            (domain, _) => (2, domain.to_owned()),
        };
        let mut known: BTreeMap<(u8, String), u32> = BTreeMap::new();
        let experts = self.nodes.values().filter(|node| node.role == Role::Expert);
        experts
            .map(|node| {
                let next = known.len() as u32;
                (node.id, *known.entry(key(node)).or_insert(next))
            })
            .collect()
    }

    /// Whether a node may join.
    pub(super) fn check(&self, new: &Registration) -> Result<(), Refused> {
        let field = |field: &'static str, problem: &str| {
            Err(Refused::Field {
                field,
                problem: problem.to_owned(),
            })
        };
        for (name, text) in [
            ("name", &new.name),
            ("address", &new.address),
            ("numerics_class", &new.numerics_class),
            ("model_digest", &new.model_digest),
            ("process", &new.process),
            ("failure_domain", &new.failure_domain),
        ] {
            let optional = ["process", "failure_domain"].contains(&name);
            if text.is_empty() && !optional {
                return field(name, "must not be empty");
            }
            if text.len() > MAX_TEXT {
                return field(name, &format!("longer than {MAX_TEXT} bytes"));
            }
            if text.chars().any(char::is_control) {
                return field(name, "has control characters");
            }
        }
        if new.newest_epoch > MAX_EPOCH {
            return field("newest_epoch", "is beyond any epoch a cluster can have");
        }
        if new.model_digest != self.settings.model_digest {
            return Err(Refused::Digest {
                name: new.name.clone(),
                theirs: new.model_digest.clone(),
                ours: self.settings.model_digest.clone(),
            });
        }
        let differs = |node: &&Node| {
            let same = if node.role == new.role {
                node.numerics_class == new.numerics_class
            } else {
                of_every_role(&node.numerics_class) == of_every_role(&new.numerics_class)
            };
            node.name != new.name && !same
        };
        let other = self.nodes.values().find(differs);
        if let Some(other) = other {
            return Err(Refused::Numerics {
                name: new.name.clone(),
                theirs: new.numerics_class.clone(),
                member: other.name.clone(),
                ours: other.numerics_class.clone(),
            });
        }
        Ok(())
    }
}

/// Stands in a numerics class before what only nodes with a cache must agree on: the cache's own format.
pub const NUMERICS_OF_CACHE: &str = "+kv-";

/// The part of a numerics class that nodes of different roles must share.
fn of_every_role(class: &str) -> &str {
    class
        .split_once(NUMERICS_OF_CACHE)
        .map_or(class, |(shared, _)| shared)
}

/// A measured speed in steps of a quarter octave; it stays at the last one
/// unless it has moved by most of a step.
pub(super) fn coarse(measured: f64, last: f64) -> f64 {
    const STEPS: f64 = 4.0;
    const REACH: f64 = 0.75;
    if !measured.is_normal() || measured < 0.0 {
        return last;
    }
    let steps = measured.log2() * STEPS;
    if last > 0.0 && (steps - last.log2() * STEPS).abs() < REACH {
        return last;
    }
    (steps.round() / STEPS).exp2()
}
