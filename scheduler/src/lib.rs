//! Every decision of a Guild cluster, as plain data and pure transitions.
//!
//! Secret of this room: policy. No I/O, no async, no clock: time comes in as an
//! argument, actions go out as values, so that a simulator can run the very
//! code that production runs. It uses nothing of ours.

pub mod affinity;
pub mod batch;
pub mod eplb;
pub mod load;
pub mod membership;
pub mod microbatch;
pub mod migration;
pub mod placement;
pub mod planner;
pub mod rebalance;
pub mod spread;
