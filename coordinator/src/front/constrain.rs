//! What a client says its output has to be, in the words of the OpenAI API and of vLLM.
//!
//! Nothing is compiled here: attention nodes have the grammars, and say what is wrong with one. The
//! error names the client's own field, which [`Bound`] remembers.

use guild_proto::inference::v1::{Choice, Constraint, constraint::Form};
use serde_json::Value;

use super::{
    fault::Fault,
    fields::{Fields, kind},
};

/// Characters of the name of a JSON Schema at most, as in the OpenAI API.
const MAX_NAME: usize = 64;

/// What an output has to be, and the field that says so.
#[derive(Clone, Debug)]
pub(super) struct Bound {
    pub(super) constraint: Constraint,
    pub(super) field: &'static str,
}

impl Bound {
    pub(super) fn new(field: &'static str, form: Form) -> Bound {
        let constraint = Constraint {
            form: Some(form),
            after_token: None,
        };
        Bound { constraint, field }
    }

    /// The schema of the JSON that the output is to be, if it is.
    pub(super) fn json(&self) -> Option<Value> {
        match &self.constraint.form {
            Some(Form::JsonObject(_)) => Some(serde_json::json!({"type": "object"})),
            Some(Form::JsonSchema(schema)) => serde_json::from_str(schema).ok(),
            _ => None,
        }
    }
}

/// Reads `response_format`, `structured_outputs` and its older names.
pub(super) fn read(fields: &mut Fields) -> Result<Option<Bound>, Fault> {
    let mut all = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        all.extend(response_format(Fields::from(format))?);
    }
    if let Some(outputs) = fields.object("structured_outputs")? {
        let names = [
            "structured_outputs.json",
            "structured_outputs.json_object",
            "structured_outputs.regex",
            "structured_outputs.grammar",
            "structured_outputs.choice",
        ];
        let mut outputs = Fields::from(outputs);
        let within = |f: Fault| f.rename(|field| format!("structured_outputs.{field}"));
        all.extend(
            forms(
                &mut outputs,
                ["json", "json_object", "regex", "grammar", "choice"],
                names,
            )
            .map_err(within)?,
        );
        for name in ["whitespace_pattern", "structural_tag"] {
            outputs.refuse_unless(name, |_| false).map_err(within)?;
        }
        outputs
            .flag("disable_any_whitespace", true)
            .map_err(within)?;
        outputs.finish().map_err(within)?;
    }
    let older = [
        "guided_json",
        "guided_json_object",
        "guided_regex",
        "guided_grammar",
        "guided_choice",
    ];
    all.extend(forms(fields, older, older)?);
    if let [first, second, ..] = &all[..] {
        let message = format!(
            "`{}` says already what the output has to be; leave one of them out",
            first.field
        );
        return Err(Fault::invalid(second.field, message));
    }
    Ok(all.pop())
}

/// `response_format` of chat.
fn response_format(mut format: Fields) -> Result<Option<Bound>, Fault> {
    let field = "response_format";
    let within = |f: Fault| f.rename(|name| format!("{field}.{name}"));
    let kind = format.string("type").map_err(within)?.unwrap_or_default();
    let schema = || {
        let schema = format.object("json_schema")?;
        let schema = schema
            .ok_or_else(|| Fault::missing("json_schema", "an object with `name` and `schema`"))?;
        let mut schema = Fields::from(schema);
        let within = |f: Fault| f.rename(|name| format!("json_schema.{name}"));
        let bound = json_schema(&mut schema, field).map_err(within)?;
        schema.finish().map_err(within)?;
        Ok(bound)
    };
    let bound = of_kind(&kind, field, schema).map_err(within)?;
    format.finish().map_err(within)?;
    Ok(bound)
}

/// What a format's `type` means; `schema` reads what goes with that of a schema.
pub(super) fn of_kind(
    kind: &str,
    field: &'static str,
    schema: impl FnOnce() -> Result<Bound, Fault>,
) -> Result<Option<Bound>, Fault> {
    let kinds = "text, json_object or json_schema";
    match kind {
        "text" => Ok(None),
        "json_object" => Ok(Some(Bound::new(field, Form::JsonObject(true)))),
        "json_schema" => schema().map(Some),
        "" => Err(Fault::missing("type", kinds)),
        _ => Err(Fault::unsupported("type", &format!("expected {kinds}"))),
    }
}

/// `name`, `schema`, `strict` and `description`; an output is always held to its schema.
pub(super) fn json_schema(fields: &mut Fields, field: &'static str) -> Result<Bound, Fault> {
    let name = fields.string("name")?.unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(Fault::invalid(
            "name",
            format!("expected 1 to {MAX_NAME} of a-z, A-Z, 0-9, `_` and `-`"),
        ));
    }
    fields.string("description")?;
    fields.flag("strict", false)?;
    let schema = fields.object("schema")?;
    let schema = schema.ok_or_else(|| Fault::missing("schema", "a JSON Schema"))?;
    Ok(Bound::new(
        field,
        Form::JsonSchema(Value::Object(schema).to_string()),
    ))
}

/// The five forms by the names they have in one place.
fn forms(
    fields: &mut Fields,
    [json, json_object, regex, grammar, choice]: [&str; 5],
    shown: [&'static str; 5],
) -> Result<Vec<Bound>, Fault> {
    let mut all = Vec::new();
    match fields.take(json) {
        None => {}
        Some(Value::String(schema)) => all.push(Bound::new(shown[0], Form::JsonSchema(schema))),
        Some(schema @ Value::Object(_)) => {
            all.push(Bound::new(shown[0], Form::JsonSchema(schema.to_string())))
        }
        Some(other) => {
            let message = format!(
                "expected a JSON Schema, as an object or as text, not {}",
                kind(&other)
            );
            return Err(Fault::invalid(json, message));
        }
    }
    if fields.flag(json_object, false)? {
        all.push(Bound::new(shown[1], Form::JsonObject(true)));
    }
    all.extend(
        fields
            .string(regex)?
            .map(|text| Bound::new(shown[2], Form::Regex(text))),
    );
    all.extend(
        fields
            .string(grammar)?
            .map(|text| Bound::new(shown[3], Form::Grammar(text))),
    );
    match fields.take(choice) {
        None => {}
        Some(Value::Array(items)) => {
            let text = |item: Value| match item {
                Value::String(text) => Ok(text),
                other => Err(Fault::invalid(
                    choice,
                    format!("expected texts, found {} among them", kind(&other)),
                )),
            };
            let texts = items.into_iter().map(text).collect::<Result<_, _>>()?;
            all.push(Bound::new(shown[4], Form::Choice(Choice { texts })));
        }
        Some(other) => {
            return Err(Fault::invalid(
                choice,
                format!("expected a list of texts, not {}", kind(&other)),
            ));
        }
    }
    Ok(all)
}
