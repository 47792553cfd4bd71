//! Reading a JSON request field by field, each fault with the field's name.
//!
//! The cost of a body is known before a value is made of it: [`parse`] counts
//! values and depth first.

use serde_json::{Map, Value};

use super::fault::Fault;

/// How deep a request may be nested.
pub(super) const MAX_JSON_DEPTH: usize = 32;

/// Request fields that change nothing about an answer.
const HARMLESS: [&str; 11] = [
    "metadata",
    "store",
    "service_tier",
    "cache_prompt",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "request_id",
    "rid",
    "spaces_between_special_tokens",
];

/// Makes a request object of a body that holds at most `max_values` values.
pub(super) fn parse(body: &[u8], max_values: usize) -> Result<Fields, Fault> {
    check_cost(body, max_values)?;
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(Fields { map }),
        Ok(other) => Err(Fault::malformed(format!(
            "the body must be a JSON object, not {}",
            kind(&other)
        ))),
        Err(e) => Err(Fault::malformed(format!("the body is not valid JSON: {e}"))),
    }
}

/// Counts values and depth without making any.
fn check_cost(body: &[u8], max_values: usize) -> Result<(), Fault> {
    let (mut values, mut depth) = (1usize, 0usize);
    // The field of the request that is being read: its last string at depth 1 before a colon.
    let (mut last_string, mut field) = (0..0, 0..0);
    let mut at = 0;
    while at < body.len() {
        match body[at] {
            b'"' => {
                let start = at + 1;
                at += 1;
                while at < body.len() && body[at] != b'"' {
                    at += if body[at] == b'\\' { 2 } else { 1 };
                }
                if depth == 1 {
                    last_string = start..at.min(body.len());
                }
            }
            b':' if depth == 1 => field = last_string.clone(),
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > MAX_JSON_DEPTH || values > max_values {
            let what = if depth > MAX_JSON_DEPTH {
                format!("nested deeper than {MAX_JSON_DEPTH} levels")
            } else {
                format!("the request has more than {max_values} values")
            };
            return Err(match std::str::from_utf8(&body[field]) {
                Ok(name) if (1..=64).contains(&name.len()) => Fault::invalid(name, what),
                _ => Fault::malformed(format!("the body is refused: {what}")),
            });
        }
        at += 1;
    }
    Ok(())
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a fractional or very large number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn wrong_kind(name: &str, expected: &str, found: &Value) -> Fault {
    Fault::invalid(name, format!("expected {expected}, not {}", kind(found)))
}

/// The fields of a request that have not been read yet. `null` is absent, as in
/// the OpenAI API.
#[derive(Debug)]
pub(super) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|v| !v.is_null())
    }

    /// A field that will be read later.
    pub(super) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong_kind(name, "a string", &other)),
        }
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> Result<bool, Fault> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(b),
            Some(other) => Err(wrong_kind(name, "true or false", &other)),
        }
    }

    /// An integer within bounds, both included.
    pub(super) fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, Fault> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let expected = || format!("an integer from {min} to {max}");
        let Value::Number(number) = &value else {
            return Err(wrong_kind(name, &expected(), &value));
        };
        match number.as_i64() {
            Some(i) if (min..=max).contains(&i) => Ok(Some(i)),
            _ => Err(Fault::invalid(
                name,
                format!("expected {}, not {number}", expected()),
            )),
        }
    }

    /// An unsigned integer up to a bound.
    pub(super) fn unsigned(
        &mut self,
        name: &str,
        min: u32,
        max: u32,
    ) -> Result<Option<u32>, Fault> {
        let value = self.integer(name, min.into(), max.into())?;
        Ok(value.and_then(|v| u32::try_from(v).ok()))
    }

    /// Any number; bounds are the caller's.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f64>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(n)) => Ok(n.as_f64()),
            Some(other) => Err(wrong_kind(name, "a number", &other)),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong_kind(name, "an object", &other)),
        }
    }

    /// A string or a list of strings.
    pub(super) fn strings(&mut self, name: &str) -> Result<Vec<String>, Fault> {
        let expected = "a string or a list of strings";
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::String(s)) => Ok(vec![s]),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| match item {
                    Value::String(s) => Ok(s),
                    other => Err(Fault::invalid(
                        name,
                        format!("expected {expected}, found {} in the list", kind(&other)),
                    )),
                })
                .collect(),
            Some(other) => Err(wrong_kind(name, expected, &other)),
        }
    }

    /// A list of token ids; `None` when absent.
    pub(super) fn token_ids(&mut self, name: &str) -> Result<Option<Vec<u32>>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => token_ids(name, &items).map(Some),
            Some(other) => Err(wrong_kind(name, "a list of token ids", &other)),
        }
    }

    /// A feature this server does not have: fine as long as it is not asked for.
    pub(super) fn refuse_unless(
        &mut self,
        name: &str,
        unused: impl Fn(&Value) -> bool,
    ) -> Result<(), Fault> {
        match self.take(name) {
            Some(value) if !unused(&value) => Err(Fault::unsupported(
                name,
                "not supported by this server; leave it out",
            )),
            _ => Ok(()),
        }
    }

    /// Refuses what nobody has read, except what cannot change an answer.
    pub(super) fn finish(self) -> Result<(), Fault> {
        match self
            .map
            .iter()
            .find(|(name, value)| !HARMLESS.contains(&name.as_str()) && !value.is_null())
        {
            Some((name, _)) => {
                let name: String = name.chars().take(100).collect();
                Err(Fault::unsupported(
                    &name,
                    "unknown or unsupported parameter; leave it out",
                ))
            }
            None => Ok(()),
        }
    }
}

impl From<Map<String, Value>> for Fields {
    fn from(map: Map<String, Value>) -> Self {
        Self { map }
    }
}

/// Token ids of a JSON list; whether they are in the vocabulary is checked later.
pub(super) fn token_ids(name: &str, items: &[Value]) -> Result<Vec<u32>, Fault> {
    items
        .iter()
        .map(|item| {
            item.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| match item {
                    Value::Number(n) => Fault::invalid(name, format!("{n} is not a token id")),
                    other => Fault::invalid(
                        name,
                        format!("expected a list of token ids, found {} in it", kind(other)),
                    ),
                })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_refused_before_parsing_and_names_the_field() {
        let long = format!(r#"{{"model":"m","prompt":[{}]}}"#, "1,".repeat(5000));
        let fault = parse(long.as_bytes(), 1000).unwrap_err();
        assert_eq!(fault.body()["error"]["param"], "prompt");
        let deep = format!(r#"{{"messages":{}"#, "[".repeat(50));
        assert_eq!(
            parse(deep.as_bytes(), 1000).unwrap_err().body()["error"]["param"],
            "messages"
        );
        let commas = format!(r#"{{"prompt":"{}"}}"#, "a,[{".repeat(5000));
        assert!(
            parse(commas.as_bytes(), 1000).is_ok(),
            "commas in text cost nothing"
        );
        let escaped = br#"{"prompt":"a\",\"b\\","stop":null}"#;
        assert!(parse(escaped, 4).is_ok());
    }

    #[test]
    fn an_unterminated_string_ends_the_count() {
        assert!(parse(br#"{"a":"\"#, 10).is_err());
        assert!(parse(br#"{"a"#, 10).is_err());
    }
}
