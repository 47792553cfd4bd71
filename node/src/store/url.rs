//! Naming a store: `memory`, `embedded:PATH`, `etcd://host:port,host:port/prefix`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Keys of a cluster in etcd start with this unless the URL says otherwise.
const DEFAULT_PREFIX: &str = "guild";
/// Endpoints one URL may name.
const MAX_ENDPOINTS: usize = 16;

/// Which store a coordinator uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StoreUrl {
    /// In memory: nothing outlives the process.
    #[default]
    Memory,
    /// One durable file.
    Embedded(PathBuf),
    /// An etcd cluster.
    Etcd {
        /// `host:port` of its members.
        endpoints: Vec<String>,
        /// What the keys start with, without slashes around it.
        prefix: String,
    },
}

/// Why a text names no store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; a store is `memory`, `embedded:PATH` or `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`")]
pub struct StoreUrlError(String);

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<StoreUrl, StoreUrlError> {
        if text == "memory" {
            return Ok(StoreUrl::Memory);
        }
        if let Some(path) = text.strip_prefix("embedded:") {
            if path.is_empty() || path.ends_with('/') {
                return Err(StoreUrlError(format!("`{text}` names no file")));
            }
            return Ok(StoreUrl::Embedded(PathBuf::from(path)));
        }
        let Some(rest) = text.strip_prefix("etcd://") else {
            return Err(StoreUrlError(format!("`{text}` is no store")));
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = match prefix.trim_matches('/') {
            "" => DEFAULT_PREFIX,
            prefix => prefix,
        };
        let endpoints: Vec<String> = hosts.split(',').map(str::to_owned).collect();
        if endpoints.len() > MAX_ENDPOINTS {
            return Err(StoreUrlError(format!(
                "{} endpoints are more than {MAX_ENDPOINTS}",
                endpoints.len()
            )));
        }
        for endpoint in &endpoints {
            let well_formed = endpoint
                .parse::<tonic::codegen::http::uri::Authority>()
                .is_ok_and(|a| a.port_u16().is_some() && !endpoint.contains('@'));
            if !well_formed {
                return Err(StoreUrlError(format!("`{endpoint}` is not HOST:PORT")));
            }
        }
        Ok(StoreUrl::Etcd {
            endpoints,
            prefix: prefix.to_owned(),
        })
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::Memory => f.write_str("memory"),
            StoreUrl::Embedded(path) => write!(f, "embedded:{}", path.display()),
            StoreUrl::Etcd { endpoints, prefix } => {
                write!(f, "etcd://{}/{prefix}", endpoints.join(","))
            }
        }
    }
}
