//! The flags of `guild generate` and `guild chat`: what is asked of a server.

use std::path::PathBuf;

use clap::Args;

use super::{Access, Common, Compute};
use crate::failure::EXIT_CODES;

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("Examples:
  guild generate --prompt 'ROMEO:' --max-tokens 40
  guild generate --token-ids 0,839,30 --logprobs 3 --prompt-logprobs 3 --ignore-eos --json
  guild generate --model models/demo --prompt 'ROMEO:'       # no server needed

{EXIT_CODES}"))]
pub(crate) struct Generate {
    /// gRPC front door, or an attention node (token ids only)
    #[arg(long, default_value = "http://127.0.0.1:8001", value_name = "URL")]
    pub(crate) endpoint: String,
    /// Serve this checkpoint in this process instead of asking a server
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', num_args = 1)]
    pub(crate) token_ids: Vec<u32>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// 0: always the most probable token
    #[arg(
        long,
        default_value_t = 0.0,
        allow_negative_numbers = true,
        value_name = "T"
    )]
    pub(crate) temperature: f32,
    /// Same seed, same prompt, same tokens; default: drawn for each request
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Sample from the most probable tokens that make up this share
    #[arg(
        long,
        default_value_t = 1.0,
        allow_negative_numbers = true,
        value_name = "P"
    )]
    pub(crate) top_p: f32,
    /// Sample from this many most probable tokens; 0: all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: u32,
    /// Text that ends the output; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Log-probability of every output token and of the K best at its place
    #[arg(long, value_name = "K")]
    pub(crate) logprobs: Option<u32>,
    /// The same for the prompt, from its second token on
    #[arg(long, value_name = "K")]
    pub(crate) prompt_logprobs: Option<u32>,
    /// Go on after an end-of-sequence token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print one JSON object: token_ids, text, logprobs, prompt_logprobs, finish_reason, usage
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) compute: Compute,
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = format!("In a conversation: /reset forgets what was said, /exit or Ctrl-D ends,
Ctrl-C stops a reply. Lines from a pipe are turns as well:
  echo 'What say you, my lord?' | guild chat

{EXIT_CODES}"))]
pub(crate) struct Chat {
    /// HTTP front door
    #[arg(long, default_value = "http://127.0.0.1:8000", value_name = "URL")]
    pub(crate) endpoint: String,
    /// System message that every conversation begins with
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of one reply at most
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) max_tokens: u32,
    /// 0: always the most probable token; default: the server's
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Sample from the most probable tokens that make up this share; default: the server's
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Same seed, same conversation, same replies; default: drawn for each request
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) access: Access,
    #[command(flatten)]
    pub(crate) common: Common,
}
