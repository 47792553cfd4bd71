//! POST /v1/completions.

use std::sync::Arc;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use guild_model::text::Text;
use guild_proto::inference::v1::{TokenLogprobs, generate_response::Event};
use openai_protocol::completion::{CompletionChoice, CompletionStreamChoice};
use serde::Serialize;
use serde_json::Value;

use super::{
    FrontDoor,
    answer::{Head, finish_reason, matched_stop},
    constrain,
    events::Outcome,
    fault::Fault,
    fields::{Fields, kind, token_ids},
    logprobs::{ClassicLogprobs, ClassicWriter},
    params::{self, MAX_HTTP_LOGPROBS},
    request::{Names, Prompt},
    sse::{self, ChunkWriter, Chunks},
};

/// `max_tokens` of /v1/completions when the client does not say, as in the OpenAI API.
pub(super) const DEFAULT_MAX_TOKENS: u32 = 16;

const PLAIN: Names = Names {
    prompt: "prompt",
    max_tokens: "max_tokens",
    logprobs: "logprobs",
    constraint: "",
    prefix: "",
};

/// The protocol's choice, its log-probabilities in a fixed order, and token ids.
#[derive(Serialize)]
struct Choice<C> {
    #[serde(flatten)]
    base: C,
    logprobs: Option<ClassicLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// Prompts in the four forms of the API.
fn prompts(value: Option<Value>, special: bool) -> Result<Vec<Prompt>, Fault> {
    let text = |s: String| {
        if special {
            Prompt::Text(s)
        } else {
            Prompt::Plain(s)
        }
    };
    let expected = "a string, a list of strings, a list of token ids or a list of those";
    match value {
        None => Err(Fault::missing("prompt", expected)),
        Some(Value::String(s)) => Ok(vec![text(s)]),
        Some(Value::Array(items)) => match items.first() {
            None => Err(Fault::invalid("prompt", "the list is empty")),
            Some(Value::Number(_)) => Ok(vec![Prompt::Ids(token_ids("prompt", &items)?)]),
            _ => items
                .into_iter()
                .map(|item| match item {
                    Value::String(s) => Ok(text(s)),
                    Value::Array(ids) => token_ids("prompt", &ids).map(Prompt::Ids),
                    other => Err(Fault::invalid(
                        "prompt",
                        format!("expected {expected}; found {} in the list", kind(&other)),
                    )),
                })
                .collect(),
        },
        Some(other) => Err(Fault::invalid(
            "prompt",
            format!("expected {expected}, not {}", kind(&other)),
        )),
    }
}

/// Reads, runs and answers one request.
pub(super) async fn serve(
    door: Arc<FrontDoor>,
    mut fields: Fields,
    key: Option<&[u8]>,
) -> Result<Response, Fault> {
    door.check_model(&fields.string("model")?.unwrap_or_default())?;
    let special = fields.flag("add_special_tokens", true)?;
    let prompt = fields.take("prompt");
    let delivery = params::delivery(&mut fields)?;
    let echo = fields.flag("echo", false)?;
    let mut params = params::sampling(&mut fields, key)?;
    params.logprobs = fields.unsigned("logprobs", 0, MAX_HTTP_LOGPROBS)?;
    params.prompt_logprobs = params.logprobs.filter(|_| echo);
    params.max_tokens = fields.unsigned("max_tokens", u32::from(!echo), u32::MAX)?;
    params.default_max_tokens = Some(DEFAULT_MAX_TOKENS);
    fields.refuse_unless("suffix", |v| v.as_str() == Some(""))?;
    let prompts = prompts(prompt, special)?;
    let n = params::choices(&mut fields, "n", prompts.len(), door.max_choices())?.unwrap_or(1);
    let best_of = params::choices(&mut fields, "best_of", prompts.len(), door.max_choices())?;
    let run = best_of.unwrap_or(n);
    if run < n {
        let message = format!("{run} is less than `n`, which is {n}");
        return Err(Fault::invalid("best_of", message));
    }
    if run > n && delivery.stream {
        let message = "which choices are best is known at the end; leave out `stream`";
        return Err(Fault::invalid("best_of", message));
    }
    let mut names = PLAIN;
    if let Some(bound) = constrain::read(&mut fields)? {
        (params.constraint, names.constraint) = (Some(bound.constraint), bound.field);
    }
    fields.finish()?;
    params.check(&door.model, &names)?;
    let shows_logprobs = params.logprobs.is_some();
    if run > n {
        params.logprobs.get_or_insert(0);
    }

    let permits = door.admit(prompts.len() * run as usize)?;
    let shown: Vec<Option<String>> = prompts
        .iter()
        .map(|p| match p {
            Prompt::Text(t) | Prompt::Plain(t) if echo => Some(t.clone()),
            _ => None,
        })
        .collect();
    let ids = door.tokenize(prompts, &params, &names).await?;
    let id = format!("cmpl-{}", uuid::Uuid::new_v4().simple());
    let streams = door.open(ids, run, &params, &names, &id, permits).await?;

    let writers = (0..streams.len()).map(|i| ChoiceWriter {
        index: i as u32,
        text: door.model.text.clone(),
        logprobs: params
            .logprobs
            .filter(|_| shows_logprobs)
            .map(|_| ClassicWriter::new(door.model.text.clone(), params.skip_special_tokens)),
        echo: echo.then(|| shown[i / run as usize].clone()),
        token_ids: delivery.token_ids || door.model.text.is_none(),
        skip_special_tokens: params.skip_special_tokens,
    });
    let answer = Answer {
        head: Head::new(&door, id, run, delivery),
        choices: writers.collect(),
    };
    if delivery.stream {
        return Ok(sse::respond(streams, answer, names));
    }
    let outcomes = door.collect(streams, &names).await?;
    Ok(answer.whole(outcomes, run as usize, n as usize))
}

/// One choice of an answer.
struct ChoiceWriter {
    index: u32,
    text: Option<Arc<Text>>,
    logprobs: Option<ClassicWriter>,
    /// The prompt is shown: as it was sent, or decoded where it was token ids.
    echo: Option<Option<String>>,
    token_ids: bool,
    skip_special_tokens: bool,
}

impl ChoiceWriter {
    /// The prompt as shown, and its log-probabilities.
    fn prompt(
        &mut self,
        ids: &[u32],
        logprobs: &[TokenLogprobs],
    ) -> Option<(String, Option<ClassicLogprobs>)> {
        let sent = self.echo.take()?;
        let decode = || {
            self.text
                .as_ref()
                .and_then(|t| t.decode(ids, self.skip_special_tokens).ok())
                .unwrap_or_default()
        };
        let shown = sent.unwrap_or_else(decode);
        let logprobs = self
            .logprobs
            .as_mut()
            .map(|w| w.prompt(ids, logprobs, &shown));
        Some((shown, logprobs))
    }
}

/// Of each `run` outcomes the `n` with the greatest mean log-probability, the best first; as they
/// came where all are wanted.
fn best(outcomes: Vec<Outcome>, run: usize, n: usize) -> Vec<Outcome> {
    if run == n {
        return outcomes;
    }
    let mean = |outcome: &Outcome| {
        let sum: f64 = outcome.logprobs.iter().map(|l| f64::from(l.logprob)).sum();
        sum / outcome.logprobs.len().max(1) as f64
    };
    let mut outcomes = outcomes.into_iter();
    let mut chosen = Vec::new();
    loop {
        let mut group: Vec<Outcome> = outcomes.by_ref().take(run).collect();
        if group.is_empty() {
            return chosen;
        }
        group.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        chosen.extend(group.into_iter().take(n));
    }
}

struct Answer {
    head: Head,
    choices: Vec<ChoiceWriter>,
}

const OBJECT: &str = "text_completion";

impl Answer {
    /// Of each `run` outcomes, those of one prompt, the best `n`: all are counted.
    fn whole(mut self, outcomes: Vec<Outcome>, run: usize, n: usize) -> Response {
        let mut choices = Vec::with_capacity(outcomes.len());
        for (i, outcome) in outcomes.iter().enumerate() {
            self.head.count(i, &outcome.complete);
        }
        for (i, outcome) in best(outcomes, run, n).into_iter().enumerate() {
            let writer = &mut self.choices[i];
            let (mut text, mut logprobs) = writer
                .prompt(&outcome.prompt_ids, &outcome.prompt_logprobs)
                .unwrap_or_default();
            text.push_str(&outcome.text);
            if let Some(w) = &mut writer.logprobs {
                logprobs
                    .get_or_insert_default()
                    .extend(w.output(&outcome.token_ids, &outcome.logprobs));
            }
            choices.push(Choice {
                base: CompletionChoice {
                    text,
                    index: writer.index,
                    logprobs: None,
                    finish_reason: Some(finish_reason(&outcome.complete)),
                    matched_stop: matched_stop(&outcome.complete),
                },
                logprobs,
                prompt_token_ids: writer.token_ids.then_some(outcome.prompt_ids),
                token_ids: writer.token_ids.then_some(outcome.token_ids),
            });
        }
        Json(self.head.body(OBJECT, choices, Some(self.head.usage()))).into_response()
    }

    fn chunk(
        &self,
        choice: usize,
        text: String,
        logprobs: Option<ClassicLogprobs>,
        finish: Option<String>,
    ) -> Choice<CompletionStreamChoice> {
        let base = CompletionStreamChoice {
            text,
            index: self.choices[choice].index,
            logprobs: None,
            finish_reason: finish,
        };
        Choice {
            base,
            logprobs,
            prompt_token_ids: None,
            token_ids: None,
        }
    }
}

impl ChunkWriter for Answer {
    fn start(&mut self, _: &mut Chunks) {}

    fn event(&mut self, choice: usize, event: Event, out: &mut Chunks) {
        let writer = &mut self.choices[choice];
        let chunk = match event {
            Event::Prompt(prompt) => {
                let shown = writer.prompt(&prompt.token_ids, &prompt.logprobs);
                let token_ids = writer.token_ids;
                if shown.is_none() && !token_ids {
                    return;
                }
                let (text, logprobs) = shown.unwrap_or_default();
                Choice {
                    prompt_token_ids: token_ids.then_some(prompt.token_ids),
                    ..self.chunk(choice, text, logprobs, None)
                }
            }
            Event::Chunk(chunk) => {
                let logprobs = writer
                    .logprobs
                    .as_mut()
                    .map(|w| w.output(&chunk.token_ids, &chunk.logprobs));
                let token_ids = writer.token_ids;
                if chunk.text.is_empty() && logprobs.is_none() && !token_ids {
                    return;
                }
                Choice {
                    token_ids: token_ids.then_some(chunk.token_ids),
                    ..self.chunk(choice, chunk.text, logprobs, None)
                }
            }
            Event::Complete(complete) => {
                self.head.count(choice, &complete);
                self.chunk(choice, String::new(), None, Some(finish_reason(&complete)))
            }
        };
        out.push(&self.head.body(OBJECT, vec![chunk], None));
    }

    fn end(&mut self, out: &mut Chunks) {
        if self.head.delivery.include_usage {
            out.push(&self.head.body(
                OBJECT,
                Vec::<Choice<CompletionStreamChoice>>::new(),
                Some(self.head.usage()),
            ));
        }
    }
}
