//! Client side of a gRPC connection: one set of HTTP/2 settings for every
//! control-plane call this process makes.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::exit::{ExitKind, HasExitKind};
use crate::serve;

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

/// A channel to `address` (`http://host:port` or `host:port`) that connects on
/// first use and again whenever the connection is lost. Silence of the peer is
/// noticed by HTTP/2 pings.
///
/// # Errors
/// `address` has no host or port, or a scheme other than http.
pub fn lazy(address: &str) -> Result<Channel, AddressError> {
    Ok(endpoint(address)?.connect_lazy())
}

/// Whether `address` can be dialled, without dialling it.
///
/// # Errors
/// As [`lazy`].
pub fn check(address: &str) -> Result<(), AddressError> {
    endpoint(address).map(|_| ())
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
    if uri.scheme_str() != Some("http") {
        return Err(refuse("only the scheme http is supported"));
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
    use super::endpoint;

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
            let error = endpoint(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("`{bad}`")), "{error}");
        }
    }
}
