//! Several requests' events as one stream of server-sent events.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event as SseEvent, KeepAlive, Sse},
};
use futures::{Stream, StreamExt, stream};
use guild_proto::inference::v1::{GenerateResponse, generate_response::Event};
use serde::Serialize;
use serde_json::{Value, json};
use tonic::Status;

use super::{EventStream, fault::Fault, request::Names};

/// A comment is sent after this long without an event, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Writes the chunks of one endpoint.
pub(super) trait ChunkWriter: Send + 'static {
    /// Before any event.
    fn start(&mut self, out: &mut Chunks);
    /// One event of one choice.
    fn event(&mut self, choice: usize, event: Event, out: &mut Chunks);
    /// An error, OpenAI's `error` object; nothing comes after it.
    fn failed(&mut self, error: Value, out: &mut Chunks) {
        out.push(&json!({"error": error}));
    }
    /// After the last event of all choices.
    fn end(&mut self, out: &mut Chunks);
}

/// Chunks waiting to be sent.
#[derive(Default)]
pub(super) struct Chunks(VecDeque<(Option<&'static str>, String)>);

impl Chunks {
    pub(super) fn push(&mut self, chunk: &impl Serialize) {
        let text = serde_json::to_string(chunk).ok();
        self.0.extend(text.map(|text| (None, text)));
    }

    /// The same as an event with a name.
    pub(super) fn push_named(&mut self, name: &'static str, chunk: &impl Serialize) {
        let text = serde_json::to_string(chunk).ok();
        self.0.extend(text.map(|text| (Some(name), text)));
    }
}

struct Writing<W> {
    events: Box<dyn Stream<Item = (usize, Result<GenerateResponse, Status>)> + Send + Unpin>,
    writer: W,
    chunks: Chunks,
    names: Names,
    /// What is sent after everything.
    last: Option<&'static str>,
    open: bool,
}

/// Sends the events of all choices as they come, `[DONE]` at the end. An error
/// is sent as an event of OpenAI's form and ends the stream. When the client
/// goes away the streams are dropped, which cancels the requests.
pub(super) fn respond<W: ChunkWriter>(
    streams: Vec<EventStream>,
    writer: W,
    names: Names,
) -> Response {
    send(streams, writer, names, Some("[DONE]"))
}

/// The same for an endpoint whose last event has a name of its own.
pub(super) fn respond_named<W: ChunkWriter>(
    streams: Vec<EventStream>,
    writer: W,
    names: Names,
) -> Response {
    send(streams, writer, names, None)
}

fn send<W: ChunkWriter>(
    streams: Vec<EventStream>,
    mut writer: W,
    names: Names,
    last: Option<&'static str>,
) -> Response {
    let numbered = streams
        .into_iter()
        .enumerate()
        .map(|(i, s)| s.map(move |e| (i, e)).boxed());
    let mut chunks = Chunks::default();
    writer.start(&mut chunks);
    let state = Writing {
        events: Box::new(stream::select_all(numbered)),
        writer,
        chunks,
        names,
        last,
        open: true,
    };
    let events = stream::unfold(state, |mut state| async move {
        let (name, data) = state.next().await?;
        let event = match name {
            Some(name) => SseEvent::default().event(name),
            None => SseEvent::default(),
        };
        Some((Ok::<_, Infallible>(event.data(data)), state))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    // Buffering proxies would hold the tokens back.
    response.headers_mut().insert(
        "x-accel-buffering",
        axum::http::HeaderValue::from_static("no"),
    );
    response
}

impl<W: ChunkWriter> Writing<W> {
    async fn next(&mut self) -> Option<(Option<&'static str>, String)> {
        loop {
            if let Some(chunk) = self.chunks.0.pop_front() {
                return Some(chunk);
            }
            if !self.open {
                return None;
            }
            match self.events.next().await {
                Some((choice, Ok(GenerateResponse { event: Some(event) }))) => {
                    self.writer.event(choice, event, &mut self.chunks)
                }
                Some((_, Ok(GenerateResponse { event: None }))) => {}
                Some((_, Err(status))) => {
                    let fault = Fault::from(status).rename(|f| self.names.of(f));
                    self.writer.failed(fault.error(), &mut self.chunks);
                    self.close();
                }
                None => {
                    self.writer.end(&mut self.chunks);
                    let last = self.last.map(|last| (None, last.to_owned()));
                    self.chunks.0.extend(last);
                    self.close();
                }
            }
        }
    }

    fn close(&mut self) {
        self.open = false;
        self.events = Box::new(stream::empty());
    }
}
