//! Serving: routes on a listener, with health and reflection beside them, and
//! a drain that ends within its limit.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{self, Either, Ready};
use futures::{Stream, StreamExt, stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::body::Body;
use tonic::codegen::{
    Service,
    http::{Request, Response},
};
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::exit::{ExitKind, HasExitKind};
use crate::metrics::MetricsPort;
use crate::shutdown::Shutdown;
use crate::tls::{Acceptor, Identity, ServerStream};

/// Bytes a peer may send on one stream before it has to wait. A micro-batch of
/// rows (up to some MiB) should not need a round trip to cross.
pub const STREAM_WINDOW: u32 = 8 << 20;
/// The same for all streams of a connection together.
pub const CONNECTION_WINDOW: u32 = 32 << 20;
/// Largest HTTP/2 frame accepted.
pub const MAX_FRAME: u32 = 1 << 20;
/// Streams one connection may have open at a time.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 1024;
/// Connections one listener holds at a time; further ones wait in the backlog.
pub const MAX_CONNECTIONS: usize = 4096;
/// TLS handshakes that one listener carries on at a time.
pub const MAX_HANDSHAKES: usize = 256;
/// Bytes of headers of one request.
pub const MAX_HEADER_LIST: u32 = 32 << 10;
/// Streams that were reset by the peer before they were accepted (the rapid
/// reset attack); beyond it the connection is closed.
pub const MAX_PENDING_RESETS: usize = 64;
/// A peer that says nothing for this long is pinged.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A ping that stays unanswered for this long closes the connection.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept (for example: out of file handles).
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// After the drain limit, connections are cut and get this long to unwind.
const CUT_GRACE: Duration = Duration::from_millis(500);

/// A server could not be built or has failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address or stop what uses it")]
    Bind {
        /// What was asked for.
        address: String,
        /// What the operating system says.
        source: io::Error,
    },
    /// The descriptors of the services cannot be served by reflection.
    #[error("gRPC reflection cannot be set up: {0}")]
    Reflection(String),
    /// The server stopped by itself.
    #[error("the server on {address} failed: {reason}")]
    Server {
        /// Where it listened.
        address: String,
        /// Why it stopped.
        reason: String,
    },
}

impl HasExitKind for ServeError {
    fn exit_kind(&self) -> ExitKind {
        match self {
            ServeError::Bind { .. } | ServeError::Server { .. } => ExitKind::Network,
            ServeError::Reflection(_) => ExitKind::Internal,
        }
    }
}

/// Listens on `address` (`host:port`; port 0 lets the system choose).
///
/// # Errors
/// The address does not resolve, is in use or may not be used.
pub async fn bind(address: &str) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Bind {
            address: address.to_owned(),
            source,
        })
}

/// What grpc.health.v1 answers. Clones share one state.
#[derive(Clone, Debug)]
pub struct Health {
    reporter: HealthReporter,
    /// What was said of each name so far, to take them all down in a drain. None: the
    /// drain has begun and nothing is serving any more, whatever is said.
    names: Arc<Mutex<Option<BTreeMap<String, bool>>>>,
}

impl Health {
    async fn new() -> Health {
        let health = Health {
            reporter: HealthReporter::new(),
            names: Arc::new(Mutex::new(Some(BTreeMap::new()))),
        };
        // Nothing serves before somebody says so.
        health.set_serving("", false).await;
        health
    }

    /// Says whether `service` (its full name; "" for the whole process) can
    /// take requests. Ignored once a drain has begun.
    pub async fn set_serving(&self, service: &str, serving: bool) {
        let mut names = self.names.lock().await;
        let Some(names) = names.as_mut() else { return };
        names.insert(service.to_owned(), serving);
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.reporter.set_service_status(service, status).await;
    }

    /// Whether the process as a whole can take requests.
    pub(crate) async fn is_serving(&self) -> bool {
        let names = self.names.lock().await;
        let said = names.as_ref().and_then(|names| names.get(""));
        said.copied().unwrap_or(false)
    }

    /// Takes everything down for good and ends the Watch streams, which would
    /// otherwise hold the drain up.
    async fn take_down(&self) {
        let Some(names) = self.names.lock().await.take() else {
            return;
        };
        let mut reporter = self.reporter.clone();
        for name in names.into_keys() {
            reporter
                .set_service_status(&name, ServingStatus::NotServing)
                .await;
            reporter.clear_service_status(&name).await;
        }
    }
}

/// Judges every request of a server before anything else sees it: None lets it in, a response is
/// the refusal.
pub type Guard = Arc<dyn Fn(&Request<Body>) -> Option<Response<Body>> + Send + Sync>;

/// A server before it has a listener.
pub struct Server {
    routes: Routes,
    health: Health,
    http1: bool,
    /// Full names of the services that reflection lists.
    services: Vec<String>,
    tls: Option<Acceptor>,
    guard: Option<Guard>,
    probes: Option<String>,
    metrics: Option<MetricsPort>,
}

impl Server {
    /// A gRPC server with grpc.health.v1 and reflection (v1 and v1alpha, which generic clients still
    /// ask for) and nothing else. Health answers NOT_SERVING until told otherwise.
    pub async fn new() -> Server {
        Server::on(Routes::default(), false).await
    }

    /// The same over existing routes; `http1` also accepts HTTP/1.1 (for a
    /// router that has more than gRPC on it).
    pub async fn on(routes: Routes, http1: bool) -> Server {
        Server::with_health(routes, http1, Health::new().await)
    }

    /// The same, answering with the health of another server of this process.
    pub fn with_health(routes: Routes, http1: bool, health: Health) -> Server {
        let checks =
            HealthServer::new(HealthService::from_health_reporter(health.reporter.clone()));
        let server = Server {
            routes,
            health,
            http1,
            services: Vec::new(),
            tls: None,
            guard: None,
            probes: None,
            metrics: None,
        };
        server.add(checks)
    }

    /// Takes TLS connections only, if there is something to take them with.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<Acceptor>) -> Server {
        self.tls = tls;
        self
    }

    /// Answers health, and nothing else, at a second address without TLS, if there is one.
    #[must_use]
    pub fn probed_at(mut self, address: Option<String>) -> Server {
        self.probes = address;
        self
    }

    /// Answers `/metrics` and `/health` at one more address without TLS, if there is one, until the last stream of a
    /// drain is through.
    #[must_use]
    pub fn measured_at(mut self, port: Option<MetricsPort>) -> Server {
        self.metrics = port;
        self
    }

    /// Puts a guard before everything that this server answers: health, reflection and paths
    /// that do not exist included.
    #[must_use]
    pub fn guarded(mut self, guard: Option<Guard>) -> Server {
        self.guard = guard;
        self
    }

    /// Lists a service that the routes given to [`Server::on`] already carry.
    #[must_use]
    pub fn listing(mut self, service: &str) -> Server {
        self.services.push(service.to_owned());
        self
    }

    /// Adds a gRPC service.
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "a service is added to a server; nothing is summed"
    )]
    pub fn add<S>(mut self, service: S) -> Server
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes = self.routes.add_service(service);
        self.listing(S::NAME)
    }

    /// The routes with reflection over what they carry: no port lists what it does not answer.
    fn reflected(&self) -> Result<Routes, tonic_reflection::server::Error> {
        let builder = || {
            let all = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(guild_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.reflection.v1.ServerReflection")
                .with_service_name("grpc.reflection.v1alpha.ServerReflection");
            self.services
                .iter()
                .fold(all, |b, name| b.with_service_name(name))
        };
        Ok(self
            .routes
            .clone()
            .add_service(builder().build_v1()?)
            .add_service(builder().build_v1alpha()?))
    }

    /// The handle by which health answers are set.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// Serves on `listener` until `shutdown`; then health goes down, no
    /// connection is accepted, open streams get up to `drain` to end, and what
    /// is left is cut.
    ///
    /// # Errors
    /// The server ended without being asked to, an address for probes or metrics is taken, or the
    /// descriptor set that this binary was built with is unusable.
    pub async fn run(
        mut self,
        listener: TcpListener,
        shutdown: Shutdown,
        drain: Duration,
    ) -> Result<(), ServeError> {
        let health = self.health();
        let probes = match self.probes.take() {
            Some(address) => Some(bind(&address).await?),
            None => None,
        };
        let probes = probes.map(|listener| {
            let probes = Server::with_health(Routes::default(), false, health.clone());
            probes.run_alone(listener, shutdown.clone(), Duration::ZERO)
        });
        let (metrics, ended) = (self.metrics.take(), Shutdown::new());
        let metrics = match metrics {
            Some(port) => Some((bind(&port.address).await?, port.router(health.clone()))),
            None => None,
        };
        let metrics = metrics.map(|(listener, router)| {
            let metrics = Server::with_health(Routes::from(router), true, health);
            metrics.run_alone(listener, ended.clone(), Duration::ZERO)
        });
        let serving = async {
            let result = self.run_alone(listener, shutdown, drain).await;
            ended.trigger();
            result
        };
        tokio::try_join!(serving, beside(probes), beside(metrics))?;
        Ok(())
    }

    async fn run_alone(
        self,
        listener: TcpListener,
        shutdown: Shutdown,
        drain: Duration,
    ) -> Result<(), ServeError> {
        let address = listener
            .local_addr()
            .map_or_else(|_| "?".to_owned(), |address| address.to_string());
        let routes = self
            .reflected()
            .map_err(|e| ServeError::Reflection(e.to_string()))?;
        let cut = CancellationToken::new();
        // However this future ends, no connection outlives it.
        let cut_on_drop = cut.clone().drop_guard();
        let serving = tonic::transport::Server::builder()
            .accept_http1(self.http1)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .layer(GuardLayer(self.guard))
            .add_routes(routes.prepare())
            .serve_with_incoming_shutdown(accept(listener, self.tls, cut.clone()), {
                let shutdown = shutdown.clone();
                let health = self.health.clone();
                async move {
                    shutdown.requested().await;
                    health.take_down().await;
                }
            });
        tokio::pin!(serving);
        let limit = async {
            shutdown.requested().await;
            tokio::time::sleep(drain).await;
        };
        let result = tokio::select! {
            result = &mut serving => result,
            () = limit => {
                tracing::warn!(%address, limit = ?drain, "drain limit reached: cutting the streams that are left");
                cut.cancel();
                tokio::time::timeout(CUT_GRACE, &mut serving).await.unwrap_or(Ok(()))
            }
        };
        drop(cut_on_drop);
        result.map_err(|error| ServeError::Server {
            address,
            reason: chain(&error),
        })
    }
}

/// A further server of a process, if there is one.
async fn beside(
    server: Option<impl Future<Output = Result<(), ServeError>>>,
) -> Result<(), ServeError> {
    match server {
        Some(server) => server.await,
        None => Ok(()),
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Accepts for ever; a failure to accept is a pause, never the end, and a failed handshake
/// concerns the one who made it.
fn accept(
    listener: TcpListener,
    tls: Option<Acceptor>,
    cut: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepted = stream::unfold((listener, permits), |(listener, permits)| async move {
        let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
        Some(((stream, permit), (listener, permits)))
    });
    accepted
        .map(move |(stream, permit)| {
            let (tls, cut) = (tls.clone(), cut.clone());
            async move {
                let (local, remote) = (stream.local_addr().ok(), stream.peer_addr().ok());
                let (stream, identity) = match tls {
                    None => (Bytes::Plain(stream), None),
                    Some(tls) => match tls.accept(stream).await {
                        Ok((stream, identity)) => (Bytes::Tls(Box::new(stream)), identity),
                        Err(error) => {
                            let remote = remote.map(tracing::field::display);
                            // Probes open a connection and leave; that is no news.
                            if error.kind() == io::ErrorKind::UnexpectedEof {
                                tracing::debug!(remote, %error, "no handshake");
                            } else {
                                tracing::warn!(remote, %error, "refused a connection");
                            }
                            return None;
                        }
                    },
                };
                Some(Ok(Connection {
                    peer: Peer {
                        local,
                        remote,
                        identity,
                    },
                    stream,
                    cut: Box::pin(cut.cancelled_owned()),
                    _permit: permit,
                }))
            }
        })
        .buffer_unordered(MAX_HANDSHAKES)
        .filter_map(std::future::ready)
}

/// Who is at the other end of the connection that a request came by; among the extensions of the
/// request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The address that was connected to.
    pub local: Option<SocketAddr>,
    /// The address that it was connected from.
    pub remote: Option<SocketAddr>,
    /// What its certificate says; None where none is asked for.
    pub identity: Option<Identity>,
}

/// Who sent a request, where certificates are asked for.
pub fn identity_of<T>(request: &tonic::Request<T>) -> Option<&Identity> {
    request.extensions().get::<Peer>()?.identity.as_ref()
}

/// What a connection is made of.
enum Bytes {
    Plain(TcpStream),
    Tls(Box<ServerStream>),
}

/// An accepted connection that can be cut from outside.
struct Connection {
    stream: Bytes,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    peer: Peer,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "cut at the drain limit",
            )),
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_cut(cx)?;
        match &mut self.stream {
            Bytes::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Bytes::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_cut(cx)?;
        match &mut self.stream {
            Bytes::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Bytes::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Bytes::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Bytes::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Bytes::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Bytes::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_cut(cx)?;
        match &mut self.stream {
            Bytes::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Bytes::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Bytes::Plain(stream) => stream.is_write_vectored(),
            Bytes::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// The guard as a layer around all routes.
#[derive(Clone)]
struct GuardLayer(Option<Guard>);

impl<S> tower::Layer<S> for GuardLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded {
            guard: self.0.clone(),
            inner,
        }
    }
}

#[derive(Clone)]
struct Guarded<S> {
    guard: Option<Guard>,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Response<Body>, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.guard.as_ref().and_then(|guard| guard(&request)) {
            Some(refusal) => Either::Left(future::ready(Ok(refusal))),
            None => Either::Right(self.inner.call(request)),
        }
    }
}
