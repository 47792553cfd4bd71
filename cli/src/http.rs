//! A small HTTP/1.1 client for `guild chat` and `guild bench`: bodies are read as they come, and a
//! connection whose answer was read to its end serves the next request.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use guild_node::channel::Dialer;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;

use crate::args::Access;
use crate::failure::Failure;
use crate::security::dialer;

/// Bytes of a body that is read whole, and of one line of a stream.
const MAX_BODY_BYTES: usize = 8 << 20;
/// How long a server may take to end an answer of which all has been said.
const LAST_CHUNK: Duration = Duration::from_millis(100);

/// A server by its `http://HOST[:PORT]` or `https://HOST[:PORT]`.
pub(crate) struct Server {
    scheme: &'static str,
    host: String,
    port: u16,
    dialer: Dialer,
    /// What `Authorization` says, if there is a key.
    bearer: Option<HeaderValue>,
    idle: Idle,
}

type Connection = SendRequest<Full<Bytes>>;
type Answered = hyper::Result<Response<Incoming>>;

/// Connections on which nothing is under way.
#[derive(Clone, Default)]
struct Idle(Arc<Mutex<Vec<Connection>>>);

impl Idle {
    fn take(&self) -> Option<Connection> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The server may have closed some meanwhile.
        std::iter::from_fn(|| idle.pop()).find(Connection::is_ready)
    }

    fn put(&self, connection: Connection) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(connection);
    }
}

impl Server {
    /// # Errors
    /// The URL has another scheme, a path or no host.
    pub(crate) fn new(endpoint: &str, access: &Access) -> Result<Self, Failure> {
        let dialer = dialer(access, endpoint)?;
        let wrong = |why: &str| {
            Failure::usage(format!("--endpoint: `{endpoint}` {why}")).hint("write http://HOST:PORT")
        };
        let text = if endpoint.contains("://") {
            endpoint.to_owned()
        } else {
            format!("http://{endpoint}")
        };
        let uri: Uri = text.parse().map_err(|_| wrong("is no URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(wrong("has a scheme other than http and https"));
        }
        if uri.path() != "/" {
            return Err(wrong("has a path"));
        }
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| wrong("has no host"))?;
        let (scheme, usual) = match dialer {
            Dialer::Plain => ("http", 80),
            _ => ("https", 443),
        };
        let bearer = match &access.api_key {
            None => None,
            Some(key) => Some(
                HeaderValue::try_from(format!("Bearer {key}"))
                    .map_err(|_| Failure::usage("--api-key: a key has no line ends"))?,
            ),
        };
        Ok(Self {
            scheme,
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(usual),
            dialer,
            bearer,
            idle: Idle::default(),
        })
    }

    /// GET, answered with JSON.
    pub(crate) async fn get(&self, path: &str) -> Result<serde_json::Value, Failure> {
        let (response, _) = self.send(Method::GET, path, Bytes::new()).await?;
        let whole = whole(response.into_body()).await?;
        serde_json::from_slice(&whole)
            .map_err(|_| Failure::network(format!("{self}{path} answered no JSON")))
    }

    /// POST of JSON, answered with server-sent events.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<Events, Failure> {
        let (response, connection) = self
            .send(Method::POST, path, Bytes::from(body.to_string()))
            .await?;
        Ok(Events {
            body: response.into_body(),
            buffer: Vec::new(),
            connection: Some(connection),
            idle: self.idle.clone(),
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, Connection), Failure> {
        let failed = |why: &dyn std::fmt::Display| {
            Failure::network(format!("{self}: {why}"))
                .hint("is a Guild serving HTTP there? `guild up --model DIR` starts one")
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| failed(&error))?;
        if let Some(bearer) = &self.bearer {
            request.headers_mut().insert(AUTHORIZATION, bearer.clone());
        }
        let answered = match self.idle.take() {
            Some(mut sender) => match sender.send_request(request.clone()).await {
                // The server has closed what it had kept open: the request did not reach it.
                Err(error) if error.is_canceled() || error.is_incomplete_message() => {
                    self.fresh(request).await
                }
                answered => Ok((answered, sender)),
            },
            None => self.fresh(request).await,
        };
        let (answered, sender) = answered.map_err(|error| failed(&error))?;
        let response = answered.map_err(|error| failed(&error))?;
        if response.status().is_success() {
            return Ok((response, sender));
        }
        let status = response.status();
        let retry = response
            .headers()
            .get("retry-after")
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned);
        let body = whole(response.into_body()).await?;
        let mut failure = refused(status.as_u16(), &body);
        if let Some(seconds) = retry {
            failure = failure.hint(format!("try again in {seconds} s"));
        }
        Err(failure)
    }

    /// The answer by a connection of its own.
    async fn fresh(&self, request: Request<Full<Bytes>>) -> Result<(Answered, Connection), String> {
        let mut sender = self.connect().await?;
        Ok((sender.send_request(request).await, sender))
    }

    async fn connect(&self) -> Result<Connection, String> {
        let stream = self.dialer.http1(&self.host, self.port).await;
        let stream = TokioIo::new(stream.map_err(|error| error.to_string())?);
        let (sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(|error| error.to_string())?;
        // Ends with the connection; its error comes out of the body as well.
        tokio::spawn(connection);
        Ok(sender)
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}:{}", self.scheme, self.host, self.port)
    }
}

/// An error in OpenAI's shape, or whatever came instead.
fn refused(status: u16, body: &[u8]) -> Failure {
    use guild_node::ExitKind;
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &json["error"];
    let message = error["message"]
        .as_str()
        .map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    let kind = match status {
        404 => ExitKind::Model,
        400..=428 => ExitKind::Usage,
        429 => ExitKind::Resources,
        502..=504 => ExitKind::Network,
        _ => ExitKind::Internal,
    };
    let failure = Failure::new(kind, format!("the server answered {status}: {message}"));
    match error["param"].as_str() {
        Some(field) => failure.hint(format!("field `{field}`")),
        None => failure,
    }
}

async fn whole(mut body: Incoming) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Failure::network(format!("the answer broke off: {error}")))?;
        bytes.extend_from_slice(frame.data_ref().map_or(&[], Bytes::as_ref));
        if bytes.len() > MAX_BODY_BYTES {
            return Err(Failure::network(format!(
                "the answer is longer than {MAX_BODY_BYTES} bytes"
            )));
        }
    }
    Ok(bytes)
}

/// The data of server-sent events, one JSON value each.
pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
    /// For the next request, once this answer is at its end.
    connection: Option<Connection>,
    idle: Idle,
}

impl Events {
    /// The next value; None after `[DONE]` or the end.
    ///
    /// # Errors
    /// The connection broke, or an event is no JSON.
    pub(crate) async fn next(&mut self) -> Result<Option<serde_json::Value>, Failure> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data:") else {
                    continue;
                };
                let data = data.trim_ascii();
                if data == b"[DONE]" {
                    self.finish().await;
                    return Ok(None);
                }
                return serde_json::from_slice(data)
                    .map(Some)
                    .map_err(|_| Failure::network("the server sent an event that is no JSON"));
            }
            if self.buffer.len() > MAX_BODY_BYTES {
                return Err(Failure::network(format!(
                    "an event is longer than {MAX_BODY_BYTES} bytes"
                )));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    self.buffer
                        .extend_from_slice(frame.data_ref().map_or(&[], Bytes::as_ref));
                }
                Some(Err(error)) => {
                    return Err(Failure::network(format!("the answer broke off: {error}")));
                }
                None => {
                    self.finish().await;
                    return Ok(None);
                }
            }
        }
    }

    /// Reads what is left, which after `[DONE]` is the end of the body alone. Only where that
    /// comes is the connection good for another request.
    async fn finish(&mut self) {
        let body = &mut self.body;
        let end = async move {
            loop {
                match body.frame().await {
                    Some(Ok(_)) => {}
                    Some(Err(_)) => return false,
                    None => return true,
                }
            }
        };
        let ended = tokio::time::timeout(LAST_CHUNK, end).await;
        if let (Ok(true), Some(connection)) = (ended, self.connection.take()) {
            self.idle.put(connection);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    const EVENTS: &str = "data: {\"a\": 1}\n\ndata: [DONE]\n\n";

    /// Reads a request of a body that is `{}`.
    async fn request(stream: &mut TcpStream) {
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n{}") {
            let mut some = [0; 1024];
            let read = stream.read(&mut some).await.unwrap();
            assert!(read > 0, "the client has hung up");
            seen.extend_from_slice(&some[..read]);
        }
    }

    /// Answers with one event, and with the end of the answer or without.
    async fn answer(stream: &mut TcpStream, end: bool) {
        let end = if end { "0\r\n\r\n" } else { "" };
        let answer = format!(
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{EVENTS}\r\n{end}",
            EVENTS.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    }

    async fn ask(server: &Server) {
        let mut events = server.stream("/", &serde_json::json!({})).await.unwrap();
        assert!(events.next().await.unwrap().is_some());
        assert!(events.next().await.unwrap().is_none());
    }

    async fn listening() -> (TcpListener, Server) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        (
            listener,
            Server::new(&endpoint, &Access::default()).unwrap(),
        )
    }

    #[tokio::test]
    async fn a_connection_serves_on_unless_the_server_has_closed_it() {
        let (listener, server) = listening().await;
        let serving = async {
            let (mut first, _) = listener.accept().await.unwrap();
            for _ in 0..2 {
                request(&mut first).await;
                answer(&mut first, true).await;
            }
            // Closed only when the third request is on its way.
            request(&mut first).await;
            drop(first);
            let (mut second, _) = listener.accept().await.unwrap();
            request(&mut second).await;
            answer(&mut second, true).await;
        };
        let asking = async {
            for _ in 0..3 {
                ask(&server).await;
            }
        };
        tokio::join!(serving, asking);
    }

    #[tokio::test]
    async fn an_answer_without_an_end_is_not_waited_for() {
        let (listener, server) = listening().await;
        let serving = async {
            let mut open = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                request(&mut stream).await;
                answer(&mut stream, false).await;
                open.push(stream);
            }
        };
        let asking = async {
            ask(&server).await;
            ask(&server).await;
        };
        tokio::join!(serving, asking);
    }
}
