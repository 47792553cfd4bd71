//! Sampling parameters and options that both OpenAI endpoints share.

use std::{collections::HashMap, time::Instant};

use serde_json::Value;

use super::{
    fault::Fault,
    fields::{Fields, kind},
    request::{Handling, Params},
    tenant,
};

/// Alternatives per token over HTTP at most, as in the OpenAI API.
pub(super) const MAX_HTTP_LOGPROBS: u32 = 20;

/// Reads the sampling parameters that both endpoints have, and refuses those
/// that this server would have to ignore. `key` is the API key of who asks.
pub(super) fn sampling(fields: &mut Fields, key: Option<&[u8]>) -> Result<Params, Fault> {
    let number =
        |fields: &mut Fields, name| fields.number(name).map(|v| v.map_or(1.0, |v| v as f32));
    let params = Params {
        max_tokens: None,
        default_max_tokens: None,
        temperature: number(fields, "temperature")?,
        top_p: number(fields, "top_p")?,
        // -1 and 0 both mean "all".
        top_k: fields
            .integer("top_k", -1, i64::from(i32::MAX))?
            .map_or(0, |k| u32::try_from(k).unwrap_or(0)),
        min_p: fields.number("min_p")?.unwrap_or(0.0) as f32,
        repetition_penalty: number(fields, "repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0) as f32,
        logit_bias: logit_bias(fields)?,
        seed: fields
            .integer("seed", i64::MIN, i64::MAX)?
            .map(|s| s as u64),
        stop: fields.strings("stop")?,
        stop_token_ids: fields.token_ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.flag("ignore_eos", false)?,
        min_tokens: fields.unsigned("min_tokens", 0, u32::MAX)?.unwrap_or(0),
        logprobs: None,
        prompt_logprobs: None,
        skip_special_tokens: fields.flag("skip_special_tokens", true)?,
        kept_tokens: Vec::new(),
        constraint: None,
        handling: handling(fields, key)?,
    };
    refuse_unsupported(fields)?;
    Ok(params)
}

/// How the request is treated among others.
pub(super) fn handling(fields: &mut Fields, key: Option<&[u8]>) -> Result<Handling, Fault> {
    let (user, salt) = (fields.string("user")?, fields.string("cache_salt")?);
    let priority = fields.integer("priority", i32::MIN.into(), i32::MAX.into())?;
    Ok(Handling {
        received: Instant::now(),
        priority: priority.and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
        tenant: tenant::of(key, user.as_deref(), salt.as_deref()),
        owner: tenant::of(key, None, None),
        timeout_ms: fields.unsigned("timeout_ms", 1, u32::MAX)?,
        max_queue_ms: fields.unsigned("max_queue_ms", 0, u32::MAX)?,
        timing: fields.flag("timings", false)?,
    })
}

/// Biases by token id. The keys of a JSON object are texts, those of this one are numbers.
fn logit_bias(fields: &mut Fields) -> Result<HashMap<u32, f32>, Fault> {
    let name = "logit_bias";
    let entries = fields.object(name)?.unwrap_or_default();
    let entry = |(id, bias): (String, Value)| match (id.parse(), bias.as_f64()) {
        (Ok(id), Some(bias)) => Ok((id, bias as f32)),
        (Err(_), _) => Err(Fault::invalid(name, format!("{id:?} is not a token id"))),
        (_, None) => Err(Fault::invalid(
            name,
            format!("{id}: expected a number, not {}", kind(&bias)),
        )),
    };
    entries.into_iter().map(entry).collect()
}

/// Features of other servers that would change the answer. The value that asks
/// for nothing is let through: clients send it.
fn refuse_unsupported(fields: &mut Fields) -> Result<(), Fault> {
    fn is(number: f64) -> impl Fn(&Value) -> bool {
        move |v| v.as_f64() == Some(number)
    }
    let empty_list = |v: &Value| v.as_array().is_some_and(Vec::is_empty);
    let none_or_auto = |v: &Value| matches!(v.as_str(), Some("none" | "auto"));
    let off = |v: &Value| *v == Value::Bool(false);
    fields.refuse_unless("length_penalty", is(1.0))?;
    fields.refuse_unless("functions", empty_list)?;
    fields.refuse_unless("function_call", none_or_auto)?;
    fields.refuse_unless("modalities", |v| *v == serde_json::json!(["text"]))?;
    fields.refuse_unless("verbosity", |v| v.as_str() == Some("medium"))?;
    fields.refuse_unless("use_beam_search", off)?;
    fields.refuse_unless("include_stop_str_in_output", off)?;
    fields.refuse_unless("continue_final_message", off)?;
    fields.refuse_unless("bad_words", empty_list)
}

/// How the answer is sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delivery {
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Token ids beside the text.
    pub(super) token_ids: bool,
}

/// Reads `stream`, `stream_options` and `return_token_ids`.
pub(super) fn delivery(fields: &mut Fields) -> Result<Delivery, Fault> {
    let stream = fields.flag("stream", false)?;
    let mut include_usage = false;
    if let Some(options) = fields.object("stream_options")? {
        if !stream {
            return Err(Fault::invalid(
                "stream_options",
                "only allowed when `stream` is true",
            ));
        }
        let within = |f: Fault| f.rename(|field| format!("stream_options.{field}"));
        let mut options = Fields::from(options);
        include_usage = options.flag("include_usage", false).map_err(within)?;
        options.flag("include_obfuscation", false).map_err(within)?;
        options
            .refuse_unless("continuous_usage_stats", |v| *v == Value::Bool(false))
            .map_err(within)?;
        options.finish().map_err(within)?;
    }
    Ok(Delivery {
        stream,
        include_usage,
        token_ids: fields.flag("return_token_ids", false)?,
    })
}

/// Reads `n`, or another number of choices; `prompts` times it may be `max_choices` at most.
pub(super) fn choices(
    fields: &mut Fields,
    name: &'static str,
    prompts: usize,
    max_choices: usize,
) -> Result<Option<u32>, Fault> {
    let asked = fields.unsigned(name, 1, u32::try_from(max_choices).unwrap_or(u32::MAX))?;
    let n = asked.unwrap_or(1);
    if n as usize * prompts > max_choices {
        let field = if n == 1 { "prompt" } else { name };
        return Err(Fault::invalid(
            field,
            format!(
                "{prompts} prompts with {n} choices each; at most {max_choices} choices are made per request"
            ),
        ));
    }
    Ok(asked)
}
