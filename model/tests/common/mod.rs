//! What the tests of this room share: the bounds, the goldens, and the path of a token in one process.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

pub mod bounds;
pub mod golden;
pub mod oracle;
pub mod tiny;
