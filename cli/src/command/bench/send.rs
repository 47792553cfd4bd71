//! One request, and what its client sees of the answer. Secret: the two OpenAI endpoints, and
//! what counts as a token's arrival: a chunk of the stream that brings text or a token.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::dataset::{Prompt, Sample};
use super::metrics::Outcome;
use crate::args::{Api, BenchServe};
use crate::failure::Failure;
use crate::http::Server;

/// What all requests of a run have in common.
pub(super) struct Client {
    server: Server,
    api: Api,
    path: &'static str,
    common: Map<String, Value>,
}

impl Client {
    /// # Errors
    /// --extra-body is no JSON object.
    pub(super) fn new(server: Server, model: &str, args: &BenchServe) -> Result<Client, Failure> {
        let mut common = Map::from_iter([
            ("model".to_owned(), json!(model)),
            ("stream".to_owned(), json!(true)),
            ("stream_options".to_owned(), json!({"include_usage": true})),
            ("temperature".to_owned(), json!(args.temperature)),
        ]);
        if !args.stop_at_eos {
            common.insert("ignore_eos".to_owned(), json!(true));
        }
        if let Some(extra) = &args.extra_body {
            let extra: Map<String, Value> = serde_json::from_str(extra).map_err(|error| {
                Failure::usage(format!("--extra-body: no JSON object: {error}"))
            })?;
            common.extend(extra);
        }
        Ok(Client {
            server,
            api: args.api,
            path: match args.api {
                Api::Completions => "/v1/completions",
                Api::Chat => "/v1/chat/completions",
            },
            common,
        })
    }

    fn body(&self, sample: &Sample) -> Value {
        let mut body = self.common.clone();
        let mut put = |field: &str, value: Value| {
            // What --extra-body says wins.
            body.entry(field).or_insert(value);
        };
        match (self.api, &sample.prompt) {
            (Api::Completions, Prompt::Ids(ids)) => put("prompt", json!(ids)),
            (Api::Completions, Prompt::Text(text)) => put("prompt", json!(text)),
            (Api::Chat, Prompt::Text(text)) => {
                put("messages", json!([{"role": "user", "content": text}]));
            }
            // Chats are always text, see `dataset::Maker`.
            (Api::Chat, Prompt::Ids(_)) => put("messages", json!([])),
        }
        let limit = match self.api {
            Api::Completions => "max_tokens",
            Api::Chat => "max_completion_tokens",
        };
        put(limit, json!(sample.output_len));
        Value::Object(body)
    }

    /// Asks, and reads the answer to its end. `start` is that of the run, `due` when the request
    /// was to be sent.
    pub(super) async fn ask(&self, sample: &Sample, start: Instant, due: Instant) -> Outcome {
        let sent = Instant::now();
        let mut outcome = Outcome {
            prompt_len: sample.prompt_len,
            start: (sent - start).as_secs_f64(),
            queued: sent.saturating_duration_since(due).as_secs_f64(),
            ..Outcome::default()
        };
        if let Err(failure) = self.read(sample, sent, &mut outcome).await {
            outcome.error = Some(failure.message().to_owned());
            outcome.output_len = 0;
        }
        outcome
    }

    async fn read(
        &self,
        sample: &Sample,
        sent: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), Failure> {
        let mut events = self.server.stream(self.path, &self.body(sample)).await?;
        let mut chunks = 0;
        let mut counted = None;
        while let Some(event) = events.next().await? {
            let now = sent.elapsed().as_secs_f64();
            if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
                let message = error["message"].as_str().unwrap_or("the stream broke off");
                return Err(Failure::network(message));
            }
            if let Some(text) = arrived(self.api, &event) {
                if chunks == 0 {
                    outcome.ttft = now;
                } else {
                    outcome.itl.push(now - outcome.latency);
                }
                chunks += 1;
                outcome.latency = now;
                outcome.text.push_str(text);
            }
            if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
                counted = Some(tokens as usize);
                if let Some(tokens) = event["usage"]["prompt_tokens"].as_u64() {
                    outcome.prompt_len = tokens as usize;
                }
            }
        }
        if chunks == 0 {
            return Err(Failure::network("the answer had no token"));
        }
        // A server that does not say is taken to send a token a chunk.
        outcome.output_len = counted.unwrap_or(chunks);
        Ok(())
    }
}

/// The text of a chunk that brings a token, which may be empty: a token can be half a character.
fn arrived(api: Api, event: &Value) -> Option<&str> {
    let choice = event["choices"].get(0)?;
    match api {
        Api::Completions => {
            let text = choice["text"].as_str()?;
            // The last chunk of some servers has the reason alone.
            (!text.is_empty() || choice["finish_reason"].is_null()).then_some(text)
        }
        Api::Chat => {
            let delta = &choice["delta"];
            let text = ["content", "reasoning_content", "reasoning"]
                .iter()
                .find_map(|field| delta[*field].as_str())?;
            // The first chunk says who speaks, and nothing else.
            (!text.is_empty()).then_some(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_arrived_when_a_chunk_says_so() {
        let completion =
            |text: &str, end: Value| json!({"choices": [{"text": text, "finish_reason": end}]});
        let chat = |delta: Value| json!({"choices": [{"delta": delta, "finish_reason": null}]});
        for (api, event, text) in [
            (Api::Completions, completion("a", Value::Null), Some("a")),
            (Api::Completions, completion("", Value::Null), Some("")),
            (
                Api::Completions,
                completion("a", json!("length")),
                Some("a"),
            ),
            (Api::Completions, completion("", json!("length")), None),
            (Api::Completions, json!({"choices": [], "usage": {}}), None),
            (
                Api::Chat,
                chat(json!({"role": "assistant", "content": ""})),
                None,
            ),
            (Api::Chat, chat(json!({"content": "b"})), Some("b")),
            (
                Api::Chat,
                chat(json!({"reasoning_content": "c"})),
                Some("c"),
            ),
            (Api::Chat, chat(json!({})), None),
        ] {
            assert_eq!(arrived(api, &event), text, "{event}");
        }
    }
}
