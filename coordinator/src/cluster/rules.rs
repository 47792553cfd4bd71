//! Who may call what of guild.cluster.v1, where certificates say who somebody is.
//!
//! One table, judged before a request is looked at. A method that is not in it
//! is nobody's, so that a new one is closed until somebody has thought about it.

use std::sync::Arc;

use axum::http::{Request, Response};
use guild_node::serve::{Guard, Peer};
use guild_node::status;
use guild_node::tls::Role;
use guild_proto::cluster::v1::cluster_server::SERVICE_NAME;
use tonic::Code;
use tonic::body::Body;

/// ErrorInfo reason when a certificate's role may not call a method.
const REASON_ROLE: &str = "ROLE_NOT_ALLOWED";

/// Those whom placements are for.
const NODES: &[Role] = &[Role::Attention, Role::Expert];
/// Those who may look.
const EVERYBODY: &[Role] = &[Role::Attention, Role::Expert, Role::Operator];
/// Those who may change what the cluster does.
const OPERATORS: &[Role] = &[Role::Operator];

/// Who may call each method.
const RULES: &[(&str, &[Role])] = &[
    ("Register", NODES),
    ("Heartbeat", NODES),
    ("Leave", NODES),
    ("WatchPlacement", NODES),
    ("ReportLoad", &[Role::Attention]),
    ("Status", EVERYBODY),
    ("ExpertLoad", EVERYBODY),
    ("WatchMigration", EVERYBODY),
    ("Rebalance", OPERATORS),
    ("DrainNode", OPERATORS),
];

/// The guard of a server that carries guild.cluster.v1. Lets everything else by,
/// and everybody where no certificates are asked for.
pub(crate) fn guard() -> Guard {
    Arc::new(refusal)
}

fn refusal(request: &Request<Body>) -> Option<Response<Body>> {
    let path = request.uri().path().strip_prefix('/')?;
    let method = path.strip_prefix(SERVICE_NAME)?.strip_prefix('/')?;
    let identity = request.extensions().get::<Peer>()?.identity.as_ref()?;
    let rule = RULES.iter().find(|(name, _)| *name == method);
    let allowed = rule.map_or(&[][..], |(_, roles)| roles);
    if allowed.contains(&identity.role) {
        return None;
    }
    let allowed: Vec<&str> = allowed.iter().map(|role| role.as_str()).collect();
    let message = format!(
        "{method} is for certificates of the role {}, and this is {identity}",
        match allowed.as_slice() {
            [] => "of nobody".to_owned(),
            allowed => allowed.join(" or "),
        }
    );
    tracing::warn!("refused a call: {message}");
    let status = status::with_reason(Code::PermissionDenied, REASON_ROLE, message, []);
    Some(status.into_http())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use guild_node::tls::Identity;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// What each role may call: written down a second time, on purpose.
    const MATRIX: &[(&str, &str)] = &[
        ("Register", "attention expert"),
        ("Heartbeat", "attention expert"),
        ("Leave", "attention expert"),
        ("WatchPlacement", "attention expert"),
        ("ReportLoad", "attention"),
        ("Status", "attention expert operator"),
        ("ExpertLoad", "attention expert operator"),
        ("WatchMigration", "attention expert operator"),
        ("Rebalance", "operator"),
        ("DrainNode", "operator"),
    ];

    fn methods() -> Vec<String> {
        let all = FileDescriptorSet::decode(guild_proto::FILE_DESCRIPTOR_SET).unwrap();
        let services = all.file.iter().flat_map(|file| {
            let package = file.package();
            (file.service.iter()).map(move |s| (format!("{package}.{}", s.name()), s))
        });
        let cluster = services.into_iter().find(|(name, _)| name == SERVICE_NAME);
        let methods = cluster.unwrap().1.method.iter();
        methods.map(|method| method.name().to_owned()).collect()
    }

    fn refused(path: &str, role: Option<Role>) -> bool {
        let identity = role.map(|role| Identity::new("test", role, None).unwrap());
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = path.parse().unwrap();
        request.extensions_mut().insert(Peer {
            local: None,
            remote: None,
            identity,
        });
        refusal(&request).is_some()
    }

    #[test]
    fn every_method_has_a_rule_and_every_role_may_what_it_says() {
        let methods = methods();
        assert_eq!(methods.len(), MATRIX.len(), "{methods:?}");
        for method in &methods {
            assert!(
                RULES.iter().any(|(name, _)| name == method),
                "{method} has no rule: who may call it?"
            );
            let (_, may) = MATRIX.iter().find(|(name, _)| name == method).unwrap();
            let path = format!("/{SERVICE_NAME}/{method}");
            for role in Role::ALL {
                let allowed = may.split(' ').any(|name| name == role.as_str());
                assert_eq!(!refused(&path, Some(role)), allowed, "{role} and {method}");
            }
            assert!(!refused(&path, None), "{method} without certificates");
        }
    }

    #[test]
    fn what_has_no_rule_is_closed_and_other_services_are_not_judged() {
        for role in Role::ALL {
            assert!(refused(&format!("/{SERVICE_NAME}/Unheard"), Some(role)));
            assert!(!refused("/grpc.health.v1.Health/Check", Some(role)));
        }
    }
}
