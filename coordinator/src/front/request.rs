//! One request as both wire forms mean it, and what a request may ask for.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use guild_proto::inference::v1::{
    Constraint, GenerateRequest, SamplingParams, TokenIds, generate_request::Input,
};

use super::{FrontDoor, ServedModel, fault::Fault};

/// Highest temperature.
pub const MAX_TEMPERATURE: f32 = 2.0;
/// Temperatures below this are greedy: their distribution is, and dividing by
/// them would overflow.
pub const GREEDY_BELOW: f32 = 1e-5;
/// Highest presence or frequency penalty, up and down.
const MAX_PENALTY: f32 = 2.0;
/// Highest bias of a token's logit, up and down.
const MAX_BIAS: f32 = 100.0;
/// Tokens with a bias per request at most.
const MAX_BIASES: usize = 1024;
/// Alternatives reported per token at most.
pub const MAX_LOGPROBS: u32 = 64;
/// Stop strings per request at most.
pub const MAX_STOP_STRINGS: usize = 16;
/// Bytes of one stop string at most.
pub const MAX_STOP_BYTES: usize = 256;
/// Stop tokens per request at most.
pub const MAX_STOP_TOKENS: usize = 64;

/// How a request is generated. Which values are unset is still known here.
#[derive(Clone, Debug)]
pub(super) struct Params {
    /// None: all that fits. Zero only where the prompt alone is asked about.
    pub(super) max_tokens: Option<u32>,
    /// What `max_tokens` was meant to be at least, but may be cut to fit.
    pub(super) default_max_tokens: Option<u32>,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) top_k: u32,
    pub(super) min_p: f32,
    pub(super) repetition_penalty: f32,
    pub(super) presence_penalty: f32,
    pub(super) frequency_penalty: f32,
    /// By token id.
    pub(super) logit_bias: HashMap<u32, f32>,
    pub(super) seed: Option<u64>,
    pub(super) stop: Vec<String>,
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) ignore_eos: bool,
    pub(super) min_tokens: u32,
    pub(super) logprobs: Option<u32>,
    pub(super) prompt_logprobs: Option<u32>,
    pub(super) skip_special_tokens: bool,
    /// Special tokens that have text nevertheless: marks that are read here.
    pub(super) kept_tokens: Vec<u32>,
    /// What the output has to be.
    pub(super) constraint: Option<Constraint>,
    pub(super) handling: Handling,
}

/// How a request is treated among others; nothing of it changes an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handling {
    /// When it was read.
    pub(super) received: Instant,
    /// Lower goes first.
    pub(super) priority: i32,
    /// Who asks; see [`super::tenant`].
    pub(super) tenant: u64,
    /// Whose API key it came with: they may end it.
    pub(super) owner: u64,
    /// The answer is worth nothing so many milliseconds after `received`.
    pub(super) timeout_ms: Option<u32>,
    /// It is refused when it has waited so many milliseconds for its first row.
    pub(super) max_queue_ms: Option<u32>,
    /// Usage says how long things took.
    pub(super) timing: bool,
}

impl Handling {
    /// When the answer is worth nothing any more.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let timeout = self.timeout_ms.map(u64::from).map(Duration::from_millis);
        timeout.and_then(|timeout| self.received.checked_add(timeout))
    }
}

/// Names of fields in the client's own request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Names {
    pub(super) prompt: &'static str,
    pub(super) max_tokens: &'static str,
    pub(super) logprobs: &'static str,
    /// What says what the output has to be; empty: as the cluster calls it.
    pub(super) constraint: &'static str,
    /// Before the names of sampling parameters.
    pub(super) prefix: &'static str,
}

impl Names {
    /// The client's name of a sampling parameter or an input.
    pub(super) fn of(&self, field: &str) -> String {
        let field = field.strip_prefix("sampling.").unwrap_or(field);
        match field {
            "text" | "token_ids" | "input" | "prompt" => self.prompt.to_owned(),
            "max_tokens" => format!("{}{}", self.prefix, self.max_tokens),
            "logprobs" => format!("{}{}", self.prefix, self.logprobs),
            "model" | "request_id" | "priority" | "tenant" | "timeout_ms" | "max_queue_ms" => {
                field.to_owned()
            }
            bound if bound.starts_with("constraint") && !self.constraint.is_empty() => {
                self.constraint.to_owned()
            }
            other => format!("{}{other}", self.prefix),
        }
    }
}

impl Params {
    /// Checks everything that does not depend on the prompt.
    pub(super) fn check(&self, model: &ServedModel, names: &Names) -> Result<(), Fault> {
        if !self.stop.is_empty() && model.text.is_none() {
            return Err(Fault::precondition(
                names.of("stop"),
                format!(
                    "the checkpoint of `{}` has no tokenizer, so there is no text to stop at; use `stop_token_ids`",
                    model.name
                ),
            ));
        }
        let mut found = Vec::new();
        let mut demand = |field: &str, holds: bool, message: String| {
            if !holds {
                found.push((names.of(field), message));
            }
        };
        let (temperature, top_p) = (self.temperature, self.top_p);
        demand(
            "temperature",
            (0.0..=MAX_TEMPERATURE).contains(&temperature),
            format!("expected a number from 0 to {MAX_TEMPERATURE}, not {temperature}"),
        );
        demand(
            "top_p",
            top_p > 0.0 && top_p <= 1.0,
            format!("expected a number above 0 and up to 1, not {top_p}"),
        );
        demand(
            "min_p",
            (0.0..=1.0).contains(&self.min_p),
            format!("expected a number from 0 to 1, not {}", self.min_p),
        );
        demand(
            "repetition_penalty",
            self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
            format!("expected a number above 0, not {}", self.repetition_penalty),
        );
        for (field, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            demand(
                field,
                penalty.abs() <= MAX_PENALTY,
                format!("expected a number from -{MAX_PENALTY} to {MAX_PENALTY}, not {penalty}"),
            );
        }
        demand(
            "logit_bias",
            self.logit_bias.len() <= MAX_BIASES,
            format!(
                "at most {MAX_BIASES} tokens have a bias, not {}",
                self.logit_bias.len()
            ),
        );
        let vocab = model.config.vocab_size;
        let odd = |&(&id, &bias): &(&u32, &f32)| {
            id as usize >= vocab || bias.is_nan() || bias.abs() > MAX_BIAS
        };
        if let Some((id, bias)) = self
            .logit_bias
            .iter()
            .filter(odd)
            .min_by_key(|(id, _)| **id)
        {
            demand(
                "logit_bias",
                false,
                format!(
                    "{id}: {bias} is no bias from -{MAX_BIAS} to {MAX_BIAS} of a token in the vocabulary of {vocab}"
                ),
            );
        }
        if let Some(max) = self.max_tokens {
            demand(
                "max_tokens",
                max <= model.max_context,
                format!(
                    "{max} is more than the context of {} tokens",
                    model.max_context
                ),
            );
            demand(
                "min_tokens",
                self.min_tokens <= max,
                format!(
                    "{} is more than {} = {max}",
                    self.min_tokens, names.max_tokens
                ),
            );
        }
        demand(
            "min_tokens",
            self.min_tokens <= model.max_context,
            format!(
                "{} is more than the context of {} tokens",
                self.min_tokens, model.max_context
            ),
        );
        for (field, asked) in [
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            let most = MAX_LOGPROBS.min(model.config.vocab_size as u32);
            demand(
                field,
                asked.unwrap_or(0) <= most,
                format!(
                    "at most {most} alternatives are reported, not {}",
                    asked.unwrap_or(0)
                ),
            );
        }
        demand(
            "stop",
            self.stop.len() <= MAX_STOP_STRINGS,
            format!(
                "at most {MAX_STOP_STRINGS} stop strings, not {}",
                self.stop.len()
            ),
        );
        demand(
            "stop",
            self.stop.iter().all(|s| !s.is_empty()),
            "a stop string is empty".into(),
        );
        demand(
            "stop",
            self.stop.iter().all(|s| s.len() <= MAX_STOP_BYTES),
            format!("a stop string has more than {MAX_STOP_BYTES} bytes"),
        );
        demand(
            "stop_token_ids",
            self.stop_token_ids.len() <= MAX_STOP_TOKENS,
            format!(
                "at most {MAX_STOP_TOKENS} stop tokens, not {}",
                self.stop_token_ids.len()
            ),
        );
        if let Some(id) = self
            .stop_token_ids
            .iter()
            .find(|id| **id as usize >= model.config.vocab_size)
        {
            demand(
                "stop_token_ids",
                false,
                format!(
                    "token id {id} is not in the vocabulary of {}",
                    model.config.vocab_size
                ),
            );
        }
        Fault::invalid_fields(found)
    }

    /// Checks a prompt's token ids, and that prompt and output fit the context.
    pub(super) fn check_prompt(
        &self,
        ids: &[u32],
        model: &ServedModel,
        names: &Names,
    ) -> Result<(), Fault> {
        if ids.is_empty() {
            return Err(Fault::invalid(
                names.prompt,
                "the prompt is empty; at least one token is needed",
            ));
        }
        let (context, length) = (model.max_context as usize, ids.len());
        if length >= context {
            return Err(Fault::too_long(
                names.prompt,
                format!(
                    "the prompt has {length} tokens; with at least one of output, at most {} fit the context of {context}",
                    context - 1
                ),
            ));
        }
        if let Some(max) = self
            .max_tokens
            .filter(|max| length + *max as usize > context)
        {
            return Err(Fault::too_long(
                names.of("max_tokens"),
                format!(
                    "prompt ({length} tokens) and output ({max}) exceed the context of {context}; at most {} are left",
                    context - length
                ),
            ));
        }
        let room = (context - length) as u32;
        if self.min_tokens > room {
            return Err(Fault::too_long(
                names.of("min_tokens"),
                format!(
                    "{} is more than the {room} tokens left in the context",
                    self.min_tokens
                ),
            ));
        }
        if let Some((at, id)) = ids
            .iter()
            .enumerate()
            .find(|(_, id)| **id as usize >= model.config.vocab_size)
        {
            let last = model.config.vocab_size.saturating_sub(1);
            return Err(Fault::invalid(
                names.prompt,
                format!("token id {id} at position {at} is not in the vocabulary (0 to {last})"),
            ));
        }
        Ok(())
    }

    /// The request for the cluster; choice `index` of several draws by its own seed.
    pub(super) fn to_request(
        &self,
        request_id: String,
        ids: Vec<u32>,
        max_context: u32,
        index: u64,
    ) -> GenerateRequest {
        let room = max_context.saturating_sub(ids.len() as u32);
        let greedy = self.temperature < GREEDY_BELOW;
        let seed = match self.seed {
            _ if greedy => 0,
            Some(seed) => seed.wrapping_add(index),
            None => uuid::Uuid::new_v4().as_u64_pair().0,
        };
        let sampling = SamplingParams {
            // A cluster has no word for "no output": what comes is dropped here.
            max_tokens: Some(
                self.max_tokens
                    .or(self.default_max_tokens)
                    .unwrap_or(room)
                    .min(room)
                    .max(1),
            ),
            temperature: Some(if greedy { 0.0 } else { self.temperature }),
            top_p: Some(self.top_p),
            top_k: Some(self.top_k),
            seed: Some(seed),
            stop: Vec::new(),
            stop_token_ids: self.stop_token_ids.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            min_tokens: Some(self.min_tokens),
            min_p: Some(self.min_p),
            repetition_penalty: Some(self.repetition_penalty),
            presence_penalty: Some(self.presence_penalty),
            frequency_penalty: Some(self.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            constraint: self.constraint.clone(),
        };
        let handling = &self.handling;
        let spent = u32::try_from(handling.received.elapsed().as_millis()).unwrap_or(u32::MAX);
        GenerateRequest {
            request_id,
            model: String::new(),
            input: Some(Input::TokenIds(TokenIds { ids })),
            sampling: Some(sampling),
            priority: handling.priority,
            tenant: handling.tenant,
            timeout_ms: handling.timeout_ms.map(|all| all.saturating_sub(spent)),
            max_queue_ms: handling.max_queue_ms,
            ..GenerateRequest::default()
        }
    }
}

/// What a client sends as a prompt.
#[derive(Clone, Debug)]
pub(super) enum Prompt {
    /// Tokenized with the special tokens of a prompt.
    Text(String),
    /// Tokenized as it stands: a rendered template has its special tokens.
    Plain(String),
    Ids(Vec<u32>),
}

impl FrontDoor {
    /// Refuses any model but the one served. Empty means that one.
    pub(super) fn check_model(&self, asked: &str) -> Result<(), Fault> {
        if asked.is_empty() || asked == self.model.name {
            return Ok(());
        }
        Err(Fault::unknown_model(asked, &self.model.name))
    }

    /// The tokenizer, or what to do without one.
    pub(super) fn text(
        &self,
        field: &str,
    ) -> Result<&std::sync::Arc<guild_model::text::Text>, Fault> {
        self.model.text.as_ref().ok_or_else(|| {
            let name = &self.model.name;
            Fault::precondition(field, format!("the checkpoint of `{name}` has no tokenizer.json, so text cannot be served; send token ids (gRPC `token_ids`, or a list of integers as `prompt` of /v1/completions)"))
        })
    }

    /// Refuses a text that cannot fit the context, before any token is made of it.
    pub(super) fn check_text(&self, text: &str, field: &str) -> Result<(), Fault> {
        let longest = self.text(field)?.max_token_bytes();
        let least = longest.map_or(0, |bytes| text.len() / bytes.max(1));
        if least >= self.model.max_context as usize {
            return Err(Fault::too_long(
                field,
                format!(
                    "the text has at least {least} tokens; the context is {}",
                    self.model.max_context
                ),
            ));
        }
        Ok(())
    }

    /// Token ids of prompts, checked. Tokenizing runs beside the async threads.
    pub(super) async fn tokenize(
        &self,
        prompts: Vec<Prompt>,
        params: &Params,
        names: &Names,
    ) -> Result<Vec<Vec<u32>>, Fault> {
        let mut texts = Vec::new();
        for prompt in &prompts {
            match prompt {
                Prompt::Ids(ids) => params.check_prompt(ids, &self.model, names)?,
                Prompt::Text(text) if text.is_empty() => {
                    return Err(Fault::invalid(
                        names.prompt,
                        "the prompt is empty; at least one character is needed",
                    ));
                }
                Prompt::Text(text) | Prompt::Plain(text) => {
                    self.check_text(text, names.prompt)?;
                    texts.push(text);
                }
            }
        }
        let ids = if texts.is_empty() {
            into_ids(None, prompts)
        } else {
            self.tokenize_texts(prompts, names).await?
        };
        let ids = ids.map_err(|e| Fault::invalid(names.prompt, e.to_string()))?;
        ids.iter()
            .try_for_each(|ids| params.check_prompt(ids, &self.model, names))?;
        Ok(ids)
    }

    /// Token ids of one text, without the demand that they be a prompt to generate from.
    pub(super) async fn tokenize_one(
        &self,
        prompt: Prompt,
        names: &Names,
    ) -> Result<Vec<u32>, Fault> {
        if let Prompt::Text(text) | Prompt::Plain(text) = &prompt {
            self.check_text(text, names.prompt)?;
        }
        let ids = self.tokenize_texts(vec![prompt], names).await?;
        let ids = ids.map_err(|e| Fault::invalid(names.prompt, e.to_string()))?;
        Ok(ids.into_iter().flatten().collect())
    }

    async fn tokenize_texts(
        &self,
        prompts: Vec<Prompt>,
        names: &Names,
    ) -> Result<Result<Vec<Vec<u32>>, guild_model::ModelError>, Fault> {
        let text = self.text(names.prompt)?.clone();
        tokio::task::spawn_blocking(move || into_ids(Some(&text), prompts))
            .await
            .map_err(|e| Fault::internal(format!("tokenizing failed: {e}")))
    }
}

fn into_ids(
    text: Option<&guild_model::text::Text>,
    prompts: Vec<Prompt>,
) -> Result<Vec<Vec<u32>>, guild_model::ModelError> {
    let missing = || guild_model::ModelError::input("prompt", "there is no tokenizer");
    prompts
        .into_iter()
        .map(|prompt| match prompt {
            Prompt::Ids(ids) => Ok(ids),
            Prompt::Text(t) => text.ok_or_else(missing)?.encode(&t),
            Prompt::Plain(t) => text.ok_or_else(missing)?.encode_plain(&t),
        })
        .collect()
}
