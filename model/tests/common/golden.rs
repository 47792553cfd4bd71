//! The golden references: checkpoints and what an independent program computes from them.

use std::path::PathBuf;

use safetensors::SafeTensors;

/// Every golden checkpoint.
pub const CASES: [&str; 6] = [
    "v3-basic",
    "v3-yarn",
    "v3-noqlora",
    "v2-lite",
    "v3-fp8",
    "v3-mtp",
];

/// The checkpoint directory of a case.
pub fn dir(case: &str) -> PathBuf {
    repository().join("tests/golden").join(case)
}

/// The demo checkpoint.
pub fn demo() -> PathBuf {
    repository().join("models/demo")
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The stored tensors of a case.
pub struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    pub fn open(case: &str) -> Golden {
        Golden {
            bytes: std::fs::read(dir(case).join("golden.safetensors")).unwrap(),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors().tensor(name).is_ok()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let (elements, _) = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .data()
            .as_chunks();
        elements.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = self.tensors();
        let (elements, _) = tensors
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .data()
            .as_chunks();
        elements
            .iter()
            .map(|b| u32::try_from(i64::from_le_bytes(*b)).unwrap())
            .collect()
    }

    /// Prefixes of the prompts: p0, p1, ...
    pub fn prompts(&self) -> Vec<String> {
        (0..)
            .map(|p| format!("p{p}"))
            .take_while(|p| self.has(&format!("{p}.input_ids")))
            .collect()
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }
}

/// Greedy continuations of the demo: (prompt, continuation).
pub fn demo_greedy() -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read_to_string(repository().join("tests/golden/demo.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &serde_json::Value| {
        v.as_array()
            .unwrap()
            .iter()
            .map(|i| i.as_u64().unwrap() as u32)
            .collect()
    };
    json["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (ids(&c["prompt_ids"]), ids(&c["greedy_ids"])))
        .collect()
}

/// Fails unless all values are within `bound` of what is expected, naming the first that is not.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (g - e).abs() <= bound,
            "{what}: element {i} is {g}, expected {e} within {bound}"
        );
    }
}

/// As [`assert_close`], with the bound times the largest expected element of each row (or 1, if that is less).
pub fn assert_close_relative(what: &str, got: &[f32], expected: &[f32], width: usize, bound: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (row, (g, e)) in got.chunks(width).zip(expected.chunks(width)).enumerate() {
        let largest = e.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        assert_close(&format!("{what}, row {row}"), g, e, bound * largest);
    }
}

/// Fails unless all values have the same bits.
pub fn assert_same_bits(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            g.to_bits() == e.to_bits(),
            "{what}: element {i} is {g:e}, expected the bits of {e:e}"
        );
    }
}
