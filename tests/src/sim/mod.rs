//! A deterministic simulation of a cluster: virtual time, one seeded source of chance, one event
//! after the other.
//!
//! What decides is production's own code: [`guild_scheduler`]'s membership with its snapshots,
//! migrations and drains, its placements and assignment, its spreading of rows. What carries the
//! decisions out in production (the coordinator's leadership and relay, the nodes' sessions, the
//! exchange, copies and slot tables) is modelled here after its rules, one module each, without
//! sockets and clocks. The [`arithmetic`] makes every wrong sum visible, the invariants in `truth`
//! are looked at after every event, and the world heals in the end and must then settle.
//!
//! Secret of this module: how a seed becomes a history. Tests know [`run`] and [`Report`].

pub mod arithmetic;
mod attention;
mod coordinator;
mod event;
mod exchange;
mod expert;
mod faults;
mod message;
mod operator;
mod relay;
pub mod report;
pub mod rng;
mod session;
mod setup;
mod store;
mod truth;
mod world;

pub use report::Report;

/// A defect put in on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// An expert node runs rows of an epoch that it does not know by its newest table.
    AnswersAnUnknownEpoch,
    /// The store takes writes of leaders that were deposed, and these do not look at the clock.
    UnfencedLeader,
    /// Nodes hear of epochs before the store does.
    TellsBeforeItWrites,
    /// A layer is summed without the rows of a node that failed.
    SkipsAMissingRow,
    /// A stream that moves asks for its last token again.
    ResumeRepeatsAToken,
    /// Expert nodes free old tables as soon as a new one is active.
    FreesBeforeTheDrain,
    /// Copies are used without looking at digest and canary.
    SkipsTheDigest,
    /// Expert nodes report an epoch before its experts are there.
    ReportsBeforeItHasLoaded,
    /// Attention nodes route by the newest epoch, active or not.
    RoutesByWhatIsLoading,
}

impl Defect {
    /// All of them.
    pub const ALL: [Defect; 9] = [
        Defect::AnswersAnUnknownEpoch,
        Defect::UnfencedLeader,
        Defect::TellsBeforeItWrites,
        Defect::SkipsAMissingRow,
        Defect::ResumeRepeatsAToken,
        Defect::FreesBeforeTheDrain,
        Defect::SkipsTheDigest,
        Defect::ReportsBeforeItHasLoaded,
        Defect::RoutesByWhatIsLoading,
    ];
}

/// How a run is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// A defect to put in.
    pub defect: Option<Defect>,
    /// Keep a readable event log.
    pub loud: bool,
}

/// The history of a seed.
pub fn run(seed: u64, options: &Options) -> Report {
    let mut world = world::World::of(seed, options);
    world.run();
    std::mem::take(&mut world.report)
}
