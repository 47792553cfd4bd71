//! The `guild` binary: every role and every tool.
//!
//! Secret of this room: the command line. It turns flags into the
//! configurations of the other rooms, starts them, shows a person what is going
//! on, and turns every error into one exit code. It may use every room; no room
//! knows of it.

mod answer;
mod args;
mod banner;
mod client;
mod command;
mod failure;
mod http;
mod json;
mod listen;
mod loading;
mod local;
mod security;
mod shells;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    match command::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
