//! Flags that bound what an attention node takes on and keeps.

use clap::{Args, ValueEnum};
use guild_attention_node::exchange::{EXCHANGE_DEADLINE, SUSPECT_AFTER};
use guild_attention_node::{AttentionNodeConfig as Defaults, KvMemory, MicroBatches, Speculate};
use guild_model::cache::Format;

/// Limits of an attention node.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Engine {
    /// Memory for the KV cache: `auto`, or a size such as 8GiB
    #[arg(
        long,
        default_value = "auto",
        value_name = "SIZE",
        help_heading = "Engine"
    )]
    pub(crate) kv_memory: KvMemory,
    #[command(flatten, next_help_heading = "Engine")]
    pub(crate) latents: Latents,
    /// Tokens of prompt and output together; 0: as many as the model was made for
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Engine")]
    pub(crate) max_context: u32,
    /// Requests in one batch
    #[arg(long, default_value_t = Defaults::MAX_RUNNING as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_running: u32,
    /// Requests that may wait for a place in the batch; further ones are refused
    #[arg(long, default_value_t = Defaults::MAX_WAITING as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_waiting: u32,
    /// Prompt tokens that may wait together; further requests are refused; 0: any number
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Engine")]
    pub(crate) max_waiting_tokens: u32,
    /// Requests that are expected to wait longer than these seconds are refused at once; 0: however long
    #[arg(long, default_value_t = Defaults::MAX_WAIT.as_secs() as u32, value_name = "SECONDS", help_heading = "Engine")]
    pub(crate) max_wait: u32,
    /// Milliseconds that a step should take at most while tokens are generated: prompts are cut into chunks that keep
    /// to it; 0: as long as --max-step-tokens rows take
    #[arg(long, default_value_t = Defaults::ITL_TARGET.as_millis() as u32, value_name = "MS", help_heading = "Engine")]
    pub(crate) itl_target: u32,
    /// Compute every prompt anew instead of keeping what prompts that begin alike have in common
    #[arg(long, help_heading = "Engine")]
    pub(crate) no_prefix_cache: bool,
    /// Draft tokens with the checkpoint's MTP module and check them in the next step; the output stays the same. auto:
    /// one draft, as long as that is faster
    #[arg(
        long,
        default_value_t,
        value_name = "off|auto|N",
        help_heading = "Engine"
    )]
    pub(crate) speculate: Speculate,
    /// Run steps in two micro-batches, one of which computes while the rows of the other are with their experts; the
    /// output stays the same. auto: where that is faster
    #[arg(
        long,
        default_value_t,
        value_name = "off|auto|on",
        help_heading = "Engine"
    )]
    pub(crate) micro_batches: MicroBatches,
    /// Tokens of one step, prefill, decode and drafts together
    #[arg(long, default_value_t = Defaults::MAX_STEP_TOKENS as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) max_step_tokens: u32,
    /// Tokens of one page of the KV cache
    #[arg(long, default_value_t = Defaults::PAGE_TOKENS as u32, value_name = "N", help_heading = "Engine")]
    pub(crate) page_tokens: u32,
    /// Milliseconds an expert node may owe an answer before it is suspected; more where its
    /// answers usually take long. Other homes of its experts are asked as soon as it is later
    /// than expert nodes usually are
    #[arg(long, default_value_t = SUSPECT_AFTER.as_millis() as u32, value_parser = clap::value_parser!(u32).range(1..), value_name = "MS", help_heading = "Engine")]
    pub(crate) suspect_after: u32,
    /// Milliseconds that a layer's rows wait for experts that no node answers for, before their requests fail with
    /// EXPERT_LOST; more than a lease and what it takes to read experts lets them outlive the loss of a sole copy
    #[arg(long, default_value_t = EXCHANGE_DEADLINE.as_millis() as u32, value_parser = clap::value_parser!(u32).range(1..), value_name = "MS", help_heading = "Engine")]
    pub(crate) expert_deadline: u32,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            kv_memory: KvMemory::Auto,
            latents: Latents::default(),
            max_context: 0,
            max_running: Defaults::MAX_RUNNING as u32,
            max_waiting: Defaults::MAX_WAITING as u32,
            max_waiting_tokens: 0,
            max_wait: Defaults::MAX_WAIT.as_secs() as u32,
            itl_target: Defaults::ITL_TARGET.as_millis() as u32,
            no_prefix_cache: false,
            speculate: Speculate::default(),
            micro_batches: MicroBatches::default(),
            max_step_tokens: Defaults::MAX_STEP_TOKENS as u32,
            page_tokens: Defaults::PAGE_TOKENS as u32,
            suspect_after: SUSPECT_AFTER.as_millis() as u32,
            expert_deadline: EXCHANGE_DEADLINE.as_millis() as u32,
        }
    }
}

/// How the latent KV cache is kept, wherever there is one.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct Latents {
    /// How the latent KV cache stores rows; auto: f32
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "auto|f32|bf16|fp8",
        hide_possible_values = true
    )]
    kv_dtype: KvDtype,
}

impl Latents {
    /// None: as the attention node chooses.
    pub(crate) fn format(self) -> Option<Format> {
        match self.kv_dtype {
            KvDtype::Auto => None,
            KvDtype::F32 => Some(Format::F32),
            KvDtype::Bf16 => Some(Format::Bf16),
            KvDtype::Fp8 => Some(Format::Fp8),
        }
    }
}

/// How the latent KV cache stores rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum KvDtype {
    #[default]
    Auto,
    F32,
    Bf16,
    Fp8,
}
