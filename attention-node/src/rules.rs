//! Who may call what of an attention node, where certificates say who somebody is: coordinators bring
//! requests, attention nodes want pages. Health and reflection are not judged.

use std::sync::Arc;

use guild_node::serve::{Guard, Peer};
use guild_node::status;
use guild_node::tls::Role;
use guild_proto::inference::v1::inference_server::SERVICE_NAME as INFERENCE;
use guild_proto::pages::v1::pages_server::SERVICE_NAME as PAGES;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};

/// ErrorInfo reason when a certificate's role may not call a service.
const REASON_ROLE: &str = "ROLE_NOT_ALLOWED";

/// Who may call each service.
const RULES: [(&str, &[Role]); 2] = [(INFERENCE, Role::COORDINATING), (PAGES, Role::ATTENDING)];

/// The guard of an attention node's server.
pub(crate) fn guard() -> Guard {
    Arc::new(refusal)
}

fn refusal(request: &Request<Body>) -> Option<Response<Body>> {
    let (service, _) = request.uri().path().strip_prefix('/')?.split_once('/')?;
    let (_, allowed) = RULES.iter().find(|(name, _)| *name == service)?;
    let identity = request.extensions().get::<Peer>()?.identity.as_ref()?;
    if allowed.contains(&identity.role) {
        return None;
    }
    let message = format!("{service} is not for {identity}");
    tracing::warn!("refused a call: {message}");
    let status = status::with_reason(Code::PermissionDenied, REASON_ROLE, message, []);
    Some(status.into_http())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use guild_node::tls::Identity;

    use super::*;

    #[test]
    fn coordinators_bring_requests_and_attention_nodes_want_pages() {
        let refused = |path: &str, role: Option<Role>| {
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = path.parse().unwrap();
            request.extensions_mut().insert(Peer {
                local: None,
                remote: None,
                identity: role.map(|role| Identity::new("test", role, None).unwrap()),
            });
            refusal(&request).is_some()
        };
        for role in Role::ALL {
            let inference = refused("/guild.inference.v1.Inference/Generate", Some(role));
            assert_eq!(inference, role != Role::Coordinator, "{role}");
            let pages = refused("/guild.pages.v1.Pages/Prefill", Some(role));
            assert_eq!(pages, role != Role::Attention, "{role}");
            assert!(!refused("/grpc.health.v1.Health/Check", Some(role)));
        }
        assert!(!refused("/guild.pages.v1.Pages/Prefill", None));
    }
}
