//! Figures beside what the machine allows. Secret: how they are written.

use std::io::Write as _;

use guild_kernels::{Cpu, Memory};
use serde_json::json;

use crate::failure::Failure;

/// One measured rate.
#[derive(Debug, Clone)]
pub(super) struct Figure {
    pub(super) name: String,
    /// Of weights, or of cached rows.
    pub(super) format: String,
    /// Rows at a time.
    pub(super) m: usize,
    pub(super) threads: usize,
    /// More is better.
    pub(super) value: f64,
    pub(super) unit: &'static str,
    /// The value that the machine would allow.
    pub(super) floor: f64,
    /// What does not allow more.
    pub(super) bound: &'static str,
}

/// Writes a table, or one JSON object a line.
pub(super) fn print(machine: &str, figures: &[Figure], as_json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if as_json {
        for f in figures {
            let line = json!({
                "name": f.name, "format": f.format, "m": f.m, "threads": f.threads, "value": f.value,
                "unit": f.unit, "floor": f.floor, "ratio": f.value / f.floor, "bound": f.bound,
            });
            writeln!(out, "{line}")?;
        }
        return Ok(());
    }
    writeln!(out, "{machine}")?;
    writeln!(
        out,
        "{:<38} {:<6} {:>5} {:>7} {:>10} {:<9} {:>10} {:>6}  bound by",
        "", "format", "m", "threads", "value", "", "floor", "ratio"
    )?;
    for f in figures {
        writeln!(
            out,
            "{:<38} {:<6} {:>5} {:>7} {:>10} {:<9} {:>10} {:>5.0}%  {}",
            f.name,
            f.format,
            f.m,
            f.threads,
            short(f.value),
            f.unit,
            short(f.floor),
            100.0 * f.value / f.floor,
            f.bound
        )?;
    }
    Ok(())
}

/// Memory whose every byte, and so every scale and weight made of it, is a small finite number.
pub(super) fn filled(cpu: &Cpu, bytes: usize) -> Result<Memory, Failure> {
    let mut memory = Memory::new(bytes)?;
    cpu.par_chunks(&mut memory, 1 << 20, |i, piece| {
        for (j, byte) in piece.iter_mut().enumerate() {
            *byte = (i * 31 + j * 7) as u8 & 0x3f;
        }
    });
    Ok(memory)
}

/// Three digits or so.
fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// The middle one; NaN of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}
