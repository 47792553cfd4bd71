//! The DeepSeek-V3 family as data and maths.
//!
//! Secret of this room: what the model is. Configuration, checkpoint and
//! arithmetic of every member of the family, differences kept as data. It uses
//! `kernels` for the arithmetic of the nodes and candle for the slow reference;
//! candle types stop at this surface. It does not know the network, nodes or
//! placement.

pub mod cache;
pub mod checkpoint;
pub mod compare;
pub mod config;
pub mod error;
pub mod expert;
pub mod gate;
pub mod grammar;
pub mod mla;
pub mod mtp;
pub mod quantize;
pub mod random;
pub mod reference;
pub mod sampler;
pub mod text;
pub mod trunk;
pub mod weights;
pub mod whole;
pub mod workspace;

pub use checkpoint::Checkpoint;
pub use config::Config;
pub use error::ModelError;
pub use guild_kernels::{Cpu, Isa};
