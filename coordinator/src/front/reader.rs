//! Reads what a model says in its dialect: thoughts, content, tool calls.
//!
//! Secret: what is certain already. The text comes in pieces, cut anywhere; the parts that come out
//! are the same whatever the cuts. Nothing of a mark is ever shown, and nothing that a following
//! piece may make a mark of is shown before. The crates that read the formats of all families
//! (tool-parser, reasoning-parser) parse arguments again as they grow, and tool-parser brings a
//! Python parser along; here the places of a few marks are all that is needed.

use super::dialect::{Dialect, Marks, THINK, THINK_END};

/// Bytes of a call's head at most; a longer one is no call.
const MAX_HEAD: usize = 1024;

/// A piece of what a model says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// What it thinks.
    Reasoning(String),
    /// What it says.
    Content(String),
    /// A tool call begins.
    Call {
        /// Unique; the model's own where its dialect has one.
        id: String,
        /// The function.
        name: String,
    },
    /// Arguments of the call that has begun last, as text.
    Arguments(String),
}

/// What a reader listens for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Listening {
    /// Tool calls in this dialect; None: calls are plain text.
    pub(super) calls: Option<Dialect>,
    /// Only the first call counts.
    pub(super) one_call: bool,
    /// Where the prompt has ended.
    pub(super) thoughts: Thoughts,
}

/// How the prompt has left off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Thoughts {
    /// The model does not think, or has thought.
    #[default]
    None,
    /// It may begin to.
    Possible,
    /// It is at it.
    Begun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Nothing but white space so far, and thoughts may come.
    Start,
    Reasoning,
    /// Behind thoughts, nothing but white space so far.
    Thought,
    Content,
    /// Among calls.
    Calls,
    Head,
    Arguments,
    /// Inside a call that does not count.
    Skipped,
}

/// Takes a text in pieces, gives its parts.
#[derive(Debug)]
pub(super) struct Reader {
    listening: Listening,
    at: At,
    held: String,
    calls: usize,
    /// Something of the arguments is out.
    arguing: bool,
}

impl Reader {
    pub(super) fn new(listening: Listening) -> Reader {
        Reader {
            listening,
            at: match listening.thoughts {
                Thoughts::None => At::Content,
                Thoughts::Possible => At::Start,
                Thoughts::Begun => At::Reasoning,
            },
            held: String::new(),
            calls: 0,
            arguing: false,
        }
    }

    /// Tool calls that have begun.
    pub(super) fn calls(&self) -> usize {
        self.calls
    }

    /// Whether what comes next is thought, as far as is known.
    pub(super) fn is_thinking(&self) -> bool {
        self.at == At::Reasoning
    }

    /// Takes the next piece.
    pub(super) fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What was held back; the text has ended.
    pub(super) fn finish(&mut self) -> Vec<Part> {
        let mut rest = std::mem::take(&mut self.held);
        let mut parts = Vec::new();
        if let (At::Arguments, Some(dialect)) = (self.at, self.listening.calls)
            && let Err(sure) = find(&rest, dialect.marks().close)
        {
            // The call has been cut off within its last mark.
            rest.truncate(sure);
        }
        match self.at {
            At::Reasoning => show(&mut parts, Part::Reasoning, &rest),
            At::Start | At::Content => show(&mut parts, Part::Content, &rest),
            At::Arguments => show(&mut parts, Part::Arguments, &rest),
            At::Thought | At::Calls | At::Head | At::Skipped => {}
        }
        parts
    }

    /// Goes on by one state; false when more text is needed.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        let calls = self.listening.calls;
        match (self.at, calls.map(Dialect::marks)) {
            (At::Start, _) => self.start(),
            (At::Reasoning, _) => match find(&self.held, &[THINK_END]) {
                Ok((at, end, _)) => {
                    show(parts, Part::Reasoning, &self.held[..at]);
                    self.go(At::Thought, end)
                }
                Err(sure) => self.release(sure, parts, Part::Reasoning),
            },
            (At::Thought, _) => {
                let text = self.held.trim_start();
                let skipped = self.held.len() - text.len();
                match text.is_empty() {
                    true => self.wait_without(skipped),
                    false => self.go(At::Content, skipped),
                }
            }
            (At::Content, Some(marks)) => match find(&self.held, &[marks.begin, marks.call]) {
                Ok((at, end, which)) => {
                    show(parts, Part::Content, &self.held[..at]);
                    match which {
                        0 => self.go(At::Calls, end),
                        _ => self.call(end),
                    }
                }
                Err(sure) => self.release(sure, parts, Part::Content),
            },
            (At::Calls, Some(marks)) => match find(&self.held, &[marks.call, marks.end]) {
                Ok((_, end, 0)) => self.call(end),
                Ok((_, end, _)) => self.go(At::Thought, end),
                Err(sure) => self.wait_without(sure),
            },
            (At::Head, Some(marks)) => self.head(marks, parts),
            (At::Arguments, Some(marks)) => {
                if !self.arguing {
                    let white = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..white);
                }
                match find(&self.held, marks.close) {
                    Ok((at, end, _)) => {
                        show(parts, Part::Arguments, &self.held[..at]);
                        self.go(At::Calls, end)
                    }
                    Err(sure) => {
                        self.arguing |= sure > 0;
                        self.release(sure, parts, Part::Arguments)
                    }
                }
            }
            (At::Skipped, Some(marks)) => match find(&self.held, marks.close) {
                Ok((_, end, _)) => self.go(At::Calls, end),
                Err(sure) => self.wait_without(sure),
            },
            (_, None) => self.release(self.held.len(), parts, Part::Content),
        }
    }

    /// Whether thoughts begin.
    fn start(&mut self) -> bool {
        let text = self.held.trim_start();
        if text.starts_with(THINK) {
            let end = self.held.len() - text.len() + THINK.len();
            return self.go(At::Reasoning, end);
        }
        if THINK.starts_with(text) {
            return false;
        }
        self.go(At::Content, 0)
    }

    /// A call begins.
    fn call(&mut self, end: usize) -> bool {
        let counts = self.calls == 0 || !self.listening.one_call;
        self.go(if counts { At::Head } else { At::Skipped }, end)
    }

    /// Looks for the end of a call's head.
    fn head(&mut self, marks: Marks, parts: &mut Vec<Part>) -> bool {
        let Some(dialect) = self.listening.calls else {
            return false;
        };
        let mut ends = vec![marks.open];
        ends.extend(marks.close.last());
        match find(&self.held, &ends) {
            Ok((at, ..)) if at > MAX_HEAD => self.go(At::Skipped, 0),
            Ok((at, end, 0)) => {
                let (name, id) = dialect.name_in(&self.held[..at]);
                let id = id.unwrap_or_else(|| format!("call_{}", uuid::Uuid::new_v4().simple()));
                parts.push(Part::Call { id, name });
                (self.calls, self.arguing) = (self.calls + 1, false);
                self.go(At::Arguments, end)
            }
            Ok((_, end, _)) => self.go(At::Calls, end),
            Err(_) if self.held.len() > MAX_HEAD => self.go(At::Skipped, 0),
            Err(_) => false,
        }
    }

    fn go(&mut self, to: At, from: usize) -> bool {
        self.held.drain(..from);
        self.at = to;
        true
    }

    /// Shows what is certain, and waits.
    fn release(&mut self, sure: usize, parts: &mut Vec<Part>, part: fn(String) -> Part) -> bool {
        show(parts, part, &self.held[..sure]);
        self.wait_without(sure)
    }

    /// Drops what is of no use, and waits.
    fn wait_without(&mut self, used: usize) -> bool {
        self.held.drain(..used);
        false
    }
}

fn show(parts: &mut Vec<Part>, part: fn(String) -> Part, text: &str) {
    if !text.is_empty() {
        parts.push(part(text.to_owned()));
    }
}

/// The first of `marks` in `text`: where it begins and ends and which it is, of several in one place
/// the one named first. Else how much of `text` is certain to be no part of one.
fn find(text: &str, marks: &[&str]) -> Result<(usize, usize, usize), usize> {
    let found = marks.iter().enumerate();
    let found =
        found.filter_map(|(which, mark)| text.find(mark).map(|at| (at, at + mark.len(), which)));
    let first = found.min_by_key(|&(at, _, which)| (at, which));
    // A longer mark may begin before the first that is whole, and end later.
    let pending = marks
        .iter()
        .map(|mark| begun(text, mark))
        .max()
        .unwrap_or(0);
    match first {
        Some(first) => Ok(first),
        None => Err(text.len() - pending),
    }
}

/// Bytes of the longest end of `text` that `mark` begins with, less than all of it.
fn begun(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len() - 1);
    let ends = (1..=longest).rev();
    let fits = |&n: &usize| {
        let at = text.len() - n;
        text.is_char_boundary(at) && mark.as_bytes().starts_with(&text.as_bytes()[at..])
    };
    ends.into_iter().find(fits).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(listening: Listening, text: &str, cut: usize) -> Vec<Part> {
        let mut reader = Reader::new(listening);
        let characters: Vec<char> = text.chars().collect();
        let mut parts: Vec<Part> = Vec::new();
        let pieces = characters.chunks(cut).map(|c| c.iter().collect::<String>());
        let mut come: Vec<Part> = pieces.flat_map(|piece| reader.push(&piece)).collect();
        come.extend(reader.finish());
        for part in come {
            // Ids are random.
            let part = match part {
                Part::Call { name, id } if id.starts_with("call_") => Part::Call {
                    name,
                    id: String::new(),
                },
                part => part,
            };
            match (parts.last_mut(), part) {
                (Some(Part::Reasoning(a)), Part::Reasoning(b))
                | (Some(Part::Content(a)), Part::Content(b))
                | (Some(Part::Arguments(a)), Part::Arguments(b)) => a.push_str(&b),
                (_, part) => parts.push(part),
            }
        }
        parts
    }

    /// The parts, which must be the same however the text is cut.
    fn parts(listening: Listening, text: &str) -> Vec<Part> {
        let whole = read(listening, text, text.len().max(1));
        for cut in 1..40 {
            assert_eq!(
                read(listening, text, cut),
                whole,
                "{text:?} in pieces of {cut}"
            );
        }
        whole
    }

    fn calls(dialect: Dialect) -> Listening {
        Listening {
            calls: Some(dialect),
            ..Listening::default()
        }
    }

    fn call(name: &str, id: &str) -> Part {
        Part::Call {
            name: name.into(),
            id: id.into(),
        }
    }

    fn arguments(text: &str) -> Part {
        Part::Arguments(text.into())
    }

    fn content(text: &str) -> Part {
        Part::Content(text.into())
    }

    #[test]
    fn calls_of_v3_have_a_kind_and_a_fence() {
        let text = "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Köln\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let all = [
            content("Let me see."),
            call("weather", ""),
            arguments("{\"city\": \"Köln\"}"),
            call("time", ""),
            arguments("{}"),
        ];
        assert_eq!(parts(calls(Dialect::V3), text), all);
        let one = Listening {
            one_call: true,
            ..calls(Dialect::V3)
        };
        assert_eq!(parts(one, text), all[..3]);
        assert_eq!(parts(Listening::default(), text), [content(text)]);
    }

    #[test]
    fn calls_of_v31_are_bare() {
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"a\": [1, 2]}<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let all = [
            call("weather", ""),
            arguments("{\"a\": [1, 2]}"),
            call("time", ""),
            arguments("{}"),
        ];
        assert_eq!(parts(calls(Dialect::V31), text), all);
    }

    #[test]
    fn calls_of_kimi_bring_their_id() {
        let text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"a\": 1}<|tool_call_end|><|tool_calls_section_end|>";
        let all = [
            call("weather", "functions.weather:0"),
            arguments("{\"a\": 1}"),
        ];
        assert_eq!(parts(calls(Dialect::Kimi), text), all);
    }

    #[test]
    fn a_call_that_is_cut_off_shows_what_there_is() {
        let marked = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁e";
        assert_eq!(
            parts(calls(Dialect::V31), marked),
            [call("f", ""), arguments("{}")]
        );
        let text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"K";
        assert_eq!(
            parts(calls(Dialect::V31), text),
            [call("weather", ""), arguments("{\"city\": \"K")]
        );
        assert_eq!(
            parts(calls(Dialect::V31), "a <｜tool▁calls"),
            [content("a <｜tool▁calls")]
        );
        let headless = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather";
        assert_eq!(parts(calls(Dialect::V31), headless), []);
    }

    #[test]
    fn nonsense_among_calls_is_no_call() {
        let endless = format!(
            "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>",
            "x".repeat(4 * MAX_HEAD)
        );
        assert_eq!(
            parts(calls(Dialect::V31), &endless)
                .iter()
                .filter(|p| matches!(p, Part::Content(_)))
                .count(),
            0
        );
        let broken = "<｜tool▁calls▁begin｜>hm<｜tool▁call▁begin｜>x<｜tool▁call▁end｜><｜tool▁calls▁end｜> so";
        assert_eq!(parts(calls(Dialect::V31), broken), [content("so")]);
    }

    #[test]
    fn thoughts_are_told_from_content() {
        let thoughts = |thoughts| Listening {
            thoughts,
            ..Listening::default()
        };
        let reasoning = |text: &str| Part::Reasoning(text.into());
        let begun = thoughts(Thoughts::Begun);
        assert_eq!(
            parts(begun, "well, a<b</think>\n\nYes. </think>"),
            [reasoning("well, a<b"), content("Yes. </think>")]
        );
        assert_eq!(parts(begun, "well, </thi"), [reasoning("well, </thi")]);
        let possible = thoughts(Thoughts::Possible);
        assert_eq!(
            parts(possible, "\n<think>so</think>Yes."),
            [reasoning("so"), content("Yes.")]
        );
        assert_eq!(
            parts(possible, "No <think>so</think>"),
            [content("No <think>so</think>")]
        );
        assert_eq!(parts(possible, " <thi"), [content(" <thi")]);
        let text = "<think>so</think>Yes.";
        assert_eq!(parts(Listening::default(), text), [content(text)]);
    }

    #[test]
    fn calls_may_follow_thoughts() {
        let listening = Listening {
            thoughts: Thoughts::Begun,
            ..calls(Dialect::V31)
        };
        let text = "hm</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        assert_eq!(
            parts(listening, text),
            [Part::Reasoning("hm".into()), call("f", ""), arguments("{}")]
        );
    }
}
