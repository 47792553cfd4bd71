//! `guild inspect --reference`: the slow f32 model, in the form of `generate --json`.

use guild_model::reference::Reference;
use guild_model::sampler::{Sampled, logprobs_of};
use guild_model::text::Text;
use guild_model::{Checkpoint, Cpu};

use crate::answer::{Answer, Logprobs, Usage};
use crate::args::Inspect;
use crate::failure::Failure;

pub(crate) fn run(args: &Inspect, checkpoint: &Checkpoint, cpu: &Cpu) -> Result<(), Failure> {
    let config = checkpoint.config();
    let prompt = args.token_ids.len();
    let asked = args.max_tokens as usize;
    if prompt.saturating_add(asked) > config.max_position_embeddings {
        return Err(Failure::usage(format!(
            "--max-tokens: {prompt} tokens of prompt and {asked} more do not fit the {} positions of this model",
            config.max_position_embeddings
        )));
    }
    let reference = Reference::load(checkpoint)?;
    let continuation = reference.greedy(&args.token_ids, asked)?;
    let mut tokens = args.token_ids.clone();
    tokens.extend(&continuation);
    // One pass over everything scores prompt and continuation alike.
    let logits = reference.forward(&tokens)?.logits;
    let top = (args.logprobs as usize).min(config.vocab_size);
    let mut scored: Vec<Logprobs> = logits
        .chunks_exact(config.vocab_size)
        .zip(&tokens[1..])
        .map(|(row, &token)| logprobs_of(cpu, row, token, top).into())
        .collect();
    let output = scored.split_off(prompt - 1);
    let text = Text::load(checkpoint.dir(), config)?;
    let answer = Answer {
        text: text
            .map(|text| text.decode(&continuation, true))
            .transpose()?,
        logprobs: Some(output),
        prompt_logprobs: Some(scored),
        finish_reason: "length",
        usage: Usage::new(count(prompt), count(continuation.len())),
        token_ids: continuation,
    };
    if args.json {
        answer.print_json()
    } else {
        answer.print_words()
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl From<Sampled> for Logprobs {
    fn from(sampled: Sampled) -> Self {
        Self {
            token_id: sampled.token,
            logprob: sampled.logprob,
            top: sampled.top,
        }
    }
}
