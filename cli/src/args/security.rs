//! Flags that decide who may come in: certificates inside the cluster, certificates and keys at
//! the front door, and going without them.

use std::path::PathBuf;

use clap::Args;

/// Going without protection, and how to end.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Exposure {
    /// Go without: plaintext where certificates are missing, no API keys, at any address
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Seconds that running requests get to end after SIGTERM or Ctrl-C
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) drain: u32,
}

/// Who a process is to the others of its cluster: connections inside it are mutual TLS.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct NodeTls {
    /// Folder with ca.pem and the certificate and key of this role, as `guild certs` makes it, or
    /// with tls.crt, tls.key and ca.crt, as a Secret of Kubernetes is mounted
    #[arg(long, value_name = "DIR", help_heading = "TLS")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Certificate, PEM, instead of the one in --tls-dir
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_key: Option<PathBuf>,
    /// CA of the cluster, PEM, instead of the one in --tls-dir
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_ca: Option<PathBuf>,
}

/// Who may come in at the front door.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct DoorArgs {
    /// Serve only those with a key of this file; lines of NAME:SHA256, see `guild keys`
    #[arg(long, value_name = "FILE", help_heading = "Front door")]
    pub(crate) api_keys: Option<PathBuf>,
    /// Certificate that clients see, PEM, for --http and --grpc
    #[arg(long, value_name = "FILE", help_heading = "Front door")]
    pub(crate) http_tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", help_heading = "Front door")]
    pub(crate) http_tls_key: Option<PathBuf>,
}

/// What a client shows at the front door, and whom it trusts there.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Access {
    /// API key; better given as GUILD_API_KEY
    #[arg(long, value_name = "KEY", hide_default_value = true)]
    pub(crate) api_key: Option<String>,
    /// CA to trust at an https endpoint, PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
}
