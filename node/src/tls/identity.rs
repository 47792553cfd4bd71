//! Who somebody is, as a certificate says it.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;

/// What every identity begins with.
const PREFIX: &str = "spiffe://guild/";
/// Bytes of the name of a cluster or a node, at most.
const MAX_NAME_BYTES: usize = 128;

/// What a process does in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Front door, membership and placement.
    Coordinator,
    /// Attention and KV cache.
    Attention,
    /// Routed experts.
    Expert,
    /// No node: a person or a program that looks after the cluster.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [
        Role::Coordinator,
        Role::Attention,
        Role::Expert,
        Role::Operator,
    ];
    /// Who may dial guild.cluster.v1; what each may call there is the coordinator's to say.
    pub const JOINING: &'static [Role] = &[Role::Attention, Role::Expert, Role::Operator];
    /// Who may dial guild.experts.v1: expert nodes copy experts from each other.
    pub const SENDING_ROWS: &'static [Role] = &[Role::Attention, Role::Expert, Role::Coordinator];
    /// Who may dial an attention node: coordinators bring requests, others like it want pages.
    pub const REQUESTING: &'static [Role] = &[Role::Coordinator, Role::Attention];
    /// Who may call guild.inference.v1 of an attention node, and who is found at a coordinator.
    pub const COORDINATING: &'static [Role] = &[Role::Coordinator];
    /// Who is found where requests are sent, and who may call guild.pages.v1 there.
    pub const ATTENDING: &'static [Role] = &[Role::Attention];
    /// Who is found where rows are sent.
    pub const TAKING_ROWS: &'static [Role] = &[Role::Expert];

    /// As it is written in a certificate.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Attention => "attention",
            Role::Expert => "expert",
            Role::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Role, IdentityError> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| {
                IdentityError(format!(
                    "`{text}` is no role; write coordinator, attention, expert or operator"
                ))
            })
    }
}

/// Cluster, role and perhaps name of a process, written
/// `spiffe://guild/CLUSTER/role/ROLE[/NAME]` among the URIs of its certificate's subject
/// alternative names. With a name the certificate is that node's alone, without one it is good for
/// every node of the role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Certificates of one cluster mean nothing in another, even under one CA.
    pub cluster: String,
    /// What the process does.
    pub role: Role,
    /// The one node that may use it; None: any of the role.
    pub name: Option<String>,
}

/// A certificate or a text does not say who somebody is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct IdentityError(String);

impl Identity {
    /// # Errors
    /// `cluster` or `name` is empty, too long or has letters other than a-z, A-Z, 0-9, `-`, `_`
    /// and `.`.
    pub fn new(cluster: &str, role: Role, name: Option<&str>) -> Result<Identity, IdentityError> {
        for part in [Some(cluster), name].into_iter().flatten() {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            if part.is_empty() || part.len() > MAX_NAME_BYTES || !part.bytes().all(plain) {
                return Err(IdentityError(format!(
                    "`{part}` cannot stand in a certificate: 1 to {MAX_NAME_BYTES} of a-z, A-Z, 0-9, `-`, `_`, `.`"
                )));
            }
        }
        Ok(Identity {
            cluster: cluster.to_owned(),
            role,
            name: name.map(str::to_owned),
        })
    }

    /// The DNS name by which a certificate is good at whatever address its role is found:
    /// `ROLE.CLUSTER.guild.internal`. Without it, it is good for the hosts it names.
    pub fn anywhere(&self) -> String {
        format!("{}.{}.guild.internal", self.role, self.cluster)
    }

    /// What the certificate says. One that speaks for two is taken for neither.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Identity, IdentityError> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|error| IdentityError(format!("is no usable certificate: {error}")))?;
        let mut found = parsed
            .valid_uri_names()
            .filter(|uri| uri.starts_with(PREFIX));
        let Some(uri) = found.next() else {
            return Err(IdentityError(format!(
                "names no role: a URI {PREFIX}CLUSTER/role/ROLE is missing; `guild certs` makes such certificates"
            )));
        };
        if found.next().is_some() {
            return Err(IdentityError("names more than one role".to_owned()));
        }
        uri.parse()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/role/{}", self.cluster, self.role)?;
        match &self.name {
            Some(name) => write!(f, "/{name}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Identity, IdentityError> {
        let wrong = || {
            IdentityError(format!(
                "`{uri}` is not of the form {PREFIX}CLUSTER/role/ROLE[/NAME]"
            ))
        };
        let parts: Vec<&str> = uri
            .strip_prefix(PREFIX)
            .ok_or_else(wrong)?
            .split('/')
            .collect();
        match parts[..] {
            [cluster, "role", role] => Identity::new(cluster, role.parse()?, None),
            [cluster, "role", role, name] => Identity::new(cluster, role.parse()?, Some(name)),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Identity, Role};

    #[test]
    fn an_identity_reads_as_it_is_written() {
        for (role, name) in [
            (Role::Coordinator, None),
            (Role::Attention, Some("attention-0")),
            (Role::Expert, Some("rack_2.host-7")),
            (Role::Operator, Some("alice")),
        ] {
            let identity = Identity::new("prod", role, name).unwrap();
            assert_eq!(identity.to_string().parse(), Ok(identity));
        }
    }

    #[test]
    fn what_is_not_quite_an_identity_is_none() {
        for bad in [
            "",
            "spiffe://guild/",
            "spiffe://other/prod/role/expert",
            "spiffe://guild/prod/role",
            "spiffe://guild/prod/role/",
            "spiffe://guild/prod/role/admin",
            "spiffe://guild/prod/role/Expert",
            "spiffe://guild//role/expert",
            "spiffe://guild/prod/role/expert/",
            "spiffe://guild/prod/role/expert/a/b",
            "spiffe://guild/prod/rule/expert",
            "spiffe://guild/pr od/role/expert",
            "spiffe://guild/prod/role/expert/n%00",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }
}
