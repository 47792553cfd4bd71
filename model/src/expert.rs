//! Experts: down(silu(gate x) * up x), the MLP that dense layers, shared and routed experts have in common.
//!
//! Secret: which tensors one is, how it is computed, and how a routed expert lies in memory. An expert node
//! needs nothing else of the model; what an expert's output is worth is the attention node's business.

mod arriving;
mod layout;

use std::cell::Cell;

use guild_kernels::{Cpu, Ffn, MatrixRef, reused};

pub use self::arriving::Arriving;
pub(crate) use self::layout::Placed;
use self::layout::{HEADER, Layout, NAMES};
use crate::checkpoint::{Dtype, Mapped, TensorView, blob_name};
use crate::config::Form;
pub use crate::weights::Breathe;
use crate::weights::{self, Blob, Format, Loader, Matrix, PIECE};
use crate::workspace::{Buffer, Workspace};
use crate::{Checkpoint, Config, ModelError};

thread_local! {
    /// Memory of the list that a call makes for the kernels.
    static MLPS: Cell<Vec<Ffn<'static>>> = const { Cell::new(Vec::new()) };
}

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
    pub(crate) fn forward(&self, workspace: &Workspace, x: &[f32]) -> Buffer {
        let matrices = [&self.gate, &self.up, &self.down].map(Matrix::as_ref);
        let mut out = workspace.take(x.len() / self.gate.cols() * self.down.rows());
        workspace.cpu().ffn(&mut out, x, &[mlp(matrices, None)]);
        out
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

fn mlp<'a>([gate, up, down]: [MatrixRef<'a>; 3], rows: Option<&'a [u32]>) -> Ffn<'a> {
    Ffn {
        gate,
        up,
        down,
        rows,
    }
}

/// One routed expert of one layer.
///
/// Its memory is one blob: a header that describes it, then the matrices, 64-byte aligned, in the format they are
/// computed in. The same expert in the same format is the same bytes on every node, so a node can have it from
/// another one as from disk. The bytes are described in `layout.rs`.
#[derive(Debug)]
pub struct Expert {
    memory: Memory,
    layout: Layout,
    digest: [u8; 32],
}

/// Where a blob lies.
#[derive(Debug)]
enum Memory {
    Owned(Blob),
    /// In a file, and in memory as far as it has been used.
    Mapped(Mapped),
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Owned(blob) => blob.as_ref(),
            Memory::Mapped(mapped) => mapped.as_ref(),
        }
    }
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
        Expert::load_by(ckpt, layer, expert, dtype, &|| ())
    }

    /// The same for whoever has other things to do: calls `breathe` after every piece of the work.
    ///
    /// # Errors
    /// As [`Expert::load`].
    pub fn load_by(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
        breathe: Breathe<'_>,
    ) -> Result<Expert, ModelError> {
        let views = match Source::find(ckpt, layer, expert)? {
            Source::Matrices(views) => views,
            Source::Blob(view) => {
                return Expert::packed(ckpt, layer, expert, dtype, &view, breathe).map_err(|e| {
                    match e {
                        // It came from a file.
                        ModelError::Blob { reason, .. } => {
                            ModelError::tensor(view.file(), view.name(), reason)
                        }
                        other => other,
                    }
                });
            }
        };
        let layout = expected(ckpt, layer, expert, dtype)?;
        let mut blob = Blob::with_len(layout.len);
        let bytes = blob.as_mut();
        bytes[..HEADER].copy_from_slice(&layout.header());
        for (view, m) in views.iter().zip(&layout.matrices) {
            let [data, scales] = sections(bytes, m);
            weights::read_weight(view, m.rows, m.cols, m.format, data, scales, breathe)?;
        }
        Ok(Expert {
            digest: hash(blob.as_ref(), breathe),
            memory: Memory::Owned(blob),
            layout,
        })
    }

    /// The same from a blob in a file: a copy of it, or where experts are mapped the file itself.
    fn packed(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
        view: &TensorView<'_>,
        breathe: Breathe<'_>,
    ) -> Result<Expert, ModelError> {
        let Some((mapped, listed)) = ckpt.mapped(view.name()).zip(view.listed()) else {
            let mut arriving = Arriving::new(ckpt, layer, expert, dtype)?;
            for piece in view.bytes().chunks(PIECE) {
                arriving.take(piece)?;
                breathe();
            }
            return arriving.finish();
        };
        let layout = expected(ckpt, layer, expert, dtype)?;
        layout
            .found(mapped.as_ref())
            .map_err(|reason| ModelError::Blob {
                layer,
                expert,
                reason,
            })?;
        Ok(Expert {
            memory: Memory::Mapped(mapped),
            layout,
            // Whether it is so is found out later, by whoever holds it against `hash_by`.
            digest: *listed.as_bytes(),
        })
    }

    /// Takes over an expert that came as the blob of another node and is here already: see [`Arriving`].
    ///
    /// # Errors
    /// As [`Arriving::new`], [`Arriving::take`] and [`Arriving::finish`].
    pub fn from_blob(
        ckpt: &Checkpoint,
        layer: usize,
        expert: usize,
        dtype: Dtype,
        blob: &[u8],
    ) -> Result<Expert, ModelError> {
        let mut arriving = Arriving::new(ckpt, layer, expert, dtype)?;
        arriving.take(blob)?;
        arriving.finish()
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

    /// The expert as it lies in memory.
    pub fn blob(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// BLAKE3 of [`Expert::blob`] as it was when it was read or came; of a mapped one, as the manifest has it.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// BLAKE3 of [`Expert::blob`] as it is now; `breathe` is called after every piece of the work.
    pub fn hash_by(&self, breathe: Breathe<'_>) -> [u8; 32] {
        hash(self.blob(), breathe)
    }

    /// Rows `[m, hidden]` to rows `[m, hidden]`, unweighted, each alone.
    pub fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        let [gate, _, down] = &self.layout.matrices;
        let mut out = vec![0.0; x.len() / gate.cols * down.rows];
        cpu.ffn(&mut out, x, &[self.mlp(None)]);
        out
    }

    /// Several experts of a model at once, each on its own of rows `x` `[n, hidden]`: into `out` `[pairs, hidden]` go
    /// the rows of the first, then those of the second, and so on. The bits are those of [`Expert::forward`].
    ///
    /// # Panics
    /// A row past the end of `x`, or `out` of another size.
    pub fn forward_all(cpu: &Cpu, out: &mut [f32], x: &[f32], experts: &[(&Expert, &[u32])]) {
        let mut mlps = reused(MLPS.take());
        mlps.extend(experts.iter().map(|(expert, rows)| expert.mlp(Some(rows))));
        cpu.ffn(out, x, &mlps);
        MLPS.set(reused(mlps));
    }

    fn mlp<'a>(&'a self, rows: Option<&'a [u32]>) -> Ffn<'a> {
        mlp(
            self.layout.matrices.each_ref().map(|m| self.matrix(m)),
            rows,
        )
    }

    /// Resident bytes of its weights. The blob has a few hundred more, header and padding.
    pub fn bytes(&self) -> u64 {
        self.layout.weight_bytes()
    }

    fn matrix(&self, m: &Placed) -> MatrixRef<'_> {
        let blob = self.memory.bytes();
        let (data, scales) = (&blob[m.data.clone()], &blob[m.scales.clone()]);
        m.format.matrix(m.rows, m.cols, data, scales)
    }
}

fn hash(blob: &[u8], breathe: Breathe<'_>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for piece in blob.chunks(PIECE) {
        hasher.update(piece);
        breathe();
    }
    *hasher.finalize().as_bytes()
}

/// Data and scales of a matrix in a blob.
fn sections<'a>(blob: &'a mut [u8], m: &Placed) -> [&'a mut [u8]; 2] {
    let (data, scales) = blob[m.data.start..].split_at_mut(m.data.len());
    let start = m.scales.start.saturating_sub(m.data.end);
    [data, &mut scales[start..][..m.scales.len()]]
}

/// In which tensors a checkpoint keeps an expert.
enum Source<'a> {
    /// Gate, up and down.
    Matrices([TensorView<'a>; 3]),
    /// One that is its blob.
    Blob(TensorView<'a>),
}

impl<'a> Source<'a> {
    /// Of an expert that the model must have.
    fn find(ckpt: &'a Checkpoint, layer: usize, expert: usize) -> Result<Source<'a>, ModelError> {
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
        let packed = cfg.packed.filter(|p| p.experts.is_some());
        let ending = match packed.map(|p| p.form) {
            Some(Form::Guild) => {
                return Ok(Source::Blob(ckpt.tensor(&blob_name(layer, expert))?));
            }
            Some(Form::CompressedTensors) => "weight_packed",
            None => "weight",
        };
        let tensor = |name: &str| {
            ckpt.tensor(&format!(
                "model.layers.{layer}.mlp.experts.{expert}.{name}_proj.{ending}"
            ))
        };
        let [gate, up, down] = NAMES;
        Ok(Source::Matrices([
            tensor(gate)?,
            tensor(up)?,
            tensor(down)?,
        ]))
    }
}

impl Checkpoint {
    /// What [`Expert::bytes`] of this expert is or would be: for planning by those who hold no experts.
    ///
    /// # Errors
    /// As [`Expert::load`], without reading a value.
    pub fn expert_memory(
        &self,
        layer: usize,
        expert: usize,
        dtype: Dtype,
    ) -> Result<u64, ModelError> {
        Ok(expected(self, layer, expert, dtype)?.weight_bytes())
    }
}

/// The layout that an expert of this model has.
fn expected(
    ckpt: &Checkpoint,
    layer: usize,
    expert: usize,
    dtype: Dtype,
) -> Result<Layout, ModelError> {
    let formats = match Source::find(ckpt, layer, expert)? {
        Source::Matrices([gate, up, down]) => [
            Format::of(&gate, dtype)?,
            Format::of(&up, dtype)?,
            Format::of(&down, dtype)?,
        ],
        Source::Blob(view) => [Format::of(&view, dtype)?; 3],
    };
    // Both are far below the configuration's limits.
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    layout_of(ckpt.config(), number(layer), number(expert), formats).ok_or_else(|| {
        ModelError::config(
            "moe_intermediate_size",
            "an expert of this shape is larger than any memory",
        )
    })
}

fn layout_of(cfg: &Config, layer: u32, expert: u32, formats: [Format; 3]) -> Option<Layout> {
    let (inner, hidden) = (cfg.moe_intermediate_size, cfg.hidden_size);
    let [gate, up, down] = formats;
    let matrices = [
        (gate, inner, hidden),
        (up, inner, hidden),
        (down, hidden, inner),
    ];
    Layout::new(layer, expert, matrices)
}

/// Bytes of an expert's blob in a checkpoint that has experts packed; 0 in others.
pub(crate) fn packed_len(cfg: &Config) -> usize {
    let packed = cfg.packed.as_ref();
    let format = packed.and_then(|p| {
        let (int, group) = (p.experts?, p.group);
        Some(Format::Packed { int, group })
    });
    let layout = format.and_then(|format| layout_of(cfg, 0, 0, [format; 3]));
    layout.map_or(0, |layout| layout.len)
}

/// Where a matrix of an expert lies in its stored blob, by the matrix' full name in a plain checkpoint.
pub(crate) fn stored_matrix<'a>(
    ckpt: &'a Checkpoint,
    name: &str,
) -> Result<(TensorView<'a>, Placed), ModelError> {
    let unknown = || ModelError::tensor(ckpt.dir(), name, "is no matrix of an expert");
    let (layer, expert, matrix) = placed(name).ok_or_else(unknown)?;
    let Source::Blob(view) = Source::find(ckpt, layer, expert)? else {
        return Err(unknown());
    };
    let layout = expected(ckpt, layer, expert, Dtype::Auto)?;
    let found = layout.found(view.bytes());
    found.map_err(|reason| ModelError::tensor(view.file(), view.name(), reason))?;
    let [gate, up, down] = layout.matrices;
    let place = match matrix {
        0 => gate,
        1 => up,
        _ => down,
    };
    Ok((view, place))
}

/// Layer, expert and which of [`NAMES`] in `model.layers.L.mlp.experts.E.NAME_proj.weight`.
pub(crate) fn placed(name: &str) -> Option<(usize, usize, usize)> {
    let (layer, rest) = { name.strip_prefix("model.layers.")? }.split_once(".mlp.experts.")?;
    let (expert, matrix) = { rest.strip_suffix("_proj.weight")? }.split_once('.')?;
    let matrix = NAMES.iter().position(|&n| n == matrix)?;
    Some((layer.parse().ok()?, expert.parse().ok()?, matrix))
}
