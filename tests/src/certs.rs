//! Certificates of a cluster, as `guild certs` makes them, and doors that are opened with them:
//! where the inside of a cluster is mutual TLS, a test is one of its roles like everybody else.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use guild_node::channel::Dialer;
use guild_node::tls::{Role, Tls, TlsFiles};
use guild_proto::cluster::v1::cluster_client::ClusterClient;
use guild_proto::inference::v1::inference_client::InferenceClient;
use tempfile::TempDir;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::process::guild;

/// A folder of certificates: a CA and one for each role.
#[derive(Clone, Debug)]
pub struct Certs {
    folder: PathBuf,
    /// A folder that goes with the last clone.
    _temporary: Option<Arc<TempDir>>,
}

impl Certs {
    /// In a folder of their own; `more` are flags of `guild certs`.
    pub fn new(more: &[&str]) -> Certs {
        let temporary = TempDir::new().unwrap();
        let mut certs = Certs::make(temporary.path(), more);
        certs._temporary = Some(Arc::new(temporary));
        certs
    }

    /// In this folder, which is kept.
    pub fn make(folder: &Path, more: &[&str]) -> Certs {
        let out = folder.to_str().unwrap();
        let (code, _, stderr) = guild(&[&["certs", "--out", out], more].concat());
        assert_eq!(code, 0, "{stderr}");
        Certs {
            folder: folder.to_owned(),
            _temporary: None,
        }
    }

    /// What `--tls-dir` is told.
    pub fn folder(&self) -> &str {
        self.folder.to_str().unwrap()
    }

    /// Path of one of the files.
    pub fn path(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_owned()
    }

    /// Those of a role.
    pub fn tls(&self, role: Role) -> Tls {
        let file = |name: String| self.folder.join(name);
        let files = TlsFiles {
            cert: file(format!("{role}.pem")),
            key: file(format!("{role}.key")),
            ca: file("ca.pem".to_owned()),
        };
        Tls::open(files, role).unwrap()
    }
}

/// Where to connect, and as whom. A bare URL is a door without TLS.
#[derive(Clone, Debug)]
pub struct Door {
    url: String,
    dialer: Dialer,
}

impl Door {
    /// Of a process inside a cluster that has these certificates, if any; whoever knocks is of
    /// the role `knocking`, and finds one of `inside`.
    pub fn of(
        address: &str,
        certs: Option<&Certs>,
        knocking: Role,
        inside: &'static [Role],
    ) -> Door {
        let tls = certs.map(|certs| certs.tls(knocking));
        let scheme = if tls.is_some() { "https" } else { "http" };
        Door {
            url: format!("{scheme}://{address}"),
            dialer: Dialer::to(inside, tls.as_ref()),
        }
    }

    /// A connection.
    ///
    /// # Errors
    /// UNAVAILABLE: nobody answers there, or somebody who is not to be trusted.
    pub async fn connect(&self) -> Result<Channel, Status> {
        let endpoint = Endpoint::from_shared(self.url.clone()).unwrap();
        let connected = self.dialer.connect(endpoint).await;
        connected.map_err(|error| Status::unavailable(error.to_string()))
    }

    /// A client of an attention node or of a front door.
    ///
    /// # Errors
    /// As [`connect`](Door::connect).
    pub async fn inference(&self) -> Result<InferenceClient<Channel>, Status> {
        self.connect().await.map(InferenceClient::new)
    }

    /// A client of a coordinator.
    ///
    /// # Errors
    /// As [`connect`](Door::connect).
    pub async fn cluster(&self) -> Result<ClusterClient<Channel>, Status> {
        self.connect().await.map(ClusterClient::new)
    }
}

impl From<&str> for Door {
    fn from(url: &str) -> Door {
        Door {
            url: url.to_owned(),
            dialer: Dialer::Plain,
        }
    }
}

impl From<&String> for Door {
    fn from(url: &String) -> Door {
        Door::from(url.as_str())
    }
}

impl From<&Door> for Door {
    fn from(door: &Door) -> Door {
        door.clone()
    }
}
