//! `guild bench`: measurements that a user can repeat.

mod arrival;
mod compare;
mod dataset;
mod figures;
mod kernels;
mod metrics;
mod model;
mod plot;
mod report;
mod send;
mod serve;

use crate::args::{Bench, BenchCommand};
use crate::failure::Failure;

pub(super) fn run(args: &Bench) -> Result<(), Failure> {
    match &args.command {
        BenchCommand::Serve(args) => serve::run(args),
        BenchCommand::Compare(args) => compare::run(args),
        BenchCommand::Kernels(args) => kernels::run(args),
        BenchCommand::Model(args) => model::run(args),
    }
}
