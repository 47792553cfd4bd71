//! From the cluster's token ids to text: detokenization, stop strings, usage.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use futures::{StreamExt, stream};
use guild_model::text::{Detokenizer, StopStrings, Text};
use guild_node::call::Call;
use guild_proto::inference::v1::{
    Chunk, Complete, FinishReason, GenerateResponse, Timing, TokenLogprobs, Usage,
    complete::MatchedStop, generate_response::Event,
};
use tokio::{sync::OwnedSemaphorePermit, time::timeout_at};
use tonic::Status;

use super::{
    EventStream, ServedModel,
    metrics::Metrics,
    request::{Handling, Params},
};

/// What is asked of the text of one request.
pub(super) struct TextRules {
    text: Option<Arc<Text>>,
    stop: Vec<String>,
    /// Tokens that may end the request, and then have no text.
    enders: Vec<u32>,
    min_tokens: u32,
    skip_special_tokens: bool,
    /// Nothing is to be generated: the prompt alone is asked about.
    prompt_only: bool,
    logprobs: bool,
    prompt_logprobs: bool,
    kept_tokens: Vec<u32>,
    handling: Handling,
}

impl TextRules {
    pub(super) fn new(model: &ServedModel, params: &Params) -> Self {
        let mut enders = params.stop_token_ids.clone();
        if !params.ignore_eos {
            enders.extend_from_slice(&model.config.eos_token_ids);
        }
        Self {
            text: model.text.clone(),
            stop: params.stop.clone(),
            enders,
            min_tokens: params.min_tokens,
            skip_special_tokens: params.skip_special_tokens,
            prompt_only: params.max_tokens == Some(0),
            logprobs: params.logprobs.is_some(),
            prompt_logprobs: params.prompt_logprobs.is_some(),
            kept_tokens: params.kept_tokens.clone(),
            handling: params.handling,
        }
    }
}

/// Adds text to the events of one request. The stream ends after its Complete
/// or its first error, and lets go of the cluster's stream at that moment: a
/// stop string cancels the request.
pub(super) fn with_text(
    upstream: EventStream,
    rules: TextRules,
    request_id: String,
    metrics: Arc<Metrics>,
    hold: (OwnedSemaphorePermit, Call),
) -> EventStream {
    let (permit, call) = hold;
    let writer = Writer {
        upstream: Some(upstream),
        ready: VecDeque::new(),
        detokenizer: rules.text.clone().map(|text| {
            Detokenizer::new(text, rules.skip_special_tokens).keeping(rules.kept_tokens.clone())
        }),
        stops: StopStrings::new(rules.stop.clone()),
        undecided: None,
        prompt_tokens: None,
        cached_tokens: 0,
        completion_tokens: 0,
        said: None,
        first_token: None,
        last_token: None,
        request_id,
        rules,
        metrics,
        call,
        _permit: permit,
    };
    stream::unfold(writer, |mut writer| async move {
        writer.next().await.map(|event| (event, writer))
    })
    .boxed()
}

struct Writer {
    /// None once the request has ended.
    upstream: Option<EventStream>,
    ready: VecDeque<Result<GenerateResponse, Status>>,
    detokenizer: Option<Detokenizer>,
    stops: StopStrings,
    /// A token that ends the request unless another one follows it.
    undecided: Option<u32>,
    prompt_tokens: Option<u32>,
    /// Of the prompt, as the node says in its first chunk.
    cached_tokens: u32,
    completion_tokens: u32,
    /// What the node has counted, of which drafts are its own to know.
    said: Option<Usage>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    request_id: String,
    rules: TextRules,
    metrics: Arc<Metrics>,
    /// By which it may be ended.
    call: Call,
    _permit: OwnedSemaphorePermit,
}

impl Writer {
    async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let deadline = self.rules.handling.deadline();
            let next = self.upstream.as_mut()?.next();
            let next = async {
                match deadline {
                    None => next.await,
                    Some(deadline) => match timeout_at(deadline.into(), next).await {
                        Ok(event) => event,
                        Err(_) => Some(Err(Status::deadline_exceeded(
                            "the request has taken longer than its `timeout_ms`",
                        ))),
                    },
                }
            };
            let event = tokio::select! {
                event = next => event,
                () = self.call.ended() => Some(Ok(aborted())),
            };
            let taken = match event {
                Some(Ok(response)) => self.take(response),
                Some(Err(status)) => Err(status),
                None => Err(Status::unavailable(
                    "the cluster ended the stream before the request was complete; try again",
                )),
            };
            if let Err(status) = taken {
                self.metrics.fail(status.code());
                self.upstream = None;
                self.ready.push_back(Err(status));
            }
        }
    }

    fn take(&mut self, response: GenerateResponse) -> Result<(), Status> {
        match response.event {
            Some(Event::Prompt(mut prompt)) if self.prompt_tokens.is_none() => {
                let expected = if self.rules.prompt_logprobs {
                    prompt.token_ids.len().saturating_sub(1)
                } else {
                    0
                };
                if prompt.logprobs.len() != expected {
                    return Err(out_of_order(
                        "a prompt with another number of logprobs than was asked for",
                    ));
                }
                self.prompt_tokens = Some(prompt.token_ids.len() as u32);
                prompt.request_id.clone_from(&self.request_id);
                self.emit(Event::Prompt(prompt));
                if self.rules.prompt_only {
                    self.complete(FinishReason::Length, None);
                }
                Ok(())
            }
            Some(Event::Chunk(chunk)) if self.prompt_tokens.is_some() => self.take_chunk(chunk),
            Some(Event::Complete(complete))
                if self.prompt_tokens.is_some()
                    || complete.finish_reason() == FinishReason::Abort =>
            {
                self.take_complete(complete)
            }
            _ => Err(out_of_order("events out of order")),
        }
    }

    fn take_chunk(&mut self, chunk: Chunk) -> Result<(), Status> {
        let expected = if self.rules.logprobs {
            chunk.token_ids.len()
        } else {
            0
        };
        if chunk.logprobs.len() != expected {
            return Err(out_of_order(
                "a chunk with another number of logprobs than tokens",
            ));
        }
        // A node that goes on with a stream counts output as prompt.
        let cached = chunk.cached_tokens.min(self.prompt_tokens.unwrap_or(0));
        self.cached_tokens = self.cached_tokens.max(cached);
        if !chunk.token_ids.is_empty() {
            let now = Instant::now();
            self.first_token.get_or_insert(now);
            let (received, last) = (self.rules.handling.received, self.last_token.replace(now));
            self.metrics.token_times.token(received, last, now);
        }
        if !chunk.drafted_tokens.is_empty() {
            self.said = Some(Usage {
                drafted_tokens: chunk.drafted_tokens,
                accepted_tokens: chunk.accepted_tokens,
                ..Usage::default()
            });
        }
        let mut out = Chunk::default();
        let mut logprobs = chunk.logprobs.into_iter();
        for id in chunk.token_ids {
            if let Some(earlier) = self.undecided.take()
                && let Some(stop) = self.write(earlier, &mut out.text)?
            {
                return self.stopped(out, stop);
            }
            out.token_ids.push(id);
            out.logprobs.extend(logprobs.next());
            self.completion_tokens += 1;
            if self.rules.enders.contains(&id) {
                self.undecided = Some(id);
            } else if let Some(stop) = self.write(id, &mut out.text)? {
                return self.stopped(out, stop);
            }
        }
        self.emit(Event::Chunk(out));
        Ok(())
    }

    fn take_complete(&mut self, complete: Complete) -> Result<(), Status> {
        // Who ends it in a node's place knows nothing of drafts.
        let said = complete.usage.as_ref();
        if let Some(usage) = said.filter(|usage| !usage.drafted_tokens.is_empty()) {
            self.said = Some(usage.clone());
        }
        let mut out = Chunk::default();
        let by_token = complete.finish_reason() == FinishReason::Stop;
        if let Some(last) = self.undecided.take().filter(|_| !by_token)
            && let Some(stop) = self.write(last, &mut out.text)?
        {
            return self.stopped(out, stop);
        }
        let rest = match &mut self.detokenizer {
            Some(detokenizer) => detokenizer
                .finish()
                .map_err(|e| Status::internal(e.to_string()))?,
            None => String::new(),
        };
        if let Some(stop) = self.match_stops(&rest, &mut out.text) {
            return self.stopped(out, stop);
        }
        out.text.push_str(&self.stops.finish());
        if !out.text.is_empty() {
            self.emit(Event::Chunk(out));
        }
        self.complete(complete.finish_reason(), complete.matched_stop);
        Ok(())
    }

    /// Writes one token's text; a stop string that it completes is returned.
    fn write(&mut self, id: u32, out: &mut String) -> Result<Option<String>, Status> {
        let Some(detokenizer) = &mut self.detokenizer else {
            return Ok(None);
        };
        let piece = detokenizer
            .push(id)
            .map_err(|e| Status::internal(e.to_string()))?;
        Ok(self.match_stops(&piece, out))
    }

    fn match_stops(&mut self, piece: &str, out: &mut String) -> Option<String> {
        if self.completion_tokens < self.rules.min_tokens {
            out.push_str(piece);
            return None;
        }
        let found = self.stops.push(piece);
        out.push_str(&found.text);
        found.stop
    }

    fn stopped(&mut self, out: Chunk, stop: String) -> Result<(), Status> {
        if !out.text.is_empty() || !out.token_ids.is_empty() {
            self.emit(Event::Chunk(out));
        }
        self.complete(FinishReason::Stop, Some(MatchedStop::StopString(stop)));
        Ok(())
    }

    fn complete(&mut self, reason: FinishReason, matched_stop: Option<MatchedStop>) {
        self.upstream = None;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens.unwrap_or(0),
            completion_tokens: self.completion_tokens,
            cached_tokens: self.cached_tokens,
            timing: self.rules.handling.timing.then(|| self.timing()),
            ..self.said.take().unwrap_or_default()
        };
        let complete = Complete {
            finish_reason: reason.into(),
            matched_stop,
            usage: Some(usage),
        };
        self.metrics.count(&complete, self.rules.handling.received);
        self.emit(Event::Complete(complete));
    }

    fn timing(&self) -> Timing {
        let received = self.rules.handling.received;
        let ms = |at: Instant| at.saturating_duration_since(received).as_secs_f64() * 1e3;
        let now = Instant::now();
        Timing {
            first_token_ms: ms(self.first_token.unwrap_or(now)),
            total_ms: ms(now),
        }
    }

    fn emit(&mut self, event: Event) {
        self.ready
            .push_back(Ok(GenerateResponse { event: Some(event) }));
    }
}

/// The end of a request that somebody has ended, which may be before its Prompt.
fn aborted() -> GenerateResponse {
    GenerateResponse {
        event: Some(Event::Complete(Complete {
            finish_reason: FinishReason::Abort.into(),
            ..Complete::default()
        })),
    }
}

fn out_of_order(what: &str) -> Status {
    Status::internal(format!("the cluster sent {what}"))
}

/// One finished request.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) prompt_ids: Vec<u32>,
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    pub(super) token_ids: Vec<u32>,
    pub(super) logprobs: Vec<TokenLogprobs>,
    pub(super) text: String,
    /// How the text has come: tokens, and where their text ended.
    pub(super) pieces: Vec<(usize, usize)>,
    pub(super) complete: Complete,
}

/// Reads a request to its end.
pub(super) async fn collect(mut events: EventStream) -> Result<Outcome, Status> {
    let mut outcome = Outcome::default();
    while let Some(response) = events.next().await {
        match response?.event {
            Some(Event::Prompt(prompt)) => {
                outcome.prompt_ids = prompt.token_ids;
                outcome.prompt_logprobs = prompt.logprobs;
            }
            Some(Event::Chunk(chunk)) => {
                let tokens = chunk.token_ids.len();
                outcome.token_ids.extend(chunk.token_ids);
                outcome.logprobs.extend(chunk.logprobs);
                outcome.text.push_str(&chunk.text);
                outcome.pieces.push((tokens, outcome.text.len()));
            }
            Some(Event::Complete(complete)) => outcome.complete = complete,
            None => {}
        }
    }
    Ok(outcome)
}
