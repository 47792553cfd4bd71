//! Which tensor spoils a safetensors header.
//!
//! The format's own reader decides whether a header is good; its complaints
//! seldom name a tensor. This looks again at a refused header and finds it.

use serde_json::{Map, Value};

/// The first tensor of a refused header that is wrong in itself, or collides with another, and why.
///
/// None when the header is not even a JSON object, or when the fault lies elsewhere.
pub(super) fn culprit(header: &[u8], data: usize) -> Option<(String, String)> {
    let Ok(Value::Object(map)) = serde_json::from_slice(header) else {
        return None;
    };
    let mut ranges = Vec::with_capacity(map.len());
    for (name, entry) in map.iter().filter(|(name, _)| *name != "__metadata__") {
        match range(entry, data) {
            Ok((from, to)) => ranges.push((from, to, name)),
            Err(reason) => return Some((name.clone(), reason)),
        }
    }
    ranges.sort();
    let mut end = 0;
    let mut before: Option<&String> = None;
    for (from, to, name) in ranges {
        let neighbour = before.map_or_else(|| "the start of the data".into(), |n| format!("`{n}`"));
        if from < end {
            return Some((
                name.clone(),
                format!(
                    "data_offsets [{from}, {to}] overlap those of {neighbour}, which end at {end}"
                ),
            ));
        }
        if from > end {
            return Some((
                name.clone(),
                format!("data_offsets [{from}, {to}] leave a hole after {neighbour}, at {end}"),
            ));
        }
        (end, before) = (to, Some(name));
    }
    None
}

/// The offsets of one entry, if it is sound by itself.
fn range(entry: &Value, data: usize) -> Result<(u64, u64), String> {
    let Value::Object(entry) = entry else {
        return Err("its header entry is not an object".into());
    };
    let dtype: safetensors::Dtype = field(entry, "dtype")?;
    let shape: Vec<u64> = field(entry, "shape")?;
    let (from, to): (u64, u64) = field(entry, "data_offsets")?;
    if from > to {
        return Err(format!("data_offsets [{from}, {to}] run backwards"));
    }
    if to > data as u64 {
        return Err(format!(
            "truncated: data_offsets [{from}, {to}], but the file holds {data} bytes of data"
        ));
    }
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d));
    match bits {
        Some(bits) if bits == (to - from) * 8 => Ok((from, to)),
        _ => Err(format!(
            "shape {shape:?} of {dtype} does not fill data_offsets [{from}, {to}]"
        )),
    }
}

fn field<T: serde::de::DeserializeOwned>(
    entry: &Map<String, Value>,
    key: &str,
) -> Result<T, String> {
    let value = entry
        .get(key)
        .ok_or_else(|| format!("its header entry has no {key}"))?;
    T::deserialize(value).map_err(|e| format!("{key} of its header entry: {e}"))
}
