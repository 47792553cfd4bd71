//! `guild experts rebalance`: a plan by the present load, and its moves.

use std::fmt::Write as _;
use std::io::Write as _;

use guild_proto::cluster::v1::{RebalanceRequest, RebalanceResponse};
use serde::Serialize;

use super::leader::{Asking, planned};
use super::progress::{Changes, Shown};
use crate::args::ExpertsRebalance;
use crate::command::{block_on, log_tool};
use crate::failure::Failure;
use crate::json;
use crate::units::bytes;

/// The plan for programs.
#[derive(Serialize)]
struct Plan<'a> {
    moves: &'a [String],
    bytes: u64,
    before: f64,
    after: f64,
    /// None: nothing has begun.
    migration: Option<u64>,
}

pub(super) fn run(args: &ExpertsRebalance) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let request = RebalanceRequest {
        dry_run: args.dry_run,
        budget_bytes: args.budget,
    };
    block_on(async {
        let mut leader = Asking::at(&args.leader)?;
        if !args.wait {
            let plan = ask(&mut leader, request).await?;
            return tell(args, &plan);
        }
        let mut changes = Changes::of(leader).await?;
        let before = changes.next().await?;
        let plan = ask(changes.leader(), request).await?;
        tell(args, &plan)?;
        match plan.migration {
            0 => Ok(()),
            id => {
                let mut shown = Shown::default();
                changes.until_ended(id, &before, &mut shown).await?;
                Ok(())
            }
        }
    })
}

async fn ask(leader: &mut Asking, request: RebalanceRequest) -> Result<RebalanceResponse, Failure> {
    let answer = leader
        .ask(async |mut client| client.rebalance(planned(request)).await)
        .await;
    answer.map_err(|status| leader.failure(status))
}

fn tell(args: &ExpertsRebalance, plan: &RebalanceResponse) -> Result<(), Failure> {
    if args.json {
        return json::print(&Plan {
            moves: &plan.moves,
            bytes: plan.bytes,
            before: plan.before,
            after: plan.after,
            migration: (plan.migration != 0).then_some(plan.migration),
        });
    }
    let mut stdout = std::io::stdout();
    stdout.write_all(words(plan, args.dry_run).as_bytes())?;
    Ok(stdout.flush()?)
}

fn words(plan: &RebalanceResponse, dry_run: bool) -> String {
    let mut out = String::new();
    // Writing into a string does not fail.
    for line in &plan.moves {
        let _ = writeln!(out, "{line}");
    }
    if plan.moves.is_empty() {
        let _ = writeln!(
            out,
            "nothing is worth moving: the worst node has {:.2} times its share",
            plan.before
        );
        return out;
    }
    let _ = writeln!(
        out,
        "{} to move; the worst node has {:.2} times its share, and would have {:.2}",
        bytes(plan.bytes),
        plan.before,
        plan.after
    );
    let _ = match (plan.migration, dry_run) {
        (0, true) => writeln!(out, "a dry run: nothing has begun"),
        (0, false) => writeln!(out, "nothing has begun"),
        (id, _) => writeln!(
            out,
            "migration {id} has begun; `guild experts watch` follows it"
        ),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_what_moves_and_what_it_gains() {
        let mut plan = RebalanceResponse {
            moves: vec!["layer 3: expert 7 also to expert-2".to_owned()],
            bytes: 5 << 20,
            before: 1.5,
            after: 1.125,
            migration: 0,
        };
        let dry = words(&plan, true);
        assert!(
            dry.starts_with("layer 3: expert 7 also to expert-2\n5.00 MiB to move;"),
            "{dry}"
        );
        assert!(dry.contains("1.50") && dry.ends_with("a dry run: nothing has begun\n"));
        plan.migration = 9;
        assert!(words(&plan, false).contains("migration 9 has begun"));
        plan.moves.clear();
        assert!(words(&plan, false).starts_with("nothing is worth moving"));
    }
}
