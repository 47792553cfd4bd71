//! Clients with certificates that a cluster's own CA has signed and that are of no use, and clients
//! without any: they look only at what is shown to them, as an attacker would.

use std::path::Path;
use std::sync::Arc;

use guild_node::tls::Role;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use time::{Duration, OffsetDateTime};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

/// The CA that `guild certs` has left in a folder.
pub(crate) struct Ca {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

/// A certificate and its key, in PEM.
pub(crate) type Shown = (String, String);

impl Ca {
    pub(crate) fn of(dir: &Path) -> Ca {
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = (DnType::CommonName, "Guild CA of guild");
        params.distinguished_name.push(name.0, name.1);
        Ca {
            params,
            key: KeyPair::from_pem(&read("ca.key")).unwrap(),
            pem: read("ca.pem"),
        }
    }

    /// Signs for `uris`, valid between two days from now.
    pub(crate) fn sign(&self, uris: &[&str], valid: (i64, i64)) -> Shown {
        let hosts = ["localhost", "127.0.0.1"].map(str::to_owned);
        let mut params = CertificateParams::new(hosts).unwrap();
        for &uri in uris {
            let uri = SanType::URI(uri.try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let day = |days| OffsetDateTime::now_utc() + Duration::days(days);
        (params.not_before, params.not_after) = (day(valid.0), day(valid.1));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let cert = params.signed_by(&key, &issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    /// What is right for a role in every respect.
    pub(crate) fn right(&self, role: Role) -> Shown {
        self.sign(&[&uri("guild", role.as_str())], (-1, 30))
    }

    /// (what is wrong, what is shown) of certificates that name `role` and are of no use.
    pub(crate) fn useless(&self, role: Role) -> Vec<(&'static str, Shown)> {
        let own = uri("guild", role.as_str());
        let (now, other) = ((-1, 30), uri("other", role.as_str()));
        let named = uri("guild", "admin");
        vec![
            ("expired", self.sign(&[&own], (-30, -1))),
            ("not valid yet", self.sign(&[&own], (1, 30))),
            ("no role", self.sign(&[], now)),
            (
                "two roles",
                self.sign(&[&own, &uri("guild", "operator")], now),
            ),
            ("another cluster", self.sign(&[&other], now)),
            ("a role that is none", self.sign(&[&named], now)),
        ]
    }

    /// A connection to `address` that trusts every server of this CA and shows what it was given.
    pub(crate) fn dial(&self, address: &str, shown: Option<Shown>) -> Channel {
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap();
        roots.add(root).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match shown {
            None => config.with_no_client_auth(),
            Some((cert, key)) => {
                let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config.with_client_auth_cert(vec![cert], key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let address = address.to_owned();
        let connect = tower::service_fn(move |_| {
            let (connector, address) = (connector.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = "localhost".try_into().unwrap();
                Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect)
    }
}

fn uri(cluster: &str, role: &str) -> String {
    format!("spiffe://guild/{cluster}/role/{role}")
}
