//! TLS between the processes of a cluster, and at its front door.
//!
//! Secret: how a process proves what it is. Every node has a certificate of the cluster's own CA
//! that names cluster and role in a URI, see [`Identity`]; on every internal connection both sides
//! check chain, time and role, the dialling side also that the certificate is good for the host it
//! dialled. Files are read again when they change, so certificates are replaced without a restart:
//! handshakes after that use the new ones, connections that stand are left alone.

mod check;
mod ends;
mod identity;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::watched::{FileError, Watched};

pub use ends::{Acceptor, HANDSHAKE_TIMEOUT};
pub(crate) use ends::{ClientStream, ServerStream, dial};
pub use identity::{Identity, IdentityError, Role};

/// The files of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The node's certificate, then those between it and the CA, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// The cluster's CA in PEM; revocation lists (`X509 CRL`) in the same file are heeded.
    pub ca: PathBuf,
}

/// A node's side of mutual TLS. Clones share the files.
#[derive(Clone, Debug)]
pub struct Tls {
    files: TlsFiles,
    material: Arc<Watched<Material>>,
}

/// What the files of a node come to.
struct Material {
    identity: Identity,
    key: Arc<CertifiedKey>,
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<dyn ServerCertVerifier>,
}

impl Tls {
    /// Reads the files of a node of `role`.
    ///
    /// # Errors
    /// A file cannot be read, key and certificate do not belong together, the certificate is not
    /// (or no longer) valid under the CA, or is for another role.
    pub fn open(files: TlsFiles, role: Role) -> Result<Tls, FileError> {
        let paths = vec![files.cert.clone(), files.key.clone(), files.ca.clone()];
        let material = {
            let files = files.clone();
            Watched::open(paths, move |contents| {
                Material::read(&files, role, contents)
            })?
        };
        Ok(Tls {
            files,
            material: Arc::new(material),
        })
    }

    /// Whether a node of this `name` may use the certificate: one that names a node is that
    /// node's alone.
    ///
    /// # Errors
    /// It names another node.
    pub fn check_name(&self, name: &str) -> Result<(), FileError> {
        match self.material.get().identity.name.as_deref() {
            Some(found) if found != name => Err(FileError::new(
                &self.files.cert,
                format!("is the certificate of {found}, and this node is {name}; see --name"),
            )),
            _ => Ok(()),
        }
    }

    /// Who this process is to others.
    pub fn identity(&self) -> Identity {
        self.material.get().identity.clone()
    }

    /// For a listener that only nodes of these roles may use.
    pub fn acceptor(&self, peers: &'static [Role]) -> Acceptor {
        Acceptor::mutual(self.clone(), peers)
    }

    /// For the next handshake with somebody who connects here.
    fn server_config(&self, peers: &'static [Role]) -> Result<ServerConfig, rustls::Error> {
        let material = self.material.get();
        let check = check::Clients::new(
            Arc::clone(&material.clients),
            material.identity.cluster.clone(),
            peers,
        );
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(check))
            .with_cert_resolver(Arc::new(check::Single(Arc::clone(&material.key))));
        // A resumed session would bring an old verdict on the peer with it.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    /// For the next handshake with somebody who is dialled from here.
    pub(crate) fn client_config(
        &self,
        peers: &'static [Role],
    ) -> Result<ClientConfig, rustls::Error> {
        let material = self.material.get();
        let check = check::Servers::new(
            Arc::clone(&material.servers),
            material.identity.cluster.clone(),
            peers,
        );
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(check))
            .with_client_cert_resolver(Arc::new(check::Single(Arc::clone(&material.key))));
        config.resumption = rustls::client::Resumption::disabled();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

impl Material {
    fn read(files: &TlsFiles, role: Role, contents: &[Vec<u8>]) -> Result<Material, FileError> {
        let [cert, key, ca] = contents else {
            return Err(FileError::new(&files.cert, "is not there"));
        };
        let key = certified(&files.cert, cert, &files.key, key)?;
        let (leaf, between) = key
            .cert
            .split_first()
            .ok_or_else(|| FileError::new(&files.cert, "holds no certificate"))?;
        let identity =
            Identity::of(leaf).map_err(|error| FileError::new(&files.cert, error.to_string()))?;
        if identity.role != role {
            let problem = format!(
                "is a certificate for the role {}, and this is {role}; `guild certs` makes one for each",
                identity.role
            );
            return Err(FileError::new(&files.cert, problem));
        }

        let bad_ca = |problem: String| FileError::new(&files.ca, problem);
        let roots = Arc::new(roots(&files.ca, ca)?);
        let revoked = CertificateRevocationListDer::pem_slice_iter(ca)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad_ca(format!("a revocation list in it is damaged: {error}")))?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .with_crls(revoked.clone())
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| bad_ca(error.to_string()))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| bad_ca(error.to_string()))?;
        // Nobody else would take it either: said here, where it can be mended.
        clients
            .verify_client_cert(leaf, between, UnixTime::now())
            .map_err(|error| {
                let problem = format!(
                    "is of no use under the CA in {}: {}",
                    files.ca.display(),
                    check::in_words(&error)
                );
                FileError::new(&files.cert, problem)
            })?;
        Ok(Material {
            identity,
            key,
            clients,
            servers,
        })
    }
}

/// The front door's certificate, which clients check and which asks nothing of them. Clones share
/// the files.
#[derive(Clone, Debug)]
pub struct FrontTls(Arc<Watched<Arc<ServerConfig>>>);

impl FrontTls {
    /// Reads certificate (with what stands between it and its CA) and key, both PEM.
    ///
    /// # Errors
    /// A file cannot be read or used, or the two do not belong together.
    pub fn open(cert: PathBuf, key: PathBuf) -> Result<FrontTls, FileError> {
        let paths = vec![cert.clone(), key.clone()];
        let watched = Watched::open(paths, move |contents| {
            let [cert_pem, key_pem] = contents else {
                return Err(FileError::new(&cert, "is not there"));
            };
            let key = certified(&cert, cert_pem, &key, key_pem)?;
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(|error| FileError::new(&cert, error.to_string()))?
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(check::Single(key)));
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
            Ok(Arc::new(config))
        })?;
        Ok(FrontTls(Arc::new(watched)))
    }

    /// For a listener of the front door.
    pub fn acceptor(&self) -> Acceptor {
        Acceptor::front(self.clone())
    }

    fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.get())
    }
}

/// The CAs that a client of the front door trusts.
#[derive(Clone, Debug)]
pub struct Roots(Arc<RootCertStore>);

impl Roots {
    /// Reads the certificates of CAs from a PEM file.
    ///
    /// # Errors
    /// The file cannot be read or holds no CA.
    pub fn open(path: &Path) -> Result<Roots, FileError> {
        let pem = std::fs::read(path)
            .map_err(|error| FileError::new(path, format!("cannot be read: {error}")))?;
        Ok(Roots(Arc::new(roots(path, &pem)?)))
    }

    /// `protocols`: those offered in ALPN, in order of preference.
    pub(crate) fn client_config(&self, protocols: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(Arc::clone(&self.0))
            .with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }
}

/// The one cryptography of this process.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certified(
    cert_path: &Path,
    cert: &[u8],
    key_path: &Path,
    key: &[u8],
) -> Result<Arc<CertifiedKey>, FileError> {
    let chain = certificates(cert_path, cert)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| {
        FileError::new(key_path, format!("holds no private key in PEM: {error}"))
    })?;
    CertifiedKey::from_der(chain, key, &provider())
        .map(Arc::new)
        .map_err(|error| {
            let problem = format!(
                "does not go with the certificate in {}: {error}",
                cert_path.display()
            );
            FileError::new(key_path, problem)
        })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| FileError::new(path, format!("is damaged PEM: {error}")))?;
    if found.is_empty() {
        return Err(FileError::new(path, "holds no certificate in PEM"));
    }
    Ok(found)
}

fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots
            .add(certificate)
            .map_err(|error| FileError::new(path, format!("a CA in it is unusable: {error}")))?;
    }
    Ok(roots)
}
