//! The cluster store: one suite that every backend passes, and what each
//! backend promises beyond it.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod beds;
mod conformance;
mod embedded;
mod etcd;
mod url;
