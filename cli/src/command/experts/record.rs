//! `guild experts record`: the load of a cluster as a trace.

use std::io::{BufWriter, Write as _};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::leader::{Asking, trace};
use crate::args::ExpertsRecord;
use crate::command::{block_on, log_tool, signals};
use crate::failure::Failure;
use crate::json;

/// Between two looks; shots are longer, and several are kept.
const LOOK: Duration = Duration::from_millis(500);

/// First line of a trace.
#[derive(Serialize)]
struct Head<'a> {
    layers: &'a [u32],
    experts: u32,
}

/// Every other line.
#[derive(Serialize)]
struct Line<'a> {
    rows: &'a [Vec<u64>],
}

pub(super) fn run(args: &ExpertsRecord) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let (shots, missed) = block_on(record(args))?;
    let mut stderr = std::io::stderr();
    let gap = match missed {
        0 => String::new(),
        missed => format!(", {missed} more were missed"),
    };
    writeln!(stderr, "{shots} shots in {}{gap}", args.out.display())?;
    Ok(())
}

/// Records from now on, until the time is up or a signal. How many shots there
/// are, and how many were not seen in time.
async fn record(args: &ExpertsRecord) -> Result<(u64, u64), Failure> {
    let shutdown = signals()?;
    let wrong =
        |error: std::io::Error| Failure::usage(format!("--out: {}: {error}", args.out.display()));
    let mut leader = Asking::at(&args.leader)?;
    let now = leader.load(None).await?;
    let mut out = BufWriter::new(std::fs::File::create(&args.out).map_err(wrong)?);
    let head = Head {
        layers: &now.layers,
        experts: now.experts,
    };
    writeln!(out, "{}", json::line(&head)?).map_err(wrong)?;
    let end = Instant::now() + Duration::from_secs(args.seconds.into());
    let (mut seen, mut shots, mut missed) = (now.closed, 0, 0);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let over = tokio::select! {
            () = tokio::time::sleep(left.min(LOOK)) => left.is_zero(),
            () = shutdown.requested() => true,
        };
        let answer = leader.load(Some(seen)).await?;
        if answer.layers != now.layers || answer.experts != now.experts {
            return Err(Failure::network("the cluster serves another model now"));
        }
        if answer.closed < seen {
            return Err(Failure::network(
                "another coordinator has begun to count: the trace ends here",
            ));
        }
        for (shot, listed) in trace(&answer).shots.iter().zip(&answer.shots) {
            missed += listed.number.saturating_sub(seen + 1);
            seen = listed.number;
            shots += 1;
            writeln!(out, "{}", json::line(&Line { rows: &shot.rows })?).map_err(wrong)?;
        }
        if over {
            out.flush().map_err(wrong)?;
            return Ok((shots, missed));
        }
    }
}
