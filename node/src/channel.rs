//! Client side of a gRPC connection: one set of HTTP/2 settings for every
//! control-plane call this process makes.

use std::future::Future;
use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::exit::{ExitKind, HasExitKind};
use crate::serve;
use crate::tls::{ClientStream, Role, Roots, Tls, dial};

/// How long a TCP connection may take to come up.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// An address that cannot be dialled.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{address}` is not an address to connect to ({reason}); write http://HOST:PORT or HOST:PORT"
)]
pub struct AddressError {
    /// What was given.
    pub address: String,
    /// What is wrong with it.
    pub reason: String,
}

impl HasExitKind for AddressError {
    fn exit_kind(&self) -> ExitKind {
        ExitKind::Usage
    }
}

/// How connections to others are made. Clones share the certificates.
#[derive(Clone, Debug, Default)]
pub enum Dialer {
    /// Without TLS.
    #[default]
    Plain,
    /// Mutual TLS with a node of one of these roles.
    Mutual {
        /// Who dials.
        tls: Tls,
        /// Who may answer.
        peers: &'static [Role],
    },
    /// TLS with a server that asks for no certificate.
    Server(Roots),
}

impl Dialer {
    /// With mutual TLS where this process has it, without otherwise.
    pub fn to(peers: &'static [Role], tls: Option<&Tls>) -> Dialer {
        match tls.cloned() {
            Some(tls) => Dialer::Mutual { tls, peers },
            None => Dialer::Plain,
        }
    }

    /// A channel to `address` (`host:port`, with or without `http://` or `https://`) that
    /// connects on first use and again whenever the connection is lost. Silence of the peer is
    /// noticed by HTTP/2 pings.
    ///
    /// # Errors
    /// `address` has no host or port, or a scheme that this dialer does not speak.
    pub fn lazy(&self, address: &str) -> Result<Channel, AddressError> {
        Ok(self.lazily(self.endpoint(address)?))
    }

    /// The same for a peer whose silence must not last: it is pinged when nothing has come from it
    /// for `quiet`, and the connection is given up when that has no answer within `limit`. How
    /// long an answer to a request takes does not matter.
    ///
    /// # Errors
    /// As [`Dialer::lazy`].
    pub fn lazy_alert(
        &self,
        address: &str,
        quiet: Duration,
        limit: Duration,
    ) -> Result<Channel, AddressError> {
        let endpoint = self.endpoint(address)?.http2_keep_alive_interval(quiet);
        Ok(self.lazily(endpoint.keep_alive_timeout(limit)))
    }

    fn lazily(&self, endpoint: Endpoint) -> Channel {
        match self {
            Dialer::Plain => endpoint.connect_lazy(),
            _ => endpoint.connect_with_connector_lazy(self.connector()),
        }
    }

    /// Whether `address` can be dialled, without dialling it.
    ///
    /// # Errors
    /// As [`Dialer::lazy`].
    pub fn check(&self, address: &str) -> Result<(), AddressError> {
        self.endpoint(address).map(|_| ())
    }

    /// Connects an endpoint that has its own settings.
    ///
    /// # Errors
    /// Nobody answers there, or somebody who is not to be trusted.
    pub async fn connect(&self, endpoint: Endpoint) -> Result<Channel, tonic::transport::Error> {
        match self {
            Dialer::Plain => endpoint.connect().await,
            _ => endpoint.connect_with_connector(self.connector()).await,
        }
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, AddressError> {
        let endpoint = endpoint(address)?;
        if matches!(self, Dialer::Plain) && endpoint.uri().scheme_str() == Some("https") {
            return Err(AddressError {
                address: address.to_owned(),
                reason: "https needs the files for TLS, see --tls-ca".to_owned(),
            });
        }
        Ok(endpoint)
    }

    fn connector(
        &self,
    ) -> impl tower::Service<
        Uri,
        Response = TokioIo<ClientStream>,
        Error = io::Error,
        Future = impl Future<Output = io::Result<TokioIo<ClientStream>>> + Send,
    > + Send
    + 'static {
        let dialer = self.clone();
        tower::service_fn(move |uri: Uri| {
            let dialer = dialer.clone();
            async move {
                let host = uri.host().unwrap_or_default();
                let stream = TcpStream::connect((unbracketed(host), uri.port_u16().unwrap_or(443)));
                let stream = stream.await?;
                stream.set_nodelay(true)?;
                let config = dialer.client_config(&[b"h2"])?;
                Ok(TokioIo::new(dial(config, unbracketed(host), stream).await?))
            }
        })
    }

    /// A fresh configuration for every handshake: certificates may have been replaced.
    fn client_config(&self, protocols: &[&[u8]]) -> io::Result<rustls::ClientConfig> {
        let config = match self {
            Dialer::Plain => return Err(io::Error::other("this dialer has no TLS")),
            Dialer::Mutual { tls, peers } => tls.client_config(peers),
            Dialer::Server(roots) => roots.client_config(protocols),
        };
        config.map_err(io::Error::other)
    }

    /// A bare connection to `host` for HTTP/1.1.
    ///
    /// # Errors
    /// Nobody answers there, or somebody who is not to be trusted.
    pub async fn http1(&self, host: &str, port: u16) -> io::Result<Box<dyn Io>> {
        let host = unbracketed(host);
        let stream = TcpStream::connect((host, port)).await?;
        Ok(match self {
            Dialer::Plain => Box::new(stream),
            _ => Box::new(dial(self.client_config(&[b"http/1.1"])?, host, stream).await?),
        })
    }
}

/// Bytes in both directions.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// URLs have IPv6 addresses in brackets, sockets and certificates do not.
fn unbracketed(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

/// [`Dialer::lazy`] without TLS.
///
/// # Errors
/// As there.
pub fn lazy(address: &str) -> Result<Channel, AddressError> {
    Dialer::Plain.lazy(address)
}

fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
    let refuse = |reason: &str| AddressError {
        address: address.to_owned(),
        reason: reason.to_owned(),
    };
    let url = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let endpoint = Endpoint::from_shared(url).map_err(|e| refuse(&e.to_string()))?;
    let uri = endpoint.uri();
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(refuse("the scheme is neither http nor https"));
    }
    if uri.port_u16().is_none_or(|port| port == 0) {
        return Err(refuse("the port is missing"));
    }
    if uri
        .path_and_query()
        .is_some_and(|path| path.as_str() != "/")
    {
        return Err(refuse("a path has no meaning here"));
    }
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(serve::STREAM_WINDOW)
        .initial_connection_window_size(serve::CONNECTION_WINDOW)
        .http2_keep_alive_interval(serve::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(serve::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Dialer, endpoint};

    #[test]
    fn addresses_come_with_or_without_scheme() {
        assert_eq!(
            endpoint("127.0.0.1:7000").unwrap().uri().to_string(),
            "http://127.0.0.1:7000/"
        );
        assert!(endpoint("http://coordinator:7000").is_ok());
        assert!(endpoint("http://[::1]:7000/").is_ok());
    }

    #[test]
    fn what_cannot_be_dialled_is_refused_by_name() {
        for bad in [
            "",
            "host",
            "http://host",
            "https://host:1",
            "ftp://h:1",
            "h:0",
            "http://h:70000",
            "http://h:1/path",
            "a b:1",
        ] {
            let error = Dialer::Plain.check(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("`{bad}`")), "{error}");
        }
    }
}
