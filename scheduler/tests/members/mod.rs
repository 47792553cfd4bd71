//! Nodes that fit one cluster, for whatever is tested of them.
#![allow(unreachable_pub)]

use guild_scheduler::membership::{Registration, Report, Role};

/// The model of every cluster here.
pub const DIGEST: &str = "digest-a";

/// A node without limits, in no failure domain, with no process of others.
pub fn registration(role: Role, name: &str, incarnation: u64) -> Registration {
    Registration {
        role,
        name: name.into(),
        address: format!("{name}:1"),
        model_digest: DIGEST.into(),
        numerics_class: "class-a".into(),
        capacity_bytes: 0,
        newest_epoch: 0,
        incarnation,
        process: String::new(),
        failure_domain: String::new(),
        duty: Default::default(),
    }
}

/// Of a node that has this epoch and serves.
pub fn ready(epoch: u64) -> Report {
    Report {
        epoch,
        ready: true,
        ..Report::default()
    }
}
