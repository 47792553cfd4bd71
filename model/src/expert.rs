//! Experts: down(silu(gate x) * up x), the MLP that dense layers, shared and routed experts have in common.
//!
//! Secret: which tensors one is, how it is computed, and how a routed expert lies in memory. An expert node
//! needs nothing else of the model; what an expert's output is worth is the attention node's business.

mod layout;

use std::ops::Range;
use std::sync::OnceLock;

use guild_kernels::{Cpu, MatrixRef, WeightsRef};

use self::layout::{HEADER, Layout, NAMES, Placed};
use crate::checkpoint::{Dtype, TensorView, manifest};
pub use crate::weights::Blob;
use crate::weights::{self, Format, Loader, Matrix};
use crate::{Checkpoint, ModelError};

/// A gated MLP (SwiGLU), resident.
#[derive(Debug)]
pub struct Mlp {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Mlp {
    pub(crate) fn load(loader: &Loader<'_>, prefix: &str, inner: usize) -> Result<Mlp, ModelError> {
        let hidden = loader.config().hidden_size;
        Ok(Mlp {
            gate: loader.matrix(&format!("{prefix}.gate_proj"), inner, hidden)?,
            up: loader.matrix(&format!("{prefix}.up_proj"), inner, hidden)?,
            down: loader.matrix(&format!("{prefix}.down_proj"), hidden, inner)?,
        })
    }

    /// Rows `[m, hidden]` to rows `[m, hidden]`, each alone.
    pub fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        swiglu(
            cpu,
            [&self.gate, &self.up, &self.down].map(Matrix::as_ref),
            x,
        )
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

fn swiglu(cpu: &Cpu, [gate, up, down]: [MatrixRef<'_>; 3], x: &[f32]) -> Vec<f32> {
    let mut inner = weights::apply(cpu, gate, x);
    cpu.silu_mul(&mut inner, &weights::apply(cpu, up, x));
    weights::apply(cpu, down, &inner)
}

/// One routed expert of one layer.
///
/// Its memory is one blob: a header that describes it, then the matrices, 64-byte aligned, in the format they are
/// computed in. The same expert in the same format is the same bytes on every node, so a node can have it from
/// another one as from disk. The bytes are described in `layout.rs`.
#[derive(Debug)]
pub struct Expert {
    blob: Blob,
    layout: Layout,
    digest: OnceLock<[u8; 32]>,
}

impl Expert {
    /// Reads one expert, and only its tensors. The MTP layer's index is `num_hidden_layers`.
    ///
    /// # Errors
    /// A layer without experts, an expert past the end, or a tensor that cannot be used.
    pub fn load(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
    ) -> Result<Expert, ModelError> {
        let layout = expected(ckpt, layer, expert, dtype)?;
        let mut blob = Blob::with_len(layout.len);
        let bytes = blob.as_mut();
        bytes[..HEADER].copy_from_slice(&layout.header());
        for (view, m) in tensors(ckpt, layer, expert)?.iter().zip(&layout.matrices) {
            let data = &mut bytes[m.data.clone()];
            let scales = weights::read_weight(view, m.rows, m.cols, m.format, data)?;
            bytes[m.scales.clone()].copy_from_slice(bytemuck::cast_slice(&scales));
        }
        Ok(Expert {
            blob,
            layout,
            digest: OnceLock::new(),
        })
    }

    /// Takes over an expert that came as the blob of another node.
    ///
    /// Any bytes may be given: the header must be exactly that of this expert of this model in this dtype, the
    /// length must follow from it, the padding must be zero and every value finite. Where a manifest lists the
    /// tensors and they are in memory as they are stored, their digests must be the listed ones.
    ///
    /// # Errors
    /// As [`Expert::load`] where the model has no such expert; otherwise [`ModelError::Blob`] with the field or
    /// matrix that is wrong.
    pub fn from_blob(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
        blob: Blob,
    ) -> Result<Expert, ModelError> {
        let layout = expected(ckpt, layer, expert, dtype)?;
        let bad = |reason| ModelError::Blob {
            layer,
            expert,
            reason,
        };
        let found = Layout::parse(blob.as_ref()).map_err(bad)?;
        layout.expect(&found).map_err(bad)?;
        let listed = |view: &TensorView<'_>, range: &Range<usize>| match view.listed() {
            Some(listed) if blake3::hash(&blob.as_ref()[range.clone()]) != listed => {
                let (tensor, list) = (view.name(), manifest::FILE);
                Err(bad(format!("`{tensor}` is not what {list} lists")))
            }
            _ => Ok(()),
        };
        let stored = tensors(ckpt, layer, expert)?;
        for ((m, name), view) in layout.matrices.iter().zip(NAMES).zip(stored) {
            let data = &blob.as_ref()[m.data.clone()];
            if let Some(at) = m.format.stored().first_not_finite(data) {
                return Err(bad(format!("{name}: element {at} is not a finite number")));
            }
            let scales = bytemuck::cast_slice(&blob.as_ref()[m.scales.clone()]);
            if let Some(at) = weights::odd_scale(scales) {
                return Err(bad(format!("{name}: scale {at} is too large for a scale")));
            }
            // Bytes as they are stored are bytes that the manifest lists.
            if view.dtype() == m.format.stored() {
                listed(&view, &m.data)?;
                if let Some(scales) = view.scales()? {
                    listed(&scales, &m.scales)?;
                }
            }
        }
        Ok(Expert {
            blob,
            layout,
            digest: OnceLock::new(),
        })
    }

    /// What a blob of this expert must measure, in bytes. Others can be refused before memory is taken for them.
    ///
    /// # Errors
    /// As [`Expert::load`], without reading a value.
    pub fn blob_len(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
    ) -> Result<usize, ModelError> {
        Ok(expected(ckpt, layer, expert, dtype)?.len)
    }

    /// What [`Expert::bytes`] of this expert is or would be.
    ///
    /// # Errors
    /// As [`Expert::load`], without reading a value.
    pub fn bytes_of(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
    ) -> Result<u64, ModelError> {
        Ok(expected(ckpt, layer, expert, dtype)?.weight_bytes())
    }

    /// The expert as it lies in memory.
    pub fn blob(&self) -> &[u8] {
        self.blob.as_ref()
    }

    /// BLAKE3 of [`Expert::blob`]; computed by the first call.
    pub fn digest(&self) -> [u8; 32] {
        *self
            .digest
            .get_or_init(|| *blake3::hash(self.blob()).as_bytes())
    }

    /// Rows `[m, hidden]` to rows `[m, hidden]`, unweighted, each alone.
    pub fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        swiglu(
            cpu,
            self.layout.matrices.each_ref().map(|m| self.matrix(m)),
            x,
        )
    }

    /// Resident bytes of its weights. The blob has a few hundred more, header and padding.
    pub fn bytes(&self) -> u64 {
        self.layout.weight_bytes()
    }

    fn matrix(&self, m: &Placed) -> MatrixRef<'_> {
        let data = &self.blob.as_ref()[m.data.clone()];
        MatrixRef {
            rows: m.rows,
            cols: m.cols,
            data: match m.format {
                Format::F32 => WeightsRef::F32(bytemuck::cast_slice(data)),
                Format::Bf16 => WeightsRef::Bf16(bytemuck::cast_slice(data)),
                Format::Fp8 => WeightsRef::Fp8 {
                    data,
                    scales: bytemuck::cast_slice(&self.blob.as_ref()[m.scales.clone()]),
                },
            },
        }
    }
}

/// Gate, up and down of an expert that the model must have.
fn tensors(
    ckpt: &Checkpoint,
    layer: usize,
    expert: usize,
) -> Result<[TensorView<'_>; 3], ModelError> {
    let cfg = ckpt.config();
    if layer >= cfg.num_hidden_layers + cfg.num_nextn_predict_layers || !cfg.is_moe(layer) {
        return Err(ModelError::input(
            "layer",
            format!("{layer} is not a layer with experts"),
        ));
    }
    if expert >= cfg.n_routed_experts {
        return Err(ModelError::input(
            "expert",
            format!("{expert} of a layer with {}", cfg.n_routed_experts),
        ));
    }
    let tensor = |name: &str| {
        ckpt.tensor(&format!(
            "model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        ))
    };
    let [gate, up, down] = NAMES;
    Ok([tensor(gate)?, tensor(up)?, tensor(down)?])
}

/// The layout that an expert of this model has.
fn expected(
    ckpt: &Checkpoint,
    layer: usize,
    expert: usize,
    dtype: Dtype,
) -> Result<Layout, ModelError> {
    let cfg = ckpt.config();
    let (inner, hidden) = (cfg.moe_intermediate_size, cfg.hidden_size);
    let [gate, up, down] = tensors(ckpt, layer, expert)?.map(|v| Format::of(v.dtype(), dtype));
    let matrices = [
        (gate, inner, hidden),
        (up, inner, hidden),
        (down, hidden, inner),
    ];
    // Both are far below the configuration's limits.
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Layout::new(number(layer), number(expert), matrices).ok_or_else(|| {
        ModelError::config(
            "moe_intermediate_size",
            "an expert of this shape is larger than any memory",
        )
    })
}
