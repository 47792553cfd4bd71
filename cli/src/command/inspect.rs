//! `guild inspect`: what a checkpoint is, and what a cluster for it needs.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use guild_kernels::topology::Topology;
use guild_kernels::{Arithmetic, HugePages};
use guild_model::cache::{Format, LatentCache};
use guild_model::checkpoint::{Dtype, manifest, schema};
use guild_model::config::{Scoring, TopkMethod};
use guild_model::{Checkpoint, Config, Cpu, Isa};
use serde::Serialize;

use super::{compare, log_tool, reference};
use crate::args::Inspect;
use crate::failure::Failure;
use crate::json;
use crate::units;

/// Bytes of an activation: rows travel as f32.
const ROW_ELEMENT_BYTES: u64 = 4;

pub(crate) fn run(args: &Inspect) -> Result<(), Failure> {
    log_tool(&args.common)?;
    let cpu = args.compute.cpu()?;
    if let [a, b] = args.compare.as_slice() {
        return compare::run(args, a, b, &cpu);
    }
    let Some(model) = &args.model else {
        if args.cpu {
            return describe_cpu(&cpu);
        }
        return Err(Failure::usage("--model DIR is missing")
            .hint("or --cpu, to ask about this machine alone"));
    };
    let checkpoint = Checkpoint::open(model)?;
    if args.reference {
        return reference::run(args, &checkpoint, &cpu);
    }
    let report = Report::new(
        &checkpoint,
        args.compute.weights.dtype,
        u64::from(args.nodes),
    )?;
    if args.json {
        json::print(&report)?;
    } else {
        report.print(model, checkpoint.config())?;
    }
    if args.cpu { describe_cpu(&cpu) } else { Ok(()) }
}

fn describe_cpu(cpu: &Cpu) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", cpu.describe())?;
    let best = Isa::available()[0];
    for (isa, refused) in Isa::survey() {
        let told = match refused {
            Some(why) => format!("refused: {why}"),
            None if isa == cpu.isa() && isa == best => {
                "chosen: the best that this machine can run".into()
            }
            None if isa == cpu.isa() => format!("chosen by --isa; the best would be {best}"),
            None => "not needed".into(),
        };
        writeln!(stdout, "  {:<12} {told}", isa.name())?;
    }
    writeln!(
        stdout,
        "numerics class {}, whichever of them is chosen",
        cpu.numerics_class()
    )?;
    for arithmetic in Arithmetic::ALL {
        let told = match arithmetic.emulated(cpu.isa()) {
            _ if arithmetic == cpu.arithmetic() => "chosen".to_owned(),
            None => "at full speed".to_owned(),
            Some(why) => format!("slow: {why}"),
        };
        let class = arithmetic.numerics_class();
        writeln!(stdout, "  {:<12} {told}; class {class}", arithmetic.name())?;
    }
    let topology = Topology::here();
    writeln!(stdout, "{} physical cores", topology.cores.len())?;
    for node in topology.nodes {
        let (number, near) = (node.number, node.processors.len());
        writeln!(
            stdout,
            "  memory node {number}: near {near} logical processors"
        )?;
    }
    let pages = match HugePages::chosen() {
        HugePages::Auto => "asked for",
        HugePages::Off => "refused",
    };
    let system = HugePages::of_system()
        .map_or_else(String::new, |set| format!("; the system is set to {set}"));
    Ok(writeln!(stdout, "huge pages {pages}{system}")?)
}

/// Everything that is said about a checkpoint; bytes are those of weights in memory.
#[derive(Debug, Serialize)]
struct Report {
    model_type: String,
    digest: String,
    /// Whether a manifest lists what the files must hold.
    manifest: bool,
    parameters: u64,
    active_parameters: u64,
    max_context: u64,
    dtype: String,
    tensors: u64,
    /// Name of the stored dtype -> (tensors, bytes on disk).
    stored: BTreeMap<&'static str, (u64, u64)>,
    stored_bytes: u64,
    attention_node_bytes: u64,
    shared_expert_bytes: u64,
    routed_experts: u64,
    routed_expert_bytes: u64,
    layers: Vec<LayerBytes>,
    kv_bytes_per_token: u64,
    cluster: ClusterBytes,
}

/// Weights of one layer; the multi-token-prediction layers come last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct LayerBytes {
    /// On an attention node, shared experts included.
    attention_node_bytes: u64,
    shared_expert_bytes: u64,
    routed_experts: u64,
    routed_expert_bytes: u64,
}

/// What a cluster with so many expert nodes holds and moves.
#[derive(Debug, Serialize)]
struct ClusterBytes {
    expert_nodes: u64,
    experts_per_node: u64,
    bytes_per_expert_node: u64,
    bytes_per_attention_node: u64,
    /// Exact combine, f32 rows, every chosen expert on another node where there are enough.
    wire_bytes_per_token_out: u64,
    wire_bytes_per_token_back: u64,
}

impl Report {
    fn new(checkpoint: &Checkpoint, dtype: Dtype, nodes: u64) -> Result<Self, Failure> {
        let c = checkpoint.config();
        let digest = checkpoint.digest()?;
        let mut stored: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
        let mut layers =
            vec![LayerBytes::default(); c.num_hidden_layers + c.num_nextn_predict_layers];
        let mut outside = 0;
        for view in checkpoint.required() {
            let of = stored.entry(view.dtype().name()).or_default();
            of.0 += 1;
            of.1 += view.bytes().len() as u64;
        }
        for spec in schema(c) {
            let bytes = checkpoint.resident_bytes(&spec, dtype)?;
            match layer_of(&spec.name).and_then(|layer| layers.get_mut(layer)) {
                Some(layer) if spec.name.contains(".mlp.experts.") => {
                    layer.routed_expert_bytes += bytes
                }
                Some(layer) => {
                    layer.attention_node_bytes += bytes;
                    if spec.name.contains(".mlp.shared_experts.") {
                        layer.shared_expert_bytes += bytes;
                    }
                }
                None => outside += bytes,
            }
        }
        for (index, layer) in layers.iter_mut().enumerate() {
            layer.routed_experts = if c.is_moe(index) {
                c.n_routed_experts as u64
            } else {
                0
            };
        }
        let sum = |of: fn(&LayerBytes) -> u64| layers.iter().map(of).sum::<u64>();
        let attention_node_bytes = outside + sum(|l| l.attention_node_bytes);
        let routed_experts = sum(|l| l.routed_experts);
        let routed_expert_bytes = sum(|l| l.routed_expert_bytes);
        let experts_per_node = routed_experts.div_ceil(nodes);
        let largest = layers
            .iter()
            .filter_map(|l| l.routed_expert_bytes.checked_div(l.routed_experts))
            .max();
        let row = c.hidden_size as u64 * ROW_ELEMENT_BYTES;
        let moe = c.moe_layers().count() as u64;
        let chosen = c.num_experts_per_tok as u64;
        Ok(Self {
            model_type: c.model_type.clone(),
            digest,
            manifest: checkpoint.has_manifest(),
            parameters: c.parameters(),
            active_parameters: c.active_parameters(),
            max_context: c.max_position_embeddings as u64,
            dtype: dtype.to_string(),
            tensors: stored.values().map(|(tensors, _)| tensors).sum(),
            stored_bytes: stored.values().map(|(_, bytes)| bytes).sum(),
            stored,
            attention_node_bytes,
            shared_expert_bytes: sum(|l| l.shared_expert_bytes),
            routed_experts,
            routed_expert_bytes,
            kv_bytes_per_token: LatentCache::bytes_per_token(c, Format::F32) as u64,
            cluster: ClusterBytes {
                expert_nodes: nodes,
                experts_per_node,
                bytes_per_expert_node: experts_per_node * largest.unwrap_or(0),
                bytes_per_attention_node: attention_node_bytes,
                wire_bytes_per_token_out: moe * row * chosen.min(nodes),
                wire_bytes_per_token_back: moe * row * chosen,
            },
            layers,
        })
    }

    fn print(&self, model: &Path, c: &Config) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let bytes = units::bytes;
        writeln!(out, "{}", model.display())?;
        let mut line = |name: &str, value: String| writeln!(out, "  {name:<15} {value}");
        line("digest", self.digest.clone())?;
        line(
            "manifest",
            if self.manifest {
                format!(
                    "{}: weights are verified where they are loaded",
                    manifest::FILE
                )
            } else {
                "none: weights are not verified; `guild manifest --write` makes one".to_owned()
            },
        )?;
        line(
            "model",
            format!(
                "{}, {} parameters, {} active per token, {} positions, vocabulary {}",
                self.model_type,
                units::parameters(self.parameters),
                units::parameters(self.active_parameters),
                units::count(self.max_context),
                units::count(c.vocab_size as u64)
            ),
        )?;
        line("attention", attention(c))?;
        line("experts", experts(c))?;
        line("position", position(c))?;
        let by_dtype: Vec<String> = self
            .stored
            .iter()
            .map(|(name, (tensors, size))| {
                format!("{} {name} ({})", units::count(*tensors), bytes(*size))
            })
            .collect();
        line(
            "tensors",
            format!(
                "{}, {}: {}",
                units::count(self.tensors),
                bytes(self.stored_bytes),
                by_dtype.join(", ")
            ),
        )?;
        line(
            "attention node",
            format!(
                "{} of weights with --dtype {}, shared experts {}",
                bytes(self.attention_node_bytes),
                self.dtype,
                bytes(self.shared_expert_bytes)
            ),
        )?;
        line(
            "KV cache",
            format!("{} a token in f32", bytes(self.kv_bytes_per_token)),
        )?;
        if self.routed_experts > 0 {
            line(
                "routed experts",
                format!(
                    "{}, {} in all, {} each",
                    units::count(self.routed_experts),
                    bytes(self.routed_expert_bytes),
                    bytes(self.routed_expert_bytes / self.routed_experts)
                ),
            )?;
        }
        for (first, last, layer) in alike(&self.layers) {
            let which = if first == last {
                format!("layer {first}")
            } else {
                format!("layers {first}-{last}")
            };
            let experts = match layer.routed_experts {
                0 => "dense".to_owned(),
                n => format!("{n} experts {}", bytes(layer.routed_expert_bytes)),
            };
            let mtp = if first >= c.num_hidden_layers {
                ", multi-token prediction"
            } else {
                ""
            };
            let each = if first == last { "" } else { ", each" };
            line(
                &which,
                format!(
                    "attention node {}, {experts}{mtp}{each}",
                    bytes(layer.attention_node_bytes)
                ),
            )?;
        }
        let cluster = &self.cluster;
        line(
            "cluster",
            format!(
                "{} expert nodes: at most {} experts, {} a node; every attention node {} and its KV cache",
                cluster.expert_nodes,
                units::count(cluster.experts_per_node),
                bytes(cluster.bytes_per_expert_node),
                bytes(cluster.bytes_per_attention_node)
            ),
        )?;
        line(
            "wire",
            format!(
                "{} a token: {} out, {} back (exact combine, f32 rows, {} nodes reached a layer)",
                bytes(cluster.wire_bytes_per_token_out + cluster.wire_bytes_per_token_back),
                bytes(cluster.wire_bytes_per_token_out),
                bytes(cluster.wire_bytes_per_token_back),
                cluster.expert_nodes.min(c.num_experts_per_tok as u64)
            ),
        )?;
        Ok(())
    }
}

/// The layer in `model.layers.N.…`.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// Runs of equal layers: (first, last, what each holds).
fn alike(layers: &[LayerBytes]) -> Vec<(usize, usize, LayerBytes)> {
    let mut runs: Vec<(usize, usize, LayerBytes)> = Vec::new();
    for (index, &layer) in layers.iter().enumerate() {
        match runs.last_mut() {
            Some((_, last, run)) if *run == layer => *last = index,
            _ => runs.push((index, index, layer)),
        }
    }
    runs
}

fn attention(c: &Config) -> String {
    let query = c.q_lora_rank.map_or_else(
        || "direct queries".to_owned(),
        |rank| format!("queries through rank {rank}"),
    );
    format!(
        "{} heads of {} + {} rotary, values of {}, {query}, latent of {} + {}",
        c.num_attention_heads,
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.kv_lora_rank,
        c.qk_rope_head_dim
    )
}

fn experts(c: &Config) -> String {
    let moe = c.moe_layers().count();
    if moe == 0 {
        return format!(
            "none: {} dense layers of {}",
            c.num_hidden_layers, c.intermediate_size
        );
    }
    let scores = match c.scoring_func {
        Scoring::Sigmoid => "sigmoid",
        Scoring::Softmax => "softmax",
    };
    let choice = match c.topk_method {
        TopkMethod::NoauxTc => format!(
            "the best {} of {} groups, with selection bias",
            c.topk_group, c.n_group
        ),
        TopkMethod::GroupLimitedGreedy => {
            format!("the best {} of {} groups", c.topk_group, c.n_group)
        }
        TopkMethod::Greedy => "all groups".to_owned(),
    };
    format!(
        "{moe} of {} layers: top-{} of {} ({scores} scores, from {choice}), {} shared, inner width {}, {} MTP layers",
        c.num_hidden_layers,
        c.num_experts_per_tok,
        c.n_routed_experts,
        c.n_shared_experts,
        c.moe_intermediate_size,
        c.num_nextn_predict_layers
    )
}

fn position(c: &Config) -> String {
    let pairs = if c.rope.interleave {
        "neighbouring pairs"
    } else {
        "halves"
    };
    let yarn = c.rope.yarn.as_ref().map_or_else(String::new, |y| {
        format!(
            ", YaRN x{} from {}",
            y.factor, y.original_max_position_embeddings
        )
    });
    format!("rotary, base {}, {pairs}{yarn}", c.rope.theta)
}

#[cfg(test)]
mod tests {
    use super::{LayerBytes, alike, layer_of};

    #[test]
    fn layers_are_found_in_names_and_alike_ones_shown_once() {
        assert_eq!(layer_of("model.layers.12.mlp.gate.weight"), Some(12));
        assert_eq!(layer_of("model.norm.weight"), None);
        let one = |attention_node_bytes| LayerBytes {
            attention_node_bytes,
            ..LayerBytes::default()
        };
        assert_eq!(
            alike(&[one(1), one(2), one(2), one(1)]),
            vec![(0, 0, one(1)), (1, 2, one(2)), (3, 3, one(1))]
        );
    }
}
