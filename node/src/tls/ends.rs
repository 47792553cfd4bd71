//! The two ends of a TLS connection over TCP.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{FrontTls, Identity, Role, Tls};

/// What a handshake may take, on either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that was accepted.
pub(crate) type ServerStream = tokio_rustls::server::TlsStream<TcpStream>;
/// A connection that was dialled.
pub(crate) type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Turns accepted connections into TLS ones. Clones share the certificates.
#[derive(Clone, Debug)]
pub struct Acceptor(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Mutual { tls: Tls, peers: &'static [Role] },
    Front(FrontTls),
}

impl Acceptor {
    pub(super) fn mutual(tls: Tls, peers: &'static [Role]) -> Acceptor {
        Acceptor(Kind::Mutual { tls, peers })
    }

    pub(super) fn front(tls: FrontTls) -> Acceptor {
        Acceptor(Kind::Front(tls))
    }

    /// The handshake, and who the peer is where one is asked.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(ServerStream, Option<Identity>)> {
        let config = match &self.0 {
            Kind::Mutual { tls, peers } => {
                Arc::new(tls.server_config(peers).map_err(io::Error::other)?)
            }
            Kind::Front(tls) => tls.server_config(),
        };
        let accepting = TlsAcceptor::from(config).accept(stream);
        let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await??;
        let peer = match &self.0 {
            Kind::Front(_) => None,
            Kind::Mutual { .. } => Some(peer_of(&stream)?),
        };
        Ok((stream, peer))
    }
}

fn peer_of(stream: &ServerStream) -> io::Result<Identity> {
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = chain
        .first()
        .ok_or_else(|| io::Error::other("the peer showed no certificate"))?;
    Identity::of(leaf).map_err(io::Error::other)
}

/// Connects to `host`, which the certificate found there has to be good for.
pub(crate) async fn dial(
    config: ClientConfig,
    host: &str,
    stream: TcpStream,
) -> io::Result<ClientStream> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream);
    tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await?
}
