//! Flags by which a coordinator is told to keep the load of the expert nodes even.

use std::time::Duration;

use clap::{Args, ValueEnum};
use guild_coordinator::{CoordinatorConfig as Defaults, Rebalance};
use guild_scheduler::rebalance::Mode;

use crate::units;

/// What a coordinator does about load that is not even.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Balance {
    /// Who plans where experts live while the cluster serves: guild (moves little), eplb (as
    /// published), off; default: guild, and off where all nodes share one machine (`guild up`)
    #[arg(
        long,
        value_enum,
        value_name = "guild|eplb|off",
        hide_possible_values = true,
        help_heading = "Balance"
    )]
    pub(crate) rebalance: Option<PlannerArg>,
    /// Seconds between two plans; 0: only when `guild experts rebalance` asks for one
    #[arg(
        long,
        default_value_t = Defaults::REBALANCE_INTERVAL.as_secs_f64(),
        value_parser = units::parse_seconds,
        value_name = "SECONDS",
        help_heading = "Balance"
    )]
    pub(crate) rebalance_interval: f64,
    /// Bytes that one plan may move
    #[arg(
        long,
        default_value = "1GiB",
        value_parser = units::parse_bytes,
        value_name = "SIZE",
        help_heading = "Balance"
    )]
    pub(crate) rebalance_budget: u64,
    /// Copies that each layer may have beyond --replicas of every expert: room for hot ones
    #[arg(
        long,
        default_value_t = Defaults::REDUNDANT_EXPERTS,
        value_parser = clap::value_parser!(u32).range(..=65_536),
        value_name = "N",
        help_heading = "Balance"
    )]
    pub(crate) redundant_experts: u32,
}

/// Who plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlannerArg {
    Guild,
    Eplb,
    Off,
}

impl Balance {
    /// Nothing is moved unless somebody asks for it.
    pub(crate) fn off() -> Balance {
        Balance {
            rebalance: Some(PlannerArg::Off),
            rebalance_interval: 0.0,
            rebalance_budget: Defaults::REBALANCE_BUDGET,
            redundant_experts: Defaults::REDUNDANT_EXPERTS,
        }
    }

    /// For a coordinator that plans by `default` where nothing else is said.
    pub(crate) fn policy(&self, default: PlannerArg) -> Rebalance {
        let planner = self.rebalance.unwrap_or(default);
        let interval = match planner {
            PlannerArg::Off => Duration::ZERO,
            _ => Duration::from_secs_f64(self.rebalance_interval),
        };
        Rebalance {
            planner: match planner {
                PlannerArg::Eplb => Mode::Eplb,
                PlannerArg::Guild | PlannerArg::Off => Mode::Guild,
            },
            interval: (!interval.is_zero()).then_some(interval),
            budget_bytes: self.rebalance_budget,
        }
    }
}
