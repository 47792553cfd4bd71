//! How much memory the latent KV cache gets. Secret: which share of what
//! the host has left is prudent.

use guild_model::Config;
use guild_model::cache::{Format, LatentCache};
use guild_node::memory;

/// Share of the available memory that an automatic cache may take: the rest is for activations,
/// other processes and the page cache that other nodes load their weights through.
const AUTO_SHARE: u64 = 2;
/// What an automatic cache may take where the host does not say what is available.
const AUTO_UNKNOWN: u64 = 1 << 30;

/// Memory for the latent KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvMemory {
    /// Half of what is available when the weights are loaded, and never more than
    /// `max_running` requests of `max_context` positions can fill.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl std::str::FromStr for KvMemory {
    type Err = String;

    /// `auto`, or bytes with an optional unit: `8GiB`, `500MB`, `1073741824`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("auto") {
            return Ok(KvMemory::Auto);
        }
        guild_node::size::parse_bytes(text)
            .ok()
            .filter(|&b| b > 0)
            .map(KvMemory::Bytes)
            .ok_or_else(|| format!("{text:?} is neither `auto` nor a size like 8GiB or 500MB"))
    }
}

/// Pages of `layers` layers that `memory` pays for, never more than `running` requests of `context` positions can
/// hold; at least one page in the automatic case. 0: not even one page was paid for.
pub(crate) fn pages(
    memory: KvMemory,
    config: &Config,
    format: Format,
    layers: usize,
    page_tokens: usize,
    running: usize,
    context: usize,
) -> usize {
    let layer_bytes =
        LatentCache::bytes_per_token(config, format) / config.num_hidden_layers.max(1);
    let page_bytes = (layer_bytes * layers * page_tokens) as u64;
    let useful = context.div_ceil(page_tokens).saturating_mul(running);
    let budget = match memory {
        KvMemory::Bytes(bytes) => bytes,
        KvMemory::Auto => {
            let share = memory::available().map_or(AUTO_UNKNOWN, |bytes| bytes / AUTO_SHARE);
            share.max(page_bytes)
        }
    };
    let paid = usize::try_from(budget / page_bytes.max(1)).unwrap_or(usize::MAX);
    paid.min(useful).min(u32::MAX as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        let parse = |text: &str| text.parse::<KvMemory>();
        assert_eq!(parse("auto"), Ok(KvMemory::Auto));
        assert_eq!(parse("4096"), Ok(KvMemory::Bytes(4096)));
        assert_eq!(parse("8GiB"), Ok(KvMemory::Bytes(8 << 30)));
        assert_eq!(parse("500 MB"), Ok(KvMemory::Bytes(500_000_000)));
        for bad in [
            "",
            "0",
            "-1",
            "GiB",
            "1.5GiB",
            "8 parsecs",
            "99999999999999999999",
            "99999999TiB",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
