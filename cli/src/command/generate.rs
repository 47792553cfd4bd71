//! `guild generate`: one completion, from a server or from a checkpoint.

use std::io::Write as _;
use std::path::Path;

use guild_coordinator::Listeners;
use guild_node::config::{Origin, Origins};
use guild_proto::inference::v1::generate_request::Input;
use guild_proto::inference::v1::generate_response::Event;
use guild_proto::inference::v1::{GenerateRequest, SamplingParams, TokenIds};

use super::{block_on, log_tool};
use crate::answer::{Answer, Logprobs};
use crate::args::{Access, Generate};
use crate::client;
use crate::failure::Failure;
use crate::listen::{EPHEMERAL, address_of, bind};
use crate::local::{Local, Plan};
use crate::security::Protection;

pub(crate) fn run(args: &Generate, origins: &Origins) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let input = match (&args.prompt, args.token_ids.is_empty()) {
        (Some(text), true) => Input::Text(text.clone()),
        (None, false) => Input::TokenIds(TokenIds {
            ids: args.token_ids.clone(),
        }),
        _ => {
            return Err(Failure::usage(
                "give either --prompt TEXT or --token-ids 1,2,3",
            ));
        }
    };
    let request = GenerateRequest {
        input: Some(input),
        sampling: Some(sampling(args)),
        ..Default::default()
    };
    // A typed --endpoint wins over a model that the environment or a file names.
    let typed = *origins.of("endpoint") == Origin::CommandLine;
    block_on(async {
        match args.model.as_ref().filter(|_| !typed) {
            None => ask(args, &args.access, &args.endpoint, request).await,
            Some(model) => alone(args, model, request).await,
        }
    })
}

/// Asks a cluster of this process, on ports nobody else knows.
async fn alone(args: &Generate, model: &Path, request: GenerateRequest) -> Result<(), Failure> {
    // Before anything is started: what is wrong with it is the answer.
    let plan = Plan::smallest(super::open(model, args.compute)?, args.compute);
    let listeners = Listeners {
        cluster: bind("listen", EPHEMERAL, Protection::LOOPBACK).await?,
        http: bind("http", EPHEMERAL, Protection::LOOPBACK).await?,
        grpc: bind("grpc", EPHEMERAL, Protection::LOOPBACK).await?,
    };
    let endpoint = format!("http://{}", address_of(&listeners.grpc)?);
    let mut local = Local::start(&plan, &args.compute.cpu()?, listeners).await?;
    let nothing = Access::default();
    let answered = match local.ready().await {
        Ok(()) => tokio::select! {
            answered = ask(args, &nothing, &endpoint, request) => answered,
            failure = local.failed() => Err(failure),
        },
        failed => failed,
    };
    let stopped = local.stop().await;
    answered.and(stopped)
}

fn sampling(args: &Generate) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(args.max_tokens),
        temperature: Some(args.temperature),
        top_p: Some(args.top_p),
        top_k: Some(args.top_k),
        seed: args.seed,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        logprobs: args.logprobs,
        prompt_logprobs: args.prompt_logprobs,
        ..Default::default()
    }
}

/// Sends the request and prints what comes, as it comes unless JSON is wanted.
async fn ask(
    args: &Generate,
    access: &Access,
    endpoint: &str,
    request: GenerateRequest,
) -> Result<(), Failure> {
    let mut client = client::inference(endpoint, access)?;
    let info = client::model_info(&mut client, endpoint).await?;
    let mut stream = client.generate(request).await?.into_inner();
    let mut answer = Answer {
        text: info.has_tokenizer.then(String::new),
        logprobs: args.logprobs.map(|_| Vec::new()),
        ..Answer::default()
    };
    let mut stdout = std::io::stdout();
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(Event::Prompt(prompt)) => {
                answer.prompt_logprobs = args
                    .prompt_logprobs
                    .map(|_| prompt.logprobs.into_iter().map(Logprobs::from).collect());
            }
            Some(Event::Chunk(chunk)) => {
                if !args.json {
                    match &answer.text {
                        Some(_) => write!(stdout, "{}", chunk.text)?,
                        None => chunk
                            .token_ids
                            .iter()
                            .try_for_each(|id| write!(stdout, "{id} "))?,
                    }
                    stdout.flush()?;
                }
                answer.token_ids.extend(chunk.token_ids);
                if let Some(text) = &mut answer.text {
                    text.push_str(&chunk.text);
                }
                if let Some(logprobs) = &mut answer.logprobs {
                    logprobs.extend(chunk.logprobs.into_iter().map(Logprobs::from));
                }
            }
            Some(Event::Complete(complete)) => answer.complete(&complete),
            None => {}
        }
    }
    if answer.finish_reason.is_empty() {
        return Err(Failure::network(
            "the stream ended before the answer was complete",
        ));
    }
    if args.json {
        return answer.print_json();
    }
    writeln!(stdout)?;
    answer.print_logprobs()
}
