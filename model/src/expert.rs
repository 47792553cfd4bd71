//! Experts: down(silu(gate x) * up x), the MLP that dense layers, shared and routed experts have in common.
//!
//! Secret: which tensors one is and how it is computed. An expert node needs nothing else of the
//! model; what an expert's output is worth is the attention node's business.

use guild_kernels::Cpu;

use crate::checkpoint::Dtype;
use crate::weights::{Loader, Matrix};
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
        let mut gate = self.gate.apply(cpu, x);
        cpu.silu_mul(&mut gate, &self.up.apply(cpu, x));
        self.down.apply(cpu, &gate)
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

/// One routed expert of one layer.
#[derive(Debug)]
pub struct Expert {
    mlp: Mlp,
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
        let prefix = format!("model.layers.{layer}.mlp.experts.{expert}");
        Ok(Expert {
            mlp: Mlp::load(
                &Loader::silent(ckpt, dtype),
                &prefix,
                cfg.moe_intermediate_size,
            )?,
        })
    }

    /// Rows `[m, hidden]` to rows `[m, hidden]`, unweighted, each alone.
    pub fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        self.mlp.forward(cpu, x)
    }

    /// Resident bytes.
    pub fn bytes(&self) -> u64 {
        self.mlp.bytes()
    }
}
