//! Which weights of a model are packed integers.
//!
//! Secret: what becomes of a tensor by its name, and how `quantization_config` says so. A checkpoint written by
//! `guild quantize` has
//!
//! ```text
//! "quantization_config": {
//!   "quant_method": "guild", "version": 1, "group_size": 64,
//!   "formats": {"experts": "int4", "linear": "int4", "embedding": "int8", "head": "int8"}
//! }
//! ```
//!
//! Routed experts as the `compressed-tensors` library packs them (`pack-quantized`: 4 bits, symmetric, grouped, as in
//! Kimi-K2-Thinking) are read, too, and laid anew on their way into memory.
//!
//! A role that is not named is stored plainly, as every other checkpoint has it. Norms, biases and routers always are,
//! and so is `kv_b_proj`: absorbed attention takes it apart by heads and transposes half of it.

use guild_kernels::pack::{self, Int};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::ModelError;

/// `quant_method` of packed checkpoints.
pub(super) const METHOD: &str = "guild";
/// `quant_method` of experts that another library has packed.
pub(super) const FOREIGN: &str = "compressed-tensors";
const VERSION: u64 = 1;

/// What a tensor is, as far as its format goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A matrix of a routed expert.
    Expert,
    /// Any other matrix that rows are multiplied by, all of it.
    Linear,
    /// `kv_b_proj`.
    Absorbed,
    /// The embedding; the MTP layer's copy, too.
    Embedding,
    /// The head; the MTP layer's copy, too.
    Head,
    /// Norms, biases, routers: few bytes that decide much.
    Exact,
}

impl Role {
    /// By a tensor's full name.
    pub(crate) fn of(tensor: &str) -> Role {
        let weight = tensor
            .strip_suffix(".weight")
            .or(tensor.strip_suffix(".weight_packed"));
        let Some(name) = weight else {
            return match tensor.ends_with(".blob") {
                true => Role::Expert,
                false => Role::Exact,
            };
        };
        let last = name.rsplit('.').next().unwrap_or(name);
        match last {
            _ if name.contains(".mlp.experts.") => Role::Expert,
            "embed_tokens" => Role::Embedding,
            "lm_head" => Role::Head,
            "head" if name.ends_with(".shared_head.head") => Role::Head,
            "kv_b_proj" => Role::Absorbed,
            // `gate` is the router, `gate_proj` a matrix of an MLP.
            _ if last.ends_with("_proj") || last == "kv_a_proj_with_mqa" => Role::Linear,
            _ => Role::Exact,
        }
    }
}

/// How packed weights are stored; in memory they are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As they lie in memory.
    Guild,
    /// Row after row, eight 4-bit integers in an int32, for routed experts alone.
    CompressedTensors,
}

/// Weights as symmetric integers with one bf16 scale per row and group of columns. `None`: stored plainly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Packed {
    /// Who has packed them.
    pub form: Form,
    /// Columns that share a scale: 32, 64 or 128.
    pub group: usize,
    /// Routed experts.
    #[serde(serialize_with = "named")]
    pub experts: Option<Int>,
    /// Projections of attention, dense layers, shared experts, `eh_proj`.
    #[serde(serialize_with = "named")]
    pub linear: Option<Int>,
    /// Embeddings.
    #[serde(serialize_with = "named")]
    pub embedding: Option<Int>,
    /// Heads.
    #[serde(serialize_with = "named")]
    pub head: Option<Int>,
}

impl Packed {
    /// Everything that can be, in 8 bits.
    pub fn int8(group: usize) -> Packed {
        Packed {
            form: Form::Guild,
            group,
            experts: Some(Int::Int8),
            linear: Some(Int::Int8),
            embedding: Some(Int::Int8),
            head: Some(Int::Int8),
        }
    }

    /// Everything in 4 bits but embedding and head, which have 8: they are few bytes and see every token.
    pub fn int4(group: usize) -> Packed {
        Packed {
            experts: Some(Int::Int4),
            linear: Some(Int::Int4),
            ..Packed::int8(group)
        }
    }

    /// The integers of a role.
    pub(crate) fn of(&self, role: Role) -> Option<Int> {
        match role {
            Role::Expert => self.experts,
            Role::Linear => self.linear,
            Role::Embedding => self.embedding,
            Role::Head => self.head,
            Role::Absorbed | Role::Exact => None,
        }
    }

    fn roles(&self) -> [(&'static str, Option<Int>); 4] {
        [
            ("experts", self.experts),
            ("linear", self.linear),
            ("embedding", self.embedding),
            ("head", self.head),
        ]
    }

    /// The `quantization_config` that says so.
    pub(crate) fn to_json(self) -> Value {
        let formats: Map<String, Value> = self
            .roles()
            .into_iter()
            .filter_map(|(role, int)| Some((role.to_owned(), name(int?).into())))
            .collect();
        json!({
            "quant_method": METHOD, "version": VERSION, "group_size": self.group, "formats": formats
        })
    }

    /// Reads a `quantization_config` whose method is ours.
    pub(super) fn read(q: &Fields<'_>) -> Result<Packed, ModelError> {
        match q.uint("version")? {
            Some(VERSION) => {}
            Some(other) => {
                let reason = format!("{other}; this program knows {VERSION}");
                return Err(q.bad("version", reason));
            }
            None => return Err(q.bad("version", format!("missing; {VERSION}"))),
        }
        let group = known_group(q)?;
        let Some(formats) = q.object("formats")? else {
            return Err(q.bad("formats", "missing; an object of role and format"));
        };
        let prefix = format!("{}formats.", q.prefix);
        let formats = Fields {
            map: formats,
            prefix: &prefix,
        };
        let nothing = Packed {
            form: Form::Guild,
            group,
            experts: None,
            linear: None,
            embedding: None,
            head: None,
        };
        let known = nothing.roles().map(|(role, _)| role);
        if let Some(odd) = formats.map.keys().find(|k| !known.contains(&k.as_str())) {
            return Err(formats.bad(odd, format!("is unknown; {}", known.join(", "))));
        }
        let of = |role: &str| match formats.text(role)? {
            None => Ok(None),
            Some(text) => match [Int::Int4, Int::Int8]
                .into_iter()
                .find(|&i| name(i) == text)
            {
                Some(int) => Ok(Some(int)),
                None => Err(formats.bad(role, format!("`{text}` is not served; int4 or int8"))),
            },
        };
        Ok(Packed {
            experts: of("experts")?,
            linear: of("linear")?,
            embedding: of("embedding")?,
            head: of("head")?,
            ..nothing
        })
    }
}

impl Packed {
    /// Reads a `quantization_config` of the `compressed-tensors` library. Which modules are packed is seen by their
    /// tensors: experts must be, others must not.
    pub(super) fn read_foreign(q: &Fields<'_>) -> Result<Packed, ModelError> {
        expect(q, "format", &json!("pack-quantized"))?;
        expect(q, "kv_cache_scheme", &Value::Null)?;
        let groups = q.object("config_groups")?;
        let mut groups = groups.into_iter().flatten();
        let (Some((name, Value::Object(group))), None) = (groups.next(), groups.next()) else {
            return Err(q.bad("config_groups", "must be an object of one group"));
        };
        let prefix = format!("{}config_groups.{name}.", q.prefix);
        let group = Fields {
            map: group,
            prefix: &prefix,
        };
        expect(&group, "input_activations", &Value::Null)?;
        expect(&group, "output_activations", &Value::Null)?;
        let Some(weights) = group.object("weights")? else {
            return Err(group.bad("weights", "missing"));
        };
        let prefix = format!("{prefix}weights.");
        let weights = Fields {
            map: weights,
            prefix: &prefix,
        };
        expect(&weights, "num_bits", &json!(4))?;
        expect(&weights, "type", &json!("int"))?;
        expect(&weights, "strategy", &json!("group"))?;
        expect(&weights, "symmetric", &json!(true))?;
        expect(&weights, "actorder", &Value::Null)?;
        Ok(Packed {
            form: Form::CompressedTensors,
            group: known_group(&weights)?,
            experts: Some(Int::Int4),
            linear: None,
            embedding: None,
            head: None,
        })
    }
}

/// Refuses a field that says something else than what is served.
fn expect(f: &Fields<'_>, key: &str, right: &Value) -> Result<(), ModelError> {
    match f.map.get(key).unwrap_or(&Value::Null) {
        found if found == right => Ok(()),
        found => Err(f.bad(key, format!("{found} is not served; only {right}"))),
    }
}

fn known_group(f: &Fields<'_>) -> Result<usize, ModelError> {
    let group = f.count("group_size", usize::MAX)?;
    if pack::GROUPS.contains(&group) {
        return Ok(group);
    }
    Err(f.bad(
        "group_size",
        format!("{group} is not served; 32, 64 or 128"),
    ))
}

/// As it is written.
pub(crate) fn name(int: Int) -> &'static str {
    match int {
        Int::Int4 => "int4",
        Int::Int8 => "int8",
    }
}

fn named<S: Serializer>(int: &Option<Int>, to: S) -> Result<S::Ok, S::Error> {
    int.map(name).serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_roles() {
        let layer = "model.layers.3";
        for (name, role) in [
            ("model.embed_tokens.weight", Role::Embedding),
            ("model.layers.4.embed_tokens.weight", Role::Embedding),
            ("lm_head.weight", Role::Head),
            ("model.layers.4.shared_head.head.weight", Role::Head),
            ("model.layers.4.shared_head.norm.weight", Role::Exact),
            ("model.layers.4.eh_proj.weight", Role::Linear),
            ("model.norm.weight", Role::Exact),
            (&format!("{layer}.input_layernorm.weight"), Role::Exact),
            (&format!("{layer}.mlp.gate.weight"), Role::Exact),
            (&format!("{layer}.mlp.gate_proj.weight"), Role::Linear),
            (
                &format!("{layer}.mlp.gate.e_score_correction_bias"),
                Role::Exact,
            ),
            (
                &format!("{layer}.mlp.experts.7.gate_proj.weight"),
                Role::Expert,
            ),
            (
                &format!("{layer}.mlp.shared_experts.up_proj.weight"),
                Role::Linear,
            ),
            (
                &format!("{layer}.self_attn.kv_b_proj.weight"),
                Role::Absorbed,
            ),
            (
                &format!("{layer}.self_attn.kv_a_proj_with_mqa.weight"),
                Role::Linear,
            ),
            (&format!("{layer}.self_attn.q_a_proj.bias"), Role::Exact),
            (
                &format!("{layer}.self_attn.q_a_layernorm.weight"),
                Role::Exact,
            ),
        ] {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }
}
