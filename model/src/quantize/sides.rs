//! What lies beside the weights of a new checkpoint.
//!
//! Secret: which files go along, and how `config.json` says what the weights are. It knows no weight.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::plan::Plan;
use crate::checkpoint::{Dtype, manifest, write::fault};
use crate::config::FP8_BLOCK;
use crate::{Checkpoint, ModelError};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
/// Field of the configuration that says how weights are stored.
const FIELD: &str = "quantization_config";
/// Endings of files that hold weights.
const WEIGHTS: [&str; 6] = ["safetensors", "bin", "pt", "pth", "gguf", "h5"];
/// Largest file that goes along, in bytes.
const MAX_BYTES: u64 = 256 << 20;

/// Writes index and configuration, and copies tokenizer, template and whatever else lies beside the weights.
pub(super) fn write(
    source: &Checkpoint,
    dtype: Dtype,
    dir: &Path,
    plan: &Plan,
) -> Result<(), ModelError> {
    copy(source.dir(), dir)?;
    let weight_map: Map<String, Value> = { plan.shards.iter() }
        .flat_map(|shard| {
            let file =
                |t: &crate::checkpoint::write::Out| (t.name.clone(), shard.file.clone().into());
            shard.tensors.iter().map(file)
        })
        .collect();
    let index = json!({"metadata": {"total_size": plan.bytes}, "weight_map": weight_map});
    dump(&dir.join(INDEX), &index)?;
    let path = source.dir().join(CONFIG);
    let text = fs::read(&path).map_err(|e| unread(&path, &e))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|e| ModelError::file(&path, format!("not JSON: {e}")))?;
    describe(&mut config, dtype);
    dump(&dir.join(CONFIG), &config)
}

/// Says how the new weights are stored, and no longer how the old ones were.
fn describe(config: &mut Value, dtype: Dtype) {
    let Value::Object(map) = config else { return };
    map.shift_remove(FIELD);
    if let Some(Value::Object(inner)) = map.get_mut("text_config") {
        inner.shift_remove(FIELD);
    }
    let said = match dtype.packed() {
        Some(packed) => packed.to_json(),
        None if dtype == Dtype::Fp8 => json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK]
        }),
        None => return,
    };
    map.insert(FIELD.into(), said);
}

fn copy(from: &Path, to: &Path) -> Result<(), ModelError> {
    for entry in fs::read_dir(from).map_err(|e| unread(from, &e))? {
        let path = entry.map_err(|e| unread(from, &e))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        let meta = fs::metadata(&path).map_err(|e| unread(&path, &e))?;
        let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let ours = [CONFIG, manifest::FILE].contains(&name) || name.ends_with(".index.json");
        let weights = WEIGHTS.contains(&ending) || meta.len() > MAX_BYTES;
        if meta.is_file() && !ours && !weights && !name.starts_with('.') {
            let target = to.join(name);
            let bytes = fs::read(&path).map_err(|e| unread(&path, &e))?;
            fs::write(&target, bytes).map_err(|e| fault(&target, &e))?;
        }
    }
    Ok(())
}

fn dump(path: &Path, value: &Value) -> Result<(), ModelError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| fault(path, &e.into()))?;
    text.push(b'\n');
    fs::write(path, text).map_err(|e| fault(path, &e))
}

fn unread(path: &Path, error: &std::io::Error) -> ModelError {
    ModelError::file(path, format!("cannot be read: {error}"))
}
