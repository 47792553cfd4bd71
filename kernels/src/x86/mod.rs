//! The leaves for x86-64.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod bytes256;
pub(crate) mod bytes512;
pub(crate) mod pairs512;
