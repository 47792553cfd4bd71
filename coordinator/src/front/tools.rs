//! Tools: which a client offers, whether they must be called, and the grammar that sees to it.

use guild_model::text::Text;
use guild_proto::inference::v1::constraint::Form;
use serde_json::{Map, Value, json};

use super::{
    constrain::Bound,
    dialect::{Dialect, THINK_END, on_one_line},
    fault::Fault,
    fields::{Fields, kind},
    reader::Thoughts,
};

/// Tools of a request at most, as in the OpenAI API.
pub(super) const MAX_TOOLS: usize = 128;
/// Calls that one answer is forced to have at most.
const MAX_FORCED_CALLS: usize = 16;
/// Characters of a function's name at most, as in the OpenAI API.
const MAX_NAME: usize = 64;

/// What may be called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Choice {
    #[default]
    None,
    Auto,
    Required,
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Tools {
    /// As the chat endpoint has them: `type` and `function`.
    offered: Vec<Value>,
    choice: Choice,
    parallel: bool,
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`, as the chat endpoint has them.
    pub(super) fn read(fields: &mut Fields) -> Result<Tools, Fault> {
        Tools::read_with(fields, Ok, |choice| {
            choice.get("function").and_then(|f| f.get("name")).cloned()
        })
    }

    /// The same for an endpoint with other forms: `tool` makes one of this endpoint's, `named` finds
    /// the name in a choice.
    pub(super) fn read_with(
        fields: &mut Fields,
        tool: impl Fn(Map<String, Value>) -> Result<Map<String, Value>, Fault>,
        named: impl Fn(&Map<String, Value>) -> Option<Value>,
    ) -> Result<Tools, Fault> {
        let items = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(items)) if items.len() <= MAX_TOOLS => items,
            Some(Value::Array(items)) => {
                return Err(Fault::invalid(
                    "tools",
                    format!("{} tools, at most {MAX_TOOLS} are taken", items.len()),
                ));
            }
            Some(other) => {
                return Err(Fault::invalid(
                    "tools",
                    format!("expected a list of tools, not {}", kind(&other)),
                ));
            }
        };
        let mut offered: Vec<Value> = Vec::with_capacity(items.len());
        for (i, item) in items.into_iter().enumerate() {
            let within = |f: Fault| f.rename(|field| format!("tools[{i}].{field}"));
            let Value::Object(item) = item else {
                return Err(Fault::invalid(
                    format!("tools[{i}]"),
                    format!("expected an object, not {}", kind(&item)),
                ));
            };
            let item = tool(item).and_then(check_tool).map_err(within)?;
            if offered.iter().any(|other| name_of(other) == name_of(&item)) {
                return Err(Fault::invalid(
                    format!("tools[{i}]"),
                    format!("a second tool named {:?}", name_of(&item)),
                ));
            }
            offered.push(item);
        }
        let choice = match fields.take("tool_choice") {
            None if offered.is_empty() => Choice::None,
            None => Choice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => Choice::None,
                "auto" if offered.is_empty() => Choice::None,
                "auto" => Choice::Auto,
                "required" => Choice::Required,
                _ => {
                    return Err(Fault::invalid(
                        "tool_choice",
                        "expected none, auto, required or a function",
                    ));
                }
            },
            Some(Value::Object(choice))
                if choice.get("type").and_then(Value::as_str) == Some("function") =>
            {
                match named(&choice) {
                    Some(Value::String(name)) => Choice::Named(name),
                    _ => return Err(Fault::missing("tool_choice", "the function's `name`")),
                }
            }
            Some(Value::Object(_)) => {
                return Err(Fault::unsupported(
                    "tool_choice",
                    "of the objects only a function can be chosen",
                ));
            }
            Some(other) => {
                return Err(Fault::invalid(
                    "tool_choice",
                    format!("expected a word or a function, not {}", kind(&other)),
                ));
            }
        };
        match &choice {
            Choice::Required if offered.is_empty() => {
                return Err(Fault::invalid(
                    "tool_choice",
                    "a call is required and there are no `tools`",
                ));
            }
            Choice::Named(name) if !offered.iter().any(|tool| name_of(tool) == name) => {
                return Err(Fault::invalid(
                    "tool_choice",
                    format!("no tool is named {name:?}"),
                ));
            }
            _ => {}
        }
        let parallel = fields.flag("parallel_tool_calls", true)?;
        Ok(Tools {
            offered,
            choice,
            parallel,
        })
    }

    /// What the template is shown.
    pub(super) fn offered(&self) -> &[Value] {
        &self.offered
    }

    /// Whether calls are to be read out of the answer.
    pub(super) fn listens(&self) -> bool {
        self.choice != Choice::None
    }

    /// Whether only one call counts.
    pub(super) fn one_call(&self) -> bool {
        !self.parallel || matches!(self.choice, Choice::Named(_))
    }

    /// What the output has to be, with what the client says of it apart from tools. `thoughts` says
    /// where the prompt has ended: what is bound comes behind the thoughts.
    pub(super) fn bind(
        &self,
        text: &Text,
        bound: Option<Bound>,
        thoughts: Thoughts,
    ) -> Result<Option<Bound>, Fault> {
        let dialect = Dialect::of(text);
        let most = if self.one_call() { 1 } else { MAX_FORCED_CALLS };
        let calls = |begun: bool| {
            let chosen = |tool: &&Value| !matches!(&self.choice, Choice::Named(name) if name_of(tool) != name);
            let tools: Vec<(&str, Value)> = self
                .offered
                .iter()
                .filter(chosen)
                .map(|tool| (name_of(tool), arguments_of(tool)))
                .collect();
            let tools: Vec<(&str, &Value)> =
                tools.iter().map(|(name, schema)| (*name, schema)).collect();
            dialect.grammar(text, &tools, most, begun)
        };
        let forced = matches!(self.choice, Choice::Required | Choice::Named(_));
        let strict = self.choice == Choice::Auto && self.offered.iter().any(is_strict);
        let mut bound = match bound {
            Some(bound) if forced => {
                let message = format!("it demands a call, and `{}` something else", bound.field);
                return Err(Fault::invalid("tool_choice", message));
            }
            Some(bound) if self.choice == Choice::Auto => match bound.json() {
                Some(schema) => {
                    let either = format!(
                        "start: value | calls\nvalue: %json {}\n{}",
                        on_one_line(&schema),
                        calls(false)
                    );
                    Bound::new(bound.field, Form::Grammar(either))
                }
                None => {
                    let message = "only JSON can stand beside tools; use `tool_choice` none";
                    return Err(Fault::invalid(bound.field, message));
                }
            },
            Some(bound) => bound,
            None if forced => Bound::new(
                "tools",
                Form::Grammar(format!("start: calls\n{}", calls(false))),
            ),
            None if strict => {
                let begin = text.token_id(dialect.marks().begin).ok_or_else(|| {
                    Fault::unsupported("tools", "`strict` needs a model that has a token for calls, or `tool_choice` required")
                })?;
                let mut bound = Bound::new(
                    "tools",
                    Form::Grammar(format!("start: calls\n{}", calls(true))),
                );
                bound.constraint.after_token = Some(begin);
                return Ok(Some(bound));
            }
            None => return Ok(None),
        };
        if thoughts == Thoughts::Begun {
            bound.constraint.after_token = text.token_id(THINK_END);
        }
        Ok(Some(bound))
    }
}

/// A tool of the chat endpoint: a function with a name, perhaps with a schema for its arguments.
fn check_tool(tool: Map<String, Value>) -> Result<Value, Fault> {
    match tool.get("type").and_then(Value::as_str) {
        Some("function") => {}
        Some(_) => return Err(Fault::unsupported("type", "only functions can be called")),
        None => return Err(Fault::missing("type", "`function`")),
    }
    let Some(Value::Object(function)) = tool.get("function") else {
        return Err(Fault::missing("function", "an object with a `name`"));
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    match function.get("name") {
        Some(Value::String(name))
            if (1..=MAX_NAME).contains(&name.len()) && name.chars().all(plain) => {}
        Some(Value::String(_)) => {
            return Err(Fault::invalid(
                "function.name",
                format!("expected 1 to {MAX_NAME} of a-z, A-Z, 0-9, `_`, `-` and `.`"),
            ));
        }
        _ => return Err(Fault::missing("function.name", "a text")),
    }
    match function.get("parameters") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(other) => {
            return Err(Fault::invalid(
                "function.parameters",
                format!("expected a JSON Schema, not {}", kind(other)),
            ));
        }
    }
    match function.get("strict") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(other) => {
            return Err(Fault::invalid(
                "function.strict",
                format!("expected true or false, not {}", kind(other)),
            ));
        }
    }
    match function.get("description") {
        None | Some(Value::Null | Value::String(_)) => Ok(Value::Object(tool)),
        Some(other) => Err(Fault::invalid(
            "function.description",
            format!("expected a text, not {}", kind(other)),
        )),
    }
}

fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

fn is_strict(tool: &Value) -> bool {
    tool["function"]["strict"] == Value::Bool(true)
}

/// The schema of a function's arguments: an object always, and an empty one where nothing is said.
fn arguments_of(tool: &Value) -> Value {
    match &tool["function"]["parameters"] {
        Value::Object(schema) => {
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| "object".into());
            Value::Object(schema)
        }
        _ => json!({"type": "object", "properties": {}, "additionalProperties": false}),
    }
}
