//! Mutual TLS: who is let in, who is trusted, and how certificates change hands.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use guild_node::channel::Dialer;
use guild_node::serve::{Server, bind};
use guild_node::tls::{FrontTls, Identity, Role, Roots, Tls, TlsFiles};
use guild_node::{RECHECK, Shutdown};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// What a probe of a server may take. Silence is a refusal too.
const PATIENCE: Duration = Duration::from_secs(5);

/// A CA of the test.
struct Ca {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

/// What a certificate says.
#[derive(Clone)]
struct Leaf {
    uris: Vec<String>,
    hosts: Vec<&'static str>,
    /// Days from now.
    valid: (i64, i64),
    serial: u64,
}

/// The one that is right for a role.
fn leaf(role: &str) -> Leaf {
    Leaf {
        uris: vec![format!("spiffe://guild/test/role/{role}")],
        hosts: vec!["localhost", "127.0.0.1"],
        valid: (-1, 30),
        serial: 1,
    }
}

impl Ca {
    fn new() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "CA of the test");
        let pem = params.self_signed(&key).unwrap().pem();
        Ca { params, key, pem }
    }

    /// Certificate and key, in PEM.
    fn issue(&self, leaf: &Leaf) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let hosts: Vec<String> = leaf.hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        for uri in &leaf.uris {
            let uri = SanType::URI(uri.as_str().try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let day = |days: i64| OffsetDateTime::now_utc() + time::Duration::days(days);
        (params.not_before, params.not_after) = (day(leaf.valid.0), day(leaf.valid.1));
        params.serial_number = Some(SerialNumber::from(leaf.serial));
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let issuer = Issuer::from_params(&self.params, &self.key);
        let cert = params.signed_by(&key, &issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    /// A revocation list with one certificate on it.
    fn revoke(&self, serial: u64) -> String {
        let now = OffsetDateTime::now_utc();
        let params = CertificateRevocationListParams {
            this_update: now - time::Duration::days(1),
            next_update: now + time::Duration::days(30),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now - time::Duration::hours(1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer = Issuer::from_params(&self.params, &self.key);
        params.signed_by(&issuer).unwrap().pem().unwrap()
    }
}

/// The files of a node, in a folder of their own.
struct Files {
    dir: TempDir,
}

impl Files {
    fn new(ca: &str, (cert, key): (String, String)) -> Files {
        let files = Files {
            dir: TempDir::new().unwrap(),
        };
        files.write("ca.pem", ca);
        files.replace((cert, key));
        files
    }

    fn replace(&self, (cert, key): (String, String)) {
        self.write("cert.pem", &cert);
        self.write("key.pem", &key);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn open(&self, role: Role) -> Result<Tls, guild_node::FileError> {
        let files = TlsFiles {
            cert: self.path("cert.pem"),
            key: self.path("key.pem"),
            ca: self.path("ca.pem"),
        };
        Tls::open(files, role)
    }
}

fn tls(ca: &Ca, role: Role) -> (Files, Tls) {
    let files = Files::new(&ca.pem, ca.issue(&leaf(role.as_str())));
    let tls = files.open(role).unwrap();
    (files, tls)
}

/// Serves health for `peers`, until the guard is dropped. Returns the port.
async fn serve(tls: &Tls, peers: &'static [Role]) -> (u16, tokio_util::sync::DropGuard) {
    let listener = bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Server::new().await.with_tls(Some(tls.acceptor(peers)));
    server.health().set_serving("", true).await;
    let end = tokio_util::sync::CancellationToken::new();
    let serving = server.run(listener, Shutdown::new(), Duration::ZERO);
    tokio::spawn(end.clone().run_until_cancelled_owned(serving));
    (port, end.drop_guard())
}

/// Whether a request gets through.
async fn asks(channel: Channel) -> Result<(), String> {
    let mut client = HealthClient::new(channel);
    let asked = client.check(HealthCheckRequest::default());
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(guild_node::serve::chain(&status)),
        Err(_) => Err("no answer".to_owned()),
    }
}

/// A client that trusts every server of `ca` and shows whatever certificate it was given.
fn outsider(port: u16, ca: &Ca, shown: Option<(String, String)>) -> Channel {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        None => config.with_no_client_auth(),
        Some((cert, key)) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(("127.0.0.1", port)).await?;
            let name = "localhost".try_into().unwrap();
            Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connect)
}

#[tokio::test]
async fn a_server_takes_its_own_cluster_in_the_right_role_and_nobody_else() {
    let ca = Ca::new();
    let revoked_ca = format!("{}{}", ca.pem, ca.revoke(77));
    let files = Files::new(&revoked_ca, ca.issue(&leaf("expert")));
    let server = files.open(Role::Expert).unwrap();
    let (port, _guard) = serve(&server, Role::SENDING_ROWS).await;

    let changed = |change: &dyn Fn(&mut Leaf)| {
        let mut leaf = leaf("attention");
        change(&mut leaf);
        Some(ca.issue(&leaf))
    };
    let strangers = [
        ("no certificate", None),
        ("another CA", Some(Ca::new().issue(&leaf("attention")))),
        ("expired", changed(&|leaf| leaf.valid = (-30, -1))),
        ("not valid yet", changed(&|leaf| leaf.valid = (1, 30))),
        ("revoked", changed(&|leaf| leaf.serial = 77)),
        ("operator", Some(ca.issue(&leaf("operator")))),
        ("unheard-of role", Some(ca.issue(&leaf("admin")))),
        ("no role", changed(&|leaf| leaf.uris.clear())),
        (
            "two roles",
            changed(&|leaf| {
                leaf.uris
                    .push("spiffe://guild/test/role/coordinator".to_owned());
            }),
        ),
        (
            "another cluster",
            changed(&|leaf| leaf.uris = vec!["spiffe://guild/other/role/attention".to_owned()]),
        ),
    ];
    for (who, shown) in strangers {
        let answer = asks(outsider(port, &ca, shown)).await;
        assert!(answer.is_err(), "{who} was let in");
    }
    let plain = Dialer::Plain.lazy(&format!("127.0.0.1:{port}")).unwrap();
    assert!(asks(plain).await.is_err(), "plaintext was let in");

    for role in [
        "attention",
        "expert",
        "coordinator",
        "attention/attention-0",
    ] {
        let shown = Some(ca.issue(&leaf(role)));
        assert_eq!(asks(outsider(port, &ca, shown)).await, Ok(()), "{role}");
    }
    // And by the door that nodes use themselves.
    let (_files, attention) = tls(&ca, Role::Attention);
    let dialer = Dialer::to(Role::TAKING_ROWS, Some(&attention));
    for address in ["http://127.0.0.1", "https://localhost", "127.0.0.1"] {
        let channel = dialer.lazy(&format!("{address}:{port}")).unwrap();
        assert_eq!(asks(channel).await, Ok(()), "{address}");
    }
}

#[tokio::test]
async fn a_client_trusts_its_own_cluster_in_the_right_role_and_nobody_else() {
    let ca = Ca::new();
    let revoked_ca = format!("{}{}", ca.pem, ca.revoke(77));
    let files = Files::new(&revoked_ca, ca.issue(&leaf("attention")));
    let attention = files.open(Role::Attention).unwrap();
    let dialer = Dialer::to(Role::TAKING_ROWS, Some(&attention));
    let connects = |shown: (String, String)| {
        let dialer = dialer.clone();
        async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(
                    vec![CertificateDer::from_pem_slice(shown.0.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(shown.1.as_bytes()).unwrap(),
                )
                .unwrap();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            let rogue = tokio::spawn(async move {
                let (stream, _) = listener.accept().await.unwrap();
                let stream = acceptor.accept(stream).await;
                tokio::time::sleep(PATIENCE).await;
                drop(stream);
            });
            let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
            let connected = tokio::time::timeout(PATIENCE, dialer.connect(endpoint)).await;
            rogue.abort();
            connected
                .unwrap()
                .map(|_| ())
                .map_err(|e| guild_node::serve::chain(&e))
        }
    };
    let changed = |change: &dyn Fn(&mut Leaf)| {
        let mut leaf = leaf("expert");
        change(&mut leaf);
        ca.issue(&leaf)
    };
    let rogues = [
        ("another CA", Ca::new().issue(&leaf("expert"))),
        ("expired", changed(&|leaf| leaf.valid = (-30, -1))),
        ("revoked", changed(&|leaf| leaf.serial = 77)),
        (
            "another host",
            changed(&|leaf| leaf.hosts = vec!["10.0.0.1", "example.com"]),
        ),
        ("no host", changed(&|leaf| leaf.hosts.clear())),
        ("attention", ca.issue(&leaf("attention"))),
        ("coordinator", ca.issue(&leaf("coordinator"))),
        ("no role", changed(&|leaf| leaf.uris.clear())),
        (
            "another cluster",
            changed(&|leaf| leaf.uris = vec!["spiffe://guild/other/role/expert".to_owned()]),
        ),
    ];
    for (who, shown) in rogues {
        assert!(connects(shown).await.is_err(), "{who} was trusted");
    }
    assert_eq!(connects(ca.issue(&leaf("expert"))).await, Ok(()));
    // A role without fixed addresses, and one that only says to be it.
    let roaming = changed(&|leaf| leaf.hosts = vec!["expert.test.guild.internal"]);
    assert_eq!(connects(roaming).await, Ok(()));
    for host in [
        "attention.test.guild.internal",
        "expert.other.guild.internal",
    ] {
        let shown = changed(&|leaf| leaf.hosts = vec![host]);
        assert!(connects(shown).await.is_err(), "{host} was trusted");
    }

    // A server without TLS gets nothing either.
    let plain = bind("127.0.0.1:0").await.unwrap();
    let address = plain.local_addr().unwrap();
    let server = Server::new().await;
    let serving = tokio::spawn(server.run(plain, Shutdown::new(), Duration::ZERO));
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let connected = tokio::time::timeout(PATIENCE * 2, dialer.connect(endpoint)).await;
    assert!(connected.unwrap().is_err());
    serving.abort();
}

#[tokio::test]
async fn new_files_are_used_by_new_handshakes_and_old_connections_stand() {
    let (old, new) = (Ca::new(), Ca::new());
    let server_files = Files::new(&old.pem, old.issue(&leaf("expert")));
    let server = server_files.open(Role::Expert).unwrap();
    let (port, _guard) = serve(&server, Role::SENDING_ROWS).await;
    let client_files = Files::new(&old.pem, old.issue(&leaf("attention")));
    let client = client_files.open(Role::Attention).unwrap();
    let dialer = Dialer::to(Role::TAKING_ROWS, Some(&client));
    let address = format!("127.0.0.1:{port}");
    let standing = dialer.lazy(&address).unwrap();
    assert_eq!(asks(standing.clone()).await, Ok(()));

    // Half of a replacement, and rubbish: what was there before stays.
    server_files.write("cert.pem", &new.issue(&leaf("expert")).0);
    client_files.write("key.pem", "not a key");
    tokio::time::sleep(RECHECK * 2).await;
    assert_eq!(asks(dialer.lazy(&address).unwrap()).await, Ok(()));

    // The server moves to the new CA: the old connection stands, a new one of the old is refused.
    server_files.write("ca.pem", &new.pem);
    server_files.replace(new.issue(&leaf("expert")));
    tokio::time::sleep(RECHECK * 2).await;
    assert_eq!(asks(standing.clone()).await, Ok(()));
    assert!(asks(dialer.lazy(&address).unwrap()).await.is_err());

    client_files.write("ca.pem", &new.pem);
    client_files.replace(new.issue(&leaf("attention")));
    tokio::time::sleep(RECHECK * 2).await;
    assert_eq!(asks(dialer.lazy(&address).unwrap()).await, Ok(()));
    assert_eq!(asks(standing).await, Ok(()));
}

#[tokio::test]
async fn silence_in_a_handshake_keeps_nobody_out() {
    let ca = Ca::new();
    let (_files, server) = tls(&ca, Role::Expert);
    let (port, _guard) = serve(&server, Role::SENDING_ROWS).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
    }
    let (_files, attention) = tls(&ca, Role::Attention);
    let dialer = Dialer::to(Role::TAKING_ROWS, Some(&attention));
    let channel = dialer.lazy(&format!("127.0.0.1:{port}")).unwrap();
    assert_eq!(asks(channel).await, Ok(()));
}

#[tokio::test]
async fn probes_find_health_without_a_certificate_and_nothing_else() {
    let ca = Ca::new();
    let (_files, expert) = tls(&ca, Role::Expert);
    let probes = bind("127.0.0.1:0").await.unwrap();
    let address = probes.local_addr().unwrap().to_string();
    drop(probes);
    let closed = bind("127.0.0.1:0").await.unwrap();
    let inner = closed.local_addr().unwrap().to_string();
    let server = Server::new()
        .await
        .listing("guild.experts.v1.Experts")
        .with_tls(Some(expert.acceptor(Role::SENDING_ROWS)))
        .probed_at(Some(address.clone()));
    let health = server.health();
    let end = Shutdown::new();
    let serving = tokio::spawn(server.run(closed, end.clone(), PATIENCE));
    let ask = async |service: &str| {
        let mut client = HealthClient::new(Dialer::Plain.lazy(&address).unwrap());
        let service = service.to_owned();
        let answer = client.check(HealthCheckRequest { service }).await;
        answer.map(|answer| answer.get_ref().status).ok()
    };
    let not_serving = tokio::time::timeout(PATIENCE, async {
        while ask("").await != Some(2) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    not_serving.await.unwrap();
    health.set_serving("", true).await;
    assert_eq!(ask("").await, Some(1));
    assert!(asks(Dialer::Plain.lazy(&inner).unwrap()).await.is_err());
    end.trigger();
    assert!(serving.await.unwrap().is_ok());
}

#[tokio::test]
async fn the_front_door_shows_a_certificate_and_asks_for_none() {
    let ca = Ca::new();
    let files = Files::new(&ca.pem, ca.issue(&leaf("coordinator")));
    let front = FrontTls::open(files.path("cert.pem"), files.path("key.pem")).unwrap();
    let listener = bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Server::new().await.with_tls(Some(front.acceptor()));
    let serving = tokio::spawn(server.run(listener, Shutdown::new(), Duration::ZERO));
    let ask = async |dialer: Dialer| {
        asks(dialer.lazy(&format!("https://localhost:{port}")).unwrap()).await
    };
    let roots = Roots::open(&files.path("ca.pem")).unwrap();
    assert_eq!(ask(Dialer::Server(roots)).await, Ok(()));
    files.write("ca.pem", &Ca::new().pem);
    let others = Roots::open(&files.path("ca.pem")).unwrap();
    assert!(ask(Dialer::Server(others)).await.is_err());
    serving.abort();
}

#[test]
fn files_that_are_of_no_use_are_refused_by_name() {
    let ca = Ca::new();
    let good = || ca.issue(&leaf("expert"));
    let expired = Leaf {
        valid: (-30, -1),
        ..leaf("expert")
    };
    let nobody = Leaf {
        uris: Vec::new(),
        ..leaf("expert")
    };
    let cases = [
        ("cert.pem", "the role expert", Role::Attention, good()),
        ("cert.pem", "expired", Role::Expert, ca.issue(&expired)),
        (
            "cert.pem",
            "another CA",
            Role::Expert,
            Ca::new().issue(&leaf("expert")),
        ),
        ("cert.pem", "names no role", Role::Expert, ca.issue(&nobody)),
        (
            "key.pem",
            "does not go with",
            Role::Expert,
            (good().0, good().1),
        ),
        (
            "key.pem",
            "no private key",
            Role::Expert,
            (good().0, good().0),
        ),
        (
            "cert.pem",
            "no certificate",
            Role::Expert,
            (good().1, good().1),
        ),
        (
            "cert.pem",
            "no certificate",
            Role::Expert,
            (String::new(), good().1),
        ),
    ];
    for (file, problem, role, pair) in cases {
        let error = Files::new(&ca.pem, pair)
            .open(role)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(file) && error.contains(problem),
            "{problem}: {error}"
        );
    }
    for ca in [
        "",
        "rubbish",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        let error = Files::new(ca, good())
            .open(Role::Expert)
            .unwrap_err()
            .to_string();
        assert!(error.contains("ca.pem"), "{error}");
    }
    let error = Files::new(&ca.pem, good());
    std::fs::remove_file(error.path("key.pem")).unwrap();
    assert!(
        error
            .open(Role::Expert)
            .unwrap_err()
            .to_string()
            .contains("key.pem")
    );
}

#[test]
fn a_certificate_with_a_name_is_for_that_node_alone() {
    let ca = Ca::new();
    let named = Files::new(&ca.pem, ca.issue(&leaf("expert/expert-3")));
    let named = named.open(Role::Expert).unwrap();
    assert!(named.check_name("expert-3").is_ok());
    assert!(
        named
            .check_name("expert-4")
            .unwrap_err()
            .to_string()
            .contains("expert-3")
    );
    let (_files, any) = tls(&ca, Role::Expert);
    assert!(any.check_name("expert-4").is_ok());
    let whole = Identity::new("test", Role::Expert, Some("expert-3")).unwrap();
    assert_eq!(named.identity(), whole);
}
