//! Compiles the wire schemas in pure Rust (no `protoc` needed) and keeps the
//! descriptor set beside the generated code for gRPC reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const SCHEMAS: [&str; 4] = [
    "proto/guild/inference/v1/inference.proto",
    "proto/guild/cluster/v1/cluster.proto",
    "proto/guild/experts/v1/experts.proto",
    "proto/guild/pages/v1/pages.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(SCHEMAS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("guild_descriptors.bin"),
        descriptors.encode_to_vec(),
    )?;
    // Rows are reference counted slices of the received message, not copies.
    // A server that lacks a method says UNIMPLEMENTED: doubles in tests need not list them all.
    tonic_prost_build::configure()
        .generate_default_stubs(true)
        .bytes(".guild.experts.v1")
        .bytes(".guild.pages.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
