//! What clients see while processes die, fall silent, speak nonsense or are replaced. Real
//! processes under a steady load; every answer is compared bit for bit with an undisturbed run of
//! one process. Each case prints a line of JSON; `cargo xtask chaos` collects them, holds the
//! limits on stalls, and with `--long` asks for every combination and for long outages.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod control;
mod frames;
mod migration;
mod network;
mod nodes;
mod rolling;
mod slow;
