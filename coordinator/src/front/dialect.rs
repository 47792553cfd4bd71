//! How the families of the DeepSeek line write reasoning and tool calls.
//!
//! Secret: the marks, and where a template tells which are meant. It writes: grammars that force
//! calls, and instructions for a model whose template has none. [`super::reader`] reads.

use guild_model::text::Text;
use serde_json::{Value, json};

/// A way of writing tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// DeepSeek-V3 and R1: a kind before the name, arguments in a fenced block.
    V3,
    /// DeepSeek-V3.1 and later: name and arguments alone.
    V31,
    /// Kimi-K2: the call's id instead of its name.
    Kimi,
}

/// The marks of a dialect, in the order of a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marks {
    /// Before all calls.
    pub(super) begin: &'static str,
    /// Before a call.
    pub(super) call: &'static str,
    /// Within a call, between kind and name or between name and arguments.
    pub(super) separator: &'static str,
    /// Right before the arguments.
    pub(super) open: &'static str,
    /// After a call, with what may stand before it and is no part of the arguments; the whole
    /// mark first, the bare one last.
    pub(super) close: &'static [&'static str],
    /// After all calls.
    pub(super) end: &'static str,
}

const V3: Marks = Marks {
    open: "```json",
    close: &[
        "\n```<｜tool▁call▁end｜>",
        "```<｜tool▁call▁end｜>",
        "\n<｜tool▁call▁end｜>",
        "<｜tool▁call▁end｜>",
    ],
    ..V31
};

const V31: Marks = Marks {
    begin: "<｜tool▁calls▁begin｜>",
    call: "<｜tool▁call▁begin｜>",
    separator: "<｜tool▁sep｜>",
    open: "<｜tool▁sep｜>",
    close: &["<｜tool▁call▁end｜>"],
    end: "<｜tool▁calls▁end｜>",
};

const KIMI: Marks = Marks {
    begin: "<|tool_calls_section_begin|>",
    call: "<|tool_call_begin|>",
    separator: "<|tool_call_argument_begin|>",
    open: "<|tool_call_argument_begin|>",
    close: &["<|tool_call_end|>"],
    end: "<|tool_calls_section_end|>",
};

/// Around the arguments of V3.
const FENCE_OPEN: &str = "\n```json\n";
const FENCE_CLOSE: &str = "\n```";

/// Before what the model thinks.
pub(super) const THINK: &str = "<think>";
/// After it.
pub(super) const THINK_END: &str = "</think>";

impl Marks {
    /// The mark after a call alone.
    fn bare_close(&self) -> &'static str {
        self.close.last().copied().unwrap_or_default()
    }
}

impl Dialect {
    /// The dialect of a checkpoint; that of V3 where its template knows no tools.
    pub(super) fn of(text: &Text) -> Dialect {
        if text.template_mentions(KIMI.separator) {
            Dialect::Kimi
        } else if text.template_mentions(V31.separator) && !text.template_mentions(V3.open) {
            Dialect::V31
        } else {
            Dialect::V3
        }
    }

    pub(super) fn marks(self) -> Marks {
        match self {
            Dialect::V3 => V3,
            Dialect::V31 => V31,
            Dialect::Kimi => KIMI,
        }
    }

    /// The name in a call's head, which is all between `call` and `open`; and the call's id where
    /// the model chooses it.
    pub(super) fn name_in(self, head: &str) -> (String, Option<String>) {
        let head = head.trim();
        match self {
            Dialect::V3 => {
                let name = head.split_once(V3.separator).map_or(head, |(_, name)| name);
                (name.trim().to_owned(), None)
            }
            Dialect::V31 => (head.to_owned(), None),
            Dialect::Kimi => {
                let name = head.rsplit_once(':').map_or(head, |(name, _)| name);
                let name = name.strip_prefix("functions.").unwrap_or(name);
                (name.to_owned(), Some(head.to_owned()))
            }
        }
    }

    /// Tokens that are marks, and must reach the reader although they may count as special.
    pub(super) fn mark_tokens(self, text: &Text) -> Vec<u32> {
        let marks = self.marks();
        let all = [
            marks.begin,
            marks.call,
            marks.separator,
            marks.bare_close(),
            marks.end,
            THINK,
            THINK_END,
        ];
        all.iter().filter_map(|mark| text.token_id(mark)).collect()
    }

    /// Rules of a Lark grammar, `calls` and what it needs, for one call or more of these tools
    /// (name and JSON Schema of the arguments), `most` of them at most.
    pub(super) fn grammar(
        self,
        text: &Text,
        tools: &[(&str, &Value)],
        most: usize,
        begun: bool,
    ) -> String {
        let marks = self.marks();
        // A mark that is a token is this token; spelled out it would be another text.
        let mark = |mark: &str| match text.token_id(mark) {
            Some(id) => format!("<[{id}]>"),
            None => Value::from(mark).to_string(),
        };
        let literal = |text: String| Value::from(text).to_string();
        let between = match self {
            Dialect::V3 => literal("\n".into()) + " ",
            Dialect::V31 | Dialect::Kimi => String::new(),
        };
        let begin = if begun {
            String::new()
        } else {
            mark(marks.begin) + " "
        };
        let more = match most.saturating_sub(1) {
            0 => String::new(),
            more => format!("({between}call){{0,{more}}} "),
        };
        let mut lark = format!("calls: {begin}call {more}{}\n", mark(marks.end));
        let names: Vec<String> = (0..tools.len()).map(|i| format!("call{i}")).collect();
        lark += &format!("call: {}\n", names.join(" | "));
        for (i, (name, schema)) in tools.iter().enumerate() {
            let (call, separator, close) = (
                mark(marks.call),
                mark(marks.separator),
                mark(marks.bare_close()),
            );
            lark += &match self {
                Dialect::V3 => {
                    let kind = literal("function".into());
                    let head = literal(format!("{name}{FENCE_OPEN}"));
                    let fence = literal(FENCE_CLOSE.into());
                    format!("call{i}: {call} {kind} {separator} {head} args{i} {fence} {close}\n")
                }
                Dialect::V31 => {
                    let name = literal((*name).to_owned());
                    format!("call{i}: {call} {name} {separator} args{i} {close}\n")
                }
                Dialect::Kimi => {
                    let name = literal(format!("functions.{name}:"));
                    format!("call{i}: {call} {name} /[0-9]{{1,3}}/ {separator} args{i} {close}\n")
                }
            };
            lark += &format!("args{i}: %json {}\n", on_one_line(schema));
        }
        lark
    }

    /// Calls of an earlier answer, as the model would have written them.
    pub(super) fn write(self, calls: &[Value]) -> String {
        let marks = self.marks();
        let one = |(i, call): (usize, &Value)| {
            let text = |field: &str| call["function"][field].as_str().unwrap_or_default();
            let body = self.body(text("name"), text("arguments"), i);
            format!("{}{body}{}", marks.call, marks.bare_close())
        };
        let between = if self == Dialect::V3 { "\n" } else { "" };
        let calls: Vec<String> = calls.iter().enumerate().map(one).collect();
        format!("{}{}{}", marks.begin, calls.join(between), marks.end)
    }

    /// What stands between the marks of a call.
    fn body(self, name: &str, arguments: &str, index: usize) -> String {
        let separator = self.marks().separator;
        match self {
            Dialect::V3 => format!("function{separator}{name}{FENCE_OPEN}{arguments}{FENCE_CLOSE}"),
            Dialect::V31 => format!("{name}{separator}{arguments}"),
            Dialect::Kimi => format!("functions.{name}:{index}{separator}{arguments}"),
        }
    }

    /// How to call tools, for a model whose template does not say so.
    pub(super) fn instructions(self, tools: &[Value]) -> String {
        let mut text = "## Tools\n".to_owned();
        for tool in tools {
            text += &format!("{}\n", tool["function"]);
        }
        let call = json!({"function": {"name": "NAME", "arguments": "ARGUMENTS"}});
        text + &format!("\nTo call tools, write: {}\n", self.write(&[call]))
    }
}

/// A schema with the writing of `json.dumps`, in one line, as part of a grammar.
pub(super) fn on_one_line(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(fields) = schema.as_object_mut() {
        fields.entry("x-guidance").or_insert_with(
            || json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}),
        );
    }
    schema
}
