//! What processes say to each other and to themselves. Names are those of the wire contract.

use std::sync::Arc;

use guild_scheduler::membership::{Registration, Report};
use guild_scheduler::placement::{NodeId, Placement};

use super::arithmetic::Key;
use super::coordinator::Placements;
use super::event::{Time, Who};
use super::faults::Fault;

/// A placement as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wire {
    pub(super) state: State,
    /// Nobody routes by an earlier epoch; 0: not known.
    pub(super) oldest: u64,
    /// Empty when withdrawn, but for the epoch.
    pub(super) placement: Placement,
    /// Name and address of each node of the placement.
    pub(super) nodes: Vec<(String, String)>,
}

impl Wire {
    pub(super) fn epoch(&self) -> u64 {
        self.placement.epoch()
    }

    /// What the node of that name holds; None: it has no part in it.
    pub(super) fn slots_of(&self, name: &str) -> Option<&[Key]> {
        let at = self.nodes.iter().position(|(node, _)| node == name)?;
        Some(&self.placement.nodes()[at].slots)
    }

    /// The name of a node of it.
    pub(super) fn name_of(&self, id: NodeId) -> Option<&str> {
        let mut nodes = self.placement.nodes().iter().zip(&self.nodes);
        let found = nodes.find(|(slots, _)| slots.node == id)?;
        Some(&found.1.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Loading,
    Active,
    Withdrawn,
}

/// What is in the store: as in `node::store::State`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) epoch: u64,
    pub(super) bytes: Arc<Vec<u8>>,
    /// What the writer will tell once it is written: for the checks alone.
    pub(super) placements: Arc<Placements>,
}

/// A call that is answered once.
#[derive(Clone, Debug)]
pub(super) enum Call {
    // to the store
    Campaign,
    KeepAlive {
        lease: u64,
    },
    Write {
        lease: u64,
        expected: u64,
        state: Stored,
    },
    Observe,
    // to a coordinator
    Register(Box<Registration>),
    Heartbeat {
        node: NodeId,
        incarnation: u64,
        report: Report,
    },
    Leave {
        node: NodeId,
        incarnation: u64,
    },
    // to an expert node: the slots of an epoch and a row for each
    Frame {
        epoch: u64,
        rows: Vec<(u32, u64)>,
    },
    Fetch {
        epoch: u64,
        slot: u32,
    },
}

#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// The connection is refused.
    Unreachable,
    /// Nothing came in time.
    TimedOut,
    Won {
        lease: u64,
        revision: u64,
        state: Option<Stored>,
    },
    Occupied,
    Kept,
    Written {
        revision: u64,
    },
    /// Somebody (perhaps the writer itself) has written in between.
    Overtaken {
        revision: u64,
        state: Option<Stored>,
    },
    Fenced,
    Seen {
        revision: u64,
        leader: Option<usize>,
        state: Option<Stored>,
    },
    Joined {
        node: NodeId,
    },
    Beaten,
    UnknownNode,
    NotLeader {
        leader: Option<usize>,
    },
    Refused,
    Rows(Vec<u64>),
    UnknownEpoch,
    UnknownSlot,
    Blob {
        weight: u64,
        digest: u64,
    },
}

/// A call that is answered by a stream.
#[derive(Clone, Debug)]
pub(super) enum Open {
    Watch { node: NodeId },
    Generate { tokens: Vec<u32>, more: usize },
}

/// One message of a stream.
#[derive(Clone, Debug)]
pub(super) enum Push {
    Placement(Arc<Wire>),
    /// The watch ends: not a member, or not the leader.
    WatchEnds(Answer),
    Accepted,
    /// It has no place for the request.
    NotNow,
    Token(u32),
    Complete,
    /// An expert is nowhere.
    ExpertLost,
}

#[derive(Clone, Debug)]
pub(super) enum Message {
    Call {
        rpc: u64,
        from: Who,
        body: Call,
    },
    Answer {
        rpc: u64,
        body: Answer,
    },
    Open {
        conn: u64,
        body: Open,
    },
    Push {
        conn: u64,
        body: Push,
    },
    Broken {
        conn: u64,
    },
    /// The store hints that something has changed.
    Hint,
}

/// What a process has set for itself.
#[derive(Clone, Debug)]
pub(super) enum Timer {
    Timeout {
        rpc: u64,
    },
    // coordinators
    Tick,
    Relist,
    Campaign,
    KeepAlive,
    WriteAgain,
    Relay {
        stream: u64,
        stamp: u64,
    },
    Plan,
    // nodes
    Join {
        stamp: u64,
    },
    Beat {
        stamp: u64,
    },
    Watch {
        stamp: u64,
    },
    /// The end, and how long it is away.
    Goodbye {
        away: Time,
    },
    // expert nodes
    Copied {
        stamp: u64,
    },
    Executed {
        rpc: u64,
        to: Who,
        answer: Answer,
    },
    // attention nodes
    Step {
        stamp: u64,
    },
    Exchange {
        stamp: u64,
    },
}

/// What happens in the world.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Message {
        to: Who,
        life: u64,
        message: Message,
    },
    Timer {
        of: Who,
        life: u64,
        timer: Timer,
    },
    Fault(Fault),
    /// A client begins its request, or begins it again.
    Client(usize),
    /// A connection over a cut line or to a dead process has been silent for too long.
    Silence {
        conn: u64,
    },
    /// The faults stop and the world heals.
    Heal,
    /// By now all has to be well.
    End,
}
