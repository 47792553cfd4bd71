//! `guild experts drain`: everything off a node, so that it can be stopped.

use std::io::Write as _;

use guild_node::ExitKind;
use guild_proto::cluster::v1::{DrainNodeRequest, DrainNodeResponse};
use serde::Serialize;
use tonic::Code;

use super::leader::{Asking, timed};
use super::progress::{Changes, Shown};
use crate::args::ExpertsDrain;
use crate::command::{block_on, log_tool};
use crate::failure::Failure;
use crate::json;

/// The answer for programs.
#[derive(Serialize)]
struct Drained<'a> {
    node: &'a str,
    draining: bool,
    /// Experts that it still holds.
    slots: u32,
    /// None: nothing has to be moved.
    migration: Option<u64>,
}

pub(super) fn run(args: &ExpertsDrain) -> Result<(), Failure> {
    log_tool(&args.common)?;
    block_on(async {
        let mut leader = Asking::at(&args.leader)?;
        if !args.wait {
            let answer = ask(&mut leader, args).await?;
            return tell(args, answer);
        }
        let mut changes = Changes::of(leader).await?;
        let mut before = changes.next().await?;
        let mut shown = Shown::default();
        let mut told = false;
        loop {
            // Asked again it says what is left: others may have had their turn first.
            let answer = ask(changes.leader(), args).await?;
            if answer.slots == 0 {
                return tell(args, answer);
            }
            if !args.json && !told {
                tell(args, answer)?;
                told = true;
            }
            let id = answer.migration.max(before.migration);
            before = changes.until_ended(id, &before, &mut shown).await?;
        }
    })
}

async fn ask(leader: &mut Asking, args: &ExpertsDrain) -> Result<DrainNodeResponse, Failure> {
    let request = DrainNodeRequest {
        node: args.node.clone(),
        undo: args.undo,
    };
    let answer = leader
        .ask(async |mut client| client.drain_node(timed(request.clone())).await)
        .await;
    answer.map_err(|status| match status.code() {
        // Not the model's fault, as elsewhere.
        Code::NotFound => Failure::usage(status.message()),
        Code::FailedPrecondition => Failure::new(ExitKind::Resources, status.message()),
        _ => leader.failure(status),
    })
}

fn tell(args: &ExpertsDrain, answer: DrainNodeResponse) -> Result<(), Failure> {
    if args.json {
        return json::print(&Drained {
            node: &args.node,
            draining: !args.undo,
            slots: answer.slots,
            migration: (answer.migration != 0).then_some(answer.migration),
        });
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", words(args, answer))?;
    Ok(stdout.flush()?)
}

fn words(args: &ExpertsDrain, answer: DrainNodeResponse) -> String {
    let node = &args.node;
    match (args.undo, answer.slots, answer.migration) {
        (true, ..) => format!("experts may come to {node} again"),
        (false, 0, _) => format!("{node} holds no experts: it can be stopped"),
        (false, slots, 0) => format!(
            "{node}: {slots} experts are to be moved off it, when what is being moved now has arrived"
        ),
        (false, slots, id) => format!(
            "{node}: {slots} experts are being moved off it, migration {id}; `guild experts watch` follows it"
        ),
    }
}
