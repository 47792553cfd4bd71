//! The published expert-parallelism load balancer (EPLB), hierarchical and global.
//!
//! Secret of this module: two greedy stages, replication and packing, done with
//! the arithmetic of the published code (32-bit sums and quotients), stable
//! descending order and ties to the lowest index, so that its result is one
//! result. It is the cold start of the planner and what the planner is measured
//! against; it knows neither the present placement nor uneven nodes.
//!
//! Source: `deepseek-ai/EPLB`, `eplb.py`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Replicas of one layer, at most.
pub const MAX_REPLICAS: usize = 1 << 16;
/// Replicas of all layers, at most: bounds the result of one call.
pub const MAX_TOTAL_REPLICAS: usize = 1 << 23;

/// What a plan is made for, under the names of the published function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Physical experts of a layer; a multiple of `num_gpus`.
    pub num_replicas: usize,
    /// Groups of experts that share a node under the hierarchical policy.
    pub num_groups: usize,
    /// Nodes, for the hierarchical policy.
    pub num_nodes: usize,
    /// Devices; all have `num_replicas / num_gpus` slots.
    pub num_gpus: usize,
}

/// An input for which no plan is defined. Every message opens with the field.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum EplbError {
    /// `weight` has no layer or no expert.
    #[error("weight: give at least one layer with at least one expert")]
    NoWeight,
    /// `weight` has rows of different lengths.
    #[error(
        "weight[{layer}]: {found} experts where weight[0] has {wanted}; all layers have as many"
    )]
    Ragged {
        /// Row of `weight`.
        layer: usize,
        /// Its length.
        found: usize,
        /// The length of the first row.
        wanted: usize,
    },
    /// A weight is negative, infinite or not a number.
    #[error("weight[{layer}][{expert}]: {value} is not a load; loads are finite and not negative")]
    Weight {
        /// Row of `weight`.
        layer: usize,
        /// Column of `weight`.
        expert: usize,
        /// What stands there.
        value: f32,
    },
    /// A count is zero.
    #[error("{field}: must be at least 1")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// A count is beyond what this module plans for.
    #[error("{field}: {value} is more than the limit of {limit}")]
    TooMany {
        /// The field's name.
        field: &'static str,
        /// What was asked for.
        value: usize,
        /// The limit.
        limit: usize,
    },
    /// There are fewer replicas than experts.
    #[error("num_replicas: {replicas} replicas cannot hold {experts} experts")]
    TooFew {
        /// Replicas asked for.
        replicas: usize,
        /// Experts of a layer.
        experts: usize,
    },
    /// A count is not a multiple of another.
    #[error("{field}: {value} is not a multiple of {of} ({divisor})")]
    NotMultiple {
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The field that must divide it.
        of: &'static str,
        /// The value of that field.
        divisor: usize,
    },
}

/// Which of the two published policies made a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Groups of experts stay on one node.
    Hierarchical,
    /// Nodes and groups play no part.
    Global,
}

/// The result: three maps, layer after layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    policy: Policy,
    experts: usize,
    replicas: usize,
    /// [layers, replicas]
    phy2log: Vec<u32>,
    /// [layers, replicas]: the slots of expert 0 by rank, then those of expert 1, …
    log2phy: Vec<u32>,
    /// [layers, experts]
    logcnt: Vec<u32>,
}

impl Plan {
    /// The policy that `num_groups` and `num_nodes` asked for.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.logcnt.len() / self.experts
    }

    /// The expert in each physical slot of a layer, `[num_replicas]`.
    /// Slots `g * num_replicas / num_gpus ..` are those of device `g`.
    pub fn phy2log(&self, layer: usize) -> &[u32] {
        &self.phy2log[layer * self.replicas..][..self.replicas]
    }

    /// The number of replicas of each expert of a layer, `[experts]`.
    pub fn logcnt(&self, layer: usize) -> &[u32] {
        &self.logcnt[layer * self.experts..][..self.experts]
    }

    /// For each expert of a layer its physical slots, in the order of rank.
    pub fn log2phy(&self, layer: usize) -> impl Iterator<Item = &[u32]> {
        let mut rest = &self.log2phy[layer * self.replicas..][..self.replicas];
        self.logcnt(layer).iter().map(move |&count| {
            let (slots, tail) = rest.split_at(count as usize);
            rest = tail;
            slots
        })
    }
}

/// Plans all layers; `weight` is [layers, experts], the load of each logical
/// expert. Hierarchical where `num_nodes` divides `num_groups`, else global.
///
/// # Errors
/// Counts that do not divide each other as the policy needs, and weights that
/// are no loads; the message opens with the field.
pub fn rebalance(weight: &[impl AsRef<[f32]>], shape: Shape) -> Result<Plan, EplbError> {
    let experts = check(weight, shape)?;
    let (policy, groups, nodes) = if shape.num_groups.is_multiple_of(shape.num_nodes) {
        (Policy::Hierarchical, shape.num_groups, shape.num_nodes)
    } else {
        (Policy::Global, 1, 1)
    };
    if policy == Policy::Hierarchical {
        multiple("weight", experts, "num_groups", groups)?;
        multiple("num_gpus", shape.num_gpus, "num_nodes", nodes)?;
    }
    multiple(
        "num_replicas",
        shape.num_replicas,
        "num_gpus",
        shape.num_gpus,
    )?;

    let replicas = shape.num_replicas;
    let mut plan = Plan {
        policy,
        experts,
        replicas,
        phy2log: vec![0; weight.len() * replicas],
        log2phy: vec![0; weight.len() * replicas],
        logcnt: vec![0; weight.len() * experts],
    };
    let mut scratch = Scratch::default();
    for (layer, row) in weight.iter().enumerate() {
        scratch.layer(
            row.as_ref(),
            Cut {
                groups,
                nodes,
                gpus: shape.num_gpus,
            },
            &mut plan.phy2log[layer * replicas..][..replicas],
            &mut plan.log2phy[layer * replicas..][..replicas],
            &mut plan.logcnt[layer * experts..][..experts],
        );
    }
    Ok(plan)
}

fn multiple(
    field: &'static str,
    value: usize,
    of: &'static str,
    divisor: usize,
) -> Result<(), EplbError> {
    if value.is_multiple_of(divisor) {
        Ok(())
    } else {
        Err(EplbError::NotMultiple {
            field,
            value,
            of,
            divisor,
        })
    }
}

fn check(weight: &[impl AsRef<[f32]>], shape: Shape) -> Result<usize, EplbError> {
    let experts = weight.first().map_or(0, |row| row.as_ref().len());
    if experts == 0 {
        return Err(EplbError::NoWeight);
    }
    for (layer, row) in weight.iter().enumerate() {
        let row = row.as_ref();
        if row.len() != experts {
            return Err(EplbError::Ragged {
                layer,
                found: row.len(),
                wanted: experts,
            });
        }
        let bad = row.iter().position(|w| !w.is_finite() || *w < 0.0);
        if let Some(expert) = bad {
            return Err(EplbError::Weight {
                layer,
                expert,
                value: row[expert],
            });
        }
    }
    let counts = [
        ("num_replicas", shape.num_replicas),
        ("num_groups", shape.num_groups),
        ("num_nodes", shape.num_nodes),
        ("num_gpus", shape.num_gpus),
    ];
    for (field, value) in counts {
        if value == 0 {
            return Err(EplbError::Zero { field });
        }
        if value > MAX_REPLICAS {
            return Err(EplbError::TooMany {
                field,
                value,
                limit: MAX_REPLICAS,
            });
        }
    }
    if shape.num_replicas < experts {
        return Err(EplbError::TooFew {
            replicas: shape.num_replicas,
            experts,
        });
    }
    let total = shape.num_replicas.saturating_mul(weight.len());
    if total > MAX_TOTAL_REPLICAS {
        return Err(EplbError::TooMany {
            field: "num_replicas",
            value: total,
            limit: MAX_TOTAL_REPLICAS,
        });
    }
    Ok(experts)
}

#[derive(Clone, Copy)]
struct Cut {
    groups: usize,
    nodes: usize,
    gpus: usize,
}

/// Order-preserving bits of a load (finite or +inf, never negative).
fn bits(load: f32) -> u32 {
    (load + 0.0).to_bits()
}

/// A pack as the heap holds it: sum and index, the smallest first.
type Pack = Reverse<(u32, u32)>;

/// Buffers that live through all layers.
#[derive(Default)]
struct Scratch {
    order: Vec<u64>,
    packs: BinaryHeap<Pack>,
    filled: Vec<u32>,
    hottest: BinaryHeap<(u32, Reverse<u32>)>,
    group_load: Vec<f32>,
    /// Where each item of a packing went: pack * items per pack + rank.
    position: Vec<u32>,
    /// The experts in the order of their nodes.
    mlog2log: Vec<u32>,
    load: Vec<f32>,
    count: Vec<u32>,
    phy: Vec<(u32, u32)>,
    phy_load: Vec<f32>,
    offset: Vec<u32>,
    /// [replicas] rank of the replica in each physical slot.
    rank: Vec<u32>,
}

impl Scratch {
    fn layer(
        &mut self,
        weight: &[f32],
        cut: Cut,
        phy2log: &mut [u32],
        log2phy: &mut [u32],
        logcnt: &mut [u32],
    ) {
        let (experts, replicas) = (weight.len(), phy2log.len());
        self.order_by_node(weight, cut);
        let (node_experts, node_replicas) = (experts / cut.nodes, replicas / cut.nodes);
        self.rank.clear();
        self.rank.resize(replicas, 0);
        for node in 0..cut.nodes {
            let first = node * node_experts;
            self.load.clear();
            let here = &self.mlog2log[first..][..node_experts];
            self.load.extend(here.iter().map(|&e| weight[e as usize]));
            self.replicate(node_replicas);
            self.phy_load.clear();
            let share =
                |&(e, _): &(u32, u32)| self.load[e as usize] / self.count[e as usize] as f32;
            self.phy_load.extend(self.phy.iter().map(share));
            pack(
                &self.phy_load,
                cut.gpus / cut.nodes,
                &mut self.order,
                &mut self.packs,
                &mut self.filled,
                &mut self.position,
            );
            for (&at, &(e, rank)) in self.position.iter().zip(&self.phy) {
                let slot = node * node_replicas + at as usize;
                phy2log[slot] = self.mlog2log[first + e as usize];
                self.rank[slot] = rank;
            }
            for (&log, &count) in self.mlog2log[first..].iter().zip(&self.count) {
                logcnt[log as usize] = count;
            }
        }
        self.offset.clear();
        let mut sum = 0;
        for &count in logcnt.iter() {
            self.offset.push(sum);
            sum += count;
        }
        for (slot, (&log, &rank)) in (0u32..).zip(phy2log.iter().zip(&self.rank)) {
            log2phy[(self.offset[log as usize] + rank) as usize] = slot;
        }
    }

    /// Packs groups into nodes and lists the experts node after node.
    fn order_by_node(&mut self, weight: &[f32], cut: Cut) {
        let size = weight.len() / cut.groups;
        self.group_load.clear();
        // Loads are counts: exact in f64, so the one rounding is the rounding to f32.
        let sum = |group: &[f32]| group.iter().map(|&w| f64::from(w)).sum::<f64>() as f32;
        self.group_load.extend(weight.chunks_exact(size).map(sum));
        pack(
            &self.group_load,
            cut.nodes,
            &mut self.order,
            &mut self.packs,
            &mut self.filled,
            &mut self.position,
        );
        self.mlog2log.clear();
        self.mlog2log.resize(weight.len(), 0);
        for (group, &at) in self.position.iter().enumerate() {
            let to = &mut self.mlog2log[at as usize * size..][..size];
            for (slot, expert) in to.iter_mut().zip(group * size..) {
                *slot = expert as u32;
            }
        }
    }

    /// One copy of every expert in `load`, then, up to `replicas`, one more of
    /// whichever has the largest load per copy.
    fn replicate(&mut self, replicas: usize) {
        let experts = self.load.len();
        self.count.clear();
        self.count.resize(experts, 1);
        self.phy.clear();
        self.phy.extend((0..experts as u32).map(|e| (e, 0)));
        self.hottest.clear();
        if replicas > experts {
            let all = (0u32..)
                .zip(&self.load)
                .map(|(e, &w)| (bits(w), Reverse(e)));
            self.hottest.extend(all);
        }
        while self.phy.len() < replicas {
            let Some(mut top) = self.hottest.peek_mut() else {
                return;
            };
            let e = top.1.0;
            let count = &mut self.count[e as usize];
            self.phy.push((e, *count));
            *count += 1;
            top.0 = bits(self.load[e as usize] / *count as f32);
        }
    }
}

/// Packs items into `packs` packs of equally many: by falling weight, each into
/// the lightest pack that has room. Writes `pack * items per pack + rank`.
fn pack(
    weight: &[f32],
    packs: usize,
    order: &mut Vec<u64>,
    open: &mut BinaryHeap<Pack>,
    filled: &mut Vec<u32>,
    position: &mut Vec<u32>,
) {
    position.clear();
    let each = weight.len() / packs;
    if each == 1 {
        position.extend(0..packs as u32);
        return;
    }
    order.clear();
    let key = |(i, &w): (u64, &f32)| u64::from(!bits(w)) << 32 | i;
    order.extend((0u64..).zip(weight).map(key));
    order.sort_unstable();
    open.clear();
    open.extend((0..packs as u32).map(|p| Reverse((0, p))));
    filled.clear();
    filled.resize(packs, 0);
    position.resize(weight.len(), 0);
    for &key in order.iter() {
        let item = key as u32 as usize;
        let Some(mut top) = open.peek_mut() else {
            return;
        };
        let (sum, p) = top.0;
        let rank = &mut filled[p as usize];
        position[item] = p * each as u32 + *rank;
        *rank += 1;
        if *rank as usize == each {
            std::collections::binary_heap::PeekMut::pop(top);
        } else {
            top.0.0 = bits(f32::from_bits(sum) + weight[item]);
        }
    }
}
