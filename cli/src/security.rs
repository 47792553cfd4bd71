//! From flags to certificates and keys, and what may be open without them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use guild_node::channel::Dialer;
use guild_node::keys::ApiKeys;
use guild_node::tls::{FrontTls, Role, Roots, Tls, TlsFiles};

use crate::args::{Access, DoorArgs, Leader, NodeTls};
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
}

/// The certificate of a node of `role`, which may have a name. None: the operator wants the inside
/// of the cluster in plaintext.
///
/// # Errors
/// It has none and may not go without; or as [`tls_of`].
pub(crate) fn node_tls(
    args: &NodeTls,
    role: Role,
    name: Option<&str>,
    insecure: bool,
) -> Result<Option<Tls>, Failure> {
    match tls_of(args, role, name)? {
        None if !insecure => Err(uncertified(&format!("a node of the role `{role}`"))),
        tls => Ok(tls),
    }
}

/// The certificate of somebody who asks the coordinators at `urls`. None: they are asked in
/// plaintext, as those of a `guild up` on this machine are, or because the operator says so.
///
/// # Errors
/// They are on other machines, and there is no certificate to show; or as [`tls_of`].
pub(crate) fn asking_tls(args: &Leader, urls: &[&str]) -> Result<Option<Tls>, Failure> {
    let open = |role| tls_of(&args.tls, role, None);
    // A node's own will do for looking, where no other is at hand.
    let tls = open(Role::Operator).or_else(|failure| {
        let node = open(Role::Attention).or_else(|_| open(Role::Expert));
        node.map_err(|_| failure)
    })?;
    let elsewhere = urls.iter().find(|url| !is_loopback(url));
    match (tls, elsewhere) {
        (None, Some(url)) if !args.insecure => Err(uncertified(&format!("asking {url}"))),
        (tls, _) => Ok(tls),
    }
}

/// Whether a URL leads to this machine, without looking names up.
fn is_loopback(url: &str) -> bool {
    let address = url.split_once("://").map_or(url, |(_, rest)| rest);
    let address = address.trim_end_matches('/');
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip = host.parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

fn uncertified(who: &str) -> Failure {
    Failure::usage(format!(
        "{who} needs a certificate: give --tls-dir DIR, or --tls-cert, --tls-key and --tls-ca"
    ))
    .hint("`guild certs --out DIR` makes a CA and one for each role")
    .hint("--insecure leaves the inside of the cluster in plaintext, open to all who reach it")
}

/// The certificate of a process of `role`, which may have a name, if it was given one.
///
/// # Errors
/// Some of the three files are given and others are not, or they are of no use.
fn tls_of(args: &NodeTls, role: Role, name: Option<&str>) -> Result<Option<Tls>, Failure> {
    let folder = args.tls_dir.as_deref();
    let inside = folder.map(|folder| in_folder(folder, role, name));
    let file =
        |given: &Option<PathBuf>, inside: Option<&PathBuf>| given.as_ref().or(inside).cloned();
    let inside = inside.as_ref();
    let files = (
        file(&args.tls_cert, inside.map(|files| &files.cert)),
        file(&args.tls_key, inside.map(|files| &files.key)),
        file(&args.tls_ca, inside.map(|files| &files.ca)),
    );
    let files = match files {
        (None, None, None) => return Ok(None),
        (Some(cert), Some(key), Some(ca)) => TlsFiles { cert, key, ca },
        _ => {
            return Err(Failure::usage(
                "--tls-cert, --tls-key and --tls-ca belong together: give all of them, or \
                 --tls-dir, or none",
            ));
        }
    };
    let opened = Tls::open(files, role).map(Some);
    opened.map_err(|error| match folder {
        None => Failure::of(&error),
        Some(folder) => Failure::of(&error).hint(format!(
            "`guild certs --out {}` makes what --tls-dir names",
            folder.display()
        )),
    })
}

/// Files of a process in a folder: those of a mounted Secret, else those that `guild certs` has
/// made for its name, else for its role.
fn in_folder(folder: &Path, role: Role, name: Option<&str>) -> TlsFiles {
    let files = |cert: &str, key: &str, ca: &str| TlsFiles {
        cert: folder.join(cert),
        key: folder.join(key),
        ca: folder.join(ca),
    };
    let secret = files("tls.crt", "tls.key", "ca.crt");
    if secret.cert.exists() {
        return secret;
    }
    let of = |stem: &str| files(&format!("{stem}.pem"), &format!("{stem}.key"), "ca.pem");
    let named = name.map(of).filter(|named| named.cert.exists());
    named.unwrap_or_else(|| of(role.as_str()))
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

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        for here in [
            "http://127.0.0.1:7000",
            "127.8.9.1:7000",
            "https://localhost:7000/",
            "http://[::1]:7000",
        ] {
            assert!(is_loopback(here), "{here}");
        }
        for elsewhere in [
            "http://10.0.0.1:7000",
            "coordinator:7000",
            "http://localhost.example:7000",
            "http://0.0.0.0:7000",
            "[2001:db8::1]:7000",
            "127.0.0.1.example:7000",
        ] {
            assert!(!is_loopback(elsewhere), "{elsewhere}");
        }
    }
}
