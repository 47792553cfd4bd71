//! A response as a stream of events: items are opened, grow and are closed, one after the other.

use guild_proto::inference::v1::generate_response::Event;
use serde_json::{Value, json};

use super::super::{
    chat::Call,
    reader::Part,
    sse::{ChunkWriter, Chunks},
};
use super::{Answer, items, status};

/// The item that grows.
enum Item {
    Message(String),
    Reasoning(String),
    Call(Call),
}

/// Writes the events of one response.
pub(super) struct Writer {
    answer: Answer,
    sequence: u64,
    output: Vec<Value>,
    open: Option<(String, Item)>,
}

impl Writer {
    pub(super) fn new(answer: Answer) -> Writer {
        Writer {
            answer,
            sequence: 0,
            output: Vec::new(),
            open: None,
        }
    }

    fn send(&mut self, name: &'static str, mut event: Value, out: &mut Chunks) {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.push_named(name, &event);
    }

    /// Sends an event of the open item.
    fn of_item(&mut self, name: &'static str, mut event: Value, out: &mut Chunks) {
        if let Some((id, _)) = &self.open {
            event["item_id"] = id.as_str().into();
        }
        event["output_index"] = self.output.len().into();
        self.send(name, event, out);
    }

    fn open(&mut self, prefix: &str, item: Item, out: &mut Chunks) {
        self.close("completed", out);
        let id = items::id(prefix);
        let mut shown = item.shown(&id, "in_progress");
        if !matches!(item, Item::Call(_)) {
            shown["content"] = json!([]);
        }
        let is_message = matches!(item, Item::Message(_));
        self.open = Some((id, item));
        let event = json!({"output_index": self.output.len(), "item": shown});
        self.send("response.output_item.added", event, out);
        if is_message {
            let event = json!({"content_index": 0, "part": items::part("")});
            self.of_item("response.content_part.added", event, out);
        }
    }

    fn close(&mut self, status: &str, out: &mut Chunks) {
        match &self.open {
            None => return,
            Some((_, Item::Message(text))) => {
                let done = json!({"content_index": 0, "text": text, "logprobs": []});
                let part = json!({"content_index": 0, "part": items::part(text)});
                self.of_item("response.output_text.done", done, out);
                self.of_item("response.content_part.done", part, out);
            }
            Some((_, Item::Reasoning(text))) => {
                let done = json!({"content_index": 0, "text": text});
                self.of_item("response.reasoning_text.done", done, out);
            }
            Some((_, Item::Call(call))) => {
                let done = json!({"name": call.name, "arguments": call.arguments});
                self.of_item("response.function_call_arguments.done", done, out);
            }
        }
        if let Some((id, item)) = self.open.take() {
            let shown = item.shown(&id, status);
            let event = json!({"output_index": self.output.len(), "item": shown});
            self.send("response.output_item.done", event, out);
            self.output.push(shown);
        }
    }

    fn part(&mut self, part: Part, out: &mut Chunks) {
        match part {
            Part::Content(delta) => {
                if !matches!(self.open, Some((_, Item::Message(_)))) {
                    self.open("msg", Item::Message(String::new()), out);
                }
                let event = json!({"content_index": 0, "delta": delta, "logprobs": []});
                self.of_item("response.output_text.delta", event, out);
                if let Some((_, Item::Message(text))) = &mut self.open {
                    *text += &delta;
                }
            }
            Part::Reasoning(delta) => {
                if !matches!(self.open, Some((_, Item::Reasoning(_)))) {
                    self.open("rs", Item::Reasoning(String::new()), out);
                }
                let event = json!({"content_index": 0, "delta": delta});
                self.of_item("response.reasoning_text.delta", event, out);
                if let Some((_, Item::Reasoning(text))) = &mut self.open {
                    *text += &delta;
                }
            }
            Part::Call { id, name } => {
                let arguments = String::new();
                self.open(
                    "fc",
                    Item::Call(Call {
                        id,
                        name,
                        arguments,
                    }),
                    out,
                );
            }
            Part::Arguments(delta) => {
                let event = json!({"delta": delta});
                self.of_item("response.function_call_arguments.delta", event, out);
                if let Some((_, Item::Call(call))) = &mut self.open {
                    call.arguments += &delta;
                }
            }
        }
    }
}

impl Item {
    fn shown(&self, id: &str, status: &str) -> Value {
        match self {
            Item::Message(text) => items::message(id, text, status),
            Item::Reasoning(text) => items::reasoning(id, text, status),
            Item::Call(call) => items::call(id, call, status),
        }
    }
}

impl ChunkWriter for Writer {
    fn start(&mut self, out: &mut Chunks) {
        let body = self
            .answer
            .body("in_progress", Value::Null, Vec::new(), Value::Null);
        self.send("response.created", json!({"response": body}), out);
        self.send("response.in_progress", json!({"response": body}), out);
    }

    fn event(&mut self, _: usize, event: Event, out: &mut Chunks) {
        match event {
            Event::Prompt(_) => {}
            Event::Chunk(chunk) => {
                if self.answer.reader.is_thinking() {
                    self.answer.head.reasoning_tokens += chunk.token_ids.len() as u32;
                }
                for part in self.answer.reader.push(&chunk.text) {
                    self.part(part, out);
                }
            }
            Event::Complete(complete) => {
                for part in self.answer.reader.finish() {
                    self.part(part, out);
                }
                if self.open.is_none() && self.output.is_empty() {
                    self.open("msg", Item::Message(String::new()), out);
                }
                let (status, incomplete) = status(&complete);
                self.close(status, out);
                self.answer.head.count(0, &complete);
                let output = std::mem::take(&mut self.output);
                let usage = self.answer.usage();
                let body = self.answer.body(status, incomplete, output, usage);
                let name = match status {
                    "incomplete" => "response.incomplete",
                    _ => "response.completed",
                };
                self.send(name, json!({"response": body}), out);
            }
        }
    }

    fn failed(&mut self, error: Value, out: &mut Chunks) {
        let event =
            json!({"code": error["code"], "message": error["message"], "param": error["param"]});
        self.send("error", event, out);
    }

    fn end(&mut self, _: &mut Chunks) {}
}
