//! From flags to certificates and keys, and what may be open without them.

use guild_node::channel::Dialer;
use guild_node::keys::ApiKeys;
use guild_node::tls::{FrontTls, Role, Roots, Tls, TlsFiles};

use crate::args::{Access, DoorArgs, NodeTls};
use crate::failure::Failure;

/// What a listener is protected by, as far as leaving loopback is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    /// TLS, keys where they belong, or the operator's word: any address will do.
    Enough,
    /// Something is missing: other machines must not reach it.
    Lacks(&'static str),
}

impl Protection {
    /// For listeners of this process alone.
    pub(crate) const LOOPBACK: Protection = Protection::Lacks("a reason to be");

    /// Of a port for nodes.
    pub(crate) fn of_nodes(tls: Option<&Tls>, insecure: bool) -> Protection {
        if tls.is_some() || insecure {
            Protection::Enough
        } else {
            Protection::Lacks("--tls-cert, --tls-key and --tls-ca (`guild certs` makes the files)")
        }
    }
}

/// The certificate of a process of `role`, if it was given one.
///
/// # Errors
/// Some of the three files are given and others are not, or they are of no use.
pub(crate) fn node_tls(args: &NodeTls, role: Role) -> Result<Option<Tls>, Failure> {
    let files = match (&args.tls_cert, &args.tls_key, &args.tls_ca) {
        (None, None, None) => return Ok(None),
        (Some(cert), Some(key), Some(ca)) => TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
            ca: ca.clone(),
        },
        _ => {
            return Err(Failure::usage(
                "--tls-cert, --tls-key and --tls-ca belong together: give all of them or none",
            ));
        }
    };
    Tls::open(files, role)
        .map(Some)
        .map_err(|error| Failure::of(&error))
}

/// What stands between clients and the front door.
#[derive(Clone, Debug, Default)]
pub(crate) struct Door {
    pub(crate) tls: Option<FrontTls>,
    pub(crate) keys: Option<ApiKeys>,
}

impl Door {
    /// # Errors
    /// Half of a certificate is given, or a file is of no use.
    pub(crate) fn open(args: &DoorArgs) -> Result<Door, Failure> {
        let tls = match (&args.http_tls_cert, &args.http_tls_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let tls = FrontTls::open(cert.clone(), key.clone());
                Some(tls.map_err(|error| Failure::of(&error))?)
            }
            _ => {
                return Err(Failure::usage(
                    "--http-tls-cert and --http-tls-key belong together: give both or neither",
                ));
            }
        };
        let keys = match &args.api_keys {
            None => None,
            Some(path) => Some(ApiKeys::open(path).map_err(|error| Failure::of(&error))?),
        };
        Ok(Door { tls, keys })
    }

    pub(crate) fn protection(&self, insecure: bool) -> Protection {
        if insecure {
            return Protection::Enough;
        }
        match (&self.keys, &self.tls) {
            (Some(_), Some(_)) => Protection::Enough,
            (None, Some(_)) => Protection::Lacks("--api-keys (`guild keys new` makes one)"),
            (Some(_), None) => Protection::Lacks("--http-tls-cert and --http-tls-key"),
            (None, None) => Protection::Lacks("--api-keys, --http-tls-cert and --http-tls-key"),
        }
    }

    /// What URLs of the front door begin with.
    pub(crate) fn scheme(&self) -> &'static str {
        match self.tls {
            Some(_) => "https",
            None => "http",
        }
    }
}

/// How a client connects to `endpoint`, by its scheme; without one, TLS if there is a CA to trust.
///
/// # Errors
/// The CA is unusable, missing for https, or given for http, where nobody would look at it.
pub(crate) fn dialer(access: &Access, endpoint: &str) -> Result<Dialer, Failure> {
    let scheme = endpoint.split_once("://").map(|(scheme, _)| scheme);
    match (&access.tls_ca, scheme) {
        (Some(_), Some("http")) => Err(Failure::usage(format!(
            "--endpoint: {endpoint} is without encryption, and --tls-ca is given"
        ))
        .hint("write https://HOST:PORT, or leave --tls-ca out")),
        (Some(path), _) => Roots::open(path)
            .map(Dialer::Server)
            .map_err(|error| Failure::of(&error)),
        (None, Some("https")) => Err(Failure::usage(format!(
            "--endpoint: {endpoint} needs --tls-ca FILE, the CA to trust"
        ))),
        (None, _) => Ok(Dialer::Plain),
    }
}
