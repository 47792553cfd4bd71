//! `guild experts watch`: the moves of experts as they happen.

use super::leader::Asking;
use super::progress::{Changes, Shown, print_json};
use crate::args::ExpertsWatch;
use crate::command::{block_on, log_tool, signals};
use crate::failure::Failure;

pub(super) fn run(args: &ExpertsWatch) -> Result<(), Failure> {
    log_tool(&args.common)?;
    block_on(async {
        let shutdown = signals()?;
        let watch = async {
            let mut changes = Changes::of(Asking::at(&args.leader)?).await?;
            let mut shown = Shown::default();
            loop {
                let now = changes.next().await?;
                match args.json {
                    true => print_json(&now)?,
                    false => shown.line(&now)?,
                }
            }
        };
        tokio::select! {
            ended = watch => ended,
            () = shutdown.requested() => Ok(()),
        }
    })
}
