//! From the spellings of `config.json` to one [`Config`].

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::check;
use super::fields::Fields;
use super::packed;
use super::{Config, FP8_BLOCK, Packed, Rope, Scoring, TopkMethod, Yarn};
use crate::ModelError;

/// Largest width, vocabulary or count that is taken for real.
const MAX_DIM: usize = 1 << 24;
/// Most layers, MTP included.
pub(super) const MAX_LAYERS: usize = 4096;
/// Most routed experts of a layer.
const MAX_EXPERTS: usize = 1 << 16;
/// Longest context.
const MAX_POSITIONS: usize = 1 << 30;
/// Largest `config.json` or `generation_config.json` in bytes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// What the model types of the family leave unsaid.
struct Defaults {
    scoring: Scoring,
    method: TopkMethod,
    norm_topk_prob: bool,
    scaling: f64,
    shared: usize,
}

pub(super) fn from_dir(dir: &Path) -> Result<Config, ModelError> {
    let path = dir.join("config.json");
    let mut config = from_json(&read_text(&path)?).map_err(|e| match e {
        ModelError::File { reason, .. } => ModelError::File { path, reason },
        other => other,
    })?;
    let generation = dir.join("generation_config.json");
    if generation.exists() {
        let text = read_text(&generation)?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| ModelError::file(&generation, format!("not JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(ModelError::file(&generation, "not a JSON object"));
        };
        let fields = Fields {
            map: &map,
            prefix: "generation_config.",
        };
        for id in fields.tokens("eos_token_id", config.vocab_size)? {
            if !config.eos_token_ids.contains(&id) {
                config.eos_token_ids.push(id);
            }
        }
    }
    Ok(config)
}

fn read_text(path: &Path) -> Result<String, ModelError> {
    let meta =
        fs::metadata(path).map_err(|e| ModelError::file(path, format!("cannot be read: {e}")))?;
    if !meta.is_file() {
        return Err(ModelError::file(path, "not a regular file"));
    }
    let size = meta.len();
    if size > MAX_FILE_BYTES {
        return Err(ModelError::file(
            path,
            format!("{size} bytes, more than {MAX_FILE_BYTES}: not a configuration"),
        ));
    }
    fs::read_to_string(path).map_err(|e| ModelError::file(path, format!("cannot be read: {e}")))
}

pub(super) fn from_json(text: &str) -> Result<Config, ModelError> {
    let value: Value = serde_json::from_str(text)
        .map_err(|e| ModelError::file("config.json", format!("not JSON: {e}")))?;
    let Value::Object(outer) = value else {
        return Err(ModelError::file("config.json", "not a JSON object"));
    };
    // Multimodal members keep the language model's configuration one level down.
    match outer.get("text_config") {
        None | Some(Value::Null) => from_fields(&Fields {
            map: &outer,
            prefix: "",
        }),
        Some(Value::Object(inner)) => {
            let mut inner = inner.clone();
            if let Some(q) = outer
                .get("quantization_config")
                .filter(|_| !inner.contains_key("quantization_config"))
            {
                inner.insert("quantization_config".into(), q.clone());
            }
            from_fields(&Fields {
                map: &inner,
                prefix: "text_config.",
            })
        }
        Some(_) => Err(ModelError::config("text_config", "must be an object")),
    }
}

fn from_fields(f: &Fields<'_>) -> Result<Config, ModelError> {
    let model_type = f
        .text("model_type")?
        .ok_or_else(|| f.bad("model_type", "missing"))?;
    let defaults = match model_type {
        "deepseek_v2" => Defaults {
            scoring: Scoring::Softmax,
            method: TopkMethod::Greedy,
            norm_topk_prob: false,
            scaling: 1.0,
            shared: 2,
        },
        "deepseek_v3" | "kimi_k2" => Defaults {
            scoring: Scoring::Sigmoid,
            method: TopkMethod::NoauxTc,
            norm_topk_prob: true,
            scaling: 2.5,
            shared: 1,
        },
        other => {
            return Err(f.bad(
                "model_type",
                format!("`{other}` is unknown; deepseek_v2, deepseek_v3 and kimi_k2 are served"),
            ));
        }
    };
    if let Some(act) = f.text("hidden_act")?.filter(|&a| a != "silu") {
        return Err(f.bad(
            "hidden_act",
            format!("`{act}` is unknown; the family uses silu"),
        ));
    }

    let num_hidden_layers = f.count("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = f.count("num_attention_heads", MAX_DIM)?;
    if let Some(kv) = f
        .uint("num_key_value_heads")?
        .filter(|&kv| kv != num_attention_heads as u64)
    {
        return Err(f.bad(
            "num_key_value_heads",
            format!(
                "{kv}, but latent attention has as many key as query heads ({num_attention_heads})"
            ),
        ));
    }
    let q_lora_rank = match f.map.get("q_lora_rank") {
        None => {
            return Err(f.bad(
                "q_lora_rank",
                "missing; a rank, or null where queries are projected directly",
            ));
        }
        Some(Value::Null) => None,
        Some(_) => Some(f.count("q_lora_rank", MAX_DIM)?),
    };
    let qk_rope_head_dim = f.count("qk_rope_head_dim", MAX_DIM)?;
    if qk_rope_head_dim % 2 != 0 {
        return Err(f.bad(
            "qk_rope_head_dim",
            format!("{qk_rope_head_dim} is odd; rotation takes pairs"),
        ));
    }

    let n_routed_experts = match f.map.get("n_routed_experts") {
        Some(Value::Null) => 0,
        Some(_) => f.count("n_routed_experts", MAX_EXPERTS)?,
        None => {
            return Err(f.bad(
                "n_routed_experts",
                "missing; a number of experts, or null where every layer is dense",
            ));
        }
    };
    let moe = n_routed_experts > 0;
    let moe_count = |key: &str, cap: usize| if moe { f.count(key, cap) } else { Ok(0) };
    let moe_intermediate_size = moe_count("moe_intermediate_size", MAX_DIM)?;
    let num_experts_per_tok = moe_count("num_experts_per_tok", MAX_EXPERTS)?;
    let n_shared_experts = match f.map.get("n_shared_experts") {
        _ if !moe => 0,
        Some(Value::Null) => 0,
        Some(_) => f.capped(
            "n_shared_experts",
            f.uint("n_shared_experts")?.unwrap_or(0),
            MAX_EXPERTS,
        )?,
        None => defaults.shared,
    };
    let first_k_dense_replace = f.capped(
        "first_k_dense_replace",
        f.uint("first_k_dense_replace")?.unwrap_or(0),
        MAX_LAYERS,
    )?;
    if first_k_dense_replace > num_hidden_layers {
        return Err(f.bad(
            "first_k_dense_replace",
            format!("{first_k_dense_replace}, but there are {num_hidden_layers} layers"),
        ));
    }
    let moe_layer_freq = match f.uint("moe_layer_freq")? {
        None => 1,
        Some(_) => f.count("moe_layer_freq", MAX_LAYERS)?,
    };
    let scoring_func = match f.text("scoring_func")? {
        None => defaults.scoring,
        Some("sigmoid") => Scoring::Sigmoid,
        Some("softmax") => Scoring::Softmax,
        Some(other) => {
            return Err(f.bad(
                "scoring_func",
                format!("`{other}` is unknown; sigmoid or softmax"),
            ));
        }
    };
    let topk_method = match f.text("topk_method")? {
        None => defaults.method,
        Some("noaux_tc") => TopkMethod::NoauxTc,
        // The first spelling is a slip in the published V2 defaults.
        Some("gready" | "greedy") => TopkMethod::Greedy,
        Some("group_limited_greedy") => TopkMethod::GroupLimitedGreedy,
        Some(other) => {
            let known = "noaux_tc, greedy or group_limited_greedy";
            return Err(f.bad("topk_method", format!("`{other}` is unknown; {known}")));
        }
    };
    let n_group = groups(f, "n_group", topk_method, moe)?;
    let topk_group = groups(f, "topk_group", topk_method, moe)?;

    let rms_norm_eps = f.positive("rms_norm_eps", Some(1e-6))?;
    let routed_scaling_factor = f.positive("routed_scaling_factor", Some(defaults.scaling))?;
    let vocab_size = f.count("vocab_size", MAX_DIM)?;
    let (fp8, packed) = quantization(f)?;
    let config = Config {
        model_type: model_type.to_owned(),
        vocab_size,
        hidden_size: f.count("hidden_size", MAX_DIM)?,
        intermediate_size: f.count("intermediate_size", MAX_DIM)?,
        moe_intermediate_size,
        num_hidden_layers,
        num_nextn_predict_layers: f.capped(
            "num_nextn_predict_layers",
            f.uint("num_nextn_predict_layers")?.unwrap_or(0),
            MAX_LAYERS,
        )?,
        num_attention_heads,
        q_lora_rank,
        kv_lora_rank: f.count("kv_lora_rank", MAX_DIM)?,
        qk_nope_head_dim: f.count("qk_nope_head_dim", MAX_DIM)?,
        qk_rope_head_dim,
        v_head_dim: f.count("v_head_dim", MAX_DIM)?,
        n_routed_experts,
        n_shared_experts,
        num_experts_per_tok,
        n_group,
        topk_group,
        first_k_dense_replace,
        moe_layer_freq,
        scoring_func,
        topk_method,
        norm_topk_prob: f.flag("norm_topk_prob", defaults.norm_topk_prob)?,
        routed_scaling_factor: routed_scaling_factor as f32,
        rms_norm_eps: rms_norm_eps as f32,
        rope: rope(f)?,
        max_position_embeddings: f.count("max_position_embeddings", MAX_POSITIONS)?,
        attention_bias: f.flag("attention_bias", false)?,
        tie_word_embeddings: f.flag("tie_word_embeddings", false)?,
        fp8,
        packed,
        bos_token_id: f.tokens("bos_token_id", vocab_size)?.first().copied(),
        eos_token_ids: f.tokens("eos_token_id", vocab_size)?,
    };
    check::routing(f, &config)?;
    check::size(f, &config)?;
    Ok(config)
}

fn rope(f: &Fields<'_>) -> Result<Rope, ModelError> {
    let interleave = f.flag("rope_interleave", true)?;
    let new = f.object("rope_parameters")?;
    let old = f.object("rope_scaling")?;
    // Older files say `rope_theta` and `rope_scaling`, newer ones put both into `rope_parameters`.
    let (map, prefix) = match (&new, &old) {
        (Some(map), _) => (Some(*map), "rope_parameters."),
        (None, Some(map)) => (Some(*map), "rope_scaling."),
        (None, None) => (None, ""),
    };
    let prefix = format!("{}{prefix}", f.prefix);
    let scaling = map.map(|map| Fields {
        map,
        prefix: &prefix,
    });
    let theta = match scaling
        .as_ref()
        .filter(|s| s.map.contains_key("rope_theta"))
    {
        Some(s) => s.positive("rope_theta", None)?,
        None => f.positive("rope_theta", Some(10_000.0))?,
    };
    if theta <= 1.0 {
        return Err(f.bad("rope_theta", format!("{theta}; must be above 1")));
    }
    let Some(s) = scaling else {
        return Ok(Rope {
            theta,
            interleave,
            yarn: None,
        });
    };
    let kind = match (s.text("rope_type")?, s.text("type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(s.bad("rope_type", format!("`{a}` contradicts type `{b}`")));
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) if s.map.is_empty() || s.map.keys().all(|k| k == "rope_theta") => "default",
        (None, None) => return Err(s.bad("rope_type", "missing; yarn or default")),
    };
    let yarn = match kind {
        "default" => None,
        "yarn" => Some(Yarn {
            factor: s.positive("factor", None)?,
            original_max_position_embeddings: s
                .count("original_max_position_embeddings", MAX_POSITIONS)?,
            beta_fast: s.positive("beta_fast", Some(32.0))?,
            beta_slow: s.positive("beta_slow", Some(1.0))?,
            mscale: s.number("mscale")?,
            mscale_all_dim: s.number("mscale_all_dim")?,
            attention_factor: s.number("attention_factor")?,
            truncate: s.flag("truncate", true)?,
        }),
        other => {
            return Err(s.bad(
                "rope_type",
                format!("`{other}` is unknown; yarn or default"),
            ));
        }
    };
    if let Some(y) = yarn {
        if y.factor < 1.0 {
            return Err(s.bad("factor", format!("{}; must be at least 1", y.factor)));
        }
        if y.beta_fast < y.beta_slow {
            return Err(s.bad(
                "beta_fast",
                format!("{} is below beta_slow ({})", y.beta_fast, y.beta_slow),
            ));
        }
        for (key, value) in [
            ("mscale", y.mscale),
            ("mscale_all_dim", y.mscale_all_dim),
            ("attention_factor", y.attention_factor),
        ] {
            if value.is_some_and(|v| !(0.0..=1e4).contains(&v)) {
                return Err(s.bad(key, "must be between 0 and 10000"));
            }
        }
    }
    Ok(Rope {
        theta,
        interleave,
        yarn,
    })
}

/// Whether linear weights may be FP8, and which weights are packed.
fn quantization(f: &Fields<'_>) -> Result<(bool, Option<Packed>), ModelError> {
    let Some(map) = f.object("quantization_config")? else {
        return Ok((false, None));
    };
    let prefix = format!("{}quantization_config.", f.prefix);
    let q = Fields {
        map,
        prefix: &prefix,
    };
    match q.text("quant_method")? {
        Some("fp8") => fp8(&q).map(|()| (true, None)),
        Some(packed::FOREIGN) => Ok((false, Some(Packed::read_foreign(&q)?))),
        Some(packed::METHOD) => Ok((false, Some(Packed::read(&q)?))),
        other => {
            let found = other.map_or("missing".into(), |m| format!("`{m}` is not served"));
            let (ours, foreign) = (packed::METHOD, packed::FOREIGN);
            let reason = format!("{found}; only fp8, {ours} and {foreign}");
            Err(q.bad("quant_method", reason))
        }
    }
}

fn fp8(q: &Fields<'_>) -> Result<(), ModelError> {
    let expect = |key: &str, right: &str| match q.text(key)? {
        Some(value) if value != right => {
            Err(q.bad(key, format!("`{value}` is not served; only {right}")))
        }
        _ => Ok(()),
    };
    expect("fmt", "e4m3")?;
    expect("activation_scheme", "dynamic")?;
    // Scales that are powers of two are still stored as f32, so they need nothing of their own.
    expect("scale_fmt", "ue8m0")?;
    let block = q.map.get("weight_block_size").unwrap_or(&Value::Null);
    let right = Value::from(vec![FP8_BLOCK, FP8_BLOCK]);
    if *block != right {
        return Err(q.bad(
            "weight_block_size",
            format!("{block} is not served; only {right}"),
        ));
    }
    Ok(())
}

/// A count of groups: 1 where nobody says otherwise and nothing is grouped.
fn groups(f: &Fields<'_>, key: &str, method: TopkMethod, moe: bool) -> Result<usize, ModelError> {
    match f.uint(key)? {
        None if !moe || method == TopkMethod::Greedy => Ok(1),
        None => Err(f.bad(key, "missing; 1 where there are no groups")),
        Some(_) => f.count(key, MAX_EXPERTS),
    }
}
