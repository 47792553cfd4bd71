//! Which attention node runs a request: the one that will be through with it first, by what waits
//! there and by how much of its prompt is likely to be in its cache.
//!
//! Secret of this module: how much a remembered prefix is worth against a queue. A node's cost is
//! the tokens that are still to be run there plus those of the request that it does not know yet, so
//! that a cached prefix is worth just the work it saves. A node that has more than
//! [`MAX_OVER_MEAN`] times the mean before it is not taken for its cache, however much of it is
//! known there: no prefix pins all work to one node. What prefixes are is the caller's business: it
//! names blocks of a prompt by numbers that stand for the block and all before it, so that equal
//! numbers are equal prefixes.
//!
//! What a node has run is remembered for a bounded number of blocks, the least lately used ones
//! forgotten first. It is a guess: nodes evict as they like. A wrong guess costs time, never a token.

use std::collections::{BTreeMap, HashMap};

use crate::placement::NodeId;

/// Blocks that are remembered, at most.
pub const MAX_BLOCKS: usize = 1 << 18;
/// Nodes that are remembered for one block, at most: the latest ones.
pub const MAX_NODES_OF_A_BLOCK: usize = 4;
/// A node is taken for its cache only while it has at most this many times the mean of the tokens
/// that are still to be run, the request's own included.
pub const MAX_OVER_MEAN: f64 = 1.5;

/// A prompt of which the node that decodes has to run fewer tokens is run there: its pages would
/// take longer to ask for and to move than to compute.
pub const MIN_MOVED_TOKENS: u64 = 128;

/// A node that could take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub node: NodeId,
    /// Tokens that are still to be run there.
    pub outstanding: u64,
}

/// A node for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The node's id.
    pub node: NodeId,
    /// Tokens of the prompt that are likely to be in its cache.
    pub cached: u64,
    /// Whether another node knows more of the prompt and has too much to do.
    pub turned_away: bool,
}

/// The node that was chosen to decode a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoder {
    /// Its id.
    pub node: NodeId,
    /// Tokens that are still to be run there, this request's left aside.
    pub outstanding: u64,
    /// Tokens of the prompt that are likely to be in its cache.
    pub cached: u64,
    /// Whether it is meant to run prompts, too.
    pub runs_prompts: bool,
}

/// What attention nodes have run, as far as it is remembered.
#[derive(Debug)]
pub struct Affinity {
    /// Tokens of a block.
    block: u64,
    most: usize,
    blocks: HashMap<u64, Block>,
    /// Blocks by when they were last used.
    ages: BTreeMap<u64, u64>,
    /// Blocks of each node.
    held: HashMap<NodeId, usize>,
    now: u64,
}

#[derive(Debug)]
struct Block {
    used: u64,
    /// The latest last.
    nodes: Vec<NodeId>,
}

impl Affinity {
    /// Remembers nothing yet. `block`: tokens of a block; `most`: blocks that are remembered.
    pub fn new(block: u64, most: usize) -> Affinity {
        Affinity {
            block,
            most,
            blocks: HashMap::new(),
            ages: BTreeMap::new(),
            held: HashMap::new(),
            now: 0,
        }
    }

    /// The node for a request of `tokens` tokens to run, of whose prompt `prefix` names the whole
    /// blocks in their order. Among equals the one with fewer remembered blocks, then the lower id.
    /// None: there is no candidate.
    pub fn choose(&self, prefix: &[u64], tokens: u64, candidates: &[Candidate]) -> Option<Choice> {
        let least = candidates.iter().map(|c| c.outstanding).min()?;
        let all: u64 = candidates.iter().map(|c| c.outstanding).sum();
        let known = self.known(prefix, candidates);
        let options: Vec<(Candidate, u64)> = (candidates.iter().zip(known))
            .map(|(candidate, known)| (*candidate, known.min(tokens)))
            .collect();
        let rank = |(c, known): &(Candidate, u64)| {
            let blocks = self.held.get(&c.node).copied().unwrap_or_default();
            (c.outstanding.saturating_add(tokens - known), blocks, c.node)
        };
        let is_open = |(c, known): &(Candidate, u64)| {
            let work = tokens - known;
            let mean = all.saturating_add(work) as f64 / candidates.len() as f64;
            let after = c.outstanding.saturating_add(work) as f64;
            c.outstanding == least || after <= MAX_OVER_MEAN * mean
        };
        let wanted = options.iter().min_by_key(|option| rank(option))?;
        let open = options.iter().filter(|option| is_open(option));
        let (best, cached) = open.min_by_key(|option| rank(option))?;
        Some(Choice {
            node: best.node,
            cached: *cached,
            turned_away: wanted.0.node != best.node,
        })
    }

    /// The node that runs a prompt of `prompt` tokens for `decoder`, of `helpers`, the nodes for
    /// prefill. None: it had better run the prompt itself, because there is too little to run, there
    /// is no helper, or it runs prompts anyway and would be through sooner.
    pub fn pair(
        &self,
        prefix: &[u64],
        prompt: u64,
        decoder: &Decoder,
        helpers: &[Candidate],
    ) -> Option<Choice> {
        let own = prompt.saturating_sub(decoder.cached);
        if own < MIN_MOVED_TOKENS {
            return None;
        }
        let others = helpers.iter().filter(|helper| helper.node != decoder.node);
        let others: Vec<Candidate> = others.copied().collect();
        let helper = self.choose(prefix, prompt, &others)?;
        let found = others.iter().find(|other| other.node == helper.node)?;
        let theirs = found.outstanding.saturating_add(prompt - helper.cached);
        let is_sooner = theirs < decoder.outstanding.saturating_add(own);
        (is_sooner || !decoder.runs_prompts).then_some(helper)
    }

    /// Tokens at the start of the prompt that each candidate has run.
    fn known(&self, prefix: &[u64], candidates: &[Candidate]) -> Vec<u64> {
        let mut known = vec![0; candidates.len()];
        let mut left: Vec<usize> = (0..candidates.len()).collect();
        for name in prefix {
            let Some(block) = self.blocks.get(name) else {
                break;
            };
            left.retain(|&at| block.nodes.contains(&candidates[at].node));
            if left.is_empty() {
                break;
            }
            for &at in &left {
                known[at] += self.block;
            }
        }
        known
    }

    /// `node` runs a prompt with these blocks.
    pub fn note(&mut self, prefix: &[u64], node: NodeId) {
        // The first ones last: what is forgotten first is the end of a prompt.
        for &name in prefix.iter().take(self.most).rev() {
            self.now += 1;
            let block = self.blocks.entry(name).or_insert_with(|| Block {
                used: self.now,
                nodes: Vec::new(),
            });
            self.ages.remove(&block.used);
            block.used = self.now;
            match block.nodes.iter().position(|&known| known == node) {
                Some(at) => drop(block.nodes.remove(at)),
                None => *self.held.entry(node).or_default() += 1,
            }
            block.nodes.push(node);
            if block.nodes.len() > MAX_NODES_OF_A_BLOCK {
                let earliest = block.nodes.remove(0);
                lose(&mut self.held, earliest);
            }
            self.ages.insert(self.now, name);
        }
        while self.blocks.len() > self.most {
            let Some((_, name)) = self.ages.pop_first() else {
                break;
            };
            let block = self.blocks.remove(&name);
            for node in block.into_iter().flat_map(|block| block.nodes) {
                lose(&mut self.held, node);
            }
        }
    }

    /// A node is gone, and its cache with it.
    pub fn forget(&mut self, node: NodeId) {
        if self.held.remove(&node).is_none() {
            return;
        }
        let ages = &mut self.ages;
        self.blocks.retain(|_, block| {
            block.nodes.retain(|&known| known != node);
            if block.nodes.is_empty() {
                ages.remove(&block.used);
            }
            !block.nodes.is_empty()
        });
    }

    /// Blocks that are remembered.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

fn lose(held: &mut HashMap<NodeId, usize>, node: NodeId) {
    if let Some(blocks) = held.get_mut(&node) {
        *blocks -= 1;
        if *blocks == 0 {
            held.remove(&node);
        }
    }
}
