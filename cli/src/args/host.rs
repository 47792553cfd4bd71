//! What of the machine a process takes for its arithmetic.

use clap::{Args, ValueEnum};
use guild_kernels::HugePages;
use guild_model::Cpu;

/// Threads and pages.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Host {
    /// Keep each thread of the arithmetic on a core of its own; the first core is left to the threads that call
    #[arg(long)]
    pub(crate) pin_threads: bool,
    /// Huge pages for weights and latents. auto: ask the system for them; off: refuse them, whatever its setting
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "auto|off",
        hide_possible_values = true
    )]
    pub(crate) huge_pages: Pages,
}

/// Whether huge pages are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pages {
    #[default]
    Auto,
    Off,
}

impl Host {
    /// Chooses the pages of this process from now on, and where the threads of `cpu` run.
    pub(crate) fn arrange(self, cpu: &Cpu) {
        match self.huge_pages {
            Pages::Auto => HugePages::Auto.choose(),
            Pages::Off => HugePages::Off.choose(),
        }
        if !self.pin_threads {
            return;
        }
        let (kept, own) = (cpu.pin_threads(), cpu.threads() - 1);
        if kept < own {
            tracing::warn!(
                "--pin-threads: {kept} of {own} threads are kept on a core each; there are no more cores, or the system \
                 refuses"
            );
        }
    }
}
