//! Leaves for AArch64.

pub(crate) mod bytes;
pub(crate) mod neon;
