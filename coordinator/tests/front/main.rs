//! The front door before a scripted cluster.

#![allow(clippy::unwrap_used)]

mod auth;
mod bad_inputs;
mod chat;
mod completions;
mod constraints;
mod fake;
mod grpc;
mod responses;
mod serving;
mod tools;
