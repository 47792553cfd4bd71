//! `guild chat`: a conversation over the OpenAI front door.

use std::io::{IsTerminal as _, Write as _};

use guild_node::ExitKind;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::{block_on, log_tool};
use crate::args::Chat;
use crate::failure::Failure;
use crate::http::Server;

pub(crate) fn run(args: &Chat) -> Result<(), Failure> {
    log_tool(&args.common)?;
    block_on(talk(args))
}

/// Lines as they are typed. Read on a thread of its own, which nobody waits for:
/// a read of a terminal cannot be taken back.
fn lines_of_stdin() -> Result<mpsc::Receiver<String>, Failure> {
    let (tell, lines) = mpsc::channel(1);
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            for line in std::io::stdin().lines() {
                // Neither an unreadable line nor a departed listener has a successor.
                let Ok(line) = line else { break };
                if tell.blocking_send(line).is_err() {
                    break;
                }
            }
        })
        .map_err(|error| {
            Failure::new(
                ExitKind::Resources,
                format!("cannot start a thread: {error}"),
            )
        })?;
    Ok(lines)
}

async fn talk(args: &Chat) -> Result<(), Failure> {
    let server = Server::new(&args.endpoint, &args.access)?;
    let models = server.get("/v1/models").await?;
    let Some(model) = models["data"][0]["id"].as_str() else {
        return Err(Failure::network(format!(
            "{} serves no model",
            args.endpoint
        )));
    };
    let person = std::io::stdin().is_terminal();
    let mut stdout = std::io::stdout();
    if person {
        writeln!(
            stdout,
            "{model} at {}; /reset forgets, /exit ends, Ctrl-C stops a reply",
            args.endpoint
        )?;
    }
    let mut conversation = Conversation::new(model, args);
    let mut lines = lines_of_stdin()?;
    loop {
        if person {
            write!(stdout, "> ")?;
            stdout.flush()?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => None,
        };
        let Some(line) = line else { break };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => break,
            "/reset" => conversation = Conversation::new(model, args),
            text => match conversation.turn(&server, text).await {
                // A person can go on; a pipe cannot.
                Err(failure) if person => {
                    writeln!(stdout, "error: {}", failure.message())?;
                    for hint in failure.hints() {
                        writeln!(stdout, "  hint: {hint}")?;
                    }
                }
                other => other?,
            },
        }
    }
    if person {
        writeln!(stdout)?;
    }
    Ok(())
}

/// What has been said, and how replies are asked for.
struct Conversation {
    messages: Vec<Value>,
    request: Map<String, Value>,
}

impl Conversation {
    fn new(model: &str, args: &Chat) -> Self {
        let mut request = Map::new();
        request.insert("model".into(), model.into());
        request.insert("stream".into(), true.into());
        request.insert("max_tokens".into(), args.max_tokens.into());
        let optional = [
            ("temperature", args.temperature.map(Value::from)),
            ("top_p", args.top_p.map(Value::from)),
            ("seed", args.seed.map(Value::from)),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                request.insert(name.into(), value);
            }
        }
        let system = args.system.as_deref();
        let messages = system
            .map(|text| json!({"role": "system", "content": text}))
            .into_iter()
            .collect();
        Self { messages, request }
    }

    /// Says `text` and prints the reply as it comes. After an error it was never said.
    async fn turn(&mut self, server: &Server, text: &str) -> Result<(), Failure> {
        self.messages.push(json!({"role": "user", "content": text}));
        let replied = self.reply(server).await;
        match replied {
            Ok(reply) => self
                .messages
                .push(json!({"role": "assistant", "content": reply})),
            Err(failure) => {
                self.messages.pop();
                let failure = if self.messages.len() > 1 {
                    failure.hint("/reset begins anew if the conversation has grown too long")
                } else {
                    failure
                };
                return Err(failure);
            }
        }
        Ok(())
    }

    async fn reply(&self, server: &Server) -> Result<String, Failure> {
        let mut request = self.request.clone();
        request.insert("messages".into(), self.messages.clone().into());
        let mut events = server
            .stream("/v1/chat/completions", &request.into())
            .await?;
        let mut stdout = std::io::stdout();
        let mut reply = String::new();
        loop {
            // Dropping the stream tells the server to stop.
            let event = tokio::select! {
                event = events.next() => event?,
                _ = tokio::signal::ctrl_c() => None,
            };
            let Some(event) = event else { break };
            if let Some(message) = event["error"]["message"].as_str() {
                return Err(Failure::network(format!("the reply broke off: {message}")));
            }
            let piece = event["choices"][0]["delta"]["content"]
                .as_str()
                .unwrap_or_default();
            write!(stdout, "{piece}")?;
            stdout.flush()?;
            reply.push_str(piece);
        }
        writeln!(stdout)?;
        Ok(reply)
    }
}
