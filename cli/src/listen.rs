//! Opening the doors: every listener is bound before anything is loaded, and
//! none leaves loopback unless the operator says so.

use std::net::{SocketAddr, ToSocketAddrs as _};

use guild_node::serve;
use tokio::net::TcpListener;

use crate::failure::Failure;
use crate::security::Protection;

/// Where a node of the same process listens: the system chooses the port.
pub(crate) const EPHEMERAL: &str = "127.0.0.1:0";

/// Binds `address`, given by `--flag`.
///
/// # Errors
/// An address that others can reach while protection is lacking; one that is taken.
pub(crate) async fn bind(
    flag: &str,
    address: &str,
    protection: Protection,
) -> Result<TcpListener, Failure> {
    let resolved: Vec<SocketAddr> = address
        .to_socket_addrs()
        .map_err(|error| {
            Failure::usage(format!(
                "--{flag}: `{address}` is no address to listen on: {error}"
            ))
            .hint(format!("write HOST:PORT, such as --{flag} 127.0.0.1:0"))
        })?
        .collect();
    if let Protection::Lacks(what) = protection
        && !resolved.iter().all(|a| a.ip().is_loopback())
    {
        return Err(Failure::usage(format!(
            "--{flag}: {address} is reachable from other machines, and this lacks {what}"
        ))
        .hint("listen on 127.0.0.1, or close the network in front of it and say --insecure"));
    }
    serve::bind(address)
        .await
        .map_err(|error| Failure::of(&error).hint(format!("the address comes from --{flag}")))
}

/// The address a listener really has.
pub(crate) fn address_of(listener: &TcpListener) -> Result<SocketAddr, Failure> {
    listener
        .local_addr()
        .map_err(|error| Failure::network(format!("a listener has no address: {error}")))
}

/// What to write in a URL to reach a listener from this machine.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{bind, reachable};
    use crate::security::Protection;

    const LACKING: Protection = Protection::Lacks("--tls-cert");

    #[tokio::test]
    async fn only_loopback_is_open_by_default() {
        for open in ["0.0.0.0:0", "[::]:0"] {
            let error = bind("http", open, LACKING).await.unwrap_err();
            assert!(error.message().contains("--http"), "{}", error.message());
            assert!(error.hints().iter().any(|h| h.contains("--insecure")));
        }
        assert!(bind("http", "127.0.0.1:0", LACKING).await.is_ok());
        assert!(bind("http", "localhost:0", LACKING).await.is_ok());
        assert!(bind("http", "0.0.0.0:0", Protection::Enough).await.is_ok());
    }

    #[tokio::test]
    async fn a_taken_or_malformed_address_is_named() {
        let first = bind("grpc", "127.0.0.1:0", LACKING).await.unwrap();
        let taken = first.local_addr().unwrap().to_string();
        let error = bind("grpc", &taken, LACKING).await.unwrap_err();
        assert!(error.message().contains(&taken), "{}", error.message());
        let error = bind("grpc", "127.0.0.1", LACKING).await.unwrap_err();
        assert!(error.message().contains("--grpc"), "{}", error.message());
    }

    #[test]
    fn an_unspecified_address_is_reached_over_loopback() {
        assert_eq!(
            reachable("0.0.0.0:8000".parse().unwrap()),
            "127.0.0.1:8000".parse().unwrap()
        );
        assert_eq!(
            reachable("10.1.2.3:8000".parse().unwrap()),
            "10.1.2.3:8000".parse().unwrap()
        );
    }
}
