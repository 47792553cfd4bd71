//! What is asked of a peer beyond what TLS itself asks: the same cluster and the right role.

use std::fmt;
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

use super::{Identity, Role};

/// Why a peer with a valid certificate is refused all the same.
#[derive(Debug, thiserror::Error)]
enum Stranger {
    #[error("the peer's certificate {0}")]
    Unnamed(#[from] super::IdentityError),
    #[error("the peer belongs to cluster {theirs}, this is {ours}")]
    Cluster { theirs: String, ours: String },
    #[error("the peer has the role {theirs}, and only {allowed} may be at the other end here")]
    Role { theirs: Role, allowed: String },
}

fn admit(
    certificate: &CertificateDer<'_>,
    cluster: &str,
    peers: &'static [Role],
) -> Result<(), Stranger> {
    let peer = Identity::of(certificate)?;
    if peer.cluster != cluster {
        return Err(Stranger::Cluster {
            theirs: peer.cluster,
            ours: cluster.to_owned(),
        });
    }
    if !peers.contains(&peer.role) {
        let allowed: Vec<&str> = peers.iter().map(|role| role.as_str()).collect();
        return Err(Stranger::Role {
            theirs: peer.role,
            allowed: allowed.join(" or "),
        });
    }
    Ok(())
}

fn refuse(stranger: Stranger) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(stranger))))
}

/// The error of a verifier for a person.
pub(super) fn in_words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "it has expired".to_owned(),
        // The latter when the CAs have one name.
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "it was issued by another CA".to_owned(),
        Error::InvalidCertificate(CertificateError::Revoked) => "it has been revoked".to_owned(),
        other => other.to_string(),
    }
}

/// Judges peers: by TLS with `chain`, then by what their certificate says of them.
pub(super) struct Judge<V: ?Sized> {
    chain: Arc<V>,
    cluster: String,
    peers: &'static [Role],
}

/// Judges those who connect here.
pub(super) type Clients = Judge<dyn ClientCertVerifier>;

/// Judges those who are dialled from here.
pub(super) type Servers = Judge<dyn ServerCertVerifier>;

impl<V: ?Sized> Judge<V> {
    pub(super) fn new(chain: Arc<V>, cluster: String, peers: &'static [Role]) -> Judge<V> {
        Judge {
            chain,
            cluster,
            peers,
        }
    }

    /// Of a peer with a valid certificate.
    fn admit(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        admit(certificate, &self.cluster, self.peers).map_err(refuse)
    }
}

impl<V: ?Sized> fmt::Debug for Judge<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Judge").field(&self.peers).finish()
    }
}

/// What both kinds of verifiers leave to `chain`.
macro_rules! signatures_by_chain {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.chain.verify_tls12_signature(message, cert, dss)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.chain.verify_tls13_signature(message, cert, dss)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.chain.supported_verify_schemes()
        }
    };
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        self.admit(end_entity)?;
        Ok(verified)
    }

    signatures_by_chain!();
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let check = |name: &ServerName<'_>| {
            self.chain
                .verify_server_cert(end_entity, intermediates, name, ocsp_response, now)
        };
        let verified = match check(server_name) {
            // A role without a fixed address has a name of its own for all of them.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => {
                let peer = Identity::of(end_entity).map_err(|error| refuse(error.into()))?;
                let name = ServerName::try_from(peer.anywhere())
                    .map_err(|_| CertificateError::NotValidForName)?;
                check(&name)?
            }
            verdict => verdict?,
        };
        self.admit(end_entity)?;
        Ok(verified)
    }

    signatures_by_chain!();
}

/// The one certificate of this process, whoever asks.
#[derive(Debug)]
pub(super) struct Single(pub(super) Arc<CertifiedKey>);

impl ResolvesServerCert for Single {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl ResolvesClientCert for Single {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
