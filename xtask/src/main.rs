//! The project's recipes, by name: `cargo xtask test` is what CI runs and what a
//! person runs. Its secret is how a bare machine becomes one that can run them
//! (toolchain components, the Python clients, etcd, Prometheus). It may start programs; it knows
//! nothing of Guild's own crates.
// Printing is this program's work.
#![allow(clippy::print_stderr)]

mod chaos;
mod python;
mod recipe;
mod system;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "The project's recipes", disable_help_subcommand = true)]
struct Args {
    #[command(subcommand)]
    recipe: Recipe,
}

#[derive(Subcommand)]
enum Recipe {
    /// All that CI runs: format, lints, docs, build, every test
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
    },
    /// The bars: nodes, networks, coordinators and stores that fail under load, as real processes
    /// with limits on stalls and in simulated histories; prints a table and leaves target/chaos.jsonl
    Chaos {
        /// Every combination, outages of their full length, 100,000 histories: about an hour and a half
        #[arg(long)]
        long: bool,
    },
    /// The checks without the tests: format, clippy, docs, cargo-deny when installed
    Lint,
    /// Formats every file
    Fmt,
    /// Serves the demo checkpoint, optimised: `guild up --model models/demo`
    Demo {
        /// Further flags of `guild up`, after `--`
        #[arg(last = true)]
        flags: Vec<String>,
    },
    /// The benchmarks that bench/ records, optimised: kernels against the machine, then tokens/s
    Bench {
        /// Checkpoint to serve
        #[arg(default_value = "models/demo")]
        model: String,
        /// Tokens of the prefill prompt
        #[arg(default_value_t = 480)]
        prompt_tokens: u32,
        /// Counted runs of each workload
        #[arg(default_value_t = 5)]
        repeats: u32,
        /// Leave the kernels out
        #[arg(long)]
        no_kernels: bool,
    },
    /// Makes the Python environment of the client tests and prints its interpreter
    Clients,
    /// Renders deploy/ with kubectl and validates it against the Kubernetes schemas
    Manifests,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().recipe {
        Recipe::Test { filter } => recipe::test(filter.as_deref()),
        Recipe::Chaos { long } => chaos::run(long),
        Recipe::Lint => recipe::lint(),
        Recipe::Fmt => recipe::fmt(),
        Recipe::Demo { flags } => recipe::demo(&flags),
        Recipe::Bench {
            model,
            prompt_tokens,
            repeats,
            no_kernels,
        } => recipe::bench(&model, prompt_tokens, repeats, no_kernels),
        Recipe::Clients => recipe::clients(),
        Recipe::Manifests => recipe::manifests(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
