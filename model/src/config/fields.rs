//! Typed access to the fields of a JSON object, with complaints that name them.

use serde_json::{Map, Value};

use crate::ModelError;

/// A JSON object whose complaints carry full field names.
pub(super) struct Fields<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) prefix: &'a str,
}

impl<'a> Fields<'a> {
    pub(super) fn bad(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(format!("{}{key}", self.prefix), reason)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.bad(
                key,
                format!("must be an object or null, not {}", shown(other)),
            )),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.bad(key, format!("must be a string, not {}", shown(other)))),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => {
                Err(self.bad(key, format!("must be true or false, not {}", shown(other))))
            }
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() => Ok(Some(x)),
                _ => Err(self.bad(
                    key,
                    format!("must be a finite number, not {}", shown(value)),
                )),
            },
        }
    }

    /// A number above zero that f32 can hold.
    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match self.number(key)?.or(default) {
            Some(x) if x > 0.0 && (x as f32).is_normal() => Ok(x),
            Some(x) => Err(self.bad(key, format!("{x}; must be above zero and within f32"))),
            None => Err(self.bad(key, "missing")),
        }
    }

    pub(super) fn uint(&self, key: &str) -> Result<Option<u64>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) => Ok(Some(n)),
                None => Err(self.bad(
                    key,
                    format!("must be a whole number of at least 0, not {}", shown(value)),
                )),
            },
        }
    }

    pub(super) fn capped(&self, key: &str, n: u64, cap: usize) -> Result<usize, ModelError> {
        match usize::try_from(n) {
            Ok(n) if n <= cap => Ok(n),
            _ => Err(self.bad(
                key,
                format!("{n} is more than {cap}, the most that is believed"),
            )),
        }
    }

    /// A required count of at least one.
    pub(super) fn count(&self, key: &str, cap: usize) -> Result<usize, ModelError> {
        match self.uint(key)? {
            None => Err(self.bad(key, "missing")),
            Some(0) => Err(self.bad(key, "0; must be at least 1")),
            Some(n) => self.capped(key, n, cap),
        }
    }

    /// One id, a list of ids, null or nothing. Ids beyond the vocabulary can never occur and are
    /// left out with a warning:
    /// cut-down models keep those of their tokenizer.
    pub(super) fn tokens(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
        let one = |value: &Value| match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(id) => Ok(id),
            None => Err(self.bad(key, format!("{} is not a token id", shown(value)))),
        };
        let mut ids = match self.get(key) {
            None => Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(one).collect::<Result<_, _>>()?,
            Some(value) => vec![one(value)?],
        };
        ids.retain(|&id| {
            let known = (id as usize) < vocab_size;
            if !known {
                tracing::warn!(
                    field = format!("{}{key}", self.prefix),
                    id,
                    vocab_size,
                    "token id is outside the vocabulary, ignored"
                );
            }
            known
        });
        Ok(ids)
    }
}

/// A value as a message may show it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(s) => format!("the string {:?}", s.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}
