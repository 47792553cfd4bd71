//! The harness of the outside tests: real `guild` processes on loopback, a
//! small HTTP client that can send what no well-behaved client would, the gRPC
//! client, and the golden files. It may use every room; nothing uses it.

#![allow(clippy::unwrap_used)]

pub mod certs;
pub mod client;
pub mod etcd;
pub mod golden;
pub mod house;
pub mod http;
pub mod load;
pub mod process;
pub mod proxy;
pub mod sim;
pub mod work;
