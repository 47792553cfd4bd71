//! One of several etcd members: whichever answers.

use std::fmt;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};

use super::super::StoreError;

/// What one call to one member may take before the next member is asked.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// What connecting to one member may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// The members, and which of them answered last. A connection belongs to the
/// runtime that made it, so every runtime needs endpoints of its own.
pub(super) struct Endpoints {
    addresses: Vec<String>,
    connected: Mutex<Connected>,
}

#[derive(Default)]
struct Connected {
    preferred: usize,
    client: Option<Client>,
}

impl Endpoints {
    pub(super) fn new(addresses: Vec<String>) -> Endpoints {
        Endpoints {
            addresses,
            connected: Mutex::default(),
        }
    }

    /// The same members, not connected yet.
    pub(super) fn anew(&self) -> Endpoints {
        Endpoints::new(self.addresses.clone())
    }

    /// Asks one member after the other until one answers. A call that fails may
    /// still have been carried out.
    pub(super) async fn call<T, F>(
        &self,
        mut call: impl FnMut(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut failure = "no endpoint is named".to_owned();
        for _ in &self.addresses {
            let (index, address) = self.preferred();
            let attempt = async {
                let client = self.client(index, &address).await?;
                call(client).await
            };
            match tokio::time::timeout(CALL_TIMEOUT, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => failure = format!("{address}: {}", in_words(&error)),
                Err(_) => failure = format!("{address}: no answer within {CALL_TIMEOUT:?}"),
            }
            self.give_up_on(index);
        }
        Err(StoreError::unavailable(self, failure))
    }

    fn preferred(&self) -> (usize, String) {
        let connected = self.lock();
        let index = connected.preferred % self.addresses.len().max(1);
        let address = self.addresses.get(index).cloned().unwrap_or_default();
        (index, address)
    }

    async fn client(&self, index: usize, address: &str) -> Result<Client, Error> {
        if let Some(client) = &self.lock().client {
            return Ok(client.clone());
        }
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_require_leader(true);
        let client = Client::connect([address], Some(options)).await?;
        let mut connected = self.lock();
        if connected.preferred == index {
            connected.client = Some(client.clone());
        }
        Ok(client)
    }

    fn give_up_on(&self, index: usize) {
        let mut connected = self.lock();
        // Unless another call has done so already.
        if connected.preferred == index {
            connected.preferred = (index + 1) % self.addresses.len().max(1);
            connected.client = None;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Connected> {
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_words(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => crate::serve::chain(source),
            None => status.message().to_owned(),
        },
        other => other.to_string(),
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}", self.addresses.join(","))
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoints({self})")
    }
}
