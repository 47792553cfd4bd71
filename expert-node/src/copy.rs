//! Where an expert comes from that a placement wants here: from another node that has it, or
//! from the checkpoint.
//!
//! Secret: when a copy may be trusted. What came from a node has the length and the digest that
//! it must have, is that expert of this model, and gives the same bits as the original for a
//! canary row that goes through both. A node that cannot be reached is no reason to fail: there
//! are others, and the checkpoint. A copy that differs is one: something is broken that must not
//! be passed on. This module must not know tables or epochs' states; it is given who has what at
//! one epoch.

use std::{
    collections::{HashMap, HashSet},
    str::FromStr,
    sync::{Arc, Mutex as Lock, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use guild_model::{Cpu, ModelError, expert::Expert};
use guild_node::failpoint;
use guild_proto::cluster::v1::Placement;
use guild_transport::{
    Assignment, Batch, ExchangeCode, ExchangeError, Fabric, FetchRequest, Links, NodeId,
    Switchboard,
};
use tokio::{join, sync::mpsc, time::sleep};

use crate::{
    Error,
    freeing::Freeing,
    pace::Pace,
    residents::{ExpertKey, LoadError, Residents},
    thread,
};

/// Copies that are made at a time: one is checked while the next one travels.
pub(crate) const COPIES: usize = 2;
/// What one copy from one node may take.
const COPY_LIMIT: Duration = Duration::from_secs(60);
/// What a canary row may take.
const CANARY_LIMIT: Duration = Duration::from_secs(5);
/// How often a node is asked that gives away as much as it can already.
const ASKS: u32 = 50;
/// Between two of these.
const ASK_PAUSE: Duration = Duration::from_millis(100);
/// A node that has failed so often in a row is not asked again for this placement: one that hangs
/// would cost its time limit for every expert.
const TRIES: u32 = 2;
/// Pieces that have come and wait to be looked at.
const PIECES_READY: usize = 1;

/// Where a node that is given more experts gets them from first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyFrom {
    /// From another node that has them; from the checkpoint when none can be reached.
    #[default]
    Peer,
    /// From the checkpoint.
    Checkpoint,
}

impl CopyFrom {
    fn as_str(self) -> &'static str {
        match self {
            CopyFrom::Peer => "peer",
            CopyFrom::Checkpoint => "checkpoint",
        }
    }
}

impl std::fmt::Display for CopyFrom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CopyFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [CopyFrom::Peer, CopyFrom::Checkpoint]
            .into_iter()
            .find(|from| from.as_str() == text)
            .ok_or_else(|| format!("`{text}` is neither `peer` nor `checkpoint`"))
    }
}

/// A node that has an expert.
#[derive(Clone, Debug)]
struct Home {
    node: NodeId,
    name: String,
    slot: u32,
}

/// Who else has what, at one epoch.
#[derive(Debug, Default)]
pub(crate) struct Homes {
    epoch: u64,
    of: HashMap<ExpertKey, Vec<Home>>,
    /// How often a node has failed since it last helped.
    failures: Lock<HashMap<NodeId, u32>>,
}

impl Homes {
    fn of(&self, key: ExpertKey) -> &[Home] {
        self.of.get(&key).map_or(&[], Vec::as_slice)
    }

    fn failures(&self) -> MutexGuard<'_, HashMap<NodeId, u32>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_given_up(&self, home: &Home) -> bool {
        self.failures()
            .get(&home.node)
            .is_some_and(|&failures| failures >= TRIES)
    }

    fn helped(&self, home: &Home) {
        self.failures().remove(&home.node);
    }

    fn failed(&self, home: &Home, (layer, expert): ExpertKey, reason: &str) {
        *self.failures().entry(home.node).or_default() += 1;
        tracing::warn!(layer, expert, node = home.name, reason, "no copy");
    }
}

/// Makes experts resident.
pub(crate) struct Copier {
    pub(crate) name: String,
    pub(crate) process: String,
    pub(crate) from: CopyFrom,
    pub(crate) residents: Arc<Residents>,
    pub(crate) pace: Arc<Pace>,
    pub(crate) freeing: Arc<Freeing>,
    pub(crate) cpu: Cpu,
    /// Elements in a row.
    pub(crate) width: usize,
    /// To the nodes that have what is wanted here.
    pub(crate) links: Arc<Links>,
    pub(crate) board: Option<Switchboard>,
}

/// Why a copy is not here.
enum Failed {
    /// The node cannot give it: another one may.
    Source(String),
    /// What it gave is wrong, or this node fails.
    Final(Error),
}

impl Copier {
    /// Gets ready to copy `wanted` from the nodes of `active`, the placement by which they
    /// serve; without one from the checkpoint alone.
    pub(crate) fn meet(&self, active: Option<&Placement>, wanted: &[ExpertKey]) -> Homes {
        let mut homes = Homes::default();
        let mut nodes = Vec::new();
        let mut here = HashSet::new();
        let wanted: HashSet<ExpertKey> = wanted.iter().copied().collect();
        if let Some(active) = active {
            homes.epoch = active.epoch;
            let others = active.nodes.iter().filter(|node| node.name != self.name);
            for node in others {
                for (slot, key) in (0..).zip(&node.slots) {
                    let key = (key.layer, key.expert);
                    if wanted.contains(&key) {
                        homes.of.entry(key).or_default().push(Home {
                            node: node.node_id,
                            name: node.name.clone(),
                            slot,
                        });
                    }
                }
                // Connected when something is asked for: those of an earlier placement stay.
                nodes.push((node.node_id, node.name.clone(), node.address.clone()));
                if node.process == self.process {
                    here.insert(node.node_id);
                }
            }
        }
        let board = |node| self.board.as_ref().filter(|_| here.contains(&node));
        self.links.set_nodes_where(&nodes, board);
        homes
    }

    /// The connections that [`Copier::meet`] has led to are of no more use.
    pub(crate) fn part(&self) {
        self.links.set_nodes(&[], None);
    }

    /// Makes an expert resident that `epoch` wants here.
    ///
    /// # Errors
    /// A copy differs from its original, or the expert cannot be read from the checkpoint
    /// either.
    pub(crate) async fn bring(
        &self,
        key: ExpertKey,
        epoch: u64,
        homes: &Homes,
    ) -> Result<Arc<Expert>, Error> {
        failpoint::at("copy::begin").map_err(LoadError::from)?;
        let (layer, expert) = key;
        let from = homes.of(key);
        if self.from == CopyFrom::Peer {
            // Not everybody begins with the same node, nor with the one that was of no use the
            // last time.
            let turn = u64::from(layer) + u64::from(expert) + epoch;
            let first = (turn % from.len().max(1) as u64) as usize;
            let turned = from[first..].iter().chain(&from[..first]);
            for home in turned.filter(|home| !homes.is_given_up(home)) {
                let copied = match self.copy(key, home, homes.epoch).await {
                    Ok(copied) => self
                        .canary(key, &copied, epoch, home, homes.epoch)
                        .await
                        .map(|()| copied),
                    Err(failed) => Err(failed),
                };
                match copied {
                    Ok(copied) => {
                        homes.helped(home);
                        return Ok(copied);
                    }
                    Err(Failed::Final(error)) => return Err(error),
                    Err(Failed::Source(reason)) => homes.failed(home, key, &reason),
                }
            }
        }
        let read = self.read(key).await?;
        if self.from == CopyFrom::Checkpoint {
            for home in from.iter().filter(|home| !homes.is_given_up(home)) {
                match self.canary(key, &read, epoch, home, homes.epoch).await {
                    Ok(()) => break,
                    Err(Failed::Final(error)) => return Err(error),
                    Err(Failed::Source(reason)) => homes.failed(home, key, &reason),
                }
            }
        }
        Ok(read)
    }

    async fn read(&self, key: ExpertKey) -> Result<Arc<Expert>, Error> {
        failpoint::at("copy::checkpoint").map_err(LoadError::from)?;
        let (residents, pace) = (Arc::clone(&self.residents), Arc::clone(&self.pace));
        let held = self.freeing.hold();
        let read = thread::behind_serving("reading an expert", move || {
            let read = pace.in_pieces(|breathe| residents.read_by(key, breathe));
            drop(held);
            read
        });
        Ok(read.await??)
    }

    /// Fetches an expert; it is whole, and that expert of this model.
    async fn copy(&self, key: ExpertKey, home: &Home, epoch: u64) -> Result<Arc<Expert>, Failed> {
        failpoint::at("copy::source").map_err(source)?;
        let wanted = FetchRequest {
            epoch,
            slot: home.slot,
            len: self.residents.blob_len(key).map_err(last)?,
            deadline: Some(Instant::now() + COPY_LIMIT),
        };
        let mut asks = 1;
        let mut fetch = loop {
            match self.links.fetch(home.node, wanted).await {
                Err(error) if error.code == ExchangeCode::Overloaded && asks < ASKS => {
                    asks += 1;
                    sleep(ASK_PAUSE).await;
                }
                begun => break begun.map_err(source)?,
            }
        };
        let mut arriving = self.residents.arriving(key).map_err(last)?;
        let (pieces, mut come) = mpsc::channel::<Bytes>(PIECES_READY);
        let giving = async move {
            while let Some(piece) = fetch.next().await.map_err(source)? {
                failpoint::at("copy::chunk").map_err(source)?;
                if pieces.send(piece).await.is_err() {
                    // Who takes them says why.
                    break;
                }
            }
            Ok(fetch.digest())
        };
        let (pace, held) = (Arc::clone(&self.pace), self.freeing.hold());
        let taking = thread::behind_serving("taking a copy over", move || {
            while let Some(piece) = come.blocking_recv() {
                pace.in_pieces(|_| arriving.take(&piece))?;
            }
            drop(held);
            Ok::<_, ModelError>(arriving)
        });
        let (theirs, taken) = join!(giving, taking);
        let theirs = theirs?;
        let refused =
            |error: ModelError| last(untrusted(key, home.name.clone(), error.to_string()));
        let arriving = taken.map_err(Failed::Final)?.map_err(refused)?;
        let ours = arriving.digest();
        let fired = failpoint::at("digest::check").is_err();
        if ours != theirs || fired {
            let hex = |digest: [u8; 32]| blake3::Hash::from_bytes(digest).to_hex();
            let reason = format!("digest {} here, {} there", hex(ours), hex(theirs));
            return Err(last(untrusted(key, home.name.clone(), reason)));
        }
        self.residents.adopt(key, arriving).map_err(refused)
    }

    /// Sends one row through the original and through its copy: the bits must be the same.
    async fn canary(
        &self,
        key: ExpertKey,
        copy: &Arc<Expert>,
        epoch: u64,
        home: &Home,
        served: u64,
    ) -> Result<(), Failed> {
        failpoint::at("canary::send").map_err(source)?;
        let row = canary_row(key, epoch, self.width);
        let theirs = self.ask(home, served, row.clone()).await.map_err(source)?;
        let (computing, cpu, pace) = (Arc::clone(copy), self.cpu.clone(), Arc::clone(&self.pace));
        let ours = thread::behind_serving("a canary row", move || {
            pace.in_pieces(|_| computing.forward(&cpu, &row))
        });
        let ours = ours.await.map_err(Failed::Final)?;
        let fired = failpoint::at("canary::compare").is_err();
        let differs = ours
            .iter()
            .zip(&theirs)
            .position(|(ours, theirs)| ours.to_bits() != theirs.to_bits());
        let at = match differs {
            _ if ours.len() != theirs.len() => ours.len().min(theirs.len()),
            None if !fired => return Ok(()),
            at => at.unwrap_or(0),
        };
        let digest = blake3::Hash::from_bytes(copy.digest()).to_hex();
        let reason = format!("element {at} of a canary row differs; digest {digest} here");
        Err(last(untrusted(key, home.name.clone(), reason)))
    }

    /// One row through a slot of another node, by the way that all rows go.
    async fn ask(&self, home: &Home, epoch: u64, row: Vec<f32>) -> Result<Vec<f32>, ExchangeError> {
        let (links, home) = (Arc::clone(&self.links), home.clone());
        // A node of this process computes on the thread that asks.
        let sent = tokio::task::spawn_blocking(move || {
            let sent = links.dispatch(Batch {
                epoch,
                width: row.len(),
                rows: &row,
                assignments: &[Assignment {
                    row: 0,
                    node: home.node,
                    slot: home.slot,
                }],
                deadline: Some(Instant::now() + CANARY_LIMIT),
            });
            sent.map_err(|error| (error, home.name))
        });
        let sent = sent.await.map_err(|error| {
            ExchangeError::new(
                ExchangeCode::Internal,
                self.name.as_str(),
                error.to_string(),
            )
        })?;
        let handle = sent.map_err(|(error, _)| error)?;
        Ok(self.links.combine(handle).await?.rows)
    }
}

fn source(error: impl std::fmt::Display) -> Failed {
    Failed::Source(error.to_string())
}

fn last(error: LoadError) -> Failed {
    Failed::Final(error.into())
}

fn untrusted((layer, expert): ExpertKey, node: String, reason: String) -> LoadError {
    LoadError::Copy {
        layer,
        expert,
        node,
        reason,
    }
}

/// A row that depends on nothing but these: `width` numbers from [-1, 1).
fn canary_row((layer, expert): ExpertKey, epoch: u64, width: usize) -> Vec<f32> {
    let mut state = epoch ^ (u64::from(layer) << 32 | u64::from(expert));
    let mut next = || {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    // 24 bits are exact in f32.
    let unit = |bits: u64| (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
    (0..width).map(|_| unit(next())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_row_is_the_same_everywhere_and_another_for_every_expert() {
        let row = canary_row((3, 7), 5, 64);
        assert_eq!(row, canary_row((3, 7), 5, 64));
        assert!(row.iter().all(|x| (-1.0..1.0).contains(x)));
        for other in [
            canary_row((3, 8), 5, 64),
            canary_row((4, 7), 5, 64),
            canary_row((3, 7), 6, 64),
        ] {
            assert_ne!(row, other);
        }
    }

    #[test]
    fn the_order_of_sources_is_read_as_it_is_written() {
        for from in [CopyFrom::Peer, CopyFrom::Checkpoint] {
            assert_eq!(from.to_string().parse(), Ok(from));
        }
        assert!("disk".parse::<CopyFrom>().is_err());
    }
}
